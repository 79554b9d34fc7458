// Dropout masks: Philox 4x32-10 (Salmon et al., 2011), a function of (seed, element), as fastgpt/reference.py defines
// it. Nothing is stored: the backward makes the forward's mask again, in registers.

#pragma once

#include "kernels.h"
#include "prims.cuh"

namespace fastgpt::cuda {

struct Words {
  uint32_t x, y, z, w;

  // Word i % 4. Not an array: one that is indexed by a variable would lie in local memory.
  FASTGPT_PRIM uint32_t at(int64_t i) const {
    const uint32_t low = i & 1 ? y : x, high = i & 1 ? w : z;
    return i & 2 ? high : low;
  }
};

FASTGPT_PRIM Words philox(uint64_t seed, Words counter) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
    counter = {high1 ^ counter.y ^ key0, low1, high0 ^ counter.w ^ key1, low0};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The mask of one dropout.
class Dropper {
 public:
  FASTGPT_PRIM explicit Dropper(const Drop& drop)
      : seed_(drop.seed == nullptr ? 0 : static_cast<uint64_t>(ldg(drop.seed))),
        threshold_(drop.threshold),
        scale_(drop.scale) {}

  // The words of elements 4 * n to 4 * n + 3 of an elementwise dropout.
  FASTGPT_PRIM Words elements(int64_t n) const {
    return philox(seed_, {static_cast<uint32_t>(n), static_cast<uint32_t>(static_cast<uint64_t>(n) >> 32), 0, 0});
  }
  // The words of keys 4 * n to 4 * n + 3 in attention's row (b * H + h) * Tq + query.
  FASTGPT_PRIM Words keys(int64_t row, uint32_t n) const {
    return philox(seed_, {n, static_cast<uint32_t>(row), static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), 0});
  }

  FASTGPT_PRIM bool keeps(uint32_t word) const { return word >= threshold_; }
  FASTGPT_PRIM float scale() const { return scale_; }
  FASTGPT_PRIM float operator()(float value, uint32_t word) const { return keeps(word) ? value * scale_ : 0.0f; }

  // Drops elements first, first + 1, ... of an elementwise dropout.
  template <int kCount>
  FASTGPT_PRIM void operator()(float (&values)[kCount], int64_t first) const {
    static_assert(kCount % 4 == 0);
    const int skipped = static_cast<int>(first % 4);  // words of the first four; 0 in rows of a multiple of 4
    Words words = elements(first / 4);
#pragma unroll
    for (int j = 0; j < kCount; j += 4) {
      const bool more = j + 4 < kCount || skipped != 0;
      const Words next = more ? elements(first / 4 + j / 4 + 1) : words;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int at = skipped + k;
        values[j + k] = (*this)(values[j + k], at < 4 ? words.at(at) : next.at(at));
      }
      words = next;
    }
  }

 private:
  uint64_t seed_;
  uint32_t threshold_;
  float scale_;
};

}  // namespace fastgpt::cuda
