// Dropout masks: Philox 4x32-10 (Salmon et al., 2011) over vectors of counters, bit for bit as fastgpt/reference.py.
//
// A lane of 64 bits holds one 32-bit word of one counter, with anything above it: the 32 x 32 -> 64 bit product that
// vector units have takes the low halves and leaves a word and the next one above it, so that no round has to part or
// join words. Four rounds of counters give 4 * kLanes words, in the order of the elements they belong to.

#pragma once

#include "parallel.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

constexpr int kPhiloxRounds = 10;

// What a kernel knows of its Drop before it comes to an element.
struct Dropper {
  uint64_t keys[kPhiloxRounds][2];
  uint32_t threshold;
  float scale;

  explicit Dropper(const Drop& drop) : threshold(drop.threshold), scale(drop.scale) {
    uint32_t key0 = static_cast<uint32_t>(drop.seed), key1 = static_cast<uint32_t>(drop.seed >> 32);
    for (auto& key : keys) {
      key[0] = key0;
      key[1] = key1;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
  }

  // x * scale where it is kept, 0 where its word says that it is dropped, whatever x is.
  Vec apply(Vec x, VecU words) const { return words >= threshold ? x * scale : Vec{}; }

  // The same as a factor: scale or 0.
  Vec factor(VecU words) const { return words >= threshold ? splat(scale) : Vec{}; }
};

// The words of kLanes counters, a vector of half of them in each of c[word][half]; only the low 32 bits count.
inline void philox_rounds(const Dropper& dropper, VecU64 (&c)[4][2]) {
#pragma GCC unroll 10
  for (const auto& key : dropper.keys) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      VecU64 p0 = multiply_low(c[0][half], 0xD2511F53u), p1 = multiply_low(c[2][half], 0xCD9E8D57u);
      c[0][half] = (p1 >> 32) ^ c[1][half] ^ key[0];
      c[1][half] = p1;
      c[2][half] = (p0 >> 32) ^ c[3][half] ^ key[1];
      c[3][half] = p0;
    }
  }
}

// words[i] are those of elements i * kLanes and on, the first one being word 0 of the first counter.
inline void in_order(const VecU64 (&c)[4][2], VecU (&words)[4]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    VecU64 front = (c[0][half] & 0xffffffff) | c[1][half] << 32, back = (c[2][half] & 0xffffffff) | c[3][half] << 32;
    words[2 * half] = bit_cast<VecU>(even_pairs(front, back));
    words[2 * half + 1] = bit_cast<VecU>(odd_pairs(front, back));
  }
}

// Which counter a 64-bit lane takes, so that even_pairs and odd_pairs leave counters in order: 0, L / 2, 1, ...
inline VecU64 counter_ids() {
  constexpr int kHalf = kLanes / 2;
  VecU64 v;
  for (int i = 0; i < kHalf; ++i) v[i] = i / 2 + i % 2 * (kHalf / 2);
  return v;
}

// The words of 4 * kLanes elements of an elementwise dropout, from element 4 * quad on.
inline void element_words(const Dropper& dropper, uint64_t quad, VecU (&words)[4]) {
  const VecU64 low = counter_ids() + quad, high = low + kLanes / 2;
  VecU64 c[4][2] = {{low, high}, {low >> 32, high >> 32}, {}, {}};
  philox_rounds(dropper, c);
  in_order(c, words);
}

// The words of 4 * kLanes keys of one row of attention, from key 4 * quad on; row = (b * H + h) * Tq + query. words[i]
// are those of keys 4 * quad + i * kLanes and on.
inline void attention_words(const Dropper& dropper, uint64_t row, uint64_t quad, VecU (&words)[4]) {
  const VecU64 low = counter_ids() + quad, high = low + kLanes / 2, row_low = VecU64{} + row, row_high = row_low >> 32;
  VecU64 c[4][2] = {{low, high}, {row_low, row_low}, {row_high, row_high}, {}};
  philox_rounds(dropper, c);
  in_order(c, words);
}

// The words of kLanes rows of attention, from `row` on, at four keys from 4 * quad on: words[j] are key 4 * quad + j's.
inline void key_words(const Dropper& dropper, uint64_t row, uint64_t quad, VecU (&words)[4]) {
  VecU64 ids;
  for (int i = 0; i < kLanes / 2; ++i) ids[i] = i;
  const VecU64 rows[2] = {ids + row, ids + row + kLanes / 2};
  VecU64 c[4][2];
  for (int half = 0; half < 2; ++half) {
    c[0][half] = VecU64{} + quad;
    c[1][half] = rows[half];
    c[2][half] = rows[half] >> 32;
    c[3][half] = VecU64{};
  }
  philox_rounds(dropper, c);
  for (int j = 0; j < 4; ++j) words[j] = low_halves(c[j][0], c[j][1]);
}

// body(i, n, words) for each vector of N elements, as for_each_vec does, with their random words; the first of them is
// element `first` of an elementwise dropout. Words come in groups of whole counters, in which `first` may lie anywhere:
// where it does not start one, two groups stand side by side in a buffer.
template <class F>
inline void for_each_word_vec(const Dropper& dropper, uint64_t first, int64_t N, const F& body) {
  constexpr int kGroup = 4 * kLanes;
  const int skip = first % 4;
  uint64_t quad = first / 4;
  uint32_t buffer[2 * kGroup];
  for (int64_t i = skip == 0 ? 0 : -kGroup; i < N; i += kGroup, quad += kLanes) {
    VecU words[4];
    element_words(dropper, quad, words);
    if (skip != 0) {
      __builtin_memcpy(buffer, buffer + kGroup, sizeof(words));
      __builtin_memcpy(buffer + kGroup, words, sizeof(words));
      if (i < 0) continue;
      __builtin_memcpy(words, buffer + skip, sizeof(words));
    }
    if (i + kGroup <= N) {
      for (int j = 0; j < 4; ++j) body(i + j * kLanes, kLanes, words[j]);
    } else {
      for (int j = 0; i + j * kLanes < N; ++j) {
        body(i + j * kLanes, static_cast<int>(min<int64_t>(kLanes, N - i - j * kLanes)), words[j]);
      }
    }
  }
}

}  // namespace
}  // namespace fastgpt::FASTGPT_ISA
