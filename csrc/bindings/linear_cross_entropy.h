// linear_cross_entropy: torch's matrix products around the kernel of cross_entropy, on any device.
//
// The rows go through in chunks, in one buffer of logits: a product makes them, one pass turns them in place into their
// own gradient, and two products use that up for dx and dweight. So the full logits never exist, and none is made
// twice.

#pragma once

#include <algorithm>

#include "cross_entropy.h"

namespace fastgpt {

// `rows` rows of a contiguous (..., N) tensor from `start` on; transposed where asked for.
inline Tensor some_rows(const Tensor& x, int64_t start, int64_t rows, bool transposed = false) {
  const int64_t N = x.size(1);
  const int64_t sizes[2] = {transposed ? N : rows, transposed ? rows : N};
  const int64_t strides[2] = {transposed ? 1 : N, transposed ? N : 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), 2, sizes, strides, start * N, &handle));
  return Tensor(handle);
}

// The sum over all rows of dlogits.T @ x, in fp32, a chunk at a time.
template <class Backend>
class WeightGradient {
 public:
  WeightGradient(const Backend& backend, const Tensor& weight, const Tensor& x, int64_t V)
      : backend_(backend),
        total_(fresh(x, {V, weight.size(1)}, ScalarType::Float)),
        dtype_(dtype_of(x, "linear_cross_entropy_fwd")) {}

  void add(const Tensor& dlogits, const Tensor& x) {
    const Tensor turned = some_rows(dlogits, 0, dlogits.size(0), true);
    if (dtype_ == Dtype::fp32) {
      TORCH_ERROR_CODE_CHECK(
          Backend::addmm_out(total_.get(), total_.get(), turned.get(), x.get(), empty_ ? 0.0 : 1.0, 1.0));
    } else {
      // In half precision the product comes out rounded. In fp16 it might overflow, summed over the chunk's rows: it is
      // made of an x that a power of two has shrunk.
      float grow = 1.0f;
      Tensor small = x;
      if (dtype_ == Dtype::fp16) {
        while (grow <= static_cast<float>(x.size(0))) grow *= 2.0f;
        AtenTensorHandle shrunk;
        TORCH_ERROR_CODE_CHECK(Backend::mul_Scalar(x.get(), 1.0 / grow, &shrunk));
        small = Tensor(shrunk);
      }
      if (!part_) part_ = fresh_like(total_, x.scalar_type());
      TORCH_ERROR_CODE_CHECK(Backend::mm_out(part_->get(), turned.get(), small.get()));
      backend_.add_scaled({floats(total_), part_->data_ptr(), total_.numel(), grow, empty_, dtype_});
    }
    empty_ = false;
  }

  Tensor total() {
    if (empty_) torch::stable::zero_(total_);
    return total_;
  }

 private:
  const Backend& backend_;
  Tensor total_;
  std::optional<Tensor> part_;
  Dtype dtype_;
  bool empty_ = true;
};

// A Backend has
//   kBytesAtOnce: how large a chunk's logits may be;
//   mm_out, addmm_out, mul_Scalar: torch's functions for its device;
//   cross_entropy(logits, targets, dlogits, losses, stats, M, V, ignore_index, dtype), as kernels.h has it, unscaled;
//   add_scaled(...): the kernel of kernels.h;
//   mean(losses, targets, ignore_index): the mean loss, and 1 / the number of targets that count.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_fwd(const Backend& backend, const Tensor& x_,
                                                                    const Tensor& weight_, const Tensor& targets,
                                                                    int64_t ignore_index, bool with_gradient) {
  const char* op = "linear_cross_entropy_fwd";
  require(x_.dim() == 2 && weight_.dim() == 2 && x_.size(1) == weight_.size(1), op, "x must be (M, C), weight (V, C)");
  require(x_.scalar_type() == weight_.scalar_type(), op, "weight must have x's dtype");
  const Tensor x = dense(x_), weight = dense(weight_), t = dense(targets);
  const int64_t M = x.size(0), C = x.size(1), V = weight.size(0);
  const int64_t* classes = targets_of(t, M, op);
  const int64_t row_bytes = std::max<int64_t>(1, V * (x.scalar_type() == ScalarType::Float ? 4 : 2));
  const int64_t at_most = std::max<int64_t>(16, Backend::kBytesAtOnce / row_bytes);
  const int64_t chunks = std::max<int64_t>(1, (M + at_most - 1) / at_most);
  const int64_t chunk = (M + chunks - 1) / chunks;  // all of a size: a small last one would cost as much dweight
  const Tensor buffer = fresh(x, {chunk, V}, x.scalar_type());
  const Tensor losses = fresh(x, {M}, ScalarType::Float), stats = fresh(x, {2, chunk}, ScalarType::Float);
  const Tensor columns = some_rows(weight, 0, V, true);
  Tensor dx = fresh(x, {with_gradient ? M : 0, C}, x.scalar_type());
  WeightGradient<Backend> dweight(backend, weight, x, with_gradient ? V : 0);
  for (int64_t start = 0; start < M; start += chunk) {
    const int64_t rows = std::min(chunk, M - start);
    const Tensor x_rows = some_rows(x, start, rows), logits = some_rows(buffer, 0, rows);
    TORCH_ERROR_CODE_CHECK(Backend::mm_out(logits.get(), x_rows.get(), columns.get()));
    backend.cross_entropy({logits.data_ptr(), V}, classes + start, with_gradient ? logits.data_ptr() : nullptr,
                          floats(losses) + start, floats(stats), rows, V, ignore_index, dtype_of(x, op));
    if (!with_gradient) continue;
    TORCH_ERROR_CODE_CHECK(Backend::mm_out(some_rows(dx, start, rows).get(), logits.get(), weight.get()));
    dweight.add(logits, x_rows);
  }
  const auto [loss, inverse_count] = backend.mean(losses, classes, ignore_index);
  return {loss, inverse_count, dx, dweight.total()};
}

}  // namespace fastgpt
