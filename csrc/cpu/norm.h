// What layer_norm and add_layer_norm do with a row, once they know where it is.

#pragma once

#include "rows.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// y = (x - mean) * rstd * weight + bias; returns rstd.
template <class X, class T, class P>
inline float normalize_row(const X* x, const Moments& moments, float eps, const P* weight, const P* bias, int64_t N,
                           T* y) {
  const float rstd = 1.0f / __builtin_sqrtf(moments.variance + eps);
  for_each_vec(N, [&](int64_t i, int n) {
    Vec v = (load_n(x + i, n) - moments.mean) * rstd * load_n(weight + i, n);
    if (bias != nullptr) v += load_n(bias + i, n);
    store_n(y + i, v, n);
  });
  return rstd;
}

// The gradient of a row that was normalised: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * weight.
template <class X, class T, class P>
struct NormRowGradient {
  const X* x;
  const T* dy;
  const P* weight;
  float mean, rstd;
  float mean_g = 0.0f, mean_gx = 0.0f;  // known after sum_up

  // The row's two means, and its share of dweight and dbias.
  void sum_up(int64_t N, float* dweight, float* dbias) {
    Sum sum_g, sum_gx;
    for_each_vec(N, [&](int64_t i, int n) {
      const Vec d = load_n(dy + i, n), normal = xhat(i, n), scaled = g(i, n);  // g is 0 beyond the row's end, as dy is
      sum_g.add(scaled);
      sum_gx.add(keep_n(scaled * normal, n, 0.0f));
      store_n(dweight + i, load_n(dweight + i, n) + d * normal, n);
      store_n(dbias + i, load_n(dbias + i, n) + d, n);
    });
    mean_g = sum_g.value() / N;
    mean_gx = sum_gx.value() / N;
  }

  Vec dx(int64_t i, int n) const { return rstd * (g(i, n) - mean_g - xhat(i, n) * mean_gx); }

 private:
  Vec xhat(int64_t i, int n) const { return (load_n(x + i, n) - mean) * rstd; }
  Vec g(int64_t i, int n) const { return rounded(load_n(dy + i, n) * load_n(weight + i, n)); }
};

}  // namespace
}  // namespace fastgpt::FASTGPT_ISA
