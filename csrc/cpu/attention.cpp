// Attention: o = softmax(q k^T * scale) v and its gradients, head by head, without ever holding the (Tq, Tk) matrix.
//
// All products but those of a single query are made of one small piece, the tile of tile.h. Its operands are copied
// ("packed") once per head, or per block of keys, into rows and panels of whole vectors, so that the inner loop has no
// bounds, no strides and no conversion; the copies are small beside the products, and strided inputs cost nothing more.
//
// The forward runs over blocks of keys with an online softmax (Milakov and Gimelshein, 2018; Dao et al., 2022): the
// panels of a block stay in the L2 cache, a tile's scores in L1. The backward makes the transposed tiles k q^T and v
// do^T: a row of such a tile is a key and a lane a query, so that dv += p do, dk += ds q and dq += ds^T k all read it
// as it lies, and lse and delta are vectors. dq is summed in fp32 beside the loop over keys; nothing is added to by two
// threads.

#include "math.h"
#include "philox.h"
#include "rows.h"
#include "tile.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// Queries whose sums one item of the forward keeps; keys in a block of the forward and of the backward; queries in a
// block of the backward. All are multiples of 4 * kLanes, so that a Philox vector of keys stays within a block.
constexpr int64_t kQueryChunk = 256;
constexpr int64_t kKeyBlock = 128;
constexpr int64_t kKeyBlockBwd = 64;
constexpr int64_t kQueryBlockBwd = 64;

// Which keys a query of one sequence sees: 0 to last(query), which may be -1.
struct Visible {
  int64_t keys;    // valid keys of the sequence
  int64_t offset;  // causal: query i sees keys up to i + offset
  bool is_causal;

  Visible(const AttentionShape& s, const int32_t* seqlens_k, int64_t b, bool causal)
      : keys(seqlens_k == nullptr ? s.Tk : max<int64_t>(0, min<int64_t>(seqlens_k[b], s.Tk))),
        offset(keys - s.Tq),
        is_causal(causal) {}

  int64_t last(int64_t query) const { return is_causal ? query + offset : keys - 1; }
  // Of kLanes queries: the others have p = 1 whatever their score, and ds = 0, of which delta's rounding would leave
  // some.
  VecI sees_more_than_one(int64_t query) const {
    const int32_t first = static_cast<int32_t>(max<int64_t>(-kLanes, min<int64_t>(last(query), 1)));
    return (is_causal ? lane_ids() : VecI{}) + first > 0;
  }
  int64_t first_query(int64_t key) const { return is_causal ? max<int64_t>(0, key - offset) : 0; }
};

template <class T>
Source<T> head_of(const Heads& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t D) {
  // No rows, no memory: a tensor without elements has a null pointer, which nothing may be added to.
  const int64_t start = rows == 0 ? 0 : b * x.stride_b + h * x.stride_h + first * x.stride_t;
  return {static_cast<const T*>(x.data) + start, x.stride_t, rows, D};
}

template <class T>
T* row_of(const Heads& x, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(x.data) + b * x.stride_b + h * x.stride_h + t * x.stride_t;
}

// Sizes of packed operands: units of a row, rounded up to vectors; elements of a row likewise.
template <class Math>
struct Pitch {
  int64_t units, row, panel;

  explicit Pitch(int64_t D)
      : units(ceil_div(D, Math::kPerUnit)), row(round_up(units, kLanes)), panel(round_up(D, kLanes)) {}
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------------------------------

template <class Math>
struct ForwardBuffers {
  typename Math::Unit *q, *kt, *v;  // (kQueryChunk, row), (row, kKeyBlock), (kKeyBlock / kPerUnit, panel)
  float *acc, *max, *sum;           // (kQueryChunk, panel), (kQueryChunk,), (kQueryChunk, kLanes)
  float* scores;                    // (kRows, kKeyBlock)
  typename Math::Unit* probs;       // (kRows, kKeyBlock / kPerUnit)
};

// One tile of queries against one block of keys: scores, online softmax, and the product with the values.
template <class Math>
inline void forward_tile(const AttentionFwd& a, const ForwardBuffers<Math>& buf, const Pitch<Math>& pitch,
                         const Visible& visible, const Dropper* dropper, int64_t head, int64_t i0, int64_t rows,
                         int64_t r0, int64_t k0) {
  constexpr int64_t kUnitsPerVec = kLanes / Math::kPerUnit;
  const int64_t last_row = min(r0 + kRows, rows) - 1;
  const int64_t seen = min(visible.last(i0 + last_row) + 1 - k0, kKeyBlock);
  if (seen <= 0) return;
  const int64_t vecs = ceil_div(seen, kLanes);

  for_each_group(0, vecs, [&](int64_t v, auto count) {
    Tile<count.value> tile{};
    multiply_add<Math, count.value>(tile, pitch.units, buf.q + r0 * pitch.row, pitch.row, 1, buf.kt + v * kLanes,
                                    kKeyBlock);
    store_tile<count.value>(tile, buf.scores + v * kLanes, kKeyBlock);
  });

  float correction[kRows];
  for (int64_t r = 0; r < kRows; ++r) {
    float* scores = buf.scores + r * kKeyBlock;
    typename Math::Unit* probs = buf.probs + r * kKeyBlock / Math::kPerUnit;
    const int64_t last = visible.last(i0 + min(r0 + r, rows - 1)) - k0;  // in this block
    Vec largest = splat(-kInfinity);
    for (int64_t v = 0; v < vecs; ++v) {
      Vec s = load(scores + v * kLanes) * a.scale;
      if ((v + 1) * kLanes - 1 > last) {
        s = lane_ids() <= static_cast<int32_t>(max<int64_t>(last - v * kLanes, -1)) ? s : splat(-kInfinity);
      }
      largest = vmax(largest, s);
      store(scores + v * kLanes, s);
    }
    const float before = buf.max[r0 + r];
    const float now = max(before, max_lane(largest));
    const float shift = now == -kInfinity ? 0.0f : now;
    buf.max[r0 + r] = now;
    correction[r] = vexp(splat(before - shift))[0];
    Vec sum = load(buf.sum + (r0 + r) * kLanes) * correction[r];
    for (int64_t v = 0; v < vecs; ++v) {
      Vec p = vexp(load(scores + v * kLanes) - shift);
      sum += p;
      if (dropper == nullptr) {
        Math::store_row(probs + v * kUnitsPerVec, p);
      } else {
        store(scores + v * kLanes, p);
      }
    }
    store(buf.sum + (r0 + r) * kLanes, sum);
    if (dropper != nullptr) {
      const uint64_t row = head * a.shape.Tq + i0 + r0 + r;
      for (int64_t v = 0; v < vecs; v += 4) {
        VecU words[4];
        attention_words(*dropper, row, (k0 + v * kLanes) / 4, words);
        for (int64_t w = 0; w < min<int64_t>(4, vecs - v); ++w) {
          const Vec p = load(scores + (v + w) * kLanes);
          Math::store_row(probs + (v + w) * kUnitsPerVec, dropper->apply(p, words[w]));
        }
      }
    }
  }

  for_each_group(0, pitch.panel / kLanes, [&](int64_t v, auto count) {
    float* acc = buf.acc + r0 * pitch.panel + v * kLanes;
    Tile<count.value> tile;
    load_tile<count.value>(tile, acc, pitch.panel);
    for (int r = 0; r < kRows; ++r) {
      for (Vec& x : tile[r]) x *= correction[r];
    }
    multiply_add<Math, count.value>(tile, vecs * kUnitsPerVec, buf.probs, kKeyBlock / Math::kPerUnit, 1,
                                    buf.v + v * kLanes, pitch.panel);
    store_tile<count.value>(tile, acc, pitch.panel);
  });
}

template <class Math, class T>
void forward(const Pool& pool, const AttentionFwd& a) {
  using Unit = typename Math::Unit;
  const AttentionShape s = a.shape;
  const Pitch<Math> pitch(s.D);
  const int64_t chunks = ceil_div(s.Tq, kQueryChunk), rows_at_most = round_up(min(s.Tq, kQueryChunk), kRows);
  const Dropper dropping(a.drop);
  const Dropper* dropper = a.drop.threshold == 0 ? nullptr : &dropping;

  parallel_for(pool, s.B * s.H * chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    const ForwardBuffers<Math> buf = scratch.allocate([&](Scratch& m) {
      return ForwardBuffers<Math>{m.take<Unit>(rows_at_most * pitch.row),
                                  m.take<Unit>(pitch.row * kKeyBlock),
                                  m.take<Unit>(kKeyBlock / Math::kPerUnit * pitch.panel),
                                  m.take<float>(rows_at_most * pitch.panel),
                                  m.take<float>(rows_at_most),
                                  m.take<float>(rows_at_most * kLanes),
                                  m.take<float>(kRows * kKeyBlock),
                                  m.take<Unit>(kRows * kKeyBlock / Math::kPerUnit)};
    });
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / chunks, b = head / s.H, h = head % s.H;
      const int64_t i0 = item % chunks * kQueryChunk, rows = min(s.Tq - i0, kQueryChunk);
      const int64_t tiled_rows = round_up(rows, kRows);
      const Visible visible(s, a.seqlens_k, b, a.is_causal);
      pack_rows<Math>(head_of<T>(a.q, b, h, i0, rows, s.D), tiled_rows, pitch.row, buf.q);
      for (int64_t i = 0; i < tiled_rows * pitch.panel; i += kLanes) store(buf.acc + i, Vec{});
      for (int64_t i = 0; i < tiled_rows; ++i) {
        buf.max[i] = -kInfinity;
        store(buf.sum + i * kLanes, Vec{});
      }
      for (int64_t k0 = 0; k0 <= visible.last(i0 + rows - 1); k0 += kKeyBlock) {
        const int64_t keys = min(visible.last(i0 + rows - 1) + 1 - k0, kKeyBlock), padded = round_up(keys, kLanes);
        pack_transposed<Math>(head_of<T>(a.k, b, h, k0, keys, s.D), padded, kKeyBlock, buf.kt);
        pack_panel<Math>(head_of<T>(a.v, b, h, k0, keys, s.D), padded, pitch.panel, buf.v);
        for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
          forward_tile(a, buf, pitch, visible, dropper, head, i0, rows, r0, k0);
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        const float total = sum(load(buf.sum + i * kLanes));
        const float inverse = total > 0.0f ? 1.0f / total : 0.0f;  // a query that sees no key gives 0
        T* o = row_of<T>(a.o, b, h, i0 + i);
        for_each_vec(s.D, [&](int64_t d, int n) { store_n(o + d, load(buf.acc + i * pitch.panel + d) * inverse, n); });
        a.lse[head * s.Tq + i0 + i] = total > 0.0f ? buf.max[i] + vlog(splat(total))[0] : kInfinity;
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward of one query
// ---------------------------------------------------------------------------------------------------------------------

// The scores of `count` keys, from `first` on.
template <int count, class T>
inline void score_keys(const float* q, const Source<T>& keys, int64_t first, float scale, float* scores) {
  Vec totals[count] = {};
  for_each_vec(keys.width, [&](int64_t d, int n) {
    const Vec x = load_n(q + d, n);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) totals[i] += x * load_n(keys.row(first + i) + d, n);
  });
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) scores[first + i] = sum(totals[i]) * scale;
}

// total += the values of `count` keys, from `first` on, each times its p.
template <int count, class T>
inline void add_values(const float* p, const Source<T>& values, int64_t first, float* total) {
  for_each_vec(values.width, [&](int64_t d, int n) {
    Vec sum = load_n(total + d, n);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) sum += load_n(values.row(first + i) + d, n) * p[first + i];
    store_n(total + d, sum, n);
  });
}

// As a step of generation has it. There is nothing to pack for: each key and value is read once, where it lies.
template <class T>
void forward_of_one(const Pool& pool, const AttentionFwd& a) {
  const AttentionShape s = a.shape;
  parallel_for(pool, s.B * s.H, row_grain(2 * s.Tk * s.D), [&](int64_t begin, int64_t end) {
    struct Buffers {
      float *q, *scores, *total;
    };
    Scratch scratch;
    const Buffers buf = scratch.allocate(
        [&](Scratch& m) { return Buffers{m.take<float>(s.D), m.take<float>(s.Tk), m.take<float>(s.D)}; });
    for (int64_t head = begin; head < end; ++head) {
      const int64_t b = head / s.H, h = head % s.H;
      const int64_t keys = Visible(s, a.seqlens_k, b, a.is_causal).keys;  // its mask hides none of them
      const Source<T> k = head_of<T>(a.k, b, h, 0, keys, s.D), v = head_of<T>(a.v, b, h, 0, keys, s.D);
      const T* q = row_of<T>(a.q, b, h, 0);
      for_each_vec(s.D, [&](int64_t d, int n) {
        store_n(buf.q + d, load_n(q + d, n), n);
        store_n(buf.total + d, Vec{}, n);
      });
      int64_t j = 0;
      for (; j + kRows <= keys; j += kRows) score_keys<kRows>(buf.q, k, j, a.scale, buf.scores);
      for (; j < keys; ++j) score_keys<1>(buf.q, k, j, a.scale, buf.scores);
      const ExponentialSum e =
          exponential_sum(keys, [&](int64_t i, int n) { return load_n(buf.scores + i, n); }, buf.scores);
      for (j = 0; j + kRows <= keys; j += kRows) add_values<kRows>(buf.scores, v, j, buf.total);
      for (; j < keys; ++j) add_values<1>(buf.scores, v, j, buf.total);
      const float inverse = e.total > 0.0f ? 1.0f / e.total : 0.0f;
      T* o = row_of<T>(a.o, b, h, 0);
      for_each_vec(s.D, [&](int64_t d, int n) { store_n(o + d, load_n(buf.total + d, n) * inverse, n); });
      a.lse[head] = e.total > 0.0f ? e.shift + vlog(splat(e.total))[0] : kInfinity;
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward
// ---------------------------------------------------------------------------------------------------------------------

template <class Math>
struct BackwardBuffers {
  using Unit = typename Math::Unit;
  // Of all queries: q and do, transposed (row, padded queries) and as panels (padded queries / kPerUnit, panel); lse
  // and delta (padded queries,), +inf and 0 beyond the last one; and dq's sum (padded queries, panel).
  Unit *qt, *dot, *q, *dout;
  float *lse, *delta, *dq;
  // Of a block of keys: k and v as rows and k as a panel; sums of dk and dv (kKeyBlockBwd, panel).
  Unit *k_rows, *v_rows, *k;
  float *dk, *dv;
  // Of a tile of keys and a block of queries: scores (kRows, kQueryBlockBwd), and p (dropped) and ds as operands.
  float* scores;
  Unit *p, *ds;  // (kRows, kQueryBlockBwd / kPerUnit)
  Unit* dst;  // (kKeyBlockBwd / kPerUnit, kQueryBlockBwd): ds of the whole block of keys, to be multiplied along them
};

// One tile of keys against one block of queries: p and ds, and what they add to dv and dk.
template <class Math>
inline void backward_tile(const AttentionBwd& a, const BackwardBuffers<Math>& buf, const Pitch<Math>& pitch,
                          int64_t padded_q, const Visible& visible, const Dropper* dropper, int64_t head, int64_t k0,
                          int64_t r0, int64_t i0) {
  constexpr int64_t kPitch = kQueryBlockBwd / Math::kPerUnit, kUnitsPerVec = kLanes / Math::kPerUnit;
  const int64_t key = k0 + r0;
  const int64_t begin = max<int64_t>(0, visible.first_query(key) - i0) / kLanes;
  const int64_t end = min(kQueryBlockBwd, padded_q - i0) / kLanes;
  if (begin >= end) return;

  for_each_group(begin, end, [&](int64_t v, auto count) {
    Tile<count.value> tile{};
    multiply_add<Math, count.value>(tile, pitch.units, buf.k_rows + r0 * pitch.row, pitch.row, 1,
                                    buf.qt + i0 + v * kLanes, padded_q);
    store_tile<count.value>(tile, buf.scores + v * kLanes, kQueryBlockBwd);
  });
  for_each_group(begin, end, [&](int64_t v, auto count) {
    Tile<count.value> dp{};
    multiply_add<Math, count.value>(dp, pitch.units, buf.v_rows + r0 * pitch.row, pitch.row, 1,
                                    buf.dot + i0 + v * kLanes, padded_q);
    for (int64_t w = 0; w < count.value; ++w) {
      const int64_t i = (v + w) * kLanes;
      const Vec lse = load(buf.lse + i0 + i), delta = load(buf.delta + i0 + i);
      VecU words[kRows];
      if (dropper != nullptr) key_words(*dropper, head * a.shape.Tq + i0 + i, key / 4, words);
      Vec ds[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        Vec p = vexp(rounded(load(buf.scores + r * kQueryBlockBwd + i) * a.scale) - lse);
        const int64_t hidden = visible.first_query(key + r) - i0 - i;  // lanes below see nothing of this key
        if (key + r >= visible.keys) {
          p = Vec{};
        } else if (hidden > 0) {
          p = lane_ids() >= static_cast<int32_t>(min<int64_t>(hidden, kLanes)) ? p : Vec{};
        }
        Vec dropped = p, d = dp[r][w];
        if (dropper != nullptr) {
          dropped = dropper->apply(p, words[r]);
          d = dropper->apply(d, words[r]);
        }
        ds[r] = p * (d - delta);
        if (key + r == 0) ds[r] = visible.sees_more_than_one(i0 + i) ? ds[r] : Vec{};
        Math::store_row(buf.p + r * kPitch + i / Math::kPerUnit, dropped);
        Math::store_row(buf.ds + r * kPitch + i / Math::kPerUnit, ds[r]);
      }
      for (int64_t r = 0; r < kRows; r += Math::kPerUnit) {
        Math::store_units(buf.dst + (r0 + r) / Math::kPerUnit * kQueryBlockBwd + i, Math::unit_of(ds + r));
      }
    }
  });
  const int64_t units = (end - begin) * kUnitsPerVec, first = begin * kUnitsPerVec;
  const int64_t panel_row = (i0 + begin * kLanes) / Math::kPerUnit * pitch.panel;
  for_each_group(0, pitch.panel / kLanes, [&](int64_t v, auto count) {
    Tile<count.value> tile;
    float* dv = buf.dv + r0 * pitch.panel + v * kLanes;
    load_tile<count.value>(tile, dv, pitch.panel);
    multiply_add<Math, count.value>(tile, units, buf.p + first, kPitch, 1, buf.dout + panel_row + v * kLanes,
                                    pitch.panel);
    store_tile<count.value>(tile, dv, pitch.panel);
    float* dk = buf.dk + r0 * pitch.panel + v * kLanes;
    load_tile<count.value>(tile, dk, pitch.panel);
    multiply_add<Math, count.value>(tile, units, buf.ds + first, kPitch, 1, buf.q + panel_row + v * kLanes,
                                    pitch.panel);
    store_tile<count.value>(tile, dk, pitch.panel);
  });
}

// dq of a block of queries += ds^T k over a block of `keys` keys.
template <class Math>
inline void add_to_dq(const BackwardBuffers<Math>& buf, const Pitch<Math>& pitch, int64_t padded_q,
                      const Visible& visible, int64_t k0, int64_t keys, int64_t i0) {
  for (int64_t i = 0; i < min(kQueryBlockBwd, padded_q - i0); i += kRows) {
    const int64_t seen = min(visible.last(i0 + i + kRows - 1) + 1 - k0, keys);
    if (seen <= 0) continue;
    const int64_t units = round_up(seen, kRows) / Math::kPerUnit;
    for_each_group(0, pitch.panel / kLanes, [&](int64_t v, auto count) {
      float* dq = buf.dq + (i0 + i) * pitch.panel + v * kLanes;
      Tile<count.value> tile;
      load_tile<count.value>(tile, dq, pitch.panel);
      multiply_add<Math, count.value>(tile, units, buf.dst + i, 1, kQueryBlockBwd, buf.k + v * kLanes, pitch.panel);
      store_tile<count.value>(tile, dq, pitch.panel);
    });
  }
}

template <class Math, class T>
void backward(const Pool& pool, const AttentionBwd& a) {
  using Unit = typename Math::Unit;
  const AttentionShape s = a.shape;
  const Pitch<Math> pitch(s.D);
  const int64_t splits = attention_splits(s), padded_q = round_up(s.Tq, kLanes);
  const int64_t blocks = ceil_div(s.Tk, kKeyBlockBwd);
  const Dropper dropping(a.drop);
  const Dropper* dropper = a.drop.threshold == 0 ? nullptr : &dropping;

  parallel_for(pool, s.B * s.H * splits, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    const BackwardBuffers<Math> buf = scratch.allocate([&](Scratch& m) {
      const int64_t panel = padded_q / Math::kPerUnit * pitch.panel;
      return BackwardBuffers<Math>{m.take<Unit>(pitch.row * padded_q),
                                   m.take<Unit>(pitch.row * padded_q),
                                   m.take<Unit>(panel),
                                   m.take<Unit>(panel),
                                   m.take<float>(padded_q),
                                   m.take<float>(padded_q),
                                   m.take<float>(padded_q * pitch.panel),
                                   m.take<Unit>(kKeyBlockBwd * pitch.row),
                                   m.take<Unit>(kKeyBlockBwd * pitch.row),
                                   m.take<Unit>(kKeyBlockBwd / Math::kPerUnit * pitch.panel),
                                   m.take<float>(kKeyBlockBwd * pitch.panel),
                                   m.take<float>(kKeyBlockBwd * pitch.panel),
                                   m.take<float>(kRows * kQueryBlockBwd),
                                   m.take<Unit>(kRows * kQueryBlockBwd / Math::kPerUnit),
                                   m.take<Unit>(kRows * kQueryBlockBwd / Math::kPerUnit),
                                   m.take<Unit>(kKeyBlockBwd / Math::kPerUnit * kQueryBlockBwd)};
    });
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / splits, split = item % splits, b = head / s.H, h = head % s.H;
      const Visible visible(s, a.seqlens_k, b, a.is_causal);
      const Source<T> q = head_of<T>(a.q, b, h, 0, s.Tq, s.D), dout = head_of<T>(a.dout, b, h, 0, s.Tq, s.D);
      pack_transposed<Math>(q, padded_q, padded_q, buf.qt);
      pack_transposed<Math>(dout, padded_q, padded_q, buf.dot);
      pack_panel<Math>(q, padded_q, pitch.panel, buf.q);
      pack_panel<Math>(dout, padded_q, pitch.panel, buf.dout);
      for (int64_t i = 0; i < padded_q; ++i) {
        Vec products{};
        if (i < s.Tq) {
          const T* o = row_of<T>(a.o, b, h, i);
          for_each_vec(s.D, [&](int64_t d, int n) { products += load_n(dout.row(i) + d, n) * load_n(o + d, n); });
        }
        buf.delta[i] = sum(products);
        buf.lse[i] = i < s.Tq ? a.lse[head * s.Tq + i] : kInfinity;
      }
      for (int64_t i = 0; i < padded_q * pitch.panel; i += kLanes) store(buf.dq + i, Vec{});

      for (int64_t block = blocks * split / splits; block < blocks * (split + 1) / splits; ++block) {
        const int64_t k0 = block * kKeyBlockBwd, keys = min(s.Tk - k0, kKeyBlockBwd), tiled = round_up(keys, kRows);
        const int64_t valid = max<int64_t>(0, min(keys, visible.keys - k0));  // what lies beyond may be anything
        const Source<T> k = head_of<T>(a.k, b, h, k0, valid, s.D);
        for (int64_t i = 0; i < tiled * pitch.panel; i += kLanes) {
          store(buf.dk + i, Vec{});
          store(buf.dv + i, Vec{});
        }
        if (k0 < visible.keys) {
          pack_rows<Math>(k, tiled, pitch.row, buf.k_rows);
          pack_rows<Math>(head_of<T>(a.v, b, h, k0, valid, s.D), tiled, pitch.row, buf.v_rows);
          pack_panel<Math>(k, tiled, pitch.panel, buf.k);
          const int64_t first = visible.first_query(k0) / kQueryBlockBwd * kQueryBlockBwd;
          for (int64_t i0 = first; i0 < padded_q; i0 += kQueryBlockBwd) {
            for (int64_t r0 = 0; r0 < tiled; r0 += kRows) {
              backward_tile(a, buf, pitch, padded_q, visible, dropper, head, k0, r0, i0);
            }
            add_to_dq(buf, pitch, padded_q, visible, k0, keys, i0);
          }
        }
        for (int64_t j = 0; j < keys; ++j) {
          T *dk = row_of<T>(a.dk, b, h, k0 + j), *dv = row_of<T>(a.dv, b, h, k0 + j);
          for_each_vec(s.D, [&](int64_t d, int n) {
            store_n(dk + d, load(buf.dk + j * pitch.panel + d) * a.scale, n);
            store_n(dv + d, load(buf.dv + j * pitch.panel + d), n);
          });
        }
      }
      for (int64_t i = 0; i < s.Tq; ++i) {
        const float* dq = buf.dq + i * pitch.panel;
        if (splits == 1) {
          T* out = row_of<T>(a.dq, b, h, i);
          for_each_vec(s.D, [&](int64_t d, int n) { store_n(out + d, load(dq + d) * a.scale, n); });
        } else {
          float* out = a.dq_partial + (item * s.Tq + i) * s.D;
          for_each_vec(s.D, [&](int64_t d, int n) { store_n(out + d, load(dq + d) * a.scale, n); });
        }
      }
    }
  });
  if (splits == 1) return;
  parallel_for(pool, s.B * s.H * s.Tq, row_grain(s.D * splits), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t head = row / s.Tq, i = row % s.Tq;
      T* out = row_of<T>(a.dq, head / s.H, head % s.H, i);
      for_each_vec(s.D, [&](int64_t d, int n) {
        Vec total{};
        for (int64_t split = 0; split < splits; ++split) {
          total += load_n(a.dq_partial + ((head * splits + split) * s.Tq + i) * s.D + d, n);
        }
        store_n(out + d, total, n);
      });
    }
  });
}

}  // namespace

void attention_fwd(const Pool& pool, const AttentionFwd& a) {
  if (a.shape.Tq == 1 && a.drop.threshold == 0) {
    return with_dtype(a.dtype, [&](auto t) { forward_of_one<decltype(t)>(pool, a); });
  }
#if defined(__AVX512BF16__)
  if (a.dtype == Dtype::bf16) return forward<Pairs, bf16>(pool, a);
#endif
  with_dtype(a.dtype, [&](auto t) { forward<Singles, decltype(t)>(pool, a); });
}

void attention_bwd(const Pool& pool, const AttentionBwd& a) {
#if defined(__AVX512BF16__)
  if (a.dtype == Dtype::bf16) return backward<Pairs, bf16>(pool, a);
#endif
  with_dtype(a.dtype, [&](auto t) { backward<Singles, decltype(t)>(pool, a); });
}

}  // namespace fastgpt::FASTGPT_ISA
