// Softmax, rung 2: a block takes a row, and neighbouring threads take neighbouring elements.
//
// Moves: 16 bytes per element, as before: three reads of x and one write of y. But now the 32 threads of a warp ask for
// 128 bytes that lie side by side, four sectors and all of their bytes wanted: memory moves 16 bytes per element, too.
//
// Last rung: each thread walked along a row of its own, so that a warp's request touched 32 sectors, and of the 32
// bytes of each it used four: eight times the traffic.
//
// Gains: an eighth of the sectors, in each direction. The price: what 128 threads know of their row has to be put
// together, in shared memory. Here every thread reads what every other one left there.
//
// Promise: sectors per load request == 4
// Promise: sectors per store request == 4
// Promise: bytes moved <= 0.125 x 01_naive

#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

constexpr int kThreads = 128;

__global__ void softmax_kernel(const float* x, float* y, int N) {
  SHARED(float, partial, kThreads);
  x += static_cast<int64_t>(blockIdx.x) * N;
  y += static_cast<int64_t>(blockIdx.x) * N;
  const int t = static_cast<int>(threadIdx.x);

  float most = -INFINITY;
  for (int n = t; n < N; n += kThreads) most = fmaxf(most, ldg(x + n));
  sts(partial + t, most);
  __syncthreads();  // all maxima are there
  for (int i = 0; i < kThreads; ++i) most = fmaxf(most, lds(partial + i));
  __syncthreads();  // all have been read, and may be overwritten

  float mine = 0.0f, sum = 0.0f;
  for (int n = t; n < N; n += kThreads) mine += __expf(ldg(x + n) - most);
  sts(partial + t, mine);
  __syncthreads();
  for (int i = 0; i < kThreads; ++i) sum += lds(partial + i);

  for (int n = t; n < N; n += kThreads) stg(y + n, __expf(ldg(x + n) - most) / sum);
}

}  // namespace

extern "C" void softmax(const float* x, float* y, int M, int N, cudaStream_t stream) {
  launch<softmax_kernel>(dim3(M), dim3(kThreads), 0, stream, x, y, N);
}
