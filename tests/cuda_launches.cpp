// A stand-in for CUDA's runtime that launches nothing and writes down what it was to launch: linked to the object files
// that nvcc made, it tells what their launchers choose on a machine without a GPU. tests/cuda_compile.py uses it.

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <map>
#include <string>

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
};
Configuration configuration;  // between <<<...>>> and the launch

std::map<const void*, std::string>& kernels() {  // by the address that host code knows them by
  static std::map<const void*, std::string> names;
  return names;
}

std::string& log() {
  static std::string lines;
  return lines;
}

cudaError_t record(const void* kernel, dim3 block, size_t shared) {
  log() += kernels()[kernel] + " " + std::to_string(block.x * block.y * block.z) + " " + std::to_string(shared) + "\n";
  return cudaSuccess;
}

}  // namespace

extern "C" {

// "kernel threads shared" a line: the name as the linker spells it, of a block its threads and its bytes of dynamic
// shared memory.
__attribute__((visibility("default"))) const char* fastgpt_launches() { return log().c_str(); }

// What nvcc has every object file call when it is loaded.
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[host] = name;
}

// What <<<...>>> becomes: with a handle since CUDA 13, by the host's address before.
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st*) {
  configuration = {grid, block, shared};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = nullptr;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3 block, void**, size_t shared, cudaStream_t) {
  return record(kernel, block, shared);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3 block, void**, size_t shared, cudaStream_t) {
  return record(kernel, block, shared);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrComputeCapabilityMajor ? 9 : what == cudaDevAttrComputeCapabilityMinor ? 0 : 99 << 10;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
int no_driver() { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(no_driver);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ""; }

}  // extern "C"
