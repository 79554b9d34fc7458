// Cross entropy: loss = -log softmax(logits)[target] of each row, and its gradient softmax(logits) - onehot(target).
//
// Forward: a row of logits is read once, 2 or 4 bytes an element, and as much is written for the gradient where that is
// wanted. In between it lies in registers, or, from 8192 elements in half precision on, in shared memory: of GPT-2's
// vocabulary of 50304 in half precision an H100 has two rows on each multiprocessor, one on its way in while the other
// is gone over. Rows beyond 99 KB, which is what a block may have on every GPU, are read a second time for the
// gradient, mostly from L2: a multiprocessor works on one row at a time, so that they fit in there. Rows whose
// target does not count are not read. The backward that starts from the statistics reads the logits and writes the
// gradient.
//
// A vocabulary is often no multiple of 8 (GPT-2's own is 50257), so rows begin anywhere. They are cut at multiples of
// 16 bytes of memory all the same: only the elements at a row's ends go one by one.

#include "elementwise.cuh"
#include "exponentials.cuh"

namespace fastgpt::cuda {
namespace {

enum class Home { registers, shared, memory };  // of a row between its two passes

// At most, of a row: two blocks with 99 KB of shared memory fill the registers of a multiprocessor, as one block does
// where the rows that are being worked on have to fit into L2.
template <Home kHome>
constexpr int kThreads = kHome == Home::registers ? kRowThreads
                         : kHome == Home::shared  ? 512
                                                  : 1024;

// Where 16-byte steps cut a row of V elements at `start`: columns are counted from the step that it begins in, its
// first element being at column `skip`. `left` is how many elements there are from a column on.
template <class T>
struct Steps {
  static constexpr int kCount = kVecSize<T>;
  int skip;
  int64_t end;

  FASTGPT_PRIM Steps(const T* start, int64_t V)
      : skip(static_cast<int>(reinterpret_cast<uintptr_t>(start) / sizeof(T) % kCount)), end(V + skip) {}

  FASTGPT_PRIM bool is_whole(int64_t c, int64_t left) const { return c >= skip && left >= kCount; }
  FASTGPT_PRIM bool has(int j, int64_t c, int64_t left) const { return c + j >= skip && j < left; }

  // Writes what of a step lies in the row that starts at `start`, by 16 bytes where that row is cut alike.
  FASTGPT_PRIM void store(T* start, const float (&v)[kCount], int64_t c, int64_t left) const {
    const bool alike = reinterpret_cast<uintptr_t>(start - skip) % 16 == 0;
    if (alike && is_whole(c, left)) {
      store_floats(start + (c - skip), v, left, true);
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (has(j, c, left)) stg(start + (c - skip) + j, from_float<T>(v[j]));
      }
    }
  }

  FASTGPT_PRIM void clear(T* start) const {
    for_each_item<0, kCount>(end, [&](int, int64_t c, int64_t left) {
      const float zeros[kCount] = {};
      store(start, zeros, c, left);
    });
  }
};

// One row of logits, as this thread sees it.
template <class T, Home kHome>
class LogitRow {
 public:
  static constexpr int kCount = kVecSize<T>;
  static constexpr int kItems = kHome == Home::registers ? kHeldItems : 0;

  // `room` is for the row and one step, where it is to lie in shared memory.
  FASTGPT_PRIM LogitRow(const T* start, int64_t V, Shared<T> room) : steps(start, V), start_(start), room_(room) {
    if constexpr (kHome == Home::registers) {
      for_each_item<kItems, kCount>(steps.end, [&](int i, int64_t c, int64_t left) { kept_[i] = read(c, left); });
    }
    if constexpr (kHome == Home::shared) {
      for_each_item<kItems, kCount>(steps.end, [&](int, int64_t c, int64_t left) {
        const Shared<T> to = room_ + static_cast<int>(c);
        if (steps.is_whole(c, left)) {
          cp_async_16(to, start_ + (c - steps.skip));
        } else {
          sts(to.template as<Vec<T, kCount>>(), read(c, left));
        }
      });
      cp_async_commit();
      cp_async_wait<0>();  // and no barrier: a thread only ever comes back to what it copied itself
    }
  }

  // The elements of an item of for_each_item up to steps.end; -inf outside of the row.
  FASTGPT_PRIM void operator()(float (&to)[kCount], int i, int64_t c, int64_t left) const {
    Vec<T, kCount> v;
    if constexpr (kHome == Home::registers) v = kept_[i];
    if constexpr (kHome == Home::shared) v = lds((room_ + static_cast<int>(c)).template as<Vec<T, kCount>>());
    if constexpr (kHome == Home::memory) v = read(c, left);
#pragma unroll
    for (int j = 0; j < kCount; ++j) to[j] = to_float(v[j]);
  }

  const Steps<T> steps;

 private:
  FASTGPT_PRIM Vec<T, kCount> read(int64_t c, int64_t left) const {
    const T* from = start_ + (c - steps.skip);
    if (steps.is_whole(c, left)) return ldg(reinterpret_cast<const Vec<T, kCount>*>(from));
    Vec<T, kCount> v;
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = steps.has(j, c, left) ? ldg(from + j) : from_float<T>(-INFINITY);
    return v;
  }

  const T* start_;
  Shared<T> room_;
  Vec<T, kCount> kept_[kItems > 0 ? kItems : 1];
};

template <class T, Home kHome>
__global__ void __launch_bounds__(kThreads<kHome>) cross_entropy_fwd_kernel(CrossEntropyFwd a) {
  ROW_REDUCTION(reduce);
  DYNAMIC_SHARED(T, room);
  using Logits = LogitRow<T, kHome>;
  constexpr int kCount = Logits::kCount;
  const int64_t m = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (m >= a.M) return;  // the whole row: where several warps share one, it has a block of its own
  const int64_t target = ldg(a.targets + m);
  const T* start = static_cast<const T*>(a.logits.data) + m * a.logits.stride;
  T* dx = a.dlogits == nullptr ? nullptr : static_cast<T*>(a.dlogits) + m * a.V;
  if (target == a.ignore_index) {
    if (dx != nullptr) Steps<T>(dx, a.V).clear(dx);
    if (threadIdx.x == 0) {
      stg(a.losses + m, 0.0f);
      stg(a.stats + m, 0.0f);
      stg(a.stats + a.M + m, 0.0f);
    }
    return;
  }
  const Logits x(start, a.V, room);
  const ExponentialSum sum = exponential_sum<T, Logits::kItems, kHome != Home::memory>(reduce, x.steps.end, x);
  // By the thread that has the target's logit, since its gradient may take its place: nobody else reads it.
  const bool valid = target >= 0 && target < a.V;
  const int64_t hit = valid ? target + x.steps.skip : 0;  // its column
  if ((hit / kCount & (blockDim.x - 1)) == threadIdx.x) {
    const float picked = valid ? to_float(ldg(start + target)) : NAN;
    const float log_total = logf(sum.total);
    // Not (top + log_total) - picked: an offset of all logits then costs no digits.
    stg(a.losses + m, (sum.top - picked) + log_total);
    stg(a.stats + m, sum.top);
    stg(a.stats + a.M + m, log_total);
  }
  if (dx == nullptr) return;
  const float inverse = 1.0f / sum.total, scale = a.grad_scale == nullptr ? 1.0f : ldg(a.grad_scale);
  for_each_item<Logits::kItems, kCount>(x.steps.end, [&](int i, int64_t c, int64_t left) {
    float v[kCount];
    x(v, i, c, left);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float p = exponential<T>(v[j] - sum.shift) * inverse;
      v[j] = (valid && c + j == hit ? p - 1.0f : p) * scale;
    }
    x.steps.store(dx, v, c, left);
  });
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) cross_entropy_bwd_kernel(CrossEntropyBwd a) {
  using Logits = LogitRow<T, Home::memory>;
  constexpr int kCount = Logits::kCount;
  const int64_t m = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (m >= a.M) return;
  const int64_t target = ldg(a.targets + m);
  T* dx = static_cast<T*>(a.dlogits) + m * a.V;
  if (target == a.ignore_index) {
    Steps<T>(dx, a.V).clear(dx);
    return;
  }
  const Logits x(static_cast<const T*>(a.logits.data) + m * a.logits.stride, a.V, Shared<T>(nullptr));
  const float top = ldg(a.stats + m), log_total = ldg(a.stats + a.M + m);
  const float scale = ldg(a.dloss) * ldg(a.inverse_count);
  for_each_item<0, kCount>(x.steps.end, [&](int i, int64_t c, int64_t left) {
    float v[kCount];
    x(v, i, c, left);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float p = exponential<T>((v[j] - top) - log_total);
      v[j] = (c + j == target + x.steps.skip ? p - 1.0f : p) * scale;
    }
    x.steps.store(dx, v, c, left);
  });
}

// The sums over M rows are one block's: a few microseconds at most, and always in the same order.
constexpr int kSumThreads = 1024;

__global__ void __launch_bounds__(kSumThreads)
    inverse_count_kernel(const int64_t* targets, int64_t M, int64_t ignore_index, float* inverse) {
  ROW_REDUCTION(reduce);
  int count = 0;
#pragma unroll 8
  for (int64_t m = threadIdx.x; m < M; m += kSumThreads) count += ldg(targets + m) != ignore_index;
  const float total = reduce.sum(static_cast<float>(count));
  if (threadIdx.x == 0) stg(inverse, 1.0f / total);
}

__global__ void __launch_bounds__(kSumThreads)
    mean_loss_kernel(const float* losses, int64_t M, const float* inverse, float* loss) {
  ROW_REDUCTION(reduce);
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t m = threadIdx.x; m < M; m += kSumThreads) sum += ldg(losses + m);
  const float total = reduce.sum(sum);
  if (threadIdx.x == 0) stg(loss, total * ldg(inverse));
}

// The factor lies on the device. Where it is 1, as a loss's own gradient usually is, no byte of the gradient moves.
template <class T>
__global__ void __launch_bounds__(kElementwiseThreads) scale_gradient_kernel(ScaleGradient a, bool vectors) {
  constexpr int kCount = kVecSize<T>;
  const float factor = ldg(a.factor);
  if (factor == 1.0f) return;
  for_my_elements<T>(a.n, [&](int64_t first, int64_t left) {
    T* x = static_cast<T*>(a.gradient) + first;
    float v[kCount];
    load_floats(v, x, left, vectors && left >= kCount);
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] *= factor;
    store_floats(x, v, left, vectors && left >= kCount);
  });
}

template <class T>
__global__ void __launch_bounds__(kElementwiseThreads) add_scaled_kernel(AddScaled a, bool vectors) {
  constexpr int kCount = kVecSize<T>;
  for_my_elements<T>(a.n, [&](int64_t first, int64_t left) {
    const bool whole = vectors && left >= kCount;
    float total[kCount] = {}, part[kCount];
    load_floats(part, static_cast<const T*>(a.part) + first, left, whole);
    if (!a.first) load_floats(total, a.total + first, left, whole);
#pragma unroll
    for (int j = 0; j < kCount; ++j) total[j] += part[j] * a.factor;
    store_floats(a.total + first, total, left, whole);
  });
}

}  // namespace

void inverse_count(const int64_t* targets, int64_t M, int64_t ignore_index, float* inverse, cudaStream_t stream) {
  launch<inverse_count_kernel>(dim3(1), dim3(kSumThreads), 0, stream, targets, M, ignore_index, inverse);
}

void mean_loss(const float* losses, int64_t M, const float* inverse, float* loss, cudaStream_t stream) {
  launch<mean_loss_kernel>(dim3(1), dim3(kSumThreads), 0, stream, losses, M, inverse, loss);
}

void cross_entropy_fwd(const CrossEntropyFwd& a, cudaStream_t stream) {
  constexpr size_t kMostShared = (99 << 10) - 2 * kWarpSize * sizeof(float);  // beside the reduction's
  with_dtype(a.dtype, [&](auto x) {
    using T = decltype(x);
    const int64_t longest = a.V + kVecSize<T> - 1;  // of a row's steps, wherever it begins
    const size_t held = (longest + kVecSize<T> - 1) / kVecSize<T> * 16;
    with_row_blocks<T>(longest, [&](const RowBlocks& blocks, auto items) {
      if constexpr (items() > 0) {
        launch<cross_entropy_fwd_kernel<T, Home::registers>>(blocks.grid(a.M), blocks.block, 0, stream, a);
      } else if (held <= kMostShared) {
        launch<cross_entropy_fwd_kernel<T, Home::shared>>(grid_of(a.M), dim3(kThreads<Home::shared>), held, stream, a);
      } else {
        launch<cross_entropy_fwd_kernel<T, Home::memory>>(grid_of(a.M), dim3(kThreads<Home::memory>), 0, stream, a);
      }
    });
  });
}

void cross_entropy_bwd(const CrossEntropyBwd& a, cudaStream_t stream) {
  with_dtype(a.dtype, [&](auto x) {
    using T = decltype(x);
    with_row_blocks<T>(a.V, [&](const RowBlocks& blocks, auto) {
      launch<cross_entropy_bwd_kernel<T>>(blocks.grid(a.M), blocks.block, 0, stream, a);
    });
  });
}

void scale_gradient(const ScaleGradient& a, cudaStream_t stream) {
  with_dtype(a.dtype, [&](auto x) {
    using T = decltype(x);
    launch_elementwise<scale_gradient_kernel<T>, T>(a.n, stream, a, is_vector(a.gradient));
  });
}

void add_scaled(const AddScaled& a, cudaStream_t stream) {
  const auto add = [&](auto part) {
    using T = decltype(part);
    launch_elementwise<add_scaled_kernel<T>, T>(a.n, stream, a, is_vector(a.part) && is_vector(a.total));
  };
  a.dtype == Dtype::bf16 ? add(bf16()) : add(fp16());
}

}  // namespace fastgpt::cuda
