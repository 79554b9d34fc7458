// Exponentials of a row, below its maximum, and their sum.

#pragma once

#include <cmath>
#include <type_traits>

#include "rows.cuh"

namespace fastgpt::cuda {

// e^x where tensors are of T. In half precision one instruction, off by 2 ulp and by what the product rounds off: that
// shows in no result but cross_entropy's loss, which is fp32. Of the sum of exponentials it falsifies all but the
// largest, which is exactly 1, and so the loss, their logarithm, by about 2^-22 of itself. In fp32 a row has half the
// elements to a byte, and time for expf.
template <class T>
FASTGPT_PRIM float exponential(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return expf(x);
  } else {
    return fast_exp2(x * 1.4426950408889634f);
  }
}

struct ExponentialSum {
  float top;    // the largest element, -inf where there is none
  float shift;  // what is taken off before the exponential: top, or 0 in place of -inf
  float total;  // the sum of exponential(element - shift)
};

FASTGPT_PRIM float shift_for(float top) { return top == -INFINITY ? 0.0f : top; }

// get(values, item, column, left) gives an item of for_each_item, and -inf for what is not there. Where the row is on
// chip, its maximum comes first. Else one reading must do: a running maximum, and a sum that is rescaled whenever it
// grows (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
template <class T, int kItems, bool kOnChip, class Get>
FASTGPT_PRIM ExponentialSum exponential_sum(RowReduction& reduce, int64_t N, const Get& get) {
  constexpr int kCount = kVecSize<T>;
  float top = -INFINITY, total = 0.0f;
  if constexpr (kOnChip) {
    for_each_item<kItems, kCount>(N, [&](int i, int64_t c, int64_t left) {
      float v[kCount];
      get(v, i, c, left);
#pragma unroll
      for (int j = 0; j < kCount; ++j) top = fmaxf(top, v[j]);
    });
    top = reduce.max(top);
    const float shift = shift_for(top);
    for_each_item<kItems, kCount>(N, [&](int i, int64_t c, int64_t left) {
      float v[kCount];
      get(v, i, c, left);
#pragma unroll
      for (int j = 0; j < kCount; ++j) total += exponential<T>(v[j] - shift);
    });
    return {top, shift, reduce.sum(total)};
  } else {
    for_each_item<kItems, kCount>(N, [&](int i, int64_t c, int64_t left) {
      float v[kCount], high = -INFINITY;
      get(v, i, c, left);
#pragma unroll
      for (int j = 0; j < kCount; ++j) high = fmaxf(high, v[j]);
      high = fmaxf(top, high);
      const float shift = shift_for(high);
      total *= exponential<T>(top - shift);
      top = high;
#pragma unroll
      for (int j = 0; j < kCount; ++j) total += exponential<T>(v[j] - shift);
    });
    const float all_top = reduce.max(top), shift = shift_for(all_top);
    return {all_top, shift, reduce.sum(total * exponential<T>(top - shift))};
  }
}

}  // namespace fastgpt::cuda
