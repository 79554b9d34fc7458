// What the CPU's and the GPU's adamw_ do around their kernels.

#pragma once

#include "tensor_list.h"

namespace fastgpt {

// The four lists, checked, as kernels take them.
class AdamwLists {
 public:
  AdamwLists(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs,
             const std::vector<Tensor>& exp_avg_sqs, const char* op)
      : param_(params, op), grad_(grads, op), exp_avg_(exp_avgs, op), exp_avg_sq_(exp_avg_sqs, op) {
    const size_t count = params.size();
    require(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count, op,
            "the lists must have one length");
    std::vector<Extent> extents;
    extents.reserve(4 * count);
    add_extents(extents, params, true, op);
    add_extents(extents, exp_avgs, true, op);
    add_extents(extents, exp_avg_sqs, true, op);
    add_extents(extents, grads, false, op);
    require_disjoint(extents, op);
    items_.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      const int64_t numel = params[i].numel();
      require(grads[i].numel() == numel && exp_avgs[i].numel() == numel && exp_avg_sqs[i].numel() == numel, op,
              "a parameter's gradient and means must have its shape");
      items_.push_back({param_[i], grad_[i], exp_avg_[i], exp_avg_sq_[i], numel, blocks_});
      blocks_ += list_blocks(numel);
    }
  }

  const AdamwItem* items() const { return items_.data(); }
  int64_t count() const { return static_cast<int64_t>(items_.size()); }
  int64_t blocks() const { return blocks_; }

  void write_back() {
    param_.write_back();
    exp_avg_.write_back();
    exp_avg_sq_.write_back();
  }

 private:
  TensorList param_, grad_, exp_avg_, exp_avg_sq_;
  std::vector<AdamwItem> items_;
  int64_t blocks_ = 0;
};

}  // namespace fastgpt
