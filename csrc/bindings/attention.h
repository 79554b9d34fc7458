// What the kernels of attention and attention_qkvpacked are given, on any device: checks, outputs, and one form for
// both ops, since a packed tensor is three of (B, H, T, D) with other strides.

#pragma once

#include "tensor.h"

namespace fastgpt {

// A (B, H, T, D) tensor as the kernels take it: a head's row together, the rest in any layout.
inline Tensor rows_together(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : dense(x); }

inline Heads heads(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// (B, T, H, D) as (B, H, T, D).
inline Heads transposed(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(2), x.stride(1)}; }

// Part `index` of a (B, T, 3, H, D) tensor, as (B, H, T, D).
inline Heads part(const Tensor& qkv, int64_t index) {
  const int64_t element_size = qkv.scalar_type() == ScalarType::Float ? 4 : 2;
  const int64_t start = qkv.numel() == 0 ? 0 : index * qkv.stride(2) * element_size;  // nothing is added to a null
  return {static_cast<char*>(qkv.data_ptr()) + start, qkv.stride(0), qkv.stride(3), qkv.stride(1)};
}

// The memory order of x where that keeps rows together, as kernel_ops.dense_like has it.
inline Tensor dense_like(const Tensor& x) {
  Tensor y = torch::stable::empty_like(x);
  return y.stride(3) == 1 && y.stride(2) < (int64_t{1} << 23) ? y : fresh_like(x, x.scalar_type());
}

struct AttentionInputs {
  AttentionShape shape;
  Heads q, k, v;
  const int32_t* seqlens_k;
  Dtype dtype;
  std::vector<Tensor> kept;  // whose memory that is
};

inline const int32_t* lengths(const std::optional<Tensor>& seqlens_k, AttentionInputs* inputs, const char* op) {
  if (!seqlens_k) return nullptr;
  require(seqlens_k->scalar_type() == ScalarType::Int && seqlens_k->numel() == inputs->shape.B, op,
          "seqlens_k must be int32, (B,)");
  inputs->kept.push_back(dense(*seqlens_k));
  return static_cast<const int32_t*>(inputs->kept.back().data_ptr());
}

inline AttentionInputs attention_inputs(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const std::optional<Tensor>& seqlens_k, const char* op) {
  require(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op, "q, k and v must be (B, H, T, D)");
  const AttentionShape s{q.size(0), q.size(1), q.size(2), k.size(2), q.size(3)};
  for (const Tensor* x : {&k, &v}) {
    require(x->size(0) == s.B && x->size(1) == s.H && x->size(2) == s.Tk && x->size(3) == s.D &&
                x->scalar_type() == q.scalar_type(),
            op, "k and v must have q's dtype, B, H and D, and one length");
  }
  AttentionInputs inputs{
      s, {}, {}, {}, nullptr, dtype_of(q, op), {rows_together(q), rows_together(k), rows_together(v)}};
  inputs.q = heads(inputs.kept[0]);
  inputs.k = heads(inputs.kept[1]);
  inputs.v = heads(inputs.kept[2]);
  inputs.seqlens_k = lengths(seqlens_k, &inputs, op);
  return inputs;
}

inline AttentionInputs packed_inputs(const Tensor& qkv, const std::optional<Tensor>& seqlens_k, const char* op) {
  require(qkv.dim() == 5 && qkv.size(2) == 3, op, "qkv must be (B, T, 3, H, D)");
  const AttentionShape s{qkv.size(0), qkv.size(3), qkv.size(1), qkv.size(1), qkv.size(4)};
  const Tensor together = qkv.stride(4) == 1 || s.D == 1 ? qkv : dense(qkv);
  AttentionInputs inputs{s,       part(together, 0), part(together, 1), part(together, 2),
                         nullptr, dtype_of(qkv, op), {together}};
  inputs.seqlens_k = lengths(seqlens_k, &inputs, op);
  return inputs;
}

inline Tensor row_statistics(const Tensor& like, const AttentionShape& s) {
  return fresh(like, {s.B, s.H, s.Tq}, ScalarType::Float);
}

// A (B, T, H, D) output of packed attention.
inline Tensor packed_output(const Tensor& qkv, const AttentionShape& s) {
  return fresh(qkv, {s.B, s.Tq, s.H, s.D}, qkv.scalar_type());
}

// do or o of the backward, or a copy of it whose rows are together.
inline Tensor of_queries(const Tensor& x, const Tensor& q, const char* op) {
  require(x.dim() == 4 && x.scalar_type() == q.scalar_type(), op, "do and o must have q's shape and dtype");
  for (int64_t i = 0; i < 4; ++i) require(x.size(i) == q.size(i), op, "do and o must have q's shape and dtype");
  return rows_together(x);
}

inline Tensor of_packed_queries(const Tensor& x, const Tensor& qkv, const char* op) {
  require(x.dim() == 4 && x.size(0) == qkv.size(0) && x.size(1) == qkv.size(1) && x.size(2) == qkv.size(3) &&
              x.size(3) == qkv.size(4) && x.scalar_type() == qkv.scalar_type(),
          op, "do and o must be (B, T, H, D) in qkv's dtype");
  return rows_together(x);
}

inline const float* lse_of(const Tensor& lse, const AttentionShape& s, const char* op) {
  require(lse.numel() == s.B * s.H * s.Tq, op, "lse must have one number for each query");
  return floats(lse);
}

}  // namespace fastgpt
