// dropout on CUDA tensors.

#include "tensor.h"

namespace fastgpt {
namespace {

Tensor dropout(const Tensor& x, double p, const Tensor& seed) {
  const char* op = "dropout";
  const Device device(x);
  const Tensor in = dense(x);
  Tensor y = fresh_like(x, x.scalar_type());
  cuda::dropout({in.data_ptr(), y.data_ptr(), x.numel(), drop_of(p, seed, op), dtype_of(x, op)}, device.stream());
  return y;
}

}  // namespace
}  // namespace fastgpt

FASTGPT_CUDA_IMPL(m) {
  m.impl("dropout_fwd", TORCH_BOX(&fastgpt::dropout));
  m.impl("dropout_bwd", TORCH_BOX(&fastgpt::dropout));
}
