// The forward of attention on tensor cores (Dao, "FlashAttention-2", 2023): o = softmax(q k^T * scale) v without the
// (Tq, Tk) matrix.
//
// A block owns kBlockM queries of one head, a warp 16 * kM of them, and walks over the keys, kBlockN at a time. A warp
// has whole rows of scores in its registers, so that the softmax needs two shuffles and no shared memory, and what
// comes out of the first product is, rounded, an operand of the second. For each query it keeps the largest score so
// far, the sum of exponentials and the weighted sum of values; a larger score rescales both sums (the online softmax).
//
// What moves: q and o once; k and v once for each block of queries, of which the L2 cache serves all but the first.
// While a tile of k and v is used, the next one is on its way into the other half of shared memory: one barrier a tile.
// Causal: tiles above the diagonal are not visited, by a warp even where its block does; tiles below it carry no mask.
// The last queries see the most keys, and go first, so that the short blocks fill what is left at the end.

#include "attention_fwd.cuh"

namespace fastgpt::cuda {
namespace {

template <int kHeaddim>
struct FwdShape {
  static constexpr int kM = kHeaddim <= 128 ? 2 : 1;  // 16-row products of a warp: two share each operand that is read
  static constexpr int kBlockN = kHeaddim <= 96 ? 64 : 32;
  static constexpr bool kHoldQ = kHeaddim <= 64;  // in registers; otherwise it is read again for each tile
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlockM = kWarps * 16 * kM;
  static constexpr int kElements = (kBlockM + 4 * kBlockN) * kHeaddim;  // of shared memory: q, and k and v twice
};

template <class T, int kHeaddim>
__global__ void __launch_bounds__(FwdShape<kHeaddim>::kThreads) attention_fwd_kernel(AttentionFwd a, bool vectors) {
  using Shape = FwdShape<kHeaddim>;
  constexpr int kM = Shape::kM, kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kThreads = Shape::kThreads;
  constexpr int kN = kBlockN / 8, kD = kHeaddim / 8;
  using KeyTile = Tile<T, kBlockN, kHeaddim>;
  DYNAMIC_SHARED(T, memory);
  const Tile<T, kBlockM, kHeaddim> q_tile(memory);
  const auto k_tile = [&](int j) { return KeyTile(memory + kBlockM * kHeaddim + (j & 1) * 2 * KeyTile::kElements); };
  const auto v_tile = [&](int j) {
    return KeyTile(memory + kBlockM * kHeaddim + ((j & 1) * 2 + 1) * KeyTile::kElements);
  };

  const int seqlen_q = static_cast<int>(a.shape.Tq), q_tiles = (seqlen_q + kBlockM - 1) / kBlockM;
  const Place at(a.shape, q_tiles);
  const int start_m = (q_tiles - 1 - at.tile) * kBlockM;
  const Visible visible(a.shape, a.seqlens_k, at.b, a.is_causal);
  const HeadRows<T> q(a.q, at, seqlen_q, a.shape.D, vectors), o(a.o, at, seqlen_q, a.shape.D, vectors);
  const HeadRows<T> k(a.k, at, visible.keys(), a.shape.D, vectors), v(a.v, at, visible.keys(), a.shape.D, vectors);
  const int tiles = max(0, visible.last(min(start_m + kBlockM, seqlen_q) - 1) + kBlockN) / kBlockN;

  const int warp_row = warp_id() * 16 * kM, first_row = start_m + warp_row;
  const int all_see = visible.last(first_row), some_see = visible.last(first_row + 16 * kM - 1);
  const uint32_t sign = a.scale < 0 ? 0x80008000u : 0;

  uint32_t q_held[Shape::kHoldQ ? kD / 2 : 1][Shape::kHoldQ ? kM : 1][4];
  const Tile<T, 16 * kM, kHeaddim> q_of_warp(memory + warp_row * kHeaddim);
  const auto load_q = [&](uint32_t (&to)[4], int m, int i) {
    q_of_warp.load_a(to, 16 * m, i);
#pragma unroll
    for (uint32_t& pair : to) pair ^= sign;  // a negative scale's
  };
  OnlineSoftmax<kM> softmax(a.scale);
  float acc[kM][kD][4] = {};

  q_tile.template load<kThreads>(q, start_m);
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
    if (Shape::kHoldQ && j == 0) {
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) {
#pragma unroll
        for (int m = 0; m < kM; ++m) load_q(q_held[Shape::kHoldQ ? i : 0][Shape::kHoldQ ? m : 0], m, i);
      }
    }

    float s[kM][kN][4];
    multiply_transposed(
        s,
        [&](uint32_t (&to)[4], int m, int i) {
          if constexpr (Shape::kHoldQ) {
#pragma unroll
            for (int e = 0; e < 4; ++e) to[e] = q_held[i][m][e];
          } else {
            load_q(to, m, i);
          }
        },
        k_tile(j));
    if (start_n + kBlockN - 1 > all_see) hide(s, visible, first_row, start_n);
    softmax.weigh(s, [&](int m, int h, float correction) { multiply_rows(acc[m], h, correction); });
    if (a.drop.seed != nullptr) {
      const Dropper dropper(a.drop);  // here, and not held in registers as the loop goes round
      uint32_t keep[kM];
#pragma unroll
      for (int m = 0; m < kM; ++m) keep[m] = kept<kN>(dropper, at.row(a.shape, first_row + 16 * m), start_n);
      keep_only(s, s, keep);
    }
    multiply_add(acc, s, v_tile(j), 0);
  }

  softmax.finish(acc, a, at, first_row);
  cp_async_wait<0>();
  __syncthreads();  // q's place is free
  q_of_warp.store(acc, 0, o, first_row);
}

}  // namespace

void attention_fwd(const AttentionFwd& a, cudaStream_t stream) {
  const AttentionShape& s = a.shape;
  const bool vectors = are_vectors(a.q, s, s.Tq, a.dtype) && are_vectors(a.k, s, s.Tk, a.dtype) &&
                       are_vectors(a.v, s, s.Tk, a.dtype) && are_vectors(a.o, s, s.Tq, a.dtype);
  if (attention_fwd_sm90(a, vectors, stream)) return;
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, float>) {
      attention_fwd_fp32(a, vectors, stream);
    } else {
      with_headdim(s.D, [&](auto headdim) {
        using Shape = FwdShape<headdim()>;
        launch<attention_fwd_kernel<T, headdim()>>(attention_grid(s, s.Tq, Shape::kBlockM), dim3(Shape::kThreads),
                                                   Shape::kElements * sizeof(T), stream, a, vectors);
      });
    }
  });
}

}  // namespace fastgpt::cuda
