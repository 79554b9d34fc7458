// Dropout by masks of Philox words (philox.h), which are made again in the backward: the same kernel, of gradients.

#include "philox.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

template <class T>
void drop(const Pool& pool, const Dropout& a) {
  constexpr int64_t kPiece = 4096;
  const Dropper dropper(a.drop);
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  parallel_for(pool, ceil_div(a.n, kPiece), 4, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPiece, count = min(a.n, end * kPiece) - first;
    for_each_word_vec(dropper, first, count, [&](int64_t i, int n, VecU words) {
      store_n(y + first + i, dropper.apply(load_n(x + first + i, n), words), n);
    });
  });
}

}  // namespace

void dropout(const Pool& pool, const Dropout& a) {
  with_dtype(a.dtype, [&](auto t) { drop<decltype(t)>(pool, a); });
}

}  // namespace fastgpt::FASTGPT_ISA
