// Sums that the kernels over rows share.

#pragma once

#include "parallel.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// A running sum of vectors in two levels, so that long rows do not lose digits: a lane adds at most 64 terms before
// their sum goes to the total.
struct Sum {
  Vec total{}, part{};
  int count = 0;

  void add(Vec v) {
    part += v;
    if (++count == 64) {
      total += part;
      part = Vec{};
      count = 0;
    }
  }

  float value() const { return sum(total + part); }
};

struct Moments {
  float mean, variance;
};

// Mean and variance of N elements, given by `at(i, n)`: n elements from i on, 0 in the lanes beyond.
template <class F>
inline Moments row_moments(int64_t N, const F& at) {
  Sum total;
  for_each_vec(N, [&](int64_t i, int n) { total.add(at(i, n)); });
  float mean = total.value() / N;
  Sum squares, rest;
  for_each_vec(N, [&](int64_t i, int n) {
    Vec centred = keep_n(at(i, n) - mean, n, 0.0f);
    squares.add(centred * centred);
    rest.add(centred);
  });
  // What the first sum lost to rounding. It changes the variance by its square, which is nothing.
  mean += rest.value() / N;
  return {mean, squares.value() / N};
}

// Second stage of a sum over rows: out[j] = the sum of partial[block * stride + j] over the blocks, in their order.
template <class T>
inline void add_partial_sums(const Pool& pool, const float* partial, int64_t blocks, int64_t stride, int64_t N,
                             T* out) {
  const int64_t vecs = ceil_div(N, kLanes);
  parallel_for(pool, vecs, max<int64_t>(1, 4096 / blocks), [&](int64_t begin, int64_t end) {
    for_each_vec(min(N, end * kLanes) - begin * kLanes, [&](int64_t i, int n) {
      i += begin * kLanes;
      Vec total{};
      for (int64_t block = 0; block < blocks; ++block) total += load_n(partial + block * stride + i, n);
      store_n(out + i, total, n);
    });
  });
}

}  // namespace
}  // namespace fastgpt::FASTGPT_ISA
