// Whether a GPU and its driver can run what nvcc made of the kernels: CUDA's own word, before the first real launch.

#include <cuda_runtime.h>

namespace {

__global__ void probe_kernel() {}

}  // namespace

// Why the current GPU cannot, or null.
extern "C" __attribute__((visibility("default"))) const char* fastgpt_cuda_error() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaGetLastError();  // an error that is told here is not to be found again by the next launch
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
