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
  void* dx;       // (M, N), contiguous
  void* dweight;  // (N,)
  void* dbias;    // (N,)
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
  bool first;  // total has no value yet
  Dtype dtype;  // of part
};

enum class MathFunction : int32_t { exp, log, tanh, erf };

struct Math {
  const float* x;  // (n,)
  float* y;        // (n,)
  int64_t n;
  MathFunction function;
};

// Into how many blocks a kernel cuts M rows whose shares of a sum over rows it keeps apart: by M alone, so that sums are
// the same on any number of threads.
inline int64_t row_blocks(int64_t M) {
  int64_t blocks = (M + 31) / 32;
  return blocks < 64 ? (blocks < 1 ? 1 : blocks) : 64;
}

struct Kernels {
  const char* isa;
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
  void (*math)(const Pool&, const Math&);
};

// The table of the best instruction set that this processor and FASTGPT_CPU_ISA allow.
const Kernels& kernels();

// The reason why FASTGPT_CPU_ISA asks for what this processor or this build does not have, or null.
const char* isa_error();

}  // namespace fastgpt
