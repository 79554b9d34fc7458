// clip_grad_norm_ on CUDA tensors.

#include "../clip_grad_norm.h"

#include "tensor.h"

namespace fastgpt {
namespace {

Tensor clip_grad_norm(std::vector<Tensor> grads, double max_norm) {
  const char* op = "clip_grad_norm_";
  require(!grads.empty(), op, "there must be a tensor");
  const Device device(grads[0]);
  ClipList list(grads, op);
  Tensor norm = fresh(grads[0], {}, ScalarType::Float);
  Tensor partial = fresh(grads[0], {cuda::clip_programs(list.blocks())}, ScalarType::Float);
  cuda::clip_grad_norm(
      {list.items(), list.count(), list.blocks(), floats(partial), floats(norm), static_cast<float>(max_norm)},
      device.stream());
  list.write_back();
  return norm;
}

}  // namespace
}  // namespace fastgpt

FASTGPT_CUDA_IMPL(m) { m.impl("clip_grad_norm_", TORCH_BOX(&fastgpt::clip_grad_norm)); }
