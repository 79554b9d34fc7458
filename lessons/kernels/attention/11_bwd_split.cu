// attention's backward 2: tiles made again from lse, by a kernel that owns keys and one that owns queries.
//
// dk and dv are sums over queries, dq is one over keys. Who owns 64 keys and walks over the queries can keep dk and dv
// in registers; who owns 64 queries and walks over the keys, dq. So there are two kernels, and each makes the tiles of
// p and ds that it needs, and forgets them: a warp's tile is an operand of the next product as it lies in its
// registers. The kernel of dk and dv makes it transposed, keys down and queries across, so that this holds there, too.
// One kernel for all three would make them once, five products instead of seven, and its blocks would have to add to
// the same dq: by atomics, in an order that is another each time, and so are the last digits.
//
// Moves: do and o once for delta; k, v, dk and dv once, and q and do once for every 64 keys that see them; q, do and dq
// once, and k and v once for every 64 queries.
//
// Last rung: both matrices went through global memory, and every product was made on CUDA cores.
//
// Gains: no (T, T) matrix is left; tensor cores make the products, and tiles that nobody sees are not visited.
//
// Promise: load sectors <= 0.02 x 10_bwd_naive
// Promise: store sectors <= 0.6 x 10_bwd_naive
// Promise: mma >= 1
// Promise: bank conflicts == 0

#include "tensor_cores.cuh"

namespace {

using namespace lessons;

// delta = sum(do * o) of each row, by a warp.
__global__ void __launch_bounds__(kThreads)
    attention_bwd_delta_kernel(const fp16* dout, const fp16* o, float* delta, int rows) {
  const int row = static_cast<int>(blockIdx.x) * kWarps + warp_id();
  if (row >= rows) return;
  const int64_t at = static_cast<int64_t>(row) * kHeaddim + 2 * lane_id();
  const auto a = ldg(reinterpret_cast<const Vec<fp16, 2>*>(dout + at));
  const auto b = ldg(reinterpret_cast<const Vec<fp16, 2>*>(o + at));
  const float sum = warp_sum(to_float(a[0]) * to_float(b[0]) + to_float(a[1]) * to_float(b[1]));
  if (lane_id() == 0) stg(delta + row, sum);
}

// p of a score, and 0 of one that is hidden. A query that does not exist has an lse of +inf.
FASTGPT_PRIM float probability(float score, float lse, float scale, int query, int key) {
  return key <= query ? fast_exp2((score * scale - lse) * kLog2E) : 0.0f;
}

__global__ void __launch_bounds__(kThreads)
    attention_bwd_dkdv_kernel(const fp16* dout, const fp16* q, const fp16* k, const fp16* v, const float* lse,
                              const float* delta, fp16* dk, fp16* dv, int T, float scale) {
  SHARED(fp16, k_tile, kBlockM * kHeaddim);
  SHARED(fp16, v_tile, kBlockM * kHeaddim);
  SHARED(fp16, q_tile, kBlockN * kHeaddim);
  SHARED(fp16, dout_tile, kBlockN * kHeaddim);
  SHARED(float, lse_tile, kBlockN);
  SHARED(float, delta_tile, kBlockN);
  const int64_t head = static_cast<int64_t>(blockIdx.y) * T;  // its first row
  const int first = static_cast<int>(blockIdx.x) * kBlockM, thread = static_cast<int>(threadIdx.x);
  const int key = first + 16 * warp_id() + lane_id() / 4;  // the lane's first; the other one is eight further

  start_copy<Swizzled, kBlockM>(k_tile, k + head * kHeaddim, first, T);
  start_copy<Swizzled, kBlockM>(v_tile, v + head * kHeaddim, first, T);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t its_k[kHeaddim / 16][4], its_v[kHeaddim / 16][4];
  load_operands<Swizzled>(its_k, k_tile, 16 * warp_id());
  load_operands<Swizzled>(its_v, v_tile, 16 * warp_id());
  Outputs its_dk = {}, its_dv = {};

  for (int start = first; start < T; start += kBlockN) {  // queries before the block's first key see none of its keys
    __syncthreads();                                      // nobody needs the last tile any more
    start_copy<Swizzled, kBlockN>(q_tile, q + head * kHeaddim, start, T);
    start_copy<Swizzled, kBlockN>(dout_tile, dout + head * kHeaddim, start, T);
    cp_async_commit();
    if (thread < kBlockN) {
      const int query = start + thread;
      sts(lse_tile + thread, query < T ? ldg(lse + head + query) : HUGE_VALF);
      sts(delta_tile + thread, query < T ? ldg(delta + head + query) : 0.0f);
    }
    cp_async_wait<0>();
    __syncthreads();  // this one is there

    Scores p, ds;
    multiply_transposed<Swizzled>(p, its_k, q_tile);
    multiply_transposed<Swizzled>(ds, its_v, dout_tile);
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * n + lane_id() % 4 * 2 + i % 2;
        p[n][i] = probability(p[n][i], lds(lse_tile + column), scale, start + column, key + i / 2 * 8);
        ds[n][i] = p[n][i] * (ds[n][i] - lds(delta_tile + column));
      }
    }
    multiply_add<Swizzled>(its_dv, p, dout_tile);
    multiply_add<Swizzled>(its_dk, ds, q_tile);
  }
  store_rows(its_dk, dk + head * kHeaddim, first + 16 * warp_id(), T, scale);
  store_rows(its_dv, dv + head * kHeaddim, first + 16 * warp_id(), T, 1.0f);
}

__global__ void __launch_bounds__(kThreads)
    attention_bwd_dq_kernel(const fp16* dout, const fp16* q, const fp16* k, const fp16* v, const float* lse,
                            const float* delta, fp16* dq, int T, float scale) {
  SHARED(fp16, q_tile, kBlockM * kHeaddim);
  SHARED(fp16, dout_tile, kBlockM * kHeaddim);
  SHARED(fp16, k_tile, kBlockN * kHeaddim);
  SHARED(fp16, v_tile, kBlockN * kHeaddim);
  const int64_t head = static_cast<int64_t>(blockIdx.y) * T;
  const int first = static_cast<int>(blockIdx.x) * kBlockM;
  const int query = first + 16 * warp_id() + lane_id() / 4;

  start_copy<Swizzled, kBlockM>(q_tile, q + head * kHeaddim, first, T);
  start_copy<Swizzled, kBlockM>(dout_tile, dout + head * kHeaddim, first, T);
  cp_async_commit();
  float its_lse[2], its_delta[2];
  for (int h = 0; h < 2; ++h) {
    const bool exists = query + 8 * h < T;
    its_lse[h] = exists ? ldg(lse + head + query + 8 * h) : HUGE_VALF;
    its_delta[h] = exists ? ldg(delta + head + query + 8 * h) : 0.0f;
  }
  cp_async_wait<0>();
  __syncthreads();
  uint32_t its_q[kHeaddim / 16][4], its_dout[kHeaddim / 16][4];
  load_operands<Swizzled>(its_q, q_tile, 16 * warp_id());
  load_operands<Swizzled>(its_dout, dout_tile, 16 * warp_id());
  Outputs its_dq = {};

  for (int start = 0; start < min(first + kBlockM, T); start += kBlockN) {
    __syncthreads();
    start_copy<Swizzled, kBlockN>(k_tile, k + head * kHeaddim, start, T);
    start_copy<Swizzled, kBlockN>(v_tile, v + head * kHeaddim, start, T);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    Scores p, ds;
    multiply_transposed<Swizzled>(p, its_q, k_tile);
    multiply_transposed<Swizzled>(ds, its_dout, v_tile);
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int h = i / 2, key = start + 8 * n + lane_id() % 4 * 2 + i % 2;
        ds[n][i] = probability(p[n][i], its_lse[h], scale, query + 8 * h, key) * (ds[n][i] - its_delta[h]);
      }
    }
    multiply_add<Swizzled>(its_dq, ds, k_tile);
  }
  store_rows(its_dq, dq + head * kHeaddim, first + 16 * warp_id(), T, scale);
}

}  // namespace

extern "C" void attention_bwd(const fp16* dout, const fp16* q, const fp16* k, const fp16* v, const fp16* o,
                              const float* lse, fp16* dq, fp16* dk, fp16* dv, int B, int H, int T, int D, float scale,
                              cudaStream_t stream) {
  if (D != kHeaddim) throw std::runtime_error("this rung takes heads of size 64 alone");
  const int rows = B * H * T;
  const dim3 grid((T + kBlockM - 1) / kBlockM, B * H), block(kThreads);
  lessons::Scratch<float> delta(rows, stream);
  launch<attention_bwd_delta_kernel>(grid_of((rows + kWarps - 1) / kWarps), block, 0, stream, dout, o, delta.data(),
                                     rows);
  launch<attention_bwd_dkdv_kernel>(grid, block, 0, stream, dout, q, k, v, lse, delta.data(), dk, dv, T, scale);
  launch<attention_bwd_dq_kernel>(grid, block, 0, stream, dout, q, k, v, lse, delta.data(), dq, T, scale);
}
