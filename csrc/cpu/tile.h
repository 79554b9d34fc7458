// The matrix products inside attention: a tile of sums in registers, and the operands as it reads them.
//
// tile[r][v] += over k of a[r][k] * b[k][v]: a's elements are broadcast, b's rows are read in vectors. An operand's
// unit along k is one fp32 (Singles), or a pair of bf16 that one instruction multiplies and adds (Pairs).

#pragma once

#include "vec.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// Rows of a tile. Four rows of kTileVecs vectors need fewer loads than multiply-adds and leave registers for operands;
// and four is how many keys one Philox counter serves.
constexpr int kRows = 4;

#if defined(__AVX512F__)
constexpr int kTileVecs = 4;  // 16 of 32 registers hold sums
#else
constexpr int kTileVecs = 2;  // 8 of 16
#endif

struct Singles {
  using Unit = float;
  using UnitVec = Vec;
  static constexpr int kPerUnit = 1;

  // kLanes units of a row of n elements, from element i on; 0 beyond its end.
  template <class T>
  static UnitVec load_row(const T* row, int64_t i, int64_t n) {
    const int64_t left = n - i;
    return left >= kLanes ? load(row + i) : left > 0 ? load(row + i, static_cast<int>(left)) : Vec{};
  }
  static UnitVec load_units(const Unit* p) { return load(p); }
  static void store_units(Unit* p, UnitVec v) { store(p, v); }
  // kLanes values, as a row holds them.
  static void store_row(Unit* p, Vec x) { store(p, x); }
  // The units along the rows of kPerUnit vectors, one row each.
  static UnitVec unit_of(const Vec* rows) { return rows[0]; }
  static Vec multiply_add(Unit a, UnitVec b, Vec sum) { return sum + splat(a) * b; }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Unit = uint32_t;
  using UnitVec = VecU;
  static constexpr int kPerUnit = 2;

  static UnitVec load_row(const bf16* row, int64_t i, int64_t n) {
    const int64_t left = n - i;
    return load_pairs(row + i, static_cast<int>(max<int64_t>(0, min<int64_t>(left, 2 * kLanes))));
  }
  static UnitVec load_units(const Unit* p) {
    UnitVec v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store_units(Unit* p, UnitVec v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static void store_row(Unit* p, Vec x) { store(reinterpret_cast<bf16*>(p), x); }
  static UnitVec unit_of(const Vec* rows) { return pair(narrow(rows[0], bf16{}), narrow(rows[1], bf16{})); }
  static Vec multiply_add(Unit a, UnitVec b, Vec sum) { return dot_pairs(splat(a), b, sum); }
  // Units whose pairs are (first, second), lane by lane.
  static UnitVec pair(VecU16 first, VecU16 second) {
    return __builtin_convertvector(first, VecU) | __builtin_convertvector(second, VecU) << 16;
  }
};
#endif

template <int kVecs>
using Tile = Vec[kRows][kVecs];

// tile += a b over `units` units of k. Row r of a begins at a + r * a_row; its units are a_unit apart.
template <class Math, int kVecs>
inline void multiply_add(Tile<kVecs>& tile, int64_t units, const typename Math::Unit* a, int64_t a_row, int64_t a_unit,
                         const typename Math::Unit* b, int64_t b_unit) {
  // A copy that is this function's own stays in registers.
  Tile<kVecs> sums;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[r][v] = tile[r][v];
  }
  for (int64_t k = 0; k < units; ++k) {
    typename Math::UnitVec row[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) row[v] = Math::load_units(b + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = Math::multiply_add(a[r * a_row], row[v], sums[r][v]);
    }
    a += a_unit;
    b += b_unit;
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) tile[r][v] = sums[r][v];
  }
}

// f(first, count) for groups of at most kTileVecs of the vectors [begin, end); count is a constant (an Int).
template <int n>
struct Int {
  static constexpr int value = n;
};

template <class F>
inline void for_each_group(int64_t begin, int64_t end, const F& f) {
  // A tile of one vector waits for its own sums, so one vector more than a group is cut in two.
  constexpr int kUneven = kTileVecs > 2 ? kTileVecs + 1 : 0;
  for (; end - begin >= kTileVecs && end - begin != kUneven; begin += kTileVecs) f(begin, Int<kTileVecs>{});
  if constexpr (kUneven != 0) {
    if (end - begin == kUneven || end - begin == kTileVecs - 1) {
      f(begin, Int<kTileVecs - 1>{});
      begin += kTileVecs - 1;
    }
    if (end - begin == 2) return f(begin, Int<2>{});
  }
  if (end - begin == 1) f(begin, Int<1>{});
}

// A tile of fp32 in memory, its rows `pitch` apart.
template <int kVecs>
inline void load_tile(Tile<kVecs>& tile, const float* p, int64_t pitch) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) tile[r][v] = load(p + r * pitch + v * kLanes);
  }
}

template <int kVecs>
inline void store_tile(const Tile<kVecs>& tile, float* p, int64_t pitch) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(p + r * pitch + v * kLanes, tile[r][v]);
  }
}

// A (rows, width) matrix in memory, its elements of a row side by side.
template <class T>
struct Source {
  const T* data;
  int64_t stride, rows, width;

  const T* row(int64_t i) const { return data + i * stride; }
};

// Broadcast operand: rows of units, `pitch` units each (a multiple of kLanes); rows from source.rows to `rows` are 0.
template <class Math, class T>
inline void pack_rows(const Source<T>& source, int64_t rows, int64_t pitch, typename Math::Unit* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const bool real = i < source.rows;
    for (int64_t u = 0; u < pitch; u += kLanes) {
      Math::store_units(out + i * pitch + u, real ? Math::load_row(source.row(i), u * Math::kPerUnit, source.width)
                                                  : typename Math::UnitVec{});
    }
  }
}

// Vector operand for products along the width: out[u][i] is unit u of row i. `rows` is a multiple of kLanes, and units
// of width's last vector beyond it are written too: out has a multiple of kLanes of rows.
template <class Math, class T>
inline void pack_transposed(const Source<T>& source, int64_t rows, int64_t pitch, typename Math::Unit* out) {
  const int64_t units = ceil_div(source.width, Math::kPerUnit);
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t u = 0; u < units; u += kLanes) {
      typename Math::UnitVec block[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        block[j] = i + j < source.rows ? Math::load_row(source.row(i + j), u * Math::kPerUnit, source.width)
                                       : typename Math::UnitVec{};
      }
      transpose(block);
      for (int j = 0; j < kLanes; ++j) Math::store_units(out + (u + j) * pitch + i, block[j]);
    }
  }
}

// Vector operand for products along the rows: out[i / kPerUnit][d]. `rows` is even.
template <class Math, class T>
inline void pack_panel(const Source<T>& source, int64_t rows, int64_t pitch, typename Math::Unit* out) {
  if constexpr (Math::kPerUnit == 1) {
    pack_rows<Math>(source, rows, pitch, out);
  } else {
    for (int64_t i = 0; i < rows; i += 2) {
      for (int64_t d = 0; d < pitch; d += kLanes) {
        const int n = static_cast<int>(max<int64_t>(0, min<int64_t>(source.width - d, kLanes)));
        VecU16 pair[2] = {};
        for (int j = 0; j < 2; ++j) {
          if (i + j < source.rows) pair[j] = load_bits(source.row(i + j) + d, n);
        }
        Math::store_units(out + i / 2 * pitch + d, Math::pair(pair[0], pair[1]));
      }
    }
  }
}

// Memory that a thread works in while it runs its part of a loop: `layout(scratch)` takes arrays from it, and is called
// twice, first to count their bytes.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { delete[] memory_; }

  template <class F>
  auto allocate(const F& layout) {
    layout(*this);
    memory_ = new char[used_ + kAlignment];
    base_ = memory_ + (kAlignment - reinterpret_cast<uintptr_t>(memory_) % kAlignment) % kAlignment;
    used_ = 0;
    return layout(*this);
  }

  template <class T>
  T* take(int64_t count) {
    T* array = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
    return array;
  }

 private:
  static constexpr int64_t kAlignment = 64;

  char* memory_ = nullptr;
  char* base_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace fastgpt::FASTGPT_ISA
