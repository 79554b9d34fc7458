// What the attention kernels are made of: which keys a query sees, tiles in shared memory and their products on the
// tensor cores, and dropout's mask as their accumulators lie.
//
// A tile has rows of one head, kHeaddim 16-bit elements each; what lies beyond the head's rows or columns is zero, and
// never read: it might be NaN, which no zero probability takes away. A row's 16-byte chunks are permuted by its number
// (swizzled), so that eight rows' chunks of one column, which ldmatrix reads at once, lie in all 32 banks, and so do
// eight chunks of one row, which a copy writes at once.

#pragma once

#include "philox.cuh"
#include "rows.cuh"

namespace fastgpt::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

// Which keys the queries of one sequence see: 0 to last(query), which may be negative.
class Visible {
 public:
  FASTGPT_PRIM Visible(const AttentionShape& s, const int32_t* seqlens_k, int64_t b, bool is_causal)
      : keys_(static_cast<int>(s.Tk)), is_causal_(is_causal) {
    if (seqlens_k != nullptr) keys_ = max(0, min(ldg(seqlens_k + b), keys_));
    shift_ = keys_ - static_cast<int>(s.Tq);
  }

  FASTGPT_PRIM int keys() const { return keys_; }
  FASTGPT_PRIM int last(int query) const { return is_causal_ ? min(query + shift_, keys_ - 1) : keys_ - 1; }
  FASTGPT_PRIM int first_query(int key) const { return is_causal_ ? max(0, key - shift_) : 0; }

 private:
  int keys_, shift_;
  bool is_causal_;
};

// The block's work: one head, and `tile` of the `tiles` that its rows are cut into. The blocks of a head follow each
// other, so that the L2 cache holds what they share.
struct Place {
  int head, b, h, tile;

  FASTGPT_PRIM Place(const AttentionShape& s, int tiles) {
    const unsigned each = static_cast<unsigned>(tiles), nheads = static_cast<unsigned>(s.H);
    head = static_cast<int>(blockIdx.x / each);
    tile = static_cast<int>(blockIdx.x % each);
    b = static_cast<int>(blockIdx.x / each / nheads);
    h = static_cast<int>(blockIdx.x / each % nheads);
  }

  // The number of a query of this head, among those of all heads.
  FASTGPT_PRIM int64_t row(const AttentionShape& s, int query) const { return head * s.Tq + query; }
};

inline dim3 attention_grid(const AttentionShape& s, int64_t rows, int64_t rows_of_block) {
  return grid_of(s.B * s.H * ((rows + rows_of_block - 1) / rows_of_block));
}

// The (rows, headdim) matrix of one head.
template <class T>
struct HeadRows {
  T* data;
  int64_t stride;
  int rows, headdim;
  bool vectors;  // every row is aligned to 16 bytes, and a multiple of them long

  FASTGPT_PRIM HeadRows(const Heads& x, const Place& at, int64_t rows_, int64_t headdim_, bool vectors_)
      : data(static_cast<T*>(x.data)),
        stride(x.stride_t),
        rows(static_cast<int>(rows_)),
        headdim(static_cast<int>(headdim_)),
        vectors(vectors_) {
    if (rows > 0) data += at.b * x.stride_b + at.h * x.stride_h;  // without rows there may be no memory
  }
};

// Whether all heads' rows can be moved 16 bytes at a time.
inline bool are_vectors(const Heads& x, const AttentionShape& s, int64_t rows, Dtype dtype) {
  const int64_t size = dtype == Dtype::fp32 ? 4 : 2;
  const auto even = [&](int64_t n, int64_t stride) { return n <= 1 || stride * size % 16 == 0; };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && s.D * size % 16 == 0 && even(s.B, x.stride_b) &&
         even(s.H, x.stride_h) && even(rows, x.stride_t);
}

template <class T, int kRows, int kHeaddim>
class Tile {
 public:
  static constexpr int kElements = kRows * kHeaddim;
  static constexpr int kChunks = kHeaddim / 8;  // of a row

  FASTGPT_PRIM explicit Tile(Shared<T> data) : data_(data) {}

  // Starts to copy rows first, first + 1, ... of `from`; a barrier after cp_async_wait ends it.
  template <int kThreads>
  FASTGPT_PRIM void load(const HeadRows<T>& from, int first) const {
    constexpr int kAcross = kChunks % 32 == 0 ? 32 : kChunks % 16 == 0 ? 16 : kChunks % 8 == 0 ? 8 : 4;
    constexpr int kDown = kThreads / kAcross;
    const int column = static_cast<int>(threadIdx.x) % kAcross;
    int row = static_cast<int>(threadIdx.x) / kAcross;
    const T* p = from.data + (first + row) * from.stride + column * 8;
    if (from.vectors) {
#pragma unroll 4
      for (int i = 0; i < kRows; i += kDown, row += kDown, p += kDown * from.stride) {
        if (kRows % kDown != 0 && row >= kRows) break;
#pragma unroll
        for (int c = 0; c < kChunks; c += kAcross) {
          cp_async_16(at(row, column + c), p + c * 8, first + row < from.rows && (column + c) * 8 < from.headdim);
        }
      }
    } else {
#pragma unroll 1
      for (; row < kRows; row += kDown, p += kDown * from.stride) {
#pragma unroll 1
        for (int c = 0; c < kChunks; c += kAcross) {
          const int left = first + row < from.rows ? from.headdim - (column + c) * 8 : 0;
          Vec<T, 8> v;
#pragma unroll
          for (int j = 0; j < 8; ++j) v[j] = j < left ? ldg(p + c * 8 + j) : from_float<T>(0.0f);
          sts(at(row, column + c).template as<Vec<T, 8>>(), v);
        }
      }
    }
  }

  // Operands of mma (prims.cuh): A of rows row to row + 15 and columns 16 * k to 16 * k + 15; B of the transposed
  // matrix, for columns row to row + 7 in b[0..1] and the next eight in b[2..3]; B of the matrix itself, rows row to
  // row + 15, for columns 8 * chunk to 8 * chunk + 7, and the next eight.
  FASTGPT_PRIM void load_a(uint32_t (&a)[4], int row, int k) const {
    ldmatrix_x4(a, at(row, 2 * k, lane_id() % 16, lane_id() / 16));
  }
  FASTGPT_PRIM void load_b_transposed(uint32_t (&b)[4], int row, int k) const {
    ldmatrix_x4(b, at(row, 2 * k, lane_id() % 8 + lane_id() / 16 * 8, lane_id() / 8 % 2));
  }
  FASTGPT_PRIM void load_b(uint32_t (&b)[4], int row, int chunk) const {
    ldmatrix_x4_trans(b, at(row, chunk, lane_id() % 16, lane_id() / 16));
  }

  // Writes a warp's accumulators of the whole tile, columns from `chunk` on, rounded, to rows first, first + 1, ... of
  // `to`, by way of the tile: a lane has 4 bytes here and there, and memory wants 16 beside each other.
  template <int kM, int kN>
  FASTGPT_PRIM void store(const float (&c)[kM][kN][4], int chunk, const HeadRows<T>& to, int first) const {
    static_assert(16 * kM == kRows);
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          sts((at(16 * m + 8 * h + g, chunk + n) + 2 * t).template as<uint32_t>(),
              pack<T>(c[m][n][2 * h], c[m][n][2 * h + 1]));
        }
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane_id(); i < 16 * kM * kN; i += kWarpSize) {
      const int r = i / kN, column = chunk + i % kN, left = to.headdim - column * 8;
      if (first + r >= to.rows || left <= 0) continue;
      const Vec<T, 8> v = lds(at(r, column).template as<Vec<T, 8>>());
      T* p = to.data + (first + r) * to.stride + column * 8;
      if (to.vectors) {
        stg(reinterpret_cast<Vec<T, 8>*>(p), v);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (j < left) stg(p + j, v[j]);
        }
      }
    }
  }

  FASTGPT_PRIM Shared<T> at(int row, int chunk) const { return data_ + (row * kHeaddim + (chunk ^ flip(row)) * 8); }
  // at(row + lane_row, chunk + lane_chunk), where row is a multiple of 8, chunk of 2 and lane_chunk is 0 or 1: written
  // such that few values depend on the lane, and constants end up in the instructions.
  FASTGPT_PRIM Shared<T> at(int row, int chunk, int lane_row, int lane_chunk) const {
    const int lane = lane_row * kHeaddim + (lane_chunk ^ flip(lane_row)) * 8;
    return data_ + (lane ^ (chunk & kMask) * 8) + (row * kHeaddim + (chunk & ~kMask) * 8);
  }

 private:
  // A row of 8, 16, ... chunks begins at bank 0; of two that follow each other with 4 or 12, one at bank 16.
  static constexpr int kMask = kChunks % 8 == 0 ? 7 : 3;
  static FASTGPT_PRIM int flip(int row) { return (kMask == 7 ? row : row >> 1) & kMask; }

  Shared<T> data_;
};

// c = a b^T, where load_a(a, m, k) gives the operands of c's rows 16 * m to 16 * m + 15, and the tile's rows are b's.
template <class T, int kRows, int kHeaddim, int kM, class LoadA>
FASTGPT_PRIM void multiply_transposed(float (&c)[kM][kRows / 8][4], LoadA load_a,
                                      const Tile<T, kRows, kHeaddim>& b_rows) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
    }
  }
  constexpr int kAtATime = kHeaddim / 16 % 4 == 0 ? 4 : 2;
#pragma unroll kAtATime
  for (int k = 0; k < kHeaddim / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_a(a[m], m, k);
#pragma unroll
    for (int n = 0; n < kRows / 8; n += 2) {
      uint32_t b[4];
      b_rows.load_b_transposed(b, 8 * n, k);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<T>(c[m][n], a[m], b[0], b[1]);
        mma_m16n8k16<T>(c[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Accumulators, rounded, as the operand A of another product: its columns 16 * k to 16 * k + 15.
template <class T, int kN>
FASTGPT_PRIM void pack_a(uint32_t (&a)[4], const float (&c)[kN][4], int k) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pack<T>(c[2 * k + i / 2][2 * (i % 2)], c[2 * k + i / 2][2 * (i % 2) + 1]);
}

// c += a b, where a is held as accumulators of an earlier product, and b is the tile, from `chunk` on.
template <class T, int kRows, int kHeaddim, int kM, int kN>
FASTGPT_PRIM void multiply_add(float (&c)[kM][kN][4], const float (&a)[kM][kRows / 8][4],
                               const Tile<T, kRows, kHeaddim>& b_tile, int chunk) {
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
    uint32_t packed[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) pack_a<T>(packed[m], a[m], k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      b_tile.load_b(b, 16 * k, chunk + n);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<T>(c[m][n], packed[m], b[0], b[1]);
        mma_m16n8k16<T>(c[m][n + 1], packed[m], b[2], b[3]);
      }
    }
  }
}

template <int kM, int kN>
FASTGPT_PRIM void multiply(float (&c)[kM][kN][4], float factor) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] *= factor;
    }
  }
}

// Of accumulators the upper eight rows (h = 0) or the lower eight.
template <int kN>
FASTGPT_PRIM void multiply_rows(float (&c)[kN][4], int h, float factor) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    c[n][2 * h] *= factor;
    c[n][2 * h + 1] *= factor;
  }
}

// Which of a lane's accumulators dropout keeps: bit 4 * n + i is about c[n][i]. A Philox vector is about four keys of
// one query, which are four columns of an accumulator, or four rows where it is transposed: two or four lanes. Each
// makes another of the vectors that they need, and they swap.
FASTGPT_PRIM uint32_t kept_words(const Dropper& dropper, Words words) {
  return uint32_t{dropper.keeps(words.x)} | uint32_t{dropper.keeps(words.y)} << 1 |
         uint32_t{dropper.keeps(words.z)} << 2 | uint32_t{dropper.keeps(words.w)} << 3;
}

// Of 16 queries from `row` on (rows of the mask) and 8 * kN keys from `key` on.
template <int kN>
FASTGPT_PRIM uint32_t kept(const Dropper& dropper, int64_t row, int key) {
  static_assert(kN <= 8);
  const int g = lane_id() / 4, t = lane_id() % 4, odd = t % 2;
  uint32_t mine = 0;
#pragma unroll 1
  for (int n = 0; n < kN; ++n) {
    mine |= kept_words(dropper, dropper.keys(row + g + 8 * odd, key / 4 + 2 * n + t / 2)) << 4 * n;
  }
  const uint32_t other = __shfl_xor_sync(kFullMask, mine, 1);
  return odd ? (other & 0xccccccccu) >> 2 | (mine & 0xccccccccu) : (mine & 0x33333333u) | (other & 0x33333333u) << 2;
}

// Of 16 keys from `key` on, down, and 8 * kN queries, across.
template <int kN>
FASTGPT_PRIM uint32_t kept_transposed(const Dropper& dropper, int64_t row, int key) {
  static_assert(kN <= 8);
  const int g = lane_id() / 4, t = lane_id() % 4, turn = g % 4;  // the accumulator i whose vector this lane makes
  uint32_t mine = 0;
#pragma unroll 1
  for (int n = 0; n < kN; ++n) {
    mine |= kept_words(dropper, dropper.keys(row + 8 * n + 2 * t + turn % 2, key / 4 + turn / 2 * 2 + g / 4)) << 4 * n;
  }
  uint32_t kept = 0;
#pragma unroll
  for (int flip = 0; flip < 4; ++flip) {
    const uint32_t words = flip == 0 ? mine : __shfl_xor_sync(kFullMask, mine, 4 * flip);
    kept |= (words >> turn & 0x11111111u) << (turn ^ flip);
  }
  return kept;
}

// to = from where `keep` has a bit, else 0.
template <int kM, int kN>
FASTGPT_PRIM void keep_only(float (&to)[kM][kN][4], const float (&from)[kM][kN][4], const uint32_t (&keep)[kM]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[m][n][i] = keep[m] >> (4 * n + i) & 1 ? from[m][n][i] : 0.0f;
    }
  }
}

// What attention_fwd and attention_bwd do with fp32, whose products the tensor cores would round (attention_fp32.cu).
void attention_fwd_fp32(const AttentionFwd& a, bool vectors, cudaStream_t stream);
void attention_bwd_fp32(const AttentionBwd& a, bool vectors, cudaStream_t stream);

// Calls f with the head size that D is padded to.
template <class F>
void with_headdim(int64_t D, F f) {
  if (D <= 32) return f(std::integral_constant<int, 32>());
  if (D <= 64) return f(std::integral_constant<int, 64>());
  if (D <= 96) return f(std::integral_constant<int, 96>());
  if (D <= 128) return f(std::integral_constant<int, 128>());
  return f(std::integral_constant<int, 256>());
}

}  // namespace fastgpt::cuda
