// add_layer_norm on CUDA tensors.

#include "../add_layer_norm.h"

#include "tensor.h"

namespace fastgpt {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(const Tensor& x, const Tensor& residual,
                                                              const Tensor& weight, const std::optional<Tensor>& bias,
                                                              double dropout_p, double eps,
                                                              const std::optional<Tensor>& seed) {
  const char* op = "add_layer_norm_fwd";
  const Device device(x);
  const AddLayerNormForward t(x, residual, weight, bias, op);
  cuda::add_layer_norm_fwd(
      {t.x.rows, t.residual.rows, t.weight.data_ptr(), t.bias_data(), t.y.data_ptr(), t.residual_out.data_ptr(),
       floats(t.mean), floats(t.rstd), t.x.M, t.x.N, static_cast<float>(eps), drop_of(dropout_p, seed, op),
       dtype_of(x, op), dtype_of(t.residual_out, op), parameter_dtype(t.weight, x, op)},
      device.stream());
  return {t.y, t.residual_out, t.mean, t.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(const Tensor& dy,
                                                              const std::optional<Tensor>& dresidual_out,
                                                              const Tensor& residual_out, const Tensor& weight,
                                                              const Tensor& mean, const Tensor& rstd, double dropout_p,
                                                              const std::optional<Tensor>& seed, ScalarType x_dtype,
                                                              ScalarType residual_dtype) {
  const char* op = "add_layer_norm_bwd";
  const Device device(dy);
  const AddLayerNormBackward t(dy, dresidual_out, residual_out, weight, mean, rstd, seed.has_value(), x_dtype,
                               residual_dtype, op);
  Tensor partial = fresh(dy, {cuda::row_blocks(t.total.M), 2, t.total.N}, ScalarType::Float);
  cuda::add_layer_norm_bwd(
      {t.dy.rows, t.dstream_rows, t.total.rows, t.weight.data_ptr(), floats(mean), floats(rstd), t.dx_data(),
       t.dresidual.data_ptr(), t.dweight.data_ptr(), t.dbias.data_ptr(), floats(partial), t.total.M, t.total.N,
       drop_of(dropout_p, seed, op), dtype_of(dy, op), dtype_of(residual_out, op), parameter_dtype(t.weight, dy, op)},
      device.stream());
  return {t.dx, in_dtype(t.dresidual, residual_dtype), t.dweight, t.dbias};
}

}  // namespace
}  // namespace fastgpt

FASTGPT_CUDA_IMPL(m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&fastgpt::add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&fastgpt::add_layer_norm_bwd));
}
