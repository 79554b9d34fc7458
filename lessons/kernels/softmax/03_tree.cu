// Softmax, rung 3: what the threads of a block know is put together as in a tournament.
//
// Moves: 16 bytes per element, as before. What changes is the traffic in shared memory.
//
// Last rung: each of 128 threads read 128 results of others, twice: 32768 reads for 256 numbers, and each thread did
// the same sum, one addition after the other.
//
// Gains: in each of seven rounds half of the threads combine two results and leave one: 127 combinations where there
// were 16384, in a chain of seven. It reads from the upper half of what is left, so that a warp's threads read
// neighbouring words, which lie in different banks. The price is a barrier for each round.
//
// Promise: shared accesses <= 0.05 x 02_coalesced
// Promise: bank conflicts == 0
// Promise: bytes moved == 1 x 02_coalesced

#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

constexpr int kThreads = 128;

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// What `combine` makes of all threads' x. The array may be used again when the function has returned.
template <class F>
__device__ float reduce(float x, Shared<float> partial, F combine) {
  const int t = static_cast<int>(threadIdx.x);
  sts(partial + t, x);
  for (int left = kThreads / 2; left > 0; left /= 2) {
    __syncthreads();  // the round before is over
    if (t < left) sts(partial + t, combine(lds(partial + t), lds(partial + (t + left))));
  }
  __syncthreads();
  const float all = lds(partial);
  __syncthreads();
  return all;
}

__global__ void softmax_kernel(const float* x, float* y, int N) {
  SHARED(float, partial, kThreads);
  x += static_cast<int64_t>(blockIdx.x) * N;
  y += static_cast<int64_t>(blockIdx.x) * N;
  const int t = static_cast<int>(threadIdx.x);

  float most = -INFINITY;
  for (int n = t; n < N; n += kThreads) most = fmaxf(most, ldg(x + n));
  most = reduce(most, partial, Larger());

  float sum = 0.0f;
  for (int n = t; n < N; n += kThreads) sum += __expf(ldg(x + n) - most);
  sum = reduce(sum, partial, Add());

  for (int n = t; n < N; n += kThreads) stg(y + n, __expf(ldg(x + n) - most) / sum);
}

}  // namespace

extern "C" void softmax(const float* x, float* y, int M, int N, cudaStream_t stream) {
  launch<softmax_kernel>(dim3(M), dim3(kThreads), 0, stream, x, y, N);
}
