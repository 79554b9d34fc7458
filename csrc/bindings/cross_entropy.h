// What the bindings of cross_entropy and linear_cross_entropy share.

#pragma once

#include "tensor.h"

namespace fastgpt {

inline const int64_t* targets_of(const Tensor& targets, int64_t M, const char* op) {
  require(targets.scalar_type() == ScalarType::Long && targets.numel() == M && targets.is_contiguous(), op,
          "targets must be int64, one for each row");
  return static_cast<const int64_t*>(targets.data_ptr());
}

}  // namespace fastgpt
