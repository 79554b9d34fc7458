// attention 8: tiles above the diagonal are not visited.
//
// No query of a block sees a key beyond the block's last query: the walk ends there. Within it, a warp passes over
// tiles of which none of its 16 queries sees anything. The last queries see the most keys, and their blocks go first,
// so that the short ones fill the gaps at the end.
//
// Moves: 256 bytes a key for every 64 queries of which some see it: about half.
//
// Last rung: half of all scores were computed to be thrown away.
//
// Gains: of n x n tiles of 32 queries and 32 keys n (n + 1) / 2 are left: 5/8 of them at T = 128, where the emulator
// counts, and close to half at T = 4096.
//
// Promise: mma <= 0.63 x 07_double_buffer
// Promise: async copies <= 0.8 x 07_double_buffer

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
  const int64_t head = static_cast<int64_t>(blockIdx.y) * T;                 // its first row
  const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kBlockM;  // the longest rows go first
  const int first_of_warp = first + 16 * warp_id();
  const int tiles = (min(first + kBlockM, T) + kBlockN - 1) / kBlockN;

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
    if (j < 0 || start > first_of_warp + 15) continue;
    queries.attend<Swizzled>(tile_at(k_tile, j), tile_at(v_tile, j), start, scale);
  }
  queries.store(o + head * kHeaddim, lse + head, T);
}

}  // namespace

extern "C" void attention(const fp16* q, const fp16* k, const fp16* v, fp16* o, float* lse, int B, int H, int T, int D,
                          float scale, cudaStream_t stream) {
  lessons::launch_attention<attention_kernel>(q, k, v, o, lse, B, H, T, D, scale, stream);
}
