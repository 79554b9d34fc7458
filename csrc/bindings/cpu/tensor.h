// torch's CPU tensors and threads for the kernels of csrc/cpu.

#pragma once

#include "../../cpu/kernels.h"
#include "../tensor.h"

namespace fastgpt {

// What `p` and `seed` mean; without a seed nothing is dropped.
inline Drop drop_of(double p, const std::optional<Tensor>& seed, const char* op) {
  if (!seed) return {0, 0, 1.0f};
  require(p >= 0 && p < 1, op, "the dropout probability must be in [0, 1)");
  require(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, op, "seed must be one int64");
  return {*static_cast<const uint64_t*>(seed->data_ptr()), static_cast<uint32_t>(p * 4294967296.0),
          static_cast<float>(1 / (1 - p))};
}

inline float fp32_value(const Tensor& x, const char* op) {
  require(x.scalar_type() == ScalarType::Float && x.numel() == 1, op, "scalars must be float32");
  return *floats(x);
}

// torch's own threads.
inline const Pool& pool() {
  static const Pool threads = {[](int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    if (torch_parallel_for(0, n, grain, body, context) != AOTI_TORCH_SUCCESS) {
      throw std::runtime_error("fastgpt_cpp: a kernel ran out of memory");
    }
  }};
  return threads;
}

}  // namespace fastgpt
