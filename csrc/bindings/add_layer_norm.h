// What the CPU's and the GPU's add_layer_norm do around their kernels: checks, copies and outputs.

#pragma once

#include "tensor.h"

namespace fastgpt {

// The kernels know a stream of x's dtype or of fp32. A residual of another dtype is widened to fp32 before the kernel,
// and its gradient rounded after it, as the kernel would have.
inline ScalarType stream_dtype(ScalarType x, ScalarType residual) { return x == residual ? x : ScalarType::Float; }

inline Tensor in_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

struct AddLayerNormForward {
  ScalarType stream;
  Matrix x, residual;
  Tensor weight;
  std::optional<Tensor> bias;
  Tensor y, residual_out, mean, rstd;

  AddLayerNormForward(const Tensor& given_x, const Tensor& given_residual, const Tensor& given_weight,
                      const std::optional<Tensor>& given_bias, const char* op)
      : stream(stream_dtype(given_x.scalar_type(), given_residual.scalar_type())),
        x(given_x),
        residual(in_dtype(given_residual, stream)),
        weight(dense(given_weight)),
        bias(given_bias ? std::optional<Tensor>(dense(*given_bias)) : std::nullopt),
        y(fresh_like(given_x, given_x.scalar_type())),
        residual_out(fresh_like(given_x, stream)),
        mean(fresh(given_x, {x.M}, ScalarType::Float)),
        rstd(fresh(given_x, {x.M}, ScalarType::Float)) {
    require(residual.M == x.M && residual.N == x.N, op, "residual must have x's shape");
    require(weight.numel() == x.N && (!bias || bias->numel() == x.N), op, "weight and bias must have N elements");
    require(!bias || bias->scalar_type() == weight.scalar_type(), op, "bias must have weight's dtype");
  }

  const void* bias_data() const { return bias ? bias->data_ptr() : nullptr; }
};

struct AddLayerNormBackward {
  Matrix total, dy, dstream;
  Rows dstream_rows;  // null where the stream ends
  Tensor weight;
  bool same;  // dx would be dresidual, and has no elements
  Tensor dx, dresidual, dweight, dbias;

  AddLayerNormBackward(const Tensor& given_dy, const std::optional<Tensor>& dresidual_out, const Tensor& residual_out,
                       const Tensor& given_weight, const Tensor& mean, const Tensor& rstd, bool drops,
                       ScalarType x_dtype, ScalarType residual_dtype, const char* op)
      : total(residual_out),
        dy(given_dy),
        dstream(dresidual_out ? *dresidual_out : residual_out),
        dstream_rows(dresidual_out ? dstream.rows : Rows{nullptr, 0}),
        weight(dense(given_weight)),
        same(!drops && x_dtype == residual_dtype),
        dx(same ? fresh(given_dy, {0}, x_dtype) : fresh_like(residual_out, x_dtype)),
        dresidual(fresh_like(residual_out, residual_out.scalar_type())),
        dweight(fresh(given_dy, {total.N}, weight.scalar_type())),
        dbias(fresh(given_dy, {total.N}, weight.scalar_type())) {
    const ScalarType stream = residual_out.scalar_type();
    require(dy.M == total.M && dy.N == total.N && dstream.M == total.M && dstream.N == total.N, op,
            "dy and dresidual_out must have residual_out's shape");
    require(given_dy.scalar_type() == x_dtype && dstream.kept.scalar_type() == stream, op,
            "dy must have x's dtype, dresidual_out that of residual_out");
    require(stream == stream_dtype(x_dtype, residual_dtype), op,
            "residual_out must have the promoted dtype of x and residual");
    require(weight.numel() == total.N && mean.numel() == total.M && rstd.numel() == total.M, op,
            "weight must have N elements, mean and rstd one for each row");
  }

  void* dx_data() const { return same ? nullptr : dx.data_ptr(); }
};

}  // namespace fastgpt
