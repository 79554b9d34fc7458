// dropout on CPU tensors.

#include "tensor.h"

namespace fastgpt {
namespace {

Tensor dropout(const Tensor& x, double p, const Tensor& seed) {
  const Tensor in = dense(x);
  Tensor y = fresh_like(x, x.scalar_type());
  kernels().dropout(pool(),
                    {in.data_ptr(), y.data_ptr(), x.numel(), drop_of(p, seed, "dropout"), dtype_of(x, "dropout")});
  return y;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt_cpp, CPU, m) {
  m.impl("dropout_fwd", TORCH_BOX(&fastgpt::dropout));
  m.impl("dropout_bwd", TORCH_BOX(&fastgpt::dropout));
}
