// What a CPU kernel is given, and the table of all kernels of one instruction set.
//
// Plain structs of raw pointers, sizes and strides: no kernel knows torch, and the bindings (csrc/bindings) know no
// instruction set. Sizes and strides count elements, and are int64. Pointers need no alignment; an output overlaps
// nothing else. Statistics (mean, rstd, lse, loss) are fp32 whatever the dtype of the tensors.

#pragma once

#include "../tensors.h"

namespace fastgpt {

// The threads that kernels run on: torch's own.
struct Pool {
  // Calls body(begin, end, context) on parts of [0, n) of at least `grain` items each (the last one may be shorter),
  // and returns when all is done. How the range is cut depends on the number of threads: a result must not.
  void (*run)(int64_t n, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context), void* context);
};

// Dropout with probability p: an element whose random word (philox.h) lies below the threshold becomes 0, the others
// are scaled. Nothing is dropped where the threshold is 0.
struct Drop {
  uint64_t seed;
  uint32_t threshold;  // p * 2^32
  float scale;         // 1 / (1 - p)
};

struct Dropout {
  const void* x;  // (n,), contiguous: the input, or the gradient of the output
  void* y;        // (n,)
  int64_t n;
  Drop drop;
  Dtype dtype;
};

struct AttentionFwd {
  AttentionShape shape;
  Heads q, k, v, o;
  float* lse;                // (B, H, Tq); +inf for a query that sees no key
  const int32_t* seqlens_k;  // (B,), or null
  Drop drop;
  float scale;
  bool is_causal;
  Dtype dtype;
};

struct AttentionBwd {
  AttentionShape shape;
  Heads dout, q, k, v, o, dq, dk, dv;
  const float* lse;
  const int32_t* seqlens_k;
  Drop drop;
  float* dq_partial;  // (B, H, attention_splits(shape), Tq, D), or null where that is 1
  float scale;
  bool is_causal;
  Dtype dtype;
};

// Into how many ranges of keys the backward cuts a head, so that few heads keep many threads busy: by shape alone, so
// that sums are the same on any number of threads.
inline int64_t attention_splits(const AttentionShape& s) {
  const int64_t heads = s.B * s.H, blocks = (s.Tk + 255) / 256, wanted = heads < 32 ? 32 / (heads < 1 ? 1 : heads) : 1;
  return blocks < 1 ? 1 : blocks < wanted ? blocks : wanted;
}

struct CrossEntropyFwd {
  Rows logits;             // (M, V)
  const int64_t* targets;  // (M,)
  void* dlogits;           // (M, V), contiguous, or null; may be the logits themselves
  float* losses;           // (M,), 0 where the target is ignore_index
  float* stats;            // (2, M): the row's maximum, and the logarithm of the sum of exponentials below it
  int64_t M, V;
  int64_t ignore_index;
  float grad_scale;  // what the gradient of the sum of losses is multiplied by
  Dtype dtype;
};

struct CrossEntropyBwd {
  Rows logits;             // (M, V)
  const int64_t* targets;  // (M,)
  void* dlogits;           // (M, V), contiguous
  const float* stats;      // (2, M)
  int64_t M, V;
  int64_t ignore_index;
  float grad_scale;
  Dtype dtype;
};

struct ScaleGradient {
  void* gradient;  // (n,), changed
  int64_t n;
  float factor;
  Dtype dtype;
};

struct AddScaled {
  float* total;      // (n,), added to
  const void* part;  // (n,)
  int64_t n;
  float factor;
  bool first;   // total has no value yet
  Dtype dtype;  // of part
};

// One row times a weight.
struct LinearRow {
  const float* weight;  // (N, K), rows `stride` elements apart
  const float* x;       // (K,)
  const float* bias;    // (N,), or null
  float* y;             // (N,)
  int64_t N, K, stride;
};

enum class MathFunction : int32_t { exp, log, tanh, erf };

struct Math {
  const float* x;  // (n,)
  float* y;        // (n,)
  int64_t n;
  MathFunction function;
};

// dropout(x) + residual, and its layer norm. The stream is what residual and residual_out are kept in: x's dtype, or
// fp32. `scratch` is fp32: N elements for weight, N for bias and, beside a stream in half precision, N for each of
// row_blocks(M).
struct AddLayerNormFwd {
  Rows x;         // (M, N)
  Rows residual;  // (M, N)
  const void* weight;
  const void* bias;
  void* y;             // (M, N), contiguous
  void* residual_out;  // (M, N), contiguous
  float* mean;
  float* rstd;
  float* scratch;
  int64_t M, N;
  float eps;
  Drop drop;
  Dtype dtype;         // of x and y
  Dtype stream_dtype;  // of residual and residual_out
  Dtype weight_dtype;  // of weight and bias
};

struct AddLayerNormBwd {
  Rows dy;             // (M, N)
  Rows dresidual_out;  // (M, N), or null where the stream ends
  Rows residual_out;   // (M, N)
  const void* weight;
  const float* mean;
  const float* rstd;
  void* dx;         // (M, N), contiguous; null where it would be dresidual
  void* dresidual;  // (M, N), contiguous
  void* dweight;
  void* dbias;
  float* partial;  // (row_blocks(M), 2, N)
  float* scratch;  // (N,): weight in fp32
  int64_t M, N;
  Drop drop;
  Dtype dtype;         // of dy and dx
  Dtype stream_dtype;  // of residual_out and both gradients of the stream
  Dtype weight_dtype;  // of weight, dweight and dbias
};

struct Adamw {
  const AdamwItem* items;
  int64_t count;
  int64_t blocks;     // of all items
  float kept;         // 1 - lr * weight_decay
  float step_size;    // lr / (1 - beta1^step)
  float root_factor;  // 1 / sqrt(1 - beta2^step)
  float beta1, beta2;
  float rest1, rest2;  // 1 - beta
  float eps;
};

struct ClipGradNorm {
  const ClipItem* items;
  int64_t count;
  int64_t blocks;
  float* partial;  // (blocks,): each block's sum of squares
  float* norm;     // ()
  float max_norm;
};

// Into how many blocks a kernel cuts M rows whose shares of a sum over rows it keeps apart: by M alone, so that sums
// are the same on any number of threads.
inline int64_t row_blocks(int64_t M) {
  int64_t blocks = (M + 31) / 32;
  return blocks < 64 ? (blocks < 1 ? 1 : blocks) : 64;
}

struct Kernels {
  const char* isa;
  void (*attention_fwd)(const Pool&, const AttentionFwd&);
  void (*attention_bwd)(const Pool&, const AttentionBwd&);
  void (*layer_norm_fwd)(const Pool&, const LayerNormFwd&);
  void (*layer_norm_bwd)(const Pool&, const LayerNormBwd&);
  void (*gelu_fwd)(const Pool&, const GeluFwd&);
  void (*gelu_bwd)(const Pool&, const GeluBwd&);
  void (*softmax_fwd)(const Pool&, const SoftmaxFwd&);
  void (*softmax_bwd)(const Pool&, const SoftmaxBwd&);
  void (*cross_entropy_fwd)(const Pool&, const CrossEntropyFwd&);
  void (*cross_entropy_bwd)(const Pool&, const CrossEntropyBwd&);
  void (*scale_gradient)(const Pool&, const ScaleGradient&);
  void (*add_scaled)(const Pool&, const AddScaled&);
  void (*linear_row)(const Pool&, const LinearRow&);
  void (*math)(const Pool&, const Math&);
  void (*dropout)(const Pool&, const Dropout&);
  void (*add_layer_norm_fwd)(const Pool&, const AddLayerNormFwd&);
  void (*add_layer_norm_bwd)(const Pool&, const AddLayerNormBwd&);
  void (*adamw)(const Pool&, const Adamw&);
  void (*clip_grad_norm)(const Pool&, const ClipGradNorm&);
};

// The table of the best instruction set that this processor and FASTGPT_CPU_ISA allow.
const Kernels& kernels();

// The reason why FASTGPT_CPU_ISA asks for what this processor or this build does not have, or null.
const char* isa_error();

}  // namespace fastgpt
