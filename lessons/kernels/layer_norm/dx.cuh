// The gradient of layer_norm's input, a warp for each row as in 03_warp_per_row.cu: what the first two backward rungs
// share, whose subject is the gradients of weight and bias.

#pragma once

#include "tasks.h"

namespace lessons {

using namespace fastgpt::cuda;

constexpr int kDxWarps = 4;

// With g = dy * weight and xhat = (x - mean) * rstd: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), means along the
// row.
__global__ void __launch_bounds__(kDxWarps* kWarpSize)
    layer_norm_dx_kernel(const float* dy, const float* x, const float* weight, const float* mean, const float* rstd,
                         float* dx, int M, int N) {
  const int m = static_cast<int>(blockIdx.x) * kDxWarps + warp_id();
  if (m >= M) return;
  const int64_t start = static_cast<int64_t>(m) * N;
  const float its_mean = ldg(mean + m), its_rstd = ldg(rstd + m);

  float sum_g = 0.0f, sum_gx = 0.0f;
  for (int n = lane_id(); n < N; n += kWarpSize) {
    // __fmul_rn is a product that is not fused with the sum: where g is its own mean, nothing must be left of it.
    const float g = __fmul_rn(ldg(dy + start + n), ldg(weight + n));
    sum_g += g;
    sum_gx += g * (ldg(x + start + n) - its_mean) * its_rstd;
  }
  const float mean_g = warp_sum(sum_g) / N, mean_gx = warp_sum(sum_gx) / N;

  for (int n = lane_id(); n < N; n += kWarpSize) {
    const float g = __fmul_rn(ldg(dy + start + n), ldg(weight + n));
    const float xhat = (ldg(x + start + n) - its_mean) * its_rstd;
    stg(dx + start + n, its_rstd * (g - mean_g - xhat * mean_gx));
  }
}

inline void layer_norm_dx(const float* dy, const float* x, const float* weight, const float* mean, const float* rstd,
                          float* dx, int M, int N, cudaStream_t stream) {
  launch<layer_norm_dx_kernel>(grid_of((M + kDxWarps - 1) / kDxWarps), dim3(kDxWarps * kWarpSize), 0, stream, dy, x,
                               weight, mean, rstd, dx, M, N);
}

}  // namespace lessons
