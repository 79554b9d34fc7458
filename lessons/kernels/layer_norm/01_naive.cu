// layer_norm 1: a thread for each row, in three passes.
//
// y = (x - mean) / sqrt(variance + eps) * weight + bias, of each row of an (M, N) matrix by itself. The formula,
// written down as it is read: the mean takes a pass over the row, the variance about that mean another, the result a
// third.
//
// Moves: 4 bytes of x three times, of weight, of bias and of y once: 24 bytes an element are wanted, where 8 (x in, y
// out) would do. But the 32 lanes of a warp are in 32 rows, N elements apart, so that each of their 4 bytes lies in a
// 32-byte sector of its own: of x and y 128 bytes an element are moved.
//
// Last rung: there is none.
//
// Gains: the right numbers, to hold all others to.
//
// Promise: sectors per load request >= 10
// Promise: sectors per store request >= 31

#include "long_sum.cuh"

namespace {

using namespace fastgpt::cuda;
using lessons::LongSum;

__global__ void layer_norm_naive_kernel(const float* x, const float* weight, const float* bias, float* y, float* mean,
                                        float* rstd, int M, int N, float eps) {
  const int m = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (m >= M) return;
  const int64_t start = static_cast<int64_t>(m) * N;

  LongSum sum;
  for (int n = 0; n < N; ++n) sum.add(ldg(x + start + n));
  const float its_mean = sum.total() / N;

  LongSum squares;
  for (int n = 0; n < N; ++n) {
    const float centred = ldg(x + start + n) - its_mean;
    squares.add(centred * centred);
  }
  const float its_rstd = 1.0f / sqrtf(squares.total() / N + eps);

  stg(mean + m, its_mean);
  stg(rstd + m, its_rstd);
  for (int n = 0; n < N; ++n) {
    stg(y + start + n, (ldg(x + start + n) - its_mean) * its_rstd * ldg(weight + n) + ldg(bias + n));
  }
}

}  // namespace

extern "C" void layer_norm(const float* x, const float* weight, const float* bias, float* y, float* mean, float* rstd,
                           int M, int N, float eps, cudaStream_t stream) {
  constexpr int kThreads = 64;
  launch<layer_norm_naive_kernel>(grid_of((M + kThreads - 1) / kThreads), dim3(kThreads), 0, stream, x, weight, bias, y,
                                  mean, rstd, M, N, eps);
}
