// Exercise 6, solved: lost precision.
//
// Answer: A second pass: first the mean, then the mean of (x - mean)^2. Each term is small where the variance is, so
// its rounding is small, too. The price is a read of x that mostly comes from the cache; a kernel that keeps the row in
// registers pays nothing.
//
// Goal: load requests <= 10240
// Goal: sectors per load request <= 4

#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

__global__ void layer_norm_kernel(const float* x, const float* weight, const float* bias, float* y, float* mean,
                                  float* rstd, int N, float eps) {
  const int m = blockIdx.x;
  const int64_t row = static_cast<int64_t>(m) * N;

  float sum = 0.0f;
  for (int n = lane_id(); n < N; n += kWarpSize) sum += ldg(x + row + n);
  const float mu = warp_sum(sum) / N;

  float squares = 0.0f;
  for (int n = lane_id(); n < N; n += kWarpSize) {
    const float centred = ldg(x + row + n) - mu;
    squares += centred * centred;
  }
  const float r = rsqrtf(warp_sum(squares) / N + eps);

  for (int n = lane_id(); n < N; n += kWarpSize) {
    stg(y + row + n, (ldg(x + row + n) - mu) * r * ldg(weight + n) + ldg(bias + n));
  }
  if (lane_id() == 0) {
    stg(mean + m, mu);
    stg(rstd + m, r);
  }
}

}  // namespace

extern "C" void layer_norm(const float* x, const float* weight, const float* bias, float* y, float* mean, float* rstd,
                           int M, int N, float eps, cudaStream_t stream) {
  launch<layer_norm_kernel>(grid_of(M), dim3(kWarpSize), 0, stream, x, weight, bias, y, mean, rstd, N, eps);
}
