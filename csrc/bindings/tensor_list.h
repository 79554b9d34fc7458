// Lists of tensors for the kernels that take all parameters in one pass.

#pragma once

#include <algorithm>

#include "tensor.h"

namespace fastgpt {

// Tensors as the kernels take them: contiguous. A copy stands in for one that is not, and write_back() takes it home.
class TensorList {
 public:
  TensorList(const std::vector<Tensor>& tensors, const char* op) : given_(tensors) {
    used_.reserve(tensors.size());
    listed_.reserve(tensors.size());
    for (const Tensor& x : tensors) {
      used_.push_back(dense(x));
      listed_.push_back({used_.back().data_ptr(), dtype_of(x, op)});
    }
  }

  ListedTensor operator[](size_t i) const { return listed_[i]; }

  void write_back() {
    for (size_t i = 0; i < used_.size(); ++i) {
      if (used_[i].get() != given_[i].get()) torch::stable::copy_(given_[i], used_[i]);
    }
  }

 private:
  std::vector<Tensor> given_, used_;
  std::vector<ListedTensor> listed_;
};

// Where a tensor lies. Strided tensors may lie between each other's elements, so of two of them that cover the same
// memory only those that start alike are known to share it.
struct Extent {
  uintptr_t begin, end;
  bool changed, contiguous;
};

// Adds the extents of tensors that an op changes, or only reads; one that is changed must not overlap itself.
inline void add_extents(std::vector<Extent>& extents, const std::vector<Tensor>& tensors, bool changed,
                        const char* op) {
  for (const Tensor& x : tensors) {
    if (x.numel() == 0) continue;
    const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
    const bool contiguous = x.is_contiguous();
    int64_t last = x.numel() - 1;
    if (!contiguous) {
      // Each dimension must step over all that lies in the smaller steps.
      std::vector<std::pair<int64_t, int64_t>> steps;
      for (int64_t i = 0; i < x.dim(); ++i) {
        if (x.size(i) > 1) steps.push_back({x.stride(i), x.size(i)});
      }
      std::sort(steps.begin(), steps.end());
      last = 0;
      for (auto [stride, size] : steps) {
        if (changed && stride <= last) {
          throw std::runtime_error(std::string(op) + ": a tensor that it changes must not overlap itself in memory");
        }
        last += stride * (size - 1);
      }
    }
    extents.push_back({begin, begin + (last + 1) * x.element_size(), changed, contiguous});
  }
}

// Refuses tensors that share memory of which one is changed.
inline void require_disjoint(std::vector<Extent>& extents, const char* op) {
  auto before = [](const Extent& a, const Extent& b) { return a.begin < b.begin; };
  if (!std::is_sorted(extents.begin(), extents.end(), before)) std::sort(extents.begin(), extents.end(), before);
  Extent widest[2] = {};  // of those that are contiguous, only read and changed: the one that reaches furthest
  for (size_t i = 0; i < extents.size(); ++i) {
    const Extent& x = extents[i];
    bool shared = i > 0 && x.begin == extents[i - 1].begin && (x.changed || extents[i - 1].changed);
    if (x.contiguous) {
      shared = shared || widest[1].end > x.begin || (x.changed && widest[0].end > x.begin);
      if (x.end > widest[x.changed].end) widest[x.changed] = x;
    }
    if (shared) throw std::runtime_error(std::string(op) + ": tensors that it changes must not overlap in memory");
  }
}

}  // namespace fastgpt
