// What the bindings of gelu share.

#pragma once

#include "tensor.h"

namespace fastgpt {

inline bool is_tanh(const std::string& approximate, const char* op) {
  require(approximate == "none" || approximate == "tanh", op, "approximate must be none or tanh");
  return approximate == "tanh";
}

}  // namespace fastgpt
