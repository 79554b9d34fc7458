// layer_norm's backward 4: the package's own kernel, csrc/cuda/layer_norm.cu.
//
// Moves: dy and x once and dx once, 12 bytes an element; weight, 4, twice from the cache, since it is not kept beside x
// and dy; and a line for each block.
//
// Last rung: each warp left a line, and a thread alone added up all the lines of a column.
//
// Gains: the four warps of a block add up their sums in shared memory and leave one line, of which there are at most
// 512 however high the matrix is; sixteen threads share a column of them (column_sum.cuh). With the few rows that the
// emulator is given nothing of it shows in the counters.
//
// Promise: load sectors <= 0.6 x 08_bwd_columns

#include "layer_norm.cu"
#include "tasks.h"

extern "C" void layer_norm_bwd(const float* dy, const float* x, const float* weight, const float* mean,
                               const float* rstd, float* dx, float* dweight, float* dbias, int M, int N,
                               cudaStream_t stream) {
  using fastgpt::Dtype;
  lessons::Scratch<float> lines(static_cast<size_t>(fastgpt::cuda::row_blocks(M)) * 2 * N, stream);
  fastgpt::cuda::layer_norm_bwd(
      {{dy, N}, {x, N}, weight, mean, rstd, dx, dweight, dbias, lines.data(), M, N, Dtype::fp32, Dtype::fp32}, stream);
}
