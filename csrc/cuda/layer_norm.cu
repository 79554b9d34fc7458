// layer_norm. Forward: x is read once and y written, 2MNs bytes, s the element's size. Backward: dy and x are read and
// dx written, 3MNs; dweight and dbias are summed in registers over all rows of a block, and its (2, N) line of partial
// sums is all that goes through memory besides.

#include "column_sum.cuh"
#include "rows.cuh"

namespace fastgpt::cuda {
namespace {

template <class T, class P, int kItems>
__global__ void __launch_bounds__(kRowThreads) layer_norm_fwd_kernel(LayerNormFwd a, bool vectors) {
  ROW_REDUCTION(reduce);
  constexpr int kCount = Row<T, kItems>::kCount;
  const int64_t m = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (m >= a.M) return;  // the whole row: where several warps share one, it has a block of its own
  const Row<T, kItems> x(static_cast<const T*>(a.x.data) + m * a.x.stride, a.N, vectors);
  float sum = 0.0f;
  for_each_item<kItems, kCount>(a.N, [&](int i, int64_t c, int64_t left) {
    float v[kCount];
    x.get(v, i, c, left);
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum += v[j];
  });
  const float mean = reduce.sum(sum) / a.N;
  float squares = 0.0f;  // about the mean: about zero they would lose their digits where the mean is large
  for_each_item<kItems, kCount>(a.N, [&](int i, int64_t c, int64_t left) {
    float v[kCount];
    x.get(v, i, c, left);
#pragma unroll
    for (int j = 0; j < kCount; ++j) squares += j < left ? (v[j] - mean) * (v[j] - mean) : 0.0f;
  });
  const float rstd = rsqrtf(reduce.sum(squares) / a.N + a.eps);
  const P* weight = static_cast<const P*>(a.weight);
  const P* bias = static_cast<const P*>(a.bias);
  T* y = static_cast<T*>(a.y) + m * a.N;
  for_each_item<kItems, kCount>(a.N, [&](int i, int64_t c, int64_t left) {
    float v[kCount], w[kCount], b[kCount] = {};
    x.get(v, i, c, left);
    load_floats(w, weight + c, left, vectors);
    if (bias != nullptr) load_floats(b, bias + c, left, vectors);
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = (v[j] - mean) * rstd * w[j] + b[j];
    store_floats(y + c, v, left, vectors);
  });
  if (threadIdx.x == 0) {
    stg(a.mean + m, mean);
    stg(a.rstd + m, rstd);
  }
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * weight.
template <class T, class P, int kItems>
__global__ void __launch_bounds__(kRowThreads) layer_norm_bwd_kernel(LayerNormBwd a, bool vectors) {
  ROW_REDUCTION(reduce);
  constexpr int kCount = Row<T, kItems>::kCount;
  const P* weight = static_cast<const P*>(a.weight);
  ColumnSums<kItems, kCount> dweight, dbias;
  float* line = a.partial + static_cast<int64_t>(blockIdx.x) * 2 * a.N;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  for (int64_t m = first; m < a.M; m += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const float mean = ldg(a.mean + m), rstd = ldg(a.rstd + m);
    const Row<T, kItems> x(static_cast<const T*>(a.x.data) + m * a.x.stride, a.N, vectors);
    const Row<T, kItems> dy(static_cast<const T*>(a.dy.data) + m * a.dy.stride, a.N, vectors);
    float sum_g = 0.0f, sum_gx = 0.0f;
    for_each_item<kItems, kCount>(a.N, [&](int i, int64_t c, int64_t left) {
      float v[kCount], d[kCount], w[kCount];
      x.get(v, i, c, left);
      dy.get(d, i, c, left);
      load_floats(w, weight + c, left, vectors);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {  // beyond the row's end dy is 0, and with it all of this
        const float xhat = (v[j] - mean) * rstd, g = d[j] * w[j];
        sum_g += g;
        sum_gx += g * xhat;
        v[j] = d[j] * xhat;
      }
      dweight.add(v, i, line + c, left, m == first, vectors);
      dbias.add(d, i, line + a.N + c, left, m == first, vectors);
    });
    const float mean_g = reduce.sum(sum_g) / a.N, mean_gx = reduce.sum(sum_gx) / a.N;
    T* dx = static_cast<T*>(a.dx) + m * a.N;
    for_each_item<kItems, kCount>(a.N, [&](int i, int64_t c, int64_t left) {
      float v[kCount], d[kCount], w[kCount];
      x.get(v, i, c, left);
      dy.get(d, i, c, left);
      load_floats(w, weight + c, left, vectors);
#pragma unroll
      for (int j = 0; j < kCount; ++j) v[j] = rstd * (d[j] * w[j] - mean_g - (v[j] - mean) * rstd * mean_gx);
      store_floats(dx + c, v, left, vectors);
    });
  }
  dweight.finish(line, a.N, first < a.M, vectors);
  dbias.finish(line + a.N, a.N, first < a.M, vectors);
}

}  // namespace

void layer_norm_fwd(const LayerNormFwd& a, cudaStream_t stream) {
  const bool vectors = are_vectors(a.x, a.N, a.dtype) && are_vectors(a.y, a.N, a.N, a.dtype) &&
                       are_vectors(a.weight, 0, a.N, a.weight_dtype) && are_vectors(a.bias, 0, a.N, a.weight_dtype);
  with_dtypes(a.dtype, a.weight_dtype, [&](auto x, auto weight) {
    using T = decltype(x);
    using P = decltype(weight);
    with_row_blocks<T>(a.N, [&](const RowBlocks& blocks, auto items) {
      launch<layer_norm_fwd_kernel<T, P, items()>>(blocks.grid(a.M), blocks.block, 0, stream, a, vectors);
    });
  });
}

void layer_norm_bwd(const LayerNormBwd& a, cudaStream_t stream) {
  const bool vectors = are_vectors(a.x, a.N, a.dtype) && are_vectors(a.dy, a.N, a.dtype) &&
                       are_vectors(a.dx, a.N, a.N, a.dtype) && are_vectors(a.weight, 0, a.N, a.weight_dtype);
  with_dtypes(a.dtype, a.weight_dtype, [&](auto x, auto weight) {
    using T = decltype(x);
    using P = decltype(weight);
    with_row_blocks<T>(a.N, [&](const RowBlocks& blocks, auto items) {
      launch<layer_norm_bwd_kernel<T, P, items()>>(dim3(static_cast<unsigned>(row_blocks(a.M))), blocks.block,
                                                   column_sums_bytes<T>(blocks), stream, a, vectors);
    });
    column_sum(a.partial, row_blocks(a.M), a.N, static_cast<P*>(a.dweight), static_cast<P*>(a.dbias), stream);
  });
}

}  // namespace fastgpt::cuda
