// clip_grad_norm_ on CPU tensors.

#include "../clip_grad_norm.h"

#include "tensor.h"

namespace fastgpt {
namespace {

Tensor clip_grad_norm(std::vector<Tensor> grads, double max_norm) {
  ClipList list(grads, "clip_grad_norm_");
  Tensor norm = fresh(grads[0], {}, ScalarType::Float), partial = fresh(grads[0], {list.blocks()}, ScalarType::Float);
  kernels().clip_grad_norm(
      pool(), {list.items(), list.count(), list.blocks(), floats(partial), floats(norm), static_cast<float>(max_norm)});
  list.write_back();
  return norm;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt_cpp, CPU, m) { m.impl("clip_grad_norm_", TORCH_BOX(&fastgpt::clip_grad_norm)); }
