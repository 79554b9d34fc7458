// Softmax, rung 8: the kernel that the package ships (csrc/cuda/softmax.cu), included as it is and called.
//
// Moves: 8 bytes per element in fp32, 4 in half precision.
//
// Last rung: it moves the least that is possible, but only in fp32, only rows of up to 4096 elements, and a short row
// has 128 threads where a warp would do.
//
// Gains: threads as the row needs them: rows of up to 512 floats have a warp each, four rows to a block, and no barrier
// at all; longer ones up to 256 threads, and rows that registers cannot hold go through the online sum of rung 6. Half
// precision stays packed in registers, two to each. A scale and a causal mask cost no pass of their own, and what the
// mask hides is not read.
//
// Promise: bytes moved == 1 x 07_registers
// Promise: load requests == 1 x 07_registers
// Promise: barriers <= 1 x 07_registers

#include "softmax.cu"
#include "tasks.h"

extern "C" void softmax(const float* x, float* y, int M, int N, cudaStream_t stream) {
  fastgpt::SoftmaxFwd arguments{};
  arguments.x = {x, N};
  arguments.y = y;
  arguments.M = M;
  arguments.N = N;
  arguments.scale = 1.0f;
  arguments.dtype = fastgpt::Dtype::fp32;
  fastgpt::cuda::softmax_fwd(arguments, stream);
}
