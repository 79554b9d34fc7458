// GELU of z = x + bias: z * Phi(z), or its approximation by tanh. Forward reads x and writes y, backward reads x and dy
// and writes dx, each once; dbias adds up beside it.

#include "rows.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// Beyond this, GELU is z or 0, and its slope 1 or 0, in fp32.
constexpr float kFar = 20.0f;

struct Exact {
  // Phi(-t) for 0 <= t <= kFar, given exp(-t^2 / 2): their ratio is a polynomial of 1 / (1 + 0.3 t), which holds the
  // relative error of the tail below that of exp(-t^2 / 2), so that GELU is as good far below zero as near it.
  static Vec tail(Vec t, Vec density) {
    Vec s = 1.0f / (t * 0.3f + 1.0f);
    Vec p = s * 0x1.26ad8cp-5f + -0x1.4368e8p-3f;
    p = p * s + 0x1.a6f698p-3f;
    p = p * s + -0x1.afc15ep-5f;
    p = p * s + 0x1.04cb52p-3f;
    p = p * s + 0x1.9bc4fcp-4f;
    p = p * s + 0x1.ee0568p-4f;
    p = p * s + 0x1.ea0d84p-4f;
    return p * s * density;
  }

  static Vec value(Vec z) {
    Vec t = vmin(splat(kFar), vabs(z));
    return vmax(Vec{}, z) - t * tail(t, vexp(t * t * -0.5f));
  }

  // Phi(z) + z * phi(z)
  static Vec slope(Vec z) {
    z = vmin(splat(kFar), vmax(splat(-kFar), z));
    Vec density = vexp(z * z * -0.5f), below = tail(vabs(z), density);
    return (z < 0.0f ? below : 1.0f - below) + z * density * 0x1.988454p-2f;  // 1 / sqrt(2 pi)
  }
};

// (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u)), which loses no digits where tanh nears -1.
struct Tanh {
  static constexpr float kTwiceSqrt2OverPi = 0x1.988454p+0f;
  static constexpr float kCubic = 0.044715f;

  static Vec value(Vec z) {
    Vec e = vexp(z * (z * z * kCubic + 1.0f) * -kTwiceSqrt2OverPi);
    return vmax(splat(-kFar), z) / (e + 1.0f);
  }

  // s + z * s * (1 - s) * 2 u'
  static Vec slope(Vec z) {
    z = vmin(splat(10.0f), vmax(splat(-10.0f), z));  // below, e would be infinite
    Vec square = z * z;
    Vec e = vexp(z * (square * kCubic + 1.0f) * -kTwiceSqrt2OverPi);
    Vec s = 1.0f / (e + 1.0f);
    return s + z * (s * (e * s)) * (square * (3 * kCubic * kTwiceSqrt2OverPi) + kTwiceSqrt2OverPi);
  }
};

template <class F, class T, class P>
void forward(const Pool& pool, const GeluFwd& a) {
  const int64_t N = a.N;
  const P* bias = static_cast<const P*>(a.bias);
  parallel_for(pool, a.M, row_grain(N), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* x = row<T>(a.x, m);
      T* y = static_cast<T*>(a.y) + m * N;
      for_each_vec(N, [&](int64_t i, int n) {
        Vec z = load_n(x + i, n);
        if (bias != nullptr) z += load_n(bias + i, n);
        store_n(y + i, F::value(z), n);
      });
    }
  });
}

template <class F, class T, class P>
void backward(const Pool& pool, const GeluBwd& a) {
  const int64_t N = a.N, blocks = row_blocks(a.M);
  const P* bias = static_cast<const P*>(a.bias);
  parallel_for(pool, blocks, row_block_grain(a.M, N), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* dbias = bias == nullptr ? nullptr : a.partial + block * N;
      if (dbias != nullptr) for_each_vec(N, [&](int64_t i, int n) { store_n(dbias + i, Vec{}, n); });
      for (int64_t m = a.M * block / blocks; m < a.M * (block + 1) / blocks; ++m) {
        const T* x = row<T>(a.x, m);
        const T* dy = row<T>(a.dy, m);
        T* dx = static_cast<T*>(a.dx) + m * N;
        for_each_vec(N, [&](int64_t i, int n) {
          Vec z = load_n(x + i, n);
          if (bias != nullptr) z += load_n(bias + i, n);
          Vec d = rounded(load_n(dy + i, n) * F::slope(z));
          store_n(dx + i, d, n);
          if (dbias != nullptr) store_n(dbias + i, load_n(dbias + i, n) + d, n);
        });
      }
    }
  });
  if (bias != nullptr) add_partial_sums(pool, a.partial, blocks, N, N, static_cast<P*>(a.dbias));
}

// f(Exact{} or Tanh{}, T{}, P{})
template <class Args, class F>
void with_types(const Args& a, const F& f) {
  with_dtypes(a.dtype, a.bias_dtype, [&](auto t, auto p) { a.tanh ? f(Tanh{}, t, p) : f(Exact{}, t, p); });
}

}  // namespace

void gelu_fwd(const Pool& pool, const GeluFwd& a) {
  with_types(a, [&](auto g, auto t, auto p) { forward<decltype(g), decltype(t), decltype(p)>(pool, a); });
}

void gelu_bwd(const Pool& pool, const GeluBwd& a) {
  with_types(a, [&](auto g, auto t, auto p) { backward<decltype(g), decltype(t), decltype(p)>(pool, a); });
}

}  // namespace fastgpt::FASTGPT_ISA
