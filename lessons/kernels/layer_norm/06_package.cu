// layer_norm 6: the package's own kernel, csrc/cuda/layer_norm.cu.
//
// It is the last rung made whole: rows of any length and layout, fp32, bf16 and fp16, a warp for short rows and up to
// eight for long ones (two of them for 1024 floats, who then meet at barriers), and mean and rstd written for the
// backward. What does not fit into registers is read again, from L2 (rows.cuh). norm.cuh adds one thing to the numbers:
// `rest`, what the sum behind the mean lost to rounding.
//
// Moves: x once and y once, 8 bytes an element; and 8 bytes a row of mean and rstd.
//
// Last rung: rows of at most 1024 elements, of one dtype.
//
// Gains: nothing more where rows are of that kind; it is as good everywhere else.
//
// Promise: load sectors <= 1 x 05_row_in_registers
// Promise: store sectors <= 1.1 x 05_row_in_registers

#include "layer_norm.cu"
#include "tasks.h"

extern "C" void layer_norm(const float* x, const float* weight, const float* bias, float* y, float* mean, float* rstd,
                           int M, int N, float eps, cudaStream_t stream) {
  using fastgpt::Dtype;
  fastgpt::cuda::layer_norm_fwd({{x, N}, weight, bias, y, mean, rstd, M, N, eps, Dtype::fp32, Dtype::fp32}, stream);
}
