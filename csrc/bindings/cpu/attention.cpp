// attention and attention_qkvpacked on CPU tensors.

#include "../attention.h"

#include "tensor.h"

namespace fastgpt {
namespace {

Tensor partial_sums(const Tensor& q, const AttentionShape& s) {
  const int64_t splits = attention_splits(s);
  return fresh(q, {splits == 1 ? 0 : s.B * s.H * splits, s.Tq, s.D}, ScalarType::Float);
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, bool is_causal,
                                         double dropout_p, double scale, const std::optional<Tensor>& seqlens_k,
                                         const std::optional<Tensor>& seed) {
  const char* op = "attention_fwd";
  const AttentionInputs x = attention_inputs(q, k, v, seqlens_k, op);
  Tensor o = dense_like(q), lse = row_statistics(q, x.shape);
  kernels().attention_fwd(pool(), {x.shape, x.q, x.k, x.v, heads(o), floats(lse), x.seqlens_k,
                                   drop_of(dropout_p, seed, op), static_cast<float>(scale), is_causal, x.dtype});
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout_, const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& o_, const Tensor& lse, bool is_causal, double dropout_p,
                                                 double scale, const std::optional<Tensor>& seqlens_k,
                                                 const std::optional<Tensor>& seed) {
  const char* op = "attention_bwd";
  const AttentionInputs x = attention_inputs(q, k, v, seqlens_k, op);
  const Tensor dout = of_queries(dout_, q, op), o = of_queries(o_, q, op);
  Tensor dq = dense_like(q), dk = dense_like(k), dv = dense_like(v), partial = partial_sums(q, x.shape);
  kernels().attention_bwd(pool(), {x.shape, heads(dout), x.q, x.k, x.v, heads(o), heads(dq), heads(dk), heads(dv),
                                   lse_of(lse, x.shape, op), x.seqlens_k, drop_of(dropout_p, seed, op), floats(partial),
                                   static_cast<float>(scale), is_causal, x.dtype});
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> attention_qkvpacked_fwd(const Tensor& qkv, bool is_causal, double dropout_p, double scale,
                                                   const std::optional<Tensor>& seqlens_k,
                                                   const std::optional<Tensor>& seed) {
  const char* op = "attention_qkvpacked_fwd";
  const AttentionInputs x = packed_inputs(qkv, seqlens_k, op);
  Tensor o = packed_output(qkv, x.shape), lse = row_statistics(qkv, x.shape);
  kernels().attention_fwd(pool(), {x.shape, x.q, x.k, x.v, transposed(o), floats(lse), x.seqlens_k,
                                   drop_of(dropout_p, seed, op), static_cast<float>(scale), is_causal, x.dtype});
  return {o, lse};
}

Tensor attention_qkvpacked_bwd(const Tensor& dout_, const Tensor& qkv, const Tensor& o_, const Tensor& lse,
                               bool is_causal, double dropout_p, double scale, const std::optional<Tensor>& seqlens_k,
                               const std::optional<Tensor>& seed) {
  const char* op = "attention_qkvpacked_bwd";
  const AttentionInputs x = packed_inputs(qkv, seqlens_k, op);
  const Tensor dout = of_packed_queries(dout_, qkv, op), o = of_packed_queries(o_, qkv, op);
  Tensor dqkv = fresh_like(qkv, qkv.scalar_type()), partial = partial_sums(qkv, x.shape);
  kernels().attention_bwd(
      pool(), {x.shape, transposed(dout), x.q, x.k, x.v, transposed(o), part(dqkv, 0), part(dqkv, 1), part(dqkv, 2),
               lse_of(lse, x.shape, op), x.seqlens_k, drop_of(dropout_p, seed, op), floats(partial),
               static_cast<float>(scale), is_causal, x.dtype});
  return dqkv;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt_cpp, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&fastgpt::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&fastgpt::attention_bwd));
  m.impl("attention_qkvpacked_fwd", TORCH_BOX(&fastgpt::attention_qkvpacked_fwd));
  m.impl("attention_qkvpacked_bwd", TORCH_BOX(&fastgpt::attention_qkvpacked_bwd));
}
