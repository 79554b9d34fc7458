// Softmax, rung 4: the threads of a warp tell each other what they know, without memory.
//
// Moves: 16 bytes per element, as before.
//
// Last rung: nine barriers for each of two reductions, at each of which 128 threads wait for the last one; and five of
// the seven rounds only combined what threads of the same warp had.
//
// Gains: __shfl_xor_sync hands a register to another lane. Five of them combine a warp's 32 numbers, and leave the
// result with every lane; only one number for each warp goes through shared memory. A barrier lies between writing and
// reading it; two arrays take turns, so that nobody has to wait before the next one is written.
//
// Promise: barriers <= 0.12 x 03_tree
// Promise: shared accesses <= 0.9 x 03_tree
// Promise: bytes moved == 1 x 03_tree

#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

__global__ void softmax_kernel(const float* x, float* y, int N) {
  SHARED(float, maxima, kWarps);
  SHARED(float, sums, kWarps);
  x += static_cast<int64_t>(blockIdx.x) * N;
  y += static_cast<int64_t>(blockIdx.x) * N;
  const int t = static_cast<int>(threadIdx.x);

  float most = -INFINITY;
  for (int n = t; n < N; n += kThreads) most = fmaxf(most, ldg(x + n));
  for (int flip = kWarpSize / 2; flip > 0; flip /= 2) most = fmaxf(most, __shfl_xor_sync(kFullMask, most, flip));
  if (lane_id() == 0) sts(maxima + warp_id(), most);
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) most = fmaxf(most, lds(maxima + i));

  float mine = 0.0f, sum = 0.0f;
  for (int n = t; n < N; n += kThreads) mine += __expf(ldg(x + n) - most);
  for (int flip = kWarpSize / 2; flip > 0; flip /= 2) mine += __shfl_xor_sync(kFullMask, mine, flip);
  if (lane_id() == 0) sts(sums + warp_id(), mine);
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) sum += lds(sums + i);

  for (int n = t; n < N; n += kThreads) stg(y + n, __expf(ldg(x + n) - most) / sum);
}

}  // namespace

extern "C" void softmax(const float* x, float* y, int M, int N, cudaStream_t stream) {
  launch<softmax_kernel>(dim3(M), dim3(kThreads), 0, stream, x, y, N);
}
