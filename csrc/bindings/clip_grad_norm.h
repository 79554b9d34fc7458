// What the CPU's and the GPU's clip_grad_norm_ do around their kernels.

#pragma once

#include "tensor_list.h"

namespace fastgpt {

// The list, checked, as kernels take it.
class ClipList {
 public:
  ClipList(const std::vector<Tensor>& grads, const char* op) : grad_(grads, op) {
    require(!grads.empty(), op, "there must be a tensor");
    std::vector<Extent> extents;
    extents.reserve(grads.size());
    add_extents(extents, grads, true, op);
    require_disjoint(extents, op);
    items_.reserve(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      items_.push_back({grad_[i], grads[i].numel(), blocks_});
      blocks_ += list_blocks(grads[i].numel());
    }
  }

  const ClipItem* items() const { return items_.data(); }
  int64_t count() const { return static_cast<int64_t>(items_.size()); }
  int64_t blocks() const { return blocks_; }

  void write_back() { grad_.write_back(); }

 private:
  TensorList grad_;
  std::vector<ClipItem> items_;
  int64_t blocks_ = 0;
};

}  // namespace fastgpt
