// attention 7: while a tile is used, the next one is on its way.
//
// There are two places for tiles of k and v. The copies of tile j + 1 are started into one before the products with
// tile j, in the other, begin. The barrier that says that tile j is there also says that all warps are done with tile j
// - 1, whose place the next copies take: one barrier a tile is enough.
//
// Moves: the same, 256 bytes a key for every 64 queries.
//
// Last rung: the copies were waited for as soon as they had been started, and for as long the tensor cores did nothing,
// unless another block had work for them.
//
// Gains: that time, where a tile's products take as long as the next one's copies; and half of the barriers. The price
// is a second place: 8 KiB of shared memory.
//
// Promise: barriers <= 0.55 x 06_async_copies
// Promise: async copies == 1 x 06_async_copies
// Promise: mma == 1 x 06_async_copies

#include "tensor_cores.cuh"

namespace {

using namespace lessons;

// Tiles take turns in two places.
FASTGPT_PRIM Shared<fp16> tile_at(Shared<fp16> places, int j) { return places + j % 2 * kBlockN * kHeaddim; }

__global__ void __launch_bounds__(kThreads, kBlocks)
    attention_kernel(const fp16* q, const fp16* k, const fp16* v, fp16* o, float* lse, int T, float scale) {
  SHARED(fp16, q_tile, kBlockM * kHeaddim);
  SHARED(fp16, k_tile, 2 * kBlockN * kHeaddim);
  SHARED(fp16, v_tile, 2 * kBlockN * kHeaddim);
  const int64_t head = static_cast<int64_t>(blockIdx.y) * T;  // its first row
  const int first = static_cast<int>(blockIdx.x) * kBlockM, first_of_warp = first + 16 * warp_id();
  const int tiles = (T + kBlockN - 1) / kBlockN;

  start_copy<Swizzled, kBlockM>(q_tile, q + head * kHeaddim, first, T);
  Queries queries;
  for (int j = -1; j < tiles; ++j) {  // at first there is nothing but to load
    const int start = j * kBlockN;
    if (j >= 0) {
      cp_async_wait<0>();
      __syncthreads();  // tile j is there, and nobody needs the one before it any more
    }
    if (j + 1 < tiles) {
      start_copy<Swizzled, kBlockN>(tile_at(k_tile, j + 1), k + head * kHeaddim, start + kBlockN, T);
      start_copy<Swizzled, kBlockN>(tile_at(v_tile, j + 1), v + head * kHeaddim, start + kBlockN, T);
    }
    cp_async_commit();
    if (j == 0) queries.load<Swizzled>(q_tile, first_of_warp);
    if (j < 0) continue;
    queries.attend<Swizzled>(tile_at(k_tile, j), tile_at(v_tile, j), start, scale);
  }
  queries.store(o + head * kHeaddim, lse + head, T);
}

}  // namespace

extern "C" void attention(const fp16* q, const fp16* k, const fp16* v, fp16* o, float* lse, int B, int H, int T, int D,
                          float scale, cudaStream_t stream) {
  lessons::launch_attention<attention_kernel>(q, k, v, o, lse, B, H, T, D, scale, stream);
}
