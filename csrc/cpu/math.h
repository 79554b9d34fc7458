// Elementary functions of vectors.
//
// Coefficients are minimax: Remez exchange at 40 digits on the reduced range, for the relative error of the result,
// each coefficient rounded to fp32 before the ones after it are fitted again. The bounds hold over all of fp32 and are
// in units of the last place of the true result (tests/test_cpp_math.py); the baseline, without fused operations, comes
// nearest to them.

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

// exp(x) for -104 <= x <= 89.
inline Vec exp_within(Vec x) {
  Vec shifted = x * kLog2E + kRound;
  Vec n = shifted - kRound;
  Vec r = (x - n * kLn2High) - n * kLn2Low;
  return scale_by_power_of_2((exp_tail(r) * r + 1.0f) * r + 1.0f, shifted);
}

// exp(x) to 1.2 units, also where that is subnormal. Exactly 1 at 0, and 0 for -inf and all that is below -104.
inline Vec vexp(Vec x) {
  // Beyond these bounds the result is 0 or inf anyway. A NaN stays, being the second operand.
  return exp_within(vmin(splat(89.0f), vmax(splat(-104.0f), x)));
}

// The natural logarithm of x to 1.3 units: -inf at 0, NaN below.
inline Vec vlog(Vec x) {
  auto subnormal = x < 0x1p-126f;
  VecU bits = bit_cast<VecU>(subnormal ? x * 0x1p23f : x);
  // x = 2^k * (1 + f), with 1 + f from sqrt(1/2) to sqrt(2): 0x3f3504f3 is sqrt(1/2).
  VecI k = bit_cast<VecI>(bits - 0x3f3504f3u) >> 23;
  Vec f = bit_cast<Vec>(bits - (bit_cast<VecU>(k) << 23)) - 1.0f;
  Vec n = __builtin_convertvector(subnormal ? k - 23 : k, Vec);
  // log(1 + f) = f - f^2 / 2 + f^3 * p
  Vec p = f * 0x1.526adap-4f + -0x1.21b860p-3f;
  p = p * f + 0x1.33406cp-3f;
  p = p * f + -0x1.53dc7ep-3f;
  p = p * f + 0x1.98b8e4p-3f;
  p = p * f + -0x1.000204p-2f;
  p = p * f + 0x1.555730p-2f;
  Vec square = f * f;
  Vec low = (n * kLn2Low + square * f * p) - 0.5f * square;
  Vec result = n * kLn2High + (f + low);
  Vec special = x == 0.0f ? splat(-__builtin_inff()) : splat(__builtin_nanf(""));
  return x > 0.0f ? (x < __builtin_inff() ? result : x) : special;
}

// tanh(x) to 2.8 units. With E = exp(2 |x|) - 1 it is E / (E + 2): E is made without the 1, and so keeps its digits
// near 0.
inline Vec vtanh(Vec x) {
  Vec y = 2.0f * vmin(splat(10.0f), vabs(x));  // tanh(10) rounds to 1
  Vec shifted = y * kLog2E + kRound;
  Vec n = shifted - kRound;
  Vec r = (y - n * kLn2High) - n * kLn2Low;
  VecI exponent = bit_cast<VecI>(shifted) - bit_cast<int32_t>(kRound);
  Vec power = bit_cast<Vec>((exponent + 127) << 23);
  Vec e = power * (exp_tail(r) * r * r + r) + (power - 1.0f);
  return bit_cast<Vec>(bit_cast<VecU>(e / (e + 2.0f)) | (bit_cast<VecU>(x) & 0x80000000u));
}

// erf(x) to 1.7 units: x + x * p(x^2) near 0, else 1 - exp(q(|x|)), where q is the logarithm of erfc, fitted for the
// absolute error of its exponential.
inline Vec verf(Vec x) {
  Vec z = x * x;
  Vec p = z * -0x1.613e50p-11f + 0x1.4f188ap-8f;
  p = p * z + -0x1.b7a75cp-6f;
  p = p * z + 0x1.ce2acep-4f;
  p = p * z + -0x1.81273ap-2f;
  p = p * z + 0x1.06eba8p-3f;
  Vec a = vmin(splat(3.95f), vabs(x));  // erf(3.95) rounds to 1
  Vec q = a * 0x1.bf0884p-13f + -0x1.a42e3cp-9f;
  q = q * a + 0x1.765854p-6f;
  q = q * a + -0x1.aec0fap-4f;
  q = q * a + -0x1.458d0ep-1f;
  q = q * a + -0x1.20e104p+0f;
  q = q * a + -0x1.672baep-16f;
  Vec far = bit_cast<Vec>(bit_cast<VecU>(1.0f - exp_within(q)) | (bit_cast<VecU>(x) & 0x80000000u));
  return vabs(x) < 0.75f ? x * p + x : far;
}

}  // namespace
}  // namespace fastgpt::FASTGPT_ISA
