// Softmax, rung 6: the maximum and the sum in one pass.
//
// Moves: 12 bytes per element: x is read twice, y written once.
//
// Last rung: it read the row once more only because the sum needs the maximum.
//
// Gains: a sum of exponentials below a maximum can be carried over to a larger one: it is multiplied by
// exp(old maximum - new maximum). So each thread keeps both while it walks through its part of the row, and the
// threads' sums are carried over to the row's maximum before they are added (Milakov and Gimelshein, "Online normalizer
// calculation for softmax", 2018). Attention lives by the same idea: there the rows are too long to be read twice.
//
// Promise: load sectors <= 0.667 x 05_vectors
// Promise: bytes moved <= 0.75 x 05_vectors

#include "rows.cuh"
#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

constexpr int kThreads = 128;

template <int kCount>
__global__ void softmax_kernel(const float* x, float* y, int N) {
  ROW_REDUCTION(reduce);
  using Item = Vec<float, kCount>;
  const auto* items = reinterpret_cast<const Item*>(x + static_cast<int64_t>(blockIdx.x) * N);
  auto* results = reinterpret_cast<Item*>(y + static_cast<int64_t>(blockIdx.x) * N);
  const int t = static_cast<int>(threadIdx.x);

  float most = -INFINITY, sum = 0.0f;
  for (int i = t; i < N / kCount; i += kThreads) {
    const Item item = ldg(items + i);
    float larger = most;
    for (int j = 0; j < kCount; ++j) larger = fmaxf(larger, item[j]);
    sum *= __expf(most - larger);  // the first time exp(-infinity), and there is no sum yet
    for (int j = 0; j < kCount; ++j) sum += __expf(item[j] - larger);
    most = larger;
  }
  const float of_row = reduce.max(most);
  sum = reduce.sum(sum * __expf(most - of_row));  // a thread that had no element adds nothing

  for (int i = t; i < N / kCount; i += kThreads) {
    Item item = ldg(items + i);
    for (int j = 0; j < kCount; ++j) item[j] = __expf(item[j] - of_row) / sum;
    stg(results + i, item);
  }
}

}  // namespace

extern "C" void softmax(const float* x, float* y, int M, int N, cudaStream_t stream) {
  if (N % 4 == 0) {
    launch<softmax_kernel<4>>(dim3(M), dim3(kThreads), 0, stream, x, y, N);
  } else {
    launch<softmax_kernel<1>>(dim3(M), dim3(kThreads), 0, stream, x, y, N);
  }
}
