// One row times a weight, on CPU tensors; its schema is in fastgpt/ops/linear.py.

#include "tensor.h"

namespace fastgpt {
namespace {

Tensor linear_row(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "linear_row";
  require(weight.dim() == 2 && dtype_of(weight, op) == Dtype::fp32, op, "weight must be float32, (N, K)");
  const Matrix rows(weight);
  require(x.dim() > 0 && x.numel() == rows.N && x.size(x.dim() - 1) == rows.N, op, "x must be one row of K elements");
  require(!bias || bias->numel() == rows.M, op, "bias must have N elements");
  const Tensor row = dense(x);
  const std::optional<Tensor> b = bias ? std::optional<Tensor>(dense(*bias)) : std::nullopt;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = rows.M;
  Tensor y = fresh(x, sizes.data(), x.dim(), ScalarType::Float);
  kernels().linear_row(pool(), {static_cast<const float*>(rows.rows.data), floats(row), b ? floats(*b) : nullptr,
                                floats(y), rows.M, rows.N, rows.rows.stride});
  return y;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt_cpp, CPU, m) { m.impl("linear_row", TORCH_BOX(&fastgpt::linear_row)); }
