// linear_cross_entropy on CPU tensors.

#include "../linear_cross_entropy.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "cross_entropy.h"

namespace fastgpt {
namespace {

struct Cpu {
  // 1334 rows of GPT-2's vocabulary in bf16. Chunks that fit a cache lose: each one reads and writes dweight, which is
  // as large as the weight, and that has to be little beside the products. A vocabulary of characters is one chunk
  // anyway.
  static constexpr int64_t kBytesAtOnce = int64_t{1} << 27;
  static constexpr auto mm_out = aoti_torch_cpu_mm_out;
  static constexpr auto addmm_out = aoti_torch_cpu_addmm_out;
  static constexpr auto mul_Scalar = aoti_torch_cpu_mul_Scalar;

  void cross_entropy(const Rows& logits, const int64_t* targets, void* dlogits, float* losses, float* stats, int64_t M,
                     int64_t V, int64_t ignore_index, Dtype dtype) const {
    kernels().cross_entropy_fwd(pool(), {logits, targets, dlogits, losses, stats, M, V, ignore_index, 1.0f, dtype});
  }
  void add_scaled(const AddScaled& a) const { kernels().add_scaled(pool(), a); }

  std::pair<Tensor, Tensor> mean(const Tensor& losses, const int64_t* targets, int64_t ignore_index) const {
    const int64_t M = losses.numel();
    const float inverse_count = inverse_count_of(targets, M, ignore_index);
    return {scalar(losses, mean_loss(floats(losses), M, inverse_count)), scalar(losses, inverse_count)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> on_cpu(const Tensor& x, const Tensor& weight, const Tensor& targets,
                                                  int64_t ignore_index, bool with_gradient) {
  return linear_cross_entropy_fwd(Cpu(), x, weight, targets, ignore_index, with_gradient);
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt_cpp, CPU, m) { m.impl("linear_cross_entropy_fwd", TORCH_BOX(&fastgpt::on_cpu)); }
