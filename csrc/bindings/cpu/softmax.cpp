// softmax on CPU tensors.

#include "../softmax.h"

#include "tensor.h"

namespace fastgpt {
namespace {

Tensor softmax_fwd(const Tensor& x, double scale, bool is_causal) {
  const Matrix rows(x);
  Tensor y = fresh_like(x, x.scalar_type());
  kernels().softmax_fwd(pool(), {rows.rows, y.data_ptr(), rows.M, rows.N, causal_rows(x, is_causal, "softmax_fwd"),
                                 static_cast<float>(scale), dtype_of(x, "softmax_fwd")});
  return y;
}

Tensor softmax_bwd(const Tensor& dy, const Tensor& y, double scale, bool is_causal) {
  const Matrix rows(y), drows(dy);
  require(drows.M == rows.M && drows.N == rows.N && dy.scalar_type() == y.scalar_type(), "softmax_bwd",
          "dy must have y's shape and dtype");
  Tensor dx = fresh_like(y, y.scalar_type());
  kernels().softmax_bwd(pool(),
                        {drows.rows, rows.rows, dx.data_ptr(), rows.M, rows.N, causal_rows(y, is_causal, "softmax_bwd"),
                         static_cast<float>(scale), dtype_of(y, "softmax_bwd")});
  return dx;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt_cpp, CPU, m) {
  m.impl("softmax_fwd", TORCH_BOX(&fastgpt::softmax_fwd));
  m.impl("softmax_bwd", TORCH_BOX(&fastgpt::softmax_bwd));
}
