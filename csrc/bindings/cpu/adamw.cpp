// adamw_ on CPU tensors.

#include <cmath>

#include "../tensor_list.h"
#include "tensor.h"

namespace fastgpt {
namespace {

// 1 - beta^step without the digits that this difference loses near beta = 1.
double correction(double beta, double step) { return -std::expm1(step * std::log(beta)); }

void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
           std::vector<Tensor> exp_avg_sqs, const Tensor& step, const Tensor& lr, std::vector<double> betas, double eps,
           double weight_decay) {
  const char* op = "adamw_";
  const size_t count = params.size();
  require(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count, op,
          "the lists must have one length");
  require(betas.size() == 2, op, "betas must be two numbers");
  std::vector<Extent> extents;
  extents.reserve(4 * count);
  add_extents(extents, params, true, op);
  add_extents(extents, exp_avgs, true, op);
  add_extents(extents, exp_avg_sqs, true, op);
  add_extents(extents, grads, false, op);
  require_disjoint(extents, op);
  TensorList param(params, op), grad(grads, op), exp_avg(exp_avgs, op), exp_avg_sq(exp_avg_sqs, op);
  std::vector<AdamwItem> items;
  items.reserve(count);
  int64_t blocks = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t numel = params[i].numel();
    require(grads[i].numel() == numel && exp_avgs[i].numel() == numel && exp_avg_sqs[i].numel() == numel, op,
            "a parameter's gradient and means must have its shape");
    items.push_back({param[i], grad[i], exp_avg[i], exp_avg_sq[i], numel, blocks});
    blocks += list_blocks(numel);
  }
  const double rate = fp32_value(lr, op), at = fp32_value(step, op);
  kernels().adamw(
      pool(),
      {items.data(), static_cast<int64_t>(count), blocks, static_cast<float>(1 - rate * weight_decay),
       static_cast<float>(rate / correction(betas[0], at)), static_cast<float>(1 / std::sqrt(correction(betas[1], at))),
       static_cast<float>(betas[0]), static_cast<float>(betas[1]), static_cast<float>(1 - betas[0]),
       static_cast<float>(1 - betas[1]), static_cast<float>(eps)});
  param.write_back();
  exp_avg.write_back();
  exp_avg_sq.write_back();
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt_cpp, CPU, m) { m.impl("adamw_", TORCH_BOX(&fastgpt::adamw)); }
