// What layer_norm and add_layer_norm do with a row, once its elements can be had: get(v, i, c, left) gives an item of
// for_each_item as floats, 0 from `left` on.

#pragma once

#include "column_sum.cuh"
#include "rows.cuh"

namespace fastgpt::cuda {

// weight or bias, of T or fp32. Which of them is asked at run time, by a branch that all threads take alike: a kernel
// for each would double the time to compile, for vectors that come from the cache.
template <class T>
class Parameter {
 public:
  FASTGPT_PRIM Parameter(const void* data, Dtype dtype) : data_(data), wide_(dtype == Dtype::fp32) {}

  FASTGPT_PRIM bool is_null() const { return data_ == nullptr; }

  template <int kCount>
  FASTGPT_PRIM void get(float (&to)[kCount], int64_t c, int64_t left, bool vectors) const {
    if (wide_) {
      load_floats(to, static_cast<const float*>(data_) + c, left, vectors);
    } else {
      load_floats(to, static_cast<const T*>(data_) + c, left, vectors);
    }
  }

 private:
  const void* data_;
  bool wide_;
};

struct Moments {
  float mean, variance;
};

// Of a row whose elements add up to `sum` over all of its threads' shares. The squares are taken about the mean: about
// zero they would lose their digits where the mean is large.
template <int kItems, int kCount, class Get>
FASTGPT_PRIM Moments row_moments(int64_t N, float sum, RowReduction& reduce, Get get) {
  const float mean = reduce.sum(sum) / N;
  float squares = 0.0f, rest = 0.0f;
  for_each_item<kItems, kCount>(N, [&](int i, int64_t c, int64_t left) {
    float v[kCount];
    get(v, i, c, left);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float centred = j < left ? v[j] - mean : 0.0f;
      squares += centred * centred;
      rest += centred;
    }
  });
  // `rest` is what the first sum lost to rounding. It changes the variance by its square, which is nothing, but rows
  // without variance would show it, times 1 / sqrt(eps).
  return {mean + reduce.sum(rest) / N, reduce.sum(squares) / N};
}

// The same where nobody has summed them.
template <int kItems, int kCount, class Get>
FASTGPT_PRIM Moments row_moments(int64_t N, RowReduction& reduce, Get get) {
  float sum = 0.0f;
  for_each_item<kItems, kCount>(N, [&](int i, int64_t c, int64_t left) {
    float v[kCount];
    get(v, i, c, left);
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum += v[j];
  });
  return row_moments<kItems, kCount>(N, sum, reduce, get);
}

// y = (x - mean) * rstd * weight + bias.
template <int kItems, int kCount, class T, class Get>
FASTGPT_PRIM void normalize_row(T* y, int64_t N, Get get, float mean, float rstd, Parameter<T> weight,
                                Parameter<T> bias, bool vectors) {
  for_each_item<kItems, kCount>(N, [&](int i, int64_t c, int64_t left) {
    float v[kCount], w[kCount], b[kCount] = {};
    get(v, i, c, left);
    weight.get(w, c, left, vectors);
    if (!bias.is_null()) bias.get(b, c, left, vectors);
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = (v[j] - mean) * rstd * w[j] + b[j];
    store_floats(y + c, v, left, vectors);
  });
}

// The gradient of rows that were normalised: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * weight; and
// this thread's share of dweight and dbias over all rows of its block.
template <int kItems, int kCount, class T>
class NormGradient {
 public:
  // `line` is the block's (2, N) of partial sums.
  FASTGPT_PRIM NormGradient(Parameter<T> weight, float* line, int64_t N, bool vectors)
      : weight_(weight), line_(line), N_(N), vectors_(vectors) {}

  // Takes the sums over a row, the block's first one in this thread or not; then dx() can be had.
  template <class GetX, class GetDy>
  FASTGPT_PRIM void sum_up(GetX get_x, GetDy get_dy, float mean, float rstd, bool first, RowReduction& reduce) {
    mean_ = mean;
    rstd_ = rstd;
    float sum_g = 0.0f, sum_gx = 0.0f;
    for_each_item<kItems, kCount>(N_, [&](int i, int64_t c, int64_t left) {
      float v[kCount], d[kCount], w[kCount];
      get_x(v, i, c, left);
      get_dy(d, i, c, left);
      weight_.get(w, c, left, vectors_);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {  // beyond the row's end dy is 0, and with it all of this
        const float g = __fmul_rn(d[j], w[j]), normal = xhat(v[j]);
        sum_g += g;
        sum_gx += g * normal;
        v[j] = d[j] * normal;
      }
      dweight_.add(v, i, line_ + c, left, first, vectors_);
      dbias_.add(d, i, line_ + N_ + c, left, first, vectors_);
    });
    mean_g_ = reduce.sum(sum_g) / N_;
    mean_gx_ = reduce.sum(sum_gx) / N_;
  }

  // Turns an item of x into its gradient. g is rounded as it was for its mean, and not fused into the difference: where
  // nothing is left of that, nothing must be (a row of one element, say).
  FASTGPT_PRIM void dx(float (&v)[kCount], const float (&dy)[kCount], int64_t c, int64_t left) const {
    float w[kCount];
    weight_.get(w, c, left, vectors_);
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = rstd_ * (__fmul_rn(dy[j], w[j]) - mean_g_ - xhat(v[j]) * mean_gx_);
  }

  // Writes the line. All threads of the block come here.
  FASTGPT_PRIM void finish(bool any_row) {
    dweight_.finish(line_, N_, any_row, vectors_);
    dbias_.finish(line_ + N_, N_, any_row, vectors_);
  }

 private:
  FASTGPT_PRIM float xhat(float x) const { return (x - mean_) * rstd_; }

  Parameter<T> weight_;
  float* line_;
  int64_t N_;
  bool vectors_;
  float mean_ = 0.0f, rstd_ = 0.0f, mean_g_ = 0.0f, mean_gx_ = 0.0f;
  ColumnSums<kItems, kCount> dweight_, dbias_;
};

}  // namespace fastgpt::cuda
