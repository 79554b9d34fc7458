// One row times a matrix that lies transposed: y[n] = sum of x[k] * weight[n][k], plus bias[n].
//
// A step of generation is such products and little else, and each reads its weights once: the sums of four rows run
// side by side, so that memory is what is waited for. Every sum has the same order whatever the number of threads.

#include "parallel.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

constexpr int kRows = 4;

// The products of `count` rows of the weight, from row n on, with x.
template <int count>
void rows_times_x(const LinearRow& a, int64_t n) {
  const float* weight = a.weight + n * a.stride;
  Vec even[count] = {}, odd[count] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes <= a.K; k += 2 * kLanes) {
    const Vec x_even = load(a.x + k), x_odd = load(a.x + k + kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      even[i] += x_even * load(weight + i * a.stride + k);
      odd[i] += x_odd * load(weight + i * a.stride + k + kLanes);
    }
  }
  for_each_vec(a.K - k, [&](int64_t j, int lanes) {
    const Vec x = load_n(a.x + k + j, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) even[i] += x * load_n(weight + i * a.stride + k + j, lanes);
  });
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) a.y[n + i] = sum(even[i] + odd[i]) + (a.bias == nullptr ? 0.0f : a.bias[n + i]);
}

}  // namespace

void linear_row(const Pool& pool, const LinearRow& a) {
  parallel_for(pool, ceil_div(a.N, kRows), ceil_div(row_grain(a.K), kRows), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kRows; n < min(a.N, end * kRows); n += kRows) {
      if (n + kRows <= a.N) {
        rows_times_x<kRows>(a, n);
      } else {
        for (int64_t rest = n; rest < a.N; ++rest) rows_times_x<1>(a, rest);
      }
    }
  });
}

}  // namespace fastgpt::FASTGPT_ISA
