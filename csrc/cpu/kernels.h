// What a CPU kernel is given, and the table of all kernels of one instruction set.
//
// Plain structs of raw pointers, sizes and strides: no kernel knows torch, and the bindings (csrc/bindings) know no
// instruction set. Sizes and strides count elements, and are int64. Pointers need no alignment; an output overlaps
// nothing else. Statistics (mean, rstd, lse, loss) are fp32 whatever the dtype of the tensors.

#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgpt {

enum class Dtype : int32_t { fp32, bf16, fp16 };

// The threads that kernels run on: torch's own in the extension, plain ones in the tests of csrc.
struct Pool {
  // Calls body(begin, end, context) on parts of [0, n) of at least `grain` items each (the last one may be shorter),
  // and returns when all is done. How the range is cut depends on the number of threads: a result must not.
  void (*run)(int64_t n, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context), void* context);
};

// A (rows, N) matrix whose rows are contiguous, `stride` elements apart.
struct Rows {
  const void* data;
  int64_t stride;
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

// Into how many blocks a kernel cuts M rows whose shares of a sum over rows it keeps apart: by M alone, so that sums
// are the same on any number of threads.
inline int64_t row_blocks(int64_t M) {
  int64_t blocks = (M + 31) / 32;
  return blocks < 64 ? (blocks < 1 ? 1 : blocks) : 64;
}

struct Kernels {
  const char* isa;
  void (*layer_norm_fwd)(const Pool&, const LayerNormFwd&);
  void (*layer_norm_bwd)(const Pool&, const LayerNormBwd&);
};

// The table of the best instruction set that this processor and FASTGPT_CPU_ISA allow.
const Kernels& kernels();

// The reason why FASTGPT_CPU_ISA asks for what this processor or this build does not have, or null.
const char* isa_error();

}  // namespace fastgpt
