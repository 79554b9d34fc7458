// Small kernels of the primitives of csrc/cuda/prims_sm90.cuh, as prims.cu has those of prims.cuh.

#include "../../csrc/cuda/prims_sm90.cuh"
#include "kernels.h"

namespace fastgpt::cuda::testing {
namespace {

FASTGPT_PRIM int tid() { return static_cast<int>(threadIdx.x); }

// in: n times 32 numbers, which one warp hands to another through a ring of two. out: each row moved on by one.
__global__ void ring(const int* in, int* out, int n) {
  SHARED(int, slots, 2 * 32);
  SHARED(uint64_t, full, 2);
  SHARED(uint64_t, empty, 2);
  if (tid() == 0) {
    for (int i = 0; i < 2; ++i) {
      mbar_init(full + i, 32);
      mbar_init(empty + i, 1);
    }
  }
  __syncthreads();
  for (int i = 0; i < n; ++i) {
    const int slot = i % 2, parity = i / 2 % 2;
    if (warp_id() == 0) {
      mbar_wait(empty + slot, parity ^ 1);
      sts(slots + (32 * slot + lane_id()), ldg(in + 32 * i + lane_id()));
      mbar_arrive(full + slot);
    } else {
      mbar_wait(full + slot, parity);
      stg(out + 32 * i + lane_id(), lds(slots + (32 * slot + (lane_id() + 1) % 32)));
      __syncwarp();
      if (lane_id() == 0) mbar_arrive(empty + slot);
    }
  }
}

// in: where the box begins, four numbers from dim0 on, in 32 bytes; then the tensor (2, 40, 3, 80), whose second and
// third dimension the map swaps. out: the box as it lies in shared memory.
template <int kRows>
__global__ void box(const __grid_constant__ TensorMap map, const int* in, Vec<uint16_t, 8>* out) {
  DYNAMIC_SHARED_ALIGNED(uint16_t, tile, 1024);
  SHARED(uint64_t, full, 1);
  if (tid() == 0) {
    mbar_init(full, 1);
    mbar_fence_init();
    mbar_arrive_expect(full, kRows * 128);
    tma_load(tile, map, full, ldg(in), ldg(in + 1), ldg(in + 2), ldg(in + 3));
  }
  __syncthreads();
  mbar_wait(full, 0);
  for (int i = tid(); i < kRows * 8; i += 64) stg(out + i, lds((tile + 8 * i).as<Vec<uint16_t, 8>>()));
}

template <int kRows>
void load_box(const void* in, void* out, int) {
  const int* numbers = static_cast<const int*>(in);
  const TensorMapShape shape{numbers + 8, {80, 40, 3, 2}, {240, 80, 9600}, kRows};
  launch<box<kRows>>(dim3(1), dim3(64), kRows * 128, nullptr, make_tensor_map(shape), numbers,
                     static_cast<Vec<uint16_t, 8>*>(out));
}

// A matrix of `columns`, 64 or 128, as a tensor of which TMA copies all rows.
template <class T>
TensorMap matrix_map(const T* data, int rows, int columns) {
  return make_tensor_map({data, {columns, rows, 1, 1}, {columns, rows * columns, rows * columns}, rows});
}

// All of a matrix, 64 columns after the other.
template <class T>
FASTGPT_PRIM void load_matrix(Shared<T> to, const TensorMap& map, Shared<uint64_t> full, int rows, int columns) {
  for (int i = 0; i < columns / 64; ++i) tma_load(to + i * rows * 64, map, full, 64 * i, 0, 0, 0);
}

// What a warpgroup has of d, to or from rows of `columns` floats.
template <int kN>
FASTGPT_PRIM float* element(float* d, int n, int i) {
  const int row = warp_id() * 16 + lane_id() / 4 + i / 2 * 8;
  return d + row * 8 * kN + 8 * n + lane_id() % 4 * 2 + i % 2;
}
template <int kN>
FASTGPT_PRIM void load_d(float (&d)[kN][4], float* from) {
  for (int n = 0; n < kN; ++n) {
    for (int i = 0; i < 4; ++i) d[n][i] = ldg(element<kN>(from, n, i));
  }
}
template <int kN>
FASTGPT_PRIM void store_d(const float (&d)[kN][4], float* to) {
  for (int n = 0; n < kN; ++n) {
    for (int i = 0; i < 4; ++i) stg(element<kN>(to, n, i), d[n][i]);
  }
}

// A (128 x 128) times B (128 x 128) transposed, each warpgroup half the rows; added to out where `add`.
template <class T>
__global__ void multiply_tiles(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                               float* out, bool add) {
  DYNAMIC_SHARED_ALIGNED(T, a, 1024);
  SHARED(uint64_t, full, 1);
  const Shared<T> b = a + 128 * 128;
  if (tid() == 0) {
    mbar_init(full, 1);
    mbar_fence_init();
    mbar_arrive_expect(full, 2 * 128 * 256);
    load_matrix(a, a_map, full, 128, 128);
    load_matrix(b, b_map, full, 128, 128);
  }
  __syncthreads();
  float d[16][4];
  load_d(d, out);
  mbar_wait(full, 0);
  const int half = tid() / kWarpgroupSize;
  const uint64_t a_tile = wgmma_tile(a + half * 64 * 64, 0), b_tile = wgmma_tile(b, 0);
  wgmma_fence();
  for (int i = 0; i < 8; ++i) {
    const int bytes = i / 4 * 128 * 128 + i % 4 * 32;
    wgmma_m64n128k16<T>(d, wgmma_tile_at(a_tile, bytes), wgmma_tile_at(b_tile, bytes), add || i > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  store_d(d, out);
}

// in: A (128 x 128) and B (128 x 128) of T. out: 128 x 128. n: whether A * B is added to it.
template <class T>
void of_tiles(const void* in, void* out, int n) {
  const T* a = static_cast<const T*>(in);
  launch<multiply_tiles<T>>(dim3(1), dim3(256), 2 * 128 * 256, nullptr, matrix_map(a, 128, 128),
                            matrix_map(a + 128 * 128, 128, 128), static_cast<float*>(out), n != 0);
}

// A (64 x 64), which goes through registers, times B (64 x 8 * kN), added to out; two products are in flight at a time.
template <class T, int kN>
__global__ void multiply_registers(const uint32_t* a, const __grid_constant__ TensorMap b_map, float* out) {
  DYNAMIC_SHARED_ALIGNED(T, b, 1024);
  SHARED(uint64_t, full, 1);
  if (tid() == 0) {
    mbar_init(full, 1);
    mbar_fence_init();
    mbar_arrive_expect(full, 64 * 16 * kN);
    load_matrix(b, b_map, full, 64, 8 * kN);
  }
  __syncthreads();
  float d[kN][4];
  load_d(d, out);
  uint32_t elements[4][4];
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 4; ++i) {
      const int row = warp_id() * 16 + lane_id() / 4 + i % 2 * 8;
      elements[k][i] = ldg(a + row * 32 + 8 * k + i / 2 * 4 + lane_id() % 4);
    }
  }
  mbar_wait(full, 0);
  const uint64_t tile = wgmma_tile(b, 64 * 128);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    wgmma_fence();
    wgmma_m64k16<T, kN>(d, elements[k], wgmma_tile_at(tile, 2048 * k));
    wgmma_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  store_d(d, out);
}

// in: A (64 x 64) and B (64 x 8 * kN) of T. out: 64 x 8 * kN.
template <class T, int kN>
void of_registers(const void* in, void* out, int) {
  const T* a = static_cast<const T*>(in);
  launch<multiply_registers<T, kN>>(dim3(1), dim3(128), 64 * 16 * kN, nullptr, static_cast<const uint32_t*>(in),
                                    matrix_map(a + 64 * 64, 64, 8 * kN), static_cast<float*>(out));
}

void pass_around(const void* in, void* out, int n) {
  launch<ring>(dim3(1), dim3(64), 0, nullptr, static_cast<const int*>(in), static_cast<int*>(out), n);
}

}  // namespace

const std::map<std::string, Prim>& prims_sm90() {
  static const std::map<std::string, Prim> all{
      {"ring", pass_around},
      {"box_1", load_box<1>},
      {"box_16", load_box<16>},
      {"box_256", load_box<256>},
      {"wgmma_m64n128k16_bf16", of_tiles<bf16>},
      {"wgmma_m64n128k16_fp16", of_tiles<fp16>},
      {"wgmma_m64n64k16_registers_bf16", of_registers<bf16, 8>},
      {"wgmma_m64n64k16_registers_fp16", of_registers<fp16, 8>},
      {"wgmma_m64n128k16_registers_bf16", of_registers<bf16, 16>},
      {"wgmma_m64n128k16_registers_fp16", of_registers<fp16, 16>},
  };
  return all;
}

}  // namespace fastgpt::cuda::testing
