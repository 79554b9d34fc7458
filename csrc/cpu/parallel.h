// Loops over a Pool, and the dtypes of a kernel's pointers.

#pragma once

#include "kernels.h"
#include "vec.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// f(begin, end) on parts of [0, n), at least `grain` items each.
template <class F>
inline void parallel_for(const Pool& pool, int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain) {
    f(0, n);
    return;
  }
  auto body = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  pool.run(n, grain, body, const_cast<void*>(static_cast<const void*>(&f)));
}

// How many rows of N elements are worth another thread, which takes some microseconds to wake.
inline int64_t row_grain(int64_t N) { return max<int64_t>(1, 16384 / max<int64_t>(1, N)); }

// The same in blocks of row_blocks(M).
inline int64_t row_block_grain(int64_t M, int64_t N) {
  return ceil_div(row_grain(N), max<int64_t>(1, M / row_blocks(M)));
}

// f(T{}) with the type that `dtype` names.
template <class F>
inline void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::fp32:
      return f(float{});
    case Dtype::bf16:
      return f(bf16{});
    case Dtype::fp16:
      return f(fp16{});
  }
}

// f(T{}, P{}) with the types of a tensor and of its parameters: the same, or fp32 beside half precision.
template <class F>
inline void with_dtypes(Dtype dtype, Dtype parameter_dtype, const F& f) {
  with_dtype(dtype, [&](auto t) {
    if (parameter_dtype == dtype) {
      f(t, t);
    } else {
      f(t, float{});
    }
  });
}

template <class T>
inline const T* row(const Rows& rows, int64_t m) {
  return static_cast<const T*>(rows.data) + m * rows.stride;
}

}  // namespace
}  // namespace fastgpt::FASTGPT_ISA
