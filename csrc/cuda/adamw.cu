// One AdamW step over all parameters (Loshchilov and Hutter, 2019, algorithm 2).
//
// What moves: parameter, gradient and the two means are read, parameter and means written: 28 bytes an element in fp32,
// and that is where the time goes. Step and learning rate are read from the device, so that a captured CUDA graph goes
// on with new ones.

#include <array>

#include "tensor_list.cuh"

namespace fastgpt::cuda {
namespace {

// What is the same for all tensors.
struct AdamwNumbers {
  const float* step;
  const float* lr;
  float beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps, weight_decay;
};

// 1 - beta^step without the digits that this difference loses near beta = 1. What log_beta lost to rounding, relative
// to it, is lost relative to the result, or less.
FASTGPT_PRIM float correction(float log_beta, float step) { return -expm1f(step * log_beta); }

// Four blocks on a multiprocessor: 64 KB of loads on their way.
__global__ void __launch_bounds__(kListThreads, 4)
    adamw_kernel(const __grid_constant__ Chunk<4> chunk, const __grid_constant__ AdamwNumbers a) {
  const float step = ldg(a.step), lr = ldg(a.lr);
  const float kept = 1.0f - lr * a.weight_decay;
  const float step_size = lr / correction(a.log_beta1, step);
  const float root_factor = 1.0f / sqrtf(correction(a.log_beta2, step));
  with_list_block(
      chunk, static_cast<int32_t>(blockIdx.x), [&](const Together<4>& item, int64_t first, int64_t last, bool whole) {
        const ListedTensor tensors[4] = {item.tensor(0), item.tensor(1), item.tensor(2), item.tensor(3)};
        for (int64_t at = first + threadIdx.x * kQuad; at < last; at += kListThreads * kQuad) {
          Quad quads[4];
          float param[kQuad], grad[kQuad], exp_avg[kQuad], exp_avg_sq[kQuad];
#pragma unroll
          for (int i = 0; i < 4; ++i) quads[i].load(tensors[i], at, last - at, whole);
          quads[0].get(param, tensors[0].dtype);
          quads[1].get(grad, tensors[1].dtype);
          quads[2].get(exp_avg, tensors[2].dtype);
          quads[3].get(exp_avg_sq, tensors[3].dtype);
#pragma unroll
          for (int j = 0; j < kQuad; ++j) {
            const float g = grad[j];
            exp_avg[j] = exp_avg[j] * a.beta1 + g * a.rest1;
            exp_avg_sq[j] = exp_avg_sq[j] * a.beta2 + g * g * a.rest2;
            param[j] = param[j] * kept - exp_avg[j] * step_size / (sqrtf(exp_avg_sq[j]) * root_factor + a.eps);
          }
          Quad::store(tensors[0], at, last - at, whole, param);
          Quad::store(tensors[2], at, last - at, whole, exp_avg);
          Quad::store(tensors[3], at, last - at, whole, exp_avg_sq);
        }
      });
}

}  // namespace

void adamw(const Adamw& a, cudaStream_t stream) {
  static_assert(sizeof(Chunk<4>) + sizeof(AdamwNumbers) <= kMaxArguments);
  const AdamwNumbers numbers{a.step,  a.lr,        a.beta1,     a.beta2, a.rest1,
                             a.rest2, a.log_beta1, a.log_beta2, a.eps,   a.weight_decay};
  const auto tensors = [](const AdamwItem& item) {
    return std::array<ListedTensor, 4>{item.param, item.grad, item.exp_avg, item.exp_avg_sq};
  };
  for_each_chunk<4>(a.items, a.count, tensors, [&](const Chunk<4>& chunk) {
    launch<adamw_kernel>(grid_of(chunk.blocks), dim3(kListThreads), 0, stream, chunk, numbers);
  });
}

}  // namespace fastgpt::cuda
