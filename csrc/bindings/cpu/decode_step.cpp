// A step of generation with a cache, on CPU tensors: a whole GPT on one token. Its schema is in fastgpt/decode.py.
//
// What moves: every weight once, and the keys and values of the tokens so far. The kernels are those of the ops; called
// op by op, from Python, they would wait for it as long as for memory.

#include <cmath>
#include <cstring>
#include <utility>

#include "../gelu.h"
#include "tensor.h"

namespace fastgpt {
namespace {

constexpr const char* kOp = "decode_step";
constexpr Drop kNothingDropped = {0, 0, 1.0f};

// The weights of a model in its order, each fp32 and contiguous.
class Weights {
 public:
  Weights(const std::vector<Tensor>& list, bool with_biases) : list_(list), with_biases_(with_biases) {}

  const float* matrix(int64_t M, int64_t N) {
    const Tensor& x = next();
    require(x.dim() == 2 && x.size(0) == M && x.size(1) == N, kOp, "a matrix has the wrong shape");
    return floats(x);
  }

  const float* vector(int64_t N) {
    const Tensor& x = next();
    require(x.dim() == 1 && x.size(0) == N, kOp, "a vector has the wrong length");
    return floats(x);
  }

  // (N,), or null.
  const float* bias(int64_t N) { return with_biases_ ? vector(N) : nullptr; }

 private:
  const Tensor& next() {
    require(at_ < list_.size(), kOp, "there are not enough weights");
    return list_[at_++];
  }

  const std::vector<Tensor>& list_;
  const bool with_biases_;
  size_t at_ = 0;
};

Tensor decode_step(const Tensor& idx, std::vector<Tensor> weights, std::vector<Tensor> caches, int64_t position,
                   bool with_biases, std::string approximate, double eps) {
  const Kernels& kernel = kernels();
  require(idx.numel() == 1 && idx.scalar_type() == ScalarType::Long, kOp, "idx must be one int64");
  require(weights.size() > 2 && weights[0].dim() == 2 && weights[1].dim() == 2, kOp, "there are not enough weights");
  const int64_t token = *static_cast<const int64_t*>(idx.data_ptr());
  const int64_t V = weights[0].size(0), C = weights[0].size(1), positions = weights[1].size(0);
  require(token >= 0 && token < V && position >= 0 && position < positions, kOp, "there is no such token or position");

  Tensor scratch = fresh(weights[0], {15 * C}, ScalarType::Float);
  float* left = floats(scratch);
  auto take = [&left](int64_t n) { return std::exchange(left, left + n); };
  float *x = take(C), *y = take(C);                   // what a sublayer gives, and what it is given
  float *stream = take(C), *next_stream = take(C);    // the residual stream, without x and with it
  float *wide = take(4 * C), *wider = take(4 * C);    // q, k and v; the MLP's hidden row before GELU and after it
  float *norm_scratch = take(2 * C), *lse = take(C);  // which kernels write and nothing here reads
  float mean, rstd;

  Weights weight(weights, with_biases);
  auto linear = [&](const float* in, int64_t K, float* out, int64_t N, bool with_bias) {
    const float* matrix = weight.matrix(N, K);
    kernel.linear_row(pool(), {matrix, in, with_bias ? weight.bias(N) : nullptr, out, N, K, K});
  };
  auto add_norm = [&] {  // y = norm(x + stream)
    const float* scale = weight.vector(C);
    kernel.add_layer_norm_fwd(pool(), {{x, C},
                                       {stream, C},
                                       scale,
                                       weight.bias(C),
                                       y,
                                       next_stream,
                                       &mean,
                                       &rstd,
                                       norm_scratch,
                                       1,
                                       C,
                                       static_cast<float>(eps),
                                       kNothingDropped,
                                       Dtype::fp32,
                                       Dtype::fp32,
                                       Dtype::fp32});
    std::swap(stream, next_stream);
  };

  const float* token_row = weight.matrix(V, C) + token * C;
  const float* position_row = weight.matrix(positions, C) + position * C;
  for (int64_t i = 0; i < C; ++i) x[i] = token_row[i] + position_row[i];
  std::memset(stream, 0, C * sizeof(float));
  for (const Tensor& cache : caches) {
    require(cache.dim() == 5 && cache.size(0) == 1 && position < cache.size(1) && cache.size(2) == 2 &&
                cache.size(3) * cache.size(4) == C,
            kOp, "a cache must be (1, capacity, 2, H, D)");
    const int64_t H = cache.size(3), D = cache.size(4);
    float *k = floats(cache), *v = k + C;
    add_norm();
    linear(y, C, wide, 3 * C, true);
    std::memcpy(k + position * 2 * C, wide + C, 2 * C * sizeof(float));
    kernel.attention_fwd(pool(), {{1, H, 1, position + 1, D},
                                  {wide, 0, D, 0},
                                  {k, 0, D, 2 * C},
                                  {v, 0, D, 2 * C},
                                  {y, 0, D, 0},
                                  lse,
                                  nullptr,
                                  kNothingDropped,
                                  1 / std::sqrt(static_cast<float>(D)),
                                  false,
                                  Dtype::fp32});
    linear(y, C, x, C, true);
    add_norm();
    linear(y, C, wide, 4 * C, false);  // GELU adds the bias
    kernel.gelu_fwd(
        pool(),
        {{wide, 4 * C}, weight.bias(4 * C), wider, 1, 4 * C, Dtype::fp32, Dtype::fp32, is_tanh(approximate, kOp)});
    linear(wider, 4 * C, x, C, true);
  }
  add_norm();
  Tensor logits = fresh(weights[0], {1, 1, V}, ScalarType::Float);
  linear(y, C, floats(logits), V, false);
  return logits;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt_cpp, CPU, m) { m.impl("decode_step", TORCH_BOX(&fastgpt::decode_step)); }
