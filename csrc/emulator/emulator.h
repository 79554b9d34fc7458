// Runs CUDA kernels on a CPU: what a kernel's source sees instead of the CUDA compiler's built-in names.
//
// Each CUDA thread of a block is a fiber; the fibers of a block share one OS thread and switch only where threads of a
// GPU wait for each other: at barriers and at operations of a whole warp. Blocks go to several OS threads. Which fiber
// runs next is the schedule's choice (Order), so that a kernel which relies on luck loses it. Every access to shared
// memory passes check_shared(), which knows by vector clocks which accesses the barriers order: a race, a read of what
// nothing has written or of a copy that nobody waited for is an error with its file and line in every schedule.
// emulator.cpp does the work.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>  // types alone: nothing of the CUDA runtime is linked
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __shared__ shared_memory_is_declared_by_SHARED_or_DYNAMIC_SHARED_of_prims_cuh
#define __launch_bounds__(...)
#define __grid_constant__

namespace fastgpt::emulator {

// A rule of CUDA that a kernel broke: what, where, and which kernel, block and thread.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A place in a kernel's source. Functions take one as their last argument, and its default is their caller's place.
struct Site {
  const char* file;
  int line;
  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};
#define FASTGPT_SITE ::fastgpt::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

// A CUDA thread, as far as kernels see it.
struct Thread {
  uint3 index;
  int linear;  // in its block
  int lane;
  const uint3* block_index;
  const dim3* block_dim;
  const dim3* grid_dim;
};
extern thread_local Thread* current;

// Waits for `count` threads (0: all of the block that still run) at barrier `id`.
void barrier(int id, int count, const char* name, Site site);
// The same of 1 to 15 and whole warps; all else is an error.
void named_barrier(int id, int count, const char* name, Site site);
void sync_warp(unsigned mask, Site site);

// One operand and one result per lane.
constexpr int kOperandBytes = 64;
struct Lanes {
  alignas(16) unsigned char in[32][kOperandBytes];
  alignas(16) unsigned char out[32][kOperandBytes];
  template <class T>
  T& operand(int lane) {
    return *reinterpret_cast<T*>(in[lane]);
  }
  template <class T>
  T& result(int lane) {
    return *reinterpret_cast<T*>(out[lane]);
  }
};
// An operation of all lanes in `mask`: each hands in its operand, the last one to arrive runs `compute` for all of
// them.
void collective(unsigned mask, const void* operand, size_t operand_size, void* result, size_t result_size,
                void (*compute)(Lanes&, unsigned mask), const char* name, Site site);

template <class Out, class In>
Out collective(unsigned mask, const In& operand, void (*compute)(Lanes&, unsigned), const char* name, Site site) {
  static_assert(sizeof(In) <= kOperandBytes && sizeof(Out) <= kOperandBytes);
  Out result;
  collective(mask, &operand, sizeof(In), &result, sizeof(Out), compute, name, site);
  return result;
}

// The block's array that belongs to `tag`, made when its first thread asks for it.
void* shared_array(const void* tag, size_t bytes, Site site);
// The array whose size the launch states, which the kernel wants aligned so.
void* dynamic_shared(size_t alignment);
// Where Hopper's instructions find what lies at p, in the array of dynamic_shared or right behind it.
uint32_t shared_address(const void* p, Site site);

enum class Access { read, write };
// Throws where a thread may not do this: out of bounds, misaligned, a race, nothing written there yet.
void check_shared(const void* p, size_t bytes, Access access, const char* name, Site site);
void check_matrix_row(const void* row, const char* name, Site site);
void check_global(const void* p, size_t bytes, Access access, const char* name, Site site);

void copy_async(void* to, const void* from, bool valid, Site site);
void commit_async();
void wait_async(int pending, Site site);

// Barriers in shared memory: cuda/prims_sm90.cuh says what they do. Who arrives announces that so many bytes will land.
void init_mbarrier(void* bar, int arrivals, Site site);
void fence_mbarriers();
void arrive_at_mbarrier(void* bar, int bytes, const char* name, Site site);
void wait_for_mbarrier(void* bar, int parity, Site site);

// What TMA copies: of a tensor of 2-byte elements the box (1, 1, rows, 64) that begins at at[3] to at[0].
struct Box {
  const void* data;
  int64_t size[4], strides[3];
  int rows;
  int64_t at[4];
};
void load_box(void* to, const Box& from, void* bar, Site site);

// A wgmma, as a lane hands it in.
struct Product {
  float (*d)[4];
  uint64_t a, b;           // descriptors
  uint32_t a_elements[4];  // a's, where it is in registers; then b is 16 x n and not n x 16
  int n;
  bool a_in_registers, add;
  void (*widen)(const uint16_t* from, float* to, int n);
};
void start_product(const Product& product, const char* name, Site site);
void fence_products(Site site);
void commit_products(Site site);
void wait_for_products(int pending, Site site);

// One ldmatrix of the warp, for the counters: the 32 addresses of its rows.
void count_matrix_rows(const void* const rows[32]);
void count_mma();

// Throws Error with the message, and where this thread is.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Runs body(context) as every thread of the grid. `signature` names the kernel, as the compiler spells it.
void launch(const char* signature, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context,
            Site site);

template <class T>
T shuffle(unsigned mask, T value, int source, const char* name, Site site) {
  struct In {
    T value;
    int source;
  };
  return collective<T>(
      mask, In{value, source},
      [](Lanes& lanes, unsigned active) {
        for (int lane = 0; lane < 32; ++lane) {
          if (!(active >> lane & 1)) continue;
          const int from = lanes.operand<In>(lane).source;
          if (active >> from & 1) {
            lanes.result<T>(lane) = lanes.operand<In>(from).value;
          } else {  // undefined on a GPU
            memset(lanes.out[lane], 0xff, sizeof(T));
          }
        }
      },
      name, site);
}

}  // namespace fastgpt::emulator

// CUDA's names.
#define threadIdx (::fastgpt::emulator::current->index)
#define blockIdx (*::fastgpt::emulator::current->block_index)
#define blockDim (*::fastgpt::emulator::current->block_dim)
#define gridDim (*::fastgpt::emulator::current->grid_dim)

inline void __syncthreads(FASTGPT_SITE) { ::fastgpt::emulator::barrier(0, 0, "__syncthreads", site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, FASTGPT_SITE) { ::fastgpt::emulator::sync_warp(mask, site); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, FASTGPT_SITE) {
  return ::fastgpt::emulator::shuffle(mask, value, source & 31, "__shfl_sync", site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, FASTGPT_SITE) {
  return ::fastgpt::emulator::shuffle(mask, value, (::fastgpt::emulator::current->lane ^ flip) & 31, "__shfl_xor_sync",
                                      site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, FASTGPT_SITE) {
  const int lane = ::fastgpt::emulator::current->lane, source = lane + delta;
  return ::fastgpt::emulator::shuffle(mask, value, source < 32 ? source : lane, "__shfl_down_sync", site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, FASTGPT_SITE) {
  const int lane = ::fastgpt::emulator::current->lane, source = lane - delta;
  return ::fastgpt::emulator::shuffle(mask, value, source >= 0 ? source : lane, "__shfl_up_sync", site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, FASTGPT_SITE) {
  return ::fastgpt::emulator::collective<unsigned>(
      mask, predicate,
      [](::fastgpt::emulator::Lanes& lanes, unsigned active) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; ++lane) {
          if (active >> lane & 1 && lanes.operand<int>(lane)) votes |= 1u << lane;
        }
        for (int lane = 0; lane < 32; ++lane) {  // the others' results may not have been fetched yet
          if (active >> lane & 1) lanes.result<unsigned>(lane) = votes;
        }
      },
      "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int predicate, FASTGPT_SITE) { return __ballot_sync(mask, predicate, site) != 0; }
inline int __all_sync(unsigned mask, int predicate, FASTGPT_SITE) {
  return __ballot_sync(mask, predicate, site) == mask;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;  // so that no compiler fuses it with an addition
  return product;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::max;
using std::min;
