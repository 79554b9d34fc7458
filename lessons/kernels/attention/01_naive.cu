// attention 1: three kernels, with the matrix of scores in global memory.
//
// Scores s = scale * q k^T of all pairs of a query and a key; the softmax of each row; o = p v. A thread makes one
// element of s, later one of o. A query sees the keys up to its own: the other scores are -inf.
//
// Moves: for each head the (T, T) matrix in fp32 five times (out; in for the maximum, the sum and the result; out), and
// then each of its elements for every one of 64 columns of o. At T = 4096 the matrix has 64 MiB, each of q, k, v and o
// half a MiB. In the first kernel the lanes of a warp have 32 keys, 128 bytes apart: of each 32-byte sector 2 bytes are
// used.
//
// Last rung: there is none.
//
// Gains: the right numbers, to hold all others to.
//
// Promise: sectors per load request >= 8

#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

constexpr int kRows = 4;  // of a block

__global__ void __launch_bounds__(kRows* kWarpSize)
    attention_scores_kernel(const fp16* q, const fp16* k, float* s, int T, int D, float scale) {
  const int key = static_cast<int>(blockIdx.x) * kWarpSize + lane_id();
  const int query = static_cast<int>(blockIdx.y) * kRows + warp_id();
  if (key >= T || query >= T) return;
  const int64_t head = blockIdx.z;
  const fp16 *its_q = q + (head * T + query) * D, *its_k = k + (head * T + key) * D;
  float sum = 0.0f;
  for (int d = 0; d < D; ++d) sum += to_float(ldg(its_q + d)) * to_float(ldg(its_k + d));
  stg(s + (head * T + query) * T + key, key <= query ? sum * scale : -HUGE_VALF);
}

// Makes probabilities of scores where they are. A warp has a row.
__global__ void __launch_bounds__(kRows* kWarpSize) attention_softmax_kernel(float* s, float* lse, int T, int rows) {
  const int row = static_cast<int>(blockIdx.x) * kRows + warp_id();
  if (row >= rows) return;
  float* its_s = s + static_cast<int64_t>(row) * T;
  float largest = -HUGE_VALF, sum = 0.0f;
  for (int key = lane_id(); key < T; key += kWarpSize) largest = fmaxf(largest, ldg(its_s + key));
  largest = warp_max(largest);
  for (int key = lane_id(); key < T; key += kWarpSize) sum += __expf(ldg(its_s + key) - largest);
  sum = warp_sum(sum);
  for (int key = lane_id(); key < T; key += kWarpSize) {
    stg(its_s + key, __expf(ldg(its_s + key) - largest) / sum);
  }
  if (lane_id() == 0) stg(lse + row, largest + __logf(sum));
}

__global__ void __launch_bounds__(kRows* kWarpSize)
    attention_values_kernel(const float* p, const fp16* v, fp16* o, int T, int D) {
  const int column = static_cast<int>(blockIdx.x) * kWarpSize + lane_id();
  const int query = static_cast<int>(blockIdx.y) * kRows + warp_id();
  if (column >= D || query >= T) return;
  const int64_t head = blockIdx.z;
  float sum = 0.0f;
  for (int key = 0; key < T; ++key) {
    sum += ldg(p + (head * T + query) * T + key) * to_float(ldg(v + (head * T + key) * D + column));
  }
  stg(o + (head * T + query) * D + column, from_float<fp16>(sum));
}

unsigned blocks(int n, int size) { return static_cast<unsigned>((n + size - 1) / size); }

}  // namespace

extern "C" void attention(const fp16* q, const fp16* k, const fp16* v, fp16* o, float* lse, int B, int H, int T, int D,
                          float scale, cudaStream_t stream) {
  const int heads = B * H;
  const dim3 block(kRows * kWarpSize);
  lessons::Scratch<float> scores(static_cast<size_t>(heads) * T * T, stream);
  launch<attention_scores_kernel>(dim3(blocks(T, kWarpSize), blocks(T, kRows), heads), block, 0, stream, q, k,
                                  scores.data(), T, D, scale);
  launch<attention_softmax_kernel>(grid_of(blocks(heads * T, kRows)), block, 0, stream, scores.data(), lse, T,
                                   heads * T);
  launch<attention_values_kernel>(dim3(blocks(D, kWarpSize), blocks(T, kRows), heads), block, 0, stream, scores.data(),
                                  v, o, T, D);
}
