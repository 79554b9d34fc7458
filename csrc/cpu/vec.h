// Vectors of fp32 by the compiler's own vector types: one source for every instruction set.
//
// A kernel's file is compiled once per instruction set, each time with other compiler flags and another name for
// FASTGPT_ISA. `Vec` is as wide as those flags allow (16, 8 or 4 floats); +, *, <, ?: and the like work on it lane by
// lane, and a * b + c becomes a fused multiply-add where there is one. Intrinsics stand only here, for what operators
// cannot say. Memory is fp32, bf16 or fp16; arithmetic is always fp32.
//
// Everything is in an unnamed namespace, and no standard header with inline functions is included: a function that the
// linker could share between the copies would run AVX-512 instructions on a processor without them.

#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own intrinsics start from an undefined register
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

// GCC's address sanitizer does not see masked loads and stores (clang's does): under it lanes are moved one by one.
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)
#define FASTGPT_MASKED_MEMORY
#endif

#ifndef FASTGPT_ISA
#error "FASTGPT_ISA must name the instruction set that this file is compiled for: baseline, avx2, avx512 or avx512_bf16"
#endif

namespace fastgpt::FASTGPT_ISA {
namespace {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint64_t VecU64 __attribute__((vector_size(4 * kLanes)));  // half as many lanes
typedef uint16_t VecU16 __attribute__((vector_size(2 * kLanes)));

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}

template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// x in every lane. An operation between a scalar and a vector is what compilers turn into one broadcast; this one
// leaves every x, also -0, as it is.
inline Vec splat(float x) { return x - Vec{}; }
inline VecI splat(int32_t x) { return x | VecI{}; }
inline VecU splat(uint32_t x) { return x | VecU{}; }

// 0, 1, 2, ...
inline VecI lane_ids() {
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// ---------------------------------------------------------------------------------------------------------------------
// Half precision, bits in the low half of each lane
// ---------------------------------------------------------------------------------------------------------------------

inline Vec widen(VecU16 bits, bf16) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bit_cast<__m256i>(bits)), 16));
#else
  return bit_cast<Vec>(__builtin_convertvector(bits, VecU) << 16);
#endif
}

// Round to nearest, ties to even; a NaN stays one.
inline VecU16 narrow(Vec x, bf16) {
#if defined(__AVX512BF16__)
  return bit_cast<VecU16>(_mm512_cvtneps_pbh(bit_cast<__m512>(x)));
#else
  VecU u = bit_cast<VecU>(x);
  VecU rounded = u + 0x7fff + ((u >> 16) & 1);
  VecU quiet = u | 0x400000;
  return __builtin_convertvector((x == x ? rounded : quiet) >> 16, VecU16);
#endif
}

inline Vec widen(VecU16 bits, fp16) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return bit_cast<Vec>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
  // Exponent and mantissa move to their places in fp32, and 2^112 takes the exponent's bias along; that product also
  // makes subnormal numbers normal. An exponent of all ones stays one.
  VecU u = __builtin_convertvector(bits, VecU);
  VecU magnitude = (u & 0x7fff) << 13;
  Vec finite = bit_cast<Vec>(magnitude) * 0x1p112f;
  VecU special = magnitude | 0x7f800000;
  return bit_cast<Vec>((magnitude >= 0x0f800000u ? special : bit_cast<VecU>(finite)) | ((u & 0x8000) << 16));
#endif
}

// Round to nearest, ties to even.
inline VecU16 narrow(Vec x, fp16) {
#if defined(__AVX512F__)
  return bit_cast<VecU16>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bit_cast<VecU16>(_mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  VecU u = bit_cast<VecU>(x);
  VecU magnitude = u & 0x7fffffff;
  // Below 2^-14 the addition of 0.5 leaves exactly the bits that a subnormal fp16 keeps, rounded by the adder.
  VecU subnormal = bit_cast<VecU>(bit_cast<Vec>(magnitude) + 0.5f) - 0x3f000000;
  VecU normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  VecU result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? splat(0x7c00u) : result;
  result = magnitude > 0x7f800000u ? splat(0x7e00u) : result;
  return __builtin_convertvector(result | ((u >> 16) & 0x8000), VecU16);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory; no address need be aligned
// ---------------------------------------------------------------------------------------------------------------------

template <class T>
inline T read(const T* p) {
  T x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

template <class T>
inline void write(T* p, T x) {
  __builtin_memcpy(p, &x, sizeof(x));
}

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }

template <class T>
inline Vec load(const T* p) {
  VecU16 bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return widen(bits, T{});
}

template <class T>
inline void store(T* p, Vec v) {
  VecU16 bits = narrow(v, T{});
  __builtin_memcpy(p, &bits, sizeof(bits));
}

// The first n lanes; the others are 0. Nothing beyond p[n - 1] is touched.
inline Vec load(const float* p, int n) {
#ifdef FASTGPT_MASKED_MEMORY
  return bit_cast<Vec>(_mm512_maskz_loadu_ps((1u << n) - 1, p));
#else
  Vec v{};
  for (int i = 0; i < n; ++i) v[i] = read(p + i);
  return v;
#endif
}

inline void store(float* p, Vec v, int n) {
#ifdef FASTGPT_MASKED_MEMORY
  _mm512_mask_storeu_ps(p, (1u << n) - 1, bit_cast<__m512>(v));
#else
  for (int i = 0; i < n; ++i) write<float>(p + i, v[i]);
#endif
}

template <class T>
inline VecU16 load_bits(const T* p, int n) {
#ifdef FASTGPT_MASKED_MEMORY
  return bit_cast<VecU16>(_mm256_maskz_loadu_epi16((1u << n) - 1, p));
#else
  VecU16 bits{};
  for (int i = 0; i < n; ++i) bits[i] = read(p + i).bits;
  return bits;
#endif
}

template <class T>
inline Vec load(const T* p, int n) {
  return widen(load_bits(p, n), T{});
}

template <class T>
inline void store(T* p, Vec v, int n) {
  VecU16 bits = narrow(v, T{});
#ifdef FASTGPT_MASKED_MEMORY
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, bit_cast<__m256i>(bits));
#else
  for (int i = 0; i < n; ++i) write(p + i, T{bits[i]});
#endif
}

// One element.
inline float load_one(const float* p) { return read(p); }

template <class T>
inline float load_one(const T* p) {
  return load(p, 1)[0];
}

template <class T>
inline void store_one(T* p, float x) {
  store(p, splat(x), 1);
}

// body(i, n) for each vector of a row of N elements: n is kLanes, a constant, but for the last vector of an odd row.
template <class F>
inline void for_each_vec(int64_t N, const F& body) {
  int64_t i = 0;
  for (; i + kLanes <= N; i += kLanes) body(i, kLanes);
  if (i < N) body(i, static_cast<int>(N - i));
}

// load and store of for_each_vec's n lanes: where n is the constant kLanes, the test is gone.
template <class T>
inline Vec load_n(const T* p, int n) {
  return n == kLanes ? load(p) : load(p, n);
}

template <class T>
inline void store_n(T* p, Vec v, int n) {
  if (n == kLanes) {
    store(p, v);
  } else {
    store(p, v, n);
  }
}

// v in the first n lanes, x in the others.
inline Vec keep_n(Vec v, int n, float x) { return n == kLanes ? v : lane_ids() < n ? v : splat(x); }

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic
// ---------------------------------------------------------------------------------------------------------------------

// The second operand where they do not compare, x86's rule: NaN in b gives NaN, NaN in a does not. GCC makes a
// comparison and a blend of the operators.
inline Vec vmax(Vec a, Vec b) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<Vec>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

inline Vec vmin(Vec a, Vec b) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<Vec>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

inline Vec vabs(Vec x) { return bit_cast<Vec>(bit_cast<VecU>(x) & 0x7fffffff); }

inline Vec vsqrt(Vec x) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_sqrt_ps(bit_cast<__m512>(x)));
#elif defined(__AVX2__)
  return bit_cast<Vec>(_mm256_sqrt_ps(bit_cast<__m256>(x)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// x as it is rounded: no fused multiply-add takes it in. For differences of equal numbers, which must be 0.
inline Vec rounded(Vec x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// Lane i gets lane from[i] of a and b, b's lanes counting from kLanes on. The indices are constants once inlined.
template <class V>
inline V shuffle(V a, V b, VecI from) {
#if defined(__clang__)
  V r;
  for (int i = 0; i < kLanes; ++i) r[i] = from[i] < kLanes ? a[from[i]] : b[from[i] - kLanes];
  return r;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

#if defined(__AVX512BF16__)
// 2 * kLanes bf16 as kLanes pairs; the first n of them (0 <= n <= 2 * kLanes), the others 0.
inline VecU load_pairs(const bf16* p, int n) {
  return bit_cast<VecU>(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p));
}

// sum + a's first * b's first + a's second * b's second, lane by lane.
inline Vec dot_pairs(VecU a, VecU b, Vec sum) {
  return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
}
#endif

// Lane i of a where bit `distance` of i is 0, else lane i ^ distance of b; and the other way round.
template <class V>
inline V merge_low(V a, V b, int distance) {
  VecI i = lane_ids();
  return shuffle(a, b, (i & distance) == 0 ? i : (i ^ distance) + kLanes);
}

template <class V>
inline V merge_high(V a, V b, int distance) {
  VecI i = lane_ids();
  return shuffle(a, b, (i & distance) == 0 ? i ^ distance : i + kLanes);
}

// v[i][j] becomes v[j][i].
template <class V>
inline void transpose(V (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int distance = 1; distance < kLanes; distance *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & distance) continue;
      V low = merge_low(v[i], v[i + distance], distance), high = merge_high(v[i], v[i + distance], distance);
      v[i] = low;
      v[i + distance] = high;
    }
  }
}

// Lane i gets lane i ^ distance.
inline Vec exchange(Vec v, int distance) { return shuffle(v, v, lane_ids() ^ distance); }

// The product, all 64 bits of it, of the low half of each lane and b.
inline VecU64 multiply_low(VecU64 a, uint32_t b) {
#if defined(__AVX512F__)
  return bit_cast<VecU64>(_mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return bit_cast<VecU64>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return bit_cast<VecU64>(_mm_mul_epu32(bit_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffff) * b;
#endif
}

// The low half of each lane of a, then of b.
inline VecU low_halves(VecU64 a, VecU64 b) {
  VecI i = lane_ids();
  return shuffle(bit_cast<VecU>(a), bit_cast<VecU>(b), 2 * i);
}

// a[0], b[0], a[2], b[2], ...
inline VecU64 even_pairs(VecU64 a, VecU64 b) {
#if defined(__AVX512F__)
  return bit_cast<VecU64>(_mm512_maskz_unpacklo_epi64(0xff, bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<VecU64>(_mm256_unpacklo_epi64(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
  return VecU64{a[0], b[0]};
#endif
}

// a[1], b[1], a[3], b[3], ...
inline VecU64 odd_pairs(VecU64 a, VecU64 b) {
#if defined(__AVX512F__)
  return bit_cast<VecU64>(_mm512_maskz_unpackhi_epi64(0xff, bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<VecU64>(_mm256_unpackhi_epi64(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
  return VecU64{a[1], b[1]};
#endif
}

// The sum and the maximum over the lanes, by halves.
inline float sum(Vec v) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) v += exchange(v, half);
  return v[0];
}

inline float max_lane(Vec v) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) v = vmax(v, exchange(v, half));
  return v[0];
}

}  // namespace
}  // namespace fastgpt::FASTGPT_ISA
