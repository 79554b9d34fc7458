// The functions that CUDA rungs define, and the scratch memory that they may want.
//
// All tensors are contiguous and in the device's memory, aligned to 64 bytes as a whole (a row of an odd length is
// not), and overlap nothing else. What is written starts out as NaN. Kernels are launched on `stream`, by
// launch<kernel>(...). Kernels belong into an anonymous namespace, so that the rungs of a ladder do not meet.

#pragma once

#include "prims.cuh"

#ifdef FASTGPT_EMULATE
#include <new>

#include "../../csrc/emulator/control.h"
#endif

using fastgpt::cuda::fp16;

extern "C" {
// y (M, N) = softmax of each row of x (M, N).
void softmax(const float* x, float* y, int M, int N, cudaStream_t stream);

// y = (x - mean) * rstd * weight + bias, with the mean of each row and rstd = 1 / sqrt(variance + eps).
// x, y (M, N); weight, bias (N,); mean, rstd (M,).
void layer_norm(const float* x, const float* weight, const float* bias, float* y, float* mean, float* rstd, int M,
                int N, float eps, cudaStream_t stream);

// The gradients of layer_norm, from that of y and the statistics of the forward.
// dy, x, dx (M, N); weight, dweight, dbias (N,); mean, rstd (M,).
void layer_norm_bwd(const float* dy, const float* x, const float* weight, const float* mean, const float* rstd,
                    float* dx, float* dweight, float* dbias, int M, int N, cudaStream_t stream);

// o = softmax(scale * q k^T) v, where query i sees keys 0 to i; lse (B, H, T) is the logarithm of the sum of
// exponentials. q, k, v, o (B, H, T, D).
void attention(const fp16* q, const fp16* k, const fp16* v, fp16* o, float* lse, int B, int H, int T, int D,
               float scale, cudaStream_t stream);

// The gradients of attention, from that of o and the results of the forward.
void attention_bwd(const fp16* dout, const fp16* q, const fp16* k, const fp16* v, const fp16* o, const float* lse,
                   fp16* dq, fp16* dk, fp16* dv, int B, int H, int T, int D, float scale, cudaStream_t stream);
}

namespace lessons {

// `count` elements of the device's memory, for the kernels that are launched on the stream while it lives.
template <class T>
class Scratch {
 public:
#ifdef FASTGPT_EMULATE
  // Aligned as a GPU's memory, so that it lies in as many sectors; NaN, whatever the type.
  Scratch(size_t count, cudaStream_t) : memory_(::operator new(count * sizeof(T), kAlignment)) {
    memset(memory_, 0xff, count * sizeof(T));
    fastgpt::emulator::add_memory(memory_, count * sizeof(T), "scratch memory");
  }
  ~Scratch() {
    fastgpt::emulator::remove_memory(memory_);
    ::operator delete(memory_, kAlignment);
  }
#else
  Scratch(size_t count, cudaStream_t stream) : stream_(stream) {
    if (const cudaError_t error = cudaMallocAsync(&memory_, count * sizeof(T), stream)) {
      throw std::runtime_error(std::string("scratch memory: ") + cudaGetErrorString(error));
    }
  }
  ~Scratch() { cudaFreeAsync(memory_, stream_); }
#endif
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() { return static_cast<T*>(memory_); }

 private:
  void* memory_ = nullptr;
#ifdef FASTGPT_EMULATE
  static constexpr std::align_val_t kAlignment{256};
#else
  cudaStream_t stream_;
#endif
};

}  // namespace lessons
