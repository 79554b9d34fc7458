// layer_norm 3: a warp for each row, whose sums are shuffles.
//
// The lanes of a warp run together and can read each other's registers: __shfl_xor_sync hands each lane what the lane
// 16, then 8, 4, 2 and 1 places away holds, and after five additions all 32 have the sum. No shared memory, and nobody
// to wait for; four rows share a block only because blocks of one warp would leave a multiprocessor half empty.
//
// Moves: the same 24 bytes an element.
//
// Last rung: a row of a few hundred elements was cut among 128 threads, which then spent more barriers on two sums than
// loads on the row.
//
// Gains: no barrier and no access to shared memory is left.
//
// Promise: barriers == 0
// Promise: shared accesses == 0
// Promise: bytes moved <= 1 x 02_block_per_row

#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

constexpr int kWarps = 4;

__global__ void __launch_bounds__(kWarps* kWarpSize)
    layer_norm_warp_kernel(const float* x, const float* weight, const float* bias, float* y, float* mean, float* rstd,
                           int M, int N, float eps) {
  const int m = static_cast<int>(blockIdx.x) * kWarps + warp_id();
  if (m >= M) return;  // the whole warp: nobody waits for it
  const int64_t start = static_cast<int64_t>(m) * N;

  float sum = 0.0f;
  for (int n = lane_id(); n < N; n += kWarpSize) sum += ldg(x + start + n);
  const float its_mean = warp_sum(sum) / N;

  float squares = 0.0f;
  for (int n = lane_id(); n < N; n += kWarpSize) {
    const float centred = ldg(x + start + n) - its_mean;
    squares += centred * centred;
  }
  const float its_rstd = 1.0f / sqrtf(warp_sum(squares) / N + eps);
  if (lane_id() == 0) {
    stg(mean + m, its_mean);
    stg(rstd + m, its_rstd);
  }

  for (int n = lane_id(); n < N; n += kWarpSize) {
    stg(y + start + n, (ldg(x + start + n) - its_mean) * its_rstd * ldg(weight + n) + ldg(bias + n));
  }
}

}  // namespace

extern "C" void layer_norm(const float* x, const float* weight, const float* bias, float* y, float* mean, float* rstd,
                           int M, int N, float eps, cudaStream_t stream) {
  launch<layer_norm_warp_kernel>(grid_of((M + kWarps - 1) / kWarps), dim3(kWarps * kWarpSize), 0, stream, x, weight,
                                 bias, y, mean, rstd, M, N, eps);
}
