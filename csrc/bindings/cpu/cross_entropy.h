// What cross_entropy and linear_cross_entropy on CPU tensors share.

#pragma once

#include "../cross_entropy.h"
#include "tensor.h"

namespace fastgpt {

// 1 / the number of targets that count: infinite where none does.
inline float inverse_count_of(const int64_t* targets, int64_t M, int64_t ignore_index) {
  int64_t count = 0;
  for (int64_t m = 0; m < M; ++m) count += targets[m] != ignore_index;
  return 1.0f / static_cast<float>(count);
}

// NaN where no target counts.
inline float mean_loss(const float* losses, int64_t M, float inverse_count) {
  double total = 0.0;
  for (int64_t m = 0; m < M; ++m) total += losses[m];
  return static_cast<float>(total) * inverse_count;
}

// On `like`'s device.
inline Tensor scalar(const Tensor& like, float value) {
  Tensor x = fresh(like, {}, ScalarType::Float);
  *floats(x) = value;
  return x;
}

}  // namespace fastgpt
