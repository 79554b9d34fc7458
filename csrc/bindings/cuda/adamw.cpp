// adamw_ on CUDA tensors.

#include "../adamw.h"

#include <cmath>

#include "tensor.h"

namespace fastgpt {
namespace {

void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
           std::vector<Tensor> exp_avg_sqs, const Tensor& step, const Tensor& lr, std::vector<double> betas, double eps,
           double weight_decay) {
  const char* op = "adamw_";
  const Device device(step);
  require(betas.size() == 2, op, "betas must be two numbers");
  AdamwLists lists(params, grads, exp_avgs, exp_avg_sqs, op);
  cuda::adamw({lists.items(), lists.count(), fp32_pointer(step, op), fp32_pointer(lr, op), static_cast<float>(betas[0]),
               static_cast<float>(betas[1]), static_cast<float>(1 - betas[0]), static_cast<float>(1 - betas[1]),
               static_cast<float>(std::log(betas[0])), static_cast<float>(std::log(betas[1])), static_cast<float>(eps),
               static_cast<float>(weight_decay)},
              device.stream());
  lists.write_back();
}

}  // namespace
}  // namespace fastgpt

FASTGPT_CUDA_IMPL(m) { m.impl("adamw_", TORCH_BOX(&fastgpt::adamw)); }
