// torch tensors for kernels: checks and outputs. Only the stable ABI is used, so that one build serves every torch from
// 2.10 on.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../tensors.h"

namespace fastgpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The public ops have checked what users pass; these say which kernel was called wrongly, and keep it inside its
// memory.
inline void require(bool condition, const char* op, const char* what) {
  if (!condition) throw std::runtime_error(std::string("fastgpt::") + op + ": " + what);
}

inline Dtype dtype_of(const Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::fp32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::fp16;
    default:
      throw std::runtime_error(std::string("fastgpt::") + op + ": tensors must be float32, bfloat16 or float16");
  }
}

// A parameter's dtype: that of the tensor it goes with, or fp32.
inline Dtype parameter_dtype(const Tensor& parameter, const Tensor& x, const char* op) {
  const Dtype dtype = dtype_of(parameter, op);
  require(dtype == Dtype::fp32 || dtype == dtype_of(x, op), op, "parameters must have the tensor's dtype or float32");
  return dtype;
}

constexpr int64_t kMaxDims = 64;  // torch's own limit

// A tensor without values, contiguous, on `like`'s device.
inline Tensor fresh(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType dtype) {
  int64_t strides[kMaxDims];
  if (dim > kMaxDims) throw std::runtime_error("fastgpt: tensors must have at most 64 dimensions");
  for (int64_t i = dim - 1, stride = 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &handle));
  return Tensor(handle);
}

inline Tensor fresh(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return fresh(like, sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

// The same of x's shape.
inline Tensor fresh_like(const Tensor& x, ScalarType dtype) { return fresh(x, x.sizes().data(), x.dim(), dtype); }

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// A (..., N) tensor as M rows. Where its rows do not lie evenly in memory, `kept` is a copy in which they do.
struct Matrix {
  Tensor kept;
  int64_t M, N;
  Rows rows;

  explicit Matrix(const Tensor& x) : kept(x), M(1), N(x.size(x.dim() - 1)), rows{nullptr, 0} {
    for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);
    rows.stride = N;
    if (!even(x, &rows.stride)) {
      kept = dense(x);
      rows.stride = N;
    }
    rows.data = kept.data_ptr();
    if (M * N == 0) rows.stride = 0;  // there may be no memory, and nothing may be added to a null pointer
  }

 private:
  static bool even(const Tensor& x, int64_t* stride) {
    const int64_t last = x.dim() - 1;
    if (x.size(last) > 1 && x.stride(last) != 1) return false;
    int64_t rows = 1;
    for (int64_t i = last - 1; i >= 0; --i) {
      if (x.size(i) == 1) continue;
      if (rows == 1) {
        *stride = x.stride(i);
      } else if (x.stride(i) != *stride * rows) {
        return false;
      }
      rows *= x.size(i);
    }
    return true;
  }
};

// Statistics and scratch: fp32, contiguous.
inline float* floats(const Tensor& x) {
  if (x.scalar_type() != ScalarType::Float || !x.is_contiguous()) {
    throw std::runtime_error("fastgpt: statistics must be float32 and contiguous");
  }
  return static_cast<float*>(x.data_ptr());
}

}  // namespace fastgpt
