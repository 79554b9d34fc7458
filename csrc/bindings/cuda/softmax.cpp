// softmax on CUDA tensors.

#include "../softmax.h"

#include "tensor.h"

namespace fastgpt {
namespace {

Tensor softmax_fwd(const Tensor& x, double scale, bool is_causal) {
  const char* op = "softmax_fwd";
  const Device device(x);
  const Matrix rows(x);
  Tensor y = fresh_like(x, x.scalar_type());
  cuda::softmax_fwd({rows.rows, y.data_ptr(), rows.M, rows.N, causal_rows(x, is_causal, op), static_cast<float>(scale),
                     dtype_of(x, op)},
                    device.stream());
  return y;
}

Tensor softmax_bwd(const Tensor& dy, const Tensor& y, double scale, bool is_causal) {
  const char* op = "softmax_bwd";
  const Device device(y);
  const Matrix rows(y), drows(dy);
  require(drows.M == rows.M && drows.N == rows.N && dy.scalar_type() == y.scalar_type(), op,
          "dy must have y's shape and dtype");
  Tensor dx = fresh_like(y, y.scalar_type());
  cuda::softmax_bwd({drows.rows, rows.rows, dx.data_ptr(), rows.M, rows.N, causal_rows(y, is_causal, op),
                     static_cast<float>(scale), dtype_of(y, op)},
                    device.stream());
  return dx;
}

}  // namespace
}  // namespace fastgpt

FASTGPT_CUDA_IMPL(m) {
  m.impl("softmax_fwd", TORCH_BOX(&fastgpt::softmax_fwd));
  m.impl("softmax_bwd", TORCH_BOX(&fastgpt::softmax_bwd));
}
