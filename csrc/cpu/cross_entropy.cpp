// Cross entropy: loss = -log softmax(logits)[target] of each row, and its gradient softmax(logits) - onehot(target).
//
// A row of logits is read from memory once and stays in the cache for its maximum, its exponentials and their sum, and
// the gradient, which is written in the same turn. The backward that starts from the statistics reads the logits once
// more.

#include "rows.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

template <class T>
void forward(const Pool& pool, const CrossEntropyFwd& a) {
  const int64_t V = a.V;
  float *tops = a.stats, *log_totals = a.stats + a.M;
  parallel_for(pool, a.M, row_grain(V), [&](int64_t begin, int64_t end) {
    HeldExponentials held(V);
    for (int64_t m = begin; m < end; ++m) {
      const T* x = row<T>(a.logits, m);
      T* dx = a.dlogits == nullptr ? nullptr : static_cast<T*>(a.dlogits) + m * V;
      const int64_t target = a.targets[m];
      const bool counted = target != a.ignore_index, valid = target >= 0 && target < V;
      const float picked = counted && valid ? load_one(x + target) : __builtin_nanf("");
      if (dx == nullptr || !counted) {
        held.data = nullptr;
      } else {
        held.start(dx);
      }
      const ExponentialSum sum = exponential_sum(V, [&](int64_t i, int n) { return load_n(x + i, n); }, held.data);
      a.losses[m] = sum.top - picked;
      tops[m] = sum.top;
      log_totals[m] = sum.total;
      if (dx == nullptr) continue;
      if (!counted) {
        clear(dx, V);
        continue;
      }
      const float inverse = 1.0f / sum.total, factor = inverse * a.grad_scale;
      for_each_vec(V, [&](int64_t i, int n) {
        Vec e = held.data != nullptr ? load_n(held.data + i, n) : vexp(load_n(x + i, n) - sum.shift);
        store_n(dx + i, e * factor, n);
      });
      if (valid) store_one(dx + target, (vexp(splat(picked - sum.shift))[0] * inverse - 1.0f) * a.grad_scale);
    }
    // The logarithms of many rows at once, where a row has few classes a part of the work. (top - picked) + log_total
    // and not (top + log_total) - picked: an offset of all logits then costs no digits.
    for_each_vec(end - begin, [&](int64_t i, int n) {
      float* totals = log_totals + begin + i;
      store_n(totals, vlog(load_n(totals, n)), n);
    });
    for (int64_t m = begin; m < end; ++m) {
      a.losses[m] = a.targets[m] == a.ignore_index ? 0.0f : a.losses[m] + log_totals[m];
    }
  });
}

template <class T>
void backward(const Pool& pool, const CrossEntropyBwd& a) {
  const int64_t V = a.V;
  parallel_for(pool, a.M, row_grain(V), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* x = row<T>(a.logits, m);
      T* dx = static_cast<T*>(a.dlogits) + m * V;
      const int64_t target = a.targets[m];
      if (target == a.ignore_index) {
        clear(dx, V);
        continue;
      }
      const float top = a.stats[m], log_total = a.stats[a.M + m];
      auto probability = [&](Vec v) { return vexp((v - top) - log_total); };
      for_each_vec(V, [&](int64_t i, int n) { store_n(dx + i, probability(load_n(x + i, n)) * a.grad_scale, n); });
      if (target >= 0 && target < V) {
        store_one(dx + target, (probability(splat(load_one(x + target)))[0] - 1.0f) * a.grad_scale);
      }
    }
  });
}

}  // namespace

void cross_entropy_fwd(const Pool& pool, const CrossEntropyFwd& a) {
  with_dtype(a.dtype, [&](auto t) { forward<decltype(t)>(pool, a); });
}

void cross_entropy_bwd(const Pool& pool, const CrossEntropyBwd& a) {
  with_dtype(a.dtype, [&](auto t) { backward<decltype(t)>(pool, a); });
}

void scale_gradient(const Pool& pool, const ScaleGradient& a) {
  with_dtype(a.dtype, [&](auto t) {
    auto* x = static_cast<decltype(t)*>(a.gradient);
    parallel_for(pool, a.n, 65536, [&](int64_t begin, int64_t end) {
      for_each_vec(end - begin, [&](int64_t i, int n) {
        i += begin;
        store_n(x + i, load_n(x + i, n) * a.factor, n);
      });
    });
  });
}

void add_scaled(const Pool& pool, const AddScaled& a) {
  with_dtype(a.dtype, [&](auto t) {
    const auto* part = static_cast<const decltype(t)*>(a.part);
    parallel_for(pool, a.n, 65536, [&](int64_t begin, int64_t end) {
      for_each_vec(end - begin, [&](int64_t i, int n) {
        i += begin;
        Vec v = load_n(part + i, n) * a.factor;
        if (!a.first) v += load_n(a.total + i, n);
        store_n(a.total + i, v, n);
      });
    });
  });
}

}  // namespace fastgpt::FASTGPT_ISA
