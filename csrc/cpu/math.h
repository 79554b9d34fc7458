#pragma once
#include "vec.h"
namespace fastgpt::FASTGPT_ISA {
namespace {
inline Vec vexp(Vec x) {
  Vec lo = x < -104.0f ? splat(-104.0f) : x;
  Vec xx = lo > 88.7f ? splat(88.7f) : lo;
  Vec t = xx * 1.44269504f + 12582912.0f;
  VecI n = bit_cast<VecI>(t) - 0x4b400000;
  Vec k = t - 12582912.0f;
  Vec r = xx - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f; p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f; p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  VecI big = bit_cast<VecI>(p) + (n << 23);
  return x < -87.0f ? Vec{} : bit_cast<Vec>(big);
}
inline Vec vlog(Vec x) { for (int i = 0; i < kLanes; ++i) x[i] = __builtin_logf(x[i]); return x; }
}
}
