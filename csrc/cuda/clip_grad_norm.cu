// Scales all gradients down so that their joint 2-norm is at most max_norm (Pascanu et al., 2013).
//
// What moves: every gradient is read once for the norm, and read and written once more only if there is something to
// clip. As many blocks of threads as there are places for sums take the list's blocks in turn, by its sizes alone, and
// every block of the second kernel adds up all sums by itself, in the same order.

#include <array>

#include "rows.cuh"
#include "tensor_list.cuh"

namespace fastgpt::cuda {
namespace {

// Calls f(v, where they begin) for this thread's quads of a block, in batches: so many loads are on their way at once.
template <class F>
FASTGPT_PRIM void for_each_batch(const ListedTensor& x, int64_t first, int64_t last, bool whole, F f) {
  constexpr int kBatch = 4, kStep = kListThreads * kQuad;
  for (int64_t at = first + threadIdx.x * kQuad; at < last; at += kBatch * kStep) {
    Quad quads[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) quads[i].load(x, at + i * kStep, last - at - i * kStep, whole);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float v[kQuad];
      quads[i].get(v, x.dtype);
      f(v, at + i * kStep);
    }
  }
}

// Adds this launch's tensors to the block's place in `partial`, or, in the first launch, puts them there.
__global__ void __launch_bounds__(kListThreads)
    clip_grad_norm_sum_kernel(const __grid_constant__ Chunk<1> chunk, float* partial, bool first_launch) {
  ROW_REDUCTION(reduce);
  float total = 0.0f;
  for (int32_t block = static_cast<int32_t>(blockIdx.x); block < chunk.blocks; block += gridDim.x) {
    with_list_block(chunk, block, [&](const Together<1>& item, int64_t first, int64_t last, bool whole) {
      const ListedTensor grad = item.tensor(0);
      float sum = 0.0f;
      for_each_batch(grad, first, last, whole, [&](const float (&v)[kQuad], int64_t) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) sum += v[j] * v[j];
      });
      total += sum;
    });
  }
  total = reduce.sum(total);
  if (threadIdx.x == 0) stg(partial + blockIdx.x, first_launch ? total : total + ldg(partial + blockIdx.x));
}

__global__ void __launch_bounds__(kListThreads)
    clip_grad_norm_kernel(const __grid_constant__ Chunk<1> chunk, const float* partial, float* norm, float max_norm,
                          bool first_launch) {
  ROW_REDUCTION(reduce);
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(gridDim.x); i += kListThreads) {
    sum += ldg(partial + i);
  }
  const float root = sqrtf(reduce.sum(sum));
  if (first_launch && blockIdx.x == 0 && threadIdx.x == 0) stg(norm, root);
  const float coefficient = max_norm / (root + 1e-6f);
  if (coefficient >= 1.0f) return;  // a NaN goes on, and into the gradients
  for (int32_t block = static_cast<int32_t>(blockIdx.x); block < chunk.blocks; block += gridDim.x) {
    with_list_block(chunk, block, [&](const Together<1>& item, int64_t first, int64_t last, bool whole) {
      const ListedTensor grad = item.tensor(0);
      for_each_batch(grad, first, last, whole, [&](float (&v)[kQuad], int64_t at) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) v[j] *= coefficient;
        Quad::store(grad, at, last - at, whole, v);
      });
    });
  }
}

}  // namespace

void clip_grad_norm(const ClipGradNorm& a, cudaStream_t stream) {
  static_assert(sizeof(Chunk<1>) + 64 <= kMaxArguments);
  const dim3 grid = grid_of(clip_programs(a.blocks)), block(kListThreads);
  const auto tensors = [](const ClipItem& item) { return std::array<ListedTensor, 1>{item.grad}; };
  bool first = true;
  for_each_chunk<1>(a.items, a.count, tensors, [&](const Chunk<1>& chunk) {
    launch<clip_grad_norm_sum_kernel>(grid, block, 0, stream, chunk, a.partial, first);
    first = false;
  });
  first = true;
  for_each_chunk<1>(a.items, a.count, tensors, [&](const Chunk<1>& chunk) {
    launch<clip_grad_norm_kernel>(grid, block, 0, stream, chunk, a.partial, a.norm, a.max_norm, first);
    first = false;
  });
}

}  // namespace fastgpt::cuda
