// Exercise 1: a race.
//
// Softmax with a block of 128 threads for each row. The threads hand their partial results to each other through shared
// memory: once for the maximum, once more, through the same array, for the sum. As long as the warps of a block run at
// nearly the same pace, the numbers come out right.
//
// Asked: the same numbers in whatever order the warps run.
//
// Hint: the array has a second use. What must every thread have done with the results of the first, before any thread
// may write for the second?
//
// Goal: sectors per load request <= 4
// Goal: load requests <= 6144

#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

constexpr int kThreads = 128;

struct Maximum {
  FASTGPT_PRIM float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  FASTGPT_PRIM float operator()(float a, float b) const { return a + b; }
};

// What `combine` makes of the `mine` of all threads, for every thread. `shared` has kThreads elements.
template <class Combine>
FASTGPT_PRIM float combined(Shared<float> shared, float mine, Combine combine) {
  const int thread = static_cast<int>(threadIdx.x);
  sts(shared + thread, mine);
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) sts(shared + thread, combine(lds(shared + thread), lds(shared + thread + half)));
    __syncthreads();
  }
  return lds(shared);
}

__global__ void softmax_kernel(const float* x, float* y, int N) {
  SHARED(float, shared, kThreads);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * N;
  float most = -INFINITY;
  for (int n = threadIdx.x; n < N; n += kThreads) most = fmaxf(most, ldg(x + row + n));
  most = combined(shared, most, Maximum());
  float sum = 0.0f;
  for (int n = threadIdx.x; n < N; n += kThreads) sum += __expf(ldg(x + row + n) - most);
  sum = combined(shared, sum, Sum());
  for (int n = threadIdx.x; n < N; n += kThreads) stg(y + row + n, __expf(ldg(x + row + n) - most) / sum);
}

}  // namespace

extern "C" void softmax(const float* x, float* y, int M, int N, cudaStream_t stream) {
  launch<softmax_kernel>(grid_of(M), dim3(kThreads), 0, stream, x, y, N);
}
