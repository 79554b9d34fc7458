// torch's CUDA tensors and streams for the kernels of csrc/cuda; in the emulator, CPU tensors and no streams.

#pragma once

#include "../../cuda/kernels.h"
#include "../tensor.h"

#ifdef FASTGPT_EMULATE
#define FASTGPT_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastgpt_emulated, CPU, m)
#else
#include <torch/csrc/stable/accelerator.h>

// torch declares it where USE_CUDA is defined, together with what a CPU build of torch has no headers for.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#define FASTGPT_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastgpt_cuda, CUDA, m)
#endif

namespace fastgpt {

// Where x is: its device is the current one for as long as this lives, and kernels go to that device's current stream.
class Device {
 public:
#ifdef FASTGPT_EMULATE
  explicit Device(const Tensor&) {}
#else
  explicit Device(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif
  cudaStream_t stream() const { return stream_; }

 private:
#ifndef FASTGPT_EMULATE
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

// What `p` and `seed` mean; without a seed nothing is dropped. The seed stays on the device.
inline cuda::Drop drop_of(double p, const std::optional<Tensor>& seed, const char* op) {
  if (!seed) return {nullptr, 0, 1.0f};
  require(p >= 0 && p < 1, op, "the dropout probability must be in [0, 1)");
  require(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, op, "seed must be one int64");
  return {static_cast<const int64_t*>(seed->data_ptr()), static_cast<uint32_t>(p * 4294967296.0),
          static_cast<float>(1 / (1 - p))};
}

// An fp32 number that stays on the device.
inline const float* fp32_pointer(const Tensor& x, const char* op) {
  require(x.scalar_type() == ScalarType::Float && x.numel() == 1, op, "scalars must be float32");
  return floats(x);
}

}  // namespace fastgpt
