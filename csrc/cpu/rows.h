// What the kernels over rows share: sums, and exponentials on their way to a softmax.

#pragma once

#include "math.h"
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

template <class T>
inline void clear(T* y, int64_t N) {
  for_each_vec(N, [&](int64_t i, int n) { store_n(y + i, Vec{}, n); });
}

struct Moments {
  float mean, variance;
};

// Mean and variance of N elements with the sum `total`, given by `at(i, n)`: n elements from i on.
template <class F>
inline Moments row_moments(int64_t N, const Sum& total, const F& at) {
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

// The same where nobody has summed them; `at` gives 0 in the lanes beyond n.
template <class F>
inline Moments row_moments(int64_t N, const F& at) {
  Sum total;
  for_each_vec(N, [&](int64_t i, int n) { total.add(at(i, n)); });
  return row_moments(N, total, at);
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

constexpr float kInfinity = __builtin_inff();

// The exponentials of a row, in fp32, while their sum is not known: in the row of results itself, or, where that is of
// half precision, beside it, up to kHeld of them. Not on the stack, which some threads have little of.
constexpr int64_t kHeld = 65536;

struct HeldExponentials {
  float* data = nullptr;  // null where the row has too many
  float* buffer = nullptr;
  int64_t longest;  // row that will come

  explicit HeldExponentials(int64_t longest_row) : longest(longest_row) {}
  HeldExponentials(const HeldExponentials&) = delete;
  ~HeldExponentials() { delete[] buffer; }

  void start(float* results) { data = results; }

  template <class T>
  void start(T*) {
    if (buffer == nullptr && longest <= kHeld) buffer = new float[longest];
    data = buffer;
  }
};

struct ExponentialSum {
  float top;    // the largest element
  float shift;  // the same, or 0 where that is -inf: -inf - -inf is NaN
  float total;  // the sum of exp(element - shift)
};

// Of N elements given by `at(i, n)`, with any values in the lanes beyond. The exponentials stay in `held`, if that has
// room, which may be where the elements are.
template <class F>
inline ExponentialSum exponential_sum(int64_t N, const F& at, float* held) {
  Vec tops = splat(-kInfinity);
  for_each_vec(N, [&](int64_t i, int n) { tops = vmax(tops, keep_n(at(i, n), n, -kInfinity)); });
  const float top = max_lane(tops), shift = top == -kInfinity ? 0.0f : top;
  Sum sum;
  for_each_vec(N, [&](int64_t i, int n) {
    Vec e = keep_n(vexp(at(i, n) - shift), n, 0.0f);
    if (held != nullptr) store_n(held + i, e, n);
    sum.add(e);
  });
  return {top, shift, sum.value()};
}

}  // namespace
}  // namespace fastgpt::FASTGPT_ISA
