// cross_entropy on CPU tensors.

#include "cross_entropy.h"

namespace fastgpt {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& targets,
                                                             int64_t ignore_index, bool with_gradient) {
  require(logits.dim() == 2, "cross_entropy_fwd", "logits must have two dimensions");
  const Matrix rows(logits);
  const Tensor t = dense(targets);
  const int64_t* classes = targets_of(t, rows.M, "cross_entropy_fwd");
  const float inverse_count = inverse_count_of(classes, rows.M, ignore_index);
  Tensor losses = fresh(logits, {rows.M}, ScalarType::Float), stats = fresh(logits, {2, rows.M}, ScalarType::Float);
  Tensor dlogits = fresh(logits, {with_gradient ? rows.M : 0, rows.N}, logits.scalar_type());
  kernels().cross_entropy_fwd(
      pool(), {rows.rows, classes, with_gradient ? dlogits.data_ptr() : nullptr, floats(losses), floats(stats), rows.M,
               rows.N, ignore_index, inverse_count, dtype_of(logits, "cross_entropy_fwd")});
  return {scalar(logits, mean_loss(floats(losses), rows.M, inverse_count)), stats, scalar(logits, inverse_count),
          dlogits};
}

Tensor cross_entropy_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& targets, int64_t ignore_index,
                         const Tensor& stats, const Tensor& inverse_count) {
  require(logits.dim() == 2, "cross_entropy_bwd", "logits must have two dimensions");
  const Matrix rows(logits);
  const Tensor t = dense(targets);
  require(stats.numel() == 2 * rows.M && stats.is_contiguous(), "cross_entropy_bwd", "stats must be the forward's");
  Tensor dlogits = fresh_like(logits, logits.scalar_type());
  kernels().cross_entropy_bwd(
      pool(), {rows.rows, targets_of(t, rows.M, "cross_entropy_bwd"), dlogits.data_ptr(), floats(stats), rows.M, rows.N,
               ignore_index, fp32_value(dloss, "cross_entropy_bwd") * fp32_value(inverse_count, "cross_entropy_bwd"),
               dtype_of(logits, "cross_entropy_bwd")});
  return dlogits;
}

void scale_gradient_(const Tensor& gradient, const Tensor& dloss) {
  require(gradient.is_contiguous(), "scale_gradient_", "gradient must be contiguous");
  const float factor = fp32_value(dloss, "scale_gradient_");
  if (factor == 1.0f) return;  // as a loss's own gradient usually is: no byte moves
  kernels().scale_gradient(pool(),
                           {gradient.data_ptr(), gradient.numel(), factor, dtype_of(gradient, "scale_gradient_")});
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt_cpp, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&fastgpt::cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&fastgpt::cross_entropy_bwd));
  m.impl("scale_gradient_", TORCH_BOX(&fastgpt::scale_gradient_));
}
