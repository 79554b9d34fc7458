// GELU of z = x + bias: z * Phi(z), or its approximation by tanh.
//
// Forward: x is read and y written, 2MNs bytes, s the element's size; backward: dy and x are read and dx written, 3MNs;
// dbias adds up in registers beside it, and each block's line of it is all that goes through memory besides. A block
// works on tiles of whole rows, or of a part of them where they are long: no thread has more than kTileItems vectors,
// all of which are loaded before the first is used. In half precision memory delivers a multiprocessor 4 elements a
// clock, so that one may take 30 instructions: erff alone would use them up.

#include <cmath>
#include <type_traits>

#include "column_sum.cuh"
#include "exponentials.cuh"

namespace fastgpt::cuda {
namespace {

constexpr int kTileItems = 2;  // vectors of a thread in each tensor

template <class T>
constexpr bool kIsHalf = !std::is_same_v<T, float>;

// Beyond this, GELU is z or 0 in fp32, and its slope 1 or 0.
constexpr float kFar = 14.5f;

// z where it is below, or above, the bound, else that. fminf and fmaxf would make a number of a NaN.
FASTGPT_PRIM float below(float bound, float z) { return z > bound ? bound : z; }
FASTGPT_PRIM float above(float bound, float z) { return z < bound ? bound : z; }

template <class T>
FASTGPT_PRIM float quotient(float a, float b) {
  if constexpr (kIsHalf<T>) {
    return __fdividef(a, b);  // off by 2 ulp; 0 where b is beyond 2^126, as it should be here
  } else {
    return a / b;
  }
}

template <class T>
struct Exact {
  static FASTGPT_PRIM float value(float z) {
    if constexpr (kIsHalf<T>) {
      // max(z, 0) - t * Phi(-t) for t = |z|, with Phi(-t) as 2 to the power of a polynomial, fitted to 2^-18 in that
      // product; far from zero, where that is little, to 2% of it.
      const float t = below(kFar, fabsf(z));
      float p = t * -0x1.6089a6p-21f + 0x1.15caa2p-15f;
      p = p * t + -0x1.6427ep-11f;
      p = p * t + 0x1.ed5e78p-8f;
      p = p * t + -0x1.aba644p-5f;
      p = p * t + -0x1.d6e02p-2f;
      p = p * t + -0x1.269f8ep+0f;
      p = p * t + -0x1.0000bcp+0f;
      return above(0.0f, z) - t * fast_exp2(p);
    } else {
      return 0.5f * z * (1.0f + erff(z * 0.7071067811865476f));
    }
  }

  // Phi(z) + z * phi(z), for dbias in full precision whatever T is. Phi(-t) over exp(-t^2 / 2), which the slope needs
  // too, is a polynomial of 1 / (1 + 0.3 t), with a relative error below that of exp(-t^2 / 2).
  static FASTGPT_PRIM float slope(float z) {
    z = below(kFar, above(-kFar, z));
    const float density = exponential<T>(z * z * -0.5f), s = quotient<T>(1.0f, fabsf(z) * 0.3f + 1.0f);
    float p = s * 0x1.26ad8cp-5f + -0x1.4368e8p-3f;
    p = p * s + 0x1.a6f698p-3f;
    p = p * s + -0x1.afc15ep-5f;
    p = p * s + 0x1.04cb52p-3f;
    p = p * s + 0x1.9bc4fcp-4f;
    p = p * s + 0x1.ee0568p-4f;
    p = p * s + 0x1.ea0d84p-4f;
    const float tail = p * s * density;
    return (z < 0.0f ? tail : 1.0f - tail) + z * density * 0.3989422804014327f;  // 1 / sqrt(2 pi)
  }
};

// (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u)), which loses no digits where tanh nears -1.
template <class T>
struct Tanh {
  static constexpr float kTwiceSqrt2OverPi = 1.5957691216057308f;
  static constexpr float kCubic = 0.044715f;

  static FASTGPT_PRIM float value(float z) { return quotient<T>(above(-kFar, z), 1.0f + exp_minus_2u(z)); }

  // s + z * s * (1 - s) * 2 u'
  static FASTGPT_PRIM float slope(float z) {
    z = below(10.0f, above(-10.0f, z));  // below, e would be infinite
    const float e = exp_minus_2u(z), s = quotient<T>(1.0f, 1.0f + e);
    return s + z * (s * (e * s)) * (z * z * (3.0f * kCubic * kTwiceSqrt2OverPi) + kTwiceSqrt2OverPi);
  }

 private:
  static FASTGPT_PRIM float exp_minus_2u(float z) {
    return exponential<T>(z * (z * z * kCubic + 1.0f) * -kTwiceSqrt2OverPi);
  }
};

// How an (M, N) matrix is cut into tiles: of the rows of a block, and of the columns that its threads hold.
struct Tiles {
  dim3 block;
  int64_t columns, across;

  template <class T>
  static Tiles of(int64_t N) {
    unsigned threads = kWarpSize;
    while (threads < kRowThreads && threads * kTileItems * kVecSize<T> < N) threads *= 2;
    const int64_t columns = static_cast<int64_t>(threads) * kTileItems * kVecSize<T>;
    return {dim3(threads, kRowThreads / threads), columns, (N + columns - 1) / columns};
  }

  dim3 grid(int64_t blocks_down) const { return grid_of(blocks_down * across); }
};

// The part of the rows that this block works on.
struct Strip {
  int64_t row, rows_on;   // this thread's first row, and how far on the next one is
  int64_t column, width;  // its first column, and how many there are

  FASTGPT_PRIM Strip(const Tiles& tiles, int64_t N)
      : row(blockIdx.x / tiles.across * blockDim.y + threadIdx.y),
        rows_on(gridDim.x / tiles.across * blockDim.y),
        column(blockIdx.x % tiles.across * tiles.columns),
        width(N - column < tiles.columns ? N - column : tiles.columns) {}
};

template <class F, class T, class P>
__global__ void __launch_bounds__(kRowThreads) gelu_fwd_kernel(GeluFwd a, Tiles tiles, bool vectors) {
  constexpr int kCount = kVecSize<T>;
  const Strip strip(tiles, a.N);
  if (strip.row >= a.M) return;
  const P* bias = static_cast<const P*>(a.bias);
  const Row<T, kTileItems> x(static_cast<const T*>(a.x.data) + strip.row * a.x.stride + strip.column, strip.width,
                             vectors);
  T* y = static_cast<T*>(a.y) + strip.row * a.N + strip.column;
  for_each_item<kTileItems, kCount>(strip.width, [&](int i, int64_t c, int64_t left) {
    float v[kCount], b[kCount] = {};
    x.get(v, i, c, left);
    if (bias != nullptr) load_floats(b, bias + strip.column + c, left, vectors);
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = F::value(v[j] + b[j]);
    store_floats(y + c, v, left, vectors);
  });
}

template <class F, class T, class P>
__global__ void __launch_bounds__(kRowThreads, 2) gelu_bwd_kernel(GeluBwd a, Tiles tiles, bool vectors) {
  constexpr int kCount = kVecSize<T>;
  const Strip strip(tiles, a.N);
  const P* bias = static_cast<const P*>(a.bias);
  ColumnSums<kTileItems, kCount> dbias;
  float* line = a.partial + blockIdx.x / tiles.across * a.N + strip.column;
  for (int64_t m = strip.row; m < a.M; m += strip.rows_on) {
    const Row<T, kTileItems> x(static_cast<const T*>(a.x.data) + m * a.x.stride + strip.column, strip.width, vectors);
    const Row<T, kTileItems> dy(static_cast<const T*>(a.dy.data) + m * a.dy.stride + strip.column, strip.width,
                                vectors);
    T* dx = static_cast<T*>(a.dx) + m * a.N + strip.column;
    for_each_item<kTileItems, kCount>(strip.width, [&](int i, int64_t c, int64_t left) {
      float v[kCount], d[kCount], b[kCount] = {};
      x.get(v, i, c, left);
      dy.get(d, i, c, left);
      if (bias != nullptr) load_floats(b, bias + strip.column + c, left, vectors);
#pragma unroll
      for (int j = 0; j < kCount; ++j) d[j] *= F::slope(v[j] + b[j]);
      store_floats(dx + c, d, left, vectors);
      dbias.add(d, i, line + c, left, false, vectors);
    });
  }
  if (bias != nullptr) dbias.finish(line, strip.width, strip.row < a.M, vectors);
}

// f(F, T, P) of values of the types: Exact<T> or Tanh<T>, the tensors' and the bias's.
template <class Args, class F>
void with_types(const Args& a, F f) {
  with_dtypes(a.dtype, a.bias_dtype, [&](auto x, auto bias) {
    if (a.tanh) {
      f(Tanh<decltype(x)>(), x, bias);
    } else {
      f(Exact<decltype(x)>(), x, bias);
    }
  });
}

}  // namespace

void gelu_fwd(const GeluFwd& given, cudaStream_t stream) {
  GeluFwd a = given;
  if (a.bias == nullptr && a.x.stride == a.N) {  // one long row: how it is cut is free
    a.N *= a.M;
    a.x.stride = a.N;
    a.M = 1;
  }
  const bool vectors = are_vectors(a.x, a.N, a.dtype) && are_vectors(a.y, a.N, a.N, a.dtype) &&
                       are_vectors(a.bias, 0, a.N, a.bias_dtype);
  with_types(a, [&](auto function, auto x, auto bias) {
    using T = decltype(x);
    const Tiles tiles = Tiles::of<T>(a.N);
    const int64_t down = (a.M + tiles.block.y - 1) / tiles.block.y;
    launch<gelu_fwd_kernel<decltype(function), T, decltype(bias)>>(tiles.grid(down), tiles.block, 0, stream, a, tiles,
                                                                   vectors);
  });
}

void gelu_bwd(const GeluBwd& given, cudaStream_t stream) {
  GeluBwd a = given;
  if (a.bias == nullptr && a.x.stride == a.N && a.dy.stride == a.N) {
    a.N *= a.M;
    a.x.stride = a.dy.stride = a.N;
    a.M = 1;
  }
  const bool vectors = are_vectors(a.x, a.N, a.dtype) && are_vectors(a.dy, a.N, a.dtype) &&
                       are_vectors(a.dx, a.N, a.N, a.dtype) && are_vectors(a.bias, 0, a.N, a.bias_dtype);
  with_types(a, [&](auto function, auto x, auto bias) {
    using T = decltype(x);
    using P = decltype(bias);
    const Tiles tiles = Tiles::of<T>(a.N);
    launch<gelu_bwd_kernel<decltype(function), T, P>>(tiles.grid(row_blocks(a.M)), tiles.block,
                                                      column_sums_bytes<T>({tiles.block}), stream, a, tiles, vectors);
    if (a.bias != nullptr) {
      column_sum(a.partial, row_blocks(a.M), a.N, static_cast<P*>(a.dbias), static_cast<P*>(nullptr), stream);
    }
  });
}

}  // namespace fastgpt::cuda
