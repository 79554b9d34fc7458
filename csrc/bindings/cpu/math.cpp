// The elementary functions that the kernels compute with, as an op for their tests, which define its schema.

#include "tensor.h"

namespace fastgpt {
namespace {

MathFunction function_named(const std::string& name) {
  if (name == "exp") return MathFunction::exp;
  if (name == "log") return MathFunction::log;
  if (name == "tanh") return MathFunction::tanh;
  require(name == "erf", "math", "name must be exp, log, tanh or erf");
  return MathFunction::erf;
}

Tensor math(const Tensor& x, std::string name) {
  require(dtype_of(x, "math") == Dtype::fp32 && x.is_contiguous(), "math", "x must be float32 and contiguous");
  Tensor y = fresh_like(x, ScalarType::Float);
  kernels().math(pool(), {floats(x), floats(y), x.numel(), function_named(name)});
  return y;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt_cpp, CPU, m) { m.impl("math", TORCH_BOX(&fastgpt::math)); }
