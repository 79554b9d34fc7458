// adamw_ on CPU tensors.

#include "../adamw.h"

#include <cmath>

#include "tensor.h"

namespace fastgpt {
namespace {

// 1 - beta^step without the digits that this difference loses near beta = 1.
double correction(double beta, double step) { return -std::expm1(step * std::log(beta)); }

void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
           std::vector<Tensor> exp_avg_sqs, const Tensor& step, const Tensor& lr, std::vector<double> betas, double eps,
           double weight_decay) {
  const char* op = "adamw_";
  require(betas.size() == 2, op, "betas must be two numbers");
  AdamwLists lists(params, grads, exp_avgs, exp_avg_sqs, op);
  const double rate = fp32_value(lr, op), at = fp32_value(step, op);
  kernels().adamw(pool(), {lists.items(), lists.count(), lists.blocks(), static_cast<float>(1 - rate * weight_decay),
                           static_cast<float>(rate / correction(betas[0], at)),
                           static_cast<float>(1 / std::sqrt(correction(betas[1], at))), static_cast<float>(betas[0]),
                           static_cast<float>(betas[1]), static_cast<float>(1 - betas[0]),
                           static_cast<float>(1 - betas[1]), static_cast<float>(eps)});
  lists.write_back();
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt_cpp, CPU, m) { m.impl("adamw_", TORCH_BOX(&fastgpt::adamw)); }
