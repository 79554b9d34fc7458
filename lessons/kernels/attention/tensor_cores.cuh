// What the rungs on tensor cores share, so that each of them shows its own idea alone: tiles of fp16 in shared memory,
// their products, and the softmax of 16 queries in the registers of a warp.
//
// A tensor core multiplies for a whole warp: mma_m16n8k16 adds a (16 x 16) times (16 x 8) product to 16 x 8 sums, and
// each lane holds a few elements of each of the three, at places that prims.cuh tells. ldmatrix fetches operands from
// shared memory as they have to lie: each lane says where one row of 16 bytes is, and gets four pairs of elements. Sums
// lie such that two lanes, rounded to fp16, are operands of the next product: probabilities never leave registers.

#pragma once

#include "tasks.h"

namespace lessons {

using namespace fastgpt::cuda;

constexpr int kHeaddim = 64;
constexpr int kChunks = kHeaddim / 8;  // of 16 bytes, of a row
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlocks = 3;  // of a multiprocessor, at least: nvcc would spill registers to make room for a fourth
constexpr int kBlockM = 16 * kWarps;  // rows of a block, which has 16 for each warp
constexpr int kBlockN = 32;           // rows at a time of what it walks over
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Where a row's chunk is in a tile, in elements.
struct Straight {
  static FASTGPT_PRIM int at(int row, int chunk) { return row * kHeaddim + chunk * 8; }
};
// A row's chunks change places with each other, by its number.
struct Swizzled {
  static FASTGPT_PRIM int at(int row, int chunk) { return row * kHeaddim + (chunk ^ row % 8) * 8; }
};

// Calls f(place in the tile, place in the matrix, whether that exists) for this thread's chunks of the tile with rows
// first, first + 1, ... of a (T, 64) matrix.
template <class Layout, int kTileRows, class F>
FASTGPT_PRIM void for_each_chunk(int first, int T, F f) {
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    f(Layout::at(row, chunk), (first + row) * kHeaddim + chunk * 8, first + row < T);
  }
}

// Copies rows by way of registers. What does not exist is zero: times a zero probability, NaN would not be.
template <class Layout, int kTileRows>
FASTGPT_PRIM void copy_rows(Shared<fp16> tile, const fp16* from, int first, int T) {
  for_each_chunk<Layout, kTileRows>(first, T, [&](int to, int offset, bool exists) {
    Vec<fp16, 8> chunk = {};
    if (exists) chunk = ldg(reinterpret_cast<const Vec<fp16, 8>*>(from + offset));
    sts((tile + to).as<Vec<fp16, 8>>(), chunk);
  });
}

// Starts to copy rows past the registers; a barrier after cp_async_wait ends it.
template <class Layout, int kTileRows>
FASTGPT_PRIM void start_copy(Shared<fp16> tile, const fp16* from, int first, int T) {
  for_each_chunk<Layout, kTileRows>(
      first, T, [&](int to, int offset, bool exists) { cp_async_16(tile + to, from + offset, exists); });
}

// 16 rows of a tile, from `row` on, as the left operands of products: a[k] is columns 16 * k to 16 * k + 15.
template <class Layout>
FASTGPT_PRIM void load_operands(uint32_t (&a)[kHeaddim / 16][4], Shared<fp16> tile, int row) {
#pragma unroll
  for (int k = 0; k < kHeaddim / 16; ++k) {
    ldmatrix_x4(a[k], tile + Layout::at(row + lane_id() % 16, 2 * k + lane_id() / 16));
  }
}

using Scores = float[kBlockN / 8][4];    // of 16 rows with a tile's kBlockN, as sums of mma_m16n8k16
using Outputs = float[kHeaddim / 8][4];  // of 16 rows, kHeaddim columns

// s = a tile^T.
template <class Layout>
FASTGPT_PRIM void multiply_transposed(Scores& s, const uint32_t (&a)[kHeaddim / 16][4], Shared<fp16> tile) {
#pragma unroll
  for (int n = 0; n < kBlockN / 8; n += 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = s[n + 1][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < kHeaddim / 16; ++k) {
      uint32_t b[4];
      ldmatrix_x4(b, tile + Layout::at(8 * n + lane_id() % 8 + lane_id() / 16 * 8, 2 * k + lane_id() / 8 % 2));
      mma_m16n8k16<fp16>(s[n], a[k], b[0], b[1]);
      mma_m16n8k16<fp16>(s[n + 1], a[k], b[2], b[3]);
    }
  }
}

// acc += p tile, with p rounded to fp16.
template <class Layout>
FASTGPT_PRIM void multiply_add(Outputs& acc, const Scores& p, Shared<fp16> tile) {
#pragma unroll
  for (int k = 0; k < kBlockN / 16; ++k) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pack<fp16>(p[2 * k + i / 2][i % 2 * 2], p[2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < kHeaddim / 8; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, tile + Layout::at(16 * k + lane_id() % 16, n + lane_id() / 16));
      mma_m16n8k16<fp16>(acc[n], a, b[0], b[1]);
      mma_m16n8k16<fp16>(acc[n + 1], a, b[2], b[3]);
    }
  }
}

// Writes 16 rows, from `first` on, of a (T, 64) matrix, times a factor.
FASTGPT_PRIM void store_rows(const Outputs& acc, fp16* to, int first, int T, float factor) {
#pragma unroll
  for (int n = 0; n < kHeaddim / 8; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first + 8 * h + lane_id() / 4;
      if (row >= T) continue;
      const Vec<fp16, 2> pair = {from_float<fp16>(acc[n][2 * h] * factor),
                                 from_float<fp16>(acc[n][2 * h + 1] * factor)};
      stg(reinterpret_cast<Vec<fp16, 2>*>(to + row * kHeaddim + 8 * n + lane_id() % 4 * 2), pair);
    }
  }
}

// A warp's 16 queries, from `first` on, and what they have seen so far. A lane holds parts of two of them: of query
// lane / 4 and of the one eight further, the columns 2 * (lane % 4) and the next of every eight.
class Queries {
 public:
  template <class Layout>
  FASTGPT_PRIM void load(Shared<fp16> q_tile, int first) {
    first_ = first;
    load_operands<Layout>(q_, q_tile, first % kBlockM);
  }

  // Takes a tile of keys and values, from key `start` on, into account. The softmax is online, as in cuda_cores.cuh;
  // in powers of 2, which are one instruction.
  template <class Layout>
  FASTGPT_PRIM void attend(Shared<fp16> k_tile, Shared<fp16> v_tile, int start, float scale) {
    Scores s;
    multiply_transposed<Layout>(s, q_, k_tile);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int last = first_ + 8 * h + lane_id() / 4;  // the last key that the query sees
      float now = largest_[h];
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          const int key = start + 8 * n + lane_id() % 4 * 2 + i % 2;
          s[n][i] = key <= last ? s[n][i] * (scale * kLog2E) : -HUGE_VALF;
          now = fmaxf(now, s[n][i]);
        }
      }
      now = fmaxf(now, __shfl_xor_sync(kFullMask, now, 1));  // four lanes share a row
      now = fmaxf(now, __shfl_xor_sync(kFullMask, now, 2));
      const float correction = fast_exp2(largest_[h] - now);
      largest_[h] = now;
      sum_[h] *= correction;
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          s[n][i] = fast_exp2(s[n][i] - now);
          sum_[h] += s[n][i];
        }
      }
#pragma unroll
      for (int n = 0; n < kHeaddim / 8; ++n) {
        acc_[n][2 * h] *= correction;
        acc_[n][2 * h + 1] *= correction;
      }
    }
    multiply_add<Layout>(acc_, s, v_tile);
  }

  // Writes o and lse of one head.
  FASTGPT_PRIM void store(fp16* o, float* lse, int T) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum_[h];
      total += __shfl_xor_sync(kFullMask, total, 1);
      total += __shfl_xor_sync(kFullMask, total, 2);
#pragma unroll
      for (int n = 0; n < kHeaddim / 8; ++n) {
        acc_[n][2 * h] /= total;
        acc_[n][2 * h + 1] /= total;
      }
      const int query = first_ + 8 * h + lane_id() / 4;
      if (lane_id() % 4 == 0 && query < T) stg(lse + query, (largest_[h] + log2f(total)) * kLn2);
    }
    store_rows(acc_, o, first_, T, 1.0f);
  }

 private:
  int first_ = 0;
  uint32_t q_[kHeaddim / 16][4];
  float largest_[2] = {-HUGE_VALF, -HUGE_VALF}, sum_[2] = {};
  Outputs acc_ = {};
};

// Launches a kernel of these rungs: its blocks are (tile of queries, head).
template <auto kKernel>
void launch_attention(const fp16* q, const fp16* k, const fp16* v, fp16* o, float* lse, int B, int H, int T, int D,
                      float scale, cudaStream_t stream) {
  if (D != kHeaddim) throw std::runtime_error("this rung takes heads of size 64 alone");
  launch<kKernel>(dim3((T + kBlockM - 1) / kBlockM, B * H), dim3(kThreads), 0, stream, q, k, v, o, lse, T, scale);
}

}  // namespace lessons
