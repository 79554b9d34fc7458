// attention's backward 1: two (T, T) matrices in global memory.
//
// With p the probabilities, which lse makes of the scores again:
//
// dv = p^T do, ds = p * (do v^T - delta), dk = scale * ds^T q, dq = scale * ds k, delta = sum(do * o).
//
// A thread makes one element of p and of ds, and writes both; then a thread makes one element of dq, of dk and of dv.
//
// Moves: for each head two (T, T) matrices in fp32 out, and then each element of them in for every one of 64 columns,
// rows of ds for dq, and columns of both for dk and dv. In the first kernel the lanes of a warp have 32 keys, 128 bytes
// apart.
//
// Last rung: (of the forward) never wrote the matrix that this one keeps twice.
//
// Gains: the right numbers, and the five products in the open.
//
// Promise: sectors per load request >= 4

#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

constexpr int kRows = 4;  // of a block

// Sums of products along two rows.
FASTGPT_PRIM float dot(const fp16* a, const fp16* b, int D) {
  float sum = 0.0f;
  for (int d = 0; d < D; ++d) sum += to_float(ldg(a + d)) * to_float(ldg(b + d));
  return sum;
}

__global__ void __launch_bounds__(kRows* kWarpSize)
    attention_bwd_scores_kernel(const fp16* dout, const fp16* q, const fp16* k, const fp16* v, const fp16* o,
                                const float* lse, float* p, float* ds, int T, int D, float scale) {
  const int key = static_cast<int>(blockIdx.x) * kWarpSize + lane_id();
  const int query = static_cast<int>(blockIdx.y) * kRows + warp_id();
  if (key >= T || query >= T) return;
  const int64_t head = static_cast<int64_t>(blockIdx.z) * T;
  const int64_t its_query = (head + query) * D, its_key = (head + key) * D, at = (head + query) * T + key;
  const float score = dot(q + its_query, k + its_key, D) * scale;
  const float its_p = key <= query ? __expf(score - ldg(lse + head + query)) : 0.0f;
  const float delta = dot(dout + its_query, o + its_query, D);
  stg(p + at, its_p);
  stg(ds + at, its_p * (dot(dout + its_query, v + its_key, D) - delta));
}

__global__ void __launch_bounds__(kRows* kWarpSize)
    attention_bwd_gradients_kernel(const fp16* dout, const fp16* q, const fp16* k, const float* p, const float* ds,
                                   fp16* dq, fp16* dk, fp16* dv, int T, int D, float scale) {
  const int column = static_cast<int>(blockIdx.x) * kWarpSize + lane_id();
  const int row = static_cast<int>(blockIdx.y) * kRows + warp_id();
  if (column >= D || row >= T) return;
  const int64_t head = static_cast<int64_t>(blockIdx.z) * T;
  float its_dq = 0.0f, its_dk = 0.0f, its_dv = 0.0f;
  for (int n = 0; n < T; ++n) {
    const int64_t other = (head + n) * D + column, down = (head + n) * T + row;
    its_dq += ldg(ds + (head + row) * T + n) * to_float(ldg(k + other));
    its_dk += ldg(ds + down) * to_float(ldg(q + other));
    its_dv += ldg(p + down) * to_float(ldg(dout + other));
  }
  const int64_t at = (head + row) * D + column;
  stg(dq + at, from_float<fp16>(its_dq * scale));
  stg(dk + at, from_float<fp16>(its_dk * scale));
  stg(dv + at, from_float<fp16>(its_dv));
}

unsigned blocks(int n, int size) { return static_cast<unsigned>((n + size - 1) / size); }

}  // namespace

extern "C" void attention_bwd(const fp16* dout, const fp16* q, const fp16* k, const fp16* v, const fp16* o,
                              const float* lse, fp16* dq, fp16* dk, fp16* dv, int B, int H, int T, int D, float scale,
                              cudaStream_t stream) {
  const unsigned heads = B * H;
  const dim3 block(kRows * kWarpSize);
  lessons::Scratch<float> p(static_cast<size_t>(heads) * T * T, stream), ds(static_cast<size_t>(heads) * T * T, stream);
  launch<attention_bwd_scores_kernel>(dim3(blocks(T, kWarpSize), blocks(T, kRows), heads), block, 0, stream, dout, q, k,
                                      v, o, lse, p.data(), ds.data(), T, D, scale);
  launch<attention_bwd_gradients_kernel>(dim3(blocks(D, kWarpSize), blocks(T, kRows), heads), block, 0, stream, dout, q,
                                         k, p.data(), ds.data(), dq, dk, dv, T, D, scale);
}
