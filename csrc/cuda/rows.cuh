// Rows of a matrix, and sums along them.
//
// blockDim.x threads share a row, a whole number of warps: one warp where the row is short, and then a block has
// several rows, by threadIdx.y. A thread moves 16 bytes of a row at a time and keeps kItems of these vectors in
// registers, so that the row is read from memory once; rows too long for that are read again in each pass (kItems = 0).

#pragma once

#include <type_traits>

#include "kernels.h"
#include "prims.cuh"

namespace fastgpt::cuda {

constexpr int kRowThreads = 256;  // at most, in a block that works on rows
constexpr int kHeldItems = 4;     // up to 8192 elements in half precision, or 4096 in fp32, stay on chip

// 16 bytes of elements as floats; zero from element `left` on. `vectors` says that p is aligned and nothing is missing.
template <int kCount, class T>
FASTGPT_PRIM void load_floats(float (&to)[kCount], const T* p, int64_t left, bool vectors) {
  constexpr int kAtOnce = kCount < kVecSize<T> ? kCount : kVecSize<T>;
  if (vectors) {
#pragma unroll
    for (int i = 0; i < kCount; i += kAtOnce) {
      const auto v = ldg(reinterpret_cast<const Vec<T, kAtOnce>*>(p + i));
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) to[i + j] = to_float(v[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = i < left ? to_float(ldg(p + i)) : 0.0f;
  }
}

// Writes what of the elements exists.
template <int kCount, class T>
FASTGPT_PRIM void store_floats(T* p, const float (&from)[kCount], int64_t left, bool vectors) {
  constexpr int kAtOnce = kCount < kVecSize<T> ? kCount : kVecSize<T>;
  if (vectors) {
#pragma unroll
    for (int i = 0; i < kCount; i += kAtOnce) {
      Vec<T, kAtOnce> v;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) v[j] = from_float<T>(from[i + j]);
      stg(reinterpret_cast<Vec<T, kAtOnce>*>(p + i), v);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < left) stg(p + i, from_float<T>(from[i]));
    }
  }
}

// Calls f(item, column of its first element, how many elements are left from there) for this thread's items of a row.
template <int kItems, int kCount, class F>
FASTGPT_PRIM void for_each_item(int64_t N, F f) {
  const auto column = [](int item) { return (static_cast<int64_t>(item) * blockDim.x + threadIdx.x) * kCount; };
  if constexpr (kItems > 0) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (column(i) < N) f(i, column(i), N - column(i));
    }
  } else {
    for (int i = 0; column(i) < N; ++i) f(i, column(i), N - column(i));
  }
}

// One row of N elements of T, as this thread sees it, in items of kCount: 16 bytes, or less beside a wider tensor.
template <class T, int kItems, int kCount = kVecSize<T>>
class Row {
 public:
  FASTGPT_PRIM Row(const T* data, int64_t N, bool vectors) : data_(data), vectors_(vectors) {
    if constexpr (kItems > 0) {
      for_each_item<kItems, kCount>(N, [&](int i, int64_t c, int64_t left) { read(kept_[i], c, left); });
    }
  }

  // The elements of an item of for_each_item, as floats; 0 from `left` on.
  FASTGPT_PRIM void get(float (&to)[kCount], int i, int64_t c, int64_t left) const {
    if constexpr (kItems > 0) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) to[j] = to_float(kept_[i][j]);
    } else {
      load_floats(to, data_ + c, left, vectors_);
    }
  }

 private:
  FASTGPT_PRIM void read(Vec<T, kCount>& to, int64_t c, int64_t left) const {
    if (vectors_) {
      to = ldg(reinterpret_cast<const Vec<T, kCount>*>(data_ + c));
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) to[j] = j < left ? ldg(data_ + c + j) : from_float<T>(0.0f);
    }
  }

  const T* data_;
  bool vectors_;
  Vec<T, kCount> kept_[kItems > 0 ? kItems : 1];  // as they are in memory: half the registers of floats
};

// Sums and maxima over the row of this thread: in a fixed order, so that all of its threads get the same bits.
class RowReduction {
 public:
  // The array holds two results of each warp, used in turn: whoever writes one again has met everybody at the barrier
  // of the other since they read it.
  FASTGPT_PRIM explicit RowReduction(Shared<float> two_by_warps) : buffer_(two_by_warps) {}

  FASTGPT_PRIM float sum(float x) {
    x = warp_sum(x);
    return blockDim.x == kWarpSize ? x : across_warps(x, [](float a, float b) { return a + b; });
  }
  FASTGPT_PRIM float max(float x) {
    x = warp_max(x);
    return blockDim.x == kWarpSize ? x : across_warps(x, [](float a, float b) { return fmaxf(a, b); });
  }

 private:
  template <class F>
  FASTGPT_PRIM float across_warps(float x, F combine) {
    const Shared<float> results = buffer_ + (turn_ ? kWarpSize : 0);
    turn_ = !turn_;
    if (lane_id() == 0) sts(results + warp_id(), x);
    __syncthreads();
    float all = lds(results);
    for (int i = 1; i < static_cast<int>(blockDim.x) / kWarpSize; ++i) all = combine(all, lds(results + i));
    return all;
  }

  Shared<float> buffer_;
  bool turn_ = false;
};
#define ROW_REDUCTION(name)          \
  SHARED(float, name##_results, 64); \
  ::fastgpt::cuda::RowReduction name(name##_results)

// How a kernel over rows of N elements is launched.
struct RowBlocks {
  dim3 block;  // (threads of a row, rows)

  dim3 grid(int64_t M) const { return grid_of((M + block.y - 1) / block.y); }
};

// Calls f(blocks, items) for rows of N elements of T; items() is the constant kItems.
template <class T, class F>
void with_row_blocks(int64_t N, F f) {
  const auto fits = [&](int64_t threads) { return threads * kHeldItems * kVecSize<T> >= N; };
  unsigned threads = kWarpSize;
  while (threads < kRowThreads && !fits(threads)) threads *= 2;
  const RowBlocks blocks{dim3(threads, threads == kWarpSize ? 4 : 1)};
  if (fits(threads)) {
    f(blocks, std::integral_constant<int, kHeldItems>());
  } else {
    f(blocks, std::integral_constant<int, 0>());
  }
}

// Whether all rows can be moved 16 bytes at a time.
inline bool are_vectors(const void* data, int64_t stride, int64_t N, Dtype dtype) {
  const int64_t size = dtype == Dtype::fp32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0 && N * size % 16 == 0;
}
inline bool are_vectors(const Rows& rows, int64_t N, Dtype dtype) {
  return are_vectors(rows.data, rows.stride, N, dtype);
}

// Calls f with a value of the C++ type of that dtype.
template <class F>
void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::fp32:
      return f(float());
    case Dtype::bf16:
      return f(bf16());
    case Dtype::fp16:
      return f(fp16());
  }
}

// Calls f with values of the types of a tensor and of the parameters that go with it: its own type, or fp32.
template <class F>
void with_dtypes(Dtype dtype, Dtype parameter_dtype, F f) {
  with_dtype(dtype, [&](auto x) {
    if (parameter_dtype == dtype) {
      f(x, x);
    } else {
      f(x, float());
    }
  });
}

}  // namespace fastgpt::cuda
