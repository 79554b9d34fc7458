// add_layer_norm on CPU tensors.

#include "tensor.h"

namespace fastgpt {
namespace {

// The kernels know a stream of x's dtype or of fp32. A residual of another dtype is widened to fp32 before the kernel,
// and its gradient rounded after it, as the kernel would have.
Tensor in_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(const Tensor& x, const Tensor& residual,
                                                              const Tensor& weight, const std::optional<Tensor>& bias,
                                                              double dropout_p, double eps,
                                                              const std::optional<Tensor>& seed) {
  const char* op = "add_layer_norm_fwd";
  const ScalarType stream = x.scalar_type() == residual.scalar_type() ? x.scalar_type() : ScalarType::Float;
  const Matrix rows(x), residual_rows(in_dtype(residual, stream));
  require(residual_rows.M == rows.M && residual_rows.N == rows.N, op, "residual must have x's shape");
  const Tensor w = dense(weight);
  const std::optional<Tensor> b = bias ? std::optional<Tensor>(dense(*bias)) : std::nullopt;
  require(w.numel() == rows.N && (!b || b->numel() == rows.N), op, "weight and bias must have N elements");
  require(!b || b->scalar_type() == w.scalar_type(), op, "bias must have weight's dtype");
  Tensor y = fresh_like(x, x.scalar_type()), residual_out = fresh_like(x, stream);
  Tensor mean = fresh(x, {rows.M}, ScalarType::Float), rstd = fresh(x, {rows.M}, ScalarType::Float);
  Tensor scratch = fresh(x, {stream == ScalarType::Float ? 2 : 2 + row_blocks(rows.M), rows.N}, ScalarType::Float);
  kernels().add_layer_norm_fwd(
      pool(),
      {rows.rows, residual_rows.rows, w.data_ptr(), b ? b->data_ptr() : nullptr, y.data_ptr(), residual_out.data_ptr(),
       floats(mean), floats(rstd), floats(scratch), rows.M, rows.N, static_cast<float>(eps),
       drop_of(dropout_p, seed, op), dtype_of(x, op), dtype_of(residual_out, op), parameter_dtype(w, x, op)});
  return {y, residual_out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(const Tensor& dy,
                                                              const std::optional<Tensor>& dresidual_out,
                                                              const Tensor& residual_out, const Tensor& weight,
                                                              const Tensor& mean, const Tensor& rstd, double dropout_p,
                                                              const std::optional<Tensor>& seed, ScalarType x_dtype,
                                                              ScalarType residual_dtype) {
  const char* op = "add_layer_norm_bwd";
  const ScalarType stream = residual_out.scalar_type();
  const Matrix rows(residual_out), drows(dy), dstream(dresidual_out ? *dresidual_out : residual_out);
  const Tensor w = dense(weight);
  require(drows.M == rows.M && drows.N == rows.N && dstream.M == rows.M && dstream.N == rows.N, op,
          "dy and dresidual_out must have residual_out's shape");
  require(dy.scalar_type() == x_dtype && dstream.kept.scalar_type() == stream, op,
          "dy must have x's dtype, dresidual_out that of residual_out");
  require(stream == (x_dtype == residual_dtype ? x_dtype : ScalarType::Float), op,
          "residual_out must have the promoted dtype of x and residual");
  require(w.numel() == rows.N && mean.numel() == rows.M && rstd.numel() == rows.M, op,
          "weight must have N elements, mean and rstd one for each row");
  const bool same = !seed && x_dtype == residual_dtype;
  Tensor dx = same ? fresh(dy, {0}, x_dtype) : fresh_like(residual_out, x_dtype);
  Tensor dresidual = fresh_like(residual_out, stream);
  Tensor dweight = fresh(dy, {rows.N}, w.scalar_type()), dbias = fresh(dy, {rows.N}, w.scalar_type());
  Tensor partial = fresh(dy, {row_blocks(rows.M), 2, rows.N}, ScalarType::Float);
  Tensor scratch = fresh(dy, {rows.N}, ScalarType::Float);
  kernels().add_layer_norm_bwd(
      pool(), {drows.rows, dresidual_out ? dstream.rows : Rows{nullptr, 0}, rows.rows, w.data_ptr(), floats(mean),
               floats(rstd), same ? nullptr : dx.data_ptr(), dresidual.data_ptr(), dweight.data_ptr(), dbias.data_ptr(),
               floats(partial), floats(scratch), rows.M, rows.N, drop_of(dropout_p, seed, op), dtype_of(dy, op),
               dtype_of(residual_out, op), parameter_dtype(w, dy, op)});
  return {dx, in_dtype(dresidual, residual_dtype), dweight, dbias};
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt_cpp, CPU, m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&fastgpt::add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&fastgpt::add_layer_norm_bwd));
}
