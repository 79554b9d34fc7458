// layer_norm on CPU tensors.

#include "tensor.h"

namespace fastgpt {
namespace {

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const Tensor& weight,
                                                  const std::optional<Tensor>& bias, double eps) {
  const Matrix rows(x);
  const Tensor w = dense(weight);
  const std::optional<Tensor> b = bias ? std::optional<Tensor>(dense(*bias)) : std::nullopt;
  require(w.numel() == rows.N && (!b || b->numel() == rows.N), "layer_norm_fwd",
          "weight and bias must have N elements");
  require(!b || b->scalar_type() == w.scalar_type(), "layer_norm_fwd", "bias must have weight's dtype");
  Tensor y = fresh_like(x, x.scalar_type());
  Tensor mean = fresh(x, {rows.M}, ScalarType::Float), rstd = fresh(x, {rows.M}, ScalarType::Float);
  kernels().layer_norm_fwd(pool(), {rows.rows, w.data_ptr(), b ? b->data_ptr() : nullptr, y.data_ptr(), floats(mean),
                                    floats(rstd), rows.M, rows.N, static_cast<float>(eps),
                                    dtype_of(x, "layer_norm_fwd"), parameter_dtype(w, x, "layer_norm_fwd")});
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                  const Tensor& mean, const Tensor& rstd) {
  const Matrix rows(x), drows(dy);
  const Tensor w = dense(weight);
  require(drows.M == rows.M && drows.N == rows.N && dy.scalar_type() == x.scalar_type(), "layer_norm_bwd",
          "dy must have x's shape and dtype");
  require(w.numel() == rows.N && mean.numel() == rows.M && rstd.numel() == rows.M, "layer_norm_bwd",
          "weight must have N elements, mean and rstd one for each row");
  Tensor dx = fresh_like(x, x.scalar_type());
  Tensor dweight = fresh(x, {rows.N}, w.scalar_type()), dbias = fresh(x, {rows.N}, w.scalar_type());
  Tensor partial = fresh(x, {row_blocks(rows.M), 2, rows.N}, ScalarType::Float);
  kernels().layer_norm_bwd(pool(), {drows.rows, rows.rows, w.data_ptr(), floats(mean), floats(rstd), dx.data_ptr(),
                                    dweight.data_ptr(), dbias.data_ptr(), floats(partial), rows.M, rows.N,
                                    dtype_of(x, "layer_norm_bwd"), parameter_dtype(w, x, "layer_norm_bwd")});
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt_cpp, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&fastgpt::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&fastgpt::layer_norm_bwd));
}
