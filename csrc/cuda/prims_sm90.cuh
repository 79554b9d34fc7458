// The primitives of Hopper's own kernels, beside those of prims.cuh: barriers in shared memory (mbarrier), copies of
// whole tiles that count down on them (TMA) and products of a warpgroup, four warps, that read their operands from
// shared memory while the warps go on (wgmma). Only for sm_90a; nothing else has them all.

#pragma once

#include <type_traits>

#include "prims.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace fastgpt::cuda {

constexpr int kWarpgroupSize = 4 * kWarpSize;

// A tensor (dim3, dim2, dim1, dim0) of 2-byte elements in global memory, of which TMA copies boxes (1, 1, box_rows,
// 64): 128 bytes a row. What lies outside of the tensor is copied as zero.
struct TensorMapShape {
  const void* data;    // aligned to 16 bytes
  int64_t size[4];     // dim0, along which elements are neighbours, first; each 1 to 2^32
  int64_t strides[3];  // of dim1, dim2, dim3 in elements; multiples of 8, below 2^39
  int box_rows;        // 1 to 256
};

}  // namespace fastgpt::cuda

#ifdef __CUDACC__

namespace fastgpt::cuda {

// What TMA knows of a tensor. A kernel takes it as a `const __grid_constant__ TensorMap`.
struct TensorMap {
  CUtensorMap map;
};

// A function of the driver. It is asked of the runtime, so that nothing is linked to a driver that may not be there.
template <class Function>
Function* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // it is told here, and not to be found again by the next launch
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error(std::string("fastgpt: the CUDA driver has no ") + name + "; it is older than CUDA 12.0");
  }
  return reinterpret_cast<Function*>(function);
}

// Throws std::runtime_error where the driver refuses.
inline TensorMap make_tensor_map(const TensorMapShape& x) {
  static const auto current_context = driver_function<decltype(cuCtxGetCurrent)>("cuCtxGetCurrent");
  static const auto encode = driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  // The driver wants a context, which a thread that has made no call of the runtime's, as autograd's may be, lacks.
  CUcontext context = nullptr;
  current_context(&context);
  int device = 0;
  if (context == nullptr && cudaGetDevice(&device) == cudaSuccess) cudaSetDevice(device);
  TensorMap made;
  cuuint64_t size[4], stride_bytes[3];
  for (int i = 0; i < 4; ++i) size[i] = static_cast<cuuint64_t>(x.size[i]);
  for (int i = 0; i < 3; ++i) stride_bytes[i] = static_cast<cuuint64_t>(x.strides[i]) * 2;
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(x.box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  // Bytes are copied, not numbers: either 16-bit type will do.
  const CUresult error = encode(&made.map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(x.data), size,
                                stride_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) {
    throw std::runtime_error("fastgpt: the CUDA driver refuses a tensor map (error " + std::to_string(error) + ")");
  }
  return made;
}

// Of the current device: 90 is 9.0.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

// A barrier of 8 bytes in shared memory. Its phase ends when `arrivals` have come and the bytes that were announced
// have landed; then the next one begins. One thread makes it, and fences; the others may use it after a __syncthreads.
FASTGPT_PRIM void mbar_init(Shared<uint64_t> bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}
// Makes this thread's mbar_init visible to TMA.
FASTGPT_PRIM void mbar_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FASTGPT_PRIM void mbar_arrive(Shared<uint64_t> bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
// Arrives, and announces that `bytes` more will land in this phase.
FASTGPT_PRIM void mbar_arrive_expect(Shared<uint64_t> bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}
// Waits until the phase of that parity has ended: the first phase has parity 0, and the one before it, parity 1, counts
// as ended.
FASTGPT_PRIM void mbar_wait(Shared<uint64_t> bar, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n"
      "}" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
}

// Starts the copy of the box at (at3, at2, at1, at0), box_rows * 128 bytes, to `to`, aligned to 1024 bytes; they count
// down on `bar`. In shared memory, 16-byte chunk c of row r is at chunk c ^ r % 8 of the row. One thread calls it.
template <class T>
FASTGPT_PRIM void tma_load(Shared<T> to, const TensorMap& from, Shared<uint64_t> bar, int at0, int at1, int at2,
                           int at3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&from.map), "r"(shared_address(bar)), "r"(at0), "r"(at1), "r"(at2), "r"(at3)
      : "memory");
}

// Before a warp's first wgmma, and before the first after it touched the registers of one.
FASTGPT_PRIM void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Puts the products that the warp has started since the last call into a group.
FASTGPT_PRIM void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the newest kPending groups are done: their registers may be touched, and what they read
// overwritten.
template <int kPending>
FASTGPT_PRIM void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// What the compiler is not to move before the wgmma_wait above: reads of d. To it the products ended where they began.
template <int kN>
FASTGPT_PRIM void wgmma_landed(float (&d)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
  }
}

// From here on each thread of the warpgroup has kRegisters, a multiple of 8 in [24, 256]: fewer than before, or more,
// once other warpgroups have given theirs up. All four warps call it.
template <int kRegisters>
FASTGPT_PRIM void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FASTGPT_PRIM void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Pieces of the products below: 32 registers of d from d[n] on; the names of the first 32 or 64 operands; and what
// comes before them, where operand `add` says whether the old d counts.
#define FASTGPT_D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define FASTGPT_D32(n)                                                                                          \
  FASTGPT_D4(n), FASTGPT_D4(n + 1), FASTGPT_D4(n + 2), FASTGPT_D4(n + 3), FASTGPT_D4(n + 4), FASTGPT_D4(n + 5), \
      FASTGPT_D4(n + 6), FASTGPT_D4(n + 7)
#define FASTGPT_NAMES_32                                                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FASTGPT_NAMES_64                                                                                             \
  FASTGPT_NAMES_32                                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTGPT_WGMMA(shape, dtype, add)  \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " add \
  ", 0;\n"                                \
  "wgmma.mma_async.sync.aligned." shape ".f32." dtype "." dtype " "

// d (64 x 128, fp32) = a (64 x 16) b^T, + d where `add`; b is 128 x 16. Both operands are in shared memory, as
// wgmma_tile describes them. Warp w of the warpgroup has rows 16 * w to 16 * w + 15, as mma_m16n8k16's c: d[n] is of
// columns 8 * n to 8 * n + 7.
template <class T>
FASTGPT_PRIM void wgmma_m64n128k16(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
#define FASTGPT_WGMMA_AB(dtype)                                                                            \
  asm volatile(FASTGPT_WGMMA("m64n128k16", dtype, "%66") FASTGPT_NAMES_64 "}, %64, %65, p, 1, 1, 0, 0;\n}" \
               : FASTGPT_D32(0), FASTGPT_D32(8)                                                            \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<T, bf16>) {
    FASTGPT_WGMMA_AB("bf16");
  } else {
    FASTGPT_WGMMA_AB("f16");
  }
#undef FASTGPT_WGMMA_AB
}

// d (64 x 8 * kN, fp32) += a (64 x 16) b (16 x 8 * kN): a is in registers, as mma_m16n8k16's, b in shared memory.
template <class T, int kN>
FASTGPT_PRIM void wgmma_m64k16(float (&d)[kN][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kN == 8 || kN == 16);
#define FASTGPT_WGMMA_B64(dtype)                                         \
  asm volatile(FASTGPT_WGMMA("m64n64k16", dtype, "%37") FASTGPT_NAMES_32 \
               "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"            \
               : FASTGPT_D32(0)                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1))
#define FASTGPT_WGMMA_B128(dtype)                                         \
  asm volatile(FASTGPT_WGMMA("m64n128k16", dtype, "%69") FASTGPT_NAMES_64 \
               "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"             \
               : FASTGPT_D32(0), FASTGPT_D32(8)                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1))
  if constexpr (kN == 8 && std::is_same_v<T, bf16>) {
    FASTGPT_WGMMA_B64("bf16");
  } else if constexpr (kN == 8) {
    FASTGPT_WGMMA_B64("f16");
  } else if constexpr (std::is_same_v<T, bf16>) {
    FASTGPT_WGMMA_B128("bf16");
  } else {
    FASTGPT_WGMMA_B128("f16");
  }
#undef FASTGPT_WGMMA_B64
#undef FASTGPT_WGMMA_B128
}

}  // namespace fastgpt::cuda

#else
#include "../emulator/prims_sm90.h"
#endif

namespace fastgpt::cuda {

// A tile of 128-byte rows in shared memory, as tma_load leaves it, for wgmma. Of more than 64 columns, the next 64
// begin `next_columns` bytes after these. (PTX's matrix descriptor, whose numbers are in units of 16 bytes: bits 0 to
// 13 say where, 16 to 29 how far apart the columns are, 32 to 45 how far apart groups of eight rows; bit 62 stands for
// the swizzle of 128 bytes.)
template <class T>
FASTGPT_PRIM uint64_t wgmma_tile(Shared<T> at, int next_columns) {
  const uint64_t address = (shared_address(at) & 0x3ffff) >> 4;
  return address | static_cast<uint64_t>(next_columns >> 4) << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
// The same tile from another row or column on: `bytes` further.
FASTGPT_PRIM uint64_t wgmma_tile_at(uint64_t tile, int bytes) { return tile + (bytes >> 4); }

}  // namespace fastgpt::cuda
