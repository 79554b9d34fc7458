// Layer norm: y = (x - mean) * rstd * weight + bias over rows of N elements.
//
// A row is read from memory once and then three times from the L1 cache, where GPT-sized rows stay: for the sum, for
// the sum of squares about the mean (taken about zero it would lose its digits where the mean is large), and for y.

#include "rows.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

template <class T, class P>
void forward(const Pool& pool, const LayerNormFwd& a) {
  const int64_t N = a.N;
  const P* weight = static_cast<const P*>(a.weight);
  const P* bias = static_cast<const P*>(a.bias);
  parallel_for(pool, a.M, row_grain(N), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* x = row<T>(a.x, m);
      T* y = static_cast<T*>(a.y) + m * N;
      const Moments moments = row_moments(N, [&](int64_t i, int n) { return load_n(x + i, n); });
      const float rstd = 1.0f / __builtin_sqrtf(moments.variance + a.eps);
      for_each_vec(N, [&](int64_t i, int n) {
        Vec v = (load_n(x + i, n) - moments.mean) * rstd * load_n(weight + i, n);
        if (bias != nullptr) v += load_n(bias + i, n);
        store_n(y + i, v, n);
      });
      a.mean[m] = moments.mean;
      a.rstd[m] = rstd;
    }
  });
}

template <class T, class P>
void backward(const Pool& pool, const LayerNormBwd& a) {
  const int64_t N = a.N, blocks = row_blocks(a.M);
  const P* weight = static_cast<const P*>(a.weight);
  parallel_for(pool, blocks, row_block_grain(a.M, N), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* dweight = a.partial + block * 2 * N;
      float* dbias = dweight + N;
      for_each_vec(2 * N, [&](int64_t i, int n) { store_n(dweight + i, Vec{}, n); });
      for (int64_t m = a.M * block / blocks; m < a.M * (block + 1) / blocks; ++m) {
        const T* x = row<T>(a.x, m);
        const T* dy = row<T>(a.dy, m);
        T* dx = static_cast<T*>(a.dx) + m * N;
        const float mean = a.mean[m], rstd = a.rstd[m];
        Sum sum_g, sum_gx;
        for_each_vec(N, [&](int64_t i, int n) {
          Vec xhat = (load_n(x + i, n) - mean) * rstd, d = load_n(dy + i, n);
          Vec g = rounded(d * load_n(weight + i, n));  // 0 beyond the row's end, as d is
          sum_g.add(g);
          sum_gx.add(keep_n(g * xhat, n, 0.0f));
          store_n(dweight + i, load_n(dweight + i, n) + d * xhat, n);
          store_n(dbias + i, load_n(dbias + i, n) + d, n);
        });
        const float mean_g = sum_g.value() / N, mean_gx = sum_gx.value() / N;
        for_each_vec(N, [&](int64_t i, int n) {
          Vec xhat = (load_n(x + i, n) - mean) * rstd;
          Vec g = rounded(load_n(dy + i, n) * load_n(weight + i, n));
          store_n(dx + i, rstd * (g - mean_g - xhat * mean_gx), n);
        });
      }
    }
  });
  add_partial_sums(pool, a.partial, blocks, 2 * N, N, static_cast<P*>(a.dweight));
  add_partial_sums(pool, a.partial + N, blocks, 2 * N, N, static_cast<P*>(a.dbias));
}

}  // namespace

void layer_norm_fwd(const Pool& pool, const LayerNormFwd& a) {
  with_dtypes(a.dtype, a.weight_dtype, [&](auto t, auto p) { forward<decltype(t), decltype(p)>(pool, a); });
}

void layer_norm_bwd(const Pool& pool, const LayerNormBwd& a) {
  with_dtypes(a.dtype, a.weight_dtype, [&](auto t, auto p) { backward<decltype(t), decltype(p)>(pool, a); });
}

}  // namespace fastgpt::FASTGPT_ISA
