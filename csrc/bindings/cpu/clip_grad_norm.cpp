// clip_grad_norm_ on CPU tensors.

#include "../tensor_list.h"
#include "tensor.h"

namespace fastgpt {
namespace {

Tensor clip_grad_norm(std::vector<Tensor> grads, double max_norm) {
  const char* op = "clip_grad_norm_";
  std::vector<Extent> extents;
  extents.reserve(grads.size());
  add_extents(extents, grads, true, op);
  require_disjoint(extents, op);
  TensorList grad(grads, op);
  std::vector<ClipItem> items;
  items.reserve(grads.size());
  int64_t blocks = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    items.push_back({grad[i], grads[i].numel(), blocks});
    blocks += list_blocks(grads[i].numel());
  }
  require(!grads.empty(), op, "there must be a tensor");
  Tensor norm = fresh(grads[0], {}, ScalarType::Float), partial = fresh(grads[0], {blocks}, ScalarType::Float);
  kernels().clip_grad_norm(pool(), {items.data(), static_cast<int64_t>(items.size()), blocks, floats(partial),
                                    floats(norm), static_cast<float>(max_norm)});
  grad.write_back();
  return norm;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt_cpp, CPU, m) { m.impl("clip_grad_norm_", TORCH_BOX(&fastgpt::clip_grad_norm)); }
