// Softmax, rung 1: a thread takes a row, and walks through it three times.
//
// Moves: 16 bytes per element: x is read by each of three passes (the maximum, the sum of exponentials, the result),
// and y is written once. That is what the threads want; memory moves sectors of 32 bytes, of which each thread of a
// warp touches one of its own: 32 sectors for 128 bytes.
//
// Last rung: there is none.
//
// Gains: it is right, and it is what one would write for a single core. exp(x - maximum) cannot overflow, whatever x.
//
// Promise: sectors per load request == 32
// Promise: sectors per store request == 32

#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

__global__ void softmax_kernel(const float* x, float* y, int M, int N) {
  const int m = blockIdx.x * blockDim.x + threadIdx.x;
  if (m >= M) return;
  const int64_t row = static_cast<int64_t>(m) * N;
  float most = -INFINITY;
  for (int n = 0; n < N; ++n) most = fmaxf(most, ldg(x + row + n));
  float sum = 0.0f;
  for (int begin = 0; begin < N; begin += 32) {  // in pieces: a chain of a thousand additions loses too many digits
    float piece = 0.0f;
    for (int n = begin; n < min(begin + 32, N); ++n) piece += __expf(ldg(x + row + n) - most);
    sum += piece;
  }
  for (int n = 0; n < N; ++n) stg(y + row + n, __expf(ldg(x + row + n) - most) / sum);
}

}  // namespace

extern "C" void softmax(const float* x, float* y, int M, int N, cudaStream_t stream) {
  constexpr int kThreads = 64;
  launch<softmax_kernel>(dim3((M + kThreads - 1) / kThreads), dim3(kThreads), 0, stream, x, y, M, N);
}
