// One AdamW step over all parameters (Loshchilov and Hutter, 2019, algorithm 2).
//
// What moves: parameter, gradient and the two means are read, parameter and means written: 28 bytes an element in fp32,
// which is what the time goes to. The arithmetic is written once, for fp32; other dtypes go through buffers that stay
// in the L1 cache, so that any mixture of dtypes moves no more than its own bytes.

#include "tensor_list.h"

namespace fastgpt::FASTGPT_ISA {

void adamw(const Pool& pool, const Adamw& a) {
  // Small, and not a power of two apart: tensors of one size often lie at the same place in their pages, and pieces of
  // all of them beside their buffers would fall into the same few sets of the cache.
  constexpr int64_t kBuffer = 256;
  for_each_block(pool, a.items, a.count, a.blocks, [&](const AdamwItem& item, int64_t start, int64_t size, int64_t) {
    float buffers[4][kBuffer + 16];
    for (int64_t end = start + size; start < end; start += kBuffer) {
      const int64_t n = min(kBuffer, end - start);
      float* param = opened(item.param, start, n, buffers[0]);
      const float* grad = opened(item.grad, start, n, buffers[1]);
      float* exp_avg = opened(item.exp_avg, start, n, buffers[2]);
      float* exp_avg_sq = opened(item.exp_avg_sq, start, n, buffers[3]);
      for_each_vec(n, [&](int64_t i, int lanes) {
        const Vec g = load_n(grad + i, lanes);
        const Vec first = load_n(exp_avg + i, lanes) * a.beta1 + g * a.rest1;
        const Vec second = load_n(exp_avg_sq + i, lanes) * a.beta2 + g * g * a.rest2;
        const Vec update = first * a.step_size / (vsqrt(second) * a.root_factor + a.eps);
        store_n(param + i, load_n(param + i, lanes) * a.kept - update, lanes);
        store_n(exp_avg + i, first, lanes);
        store_n(exp_avg_sq + i, second, lanes);
      });
      close(item.param, start, n, param);
      close(item.exp_avg, start, n, exp_avg);
      close(item.exp_avg_sq, start, n, exp_avg_sq);
    }
  });
}

}  // namespace fastgpt::FASTGPT_ISA
