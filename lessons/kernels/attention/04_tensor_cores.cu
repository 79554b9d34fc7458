// attention 4: both products on tensor cores, in fp16 with sums in fp32.
//
// tensor_cores.cuh has the parts. A block owns 64 queries, a warp 16 of them, whose operands it holds in registers;
// tiles of 32 keys and values stay in fp16. Rows of scores lie within four lanes, so that the softmax is two shuffles,
// and what it gives is, rounded, the left operand of the second product.
//
// Moves: q, o and lse once; k and v, 256 bytes a key, once for every 64 queries, 16 bytes a lane.
//
// Last rung: each product of two numbers was an instruction of a lane, beside those that fetch them; tensor cores make
// 2048 in one instruction of a warp.
//
// Gains: an mma for 2048 products, and of the accesses to shared memory few are left; k and v half as often.
//
// But: ldmatrix reads 8 rows of 16 bytes at a time, and these lie 128 bytes apart, in the same four banks. Padding
// would help here, too; the next rung has something better.
//
// Promise: mma >= 1
// Promise: shared accesses <= 0.05 x 03_padded
// Promise: load sectors <= 0.6 x 03_padded
// Promise: bank conflicts >= 10000

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

  copy_rows<Straight, kBlockM>(q_tile, q + head * kHeaddim, first, T);
  __syncthreads();
  Queries queries;
  queries.load<Straight>(q_tile, first + 16 * warp_id());
  for (int start = 0; start < T; start += kBlockN) {
    __syncthreads();  // nobody needs the last tile any more
    copy_rows<Straight, kBlockN>(k_tile, k + head * kHeaddim, start, T);
    copy_rows<Straight, kBlockN>(v_tile, v + head * kHeaddim, start, T);
    __syncthreads();  // this one is there
    queries.attend<Straight>(k_tile, v_tile, start, scale);
  }
  queries.store(o + head * kHeaddim, lse + head, T);
}

}  // namespace

extern "C" void attention(const fp16* q, const fp16* k, const fp16* v, fp16* o, float* lse, int B, int H, int T, int D,
                          float scale, cudaStream_t stream) {
  lessons::launch_attention<attention_kernel>(q, k, v, o, lse, B, H, T, D, scale, stream);
}
