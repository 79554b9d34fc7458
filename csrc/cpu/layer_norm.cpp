// Layer norm: y = (x - mean) * rstd * weight + bias over rows of N elements.
//
// A row is read from memory once and then three times from the L1 cache, where GPT-sized rows stay: for the sum, for
// the sum of squares about the mean (taken about zero it would lose its digits where the mean is large), and for y.

#include "norm.h"

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
      a.mean[m] = moments.mean;
      a.rstd[m] = normalize_row(x, moments, a.eps, weight, bias, N, y);
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
      clear(dweight, 2 * N);
      for (int64_t m = a.M * block / blocks; m < a.M * (block + 1) / blocks; ++m) {
        NormRowGradient<T, T, P> gradient{row<T>(a.x, m), row<T>(a.dy, m), weight, a.mean[m], a.rstd[m]};
        T* dx = static_cast<T*>(a.dx) + m * N;
        gradient.sum_up(N, dweight, dbias);
        for_each_vec(N, [&](int64_t i, int n) { store_n(dx + i, gradient.dx(i, n), n); });
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
