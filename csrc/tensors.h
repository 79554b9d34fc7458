// How kernels, on a CPU or a GPU, are told of tensors: raw pointers, sizes and strides in elements, all int64. No
// kernel knows torch.

#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgpt {

enum class Dtype : int32_t { fp32, bf16, fp16 };

// A (rows, N) matrix whose rows are contiguous, `stride` elements apart.
struct Rows {
  const void* data;
  int64_t stride;
};

// A (batch, nheads, seqlen, headdim) tensor in any layout that keeps a head's row together.
struct Heads {
  void* data;
  int64_t stride_b, stride_h, stride_t;
};

struct AttentionShape {
  int64_t B, H, Tq, Tk, D;
};

// A contiguous tensor of a list.
struct ListedTensor {
  void* data;
  Dtype dtype;
};

// One parameter of adamw_ and what belongs to it.
struct AdamwItem {
  ListedTensor param, grad, exp_avg, exp_avg_sq;
  int64_t numel;
  int64_t first_block;  // how many blocks the items before this one have
};

// One tensor of clip_grad_norm_.
struct ClipItem {
  ListedTensor grad;
  int64_t numel;
  int64_t first_block;
};

// Tensors are cut into blocks of this many elements, so that a list is one range of work, cut by sizes alone.
constexpr int64_t kListBlock = 8192;

inline int64_t list_blocks(int64_t numel) { return (numel + kListBlock - 1) / kListBlock; }

// What the kernels of some ops are given, the same on CPUs and GPUs. `row_blocks` is that of either (kernels.h).

struct LayerNormFwd {
  Rows x;              // (M, N)
  const void* weight;  // (N,)
  const void* bias;    // (N,), or null
  void* y;             // (M, N), contiguous
  float* mean;         // (M,)
  float* rstd;         // (M,)
  int64_t M, N;
  float eps;
  Dtype dtype;         // of x and y
  Dtype weight_dtype;  // of weight and bias: dtype, or fp32
};

struct LayerNormBwd {
  Rows dy;  // (M, N)
  Rows x;   // (M, N)
  const void* weight;
  const float* mean;
  const float* rstd;
  void* dx;        // (M, N), contiguous
  void* dweight;   // (N,)
  void* dbias;     // (N,)
  float* partial;  // (row_blocks(M), 2, N): each block's share of dweight and dbias
  int64_t M, N;
  Dtype dtype;
  Dtype weight_dtype;  // of weight, dweight and dbias
};

struct GeluFwd {
  Rows x;            // (M, N)
  const void* bias;  // (N,), or null
  void* y;           // (M, N), contiguous
  int64_t M, N;
  Dtype dtype;       // of x and y
  Dtype bias_dtype;  // dtype, or fp32
  bool tanh;         // the approximation
};

struct GeluBwd {
  Rows dy;  // (M, N)
  Rows x;   // (M, N)
  const void* bias;
  void* dx;        // (M, N), contiguous
  void* dbias;     // (N,), untouched where there is no bias
  float* partial;  // (row_blocks(M), N): each block's share of dbias
  int64_t M, N;
  Dtype dtype;
  Dtype bias_dtype;  // of bias and dbias
  bool tanh;
};

struct SoftmaxFwd {
  Rows x;   // (M, N)
  void* y;  // (M, N), contiguous
  int64_t M, N;
  int64_t Tq;  // rows of one causal matrix, or 0 where nothing is masked
  float scale;
  Dtype dtype;
};

struct SoftmaxBwd {
  Rows dy;   // (M, N)
  Rows y;    // (M, N)
  void* dx;  // (M, N), contiguous
  int64_t M, N;
  int64_t Tq;
  float scale;
  Dtype dtype;
};

}  // namespace fastgpt
