// What a CUDA kernel is given, and the functions that launch them; on a GPU, or in the emulator.
//
// Pointers are to device memory, numbers that only the device knows (a seed, a loss's gradient, a count) included: no
// launch waits for the GPU, so that all of them can be captured in a CUDA graph. Pointers need no alignment beyond
// their element's, and outputs overlap nothing else. Statistics (mean, rstd, lse, loss) are fp32 whatever the tensors'
// dtype. A launcher throws std::runtime_error where the GPU refuses.

#pragma once

#include <cuda_runtime_api.h>

#include "../tensors.h"

namespace fastgpt::cuda {

// Dropout with probability p: an element whose random word (philox.cuh) lies below the threshold becomes 0, the others
// are scaled. Nothing is dropped where `seed` is null.
struct Drop {
  const int64_t* seed;
  uint32_t threshold;  // p * 2^32
  float scale;         // 1 / (1 - p)
};

struct AttentionFwd {
  AttentionShape shape;      // lengths below 2^30; D up to 256
  Heads q, k, v, o;          // (B, H, Tq or Tk, D)
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
  float* delta;  // (B, H, Tq): the sum of do * o over D, which the first kernel leaves to the others
  const int32_t* seqlens_k;
  Drop drop;
  float scale;
  bool is_causal;
  Dtype dtype;
};

void attention_fwd(const AttentionFwd& a, cudaStream_t stream);
void attention_bwd(const AttentionBwd& a, cudaStream_t stream);

void layer_norm_fwd(const LayerNormFwd& a, cudaStream_t stream);
void layer_norm_bwd(const LayerNormBwd& a, cudaStream_t stream);

void softmax_fwd(const SoftmaxFwd& a, cudaStream_t stream);
void softmax_bwd(const SoftmaxBwd& a, cudaStream_t stream);

void gelu_fwd(const GeluFwd& a, cudaStream_t stream);
void gelu_bwd(const GeluBwd& a, cudaStream_t stream);

struct Dropout {
  const void* x;  // (n,), contiguous: the input, or the gradient of the output
  void* y;        // (n,)
  int64_t n;
  Drop drop;
  Dtype dtype;
};

void dropout(const Dropout& a, cudaStream_t stream);

struct AddLayerNormFwd {
  Rows x;         // (M, N)
  Rows residual;  // (M, N)
  const void* weight;
  const void* bias;    // or null
  void* y;             // (M, N), contiguous
  void* residual_out;  // (M, N), contiguous
  float* mean;
  float* rstd;
  int64_t M, N;
  float eps;
  Drop drop;           // of x
  Dtype dtype;         // of x and y
  Dtype stream_dtype;  // of residual and residual_out: dtype, or fp32
  Dtype weight_dtype;  // of weight and bias: dtype, or fp32
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
  int64_t M, N;
  Drop drop;
  Dtype dtype;         // of dy and dx
  Dtype stream_dtype;  // of residual_out and both gradients of the stream
  Dtype weight_dtype;  // of weight, dweight and dbias
};

void add_layer_norm_fwd(const AddLayerNormFwd& a, cudaStream_t stream);
void add_layer_norm_bwd(const AddLayerNormBwd& a, cudaStream_t stream);

struct CrossEntropyFwd {
  Rows logits;             // (M, V)
  const int64_t* targets;  // (M,)
  void* dlogits;           // (M, V), contiguous, or null; may be the logits themselves
  float* losses;           // (M,), 0 where the target is ignore_index
  float* stats;            // (2, M): the row's maximum, and the logarithm of the sum of exponentials below it
  int64_t M, V;
  int64_t ignore_index;
  const float* grad_scale;  // what the gradient of the sum of losses is multiplied by; null is 1
  Dtype dtype;
};

struct CrossEntropyBwd {
  Rows logits;             // (M, V)
  const int64_t* targets;  // (M,)
  void* dlogits;           // (M, V), contiguous
  const float* stats;      // (2, M)
  int64_t M, V;
  int64_t ignore_index;
  const float* dloss;
  const float* inverse_count;
  Dtype dtype;
};

struct ScaleGradient {
  void* gradient;  // (n,), changed unless the factor is 1
  int64_t n;
  const float* factor;
  Dtype dtype;
};

struct AddScaled {
  float* total;      // (n,), added to
  const void* part;  // (n,)
  int64_t n;
  float factor;
  bool first;   // total has no value yet
  Dtype dtype;  // of part: bf16 or fp16
};

// 1 / the number of targets that count: infinite where none does.
void inverse_count(const int64_t* targets, int64_t M, int64_t ignore_index, float* inverse, cudaStream_t stream);
// The sum of losses times that: NaN where no target counts.
void mean_loss(const float* losses, int64_t M, const float* inverse, float* loss, cudaStream_t stream);
void cross_entropy_fwd(const CrossEntropyFwd& a, cudaStream_t stream);
void cross_entropy_bwd(const CrossEntropyBwd& a, cudaStream_t stream);
void scale_gradient(const ScaleGradient& a, cudaStream_t stream);
void add_scaled(const AddScaled& a, cudaStream_t stream);

struct Adamw {
  const AdamwItem* items;  // in the host's memory; the kernels' arguments take them along
  int64_t count;
  const float* step;
  const float* lr;
  float beta1, beta2;
  float rest1, rest2;          // 1 - beta
  float log_beta1, log_beta2;  // -inf for 0
  float eps;
  float weight_decay;
};

struct ClipGradNorm {
  const ClipItem* items;  // in the host's memory
  int64_t count;
  int64_t blocks;
  float* partial;  // (clip_programs(blocks),): shares of the sum of squares
  float* norm;     // ()
  float max_norm;
};

void adamw(const Adamw& a, cudaStream_t stream);
void clip_grad_norm(const ClipGradNorm& a, cudaStream_t stream);

// How many blocks of threads share a list of that many blocks where each keeps a sum: 1024 fill a large GPU eight times
// over, and each of them can add up what they all leave.
inline int64_t clip_programs(int64_t blocks) { return blocks < 1 ? 1 : blocks < 1024 ? blocks : 1024; }

// How many blocks share M rows where each keeps a sum over its rows: by M alone, so that the sums have the same bits on
// every GPU. 512 fill a large one (132 to 148 multiprocessors) three to four times; with fewer than 8 rows to a block,
// its sums would be a good part of what it moves.
inline int64_t row_blocks(int64_t M) {
  const int64_t blocks = (M + 7) / 8;
  return blocks < 1 ? 1 : blocks < 512 ? blocks : 512;
}

}  // namespace fastgpt::cuda
