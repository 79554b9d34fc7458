// Softmax, rung 7: the row stays in registers.
//
// Moves: 8 bytes per element: x is read once, y written once. Less is not possible.
//
// Last rung: it still read the row again to write the result.
//
// Gains: a block of 128 threads has room for 4096 floats, 32 registers a thread. What is held is never read again, so
// the passes over it are free, and there can be three of them, each as simple as in the first rung: the maximum, the
// exponentials, which are kept, and their sum. Which element lies in which register has to be known when the kernel is
// compiled: hence the loops of a constant length, and a limit to how long a row may be.
//
// Promise: load sectors <= 0.5 x 06_online
// Promise: bytes moved <= 0.667 x 06_online
// Promise: bytes moved == 524288

#include "rows.cuh"
#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

constexpr int kThreads = 128;
constexpr int kHeld = 32;  // floats of a thread

template <int kCount>
__global__ void softmax_kernel(const float* x, float* y, int N) {
  ROW_REDUCTION(reduce);
  using Item = Vec<float, kCount>;
  const auto* items = reinterpret_cast<const Item*>(x + static_cast<int64_t>(blockIdx.x) * N);
  auto* results = reinterpret_cast<Item*>(y + static_cast<int64_t>(blockIdx.x) * N);
  const int first = static_cast<int>(threadIdx.x);

  float held[kHeld], most = -INFINITY;
#pragma unroll
  for (int i = 0; i < kHeld / kCount; ++i) {
    const int at = first + i * kThreads;
    Item item;
    if (at < N / kCount) item = ldg(items + at);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      held[i * kCount + j] = at < N / kCount ? item[j] : -INFINITY;  // beyond the row: an exponential of 0
      most = fmaxf(most, held[i * kCount + j]);
    }
  }
  most = reduce.max(most);

  float sum = 0.0f;
#pragma unroll
  for (float& value : held) sum += value = __expf(value - most);
  const float inverse = 1.0f / reduce.sum(sum);

#pragma unroll
  for (int i = 0; i < kHeld / kCount; ++i) {
    const int at = first + i * kThreads;
    Item item;
#pragma unroll
    for (int j = 0; j < kCount; ++j) item[j] = held[i * kCount + j] * inverse;
    if (at < N / kCount) stg(results + at, item);
  }
}

}  // namespace

extern "C" void softmax(const float* x, float* y, int M, int N, cudaStream_t stream) {
  if (N > kThreads * kHeld) throw std::runtime_error("rows of more than 4096 elements do not fit into registers");
  if (N % 4 == 0) {
    launch<softmax_kernel<4>>(dim3(M), dim3(kThreads), 0, stream, x, y, N);
  } else {
    launch<softmax_kernel<1>>(dim3(M), dim3(kThreads), 0, stream, x, y, N);
  }
}
