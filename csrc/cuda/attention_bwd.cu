// The backward of attention on tensor cores. With lse every tile of probabilities is made again, and then
//
//   dv = p^T do,   ds = p * (do v^T - delta),   dk = scale * ds^T q,   dq = scale * ds k,   delta = sum(do * o).
//
// One kernel owns keys and walks over queries for dk and dv, another owns queries and walks over keys for dq. Making
// the tiles twice costs 7 matrix products where 5 would do, but no two blocks ever add to the same number: no atomics,
// and the same bits each time.
//
// As in the forward, a warp has whole rows of what it owns, and its scores are operands of the next product as they lie
// in its registers. So the kernel that owns keys makes everything transposed, keys down and queries across. Head sizes
// beyond 128 are too wide for a warp to keep two gradients of: there two warps share the rows, each keeps half of the
// columns, and both make the scores.
//
// Dropout keeps a probability and scales it, and does the same to its gradient; the loops only keep, and the scale is
// left to what is made of all of them: ds = scale * p * (kept - delta / scale).
//
// What moves: do and o once for delta; k, v, dk and dv once, and q and do once for each block of keys; q, do and dq
// once, and k and v once for each block of queries. What is read again comes from the L2 cache.

#include "attention.cuh"

namespace fastgpt::cuda {
namespace {

// ---- delta

constexpr int kDeltaLanes = 8;  // share a row
constexpr int kDeltaRows = 16;  // of a block

template <class T>
__global__ void __launch_bounds__(kDeltaLanes* kDeltaRows) attention_bwd_delta_kernel(AttentionBwd a, bool vectors) {
  const int seqlen_q = static_cast<int>(a.shape.Tq);
  const Place at(a.shape, (seqlen_q + kDeltaRows - 1) / kDeltaRows);
  const HeadRows<T> dout(a.dout, at, seqlen_q, a.shape.D, vectors), o(a.o, at, seqlen_q, a.shape.D, vectors);
  const int row = at.tile * kDeltaRows + static_cast<int>(threadIdx.x) / kDeltaLanes;
  const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes;
  float sum = 0.0f;
  if (row < seqlen_q) {
    constexpr int kCount = kVecSize<T>;
    for (int c = lane * kCount; c < dout.headdim; c += kDeltaLanes * kCount) {
      float x[kCount], y[kCount];
      load_floats(x, dout.data + row * dout.stride + c, dout.headdim - c, vectors);
      load_floats(y, o.data + row * o.stride + c, o.headdim - c, vectors);
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum += x[j] * y[j];
    }
  }
#pragma unroll
  for (int step = kDeltaLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
  if (lane == 0 && row < seqlen_q) stg(a.delta + at.row(a.shape, row), sum);
}

// lse of a query (which = 0), as a power of 2, or delta, before dropout's scale. An lse of +inf makes all probabilities
// 0, be it of a query that sees nothing or of one that does not exist.
FASTGPT_PRIM float statistic_of(const AttentionBwd& a, const Place& at, int query, int which) {
  if (query >= a.shape.Tq) return which == 0 ? kInfinity : 0.0f;
  const int64_t row = at.row(a.shape, query);
  return which == 0 ? ldg(a.lse + row) * kLog2E : ldg(a.delta + row) / a.drop.scale;
}

// ---- dk and dv

template <int kHeaddim>
struct DkdvShape {
  static constexpr int kM = kHeaddim <= 64 ? 2 : 1;
  static constexpr int kSplit = kHeaddim <= 128 ? 1 : 2;  // warps that share rows
  static constexpr int kWarps = kHeaddim <= 64 ? 4 : 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlockN = kWarps / kSplit * 16 * kM;
  static constexpr int kBlockM = kHeaddim <= 128 ? 32 : 16;
  static constexpr int kElements = (2 * kBlockN + 4 * kBlockM) * kHeaddim;
  static constexpr int kStatistics = 2 * kBlockM;  // of a tile of queries: lse, and delta
};

template <class T, int kHeaddim>
__global__ void __launch_bounds__(DkdvShape<kHeaddim>::kThreads)
    attention_bwd_dkdv_kernel(AttentionBwd a, bool vectors) {
  using Shape = DkdvShape<kHeaddim>;
  constexpr int kM = Shape::kM, kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kThreads = Shape::kThreads;
  constexpr int kN = kBlockM / 8, kD = kHeaddim / 8 / Shape::kSplit;
  using QueryTile = Tile<T, kBlockM, kHeaddim>;
  using KeyTile = Tile<T, kBlockN, kHeaddim>;
  using RowsOfWarp = Tile<T, 16 * kM, kHeaddim>;
  DYNAMIC_SHARED(T, memory);
  const Shared<T> query_memory = memory + 2 * KeyTile::kElements;
  const auto q_tile = [&](int j) { return QueryTile(query_memory + (j & 1) * 2 * QueryTile::kElements); };
  const auto dout_tile = [&](int j) { return QueryTile(query_memory + ((j & 1) * 2 + 1) * QueryTile::kElements); };
  const Shared<float> statistics = (memory + Shape::kElements).template as<float>();

  const int seqlen_q = static_cast<int>(a.shape.Tq), seqlen_k = static_cast<int>(a.shape.Tk);
  const Place at(a.shape, (seqlen_k + kBlockN - 1) / kBlockN);  // the first keys, which most queries see, go first
  const int start_n = at.tile * kBlockN;
  const Visible visible(a.shape, a.seqlens_k, at.b, a.is_causal);
  const HeadRows<T> q(a.q, at, seqlen_q, a.shape.D, vectors), dout(a.dout, at, seqlen_q, a.shape.D, vectors);
  const HeadRows<T> k(a.k, at, visible.keys(), a.shape.D, vectors), v(a.v, at, visible.keys(), a.shape.D, vectors);
  const int begin = visible.first_query(start_n) / kBlockM;
  const int end = start_n < visible.keys() ? (seqlen_q + kBlockM - 1) / kBlockM : begin;

  const int group = warp_id() / Shape::kSplit, chunk = warp_id() % Shape::kSplit * kD;
  const int warp_row = group * 16 * kM, first_key = start_n + warp_row, g = lane_id() / 4, t = lane_id() % 4;
  const RowsOfWarp k_of_warp(memory + warp_row * kHeaddim);
  const RowsOfWarp v_of_warp(memory + KeyTile::kElements + warp_row * kHeaddim);
  const float scale = a.scale * kLog2E;
  const bool dropping = a.drop.seed != nullptr;
  float dk[kM][kD][4] = {}, dv[kM][kD][4] = {};

  if (begin < end) {
    KeyTile(memory).template load<kThreads>(k, start_n);
    KeyTile(memory + KeyTile::kElements).template load<kThreads>(v, start_n);
  }
  for (int j = begin - 1; j < end; ++j) {  // at first there is nothing but to load
    const int start_m = j * kBlockM;
    if (j >= begin) {
      cp_async_wait<0>();
      __syncthreads();  // the tile is there, and nobody needs the one before it any more
    }
    float statistic = 0.0f;
    const int tid = static_cast<int>(threadIdx.x);
    if (j + 1 < end) {
      q_tile(j + 1).template load<kThreads>(q, start_m + kBlockM);
      dout_tile(j + 1).template load<kThreads>(dout, start_m + kBlockM);
      if (tid < Shape::kStatistics) {
        statistic = statistic_of(a, at, start_m + kBlockM + tid % kBlockM, tid / kBlockM);
      }
    }
    cp_async_commit();

    if (j >= begin && first_key <= visible.last(start_m + kBlockM - 1)) {
      const Shared<float> lse = statistics + (j & 1) * Shape::kStatistics + 2 * t, delta = lse + kBlockM;
      float p[kM][kN][4], ds[kM][kN][4];
      multiply_transposed(p, [&](uint32_t (&to)[4], int m, int i) { k_of_warp.load_a(to, 16 * m, i); }, q_tile(j));
      const bool masked = first_key + 16 * kM - 1 > visible.last(start_m);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const auto its_lse = lds((lse + 8 * n).template as<Vec<float, 2>>());
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) p[m][n][i] = fast_exp2(p[m][n][i] * scale - its_lse[i % 2]);
        }
        if (masked) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int last = visible.last(start_m + 8 * n + 2 * t + i % 2) - first_key - g - i / 2 * 8;
#pragma unroll
            for (int m = 0; m < kM; ++m) p[m][n][i] = 16 * m <= last ? p[m][n][i] : 0.0f;
          }
        }
      }
      uint32_t keep[kM];
      if (dropping) {
        const Dropper dropper(a.drop);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          keep[m] = kept_transposed<kN>(dropper, at.row(a.shape, start_m), first_key + 16 * m);
        }
        keep_only(ds, p, keep);
        multiply_add(dv, ds, dout_tile(j), chunk);
      } else {
        multiply_add(dv, p, dout_tile(j), chunk);
      }
      multiply_transposed(ds, [&](uint32_t (&to)[4], int m, int i) { v_of_warp.load_a(to, 16 * m, i); }, dout_tile(j));
      if (dropping) keep_only(ds, ds, keep);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const auto its_delta = lds((delta + 8 * n).template as<Vec<float, 2>>());
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - its_delta[i % 2]);
        }
        if (masked) {
          // A query that sees one key alone gives it all, whatever its score: of its ds, delta's rounding would be
          // left.
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const bool sees_one = visible.last(start_m + 8 * n + 2 * t + i % 2) == 0;
#pragma unroll
            for (int m = 0; m < kM; ++m) ds[m][n][i] = sees_one ? 0.0f : ds[m][n][i];
          }
        }
      }
      multiply_add(dk, ds, q_tile(j), chunk);
    }
    if (j + 1 < end && tid < Shape::kStatistics) {
      sts(statistics + ((j + 1) & 1) * Shape::kStatistics + tid, statistic);
    }
  }

  __syncthreads();  // the places of k and v are free
  const HeadRows<T> dk_rows(a.dk, at, seqlen_k, a.shape.D, vectors), dv_rows(a.dv, at, seqlen_k, a.shape.D, vectors);
  multiply(dk, a.scale * a.drop.scale);
  multiply(dv, a.drop.scale);
  k_of_warp.store(dk, chunk, dk_rows, first_key);
  v_of_warp.store(dv, chunk, dv_rows, first_key);
}

// ---- dq

template <int kHeaddim>
struct DqShape {
  static constexpr int kM = kHeaddim <= 128 ? 2 : 1;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlockM = kWarps * 16 * kM;
  static constexpr int kBlockN = kHeaddim <= 128 ? 32 : 16;
  static constexpr int kElements = (2 * kBlockM + 4 * kBlockN) * kHeaddim;
  static constexpr int kStatistics = 2 * kBlockM;  // lse and delta
};

template <class T, int kHeaddim>
__global__ void __launch_bounds__(DqShape<kHeaddim>::kThreads) attention_bwd_dq_kernel(AttentionBwd a, bool vectors) {
  using Shape = DqShape<kHeaddim>;
  constexpr int kM = Shape::kM, kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kThreads = Shape::kThreads;
  constexpr int kN = kBlockN / 8, kD = kHeaddim / 8;
  using QueryTile = Tile<T, kBlockM, kHeaddim>;
  using KeyTile = Tile<T, kBlockN, kHeaddim>;
  using RowsOfWarp = Tile<T, 16 * kM, kHeaddim>;
  DYNAMIC_SHARED(T, memory);
  const Shared<T> key_memory = memory + 2 * QueryTile::kElements;
  const Shared<float> statistics = (memory + Shape::kElements).template as<float>();
  const auto k_tile = [&](int j) { return KeyTile(key_memory + (j & 1) * 2 * KeyTile::kElements); };
  const auto v_tile = [&](int j) { return KeyTile(key_memory + ((j & 1) * 2 + 1) * KeyTile::kElements); };

  const int seqlen_q = static_cast<int>(a.shape.Tq), q_tiles = (seqlen_q + kBlockM - 1) / kBlockM;
  const Place at(a.shape, q_tiles);
  const int start_m = (q_tiles - 1 - at.tile) * kBlockM;
  const Visible visible(a.shape, a.seqlens_k, at.b, a.is_causal);
  const HeadRows<T> q(a.q, at, seqlen_q, a.shape.D, vectors), dout(a.dout, at, seqlen_q, a.shape.D, vectors);
  const HeadRows<T> k(a.k, at, visible.keys(), a.shape.D, vectors), v(a.v, at, visible.keys(), a.shape.D, vectors);
  const int tiles = max(0, visible.last(min(start_m + kBlockM, seqlen_q) - 1) + kBlockN) / kBlockN;

  const int warp_row = warp_id() * 16 * kM, first_row = start_m + warp_row, g = lane_id() / 4, t = lane_id() % 4;
  const int all_see = visible.last(first_row), some_see = visible.last(first_row + 16 * kM - 1);
  const RowsOfWarp q_of_warp(memory + warp_row * kHeaddim);
  const RowsOfWarp dout_of_warp(memory + QueryTile::kElements + warp_row * kHeaddim);
  const float scale = a.scale * kLog2E;
  float dq[kM][kD][4] = {};

  for (int i = static_cast<int>(threadIdx.x); i < Shape::kStatistics; i += kThreads) {
    sts(statistics + i, statistic_of(a, at, start_m + i % kBlockM, i / kBlockM));
  }
  QueryTile(memory).template load<kThreads>(q, start_m);
  QueryTile(memory + QueryTile::kElements).template load<kThreads>(dout, start_m);
  for (int j = -1; j < tiles; ++j) {  // at first there is nothing but to load
    const int start_n = j * kBlockN;
    if (j >= 0) {
      cp_async_wait<0>();
      __syncthreads();  // the tile is there, and nobody needs the one before it any more
    }
    if (j + 1 < tiles) {
      k_tile(j + 1).template load<kThreads>(k, start_n + kBlockN);
      v_tile(j + 1).template load<kThreads>(v, start_n + kBlockN);
    }
    cp_async_commit();
    if (j < 0 || start_n > some_see) continue;

    float p[kM][kN][4], ds[kM][kN][4];
    multiply_transposed(p, [&](uint32_t (&to)[4], int m, int i) { q_of_warp.load_a(to, 16 * m, i); }, k_tile(j));
    const Shared<float> lse = statistics + warp_row + g, delta = lse + kBlockM;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float its_lse = lds(lse + 16 * m + 8 * h);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i) p[m][n][i] = fast_exp2(p[m][n][i] * scale - its_lse);
        }
      }
    }
    multiply_transposed(ds, [&](uint32_t (&to)[4], int m, int i) { dout_of_warp.load_a(to, 16 * m, i); }, v_tile(j));
    if (a.drop.seed != nullptr) {
      const Dropper dropper(a.drop);
      uint32_t keep[kM];
#pragma unroll
      for (int m = 0; m < kM; ++m) keep[m] = kept<kN>(dropper, at.row(a.shape, first_row + 16 * m), start_n);
      keep_only(ds, ds, keep);
    }
    const bool masked = start_n + kBlockN - 1 > all_see;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float its_delta = lds(delta + 16 * m + 8 * h);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i) ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - its_delta);
        }
      }
      if (masked) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          // A query that sees one key alone has no gradient, but for delta's rounding.
          const int sees = visible.last(first_row + 16 * m + 8 * h + g);
          const int last = sees == 0 ? -1 : sees - start_n - 2 * t;
#pragma unroll
          for (int n = 0; n < kN; ++n) {
            if (8 * n > last) ds[m][n][2 * h] = 0.0f;
            if (8 * n + 1 > last) ds[m][n][2 * h + 1] = 0.0f;
          }
        }
      }
    }
    multiply_add(dq, ds, k_tile(j), 0);
  }

  cp_async_wait<0>();
  __syncthreads();  // q's place is free
  multiply(dq, a.scale * a.drop.scale);
  q_of_warp.store(dq, 0, HeadRows<T>(a.dq, at, seqlen_q, a.shape.D, vectors), first_row);
}

}  // namespace

void attention_bwd(const AttentionBwd& a, cudaStream_t stream) {
  const AttentionShape& s = a.shape;
  const auto of_queries = [&](const Heads& x) { return are_vectors(x, s, s.Tq, a.dtype); };
  const auto of_keys = [&](const Heads& x) { return are_vectors(x, s, s.Tk, a.dtype); };
  const bool vectors = of_queries(a.dout) && of_queries(a.q) && of_queries(a.o) && of_queries(a.dq) && of_keys(a.k) &&
                       of_keys(a.v) && of_keys(a.dk) && of_keys(a.dv);
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    launch<attention_bwd_delta_kernel<T>>(attention_grid(s, s.Tq, kDeltaRows), dim3(kDeltaLanes * kDeltaRows), 0,
                                          stream, a, vectors);
    if constexpr (std::is_same_v<T, float>) {
      attention_bwd_fp32(a, vectors, stream);
    } else {
      with_headdim(s.D, [&](auto headdim) {
        using Dkdv = DkdvShape<headdim()>;
        using Dq = DqShape<headdim()>;
        launch<attention_bwd_dkdv_kernel<T, headdim()>>(
            attention_grid(s, s.Tk, Dkdv::kBlockN), dim3(Dkdv::kThreads),
            Dkdv::kElements * sizeof(T) + 2 * Dkdv::kStatistics * sizeof(float), stream, a, vectors);
        launch<attention_bwd_dq_kernel<T, headdim()>>(attention_grid(s, s.Tq, Dq::kBlockM), dim3(Dq::kThreads),
                                                      Dq::kElements * sizeof(T) + Dq::kStatistics * sizeof(float),
                                                      stream, a, vectors);
      });
    }
  });
}

}  // namespace fastgpt::cuda
