// gelu on CUDA tensors.

#include "../gelu.h"

#include "tensor.h"

namespace fastgpt {
namespace {

Tensor gelu_fwd(const Tensor& x, const std::optional<Tensor>& bias, std::string approximate) {
  const char* op = "gelu_fwd";
  const Device device(x);
  const Matrix rows(x);
  const std::optional<Tensor> b = bias ? std::optional<Tensor>(dense(*bias)) : std::nullopt;
  require(!b || b->numel() == rows.N, op, "bias must have N elements");
  Tensor y = fresh_like(x, x.scalar_type());
  const Dtype dtype = dtype_of(x, op);
  cuda::gelu_fwd({rows.rows, b ? b->data_ptr() : nullptr, y.data_ptr(), rows.M, rows.N, dtype,
                  b ? parameter_dtype(*b, x, op) : dtype, is_tanh(approximate, op)},
                 device.stream());
  return y;
}

std::tuple<Tensor, Tensor> gelu_bwd(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& bias,
                                    std::string approximate) {
  const char* op = "gelu_bwd";
  const Device device(x);
  const Matrix rows(x), drows(dy);
  const std::optional<Tensor> b = bias ? std::optional<Tensor>(dense(*bias)) : std::nullopt;
  require(drows.M == rows.M && drows.N == rows.N && dy.scalar_type() == x.scalar_type(), op,
          "dy must have x's shape and dtype");
  require(!b || b->numel() == rows.N, op, "bias must have N elements");
  Tensor dx = fresh_like(x, x.scalar_type());
  Tensor dbias = fresh(x, {b ? rows.N : 0}, b ? b->scalar_type() : x.scalar_type());
  Tensor partial = fresh(x, {b ? cuda::row_blocks(rows.M) : 0, rows.N}, ScalarType::Float);
  const Dtype dtype = dtype_of(x, op);
  cuda::gelu_bwd({drows.rows, rows.rows, b ? b->data_ptr() : nullptr, dx.data_ptr(), dbias.data_ptr(), floats(partial),
                  rows.M, rows.N, dtype, b ? parameter_dtype(*b, x, op) : dtype, is_tanh(approximate, op)},
                 device.stream());
  return {dx, dbias};
}

}  // namespace
}  // namespace fastgpt

FASTGPT_CUDA_IMPL(m) {
  m.impl("gelu_fwd", TORCH_BOX(&fastgpt::gelu_fwd));
  m.impl("gelu_bwd", TORCH_BOX(&fastgpt::gelu_bwd));
}
