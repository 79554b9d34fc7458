// Exercise 2: uncoalesced access.
//
// Softmax with a warp for each row. The row is cut into 32 pieces, one for each lane, and each lane walks through its
// own. So the 32 addresses of one load lie far apart: each is in a sector of its own, of which 4 of 32 bytes are used.
//
// Asked: the same numbers from an eighth of the sectors.
//
// Hint: which elements should the lanes of a warp take in one and the same turn of the loop? Each lane still takes a
// thirty-second of them, but they need not be neighbours.
//
// Goal: sectors per load request <= 4
// Goal: sectors per store request <= 4
// Goal: load requests <= 6144

#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

__global__ void softmax_kernel(const float* x, float* y, int N) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * N;
  const int piece = (N + kWarpSize - 1) / kWarpSize;
  const int begin = min(lane_id() * piece, N), end = min(begin + piece, N);

  float most = -INFINITY;
  for (int n = begin; n < end; ++n) most = fmaxf(most, ldg(x + row + n));
  most = warp_max(most);

  float sum = 0.0f;
  for (int n = begin; n < end; ++n) sum += __expf(ldg(x + row + n) - most);
  sum = warp_sum(sum);

  for (int n = begin; n < end; ++n) stg(y + row + n, __expf(ldg(x + row + n) - most) / sum);
}

}  // namespace

extern "C" void softmax(const float* x, float* y, int M, int N, cudaStream_t stream) {
  launch<softmax_kernel>(grid_of(M), dim3(kWarpSize), 0, stream, x, y, N);
}
