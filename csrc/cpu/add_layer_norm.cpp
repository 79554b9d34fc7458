// Dropout, residual addition and layer norm in one pass over the rows.
//
// What moves: forward reads x and residual and writes y and residual_out, backward reads dy, the stream's gradient and
// residual_out and writes dresidual (and dx, where dropout or its dtype makes it another). The mask is made again in
// the backward. The norm is of the sum before it is rounded to the stream's dtype: where that is half precision, the
// sum waits in a row of scratch; an fp32 stream keeps it itself.
//
// The stream is of x's dtype or fp32, and parameters are widened to fp32 once a call: five variants instead of fifteen.

#include "norm.h"
#include "philox.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// The same pointer, or a copy of N elements in fp32.
const float* widened(const void* from, Dtype dtype, int64_t N, float* scratch) {
  if (dtype == Dtype::fp32 || from == nullptr) return static_cast<const float*>(from);
  with_dtype(dtype, [&](auto t) {
    const auto* p = static_cast<const decltype(t)*>(from);
    for_each_vec(N, [&](int64_t i, int n) { store_n(scratch + i, load_n(p + i, n), n); });
  });
  return scratch;
}

// body(i, n, dropped) for each vector of row m, `dropped(v)` being v after dropout.
template <class F>
inline void for_each_dropped_vec(const Drop& drop, const Dropper& dropper, int64_t m, int64_t N, const F& body) {
  if (drop.threshold == 0) {
    for_each_vec(N, [&](int64_t i, int n) { body(i, n, [](Vec v) { return v; }); });
  } else {
    for_each_word_vec(dropper, m * N, N, [&](int64_t i, int n, VecU words) {
      body(i, n, [&](Vec v) { return dropper.apply(v, words); });
    });
  }
}

template <class T, class S>
void forward(const Pool& pool, const AddLayerNormFwd& a) {
  const int64_t N = a.N, blocks = row_blocks(a.M);
  const Dropper dropper(a.drop);
  const float* weight = widened(a.weight, a.weight_dtype, N, a.scratch);
  const float* bias = widened(a.bias, a.weight_dtype, N, a.scratch + N);
  parallel_for(pool, blocks, row_block_grain(a.M, N), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t m = a.M * block / blocks; m < a.M * (block + 1) / blocks; ++m) {
        const T* x = row<T>(a.x, m);
        const S* residual = row<S>(a.residual, m);
        S* residual_out = static_cast<S*>(a.residual_out) + m * N;
        T* y = static_cast<T*>(a.y) + m * N;
        float* total = a.scratch + (2 + block) * N;
        if constexpr (sizeof(S) == sizeof(float)) total = residual_out;
        Sum sum;
        for_each_dropped_vec(a.drop, dropper, m, N, [&](int64_t i, int n, const auto& dropped) {
          Vec v = dropped(load_n(x + i, n)) + load_n(residual + i, n);
          sum.add(v);
          store_n(total + i, v, n);
          if constexpr (sizeof(S) != sizeof(float)) store_n(residual_out + i, v, n);
        });
        const Moments moments = row_moments(N, sum, [&](int64_t i, int n) { return load_n(total + i, n); });
        a.mean[m] = moments.mean;
        a.rstd[m] = normalize_row(total, moments, a.eps, weight, bias, N, y);
      }
    }
  });
}

template <class T, class S>
void backward(const Pool& pool, const AddLayerNormBwd& a) {
  const int64_t N = a.N, blocks = row_blocks(a.M);
  const Dropper dropper(a.drop);
  const float* weight = widened(a.weight, a.weight_dtype, N, a.scratch);
  parallel_for(pool, blocks, row_block_grain(a.M, N), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* dweight = a.partial + block * 2 * N;
      float* dbias = dweight + N;
      clear(dweight, 2 * N);
      for (int64_t m = a.M * block / blocks; m < a.M * (block + 1) / blocks; ++m) {
        const S* total = row<S>(a.residual_out, m);
        const S* dstream = a.dresidual_out.data == nullptr ? nullptr : row<S>(a.dresidual_out, m);
        S* dresidual = static_cast<S*>(a.dresidual) + m * N;
        T* dx = a.dx == nullptr ? nullptr : static_cast<T*>(a.dx) + m * N;
        float mean = a.mean[m];
        if constexpr (sizeof(S) != sizeof(float)) {
          // The row as it was rounded has a mean of its own: where nothing varies, nothing must be left of it.
          mean = row_moments(N, [&](int64_t i, int n) { return load_n(total + i, n); }).mean;
        }
        NormRowGradient<S, T, float> gradient{total, row<T>(a.dy, m), weight, mean, a.rstd[m]};
        gradient.sum_up(N, dweight, dbias);
        for_each_dropped_vec(a.drop, dropper, m, N, [&](int64_t i, int n, const auto& dropped) {
          Vec dtotal = gradient.dx(i, n);
          if (dstream != nullptr) dtotal += load_n(dstream + i, n);
          store_n(dresidual + i, dtotal, n);
          if (dx != nullptr) store_n(dx + i, dropped(dtotal), n);
        });
      }
    }
  });
  with_dtype(a.weight_dtype, [&](auto p) {
    add_partial_sums(pool, a.partial, blocks, 2 * N, N, static_cast<decltype(p)*>(a.dweight));
    add_partial_sums(pool, a.partial + N, blocks, 2 * N, N, static_cast<decltype(p)*>(a.dbias));
  });
}

}  // namespace

void add_layer_norm_fwd(const Pool& pool, const AddLayerNormFwd& a) {
  with_dtypes(a.dtype, a.stream_dtype, [&](auto t, auto s) { forward<decltype(t), decltype(s)>(pool, a); });
}

void add_layer_norm_bwd(const Pool& pool, const AddLayerNormBwd& a) {
  with_dtypes(a.dtype, a.stream_dtype, [&](auto t, auto s) { backward<decltype(t), decltype(s)>(pool, a); });
}

}  // namespace fastgpt::FASTGPT_ISA
