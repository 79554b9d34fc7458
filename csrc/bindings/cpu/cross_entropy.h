// What cross_entropy and linear_cross_entropy share.

#pragma once

#include "tensor.h"

namespace fastgpt {

inline const int64_t* targets_of(const Tensor& targets, int64_t M, const char* op) {
  require(targets.scalar_type() == ScalarType::Long && targets.numel() == M && targets.is_contiguous(), op,
          "targets must be int64, one for each row");
  return static_cast<const int64_t*>(targets.data_ptr());
}

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
