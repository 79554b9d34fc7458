// Loops over the blocks that a list of tensors is cut into.

#pragma once

#include "parallel.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// f(item, start, n, block) for each block: elements [start, start + n) of that item's tensors. Four blocks are worth
// another thread.
template <class Item, class F>
inline void for_each_block(const Pool& pool, const Item* items, int64_t count, int64_t blocks, const F& f) {
  parallel_for(pool, blocks, 4, [&](int64_t begin, int64_t end) {
    int64_t at = 0;  // the last item that starts at or before `begin`; those without elements start where the next does
    for (int64_t step = count; step > 0;) {
      if (at + step < count && items[at + step].first_block <= begin) {
        at += step;
      } else {
        step /= 2;
      }
    }
    for (int64_t block = begin; block < end; ++block) {
      while (at + 1 < count && items[at + 1].first_block <= block) ++at;
      const int64_t start = (block - items[at].first_block) * kListBlock;
      f(items[at], start, min(kListBlock, items[at].numel - start), block);
    }
  });
}

// n elements of a tensor from `start` on: where they lie if they are fp32, else widened into `buffer`.
inline float* opened(const ListedTensor& x, int64_t start, int64_t n, float* buffer) {
  if (x.dtype == Dtype::fp32) return static_cast<float*>(x.data) + start;
  with_dtype(x.dtype, [&](auto t) {
    const auto* p = static_cast<const decltype(t)*>(x.data) + start;
    for_each_vec(n, [&](int64_t i, int lanes) { store_n(buffer + i, load_n(p + i, lanes), lanes); });
  });
  return buffer;
}

// Rounds what opened() gave back to where it came from.
inline void close(const ListedTensor& x, int64_t start, int64_t n, const float* buffer) {
  if (x.dtype == Dtype::fp32) return;
  with_dtype(x.dtype, [&](auto t) {
    auto* p = static_cast<decltype(t)*>(x.data) + start;
    for_each_vec(n, [&](int64_t i, int lanes) { store_n(p + i, load_n(buffer + i, lanes), lanes); });
  });
}

}  // namespace
}  // namespace fastgpt::FASTGPT_ISA
