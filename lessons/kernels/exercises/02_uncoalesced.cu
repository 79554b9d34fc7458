// Exercise 2: uncoalesced access.
//
// Layer norm with a warp for each row. The row is cut into 32 pieces, one for each lane, and each lane walks through
// its own. So the 32 addresses of one load lie far apart: each is in a sector of its own, of which 4 of 32 bytes are
// used.
//
// Asked: the same numbers from an eighth of the sectors.
//
// Hint: which elements should the lanes of a warp take in one and the same turn of the loop? Each lane still takes N /
// 32 of them, but they need not be neighbours.
//
// Goal: sectors per load request <= 4
// Goal: sectors per store request <= 4
// Goal: load requests <= 10240

#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

__global__ void layer_norm_kernel(const float* x, const float* weight, const float* bias, float* y, float* mean,
                                  float* rstd, int N, float eps) {
  const int m = blockIdx.x;
  const int64_t row = static_cast<int64_t>(m) * N;
  const int piece = (N + kWarpSize - 1) / kWarpSize;
  const int begin = min(lane_id() * piece, N), end = min(begin + piece, N);

  float sum = 0.0f;
  for (int n = begin; n < end; ++n) sum += ldg(x + row + n);
  const float mu = warp_sum(sum) / N;

  float squares = 0.0f;
  for (int n = begin; n < end; ++n) {
    const float centred = ldg(x + row + n) - mu;
    squares += centred * centred;
  }
  const float r = rsqrtf(warp_sum(squares) / N + eps);

  for (int n = begin; n < end; ++n) {
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
