// layer_norm's backward 1: a warp for each column's gradients.
//
// The gradient of x belongs to rows, and dx.cuh makes it as the forward makes y. The gradients of weight and bias are
// sums down the columns: dweight = sum(dy * xhat), dbias = sum(dy). Sums along rows are a warp's work, so here sums
// down columns are, too: the lanes take a column's rows in turn, and a shuffle adds up what they have.
//
// Moves: for dx 4 bytes of dy, x and weight twice and of dx once; for the sums dy, x, mean and rstd once more: 44 bytes
// an element are wanted, and 32 moved for each 4 of dy and of x in the sums.
//
// Last rung: (of the forward) rows are contiguous, and everything was easy.
//
// Gains: the right numbers. But neighbours in a column are N elements apart, and each lane's 4 bytes cost a sector.
//
// Promise: sectors per load request >= 8

#include "dx.cuh"
#include "long_sum.cuh"

namespace {

using namespace lessons;

constexpr int kWarps = 4;

__global__ void __launch_bounds__(kWarps* kWarpSize)
    layer_norm_column_kernel(const float* dy, const float* x, const float* mean, const float* rstd, float* dweight,
                             float* dbias, int M, int N) {
  const int n = static_cast<int>(blockIdx.x) * kWarps + warp_id();
  if (n >= N) return;
  LongSum sum_weight, sum_bias;
  for (int m = lane_id(); m < M; m += kWarpSize) {
    const int64_t at = static_cast<int64_t>(m) * N + n;
    const float its_dy = ldg(dy + at);
    sum_weight.add(its_dy * (ldg(x + at) - ldg(mean + m)) * ldg(rstd + m));
    sum_bias.add(its_dy);
  }
  const float its_dweight = warp_sum(sum_weight.total()), its_dbias = warp_sum(sum_bias.total());
  if (lane_id() == 0) {
    stg(dweight + n, its_dweight);
    stg(dbias + n, its_dbias);
  }
}

}  // namespace

extern "C" void layer_norm_bwd(const float* dy, const float* x, const float* weight, const float* mean,
                               const float* rstd, float* dx, float* dweight, float* dbias, int M, int N,
                               cudaStream_t stream) {
  layer_norm_dx(dy, x, weight, mean, rstd, dx, M, N, stream);
  launch<layer_norm_column_kernel>(grid_of((N + kWarps - 1) / kWarps), dim3(kWarps * kWarpSize), 0, stream, dy, x, mean,
                                   rstd, dweight, dbias, M, N);
}
