// linear_cross_entropy on CUDA tensors; in the emulator, with torch's products on a CPU.

#include "../linear_cross_entropy.h"

#ifdef FASTGPT_EMULATE
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#define FASTGPT_TORCH(function) aoti_torch_cpu_##function
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#define FASTGPT_TORCH(function) aoti_torch_cuda_##function
#endif

#include "tensor.h"

namespace fastgpt {
namespace {

struct Cuda {
  // 2668 rows of GPT-2's vocabulary in half precision: enough to keep the tensor cores busy, and to make what the sum
  // dweight is read and written little beside the products.
  static constexpr int64_t kBytesAtOnce = int64_t{1} << 28;
  static constexpr auto mm_out = FASTGPT_TORCH(mm_out);
  static constexpr auto addmm_out = FASTGPT_TORCH(addmm_out);
  static constexpr auto mul_Scalar = FASTGPT_TORCH(mul_Scalar);

  cudaStream_t stream;

  void cross_entropy(const Rows& logits, const int64_t* targets, void* dlogits, float* losses, float* stats, int64_t M,
                     int64_t V, int64_t ignore_index, Dtype dtype) const {
    cuda::cross_entropy_fwd({logits, targets, dlogits, losses, stats, M, V, ignore_index, nullptr, dtype}, stream);
  }
  void add_scaled(const cuda::AddScaled& a) const { cuda::add_scaled(a, stream); }

  std::pair<Tensor, Tensor> mean(const Tensor& losses, const int64_t* targets, int64_t ignore_index) const {
    const Tensor loss = fresh(losses, {}, ScalarType::Float), inverse_count = fresh(losses, {}, ScalarType::Float);
    cuda::inverse_count(targets, losses.numel(), ignore_index, floats(inverse_count), stream);
    cuda::mean_loss(floats(losses), losses.numel(), floats(inverse_count), floats(loss), stream);
    return {loss, inverse_count};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> on_cuda(const Tensor& x, const Tensor& weight, const Tensor& targets,
                                                   int64_t ignore_index, bool with_gradient) {
  const Device device(x);
  return linear_cross_entropy_fwd(Cuda{device.stream()}, x, weight, targets, ignore_index, with_gradient);
}

}  // namespace
}  // namespace fastgpt

FASTGPT_CUDA_IMPL(m) { m.impl("linear_cross_entropy_fwd", TORCH_BOX(&fastgpt::on_cuda)); }
