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

// How many blocks share M rows where each keeps a sum over its rows: by M alone, so that the sums have the same bits on
// every GPU. 512 fill a large one (132 to 148 multiprocessors) three to four times; with fewer than 8 rows to a block,
// its sums would be a good part of what it moves.
inline int64_t row_blocks(int64_t M) {
  const int64_t blocks = (M + 7) / 8;
  return blocks < 1 ? 1 : blocks < 512 ? blocks : 512;
}

}  // namespace fastgpt::cuda
