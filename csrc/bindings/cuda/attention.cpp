// attention and attention_qkvpacked on CUDA tensors.

#include "../attention.h"

#include "tensor.h"

namespace fastgpt {
namespace {

// What the CUDA kernels ask of sizes beyond what the op does.
AttentionShape checked(const AttentionShape& s, const char* op) {
  require(s.D <= 256, op, "the head size D must be at most 256");
  require(s.Tq < 1 << 30 && s.Tk < 1 << 30, op, "sequences must be shorter than 2^30");
  return s;
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, bool is_causal,
                                         double dropout_p, double scale, const std::optional<Tensor>& seqlens_k,
                                         const std::optional<Tensor>& seed) {
  const char* op = "attention_fwd";
  const Device device(q);
  const AttentionInputs x = attention_inputs(q, k, v, seqlens_k, op);
  Tensor o = dense_like(q), lse = row_statistics(q, x.shape);
  cuda::attention_fwd({checked(x.shape, op), x.q, x.k, x.v, heads(o), floats(lse), x.seqlens_k,
                       drop_of(dropout_p, seed, op), static_cast<float>(scale), is_causal, x.dtype},
                      device.stream());
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout_, const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& o_, const Tensor& lse, bool is_causal, double dropout_p,
                                                 double scale, const std::optional<Tensor>& seqlens_k,
                                                 const std::optional<Tensor>& seed) {
  const char* op = "attention_bwd";
  const Device device(q);
  const AttentionInputs x = attention_inputs(q, k, v, seqlens_k, op);
  const Tensor dout = of_queries(dout_, q, op), o = of_queries(o_, q, op);
  Tensor dq = dense_like(q), dk = dense_like(k), dv = dense_like(v), delta = row_statistics(q, x.shape);
  cuda::attention_bwd({checked(x.shape, op), heads(dout), x.q, x.k, x.v, heads(o), heads(dq), heads(dk), heads(dv),
                       lse_of(lse, x.shape, op), floats(delta), x.seqlens_k, drop_of(dropout_p, seed, op),
                       static_cast<float>(scale), is_causal, x.dtype},
                      device.stream());
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> attention_qkvpacked_fwd(const Tensor& qkv, bool is_causal, double dropout_p, double scale,
                                                   const std::optional<Tensor>& seqlens_k,
                                                   const std::optional<Tensor>& seed) {
  const char* op = "attention_qkvpacked_fwd";
  const Device device(qkv);
  const AttentionInputs x = packed_inputs(qkv, seqlens_k, op);
  Tensor o = packed_output(qkv, x.shape), lse = row_statistics(qkv, x.shape);
  cuda::attention_fwd({checked(x.shape, op), x.q, x.k, x.v, transposed(o), floats(lse), x.seqlens_k,
                       drop_of(dropout_p, seed, op), static_cast<float>(scale), is_causal, x.dtype},
                      device.stream());
  return {o, lse};
}

Tensor attention_qkvpacked_bwd(const Tensor& dout_, const Tensor& qkv, const Tensor& o_, const Tensor& lse,
                               bool is_causal, double dropout_p, double scale, const std::optional<Tensor>& seqlens_k,
                               const std::optional<Tensor>& seed) {
  const char* op = "attention_qkvpacked_bwd";
  const Device device(qkv);
  const AttentionInputs x = packed_inputs(qkv, seqlens_k, op);
  const Tensor dout = of_packed_queries(dout_, qkv, op), o = of_packed_queries(o_, qkv, op);
  Tensor dqkv = fresh_like(qkv, qkv.scalar_type()), delta = row_statistics(qkv, x.shape);
  cuda::attention_bwd({checked(x.shape, op), transposed(dout), x.q, x.k, x.v, transposed(o), part(dqkv, 0),
                       part(dqkv, 1), part(dqkv, 2), lse_of(lse, x.shape, op), floats(delta), x.seqlens_k,
                       drop_of(dropout_p, seed, op), static_cast<float>(scale), is_causal, x.dtype},
                      device.stream());
  return dqkv;
}

}  // namespace
}  // namespace fastgpt

FASTGPT_CUDA_IMPL(m) {
  m.impl("attention_fwd", TORCH_BOX(&fastgpt::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&fastgpt::attention_bwd));
  m.impl("attention_qkvpacked_fwd", TORCH_BOX(&fastgpt::attention_qkvpacked_fwd));
  m.impl("attention_qkvpacked_bwd", TORCH_BOX(&fastgpt::attention_qkvpacked_bwd));
}
