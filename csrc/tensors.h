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

}  // namespace fastgpt
