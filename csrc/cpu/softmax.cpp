// softmax(scale * x) over rows of N elements, with an optional causal mask.
//
// Each tensor moves once: forward reads x and writes y, backward reads y and dy and writes dx. What the mask hides is not
// read, and written as zeros. Between its passes (maximum, exponentials and their sum, quotient) a row stays in the cache,
// its exponentials in fp32; those of a row in half precision beyond kHeld elements are made twice.

#include "math.h"
#include "rows.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

constexpr int64_t kHeld = 65536;  // 256 KB of the stack, of which a row touches what it needs

// How many columns row m sees: those up to m + N - Tq in its matrix of Tq rows.
inline int64_t visible_columns(int64_t m, int64_t N, int64_t Tq) {
  return Tq == 0 ? N : max<int64_t>(0, m % Tq + 1 + N - Tq);
}

template <class T>
inline void clear(T* y, int64_t N) {
  for_each_vec(N, [&](int64_t i, int n) { store_n(y + i, Vec{}, n); });
}

constexpr float kInfinity = __builtin_inff();

// Where the exponentials of row y wait for their sum, in fp32: in y itself, or in half precision in `buffer`.
inline float* held_in(float* y, float*) { return y; }

template <class T>
inline float* held_in(T*, float* buffer) {
  return buffer;
}

template <class T>
void forward(const Pool& pool, const SoftmaxFwd& a) {
  parallel_for(pool, a.M, row_grain(a.N), [&](int64_t begin, int64_t end) {
    float buffer[sizeof(T) == sizeof(float) ? 1 : kHeld];
    for (int64_t m = begin; m < end; ++m) {
      const T* x = row<T>(a.x, m);
      T* y = static_cast<T*>(a.y) + m * a.N;
      float* held = held_in(y, buffer);
      const int64_t N = visible_columns(m, a.N, a.Tq);
      const bool hold = held != buffer || N <= kHeld;
      clear(y + N, a.N - N);
      // Rounded before the maximum is taken off, so that the largest becomes exactly 0.
      auto scaled = [&](int64_t i, int n) { return rounded(load_n(x + i, n) * a.scale); };
      Vec top = splat(-kInfinity);
      for_each_vec(N, [&](int64_t i, int n) { top = vmax(top, keep_n(scaled(i, n), n, -kInfinity)); });
      float shift = max_lane(top);
      if (shift == -kInfinity) shift = 0.0f;  // -inf - -inf is NaN
      Sum sum;
      for_each_vec(N, [&](int64_t i, int n) {
        Vec e = keep_n(vexp(scaled(i, n) - shift), n, 0.0f);
        if (hold) store_n(held + i, e, n);
        sum.add(e);
      });
      const float total = sum.value();
      // A causal row without a finite element gives 0, any other NaN.
      const float inverse = 1.0f / (total == 0.0f && a.Tq != 0 ? 1.0f : total);
      for_each_vec(N, [&](int64_t i, int n) {
        store_n(y + i, (hold ? load_n(held + i, n) : vexp(scaled(i, n) - shift)) * inverse, n);
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
      for_each_vec(N, [&](int64_t i, int n) {
        store_n(dx + i, load_n(y + i, n) * (load_n(dy + i, n) - dot) * a.scale, n);
      });
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
