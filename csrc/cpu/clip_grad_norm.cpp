// Scales all gradients down so that their joint 2-norm is at most max_norm (Pascanu et al., 2013).
//
// What moves: every gradient is read once for the norm, and read and written once more only if there is something to
// clip. Blocks leave one sum each, in fp32, and these are added in their order, in fp64: the same on any number of
// threads.

#include "tensor_list.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// By four vectors of sums, each lane of which adds 32 squares (on 16 lanes) before it goes to its total: more chains
// than a fused multiply-add has cycles.
template <class T>
float sum_of_squares(const T* x, int64_t n) {
  constexpr int kChains = 4;
  constexpr int64_t kPart = 32 * kChains * kLanes;
  Vec total{};
  for (int64_t begin = 0; begin < n; begin += kPart) {
    const int64_t size = min(kPart, n - begin);
    const T* p = x + begin;
    Vec sums[kChains] = {};
    int64_t i = 0;
    for (; i + kChains * kLanes <= size; i += kChains * kLanes) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const Vec v = load(p + i + c * kLanes);
        sums[c] += v * v;
      }
    }
    for_each_vec(size - i, [&](int64_t j, int lanes) {
      const Vec v = load_n(p + i + j, lanes);
      sums[0] += v * v;
    });
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  return sum(total);
}

}  // namespace

void clip_grad_norm(const Pool& pool, const ClipGradNorm& a) {
  for_each_block(pool, a.items, a.count, a.blocks, [&](const ClipItem& item, int64_t start, int64_t n, int64_t block) {
    with_dtype(item.grad.dtype, [&](auto t) {
      a.partial[block] = sum_of_squares(static_cast<const decltype(t)*>(item.grad.data) + start, n);
    });
  });
  double total = 0;
  for (int64_t block = 0; block < a.blocks; ++block) total += a.partial[block];
  const float norm = static_cast<float>(__builtin_sqrt(total));
  *a.norm = norm;
  const float coefficient = a.max_norm / (norm + 1e-6f);
  if (coefficient >= 1.0f) return;  // a NaN goes on, and into the gradients
  for_each_block(pool, a.items, a.count, a.blocks, [&](const ClipItem& item, int64_t start, int64_t n, int64_t) {
    with_dtype(item.grad.dtype, [&](auto t) {
      auto* x = static_cast<decltype(t)*>(item.grad.data) + start;
      for_each_vec(n, [&](int64_t i, int lanes) { store_n(x + i, load_n(x + i, lanes) * coefficient, lanes); });
    });
  });
}

}  // namespace fastgpt::FASTGPT_ISA
