// The forward of attention on Hopper's own tensor cores, in the manner of FlashAttention-3 (Shah et al., 2024): what
// attention_fwd.cu computes, with products of four warps that read shared memory by themselves (wgmma) and tiles that
// one thread has copied (TMA).
//
// A block has kWarpgroups warpgroups with 64 queries each, and one more, most of whose registers go to them: a single
// thread of it starts the copies of k and v, 128 keys at a time, into a ring of two places each. Two barriers belong to
// a place: `full` ends a phase when the tile has landed, `empty` when every warp is done with it. Nobody else waits for
// anybody.
//
// A warpgroup starts the scores of a tile and then the weighted sum of the tile before: while the softmax of the one
// goes through the CUDA cores, the tensor cores have the other to do. The weights never leave the registers.
//
// What moves is the same as in attention_fwd.cu. TMA needs strides of 16 bytes, and the lengths of all sequences alike:
// calls with seqlens_k, few queries or head sizes that this kernel has no shape for are attention_fwd.cu's.

#include <cstdlib>
#include <cstring>

#include "attention_fwd.cuh"
#include "prims_sm90.cuh"

#ifndef __CUDACC__
#define FASTGPT_SM90A  // the emulator is every GPU; nvcc is told where it compiles for sm_90a
#endif

namespace fastgpt::cuda {
namespace {

// Whether the user asks for this kernel. It is not what attention runs by itself, until it has been measured on a GPU.
bool is_wanted() {
  const char* text = std::getenv("FASTGPT_HOPPER_ATTENTION");
  if (text == nullptr || *text == '\0' || std::strcmp(text, "0") == 0) return false;
  if (std::strcmp(text, "1") == 0) return true;
  throw std::runtime_error(std::string("FASTGPT_HOPPER_ATTENTION must be 0 or 1, got '") + text + "'");
}

#ifdef FASTGPT_SM90A

template <int kHeaddim>
struct Sm90Shape {
  static constexpr int kWarpgroups = kHeaddim == 64 ? 3 : 2;
  static constexpr int kRegisters = kHeaddim == 64 ? 160 : 240;    // of a thread that computes
  static constexpr int kCopyRegisters = kHeaddim == 64 ? 32 : 24;  // of one that copies
  static constexpr int kBlockM = 64 * kWarpgroups;
  static constexpr int kBlockN = 128;
  static constexpr int kStages = 2;
  static constexpr int kConsumers = kWarpgroups * 4;  // warps
  static constexpr int kThreads = (kWarpgroups + 1) * kWarpgroupSize;
  static constexpr int kTile = kBlockN * kHeaddim;                            // elements of k or v
  static constexpr int kElements = kBlockM * kHeaddim + 2 * kStages * kTile;  // of q, and k and v kStages times
  static constexpr int kSharedBytes = kElements * 2 + (1 + 4 * kStages) * 8;  // and the barriers
  // A warpgroup that sees no more keys leaves. What it does not release is the last tile alone, whose place is not
  // filled again.
  static_assert(kBlockM - 64 <= kBlockN);
};

// k and v, tile by tile, in their places, with their barriers.
template <class T, int kHeaddim>
class Ring {
 public:
  using Shape = Sm90Shape<kHeaddim>;
  FASTGPT_PRIM Ring(Shared<T> tiles, Shared<uint64_t> barriers) : tiles_(tiles), barriers_(barriers) {}

  // By one thread; that many warpgroups are to release each tile.
  FASTGPT_PRIM void init(int warpgroups) const {
    for (int i = 0; i < Shape::kStages; ++i) {
      mbar_init(full(i), 1);
      mbar_init(empty(i), warpgroups * 4);
    }
  }
  // Starts to copy the keys' tile j, as soon as its place is free. By one thread.
  FASTGPT_PRIM void fill(int j, const TensorMap& from, const Place& at) const {
    mbar_wait(empty(j), (j / Shape::kStages & 1) ^ 1);
    mbar_arrive_expect(full(j), Shape::kTile * 2);
    for (int column = 0; column < kHeaddim; column += 64) {
      tma_load(tile(j) + Shape::kBlockN * column, from, full(j), column, j * Shape::kBlockN, at.h, at.b);
    }
  }
  FASTGPT_PRIM void wait(int j) const { mbar_wait(full(j), j / Shape::kStages & 1); }
  // This warp is done with tile j.
  FASTGPT_PRIM void release(int j) const {
    if (lane_id() == 0) mbar_arrive(empty(j));
  }
  FASTGPT_PRIM Shared<T> tile(int j) const { return tiles_ + j % Shape::kStages * Shape::kTile; }

 private:
  FASTGPT_PRIM Shared<uint64_t> full(int j) const { return barriers_ + j % Shape::kStages * 2; }
  FASTGPT_PRIM Shared<uint64_t> empty(int j) const { return full(j) + 1; }

  Shared<T> tiles_;
  Shared<uint64_t> barriers_;
};

template <class T, int kHeaddim>
__global__ void __launch_bounds__(Sm90Shape<kHeaddim>::kThreads, 1)
    attention_fwd_sm90_kernel(AttentionFwd a, const __grid_constant__ TensorMap q_map,
                              const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map) {
  using Shape = Sm90Shape<kHeaddim>;
  constexpr int kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kN = kBlockN / 8, kD = kHeaddim / 8;
  DYNAMIC_SHARED_ALIGNED(T, memory, 1024);
  const Shared<T> keys = memory + kBlockM * kHeaddim, values = keys + Shape::kStages * Shape::kTile;
  const Shared<uint64_t> q_full = (memory + Shape::kElements).template as<uint64_t>();
  const Ring<T, kHeaddim> k(keys, q_full + 1), v(values, q_full + 1 + 2 * Shape::kStages);

  const int seqlen_q = static_cast<int>(a.shape.Tq), q_tiles = (seqlen_q + kBlockM - 1) / kBlockM;
  const Place at(a.shape, q_tiles);
  const int start_m = (q_tiles - 1 - at.tile) * kBlockM;
  const Visible visible(a.shape, nullptr, at.b, a.is_causal);
  const int warpgroups = min(Shape::kWarpgroups, (seqlen_q - start_m + 63) / 64);  // that have a query
  if (threadIdx.x == 0) {
    mbar_init(q_full, 1);
    k.init(warpgroups);
    v.init(warpgroups);
    mbar_fence_init();
  }
  __syncthreads();

  const int warp = __shfl_sync(kFullMask, warp_id(), 0);  // the compiler is to see that it is the same for all lanes
  // How many tiles of keys the queries up to this one see.
  const auto tiles_until = [&](int query) {
    return max(0, visible.last(min(query, seqlen_q - 1)) + kBlockN) / kBlockN;
  };

  if (warp >= Shape::kConsumers) {
    give_registers<Shape::kCopyRegisters>();
    const int tiles = tiles_until(start_m + kBlockM - 1);
    if (threadIdx.x % kWarpgroupSize > 0) return;
    mbar_arrive_expect(q_full, kBlockM * kHeaddim * 2);
    for (int column = 0; column < kHeaddim; column += 64) {
      tma_load(memory + kBlockM * column, q_map, q_full, column, start_m, at.h, at.b);
    }
    if (tiles > 0) k.fill(0, k_map, at);
    for (int j = 0; j < tiles; ++j) {  // in the order in which they are used
      if (j + 1 < tiles) k.fill(j + 1, k_map, at);
      v.fill(j, v_map, at);
    }
    return;
  }

  take_registers<Shape::kRegisters>();
  const int warpgroup = warp / 4;
  if (warpgroup >= warpgroups) return;
  const int warp_row = warp * 16, first_row = start_m + warp_row;
  const int tiles = tiles_until(start_m + warpgroup * 64 + 63), all_see = visible.last(first_row);
  float acc[1][kD][4] = {}, s[1][kN][4], correction[2];
  uint32_t weights[kBlockN / 16][4];
  OnlineSoftmax<1> softmax(a.scale);

  const uint64_t q_of_warpgroup = wgmma_tile(memory + warpgroup * 64 * 64, 0);
  const auto start_scores = [&](int j) {
    const uint64_t k_rows = wgmma_tile(k.tile(j), 0);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kHeaddim / 16; ++i) {
      wgmma_m64n128k16<T>(s[0], wgmma_tile_at(q_of_warpgroup, i / 4 * kBlockM * 128 + i % 4 * 32),
                          wgmma_tile_at(k_rows, i / 4 * kBlockN * 128 + i % 4 * 32), i > 0);
    }
    wgmma_commit();
  };
  const auto start_sum = [&](int j) {
    const uint64_t v_rows = wgmma_tile(v.tile(j), kBlockN * 128);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBlockN / 16; ++i) wgmma_m64k16<T>(acc[0], weights[i], wgmma_tile_at(v_rows, i * 16 * 128));
    wgmma_commit();
  };
  const auto weigh = [&](int j) {
    if (j * kBlockN + kBlockN - 1 > all_see) hide(s, visible, first_row, j * kBlockN);
    softmax.weigh(s, [&](int, int h, float factor) { correction[h] = factor; });
    if (a.drop.seed == nullptr) return;
    const Dropper dropper(a.drop);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t keep = kept<kN / 2>(dropper, at.row(a.shape, first_row), j * kBlockN + half * kBlockN / 2);
#pragma unroll
      for (int n = 0; n < kN / 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!(keep >> (4 * n + i) & 1)) s[0][half * kN / 2 + n][i] = 0.0f;
        }
      }
    }
  };
  const auto pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < kBlockN / 16; ++i) pack_a<T>(weights[i], s[0], i);
  };

  mbar_wait(q_full, 0);  // also where no key is seen: the output goes to its place
  if (tiles > 0) {
    k.wait(0);
    start_scores(0);
    wgmma_wait<0>();
    wgmma_landed(s[0]);
    k.release(0);
    weigh(0);
    pack_weights();
    for (int j = 1; j < tiles; ++j) {
      k.wait(j);
      start_scores(j);
      v.wait(j - 1);
      start_sum(j - 1);
      wgmma_wait<1>();
      wgmma_landed(s[0]);
      k.release(j);
      weigh(j);
      wgmma_wait<0>();
      wgmma_landed(acc[0]);
      v.release(j - 1);
      if (__any_sync(kFullMask, correction[0] != 1.0f || correction[1] != 1.0f)) {  // mostly in the first tiles
#pragma unroll
        for (int h = 0; h < 2; ++h) multiply_rows(acc[0], h, correction[h]);
      }
      pack_weights();
    }
    v.wait(tiles - 1);
    start_sum(tiles - 1);
    wgmma_wait<0>();
    wgmma_landed(acc[0]);
    v.release(tiles - 1);
  }
  softmax.finish(acc, a, at, first_row);

  // The output goes to q's place. Of the four warps, unseen by the emulator: there each reads its own rows of q, and
  // PTX does not say which warp reads what for a product of all.
  bar_sync(1 + warpgroup, kWarpgroupSize);
#pragma unroll
  for (int column = 0; column < kHeaddim; column += 64) {
    const Tile<T, 16, 64> o_tile(memory + kBlockM * column + warp_row * 64);  // TMA's swizzle is that of such a tile
    HeadRows<T> o(a.o, at, seqlen_q, a.shape.D, true);
    o.data += column;
    o.headdim -= column;
    float part[1][8][4];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) part[0][n][i] = acc[0][column / 8 + n][i];
    }
    o_tile.store(part, 0, o, first_row);
  }
}

// What TMA is to know of q, k or v, of which it copies `box_rows` rows at a time.
TensorMap map_of(const Heads& x, const AttentionShape& s, int64_t rows, int box_rows) {
  const auto stride = [&](int64_t n, int64_t step) { return n == 1 ? s.D : step; };  // of one there is no next
  return make_tensor_map({x.data,
                          {s.D, rows, s.H, s.B},
                          {stride(rows, x.stride_t), stride(s.H, x.stride_h), stride(s.B, x.stride_b)},
                          box_rows});
}

bool has_map(const Heads& x, const AttentionShape& s, int64_t rows) {
  return (rows == 1 || x.stride_t > 0) && (s.H == 1 || x.stride_h > 0) && (s.B == 1 || x.stride_b > 0);
}

template <class T, int kHeaddim>
void launch_sm90(const AttentionFwd& a, cudaStream_t stream) {
  using Shape = Sm90Shape<kHeaddim>;
  const AttentionShape& s = a.shape;
  launch<attention_fwd_sm90_kernel<T, kHeaddim>>(
      attention_grid(s, s.Tq, Shape::kBlockM), dim3(Shape::kThreads), Shape::kSharedBytes, stream, a,
      map_of(a.q, s, s.Tq, Shape::kBlockM), map_of(a.k, s, s.Tk, Shape::kBlockN), map_of(a.v, s, s.Tk, Shape::kBlockN));
}

}  // namespace

bool attention_fwd_sm90(const AttentionFwd& a, bool vectors, cudaStream_t stream) {
  if (!is_wanted()) return false;
  if (const int capability = compute_capability(); capability != 90) {
    throw std::runtime_error("FASTGPT_HOPPER_ATTENTION=1 needs a GPU of compute capability 9.0, and this is one of " +
                             std::to_string(capability / 10) + "." + std::to_string(capability % 10));
  }
  const AttentionShape& s = a.shape;
  if (!vectors || a.dtype == Dtype::fp32 || a.seqlens_k != nullptr || !(a.scale > 0) || s.D <= 32 || s.D > 128 ||
      s.B * s.H == 0 || s.Tq < 64 || s.Tk == 0 || !has_map(a.q, s, s.Tq) || !has_map(a.k, s, s.Tk) ||
      !has_map(a.v, s, s.Tk)) {
    return false;
  }
  const auto with = [&](auto element) {
    using T = decltype(element);
    s.D <= 64 ? launch_sm90<T, 64>(a, stream) : launch_sm90<T, 128>(a, stream);
  };
  a.dtype == Dtype::bf16 ? with(bf16()) : with(fp16());
  return true;
}

#else

}  // namespace

bool attention_fwd_sm90(const AttentionFwd&, bool, cudaStream_t) {
  if (!is_wanted()) return false;
  throw std::runtime_error("FASTGPT_HOPPER_ATTENTION=1, but fastgpt was not compiled for compute capability 9.0");
}

#endif

}  // namespace fastgpt::cuda
