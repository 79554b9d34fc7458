// Elementwise kernels over contiguous tensors: each thread has 16 bytes. A multiprocessor full of threads then has 32
// KB in flight, twice what it takes to cover the latency of memory.

#pragma once

#include "rows.cuh"

namespace fastgpt::cuda {

constexpr int kElementwiseThreads = 256;

// This thread's elements of n of T: f(the first one, how many are left from there).
template <class T, class F>
FASTGPT_PRIM void for_my_elements(int64_t n, F f) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kElementwiseThreads + threadIdx.x) * kVecSize<T>;
  if (first < n) f(first, n - first);
}

// launch_elementwise<kernel, T>(n, stream, args...)
template <auto kKernel, class T, class... Args>
void launch_elementwise(int64_t n, cudaStream_t stream, const Args&... args) {
  constexpr int64_t kAtOnce = kElementwiseThreads * kVecSize<T>;
  launch<kKernel>(grid_of((n + kAtOnce - 1) / kAtOnce), dim3(kElementwiseThreads), 0, stream, args...);
}

// Whether this pointer can be read 16 bytes at a time.
inline bool is_vector(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace fastgpt::cuda
