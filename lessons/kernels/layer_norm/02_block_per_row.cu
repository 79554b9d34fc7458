// layer_norm 2: a block for each row, whose threads read side by side.
//
// Lane l reads element l, then l + 128, and so on: a warp's 32 loads are 128 bytes in a row, 4 sectors. Each thread
// adds up its own elements; the 128 sums become one in shared memory, by a tree: half of the threads add the other
// half's sums to their own, then a quarter, then an eighth. A barrier between two levels makes sure that what is read
// was written.
//
// Moves: the same 24 bytes an element are wanted, and now 24 are moved.
//
// Last rung: a warp's lanes lay in 32 different rows, so that 7 of 8 bytes that were moved were thrown away.
//
// Gains: an eighth of the sectors of x and y, a fifth of all (weight and bias, which a whole warp wanted at the same
// place, are read side by side now, four times the sectors), for the price of a tree for each of the two sums: a
// barrier after each of its 7 levels, one before them and one before the array may be used again.
//
// Promise: bytes moved <= 0.2 x 01_naive
// Promise: sectors per store request <= 4
// Promise: bank conflicts == 0

#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

constexpr int kThreads = 128;

// The sum of all threads' x, in every thread.
FASTGPT_PRIM float block_sum(float x, Shared<float> sums) {
  const int thread = static_cast<int>(threadIdx.x);
  sts(sums + thread, x);
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) sts(sums + thread, lds(sums + thread) + lds(sums + thread + half));
    __syncthreads();
  }
  const float sum = lds(sums);
  __syncthreads();  // all have read it before the next sum overwrites it
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    layer_norm_block_kernel(const float* x, const float* weight, const float* bias, float* y, float* mean, float* rstd,
                            int N, float eps) {
  SHARED(float, sums, kThreads);
  const int64_t start = static_cast<int64_t>(blockIdx.x) * N;
  const int thread = static_cast<int>(threadIdx.x);

  float sum = 0.0f;
  for (int n = thread; n < N; n += kThreads) sum += ldg(x + start + n);
  const float its_mean = block_sum(sum, sums) / N;

  float squares = 0.0f;
  for (int n = thread; n < N; n += kThreads) {
    const float centred = ldg(x + start + n) - its_mean;
    squares += centred * centred;
  }
  const float its_rstd = 1.0f / sqrtf(block_sum(squares, sums) / N + eps);
  if (thread == 0) {
    stg(mean + blockIdx.x, its_mean);
    stg(rstd + blockIdx.x, its_rstd);
  }

  for (int n = thread; n < N; n += kThreads) {
    stg(y + start + n, (ldg(x + start + n) - its_mean) * its_rstd * ldg(weight + n) + ldg(bias + n));
  }
}

}  // namespace

extern "C" void layer_norm(const float* x, const float* weight, const float* bias, float* y, float* mean, float* rstd,
                           int M, int N, float eps, cudaStream_t stream) {
  launch<layer_norm_block_kernel>(grid_of(M), dim3(kThreads), 0, stream, x, weight, bias, y, mean, rstd, N, eps);
}
