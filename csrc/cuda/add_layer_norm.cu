// Dropout, residual addition and layer norm in one pass over the rows. With s and t the sizes of an element of x and of
// the stream, forward reads x and residual and writes y and residual_out, 2MN(s + t) bytes; backward reads dy, the
// stream's gradient and residual_out and writes dresidual, MN(s + 3t), and dx, MNs more, where dropout or its dtype
// makes it another. The mask is made again in the backward.
//
// The norm is of the sum before it is rounded to the stream's dtype, which a row that fits on chip keeps in registers.
// The stream is of x's dtype or fp32: five variants.

#include <type_traits>

#include "norm.cuh"
#include "philox.cuh"

namespace fastgpt::cuda {
namespace {

// One row of dropped x + residual in fp32, as this thread sees it: made once and kept, or, where rows are too long for
// that (kItems = 0), made in each pass.
template <class T, class S, int kItems>
class Total {
 public:
  static constexpr int kCount = kVecSize<S>;

  FASTGPT_PRIM Total(const AddLayerNormFwd& a, int64_t m, bool vectors)
      : x_(static_cast<const T*>(a.x.data) + m * a.x.stride, a.N, vectors),
        residual_(static_cast<const S*>(a.residual.data) + m * a.residual.stride, a.N, vectors),
        dropper_(a.drop),
        drops_(a.drop.seed != nullptr),
        first_(m * a.N) {
    if constexpr (kItems > 0) {
      for_each_item<kItems, kCount>(a.N, [&](int i, int64_t c, int64_t left) { make(kept_[i], i, c, left); });
    }
  }

  FASTGPT_PRIM void get(float (&to)[kCount], int i, int64_t c, int64_t left) const {
    if constexpr (kItems > 0) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) to[j] = kept_[i][j];
    } else {
      make(to, i, c, left);
    }
  }

 private:
  FASTGPT_PRIM void make(float (&to)[kCount], int i, int64_t c, int64_t left) const {
    float r[kCount];
    x_.get(to, i, c, left);
    residual_.get(r, i, c, left);
    if (drops_) dropper_(to, first_ + c);
#pragma unroll
    for (int j = 0; j < kCount; ++j) to[j] += r[j];
  }

  Row<T, kItems, kCount> x_;
  Row<S, kItems> residual_;
  Dropper dropper_;
  bool drops_;
  int64_t first_;
  float kept_[kItems > 0 ? kItems : 1][kCount];
};

template <class T, class S, int kItems>
__global__ void __launch_bounds__(kRowThreads) add_layer_norm_fwd_kernel(AddLayerNormFwd a, bool vectors) {
  ROW_REDUCTION(reduce);
  constexpr int kCount = kVecSize<S>;
  const int64_t m = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (m >= a.M) return;  // the whole row: where several warps share one, it has a block of its own
  const Total<T, S, kItems> total(a, m, vectors);
  S* residual_out = static_cast<S*>(a.residual_out) + m * a.N;
  float sum = 0.0f;
  for_each_item<kItems, kCount>(a.N, [&](int i, int64_t c, int64_t left) {
    float v[kCount];
    total.get(v, i, c, left);
    store_floats(residual_out + c, v, left, vectors);
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum += v[j];
  });
  const auto get = [&](float (&v)[kCount], int i, int64_t c, int64_t left) { total.get(v, i, c, left); };
  const Moments moments = row_moments<kItems, kCount>(a.N, sum, reduce, get);
  const float rstd = 1.0f / sqrtf(moments.variance + a.eps);
  normalize_row<kItems, kCount>(static_cast<T*>(a.y) + m * a.N, a.N, get, moments.mean, rstd,
                                Parameter<T>(a.weight, a.weight_dtype), Parameter<T>(a.bias, a.weight_dtype), vectors);
  if (threadIdx.x == 0) {
    stg(a.mean + m, moments.mean);
    stg(a.rstd + m, rstd);
  }
}

template <class T, class S, int kItems>
__global__ void __launch_bounds__(kRowThreads) add_layer_norm_bwd_kernel(AddLayerNormBwd a, bool vectors) {
  ROW_REDUCTION(reduce);
  constexpr int kCount = kVecSize<S>;
  const Dropper dropper(a.drop);
  NormGradient<kItems, kCount, T> gradient(Parameter<T>(a.weight, a.weight_dtype),
                                           a.partial + static_cast<int64_t>(blockIdx.x) * 2 * a.N, a.N, vectors);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  for (int64_t m = first; m < a.M; m += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const Row<S, kItems> total(static_cast<const S*>(a.residual_out.data) + m * a.residual_out.stride, a.N, vectors);
    const Row<T, kItems, kCount> dy(static_cast<const T*>(a.dy.data) + m * a.dy.stride, a.N, vectors);
    const auto get_total = [&](float (&v)[kCount], int i, int64_t c, int64_t left) { total.get(v, i, c, left); };
    const auto get_dy = [&](float (&d)[kCount], int i, int64_t c, int64_t left) { dy.get(d, i, c, left); };
    float mean = ldg(a.mean + m);
    if constexpr (!std::is_same_v<S, float>) {
      // The row as it was rounded has a mean of its own: where nothing varies, nothing must be left of it.
      mean = row_moments<kItems, kCount>(a.N, reduce, get_total).mean;
    }
    gradient.sum_up(get_total, get_dy, mean, ldg(a.rstd + m), m == first, reduce);
    const S* dstream = static_cast<const S*>(a.dresidual_out.data);
    if (dstream != nullptr) dstream += m * a.dresidual_out.stride;
    S* dresidual = static_cast<S*>(a.dresidual) + m * a.N;
    T* dx = a.dx == nullptr ? nullptr : static_cast<T*>(a.dx) + m * a.N;
    for_each_item<kItems, kCount>(a.N, [&](int i, int64_t c, int64_t left) {
      float v[kCount], d[kCount];
      total.get(v, i, c, left);
      dy.get(d, i, c, left);
      gradient.dx(v, d, c, left);
      if (dstream != nullptr) {
        load_floats(d, dstream + c, left, vectors);
#pragma unroll
        for (int j = 0; j < kCount; ++j) v[j] += d[j];
      }
      store_floats(dresidual + c, v, left, vectors);
      if (dx != nullptr) {
        if (a.drop.seed != nullptr) dropper(v, m * a.N + c);
        store_floats(dx + c, v, left, vectors);
      }
    });
  }
  gradient.finish(first < a.M);
}

}  // namespace

void add_layer_norm_fwd(const AddLayerNormFwd& a, cudaStream_t stream) {
  const bool vectors = are_vectors(a.x, a.N, a.dtype) && are_vectors(a.residual, a.N, a.stream_dtype) &&
                       are_vectors(a.y, a.N, a.N, a.dtype) && are_vectors(a.residual_out, a.N, a.N, a.stream_dtype) &&
                       are_vectors(a.weight, 0, a.N, a.weight_dtype) && are_vectors(a.bias, 0, a.N, a.weight_dtype);
  with_dtypes(a.dtype, a.stream_dtype, [&](auto x, auto residual) {
    using T = decltype(x);
    using S = decltype(residual);
    with_row_blocks<S>(a.N, [&](const RowBlocks& blocks, auto items) {
      launch<add_layer_norm_fwd_kernel<T, S, items()>>(blocks.grid(a.M), blocks.block, 0, stream, a, vectors);
    });
  });
}

void add_layer_norm_bwd(const AddLayerNormBwd& a, cudaStream_t stream) {
  const bool vectors = are_vectors(a.dy, a.N, a.dtype) && are_vectors(a.dresidual_out, a.N, a.stream_dtype) &&
                       are_vectors(a.residual_out, a.N, a.stream_dtype) && are_vectors(a.dx, a.N, a.N, a.dtype) &&
                       are_vectors(a.dresidual, a.N, a.N, a.stream_dtype) &&
                       are_vectors(a.weight, 0, a.N, a.weight_dtype);
  with_dtypes(a.dtype, a.stream_dtype, [&](auto x, auto residual) {
    using T = decltype(x);
    using S = decltype(residual);
    with_row_blocks<S>(a.N, [&](const RowBlocks& blocks, auto items) {
      launch<add_layer_norm_bwd_kernel<T, S, items()>>(grid_of(row_blocks(a.M)), blocks.block,
                                                       column_sums_bytes<S>(blocks), stream, a, vectors);
    });
  });
  with_dtype(a.weight_dtype, [&](auto p) {
    using P = decltype(p);
    column_sum(a.partial, row_blocks(a.M), a.N, static_cast<P*>(a.dweight), static_cast<P*>(a.dbias), stream);
  });
}

}  // namespace fastgpt::cuda
