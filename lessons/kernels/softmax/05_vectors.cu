// Softmax, rung 5: a thread moves 16 bytes with one instruction.
//
// Moves: 16 bytes per element, as before, in a quarter of the requests.
//
// Last rung: each request carried four bytes a thread. A processor has only so many requests under way, and each costs
// an instruction and the arithmetic of an address: with small ones memory is not kept busy.
//
// Gains: a Vec<float, 4> is loaded by one instruction: a request of the warp touches 16 sectors, all of whose bytes are
// wanted, and there are a quarter as many. That asks for rows whose begin is a multiple of 16 bytes; others go one
// element at a time, through the same template. The sums over a block are the package's from here on (RowReduction of
// rows.cuh): the last rung, put into a class.
//
// Promise: load requests <= 0.25 x 04_shuffles
// Promise: sectors per load request == 16
// Promise: bytes moved == 1 x 04_shuffles

#include "rows.cuh"
#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

constexpr int kThreads = 128;

// kCount elements at a time, which divides N.
template <int kCount>
__global__ void softmax_kernel(const float* x, float* y, int N) {
  ROW_REDUCTION(reduce);
  using Item = Vec<float, kCount>;
  const auto* items = reinterpret_cast<const Item*>(x + static_cast<int64_t>(blockIdx.x) * N);
  auto* results = reinterpret_cast<Item*>(y + static_cast<int64_t>(blockIdx.x) * N);
  const int t = static_cast<int>(threadIdx.x);

  float most = -INFINITY;
  for (int i = t; i < N / kCount; i += kThreads) {
    const Item item = ldg(items + i);
    for (int j = 0; j < kCount; ++j) most = fmaxf(most, item[j]);
  }
  most = reduce.max(most);

  float sum = 0.0f;
  for (int i = t; i < N / kCount; i += kThreads) {
    const Item item = ldg(items + i);
    for (int j = 0; j < kCount; ++j) sum += __expf(item[j] - most);
  }
  sum = reduce.sum(sum);

  for (int i = t; i < N / kCount; i += kThreads) {
    Item item = ldg(items + i);
    for (int j = 0; j < kCount; ++j) item[j] = __expf(item[j] - most) / sum;
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
