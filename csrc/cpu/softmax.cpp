// softmax(scale * x) over rows of N elements, with an optional causal mask.
//
// Each tensor moves once: forward reads x and writes y, backward reads y and dy and writes dx. What the mask hides is
// not read, and written as zeros. Between its passes (maximum, exponentials and their sum, quotient) a row stays in the
// cache, its exponentials in fp32; those of a row in half precision beyond kHeld elements are made twice.

#include "rows.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// How many columns row m sees: those up to m + N - Tq in its matrix of Tq rows.
inline int64_t visible_columns(int64_t m, int64_t N, int64_t Tq) {
  return Tq == 0 ? N : max<int64_t>(0, m % Tq + 1 + N - Tq);
}

template <class T>
void forward(const Pool& pool, const SoftmaxFwd& a) {
  parallel_for(pool, a.M, row_grain(a.N), [&](int64_t begin, int64_t end) {
    HeldExponentials held(a.N);
    for (int64_t m = begin; m < end; ++m) {
      const T* x = row<T>(a.x, m);
      T* y = static_cast<T*>(a.y) + m * a.N;
      const int64_t N = visible_columns(m, a.N, a.Tq);
      clear(y + N, a.N - N);
      held.start(y);
      // Rounded before the maximum is taken off, so that the largest becomes exactly 0.
      auto scaled = [&](int64_t i, int n) { return rounded(load_n(x + i, n) * a.scale); };
      const ExponentialSum sum = exponential_sum(N, scaled, held.data);
      // A causal row without a finite element gives 0, any other NaN.
      const float inverse = 1.0f / (sum.total == 0.0f && a.Tq != 0 ? 1.0f : sum.total);
      for_each_vec(N, [&](int64_t i, int n) {
        Vec e = held.data != nullptr ? load_n(held.data + i, n) : vexp(scaled(i, n) - sum.shift);
        store_n(y + i, e * inverse, n);
      });
    }
  });
}

// dx = scale * y * (dy - sum(y * dy))
template <class T>
void backward(const Pool& pool, const SoftmaxBwd& a) {
  parallel_for(pool, a.M, row_grain(a.N), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* y = row<T>(a.y, m);
      const T* dy = row<T>(a.dy, m);
      T* dx = static_cast<T*>(a.dx) + m * a.N;
      const int64_t N = visible_columns(m, a.N, a.Tq);
      clear(dx + N, a.N - N);
      Sum sum;
      for_each_vec(N, [&](int64_t i, int n) { sum.add(load_n(y + i, n) * load_n(dy + i, n)); });
      const float dot = sum.value();
      for_each_vec(
          N, [&](int64_t i, int n) { store_n(dx + i, load_n(y + i, n) * (load_n(dy + i, n) - dot) * a.scale, n); });
    }
  });
}

}  // namespace

void softmax_fwd(const Pool& pool, const SoftmaxFwd& a) {
  with_dtype(a.dtype, [&](auto t) { forward<decltype(t)>(pool, a); });
}

void softmax_bwd(const Pool& pool, const SoftmaxBwd& a) {
  with_dtype(a.dtype, [&](auto t) { backward<decltype(t)>(pool, a); });
}

}  // namespace fastgpt::FASTGPT_ISA
