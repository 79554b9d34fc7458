// Exercise 6: lost precision.
//
// Layer norm with a warp for each row, which sums x and its square in one pass and takes the variance as mean(x^2) -
// mean(x)^2. On paper that is the variance. In fp32 the two terms each have 24 bits, and where the mean is large beside
// the deviations they agree in most of those; the difference is made of what rounding left.
//
// Asked: a variance that is good to fp32's last bits, also where the mean is 1000 and the deviation 1. x may be read
// once more.
//
// Hint: numbers that are centred before they are squared have nothing to cancel.
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

  float sum = 0.0f, squares = 0.0f;
  for (int n = lane_id(); n < N; n += kWarpSize) {
    const float value = ldg(x + row + n);
    sum += value;
    squares += value * value;
  }
  const float mu = warp_sum(sum) / N;
  const float variance = warp_sum(squares) / N - mu * mu;
  const float r = rsqrtf(variance + eps);

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
