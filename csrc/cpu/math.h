// Elementary functions of vectors.
//
// Coefficients are minimax: Remez exchange at 40 digits on the reduced range, for the relative error of the result, each
// coefficient rounded to fp32 before the ones after it are fitted again. The bounds hold for all 2^32 arguments and are in
// units of the last place of the true result (tests/test_cpp_math.py); the baseline, without fused operations, is the
// worst.

#pragma once

#include "vec.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// Twice the integer is below the last place: adding it rounds to the nearest integer, which then lies in the low bits.
constexpr float kRound = 0x1.8p23f;

constexpr float kLog2E = 0x1.715476p+0f;
// ln 2 in two: a multiple of the first by an integer up to 2^9 is exact, so that no fused operation is needed.
constexpr float kLn2High = 0x1.62e4p-1f;
constexpr float kLn2Low = 0x1.7f7d1cp-20f;

// p * 2^n for n = shifted - kRound, rounded once, also where the result is subnormal.
inline Vec scale_by_power_of_2(Vec p, Vec shifted) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_scalef_ps(bit_cast<__m512>(p), bit_cast<__m512>(shifted - kRound)));
#else
  // In two steps: 2^n itself may be beyond fp32. The first is exact.
  VecI n = bit_cast<VecI>(shifted) - bit_cast<int32_t>(kRound);
  VecI half = n >> 1;
  return p * bit_cast<Vec>((half + 127) << 23) * bit_cast<Vec>((n - half + 127) << 23);
#endif
}

// (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2.
inline Vec exp_tail(Vec r) {
  Vec q = r * 0x1.6ab6aep-10f + 0x1.123d5cp-7f;
  q = q * r + 0x1.55585ap-5f;
  q = q * r + 0x1.55548cp-3f;
  return q * r + 0x1.fffffcp-2f;
}

// exp(x) to 1.2 units, also where that is subnormal. Exactly 1 at 0, and 0 for -inf and all that is below -104.
inline Vec vexp(Vec x) {
  // Beyond these bounds the result is 0 or inf anyway. A NaN stays, being the second operand.
  x = vmin(splat(89.0f), vmax(splat(-104.0f), x));
  Vec shifted = x * kLog2E + kRound;
  Vec n = shifted - kRound;
  Vec r = (x - n * kLn2High) - n * kLn2Low;
  return scale_by_power_of_2((exp_tail(r) * r + 1.0f) * r + 1.0f, shifted);
}

}  // namespace
}  // namespace fastgpt::FASTGPT_ISA
