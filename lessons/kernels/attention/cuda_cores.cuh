// The kernel of 02_tiled.cu and 03_padded.cu, which differ in one number: how many floats lie between two rows of a
// tile.
//
// A block owns 32 queries of a head and walks over the keys, 32 at a time: a tile of k and one of v go to shared
// memory, where all four warps read them. A warp has eight of the queries. For the scores a lane has a key, so that a
// row's softmax is shuffles; for the output it has two columns, and reads the row's probabilities from shared memory.
//
// The softmax is online: a row keeps its largest score so far, the sum of exponentials below it, and the sum of values
// so weighted. A larger score multiplies both sums by exp(old - new), and the row is never needed again.

#pragma once

#include "tasks.h"

namespace lessons {

using namespace fastgpt::cuda;

constexpr int kHeaddim = 64;
constexpr int kTile = 32;  // queries of a block, and keys at a time
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRows = kTile / kWarps;  // of a warp

using Float4 = Vec<float, 4>;

FASTGPT_PRIM Float4 at4(Shared<float> p) { return lds(p.as<Float4>()); }

// Rows first, first + 1, ... of a head's (T, 64) matrix as floats; zeros from row T on, since a zero probability times
// what happens to lie there might be NaN.
template <int kStride>
FASTGPT_PRIM void copy_tile(Shared<float> to, const fp16* from, int first, int T) {
  constexpr int kAcross = kHeaddim / 4;
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kAcross; i += kThreads) {
    const int row = i / kAcross, column = i % kAcross * 4;
    Float4 wide = {};
    if (first + row < T) {
      const auto narrow = ldg(reinterpret_cast<const Vec<fp16, 4>*>(from + (first + row) * kHeaddim + column));
      for (int j = 0; j < 4; ++j) wide[j] = to_float(narrow[j]);
    }
    sts((to + row * kStride + column).as<Float4>(), wide);
  }
}

template <int kStride>
__global__ void __launch_bounds__(kThreads)
    attention_tiled_kernel(const fp16* q, const fp16* k, const fp16* v, fp16* o, float* lse, int T, float scale) {
  SHARED(float, q_tile, kTile* kStride);
  SHARED(float, k_tile, kTile* kStride);
  SHARED(float, v_tile, kTile* kStride);
  SHARED(float, p_tile, kTile* kTile);
  const int64_t head = static_cast<int64_t>(blockIdx.y) * T;  // its first row
  const int first = static_cast<int>(blockIdx.x) * kTile, first_of_warp = first + warp_id() * kRows;
  const Shared<float> q_rows = q_tile + warp_id() * kRows * kStride, p_rows = p_tile + warp_id() * kRows * kTile;
  const Shared<float> k_row = k_tile + lane_id() * kStride;
  float largest[kRows], sum[kRows] = {}, acc[kRows][2] = {};
  for (float& x : largest) x = -HUGE_VALF;

  copy_tile<kStride>(q_tile, q + head * kHeaddim, first, T);
  for (int start = 0; start < T; start += kTile) {
    __syncthreads();  // nobody needs the last tile any more
    copy_tile<kStride>(k_tile, k + head * kHeaddim, start, T);
    copy_tile<kStride>(v_tile, v + head * kHeaddim, start, T);
    __syncthreads();  // this one is there

    float s[kRows] = {};
    for (int d = 0; d < kHeaddim; d += 4) {
      const Float4 its_k = at4(k_row + d);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Float4 its_q = at4(q_rows + r * kStride + d);
        for (int j = 0; j < 4; ++j) s[r] += its_q[j] * its_k[j];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float score = start + lane_id() <= first_of_warp + r ? s[r] * scale : -HUGE_VALF;
      const float now = fmaxf(largest[r], warp_max(score));  // finite from the first tile on: all queries see key 0
      const float correction = __expf(largest[r] - now), p = __expf(score - now);
      largest[r] = now;
      sum[r] = sum[r] * correction + warp_sum(p);
      acc[r][0] *= correction;
      acc[r][1] *= correction;
      sts(p_rows + r * kTile + lane_id(), p);
    }
    __syncwarp();
    for (int key = 0; key < kTile; key += 4) {
      Vec<float, 2> its_v[4];
      for (int j = 0; j < 4; ++j) its_v[j] = lds((v_tile + (key + j) * kStride + 2 * lane_id()).as<Vec<float, 2>>());
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Float4 p = at4(p_rows + r * kTile + key);
        for (int j = 0; j < 4; ++j) {
          acc[r][0] += p[j] * its_v[j][0];
          acc[r][1] += p[j] * its_v[j][1];
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = head + first_of_warp + r;
    if (first_of_warp + r >= T) continue;
    const Vec<fp16, 2> pair = {from_float<fp16>(acc[r][0] / sum[r]), from_float<fp16>(acc[r][1] / sum[r])};
    stg(reinterpret_cast<Vec<fp16, 2>*>(o + row * kHeaddim + 2 * lane_id()), pair);
    if (lane_id() == 0) stg(lse + row, largest[r] + __logf(sum[r]));
  }
}

template <int kStride>
void launch_tiled(const fp16* q, const fp16* k, const fp16* v, fp16* o, float* lse, int B, int H, int T, int D,
                  float scale, cudaStream_t stream) {
  if (D != kHeaddim) throw std::runtime_error("this rung takes heads of size 64 alone");
  launch<attention_tiled_kernel<kStride>>(dim3((T + kTile - 1) / kTile, B * H), dim3(kThreads), 0, stream, q, k, v, o,
                                          lse, T, scale);
}

}  // namespace lessons
