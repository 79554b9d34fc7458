// Dropout by masks of Philox words (philox.cuh), which are made again in the backward: the same kernel, of gradients.
// x is read and y written, 2ns bytes, s the element's size; the mask goes through no memory.

#include "elementwise.cuh"
#include "philox.cuh"

namespace fastgpt::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kElementwiseThreads) dropout_kernel(Dropout a, bool vectors) {
  constexpr int kCount = kVecSize<T>;
  for_my_elements<T>(a.n, [&](int64_t first, int64_t left) {
    float v[kCount];
    load_floats(v, static_cast<const T*>(a.x) + first, left, vectors && left >= kCount);
    const Dropper dropper(a.drop);
#pragma unroll
    for (int j = 0; j < kCount; j += 4) {
      const Words words = dropper.elements((first + j) / 4);
      v[j] = dropper(v[j], words.x);
      v[j + 1] = dropper(v[j + 1], words.y);
      v[j + 2] = dropper(v[j + 2], words.z);
      v[j + 3] = dropper(v[j + 3], words.w);
    }
    store_floats(static_cast<T*>(a.y) + first, v, left, vectors && left >= kCount);
  });
}

}  // namespace

void dropout(const Dropout& a, cudaStream_t stream) {
  const bool vectors = is_vector(a.x) && is_vector(a.y);
  with_dtype(a.dtype, [&](auto x) {
    using T = decltype(x);
    launch_elementwise<dropout_kernel<T>, T>(a.n, stream, a, vectors);
  });
}

}  // namespace fastgpt::cuda
