// What the bindings of softmax share.

#pragma once

#include "tensor.h"

namespace fastgpt {

// The rows of one causal matrix, or 0 where nothing is masked.
inline int64_t causal_rows(const Tensor& x, bool is_causal, const char* op) {
  require(!is_causal || x.dim() >= 2, op, "a causal matrix must have two dimensions");
  return is_causal ? x.size(x.dim() - 2) : 0;
}

}  // namespace fastgpt
