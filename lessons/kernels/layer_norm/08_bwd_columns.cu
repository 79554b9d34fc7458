// layer_norm's backward 2: a thread for each column.
//
// The lanes of a warp take 32 neighbouring columns and walk down the rows together, so that each of their loads is 128
// bytes in a row. No shuffle is left, since a column's sum is one thread's.
//
// Moves: the same 44 bytes an element are wanted. Since the lanes of a warp want the same mean and rstd, 38 are moved.
//
// Last rung: a warp's lanes lay in 32 different rows.
//
// Gains: the sums' loads take 4 sectors a request where they took 32.
//
// Promise: load sectors <= 0.4 x 07_bwd_naive

#include "dx.cuh"
#include "long_sum.cuh"

namespace {

using namespace lessons;

__global__ void __launch_bounds__(kWarpSize)
    layer_norm_column_kernel(const float* dy, const float* x, const float* mean, const float* rstd, float* dweight,
                             float* dbias, int M, int N) {
  const int n = static_cast<int>(blockIdx.x) * kWarpSize + lane_id();
  if (n >= N) return;
  LongSum sum_weight, sum_bias;
  for (int m = 0; m < M; ++m) {
    const int64_t at = static_cast<int64_t>(m) * N + n;
    const float its_dy = ldg(dy + at);
    sum_weight.add(its_dy * (ldg(x + at) - ldg(mean + m)) * ldg(rstd + m));
    sum_bias.add(its_dy);
  }
  stg(dweight + n, sum_weight.total());
  stg(dbias + n, sum_bias.total());
}

}  // namespace

extern "C" void layer_norm_bwd(const float* dy, const float* x, const float* weight, const float* mean,
                               const float* rstd, float* dx, float* dweight, float* dbias, int M, int N,
                               cudaStream_t stream) {
  layer_norm_dx(dy, x, weight, mean, rstd, dx, M, N, stream);
  launch<layer_norm_column_kernel>(grid_of((N + kWarpSize - 1) / kWarpSize), dim3(kWarpSize), 0, stream, dy, x, mean,
                                   rstd, dweight, dbias, M, N);
}
