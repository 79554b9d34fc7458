// attention 5: chunks of a row change places, and no access has a bank conflict.
//
// Swizzled (tensor_cores.cuh) puts chunk c of row r where chunk c ^ (r % 8) would be. Eight rows' chunks c, which
// ldmatrix reads together, are then in eight different columns of the tile, which is all 32 banks; and so are the eight
// chunks of a row, which a copy writes together.
//
// Moves: the same, 256 bytes a key for every 64 queries.
//
// Last rung: ldmatrix took eight turns for each of its four matrices.
//
// Gains: one turn each, as with padding, but the tile has no holes: its rows stay aligned to 16 bytes, it takes no more
// memory, and it is what Hopper's TMA and wgmma expect.
//
// Promise: bank conflicts == 0
// Promise: mma == 1 x 04_tensor_cores
// Promise: bytes moved == 1 x 04_tensor_cores

#include "tensor_cores.cuh"

namespace {

using namespace lessons;

__global__ void __launch_bounds__(kThreads, kBlocks)
    attention_kernel(const fp16* q, const fp16* k, const fp16* v, fp16* o, float* lse, int T, float scale) {
  SHARED(fp16, q_tile, kBlockM * kHeaddim);
  SHARED(fp16, k_tile, kBlockN * kHeaddim);
  SHARED(fp16, v_tile, kBlockN * kHeaddim);
  const int64_t head = static_cast<int64_t>(blockIdx.y) * T;  // its first row
  const int first = static_cast<int>(blockIdx.x) * kBlockM;

  copy_rows<Swizzled, kBlockM>(q_tile, q + head * kHeaddim, first, T);
  __syncthreads();
  Queries queries;
  queries.load<Swizzled>(q_tile, first + 16 * warp_id());
  for (int start = 0; start < T; start += kBlockN) {
    __syncthreads();  // nobody needs the last tile any more
    copy_rows<Swizzled, kBlockN>(k_tile, k + head * kHeaddim, start, T);
    copy_rows<Swizzled, kBlockN>(v_tile, v + head * kHeaddim, start, T);
    __syncthreads();  // this one is there
    queries.attend<Swizzled>(k_tile, v_tile, start, scale);
  }
  queries.store(o + head * kHeaddim, lse + head, T);
}

}  // namespace

extern "C" void attention(const fp16* q, const fp16* k, const fp16* v, fp16* o, float* lse, int B, int H, int T, int D,
                          float scale, cudaStream_t stream) {
  lessons::launch_attention<attention_kernel>(q, k, v, o, lse, B, H, T, D, scale, stream);
}
