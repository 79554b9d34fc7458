// cross_entropy on CUDA tensors. The count of targets and the mean stay on the device.

#include "../cross_entropy.h"

#include "tensor.h"

namespace fastgpt {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& targets,
                                                             int64_t ignore_index, bool with_gradient) {
  const char* op = "cross_entropy_fwd";
  require(logits.dim() == 2, op, "logits must have two dimensions");
  const Device device(logits);
  const Matrix rows(logits);
  const Tensor t = dense(targets);
  const int64_t* classes = targets_of(t, rows.M, op);
  Tensor losses = fresh(logits, {rows.M}, ScalarType::Float), stats = fresh(logits, {2, rows.M}, ScalarType::Float);
  Tensor loss = fresh(logits, {}, ScalarType::Float), inverse_count = fresh(logits, {}, ScalarType::Float);
  Tensor dlogits = fresh(logits, {with_gradient ? rows.M : 0, rows.N}, logits.scalar_type());
  cuda::inverse_count(classes, rows.M, ignore_index, floats(inverse_count), device.stream());
  cuda::cross_entropy_fwd({rows.rows, classes, with_gradient ? dlogits.data_ptr() : nullptr, floats(losses),
                           floats(stats), rows.M, rows.N, ignore_index, floats(inverse_count), dtype_of(logits, op)},
                          device.stream());
  cuda::mean_loss(floats(losses), rows.M, floats(inverse_count), floats(loss), device.stream());
  return {loss, stats, inverse_count, dlogits};
}

Tensor cross_entropy_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& targets, int64_t ignore_index,
                         const Tensor& stats, const Tensor& inverse_count) {
  const char* op = "cross_entropy_bwd";
  require(logits.dim() == 2, op, "logits must have two dimensions");
  const Device device(logits);
  const Matrix rows(logits);
  const Tensor t = dense(targets);
  require(stats.numel() == 2 * rows.M, op, "stats must be the forward's");
  Tensor dlogits = fresh_like(logits, logits.scalar_type());
  cuda::cross_entropy_bwd(
      {rows.rows, targets_of(t, rows.M, op), dlogits.data_ptr(), floats(stats), rows.M, rows.N, ignore_index,
       fp32_pointer(dloss, op), fp32_pointer(inverse_count, op), dtype_of(logits, op)},
      device.stream());
  return dlogits;
}

void scale_gradient_(const Tensor& gradient, const Tensor& dloss) {
  const char* op = "scale_gradient_";
  require(gradient.is_contiguous(), op, "gradient must be contiguous");
  const Device device(gradient);
  cuda::scale_gradient({gradient.data_ptr(), gradient.numel(), fp32_pointer(dloss, op), dtype_of(gradient, op)},
                       device.stream());
}

}  // namespace
}  // namespace fastgpt

FASTGPT_CUDA_IMPL(m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&fastgpt::cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&fastgpt::cross_entropy_bwd));
  m.impl("scale_gradient_", TORCH_BOX(&fastgpt::scale_gradient_));
}
