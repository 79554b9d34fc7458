// attention in fp32, on the CUDA cores: a tensor core would round q, k and v to 11 bits.
//
// The walk is that of the kernels for half precision: the forward and dq own queries, dk and dv own keys, and each goes
// over tiles of the other side. A thread makes kR x kC scores: rows kR * ty to kR * ty + kR - 1 of what the block owns,
// columns tx, tx + 16, ... of the tile; and of the output, the same rows and four columns in every 64. So a number that
// it reads from shared memory takes part in kC or kR products. The 16 threads of a row lie in one warp: a row's sums
// are shuffles, and its probabilities, on their way from scores to operands, need no barrier of the block.
//
// Rows of tiles are padded by 16 bytes, so that eight rows' vectors of one column lie in all banks. Of the two rows
// that a warp writes probabilities to, the odd one's halves are swapped, for the same reason.

#include "attention.cuh"

namespace fastgpt::cuda {
namespace {

constexpr int kAcross = 16, kDown = 8, kThreads = kAcross * kDown;

using Four = Vec<float, 4>;
FASTGPT_PRIM Four load_four(Shared<float> p) { return lds(p.as<Four>()); }

template <int kHeaddim_, int kR_, int kC_>
struct CoreShape {
  static constexpr int kHeaddim = kHeaddim_, kR = kR_, kC = kC_;
  static constexpr int kRows = kDown * kR, kColumns = kAcross * kC;  // that the block owns, and of a tile
  static constexpr int kPitch = kHeaddim + 4;
  static constexpr int kScorePitch = kColumns < 32 ? 32 : kColumns;
  static constexpr int kGroups = kHeaddim / 64;  // of four columns of the output

  // Floats of shared memory: `owned` tiles of rows, two of columns, the scores, and statistics of columns.
  static constexpr int floats(int owned) {
    return (owned * kRows + 2 * kColumns) * kPitch + kRows * kScorePitch + 2 * kColumns;
  }
};

FASTGPT_PRIM int tx() { return static_cast<int>(threadIdx.x) % kAcross; }
FASTGPT_PRIM int ty() { return static_cast<int>(threadIdx.x) / kAcross; }

// Starts to copy `count` rows; zeros beyond what there is.
template <class Shape>
FASTGPT_PRIM void load_rows(Shared<float> to, const HeadRows<float>& from, int first, int count) {
  constexpr int kChunks = Shape::kHeaddim / 4;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * 4;
    const int left = first + row < from.rows ? from.headdim - column : 0;
    const float* p = from.data + (first + row) * from.stride + column;
    const Shared<float> place = to + (row * Shape::kPitch + column);
    if (from.vectors) {
      cp_async_16(place, p, left > 0);
    } else {
      float v[4];
      load_floats(v, p, left, false);
      sts(place.as<Four>(), Four{v[0], v[1], v[2], v[3]});
    }
  }
}

// s = rows times columns, over the D numbers of each.
template <class Shape>
FASTGPT_PRIM void multiply_rows(float (&s)[Shape::kR][Shape::kC], Shared<float> rows, Shared<float> columns, int D) {
#pragma unroll
  for (int r = 0; r < Shape::kR; ++r) {
#pragma unroll
    for (int c = 0; c < Shape::kC; ++c) s[r][c] = 0.0f;
  }
#pragma unroll 2
  for (int d = 0; d < D; d += 4) {
    Four a[Shape::kR];
#pragma unroll
    for (int r = 0; r < Shape::kR; ++r) a[r] = load_four(rows + ((ty() * Shape::kR + r) * Shape::kPitch + d));
#pragma unroll
    for (int c = 0; c < Shape::kC; ++c) {
      const Four b = load_four(columns + ((tx() + kAcross * c) * Shape::kPitch + d));
#pragma unroll
      for (int r = 0; r < Shape::kR; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[r][c] += a[r][i] * b[i];
      }
    }
  }
}

// Where the scores of the thread's row r begin, and of its columns those from `column` on.
template <class Shape>
FASTGPT_PRIM Shared<float> score(Shared<float> scores, int r, int column) {
  return scores + ((ty() * Shape::kR + r) * Shape::kScorePitch + (column ^ (ty() & 1) * 16));
}

// acc += p columns, by way of the scores' place.
template <class Shape>
FASTGPT_PRIM void multiply_add(float (&acc)[Shape::kR][Shape::kGroups][4], const float (&p)[Shape::kR][Shape::kC],
                               Shared<float> scores, Shared<float> columns) {
  __syncwarp();  // what was there has been read
#pragma unroll
  for (int r = 0; r < Shape::kR; ++r) {
#pragma unroll
    for (int c = 0; c < Shape::kC; ++c) sts(score<Shape>(scores, r, tx() + kAcross * c), p[r][c]);
  }
  __syncwarp();
#pragma unroll 1
  for (int j = 0; j < Shape::kColumns; j += 4) {
    Four a[Shape::kR];
#pragma unroll
    for (int r = 0; r < Shape::kR; ++r) a[r] = load_four(score<Shape>(scores, r, j));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < Shape::kGroups; ++n) {
        const Four b = load_four(columns + ((j + i) * Shape::kPitch + 64 * n + 4 * tx()));
#pragma unroll
        for (int r = 0; r < Shape::kR; ++r) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[r][n][e] += a[r][i] * b[e];
        }
      }
    }
  }
}

template <class Shape>
FASTGPT_PRIM void store_rows(const HeadRows<float>& to, int first, const float (&acc)[Shape::kR][Shape::kGroups][4],
                             const float (&factor)[Shape::kR]) {
#pragma unroll
  for (int r = 0; r < Shape::kR; ++r) {
    const int row = first + ty() * Shape::kR + r;
    if (row >= to.rows) continue;
#pragma unroll
    for (int n = 0; n < Shape::kGroups; ++n) {
      const int column = 64 * n + 4 * tx();
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = acc[r][n][e] * factor[r];
      if (column < to.headdim) store_floats(to.data + row * to.stride + column, v, to.headdim - column, to.vectors);
    }
  }
}

// Which of the thread's scores dropout keeps: bit r * kC + c. Rows are queries, `row` that of the first in the mask;
// four threads' columns are the keys of one Philox vector, and each makes every fourth of those that they share.
template <class Shape>
FASTGPT_PRIM uint32_t kept_of_queries(const Dropper& dropper, int64_t row, int key) {
  constexpr int kCount = Shape::kR * Shape::kC;
  const int turn = tx() % 4;
  uint32_t mine = 0;
#pragma unroll 1
  for (int i = turn; i < kCount; i += 4) {
    const int r = i / Shape::kC, c = i % Shape::kC;
    const Words words = dropper.keys(row + ty() * Shape::kR + r, key / 4 + 4 * c + tx() / 4);
    mine |= kept_words(dropper, words) << i / 4 * 4;
  }
  uint32_t keep = 0;
#pragma unroll
  for (int flip = 0; flip < 4; ++flip) {
    const uint32_t words = flip == 0 ? mine : __shfl_xor_sync(kFullMask, mine, flip);
    keep |= (words >> turn & 0x11111111u) << (turn ^ flip);
  }
  return keep;
}

// The same where rows are keys and columns queries: a thread's rows are keys that follow each other.
template <class Shape>
FASTGPT_PRIM uint32_t kept_of_keys(const Dropper& dropper, int64_t row, int key) {
  constexpr int kR = Shape::kR;
  uint32_t keep = 0;
#pragma unroll 1
  for (int c = 0; c < Shape::kC; ++c) {
#pragma unroll
    for (int r = 0; r < kR; r += 4) {
      const int first = key + ty() * kR + r;
      const uint32_t words =
          kept_words(dropper, dropper.keys(row + tx() + kAcross * c, static_cast<uint32_t>(first / 4))) >> first % 4;
#pragma unroll
      for (int i = 0; i < 4 && r + i < kR; ++i) keep |= (words >> i & 1) << ((r + i) * Shape::kC + c);
    }
  }
  return keep;
}

template <class Shape>
FASTGPT_PRIM void keep_only(float (&to)[Shape::kR][Shape::kC], const float (&from)[Shape::kR][Shape::kC],
                            uint32_t keep) {
#pragma unroll
  for (int r = 0; r < Shape::kR; ++r) {
#pragma unroll
    for (int c = 0; c < Shape::kC; ++c) to[r][c] = keep >> (r * Shape::kC + c) & 1 ? from[r][c] : 0.0f;
  }
}

template <class Shape>
__global__ void __launch_bounds__(kThreads) attention_fwd_fp32_kernel(AttentionFwd a, bool vectors) {
  constexpr int kR = Shape::kR, kC = Shape::kC;
  DYNAMIC_SHARED(float, q_rows);
  const Shared<float> k_rows = q_rows + Shape::kRows * Shape::kPitch, v_rows = k_rows + Shape::kColumns * Shape::kPitch;
  const Shared<float> scores = v_rows + Shape::kColumns * Shape::kPitch;
  const int seqlen_q = static_cast<int>(a.shape.Tq), D = static_cast<int>(a.shape.D);
  const int q_tiles = (seqlen_q + Shape::kRows - 1) / Shape::kRows;
  const Place at(a.shape, q_tiles);
  const int start_m = (q_tiles - 1 - at.tile) * Shape::kRows;
  const Visible visible(a.shape, a.seqlens_k, at.b, a.is_causal);
  const HeadRows<float> q(a.q, at, seqlen_q, D, vectors), o(a.o, at, seqlen_q, D, vectors);
  const HeadRows<float> k(a.k, at, visible.keys(), D, vectors), v(a.v, at, visible.keys(), D, vectors);
  const int end = visible.last(min(start_m + Shape::kRows, seqlen_q) - 1);
  const float scale = a.scale * kLog2E;

  float acc[kR][Shape::kGroups][4] = {}, largest[kR], sum[kR] = {};
#pragma unroll
  for (int r = 0; r < kR; ++r) largest[r] = -kInfinity;
  load_rows<Shape>(q_rows, q, start_m, Shape::kRows);
  cp_async_commit();
  for (int start_n = 0; start_n <= end; start_n += Shape::kColumns) {
    __syncthreads();  // the tile before has been used
    load_rows<Shape>(k_rows, k, start_n, Shape::kColumns);
    load_rows<Shape>(v_rows, v, start_n, Shape::kColumns);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    float s[kR][kC];
    multiply_rows<Shape>(s, q_rows, k_rows, D);
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int last = visible.last(start_m + ty() * kR + r) - start_n;
      float now = largest[r];
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        s[r][c] = tx() + kAcross * c <= last ? s[r][c] * scale : -kInfinity;
        now = fmaxf(now, s[r][c]);
      }
#pragma unroll
      for (int step = kAcross / 2; step > 0; step /= 2) now = fmaxf(now, __shfl_xor_sync(kFullMask, now, step));
      const float offset = now == -kInfinity ? 0.0f : now;  // nothing seen yet, and -inf - -inf is NaN
      const float correction = fast_exp2(largest[r] - offset);
      largest[r] = now;
      sum[r] *= correction;
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        s[r][c] = fast_exp2(s[r][c] - offset);
        sum[r] += s[r][c];
      }
#pragma unroll
      for (int n = 0; n < Shape::kGroups; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[r][n][e] *= correction;
      }
    }
    if (a.drop.seed != nullptr) {
      keep_only<Shape>(s, s, kept_of_queries<Shape>(Dropper(a.drop), at.row(a.shape, start_m), start_n));
    }
    multiply_add<Shape>(acc, s, scores, v_rows);
  }
  cp_async_wait<0>();
#pragma unroll
  for (int r = 0; r < kR; ++r) {
#pragma unroll
    for (int step = kAcross / 2; step > 0; step /= 2) sum[r] += __shfl_xor_sync(kFullMask, sum[r], step);
    const int row = start_m + ty() * kR + r;
    if (tx() == 0 && row < seqlen_q) {
      stg(a.lse + at.row(a.shape, row), sum[r] == 0.0f ? kInfinity : (largest[r] + log2f(sum[r])) * kLn2);
    }
    sum[r] = sum[r] == 0.0f ? 0.0f : a.drop.scale / sum[r];
  }
  store_rows<Shape>(o, start_m, acc, sum);
}

// As their namesakes of half precision: delta there includes dropout's scale, which here stands where the formulas have
// it.
template <class Shape>
__global__ void __launch_bounds__(kThreads) attention_bwd_dkdv_fp32_kernel(AttentionBwd a, bool vectors) {
  constexpr int kR = Shape::kR, kC = Shape::kC;
  DYNAMIC_SHARED(float, k_rows);
  const Shared<float> v_rows = k_rows + Shape::kRows * Shape::kPitch, q_rows = v_rows + Shape::kRows * Shape::kPitch;
  const Shared<float> dout_rows = q_rows + Shape::kColumns * Shape::kPitch;
  const Shared<float> scores = dout_rows + Shape::kColumns * Shape::kPitch;
  const Shared<float> lse = scores + Shape::kRows * Shape::kScorePitch, delta = lse + Shape::kColumns;
  const int seqlen_q = static_cast<int>(a.shape.Tq), seqlen_k = static_cast<int>(a.shape.Tk);
  const int D = static_cast<int>(a.shape.D);
  const Place at(a.shape, (seqlen_k + Shape::kRows - 1) / Shape::kRows);
  const int start_n = at.tile * Shape::kRows;
  const Visible visible(a.shape, a.seqlens_k, at.b, a.is_causal);
  const HeadRows<float> q(a.q, at, seqlen_q, D, vectors), dout(a.dout, at, seqlen_q, D, vectors);
  const HeadRows<float> k(a.k, at, visible.keys(), D, vectors), v(a.v, at, visible.keys(), D, vectors);
  const float scale = a.scale * kLog2E;

  float dk[kR][Shape::kGroups][4] = {}, dv[kR][Shape::kGroups][4] = {};
  if (start_n < visible.keys() && seqlen_q > 0) {
    load_rows<Shape>(k_rows, k, start_n, Shape::kRows);
    load_rows<Shape>(v_rows, v, start_n, Shape::kRows);
    const int begin = visible.first_query(start_n) / Shape::kColumns * Shape::kColumns;
    for (int start_m = begin; start_m < seqlen_q; start_m += Shape::kColumns) {
      __syncthreads();  // the tile before has been used
      load_rows<Shape>(q_rows, q, start_m, Shape::kColumns);
      load_rows<Shape>(dout_rows, dout, start_m, Shape::kColumns);
      cp_async_commit();
      const int tid = static_cast<int>(threadIdx.x), query = start_m + tid % Shape::kColumns;
      if (tid < 2 * Shape::kColumns) {
        const float* statistics = tid < Shape::kColumns ? a.lse : a.delta;
        const float none = tid < Shape::kColumns ? kInfinity : 0.0f;
        sts(lse + tid, query < seqlen_q ? ldg(statistics + at.row(a.shape, query)) : none);
      }
      cp_async_wait<0>();
      __syncthreads();
      float p[kR][kC], ds[kR][kC];
      multiply_rows<Shape>(p, k_rows, q_rows, D);
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const int column = tx() + kAcross * c, last = visible.last(start_m + column) - start_n - ty() * kR;
        const float its_lse = lds(lse + column) * kLog2E;
#pragma unroll
        for (int r = 0; r < kR; ++r) p[r][c] = r <= last ? fast_exp2(p[r][c] * scale - its_lse) : 0.0f;
      }
      uint32_t keep = ~0u;
      if (a.drop.seed != nullptr) {
        keep = kept_of_keys<Shape>(Dropper(a.drop), at.row(a.shape, start_m), start_n);
      }
      keep_only<Shape>(ds, p, keep);
      multiply_add<Shape>(dv, ds, scores, dout_rows);
      multiply_rows<Shape>(ds, v_rows, dout_rows, D);
      keep_only<Shape>(ds, ds, keep);
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const int column = tx() + kAcross * c;
        const float its_delta = lds(delta + column);
        const bool sees_one = visible.last(start_m + column) == 0;  // and then has no gradient
#pragma unroll
        for (int r = 0; r < kR; ++r) ds[r][c] = sees_one ? 0.0f : p[r][c] * (ds[r][c] * a.drop.scale - its_delta);
      }
      multiply_add<Shape>(dk, ds, scores, q_rows);
    }
  }
  float dk_factor[kR], dv_factor[kR];
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    dk_factor[r] = a.scale;
    dv_factor[r] = a.drop.scale;
  }
  store_rows<Shape>(HeadRows<float>(a.dk, at, seqlen_k, D, vectors), start_n, dk, dk_factor);
  store_rows<Shape>(HeadRows<float>(a.dv, at, seqlen_k, D, vectors), start_n, dv, dv_factor);
}

template <class Shape>
__global__ void __launch_bounds__(kThreads) attention_bwd_dq_fp32_kernel(AttentionBwd a, bool vectors) {
  constexpr int kR = Shape::kR, kC = Shape::kC;
  DYNAMIC_SHARED(float, q_rows);
  const Shared<float> dout_rows = q_rows + Shape::kRows * Shape::kPitch;
  const Shared<float> k_rows = dout_rows + Shape::kRows * Shape::kPitch;
  const Shared<float> v_rows = k_rows + Shape::kColumns * Shape::kPitch;
  const Shared<float> scores = v_rows + Shape::kColumns * Shape::kPitch;
  const int seqlen_q = static_cast<int>(a.shape.Tq), D = static_cast<int>(a.shape.D);
  const int q_tiles = (seqlen_q + Shape::kRows - 1) / Shape::kRows;
  const Place at(a.shape, q_tiles);
  const int start_m = (q_tiles - 1 - at.tile) * Shape::kRows;
  const Visible visible(a.shape, a.seqlens_k, at.b, a.is_causal);
  const HeadRows<float> q(a.q, at, seqlen_q, D, vectors), dout(a.dout, at, seqlen_q, D, vectors);
  const HeadRows<float> k(a.k, at, visible.keys(), D, vectors), v(a.v, at, visible.keys(), D, vectors);
  const int end = visible.last(min(start_m + Shape::kRows, seqlen_q) - 1);
  const float scale = a.scale * kLog2E;

  float dq[kR][Shape::kGroups][4] = {}, lse[kR], delta[kR], factor[kR];
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const int row = start_m + ty() * kR + r;
    lse[r] = row < seqlen_q ? ldg(a.lse + at.row(a.shape, row)) * kLog2E : kInfinity;
    delta[r] = row < seqlen_q ? ldg(a.delta + at.row(a.shape, row)) : 0.0f;
    factor[r] = a.scale;
  }
  load_rows<Shape>(q_rows, q, start_m, Shape::kRows);
  load_rows<Shape>(dout_rows, dout, start_m, Shape::kRows);
  cp_async_commit();
  for (int start_n = 0; start_n <= end; start_n += Shape::kColumns) {
    __syncthreads();  // the tile before has been used
    load_rows<Shape>(k_rows, k, start_n, Shape::kColumns);
    load_rows<Shape>(v_rows, v, start_n, Shape::kColumns);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    float p[kR][kC], ds[kR][kC];
    multiply_rows<Shape>(p, q_rows, k_rows, D);
    multiply_rows<Shape>(ds, dout_rows, v_rows, D);
    if (a.drop.seed != nullptr) {
      keep_only<Shape>(ds, ds, kept_of_queries<Shape>(Dropper(a.drop), at.row(a.shape, start_m), start_n));
    }
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int sees = visible.last(start_m + ty() * kR + r), last = sees == 0 ? -1 : sees - start_n;
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const float probability = fast_exp2(p[r][c] * scale - lse[r]);
        ds[r][c] = tx() + kAcross * c <= last ? probability * (ds[r][c] * a.drop.scale - delta[r]) : 0.0f;
      }
    }
    multiply_add<Shape>(dq, ds, scores, k_rows);
  }
  cp_async_wait<0>();
  store_rows<Shape>(HeadRows<float>(a.dq, at, seqlen_q, D, vectors), start_m, dq, factor);
}

// Calls f with shapes for the forward and the backward, by the head size that D is padded to.
template <class F>
void with_shapes(int64_t D, F f) {
  if (D <= 64) return f(CoreShape<64, 8, 4>(), CoreShape<64, 8, 2>());
  if (D <= 128) return f(CoreShape<128, 8, 2>(), CoreShape<128, 4, 2>());
  return f(CoreShape<256, 4, 1>(), CoreShape<256, 2, 1>());
}

}  // namespace

void attention_fwd_fp32(const AttentionFwd& a, bool vectors, cudaStream_t stream) {
  with_shapes(a.shape.D, [&](auto fwd, auto) {
    using Shape = decltype(fwd);
    launch<attention_fwd_fp32_kernel<Shape>>(attention_grid(a.shape, a.shape.Tq, Shape::kRows), dim3(kThreads),
                                             Shape::floats(1) * sizeof(float), stream, a, vectors);
  });
}

void attention_bwd_fp32(const AttentionBwd& a, bool vectors, cudaStream_t stream) {
  with_shapes(a.shape.D, [&](auto, auto bwd) {
    using Shape = decltype(bwd);
    constexpr size_t kBytes = Shape::floats(2) * sizeof(float);
    launch<attention_bwd_dkdv_fp32_kernel<Shape>>(attention_grid(a.shape, a.shape.Tk, Shape::kRows), dim3(kThreads),
                                                  kBytes, stream, a, vectors);
    launch<attention_bwd_dq_fp32_kernel<Shape>>(attention_grid(a.shape, a.shape.Tq, Shape::kRows), dim3(kThreads),
                                                kBytes, stream, a, vectors);
  });
}

}  // namespace fastgpt::cuda
