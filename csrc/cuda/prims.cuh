// Everything in the kernels that is not plain C++: PTX, the intrinsics of a GPU, shared memory, launching.
//
// A kernel includes this file and the standard's headers, and contains no asm, no <<<>>> and no __shared__ of its own.
// So each primitive can have two bodies: the GPU's, below, and the emulator's (csrc/emulator/prims.h), with which the
// same kernels run on a CPU. Barriers and shuffles keep CUDA's own names (__syncthreads, __shfl_xor_sync, ...).

#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <string>
#define FASTGPT_PRIM __device__ __forceinline__
#else
#include "../emulator/emulator.h"
#define FASTGPT_PRIM inline
#endif

namespace fastgpt::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// N elements that move as one: a load of Vec<bf16, 8> is one 16-byte instruction.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T at[N];
  FASTGPT_PRIM T& operator[](int i) { return at[i]; }
  FASTGPT_PRIM const T& operator[](int i) const { return at[i]; }
};

// How many elements of T a 16-byte access moves.
template <class T>
constexpr int kVecSize = 16 / sizeof(T);

// A pointer into shared memory. It has no operator*: lds, sts, ldmatrix and cp_async are the ways there, so that the
// emulator sees every access.
template <class T>
class Shared {
 public:
  Shared() = default;
  FASTGPT_PRIM explicit Shared(T* address) : address_(address) {}
  FASTGPT_PRIM Shared operator+(int i) const { return Shared(address_ + i); }
  template <class U>
  FASTGPT_PRIM Shared<U> as() const {
    return Shared<U>(reinterpret_cast<U*>(address_));
  }
  FASTGPT_PRIM T* address() const { return address_; }

 private:
  T* address_;
};

}  // namespace fastgpt::cuda

#ifdef __CUDACC__

// SHARED(float, sums, 32): 32 floats of the block, as the Shared<float> `sums`. Nothing is in them yet.
#define SHARED(T, name, count)                  \
  __shared__ alignas(16) T name##_array[count]; \
  const ::fastgpt::cuda::Shared<T> name(name##_array)

// DYNAMIC_SHARED(bf16, tiles): the shared memory whose size the launch states, aligned to 128 bytes, or to another
// power of two, at most 1024.
#define DYNAMIC_SHARED(T, name) DYNAMIC_SHARED_ALIGNED(T, name, 128)
#define DYNAMIC_SHARED_ALIGNED(T, name, bytes) \
  extern __shared__ __align__(bytes)           \
  unsigned char dynamic_##bytes[];             \
  const ::fastgpt::cuda::Shared<T> name(reinterpret_cast<T*>(dynamic_##bytes))

namespace fastgpt::cuda {

// An integer type of Size bytes, 1 to 16, by which values move.
template <int Size>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Global memory: one instruction for up to 16 bytes, aligned to their size. (Through memcpy the compiler would load
// only the bytes that are used, one by one.)
template <class T>
FASTGPT_PRIM T ldg(const T* p) {
  const typename Word<sizeof(T)>::type word = *reinterpret_cast<const typename Word<sizeof(T)>::type*>(p);
  return *reinterpret_cast<const T*>(&word);
}
template <class T>
FASTGPT_PRIM void stg(T* p, T value) {
  using W = typename Word<sizeof(T)>::type;
  *reinterpret_cast<W*>(p) = *reinterpret_cast<const W*>(&value);
}

// Shared memory, likewise, from 2 bytes on.
template <class T>
FASTGPT_PRIM T lds(Shared<T> p) {
  const typename Word<sizeof(T)>::type word = *reinterpret_cast<const typename Word<sizeof(T)>::type*>(p.address());
  return *reinterpret_cast<const T*>(&word);
}
template <class T>
FASTGPT_PRIM void sts(Shared<T> p, T value) {
  using W = typename Word<sizeof(T)>::type;
  *reinterpret_cast<W*>(p.address()) = *reinterpret_cast<const W*>(&value);
}

template <class T>
FASTGPT_PRIM uint32_t shared_address(Shared<T> p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p.address()));
}

// Four 8 x 8 matrices of 16-bit elements for the warp. Lane l gives the address of row l % 8 of matrix l / 8, 16 bytes,
// aligned to 16; of matrix i, it gets elements 2 * (l % 4) and the next of row l / 4 in out[i].
template <class T>
FASTGPT_PRIM void ldmatrix_x4(uint32_t (&out)[4], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices: elements l / 4 of rows 2 * (l % 4) and the next.
template <class T>
FASTGPT_PRIM void ldmatrix_x4_trans(uint32_t (&out)[4], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16 x 8, fp32) += a (16 x 16) * b (16 x 8) on the warp's tensor core. With g = lane / 4 and t = lane % 4, a lane
// holds c[0..1] = C[g][2t, 2t + 1], c[2..3] = C[g + 8][2t, 2t + 1]; a[0] = A[g][2t, 2t + 1], a[1] = A[g + 8][2t, ...],
// a[2] = A[g][2t + 8, ...], a[3] = A[g + 8][2t + 8, ...]; b0 = B[2t, 2t + 1][g], b1 = B[2t + 8, 2t + 9][g].
template <class T>
FASTGPT_PRIM void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
FASTGPT_PRIM void mma_m16n8k16<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
FASTGPT_PRIM void mma_m16n8k16<fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Starts a copy of 16 bytes from global to shared memory that passes by the registers; 16 zeros where not `valid`, and
// then `from` is not read. Both addresses are aligned to 16 bytes.
template <class T>
FASTGPT_PRIM void cp_async_16(Shared<T> to, const T* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
// Puts the copies that this thread has started since the last call into a group.
FASTGPT_PRIM void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the newest kPending groups of this thread have landed; other threads see them after a barrier.
template <int kPending>
FASTGPT_PRIM void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A barrier of `count` threads, whole warps; `id` is 1 to 15, since 0 is __syncthreads.
FASTGPT_PRIM void bar_sync(int id, int count) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory"); }

// 2^x, off by at most 2 ulp (and 2^-126 or less comes out as 0).
FASTGPT_PRIM float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Lets a kernel have all the dynamic shared memory of the current device, where by itself it has 48 KB less what it
// declares. Once for each device, and never less again: the limit is the kernel's, not a launch's, and another thread's
// launch may lie between.
template <auto kKernel>
cudaError_t lift_shared_limit() {
  static std::atomic<uint64_t> lifted{0};
  int device = 0, most = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (lifted & bit) return cudaSuccess;
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kKernel)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
    return error;
  }
  most -= static_cast<int>(attributes.sharedSizeBytes);
  if (const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) {
    return error;
  }
  lifted |= bit;
  return cudaSuccess;
}

// launch<kernel>(grid, block, shared_bytes, stream, args...): one block at least, or nothing happens.
// Throws std::runtime_error where the GPU refuses.
template <auto kKernel, class... Args>
void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  cudaError_t error = shared_bytes > 32 * 1024 ? lift_shared_limit<kKernel>() : cudaSuccess;
  if (error == cudaSuccess) kKernel<<<grid, block, shared_bytes, stream>>>(args...);
  const cudaError_t last =
      cudaGetLastError();  // also where the launch did not come about: the next one must not find it
  if (error == cudaSuccess) error = last;
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("fastgpt: a CUDA kernel could not be launched: ") + cudaGetErrorString(error));
  }
}

}  // namespace fastgpt::cuda

#else
#include "../emulator/prims.h"
#endif

namespace fastgpt::cuda {

// A grid of that many blocks, along x: the other dimensions end at 65535.
inline dim3 grid_of(int64_t blocks) {
  if (blocks > INT32_MAX) throw std::runtime_error("fastgpt: a tensor is too large for a CUDA kernel's grid");
  return dim3(static_cast<unsigned>(blocks));
}

FASTGPT_PRIM int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
FASTGPT_PRIM int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }

FASTGPT_PRIM float to_float(float x) { return x; }
FASTGPT_PRIM float to_float(bf16 x) { return __bfloat162float(x); }
FASTGPT_PRIM float to_float(fp16 x) { return __half2float(x); }

template <class T>
FASTGPT_PRIM T from_float(float x);
template <>
FASTGPT_PRIM float from_float<float>(float x) {
  return x;
}
template <>
FASTGPT_PRIM bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
FASTGPT_PRIM fp16 from_float<fp16>(float x) {
  return __float2half_rn(x);
}

// Two numbers rounded to T and packed as mma takes them, `low` in the lower half.
template <class T>
FASTGPT_PRIM uint32_t pack(float low, float high);
template <>
FASTGPT_PRIM uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
template <>
FASTGPT_PRIM uint32_t pack<fp16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// Sums and maxima over the warp: every lane gets the same bits.
FASTGPT_PRIM float warp_sum(float x) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}
FASTGPT_PRIM float warp_max(float x) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}

}  // namespace fastgpt::cuda
