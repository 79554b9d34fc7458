// attention and attention_qkvpacked on CPU tensors.

#include "tensor.h"

namespace fastgpt {
namespace {

// A (B, H, T, D) tensor as the kernels take it: a head's row together, the rest in any layout.
Tensor rows_together(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : dense(x); }

Heads heads(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// Part `index` of a (B, T, 3, H, D) tensor, as (B, H, T, D).
Heads part(const Tensor& qkv, int64_t index, int64_t element_size) {
  const int64_t start = qkv.numel() == 0 ? 0 : index * qkv.stride(2) * element_size;  // nothing is added to a null
  return {static_cast<char*>(qkv.data_ptr()) + start, qkv.stride(0), qkv.stride(3), qkv.stride(1)};
}

// The memory order of x where that keeps rows together, as kernel_ops.dense_like has it.
Tensor dense_like(const Tensor& x) {
  Tensor y = torch::stable::empty_like(x);
  return y.stride(3) == 1 && y.stride(2) < (int64_t{1} << 23) ? y : fresh_like(x, x.scalar_type());
}

const int32_t* lengths(const std::optional<Tensor>& seqlens_k, int64_t B, const char* op, std::optional<Tensor>* kept) {
  if (!seqlens_k) return nullptr;
  require(seqlens_k->scalar_type() == ScalarType::Int && seqlens_k->numel() == B, op, "seqlens_k must be int32, (B,)");
  *kept = dense(*seqlens_k);
  return static_cast<const int32_t*>((*kept)->data_ptr());
}

AttentionShape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, const char* op) {
  require(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op, "q, k and v must be (B, H, T, D)");
  const AttentionShape s{q.size(0), q.size(1), q.size(2), k.size(2), q.size(3)};
  for (const Tensor* x : {&k, &v}) {
    require(x->size(0) == s.B && x->size(1) == s.H && x->size(2) == s.Tk && x->size(3) == s.D &&
                x->scalar_type() == q.scalar_type(),
            op, "k and v must have q's dtype, B, H and D, and one length");
  }
  return s;
}

AttentionShape packed_shape(const Tensor& qkv, const char* op) {
  require(qkv.dim() == 5 && qkv.size(2) == 3, op, "qkv must be (B, T, 3, H, D)");
  return {qkv.size(0), qkv.size(3), qkv.size(1), qkv.size(1), qkv.size(4)};
}

int64_t element_size(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }

Tensor partial_sums(const Tensor& q, const AttentionShape& s) {
  const int64_t splits = attention_splits(s);
  return fresh(q, {splits == 1 ? 0 : s.B * s.H * splits, s.Tq, s.D}, ScalarType::Float);
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q_, const Tensor& k_, const Tensor& v_, bool is_causal,
                                         double dropout_p, double scale, const std::optional<Tensor>& seqlens_k,
                                         const std::optional<Tensor>& seed) {
  const char* op = "attention_fwd";
  const AttentionShape s = shape_of(q_, k_, v_, op);
  const Tensor q = rows_together(q_), k = rows_together(k_), v = rows_together(v_);
  Tensor o = dense_like(q_), lse = fresh(q_, {s.B, s.H, s.Tq}, ScalarType::Float);
  std::optional<Tensor> kept;
  kernels().attention_fwd(pool(),
                          {s, heads(q), heads(k), heads(v), heads(o), floats(lse), lengths(seqlens_k, s.B, op, &kept),
                           drop_of(dropout_p, seed, op), static_cast<float>(scale), is_causal, dtype_of(q, op)});
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout_, const Tensor& q_, const Tensor& k_,
                                                 const Tensor& v_, const Tensor& o_, const Tensor& lse, bool is_causal,
                                                 double dropout_p, double scale, const std::optional<Tensor>& seqlens_k,
                                                 const std::optional<Tensor>& seed) {
  const char* op = "attention_bwd";
  const AttentionShape s = shape_of(q_, k_, v_, op);
  require(
      shape_of(dout_, k_, v_, op).Tq == s.Tq && shape_of(o_, k_, v_, op).Tq == s.Tq && lse.numel() == s.B * s.H * s.Tq,
      op, "do and o must have q's shape, and lse one number for each of its rows");
  const Tensor dout = rows_together(dout_), q = rows_together(q_), k = rows_together(k_), v = rows_together(v_),
               o = rows_together(o_);
  Tensor dq = dense_like(q_), dk = dense_like(k_), dv = dense_like(v_), partial = partial_sums(q, s);
  std::optional<Tensor> kept;
  kernels().attention_bwd(
      pool(), {s, heads(dout), heads(q), heads(k), heads(v), heads(o), heads(dq), heads(dk), heads(dv), floats(lse),
               lengths(seqlens_k, s.B, op, &kept), drop_of(dropout_p, seed, op), floats(partial),
               static_cast<float>(scale), is_causal, dtype_of(q, op)});
  return {dq, dk, dv};
}

// (B, T, H, D) as (B, H, T, D).
Heads transposed(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(2), x.stride(1)}; }

std::tuple<Tensor, Tensor> attention_qkvpacked_fwd(const Tensor& qkv_, bool is_causal, double dropout_p, double scale,
                                                   const std::optional<Tensor>& seqlens_k,
                                                   const std::optional<Tensor>& seed) {
  const char* op = "attention_qkvpacked_fwd";
  const AttentionShape s = packed_shape(qkv_, op);
  const Tensor qkv = qkv_.stride(4) == 1 || s.D == 1 ? qkv_ : dense(qkv_);
  const Dtype dtype = dtype_of(qkv, op);
  const int64_t size = element_size(dtype);
  Tensor o = fresh(qkv, {s.B, s.Tq, s.H, s.D}, qkv.scalar_type()),
         lse = fresh(qkv, {s.B, s.H, s.Tq}, ScalarType::Float);
  std::optional<Tensor> kept;
  kernels().attention_fwd(pool(), {s, part(qkv, 0, size), part(qkv, 1, size), part(qkv, 2, size), transposed(o),
                                   floats(lse), lengths(seqlens_k, s.B, op, &kept), drop_of(dropout_p, seed, op),
                                   static_cast<float>(scale), is_causal, dtype});
  return {o, lse};
}

Tensor attention_qkvpacked_bwd(const Tensor& dout_, const Tensor& qkv_, const Tensor& o_, const Tensor& lse,
                               bool is_causal, double dropout_p, double scale, const std::optional<Tensor>& seqlens_k,
                               const std::optional<Tensor>& seed) {
  const char* op = "attention_qkvpacked_bwd";
  const AttentionShape s = packed_shape(qkv_, op);
  const Tensor qkv = qkv_.stride(4) == 1 || s.D == 1 ? qkv_ : dense(qkv_);
  const Tensor dout = rows_together(dout_), o = rows_together(o_);
  for (const Tensor* x : {&dout, &o}) {
    require(x->dim() == 4 && x->size(0) == s.B && x->size(1) == s.Tq && x->size(2) == s.H && x->size(3) == s.D &&
                x->scalar_type() == qkv.scalar_type(),
            op, "do and o must be (B, T, H, D) in qkv's dtype");
  }
  require(lse.numel() == s.B * s.H * s.Tq, op, "lse must have one number for each query");
  const Dtype dtype = dtype_of(qkv, op);
  const int64_t size = element_size(dtype);
  Tensor dqkv = fresh_like(qkv_, qkv.scalar_type()), partial = partial_sums(qkv, s);
  std::optional<Tensor> kept;
  kernels().attention_bwd(pool(), {s, transposed(dout), part(qkv, 0, size), part(qkv, 1, size), part(qkv, 2, size),
                                   transposed(o), part(dqkv, 0, size), part(dqkv, 1, size), part(dqkv, 2, size),
                                   floats(lse), lengths(seqlens_k, s.B, op, &kept), drop_of(dropout_p, seed, op),
                                   floats(partial), static_cast<float>(scale), is_causal, dtype});
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
