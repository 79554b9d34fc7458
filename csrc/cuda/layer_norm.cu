// layer_norm. Forward: x is read once and y written, 2MNs bytes, s the element's size. Backward: dy and x are read and
// dx written, 3MNs; dweight and dbias are summed in registers over all rows of a block, and its (2, N) line of partial
// sums is all that goes through memory besides.

#include "norm.cuh"

namespace fastgpt::cuda {
namespace {

template <class T, int kItems>
__global__ void __launch_bounds__(kRowThreads) layer_norm_fwd_kernel(LayerNormFwd a, bool vectors) {
  ROW_REDUCTION(reduce);
  constexpr int kCount = kVecSize<T>;
  const int64_t m = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (m >= a.M) return;  // the whole row: where several warps share one, it has a block of its own
  const Row<T, kItems> x(static_cast<const T*>(a.x.data) + m * a.x.stride, a.N, vectors);
  const auto get = [&](float (&v)[kCount], int i, int64_t c, int64_t left) { x.get(v, i, c, left); };
  const Moments moments = row_moments<kItems, kCount>(a.N, reduce, get);
  const float rstd = 1.0f / sqrtf(moments.variance + a.eps);
  normalize_row<kItems, kCount>(static_cast<T*>(a.y) + m * a.N, a.N, get, moments.mean, rstd,
                                Parameter<T>(a.weight, a.weight_dtype), Parameter<T>(a.bias, a.weight_dtype), vectors);
  if (threadIdx.x == 0) {
    stg(a.mean + m, moments.mean);
    stg(a.rstd + m, rstd);
  }
}

template <class T, int kItems>
__global__ void __launch_bounds__(kRowThreads) layer_norm_bwd_kernel(LayerNormBwd a, bool vectors) {
  ROW_REDUCTION(reduce);
  constexpr int kCount = kVecSize<T>;
  NormGradient<kItems, kCount, T> gradient(Parameter<T>(a.weight, a.weight_dtype),
                                           a.partial + static_cast<int64_t>(blockIdx.x) * 2 * a.N, a.N, vectors);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  for (int64_t m = first; m < a.M; m += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const Row<T, kItems> x(static_cast<const T*>(a.x.data) + m * a.x.stride, a.N, vectors);
    const Row<T, kItems> dy(static_cast<const T*>(a.dy.data) + m * a.dy.stride, a.N, vectors);
    const auto get_x = [&](float (&v)[kCount], int i, int64_t c, int64_t left) { x.get(v, i, c, left); };
    const auto get_dy = [&](float (&d)[kCount], int i, int64_t c, int64_t left) { dy.get(d, i, c, left); };
    gradient.sum_up(get_x, get_dy, ldg(a.mean + m), ldg(a.rstd + m), m == first, reduce);
    T* dx = static_cast<T*>(a.dx) + m * a.N;
    for_each_item<kItems, kCount>(a.N, [&](int i, int64_t c, int64_t left) {
      float v[kCount], d[kCount];
      x.get(v, i, c, left);
      dy.get(d, i, c, left);
      gradient.dx(v, d, c, left);
      store_floats(dx + c, v, left, vectors);
    });
  }
  gradient.finish(first < a.M);
}

}  // namespace

void layer_norm_fwd(const LayerNormFwd& a, cudaStream_t stream) {
  const bool vectors = are_vectors(a.x, a.N, a.dtype) && are_vectors(a.y, a.N, a.N, a.dtype) &&
                       are_vectors(a.weight, 0, a.N, a.weight_dtype) && are_vectors(a.bias, 0, a.N, a.weight_dtype);
  with_dtype(a.dtype, [&](auto x) {
    using T = decltype(x);
    with_row_blocks<T>(a.N, [&](const RowBlocks& blocks, auto items) {
      launch<layer_norm_fwd_kernel<T, items()>>(blocks.grid(a.M), blocks.block, 0, stream, a, vectors);
    });
  });
}

void layer_norm_bwd(const LayerNormBwd& a, cudaStream_t stream) {
  const bool vectors = are_vectors(a.x, a.N, a.dtype) && are_vectors(a.dy, a.N, a.dtype) &&
                       are_vectors(a.dx, a.N, a.N, a.dtype) && are_vectors(a.weight, 0, a.N, a.weight_dtype);
  with_dtype(a.dtype, [&](auto x) {
    using T = decltype(x);
    with_row_blocks<T>(a.N, [&](const RowBlocks& blocks, auto items) {
      launch<layer_norm_bwd_kernel<T, items()>>(grid_of(row_blocks(a.M)), blocks.block, column_sums_bytes<T>(blocks),
                                                stream, a, vectors);
    });
  });
  with_dtype(a.weight_dtype, [&](auto p) {
    using P = decltype(p);
    column_sum(a.partial, row_blocks(a.M), a.N, static_cast<P*>(a.dweight), static_cast<P*>(a.dbias), stream);
  });
}

}  // namespace fastgpt::cuda
