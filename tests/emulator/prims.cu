// Small kernels, each of which does with one primitive of csrc/cuda/prims.cuh what its comment there says. On a GPU or
// in the emulator, tests/test_prims.py compares what they write with plain code.

#include "../../csrc/cuda/philox.cuh"
#include "../../csrc/cuda/prims.cuh"
#include "kernels.h"

namespace fastgpt::cuda::testing {
namespace {

FASTGPT_PRIM int tid() { return static_cast<int>(threadIdx.x); }

// out: for each thread of the grid in order, its 12 indices and sizes.
__global__ void geometry(const void*, int* out, int) {
  const int block = static_cast<int>((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x);
  const int thread = static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
  int* mine = out + (block * static_cast<int>(blockDim.x * blockDim.y * blockDim.z) + thread) * 12;
  const unsigned values[12] = {threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z,
                               blockDim.x,  blockDim.y,  blockDim.z,  gridDim.x,  gridDim.y,  gridDim.z};
  for (int i = 0; i < 12; ++i) stg(mine + i, static_cast<int>(values[i]));
}

// out: lane and warp of each of 96 threads.
__global__ void lanes(const void*, int* out, int) {
  stg(out + 2 * tid(), lane_id());
  stg(out + 2 * tid() + 1, warp_id());
}

// n bytes of in to out through registers and, where kShared, shared memory, kBytes at a time.
template <int kBytes, bool kShared>
__global__ void move(const uint8_t* in, uint8_t* out, int n) {
  using T = Vec<uint8_t, kBytes>;
  SHARED(T, passing, 32);
  for (int i = tid(); i < n / kBytes; i += 32) {
    T value = ldg(reinterpret_cast<const T*>(in) + i);
    if constexpr (kShared) {
      sts(passing + tid(), value);
      value = lds(passing + tid());
    }
    stg(reinterpret_cast<T*>(out) + i, value);
  }
}

// in: 32 rows of 8 16-bit elements, four matrices. out: what each lane gets, 4 words.
template <bool kTransposed>
__global__ void matrices(const uint16_t* in, uint32_t* out, int) {
  SHARED(uint16_t, rows, 256);
  sts((rows + 8 * tid()).as<Vec<uint16_t, 8>>(), ldg(reinterpret_cast<const Vec<uint16_t, 8>*>(in) + tid()));
  __syncwarp();
  uint32_t got[4];
  if (kTransposed) {
    ldmatrix_x4_trans(got, rows + 8 * tid());
  } else {
    ldmatrix_x4(got, rows + 8 * tid());
  }
  for (int i = 0; i < 4; ++i) stg(out + 4 * tid() + i, got[i]);
}

// in: A (16 x 16) and B (16 x 8) of T, C (16 x 8) of float. out: A * B + C. The elements that a lane holds are as
// the comment on mma_m16n8k16 has them.
template <class T>
__global__ void multiply(const uint16_t* in, float* out, int) {
  const uint16_t *a = in, *b = in + 256;
  const float* c = reinterpret_cast<const float*>(in + 384);
  const int g = tid() / 4, t = tid() % 4;
  const auto pair = [](const uint16_t* low, const uint16_t* high) { return uint32_t{ldg(low)} | ldg(high) << 16; };
  const auto row_pair = [&](int row, int column) { return pair(a + 16 * row + column, a + 16 * row + column + 1); };
  const auto column_pair = [&](int row) { return pair(b + 8 * row + g, b + 8 * (row + 1) + g); };
  const uint32_t as[4] = {row_pair(g, 2 * t), row_pair(g + 8, 2 * t), row_pair(g, 2 * t + 8),
                          row_pair(g + 8, 2 * t + 8)};
  float acc[4];
  for (int i = 0; i < 4; ++i) acc[i] = ldg(c + 8 * (g + 8 * (i / 2)) + 2 * t + i % 2);
  mma_m16n8k16<T>(acc, as, column_pair(2 * t), column_pair(2 * t + 8));
  for (int i = 0; i < 4; ++i) stg(out + 8 * (g + 8 * (i / 2)) + 2 * t + i % 2, acc[i]);
}

// in: 64 times 16 bytes, of which the first n are copied and the others zero.
__global__ void copy(const float* in, float* out, int n) {
  SHARED(float, tile, 256);
  cp_async_16(tile + 4 * tid(), in + 4 * tid(), tid() < n);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  for (int i = tid(); i < 256; i += 64) stg(out + i, lds(tile + i));
}

// in: n tiles of 128 floats, which pass through a ring of three; two are always under way. out: the same.
__global__ void copy_in_groups(const float* in, float* out, int n) {
  SHARED(float, ring, 3 * 128);
  const auto start = [&](int i) {
    if (i < n) cp_async_16(ring + ((i % 3) * 128 + 4 * tid()), in + 128 * i + 4 * tid());
    cp_async_commit();
  };
  start(0);
  start(1);
  for (int i = 0; i < n; ++i) {
    start(i + 2);
    cp_async_wait<2>();
    __syncwarp();
    for (int j = tid(); j < 128; j += 32) stg(out + 128 * i + j, lds(ring + ((i % 3) * 128 + j)));
    __syncwarp();
  }
}

// Each half of the block passes its own numbers around, with a barrier of its own: the one n times, the other 2 * n.
__global__ void halves(const int* in, int* out, int n) {
  SHARED(int, array, 128);
  const int half = tid() / 64, at = tid() % 64;
  const Shared<int> mine = array + 64 * half;
  int value = ldg(in + tid());
  for (int i = 0; i < n * (half + 1); ++i) {
    sts(mine + at, value);
    bar_sync(1 + half, 64);
    value = lds(mine + (at + 1) % 64) + 1;
    bar_sync(1 + half, 64);
  }
  stg(out + tid(), value);
}

// in: 32 numbers. out: 5 times 32; the last of the lower half alone. n: a distance.
template <class T>
__global__ void shuffles(const T* in, T* out, int n) {
  const T x = ldg(in + tid());
  stg(out + tid(), __shfl_sync(kFullMask, x, 5 * tid() + n));
  stg(out + 32 + tid(), __shfl_xor_sync(kFullMask, x, n));
  stg(out + 64 + tid(), __shfl_up_sync(kFullMask, x, n));
  stg(out + 96 + tid(), __shfl_down_sync(kFullMask, x, n));
  if (tid() < 16) stg(out + 128 + tid(), __shfl_xor_sync(0x0000ffffu, x, n % 16));
}

// in: 32 numbers. out: ballot, any and all of x != 0, by lane; each half of the warp votes for itself where n != 0.
__global__ void votes(const int* in, int* out, int n) {
  const int x = ldg(in + tid());
  const unsigned mask = n == 0 ? kFullMask : tid() < 16 ? 0x0000ffffu : 0xffff0000u;
  stg(out + tid(), static_cast<int>(__ballot_sync(mask, x)));
  stg(out + 32 + tid(), __any_sync(mask, x) != 0 ? 1 : 0);
  stg(out + 64 + tid(), __all_sync(mask, x) != 0 ? 1 : 0);
}

// The halves of a warp go their own ways, one of them longer, and fetch their results when they like.
__global__ void warp_in_two(const int* in, int* out, int n) {
  const int x = ldg(in + tid());
  int sum = 0;
  if (tid() < 16) {
    for (int i = 0; i < n; ++i) sum += static_cast<int>(__ballot_sync(0x0000ffffu, x > i));
  } else {
    for (int i = 0; i < 2 * n; ++i) sum += __shfl_xor_sync(0xffff0000u, x, 1 + i % 15);
  }
  stg(out + tid(), sum);
}

// in: 32 floats. out: sum and maximum, by lane.
__global__ void reductions(const float* in, float* out, int) {
  const float x = ldg(in + tid());
  stg(out + tid(), warp_sum(x));
  stg(out + 32 + tid(), warp_max(x));
}

// Lanes read what the next one wrote, n times.
__global__ void exchange(const int* in, int* out, int n) {
  SHARED(int, array, 32);
  int value = ldg(in + tid());
  for (int i = 0; i < n; ++i) {
    sts(array + tid(), value);
    __syncwarp();
    value = lds(array + (tid() + 1) % 32);
    __syncwarp();
  }
  stg(out + tid(), value);
}

template <class From, class To, class F>
FASTGPT_PRIM void for_each(const void* in, void* out, int n, F f) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x) + tid();
  if (i < n) stg(static_cast<To*>(out) + i, f(ldg(static_cast<const From*>(in) + i)));
}

template <class T>
__global__ void widen(const void* in, void* out, int n) {
  for_each<T, float>(in, out, n, [](T x) { return to_float(x); });
}
template <class T>
__global__ void narrow(const void* in, void* out, int n) {
  for_each<float, T>(in, out, n, [](float x) { return from_float<T>(x); });
}
template <class T>
__global__ void pack_pairs(const void* in, void* out, int n) {
  for_each<Vec<float, 2>, uint32_t>(in, out, n, [](Vec<float, 2> x) { return pack<T>(x[0], x[1]); });
}
__global__ void exponential(const void* in, void* out, int n) {
  for_each<float, float>(in, out, n, [](float x) { return fast_exp2(x); });
}
// in: n floats. out: of each e^x, log, 1 / x and 1 / sqrt(x), by the intrinsics.
__global__ void intrinsics(const void* in, void* out, int n) {
  for_each<float, Vec<float, 4>>(
      in, out, n, [](float x) { return Vec<float, 4>{{__expf(x), __logf(x), __fdividef(1.0f, x), rsqrtf(x)}}; });
}

// in: a seed. out: for i < n the words of elements 4 * i to 4 * i + 3, and of keys likewise in row i + 2^33.
__global__ void words(const int64_t* in, Vec<uint32_t, 4>* out, int n) {
  const Dropper drop({in, 0, 1.0f});
  for (int i = tid(); i < n; i += 32) {
    const Words elements = drop.elements((int64_t{3} << 32) + i), keys = drop.keys((int64_t{1} << 33) + i, i);
    stg(out + 2 * i, Vec<uint32_t, 4>{{elements.at(0), elements.at(1), elements.at(2), elements.at(3)}});
    stg(out + 2 * i + 1, Vec<uint32_t, 4>{{keys.x, keys.y, keys.z, keys.w}});
  }
}

// For the counters of bank conflicts. Floats n apart, by 32 lanes:
__global__ void lds_strided(const void*, void*, int n) {
  SHARED(float, array, 32 * 33);
  for (int i = tid(); i < 32 * 33; i += 32) sts(array + i, 0.0f);
  __syncwarp();
  lds(array + n * tid());
}
// 16 bytes by each of 32 lanes: the n-th chunk of its row of 128 bytes, or, where kSwizzled, where chunks change places
// by row.
template <bool kSwizzled>
__global__ void lds_rows(const void*, void*, int n) {
  using Chunk = Vec<float, 4>;
  SHARED(Chunk, rows, 32 * 8);
  for (int i = tid(); i < 32 * 8; i += 32) sts(rows + i, Chunk{});
  __syncwarp();
  lds(rows + (8 * tid() + (kSwizzled ? n ^ tid() % 8 : n)));
}
// Rows n elements apart.
__global__ void ldmatrix_rows(const void*, void*, int n) {
  SHARED(bf16, rows, 32 * 72);
  for (int i = tid(); i < 32 * 72; i += 32) sts(rows + i, bf16());
  __syncwarp();
  uint32_t out[4];
  ldmatrix_x4(out, rows + n * tid());
}

// For the counters of global memory. Elements n apart, read by 32 lanes, or written:
template <class T>
__global__ void ldg_strided(const T* in, void*, int n) {
  ldg(in + n * tid());
}
template <class T>
__global__ void stg_strided(const void*, T* out, int n) {
  stg(out + n * tid(), T());
}
// 32 floats from the n-th on.
__global__ void ldg_offset(const float* in, void*, int n) { ldg(in + (n + tid())); }
// The first n of 32 floats, n times over.
__global__ void ldg_of_some_lanes(const float* in, void*, int n) {
  for (int i = 0; i < n; ++i) {
    if (tid() < n) ldg(in + tid());
  }
}
// 32 floats by n lanes; then, at the same place of the source, the next 32 by all.
__global__ void ldg_after_a_branch(const float* in, void*, int n) {
  const auto read = [&](int row) { ldg(in + (32 * row + tid())); };
  if (tid() < n) read(0);
  __syncwarp();
  read(1);
}
// 16 floats are loaded and 16 are stored, each by half of a warp, in one line.
__global__ void ldg_and_stg(const float* in, float* out, int) {
  tid() < 16 ? stg(out + tid(), 0.0f) : static_cast<void>(ldg(in + (tid() - 16)));
}

// The addresses that a kernel is given, of the types that it wants.
struct In {
  const void* address;
  template <class T>
  operator const T*() const {
    return static_cast<const T*>(address);
  }
};
struct Out {
  void* address;
  template <class T>
  operator T*() const {
    return static_cast<T*>(address);
  }
};

template <auto kKernel, int kThreads = 32>
void one_block(const void* in, void* out, int n) {
  launch<kKernel>(dim3(1), dim3(kThreads), 0, nullptr, In{in}, Out{out}, n);
}

// A thread for each of n elements.
template <auto kKernel>
void over_all(const void* in, void* out, int n) {
  launch<kKernel>(dim3(static_cast<unsigned>((n + 255) / 256)), dim3(256), 0, nullptr, In{in}, Out{out}, n);
}

// n: blocks in z, each of 4 x 2 x 8 threads.
void grid(const void* in, void* out, int n) {
  launch<geometry>(dim3(2, 3, static_cast<unsigned>(n)), dim3(4, 2, 8), 0, nullptr, In{in}, Out{out}, n);
}

}  // namespace

const std::map<std::string, Prim>& prims() {
  static const std::map<std::string, Prim> all{
      {"grid", grid},
      {"lanes", one_block<lanes, 96>},
      {"move_1", one_block<move<1, false>>},
      {"move_2", one_block<move<2, false>>},
      {"move_4", one_block<move<4, false>>},
      {"move_8", one_block<move<8, false>>},
      {"move_16", one_block<move<16, false>>},
      {"move_shared_2", one_block<move<2, true>>},
      {"move_shared_4", one_block<move<4, true>>},
      {"move_shared_8", one_block<move<8, true>>},
      {"move_shared_16", one_block<move<16, true>>},
      {"ldmatrix_x4", one_block<matrices<false>>},
      {"ldmatrix_x4_trans", one_block<matrices<true>>},
      {"mma_bf16", one_block<multiply<bf16>>},
      {"mma_fp16", one_block<multiply<fp16>>},
      {"copy", one_block<copy, 64>},
      {"copy_in_groups", one_block<copy_in_groups>},
      {"halves", one_block<halves, 128>},
      {"shuffles_int", one_block<shuffles<int>>},
      {"shuffles_float", one_block<shuffles<float>>},
      {"votes", one_block<votes>},
      {"warp_in_two", one_block<warp_in_two>},
      {"reductions", one_block<reductions>},
      {"exchange", one_block<exchange>},
      {"widen_bf16", over_all<widen<bf16>>},
      {"widen_fp16", over_all<widen<fp16>>},
      {"narrow_bf16", over_all<narrow<bf16>>},
      {"narrow_fp16", over_all<narrow<fp16>>},
      {"pack_bf16", over_all<pack_pairs<bf16>>},
      {"pack_fp16", over_all<pack_pairs<fp16>>},
      {"fast_exp2", over_all<exponential>},
      {"intrinsics", over_all<intrinsics>},
      {"words", one_block<words>},
      {"lds_strided", one_block<lds_strided>},
      {"lds_rows", one_block<lds_rows<false>>},
      {"lds_rows_swizzled", one_block<lds_rows<true>>},
      {"ldmatrix_rows", one_block<ldmatrix_rows>},
      {"ldg_strided_fp16", one_block<ldg_strided<fp16>>},
      {"ldg_strided_fp32", one_block<ldg_strided<float>>},
      {"ldg_strided_vectors", one_block<ldg_strided<Vec<float, 4>>>},
      {"stg_strided_fp16", one_block<stg_strided<fp16>>},
      {"stg_strided_fp32", one_block<stg_strided<float>>},
      {"stg_strided_vectors", one_block<stg_strided<Vec<float, 4>>>},
      {"ldg_offset", one_block<ldg_offset>},
      {"ldg_of_some_lanes", one_block<ldg_of_some_lanes>},
      {"ldg_after_a_branch", one_block<ldg_after_a_branch>},
      {"ldg_and_stg", one_block<ldg_and_stg>},
  };
  return all;
}

}  // namespace fastgpt::cuda::testing
