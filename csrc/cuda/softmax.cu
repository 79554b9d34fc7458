// softmax(scale * x) over rows of N elements, with an optional causal mask.
//
// Forward: x is read once and y written, 2MNs bytes, s the element's size; backward: dy and y are read and dx written,
// 3MNs. Rows beyond what registers hold are read twice, the second time mostly from L2. What the mask hides is not
// read, but for the rest of the 16 bytes that the diagonal cuts, and written as zeros.

#include "exponentials.cuh"

namespace fastgpt::cuda {
namespace {

// How many columns row m sees: those up to m + N - Tq in its matrix of Tq rows.
FASTGPT_PRIM int64_t visible_columns(int64_t m, int64_t N, int64_t Tq) {
  if (Tq == 0) return N;
  const int64_t visible = m % Tq + 1 + N - Tq;
  return visible > 0 ? visible : 0;
}

template <class T, int kItems>
__global__ void __launch_bounds__(kRowThreads) softmax_fwd_kernel(SoftmaxFwd a, bool vectors) {
  ROW_REDUCTION(reduce);
  constexpr int kCount = kVecSize<T>;
  const int64_t m = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (m >= a.M) return;  // the whole row: where several warps share one, it has a block of its own
  const int64_t visible = visible_columns(m, a.N, a.Tq);
  const Row<T, kItems> x(static_cast<const T*>(a.x.data) + m * a.x.stride, visible, vectors);
  const auto scaled = [&](float (&v)[kCount], int i, int64_t c, int64_t left) {
    x.get(v, i, c, left);
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = j < left ? v[j] * a.scale : -INFINITY;
  };
  const ExponentialSum sum = exponential_sum<T, kItems, (kItems > 0)>(reduce, visible, scaled);
  // A causal row without a finite element gives 0, any other NaN.
  const float inverse = 1.0f / (sum.total == 0.0f && a.Tq != 0 ? 1.0f : sum.total);
  T* y = static_cast<T*>(a.y) + m * a.N;
  for_each_item<kItems, kCount>(a.N, [&](int i, int64_t c, int64_t left) {
    float v[kCount] = {};
    if (c < visible) {
      scaled(v, i, c, visible - c);
#pragma unroll
      for (int j = 0; j < kCount; ++j) v[j] = exponential<T>(v[j] - sum.shift) * inverse;
    }
    store_floats(y + c, v, left, vectors);
  });
}

// dx = scale * y * (dy - sum(y * dy))
template <class T, int kItems>
__global__ void __launch_bounds__(kRowThreads) softmax_bwd_kernel(SoftmaxBwd a, bool vectors) {
  ROW_REDUCTION(reduce);
  constexpr int kCount = kVecSize<T>;
  const int64_t m = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (m >= a.M) return;
  const int64_t visible = visible_columns(m, a.N, a.Tq);
  const Row<T, kItems> y(static_cast<const T*>(a.y.data) + m * a.y.stride, visible, vectors);
  const Row<T, kItems> dy(static_cast<const T*>(a.dy.data) + m * a.dy.stride, visible, vectors);
  float sum = 0.0f;
  for_each_item<kItems, kCount>(visible, [&](int i, int64_t c, int64_t left) {
    float v[kCount], d[kCount];
    y.get(v, i, c, left);
    dy.get(d, i, c, left);
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum += j < left ? v[j] * d[j] : 0.0f;
  });
  const float dot = reduce.sum(sum);
  T* dx = static_cast<T*>(a.dx) + m * a.N;
  for_each_item<kItems, kCount>(a.N, [&](int i, int64_t c, int64_t left) {
    float v[kCount] = {};
    if (c < visible) {
      float d[kCount];
      y.get(v, i, c, visible - c);
      dy.get(d, i, c, visible - c);
#pragma unroll
      for (int j = 0; j < kCount; ++j) v[j] = j < visible - c ? v[j] * (d[j] - dot) * a.scale : 0.0f;
    }
    store_floats(dx + c, v, left, vectors);
  });
}

}  // namespace

void softmax_fwd(const SoftmaxFwd& a, cudaStream_t stream) {
  const bool vectors = are_vectors(a.x, a.N, a.dtype) && are_vectors(a.y, a.N, a.N, a.dtype);
  with_dtype(a.dtype, [&](auto x) {
    using T = decltype(x);
    with_row_blocks<T>(a.N, [&](const RowBlocks& blocks, auto items) {
      launch<softmax_fwd_kernel<T, items()>>(blocks.grid(a.M), blocks.block, 0, stream, a, vectors);
    });
  });
}

void softmax_bwd(const SoftmaxBwd& a, cudaStream_t stream) {
  const bool vectors =
      are_vectors(a.y, a.N, a.dtype) && are_vectors(a.dy, a.N, a.dtype) && are_vectors(a.dx, a.N, a.N, a.dtype);
  with_dtype(a.dtype, [&](auto y) {
    using T = decltype(y);
    with_row_blocks<T>(a.N, [&](const RowBlocks& blocks, auto items) {
      launch<softmax_bwd_kernel<T, items()>>(blocks.grid(a.M), blocks.block, 0, stream, a, vectors);
    });
  });
}

}  // namespace fastgpt::cuda
