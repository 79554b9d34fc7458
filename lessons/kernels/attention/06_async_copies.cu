// attention 6: copies that pass by the registers.
//
// cp_async_16 (in start_copy of tensor_cores.cuh) tells the memory system to bring 16 bytes from global to shared
// memory, and the thread goes on. Copies are put into groups (commit) and waited for by group. What a thread has waited
// for it may read; others may after a barrier.
//
// Moves: the same, 256 bytes a key for every 64 queries.
//
// Last rung: each chunk was loaded into four registers and stored from there: two instructions of a lane, and registers
// for all that is under way at a time.
//
// Gains: a copy is one instruction and needs no register. Time it saves only when there is something to do meanwhile,
// which here there is not yet: the next rung.
//
// Promise: shared accesses == 0
// Promise: async copies >= 1
// Promise: bytes moved == 1 x 05_swizzled
// Promise: bank conflicts == 0

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

  start_copy<Swizzled, kBlockM>(q_tile, q + head * kHeaddim, first, T);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  Queries queries;
  queries.load<Swizzled>(q_tile, first + 16 * warp_id());
  for (int start = 0; start < T; start += kBlockN) {
    __syncthreads();  // nobody needs the last tile any more
    start_copy<Swizzled, kBlockN>(k_tile, k + head * kHeaddim, start, T);
    start_copy<Swizzled, kBlockN>(v_tile, v + head * kHeaddim, start, T);
    cp_async_commit();
    cp_async_wait<0>();
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
