// gelu on CPU tensors.

#include "../gelu.h"

#include "tensor.h"

namespace fastgpt {
namespace {

Tensor gelu_fwd(const Tensor& x, const std::optional<Tensor>& bias, std::string approximate) {
  const Matrix rows(x);
  const std::optional<Tensor> b = bias ? std::optional<Tensor>(dense(*bias)) : std::nullopt;
  require(!b || b->numel() == rows.N, "gelu_fwd", "bias must have N elements");
  Tensor y = fresh_like(x, x.scalar_type());
  const Dtype dtype = dtype_of(x, "gelu_fwd");
  kernels().gelu_fwd(pool(), {rows.rows, b ? b->data_ptr() : nullptr, y.data_ptr(), rows.M, rows.N, dtype,
                              b ? parameter_dtype(*b, x, "gelu_fwd") : dtype, is_tanh(approximate, "gelu_fwd")});
  return y;
}

std::tuple<Tensor, Tensor> gelu_bwd(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& bias,
                                    std::string approximate) {
  const Matrix rows(x), drows(dy);
  const std::optional<Tensor> b = bias ? std::optional<Tensor>(dense(*bias)) : std::nullopt;
  require(drows.M == rows.M && drows.N == rows.N && dy.scalar_type() == x.scalar_type(), "gelu_bwd",
          "dy must have x's shape and dtype");
  require(!b || b->numel() == rows.N, "gelu_bwd", "bias must have N elements");
  Tensor dx = fresh_like(x, x.scalar_type());
  Tensor dbias = fresh(x, {b ? rows.N : 0}, b ? b->scalar_type() : x.scalar_type());
  Tensor partial = fresh(x, {b ? row_blocks(rows.M) : 0, rows.N}, ScalarType::Float);
  const Dtype dtype = dtype_of(x, "gelu_bwd");
  kernels().gelu_bwd(pool(), {drows.rows, rows.rows, b ? b->data_ptr() : nullptr, dx.data_ptr(), dbias.data_ptr(),
                              floats(partial), rows.M, rows.N, dtype, b ? parameter_dtype(*b, x, "gelu_bwd") : dtype,
                              is_tanh(approximate, "gelu_bwd")});
  return {dx, dbias};
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt_cpp, CPU, m) {
  m.impl("gelu_fwd", TORCH_BOX(&fastgpt::gelu_fwd));
  m.impl("gelu_bwd", TORCH_BOX(&fastgpt::gelu_bwd));
}
