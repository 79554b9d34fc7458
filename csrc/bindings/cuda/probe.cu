// Whether a GPU and its driver can run what nvcc made of the kernels: CUDA's own word, before the first real launch.

#include <cuda_runtime.h>

namespace {

__global__ void probe_kernel() {}

}  // namespace

// Why they cannot, or null; `device` is the GPU's number.
extern "C" __attribute__((visibility("default"))) const char* fastgpt_cuda_error(int device) {
  int before = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, probe_kernel);
    cudaSetDevice(before);
  }
  cudaGetLastError();  // an error that is told here is not to be found again by the next launch
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
