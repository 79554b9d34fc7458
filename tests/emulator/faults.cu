// Small kernels, each with one planted fault, and right without it. tests/test_emulator.py holds the emulator to
// finding each of them, at the line that says FAULT.

#include "../../csrc/cuda/prims_sm90.cuh"
#include "kernels.h"

namespace fastgpt::cuda::testing {
namespace {

constexpr int kThreads = 64;  // two warps

FASTGPT_PRIM int tid() { return static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); }

// In one block of the grid only, and not the first, so that the error has to say which.
FASTGPT_PRIM bool here(bool planted) { return planted && blockIdx.x == 1 && blockIdx.y == 1; }

// ---- barriers ----

__global__ void barrier_in_two_places(bool planted, float*) {
  if (here(planted) && tid() >= 32) {
    __syncthreads();  // FAULT barrier_in_two_places
  } else {
    __syncthreads();  // OTHER barrier_in_two_places
  }
}

// Threads that have left are not waited for.
__global__ void barrier_after_some_left(bool, float*) {
  if (tid() % 32 >= 20) return;
  bar_sync(1 + tid() / 32, 32);
  __syncthreads();
  if (tid() >= 32) return;
  __syncthreads();
}

__global__ void barrier_and_warp(bool planted, float*) {
  if (!here(planted) || tid() % 32 < 16) {
    __syncthreads();  // FAULT barrier_and_warp
  } else {
    __syncwarp();  // OTHER barrier_and_warp
  }
}

__global__ void named_barrier_of_too_many(bool planted, float*) {
  if (tid() < 32) bar_sync(1, here(planted) ? 64 : 32);  // FAULT named_barrier_of_too_many
}

__global__ void named_barrier_with_two_counts(bool planted, float*) {
  bar_sync(1, here(planted) && tid() >= 32 ? 32 : 64);  // FAULT named_barrier_with_two_counts
}

__global__ void named_barrier_of_part_of_a_warp(bool planted, float*) {
  if (here(planted) ? tid() % 32 < 16 : tid() < 32) bar_sync(1, 32);  // FAULT named_barrier_of_part_of_a_warp
  __syncthreads();                                                    // OTHER named_barrier_of_part_of_a_warp
}

__global__ void named_barrier_of_no_whole_warp(bool planted, float*) {
  bar_sync(1, here(planted) ? 48 : 64);  // FAULT named_barrier_of_no_whole_warp
}

__global__ void named_barrier_beyond_15(bool planted, float*) {
  bar_sync(here(planted) ? 16 : 15, 64);  // FAULT named_barrier_beyond_15
}

// ---- operations of a warp ----

__global__ void warp_in_two_operations(bool planted, float* data) {
  float x = 1.0f;
  if (here(planted) && tid() % 32 == 7) {
    x = __shfl_down_sync(kFullMask, x, 1);  // FAULT warp_in_two_operations
  } else {
    x = __shfl_xor_sync(kFullMask, x, 1);  // OTHER warp_in_two_operations
  }
  stg(data + tid() + 64 * (blockIdx.x + 2 * blockIdx.y), x);
}

__global__ void warp_with_two_masks(bool planted, float*) {
  const bool high = tid() % 32 >= 16;
  if (here(planted)) {
    __ballot_sync(high ? 0xffff0000u : kFullMask, 1);  // FAULT warp_with_two_masks
  } else {
    __ballot_sync(high ? 0xffff0000u : 0x0000ffffu, 1);
  }
}

__global__ void warp_in_two_places(bool planted, float*) {
  if (here(planted) && tid() % 32 >= 16) {
    __syncwarp();  // FAULT warp_in_two_places
  } else {
    __syncwarp();  // OTHER warp_in_two_places
  }
}

__global__ void lane_outside_its_mask(bool planted, float*) {
  __syncwarp(here(planted) ? 0xfffffff7u : kFullMask);  // FAULT lane_outside_its_mask
}

__global__ void warp_waits_for_who_left(bool planted, float*) {
  if (tid() % 32 >= 30) return;
  __any_sync(here(planted) ? kFullMask : 0x3fffffffu, 1);  // FAULT warp_waits_for_who_left
}

// ---- bounds and alignment ----

__global__ void shared_beyond_its_end(bool planted, float*) {
  SHARED(float, array, kThreads);
  sts(array + (tid() + (here(planted) ? 1 : 0)), 1.0f);  // FAULT shared_beyond_its_end
}

__global__ void shared_before_its_begin(bool planted, float*) {
  SHARED(float, array, kThreads);
  sts(array + tid(), 1.0f);
  lds(array + (tid() - (here(planted) ? 1 : 0)));  // FAULT shared_before_its_begin
}

__global__ void dynamic_shared_beyond_its_end(bool planted, float*) {  // of 64 floats
  DYNAMIC_SHARED(float, array);
  sts(array + (tid() + (here(planted) ? 1 : 0)), 1.0f);  // FAULT dynamic_shared_beyond_its_end
}

__global__ void dynamic_shared_of_no_size(bool planted, float*) {
  DYNAMIC_SHARED(float, array);
  if (here(planted)) sts(array + tid(), 1.0f);  // FAULT dynamic_shared_of_no_size
}

__global__ void lds_misaligned(bool planted, float*) {
  SHARED(float, array, 4 * kThreads + 4);
  sts((array + 4 * tid()).as<Vec<float, 4>>(), Vec<float, 4>{});
  __syncthreads();
  lds((array + (4 * tid() + (here(planted) ? 2 : 0))).as<Vec<float, 4>>());  // FAULT lds_misaligned
}

__global__ void sts_misaligned(bool planted, float*) {
  SHARED(bf16, array, 2 * kThreads + 2);
  sts((array + (2 * tid() + (here(planted) ? 1 : 0))).as<Vec<bf16, 2>>(), Vec<bf16, 2>{});  // FAULT sts_misaligned
}

__global__ void ldg_misaligned(bool planted, float* data) {
  ldg(reinterpret_cast<const Vec<float, 4>*>(data + 4 * tid() + (here(planted) ? 1 : 0)));  // FAULT ldg_misaligned
}

__global__ void stg_misaligned(bool planted, float* data) {
  const unsigned block = blockIdx.x + 2 * blockIdx.y;
  float* to = data + 128 * block + 2 * tid() + (here(planted) ? 1 : 0);
  stg(reinterpret_cast<Vec<float, 2>*>(to), Vec<float, 2>{});  // FAULT stg_misaligned
}

__global__ void ldg_of_null(bool planted, float* data) {
  ldg(here(planted) ? nullptr : data + tid());  // FAULT ldg_of_null
}

__global__ void stg_to_null(bool planted, float* data) {
  stg(here(planted) ? nullptr : data + tid() + 64 * (blockIdx.x + 2 * blockIdx.y), 1.0f);  // FAULT stg_to_null
}

__global__ void ldmatrix_misaligned(bool planted, float*) {
  SHARED(bf16, tile, kThreads * 8 + 8);
  sts((tile + 8 * tid()).as<Vec<bf16, 8>>(), Vec<bf16, 8>{});
  __syncthreads();
  uint32_t out[4];
  ldmatrix_x4(out, tile + (8 * tid() + (here(planted) ? 4 : 0)));  // FAULT ldmatrix_misaligned
}

__global__ void copy_to_misaligned(bool planted, float* data) {
  SHARED(float, tile, 4 * kThreads + 4);
  cp_async_16(tile + (4 * tid() + (here(planted) ? 2 : 0)), data + 4 * tid());  // FAULT copy_to_misaligned
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void copy_from_misaligned(bool planted, float* data) {
  SHARED(float, tile, 4 * kThreads);
  cp_async_16(tile + 4 * tid(), data + 4 * tid() + (here(planted) ? 2 : 0));  // FAULT copy_from_misaligned
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void copy_from_null(bool planted, float*) {
  SHARED(float, tile, 4 * kThreads);
  const float* nothing = nullptr;
  cp_async_16(tile + 4 * tid(), nothing, here(planted));  // FAULT copy_from_null
  cp_async_commit();
  cp_async_wait<0>();
}

// ---- who wrote what, and when ----

__global__ void uninitialised_read(bool planted, float* data) {
  SHARED(float, array, kThreads);
  if (!here(planted) || tid() != 37) sts(array + tid(), 1.0f);
  __syncthreads();
  const float x = lds(array + tid());  // FAULT uninitialised_read
  stg(data + tid() + 64 * (blockIdx.x + 2 * blockIdx.y), x);
}

// Half of what it reads was written.
__global__ void half_initialised_read(bool planted, float*) {
  SHARED(bf16, array, 2 * kThreads);
  sts(array + 2 * tid(), bf16());
  if (!here(planted)) sts(array + (2 * tid() + 1), bf16());
  lds((array + 2 * tid()).as<Vec<bf16, 2>>());  // FAULT half_initialised_read
}

__global__ void read_after_write(bool planted, float*) {
  SHARED(float, array, kThreads);
  sts(array + tid(), 1.0f);  // OTHER read_after_write
  if (!here(planted)) __syncthreads();
  lds(array + (tid() + 32) % 64);  // FAULT read_after_write
}

__global__ void write_after_read(bool planted, float*) {
  SHARED(float, array, kThreads);
  sts(array + tid(), 1.0f);
  __syncthreads();
  if (tid() >= 32) lds(array + (tid() - 32));  // OTHER write_after_read
  if (!here(planted)) __syncthreads();
  if (tid() < 32) sts(array + tid(), 2.0f);  // FAULT write_after_read
}

__global__ void write_after_write(bool planted, float*) {
  SHARED(float, array, kThreads);
  sts(array + tid(), 1.0f);  // OTHER write_after_write
  if (!here(planted)) __syncthreads();
  sts(array + (tid() + 32) % 64, 2.0f);  // FAULT write_after_write
}

__global__ void read_after_write_in_a_warp(bool planted, float*) {
  SHARED(float, array, kThreads);
  sts(array + tid(), 1.0f);  // OTHER read_after_write_in_a_warp
  if (here(planted)) {
    __shfl_xor_sync(kFullMask, 1.0f, 1);  // orders no memory
  } else {
    __syncwarp();
  }
  lds(array + (tid() ^ 1));  // FAULT read_after_write_in_a_warp
}

// Each half has a barrier of its own, and what one half wrote is for that half.
__global__ void read_across_named_barriers(bool planted, float*) {
  SHARED(float, array, kThreads);
  const int half = tid() / 32;
  sts(array + tid(), 1.0f);  // OTHER read_across_named_barriers
  bar_sync(1 + half, 32);
  const int from = here(planted) ? (tid() + 32) % 64 : 32 * half + (tid() + 1) % 32;
  lds(array + from);  // FAULT read_across_named_barriers
}

// ---- asynchronous copies ----

__global__ void copy_not_waited_for(bool planted, float* data) {
  SHARED(float, tile, 4 * kThreads);
  cp_async_16(tile + 4 * tid(), data + 4 * tid());  // OTHER copy_not_waited_for
  cp_async_commit();
  if (!here(planted)) cp_async_wait<0>();
  __syncthreads();
  lds(tile + tid());  // FAULT copy_not_waited_for
}

__global__ void copy_of_another_without_barrier(bool planted, float* data) {
  SHARED(float, tile, 4 * kThreads);
  cp_async_16(tile + 4 * tid(), data + 4 * tid());  // OTHER copy_of_another_without_barrier
  cp_async_commit();
  cp_async_wait<0>();
  if (!here(planted)) __syncthreads();
  lds(tile + (4 * tid() + 128) % 256);  // FAULT copy_of_another_without_barrier
}

__global__ void copy_never_committed(bool planted, float* data) {
  SHARED(float, tile, 4 * kThreads);
  cp_async_16(tile + 4 * tid(), data + 4 * tid());  // OTHER copy_never_committed
  if (!here(planted)) cp_async_commit();
  cp_async_wait<0>();
  lds(tile + 4 * tid());  // FAULT copy_never_committed
}

__global__ void copy_of_the_next_group(bool planted, float* data) {
  SHARED(float, tiles, 8 * kThreads);
  cp_async_16(tiles + 4 * tid(), data + 4 * tid());
  cp_async_commit();
  cp_async_16(tiles + (256 + 4 * tid()), data + 256 + 4 * tid());  // OTHER copy_of_the_next_group
  cp_async_commit();
  cp_async_wait<1>();
  lds(tiles + (4 * tid() + (here(planted) ? 256 : 0)));  // FAULT copy_of_the_next_group
  cp_async_wait<0>();
}

__global__ void copy_into_what_is_being_read(bool planted, float* data) {
  SHARED(float, tile, 4 * kThreads);
  for (int i = 0; i < 2; ++i) {
    cp_async_16(tile + 4 * tid(), data + 256 * i + 4 * tid());  // FAULT copy_into_what_is_being_read
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    lds(tile + (4 * tid() + 128) % 256);  // OTHER copy_into_what_is_being_read
    if (!here(planted)) __syncthreads();
  }
}

__global__ void copy_into_what_is_in_flight(bool planted, float* data) {
  SHARED(float, tiles, 8 * kThreads);
  cp_async_16(tiles + 4 * tid(), data + 4 * tid());  // OTHER copy_into_what_is_in_flight
  cp_async_commit();
  const int slot = here(planted) ? 0 : 256;
  cp_async_16(tiles + (slot + 4 * tid()), data + 256 + 4 * tid());  // FAULT copy_into_what_is_in_flight
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void copy_beyond_the_end(bool planted, float* data) {
  SHARED(float, tile, 4 * kThreads);
  cp_async_16(tile + 4 * tid(), data + 4 * tid());  // FAULT copy_beyond_the_end
  cp_async_commit();
  if (!here(planted)) cp_async_wait<0>();
}

// ---- mbarriers ----

__global__ void mbarrier_of_nobody(bool planted, float*) {
  SHARED(uint64_t, bar, 1);
  if (!here(planted) && tid() == 0) mbar_init(bar, 64);
  __syncthreads();
  mbar_arrive(bar);  // FAULT mbarrier_of_nobody
}

__global__ void mbarrier_too_new(bool planted, float*) {
  SHARED(uint64_t, bar, 1);
  if (tid() == 0) mbar_init(bar, 64);  // OTHER mbarrier_too_new
  if (!here(planted)) __syncthreads();
  mbar_arrive(bar);  // FAULT mbarrier_too_new
}

__global__ void mbarrier_made_twice(bool planted, float*) {
  SHARED(uint64_t, bar, 1);
  if (tid() == 0) mbar_init(bar, 1);                   // OTHER mbarrier_made_twice
  if (tid() == 0 && here(planted)) mbar_init(bar, 1);  // FAULT mbarrier_made_twice
}

__global__ void mbarrier_of_no_arrivals(bool planted, float*) {
  SHARED(uint64_t, bar, 1);
  if (tid() == 0) mbar_init(bar, here(planted) ? 0 : 1);  // FAULT mbarrier_of_no_arrivals
}

__global__ void parity_of_two(bool planted, float*) {
  SHARED(uint64_t, bar, 1);
  if (tid() == 0) mbar_init(bar, 1);
  __syncthreads();
  mbar_wait(bar, here(planted) ? 2 : 1);  // FAULT parity_of_two
}

// One thread of 32 writes, and arrives alone.
__global__ void mbarrier_not_waited_for(bool planted, float*) {
  SHARED(float, value, 1);
  SHARED(uint64_t, bar, 1);
  if (tid() == 0) mbar_init(bar, 1);
  __syncthreads();
  if (tid() == 63) {
    sts(value, 1.0f);  // OTHER mbarrier_not_waited_for
    mbar_arrive(bar);
  }
  if (!here(planted)) mbar_wait(bar, 0);
  lds(value);  // FAULT mbarrier_not_waited_for
}

// Of the lanes that write, one arrives.
__global__ void lane_arrives_for_its_warp(bool planted, float*) {
  SHARED(float, values, 32);
  SHARED(uint64_t, bar, 1);
  if (tid() == 0) mbar_init(bar, 1);
  __syncthreads();
  if (tid() < 32) {
    sts(values + tid(), 1.0f);  // OTHER lane_arrives_for_its_warp
    if (!here(planted)) __syncwarp();
    if (tid() == 31) mbar_arrive(bar);
  } else {
    mbar_wait(bar, 0);
    lds(values + (tid() - 32));  // FAULT lane_arrives_for_its_warp
  }
}

// ---- copies of TMA: 8 rows, 1024 bytes, a part of data ----

FASTGPT_PRIM void make_mbarriers(Shared<uint64_t> bars, int count, int arrivals) {
  if (tid() == 0) {
    for (int i = 0; i < count; ++i) mbar_init(bars + i, arrivals);
    mbar_fence_init();
  }
  __syncthreads();
}

__global__ void box_not_waited_for(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(float, tile, 1024);
  SHARED(uint64_t, full, 1);
  make_mbarriers(full, 1, 1);
  if (tid() == 0) mbar_arrive_expect(full, 1024);
  if (tid() == 0) tma_load(tile, map, full, 0, 0, 0, 0);  // OTHER box_not_waited_for
  __syncthreads();
  if (!here(planted)) mbar_wait(full, 0);
  lds(tile + tid());  // FAULT box_not_waited_for
}

__global__ void lane_waits_for_its_warp(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(float, tile, 1024);
  SHARED(uint64_t, full, 1);
  make_mbarriers(full, 1, 1);
  if (tid() == 0) mbar_arrive_expect(full, 1024);
  if (tid() == 0) tma_load(tile, map, full, 0, 0, 0, 0);  // OTHER lane_waits_for_its_warp
  __syncthreads();
  if (tid() % 32 == 0) mbar_wait(full, 0);
  if (here(planted)) {
    __shfl_xor_sync(kFullMask, 1.0f, 1);  // orders no memory
  } else {
    __syncwarp();
  }
  lds(tile + tid());  // FAULT lane_waits_for_its_warp
}

__global__ void box_never_waited_for(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(float, tile, 1024);
  SHARED(uint64_t, full, 1);
  make_mbarriers(full, 1, 1);
  if (tid() == 0) mbar_arrive_expect(full, 1024);
  if (tid() == 0) tma_load(tile, map, full, 0, 0, 0, 0);  // FAULT box_never_waited_for
  if (!here(planted)) mbar_wait(full, 0);
}

__global__ void one_arrival_too_many(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(float, tile, 1024);
  SHARED(uint64_t, full, 1);
  make_mbarriers(full, 1, 1);
  if (tid() < (here(planted) ? 2 : 1)) mbar_arrive_expect(full, 1024);  // FAULT one_arrival_too_many
  __syncthreads();
  if (tid() == 0) tma_load(tile, map, full, 0, 0, 0, 0);
  mbar_wait(full, 0);
}

__global__ void arrival_never_comes(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(float, tile, 1024);
  SHARED(uint64_t, full, 1);
  make_mbarriers(full, 1, 2);
  if (tid() == 0) mbar_arrive_expect(full, 1024);
  if (tid() == 0 && !here(planted)) {
    tma_load(tile, map, full, 0, 0, 0, 0);
    mbar_arrive(full);
  }
  mbar_wait(full, 0);  // FAULT arrival_never_comes
}

__global__ void too_many_bytes_announced(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(float, tile, 1024);
  SHARED(uint64_t, full, 1);
  make_mbarriers(full, 1, 1);
  if (tid() == 0) mbar_arrive_expect(full, here(planted) ? 1536 : 1024);
  if (tid() == 0) tma_load(tile, map, full, 0, 0, 0, 0);
  mbar_wait(full, 0);  // FAULT too_many_bytes_announced
}

__global__ void too_few_bytes_announced(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(float, tile, 1024);
  SHARED(uint64_t, full, 1);
  make_mbarriers(full, 1, 1);
  if (tid() == 0) mbar_arrive_expect(full, here(planted) ? 896 : 1024);
  if (tid() == 0) tma_load(tile, map, full, 0, 0, 0, 0);
  mbar_wait(full, 0);  // FAULT too_few_bytes_announced
}

__global__ void no_bytes_announced(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(float, tile, 1024);
  SHARED(uint64_t, full, 1);
  make_mbarriers(full, 1, 1);
  if (tid() == 0) {
    tma_load(tile, map, full, 0, 0, 0, 0);  // OTHER no_bytes_announced
    if (here(planted)) {
      mbar_arrive(full);
    } else {
      mbar_arrive_expect(full, 1024);
    }
  }
  mbar_wait(full, 0);  // FAULT no_bytes_announced
}

__global__ void mbarrier_not_fenced(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(float, tile, 1024);
  SHARED(uint64_t, full, 1);
  if (tid() == 0) mbar_init(full, 1);  // OTHER mbarrier_not_fenced
  if (tid() == (here(planted) ? 1 : 0)) mbar_fence_init();
  __syncthreads();
  if (tid() == 0) mbar_arrive_expect(full, 1024);
  if (tid() == 0) tma_load(tile, map, full, 0, 0, 0, 0);  // FAULT mbarrier_not_fenced
  mbar_wait(full, 0);
}

__global__ void box_to_misaligned(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(float, tile, 1024);
  SHARED(uint64_t, full, 1);
  make_mbarriers(full, 1, 1);
  if (tid() == 0) mbar_arrive_expect(full, 1024);
  if (tid() == 0) tma_load(tile + (here(planted) ? 128 : 0), map, full, 0, 0, 0, 0);  // FAULT box_to_misaligned
  mbar_wait(full, 0);
}

__global__ void box_to_less_aligned_memory(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED(float, tile);
  if (!here(planted)) {
    DYNAMIC_SHARED_ALIGNED(float, aligned, 1024);
  }
  SHARED(uint64_t, full, 1);
  make_mbarriers(full, 1, 1);
  if (tid() == 0) mbar_arrive_expect(full, 1024);
  if (tid() == 0) tma_load(tile, map, full, 0, 0, 0, 0);  // FAULT box_to_less_aligned_memory
  mbar_wait(full, 0);
}

__global__ void box_to_an_array(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(float, tile, 1024);
  SHARED(float, array, 256);
  SHARED(uint64_t, full, 1);
  make_mbarriers(full, 1, 1);
  if (tid() == 0) mbar_arrive_expect(full, 1024);
  if (tid() == 0) tma_load(here(planted) ? array : tile, map, full, 0, 0, 0, 0);  // FAULT box_to_an_array
  mbar_wait(full, 0);
}

__global__ void box_beyond_the_end(bool planted, float*, const __grid_constant__ TensorMap map) {  // of 24 KB
  DYNAMIC_SHARED_ALIGNED(float, tile, 1024);
  SHARED(uint64_t, full, 1);
  make_mbarriers(full, 1, 1);
  if (tid() == 0) mbar_arrive_expect(full, 1024);
  const Shared<float> to = tile + (here(planted) ? 6 << 10 : 0);
  if (tid() == 0) tma_load(to, map, full, 0, 0, 0, 0);  // FAULT box_beyond_the_end
  mbar_wait(full, 0);
}

// Three boxes through a ring of two.
__global__ void slot_not_waited_for(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(float, slots, 1024);
  SHARED(uint64_t, full, 2);
  SHARED(uint64_t, empty, 2);
  make_mbarriers(full, 2, 1);
  make_mbarriers(empty, 2, 32);
  for (int i = 0; i < 3; ++i) {
    const int slot = i % 2, parity = i / 2 % 2;
    if (tid() == 0) {
      if (!here(planted)) mbar_wait(empty + slot, parity ^ 1);
      mbar_arrive_expect(full + slot, 1024);                           // OTHER slot_not_waited_for
      tma_load(slots + 256 * slot, map, full + slot, 0, 8 * i, 0, 0);  // FAULT slot_not_waited_for
    } else if (tid() >= 32) {
      mbar_wait(full + slot, parity);
      lds(slots + (256 * slot + tid()));
      mbar_arrive(empty + slot);
    }
  }
}

// The lanes read the one slot, and one of them says that they have.
__global__ void slot_released_for_a_warp(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(float, tile, 1024);
  SHARED(uint64_t, full, 1);
  SHARED(uint64_t, empty, 1);
  make_mbarriers(full, 1, 1);
  make_mbarriers(empty, 1, 1);
  for (int i = 0; i < 2; ++i) {
    if (tid() == 0) {
      mbar_wait(empty, i ^ 1);
      mbar_arrive_expect(full, 1024);
      tma_load(tile, map, full, 0, 8 * i, 0, 0);  // FAULT slot_released_for_a_warp
    } else if (tid() >= 32) {
      mbar_wait(full, i);
      lds(tile + tid());  // OTHER slot_released_for_a_warp
      if (!here(planted)) __syncwarp();
      if (tid() == 32) mbar_arrive(empty);
    }
  }
}

// ---- products of a warpgroup: of A (64 x 64) and B (128 x 64), which lie behind each other ----

constexpr int kB = 64 * 64;                // where B begins
constexpr int kOperandBytes = 192 * 128;   // of both
constexpr int kProducer = kWarpgroupSize;  // where there is a fifth warp, its first thread

FASTGPT_PRIM void have_operands(Shared<bf16> tiles, const TensorMap& map, Shared<uint64_t> full) {
  make_mbarriers(full, 1, 1);
  if (tid() == 0) {
    mbar_arrive_expect(full, kOperandBytes);
    for (int i = 0; i < 24; ++i) tma_load(tiles + 512 * i, map, full, 0, 0, 0, 0);
  }
  mbar_wait(full, 0);
}

__global__ void product_without_fence(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(bf16, a, 1024);
  SHARED(uint64_t, full, 1);
  have_operands(a, map, full);
  float d[16][4];
  for (int i = 0; i < 2; ++i) {
    if (!here(planted) || i == 0) wgmma_fence();
    wgmma_m64n128k16<bf16>(d, wgmma_tile(a, 0), wgmma_tile(a + kB, 0), false);  // FAULT product_without_fence
    wgmma_commit();
    wgmma_wait<0>();
  }
}

__global__ void product_never_waited_for(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(bf16, a, 1024);
  SHARED(uint64_t, full, 1);
  have_operands(a, map, full);
  float d[16][4];
  wgmma_fence();
  wgmma_m64n128k16<bf16>(d, wgmma_tile(a, 0), wgmma_tile(a + kB, 0), false);  // FAULT product_never_waited_for
  wgmma_commit();                                                             // OTHER product_never_waited_for
  if (!here(planted)) wgmma_wait<0>();
}

__global__ void product_never_committed(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(bf16, a, 1024);
  SHARED(uint64_t, full, 1);
  have_operands(a, map, full);
  float d[16][4];
  wgmma_fence();
  wgmma_m64n128k16<bf16>(d, wgmma_tile(a, 0), wgmma_tile(a + kB, 0), false);  // FAULT product_never_committed
  if (!here(planted)) wgmma_commit();
  wgmma_wait<0>();
}

__global__ void released_without_wgmma_wait(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(bf16, a, 1024);
  SHARED(uint64_t, full, 1);
  SHARED(uint64_t, empty, 1);
  make_mbarriers(full, 1, 1);
  make_mbarriers(empty, 1, kWarpgroupSize);
  if (tid() == kProducer) {
    for (int i = 0; i < 2; ++i) {
      mbar_wait(empty, i ^ 1);
      mbar_arrive_expect(full, kOperandBytes);
      for (int j = 0; j < 24; ++j) {
        tma_load(a + 512 * j, map, full, 0, 0, 0, 0);  // FAULT released_without_wgmma_wait
      }
    }
  } else if (tid() < kProducer) {
    float d[16][4];
    for (int i = 0; i < 2; ++i) {
      mbar_wait(full, i);
      wgmma_fence();
      wgmma_m64n128k16<bf16>(d, wgmma_tile(a, 0), wgmma_tile(a + kB, 0), i > 0);  // OTHER released_without_wgmma_wait
      wgmma_commit();
      if (!here(planted)) wgmma_wait<0>();
      mbar_arrive(empty);
    }
    wgmma_wait<0>();
  }
}

__global__ void released_before_wgmma_wait(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(bf16, a, 1024);
  SHARED(uint64_t, full, 1);
  SHARED(uint64_t, empty, 1);
  make_mbarriers(full, 1, 1);
  make_mbarriers(empty, 1, kWarpgroupSize);
  if (tid() == kProducer) {
    for (int i = 0; i < 2; ++i) {
      mbar_wait(empty, i ^ 1);
      mbar_arrive_expect(full, kOperandBytes);
      for (int j = 0; j < 24; ++j) {
        tma_load(a + 512 * j, map, full, 0, 0, 0, 0);  // FAULT released_before_wgmma_wait
      }
    }
  } else if (tid() < kProducer) {
    float d[16][4];
    for (int i = 0; i < 2; ++i) {
      mbar_wait(full, i);
      wgmma_fence();
      wgmma_m64n128k16<bf16>(d, wgmma_tile(a, 0), wgmma_tile(a + kB, 0), i > 0);  // OTHER released_before_wgmma_wait
      wgmma_commit();
      if (here(planted)) {
        __syncwarp();
        mbar_arrive(empty);
        __syncwarp();
      }
      wgmma_wait<0>();
      if (!here(planted)) mbar_arrive(empty);
    }
  }
}

__global__ void operand_overwritten(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(bf16, a, 1024);
  SHARED(uint64_t, full, 1);
  have_operands(a, map, full);
  float d[16][4];
  wgmma_fence();
  wgmma_m64n128k16<bf16>(d, wgmma_tile(a, 0), wgmma_tile(a + kB, 0), false);  // FAULT operand_overwritten
  wgmma_commit();
  if (!here(planted)) wgmma_wait<0>();
  __syncthreads();
  if (tid() == 0) sts(a, bf16());  // OTHER operand_overwritten
  wgmma_wait<0>();
}

__global__ void descriptors_of_two_kinds(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(bf16, a, 1024);
  SHARED(uint64_t, full, 1);
  have_operands(a, map, full);
  float d[16][4];
  const uint64_t tile = wgmma_tile_at(wgmma_tile(a, 0), here(planted) && tid() % 32 == 5 ? 32 : 0);
  wgmma_fence();
  wgmma_m64n128k16<bf16>(d, tile, wgmma_tile(a + kB, 0), false);  // FAULT descriptors_of_two_kinds
  wgmma_commit();
  wgmma_wait<0>();
}

__global__ void some_lanes_add(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(bf16, a, 1024);
  SHARED(uint64_t, full, 1);
  have_operands(a, map, full);
  float d[16][4] = {};
  const bool add = !here(planted) || tid() % 32 < 16;
  wgmma_fence();
  wgmma_m64n128k16<bf16>(d, wgmma_tile(a, 0), wgmma_tile(a + kB, 0), add);  // FAULT some_lanes_add
  wgmma_commit();
  wgmma_wait<0>();
}

__global__ void warps_with_different_products(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(bf16, a, 1024);
  SHARED(uint64_t, full, 1);
  have_operands(a, map, full);
  float d[16][4];
  const uint64_t tile = wgmma_tile_at(wgmma_tile(a, 0), here(planted) && tid() / 32 == 2 ? 32 : 0);
  wgmma_fence();
  wgmma_m64n128k16<bf16>(d, tile, wgmma_tile(a + kB, 0), false);  // FAULT warps_with_different_products
  wgmma_commit();
  wgmma_wait<0>();
}

__global__ void warp_without_product(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(bf16, a, 1024);
  SHARED(uint64_t, full, 1);
  have_operands(a, map, full);
  if (here(planted) && tid() / 32 == 3) return;
  float d[16][4];
  wgmma_fence();
  wgmma_m64n128k16<bf16>(d, wgmma_tile(a, 0), wgmma_tile(a + kB, 0), false);  // FAULT warp_without_product
  wgmma_commit();
  wgmma_wait<0>();
}

__global__ void product_of_a_fifth_warp(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(bf16, a, 1024);
  SHARED(uint64_t, full, 1);
  have_operands(a, map, full);
  if (!here(planted) && tid() >= kWarpgroupSize) return;
  float d[16][4];
  wgmma_fence();
  wgmma_m64n128k16<bf16>(d, wgmma_tile(a, 0), wgmma_tile(a + kB, 0), false);  // FAULT product_of_a_fifth_warp
  wgmma_commit();
  wgmma_wait<0>();
}

__global__ void product_of_no_tile(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(bf16, a, 1024);
  SHARED(uint64_t, full, 1);
  have_operands(a, map, full);
  float d[16][4];
  const uint64_t swizzled = uint64_t{1} << 62, tile = wgmma_tile(a, 0) & ~(here(planted) ? swizzled : 0);
  wgmma_fence();
  wgmma_m64n128k16<bf16>(d, tile, wgmma_tile(a + kB, 0), false);  // FAULT product_of_no_tile
  wgmma_commit();
  wgmma_wait<0>();
}

__global__ void product_beyond_the_end(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(bf16, a, 1024);
  SHARED(uint64_t, full, 1);
  have_operands(a, map, full);
  float d[16][4];
  const uint64_t b = wgmma_tile_at(wgmma_tile(a + kB, 0), here(planted) ? 1024 : 0);
  wgmma_fence();
  wgmma_m64n128k16<bf16>(d, wgmma_tile(a, 0), b, false);  // FAULT product_beyond_the_end
  wgmma_commit();
  wgmma_wait<0>();
}

__global__ void operand_not_waited_for(bool planted, float*, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(bf16, a, 1024);
  SHARED(uint64_t, full, 1);
  make_mbarriers(full, 1, 1);
  if (tid() == 0) mbar_arrive_expect(full, kOperandBytes);
  for (int i = 0; tid() == 0 && i < 24; ++i) {
    tma_load(a + 512 * i, map, full, 0, 0, 0, 0);  // OTHER operand_not_waited_for
  }
  if (!here(planted) || tid() % 32 < 31) mbar_wait(full, 0);
  float d[16][4];
  wgmma_fence();
  wgmma_m64n128k16<bf16>(d, wgmma_tile(a, 0), wgmma_tile(a + kB, 0), false);  // FAULT operand_not_waited_for
  wgmma_commit();
  wgmma_wait<0>();
}

__global__ void address_of_an_array(bool planted, float*, const __grid_constant__ TensorMap) {
  DYNAMIC_SHARED_ALIGNED(float, tile, 1024);
  SHARED(float, array, 256);
  shared_address(here(planted) ? array : tile);  // FAULT address_of_an_array
}

// ---- limits ----

__global__ void shared_arrays_of_49_kib(bool planted, float*) {
  SHARED(float, first, 8 << 10);
  sts(first + tid(), 1.0f);
  if (here(planted)) {
    SHARED(float, second, 17 << 8);  // FAULT shared_arrays_of_49_kib
    sts(second + tid(), 1.0f);
  }
}

__global__ void nothing(bool, float*) {}

// ---- what no check sees ----

// Each block adds to what the others add to. Only a schedule, or ThreadSanitizer, tells.
__global__ void race_between_blocks(bool planted, float* data) {
  float* sum = data + (planted ? 0 : blockIdx.x + 2 * blockIdx.y);
  if (tid() == 0) stg(sum, 2.0f * ldg(sum) + static_cast<float>(blockIdx.x));  // FAULT race_between_blocks
}

// A thread reads what another one writes.
__global__ void race_between_threads(bool planted, float* data) {
  float* mine = data + 64 * (blockIdx.x + 2 * blockIdx.y);
  stg(mine + tid(), 1.0f);  // FAULT race_between_threads
  if (!planted) __syncthreads();
  const float x = ldg(mine + (tid() + 1) % 64);  // OTHER race_between_threads
  __syncthreads();
  stg(mine + tid(), x);
}

// The same across an mbarrier.
__global__ void race_past_an_mbarrier(bool planted, float* data) {
  SHARED(uint64_t, bar, 1);
  float* mine = data + 64 * (blockIdx.x + 2 * blockIdx.y);
  make_mbarriers(bar, 1, kThreads);
  stg(mine + tid(), 1.0f);  // FAULT race_past_an_mbarrier
  mbar_arrive(bar);
  if (!planted) mbar_wait(bar, 0);
  const float x = ldg(mine + (tid() + 1) % 64);
  __syncthreads();
  stg(mine + tid(), x);
}

// TMA reads what a thread writes.
__global__ void race_with_a_box(bool planted, float* data, const __grid_constant__ TensorMap map) {
  DYNAMIC_SHARED_ALIGNED(float, tile, 1024);
  SHARED(uint64_t, full, 1);
  const int block = static_cast<int>(blockIdx.x + 2 * blockIdx.y);
  make_mbarriers(full, 1, 1);
  if (planted && tid() == 63) stg(data + 256 * block, 1.0f);  // FAULT race_with_a_box
  if (tid() == 0) mbar_arrive_expect(full, 1024);
  if (tid() == 0) tma_load(tile, map, full, 0, 8 * block, 0, 0);
  mbar_wait(full, 0);
}

// Beyond the 1024 floats there are.
__global__ void global_beyond_its_end(bool planted, float* data) {
  float* mine = data + 64 * (blockIdx.x + 2 * blockIdx.y) + tid();
  const float x = ldg(mine + (here(planted) ? 1024 : 0));  // FAULT global_beyond_its_end
  stg(mine, x);
}

const dim3 kGrid(2, 2), kBlock(32, 2);

template <auto kKernel>
void run(bool planted, float* data) {
  launch<kKernel>(kGrid, kBlock, 0, nullptr, planted, data);
}

// Of data a tensor (1, 1, 32, 64), in boxes of eight rows.
template <auto kKernel, int kWarps = 2>
void run_sm90(bool planted, float* data) {
  const TensorMap map = make_tensor_map({data, {64, 32, 1, 1}, {64, 2048, 2048}, 8});
  launch<kKernel>(kGrid, dim3(32, kWarps), kOperandBytes, nullptr, planted, data, map);
}

void map_of_misaligned_data(bool planted, float* data) {
  make_tensor_map({data + planted, {64, 32, 1, 1}, {64, 2048, 2048}, 8});
}
void map_of_no_size(bool planted, float* data) {
  make_tensor_map({data, {64, 32, planted ? 0 : 1, 1}, {64, 2048, 2048}, 8});
}
void map_of_odd_stride(bool planted, float* data) {
  make_tensor_map({data, {64, 32, 1, 1}, {planted ? 68 : 64, 2048, 2048}, 8});
}
void map_of_large_stride(bool planted, float* data) {
  make_tensor_map({data, {64, 32, 1, 1}, {64, 2048, (int64_t{1} << 39) - (planted ? 0 : 8)}, 8});
}
void map_of_high_box(bool planted, float* data) {
  make_tensor_map({data, {64, 32, 1, 1}, {64, 2048, 2048}, planted ? 257 : 256});
}

void run_with_256_bytes(bool planted, float* data) {
  launch<dynamic_shared_beyond_its_end>(kGrid, kBlock, 256, nullptr, planted, data);
}
void too_much_shared_memory(bool planted, float* data) {
  const size_t most = 227 << 10;
  launch<nothing>(kGrid, kBlock, most + planted, nullptr, planted, data);  // FAULT too_much_shared_memory
}
void block_of_no_threads(bool planted, float* data) {
  launch<nothing>(kGrid, dim3(32, planted ? 0 : 1), 0, nullptr, planted, data);  // FAULT block_of_no_threads
}
void block_of_too_many_threads(bool planted, float* data) {
  launch<nothing>(kGrid, dim3(32, planted ? 33 : 32), 0, nullptr, planted, data);  // FAULT block_of_too_many_threads
}
void block_too_deep(bool planted, float* data) {
  launch<nothing>(kGrid, dim3(1, 1, planted ? 65 : 64), 0, nullptr, planted, data);  // FAULT block_too_deep
}
void grid_too_high(bool planted, float* data) {
  launch<nothing>(dim3(1, planted ? 65536 : 1), kBlock, 0, nullptr, planted, data);  // FAULT grid_too_high
}

}  // namespace

#define RUN(kernel) {#kernel, run<kernel>}
#define RUN_SM90(kernel) {#kernel, run_sm90<kernel>}
#define RUN_WARPS(kernel, warps) {#kernel, run_sm90<kernel, warps>}

const std::map<std::string, Fault>& faults() {
  static const std::map<std::string, Fault> all{
      RUN(barrier_in_two_places),
      RUN(barrier_after_some_left),
      RUN(barrier_and_warp),
      RUN(named_barrier_of_too_many),
      RUN(named_barrier_with_two_counts),
      RUN(named_barrier_of_part_of_a_warp),
      RUN(named_barrier_of_no_whole_warp),
      RUN(named_barrier_beyond_15),
      RUN(warp_in_two_operations),
      RUN(warp_with_two_masks),
      RUN(warp_in_two_places),
      RUN(lane_outside_its_mask),
      RUN(warp_waits_for_who_left),
      RUN(shared_beyond_its_end),
      RUN(shared_before_its_begin),
      RUN(dynamic_shared_of_no_size),
      RUN(lds_misaligned),
      RUN(sts_misaligned),
      RUN(ldg_misaligned),
      RUN(stg_misaligned),
      RUN(ldg_of_null),
      RUN(stg_to_null),
      RUN(ldmatrix_misaligned),
      RUN(copy_to_misaligned),
      RUN(copy_from_misaligned),
      RUN(copy_from_null),
      RUN(uninitialised_read),
      RUN(half_initialised_read),
      RUN(read_after_write),
      RUN(write_after_read),
      RUN(write_after_write),
      RUN(read_after_write_in_a_warp),
      RUN(read_across_named_barriers),
      RUN(copy_not_waited_for),
      RUN(copy_of_another_without_barrier),
      RUN(copy_never_committed),
      RUN(copy_of_the_next_group),
      RUN(copy_into_what_is_being_read),
      RUN(copy_into_what_is_in_flight),
      RUN(copy_beyond_the_end),
      RUN(shared_arrays_of_49_kib),
      RUN(race_between_blocks),
      RUN(race_between_threads),
      RUN(race_past_an_mbarrier),
      RUN_SM90(race_with_a_box),
      RUN(global_beyond_its_end),
      RUN(mbarrier_of_nobody),
      RUN(mbarrier_too_new),
      RUN(mbarrier_made_twice),
      RUN(mbarrier_of_no_arrivals),
      RUN(parity_of_two),
      RUN(mbarrier_not_waited_for),
      RUN(lane_arrives_for_its_warp),
      RUN_SM90(box_not_waited_for),
      RUN_SM90(lane_waits_for_its_warp),
      RUN_SM90(box_never_waited_for),
      RUN_SM90(one_arrival_too_many),
      RUN_SM90(arrival_never_comes),
      RUN_SM90(too_many_bytes_announced),
      RUN_SM90(too_few_bytes_announced),
      RUN_SM90(no_bytes_announced),
      RUN_SM90(mbarrier_not_fenced),
      RUN_SM90(box_to_misaligned),
      RUN_SM90(box_to_less_aligned_memory),
      RUN_SM90(box_to_an_array),
      RUN_SM90(box_beyond_the_end),
      RUN_SM90(slot_not_waited_for),
      RUN_SM90(slot_released_for_a_warp),
      RUN_WARPS(product_without_fence, 4),
      RUN_WARPS(product_never_waited_for, 4),
      RUN_WARPS(product_never_committed, 4),
      RUN_WARPS(released_without_wgmma_wait, 5),
      RUN_WARPS(released_before_wgmma_wait, 5),
      RUN_WARPS(operand_overwritten, 4),
      RUN_WARPS(descriptors_of_two_kinds, 4),
      RUN_WARPS(some_lanes_add, 4),
      RUN_WARPS(warps_with_different_products, 4),
      RUN_WARPS(warp_without_product, 4),
      RUN_WARPS(product_of_a_fifth_warp, 5),
      RUN_WARPS(product_of_no_tile, 4),
      RUN_WARPS(product_beyond_the_end, 4),
      RUN_WARPS(operand_not_waited_for, 4),
      RUN_WARPS(address_of_an_array, 4),
      {"map_of_misaligned_data", map_of_misaligned_data},
      {"map_of_no_size", map_of_no_size},
      {"map_of_odd_stride", map_of_odd_stride},
      {"map_of_large_stride", map_of_large_stride},
      {"map_of_high_box", map_of_high_box},
      {"dynamic_shared_beyond_its_end", run_with_256_bytes},
      {"too_much_shared_memory", too_much_shared_memory},
      {"block_of_no_threads", block_of_no_threads},
      {"block_of_too_many_threads", block_of_too_many_threads},
      {"block_too_deep", block_too_deep},
      {"grid_too_high", grid_too_high},
  };
  return all;
}

}  // namespace fastgpt::cuda::testing
