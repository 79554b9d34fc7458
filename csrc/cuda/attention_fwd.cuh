// What the forwards of attention on tensor cores share: the online softmax of scores that lie in a warp's registers as
// the accumulators of mma_m16n8k16 (prims.cuh), 16 queries down and 8 keys across.

#pragma once

#include "attention.cuh"

namespace fastgpt::cuda {

// -inf for the keys, of 8 * kN from `key` on, that the queries from `query` on do not see.
template <int kM, int kN>
FASTGPT_PRIM void hide(float (&s)[kM][kN][4], const Visible& visible, int query, int key) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int last = visible.last(query + 16 * m + 8 * h + g) - key - 2 * t;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if (8 * n > last) s[m][n][2 * h] = -kInfinity;
        if (8 * n + 1 > last) s[m][n][2 * h + 1] = -kInfinity;
      }
    }
  }
}

// Of 16 * kM queries, the largest score so far and the sum of exponentials, of which a lane has its own columns' share.
template <int kM>
class OnlineSoftmax {
 public:
  // 2^x is one instruction, and x = s * scale - max another. A negative scale has its sign moved to the scores. One of
  // zero is taken as so small that all weights are alike: times zero, -inf would be NaN.
  FASTGPT_PRIM explicit OnlineSoftmax(float scale) : scale_(fmaxf(fabsf(scale) * kLog2E, 1e-30f)) {
#pragma unroll
    for (int m = 0; m < kM; ++m) largest_[m][0] = largest_[m][1] = -kInfinity;
  }

  // Makes weights of scores. correct(m, h, factor): by this sums of weighted values so far are to be multiplied, those
  // of the queries 16 * m + 8 * h to 16 * m + 8 * h + 7.
  template <int kN, class Correct>
  FASTGPT_PRIM void weigh(float (&s)[kM][kN][4], Correct correct) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float now = largest_[m][h];
#pragma unroll
        for (int n = 0; n < kN; ++n) now = fmaxf(now, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
        now = fmaxf(now, __shfl_xor_sync(kFullMask, now, 1));
        now = fmaxf(now, __shfl_xor_sync(kFullMask, now, 2));
        // A query that has seen nothing yet has no largest score, and -inf - -inf is NaN.
        const float top = now == -kInfinity ? 0.0f : now, offset = top * scale_;
        // Exactly 1 where no score is larger: the rounding of a fused largest * scale - offset would add up, tile by
        // tile.
        const float correction = fast_exp2((largest_[m][h] - top) * scale_);
        largest_[m][h] = now;
        sum_[m][h] *= correction;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i) {
            s[m][n][i] = fast_exp2(s[m][n][i] * scale_ - offset);
            sum_[m][h] += s[m][n][i];
          }
        }
        correct(m, h, correction);
      }
    }
  }

  // Makes the output of the sums of weighted values, and writes the queries' lse, from query first_row on.
  template <int kN>
  FASTGPT_PRIM void finish(float (&acc)[kM][kN][4], const AttentionFwd& a, const Place& at, int first_row) const {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float total = sum_[m][h];
        total += __shfl_xor_sync(kFullMask, total, 1);
        total += __shfl_xor_sync(kFullMask, total, 2);
        // A query that sees no key gives 0.
        multiply_rows(acc[m], h, total == 0.0f ? 0.0f : __fdividef(a.drop.scale, total));
        const int row = first_row + 16 * m + 8 * h + g;
        if (t == 0 && row < static_cast<int>(a.shape.Tq)) {
          stg(a.lse + at.row(a.shape, row),
              total == 0.0f ? kInfinity : (largest_[m][h] * scale_ + log2f(total)) * kLn2);
        }
      }
    }
  }

 private:
  float scale_, largest_[kM][2], sum_[kM][2] = {};
};

// attention_fwd of the calls that Hopper's own kernel is asked to do, and can (attention_fwd_sm90.cu); false: it is
// not. Throws std::runtime_error where it is asked for and not to be had.
bool attention_fwd_sm90(const AttentionFwd& a, bool vectors, cudaStream_t stream);

}  // namespace fastgpt::cuda
