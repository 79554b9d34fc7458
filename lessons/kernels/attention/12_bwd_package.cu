// attention's backward 3: the package's own kernels, csrc/cuda/attention_bwd.cu.
//
// Moves: as before, but q and do once for every 128 keys, and k and v once for every 128 queries.
//
// Last rung: copies were waited for as soon as they had been started; a warp had 16 rows; gradients were written 4
// bytes a lane.
//
// Gains: what the last rungs of the forward gained: two places for tiles and one barrier a tile, 32 rows of a warp that
// share what ldmatrix fetches, gradients written 16 bytes a lane; and all shapes, strides, dropout, bf16 and fp16.
//
// Promise: ldmatrix <= 0.8 x 11_bwd_split
// Promise: barriers <= 0.5 x 11_bwd_split
// Promise: store requests <= 0.4 x 11_bwd_split
// Promise: bank conflicts == 0

#include "attention_bwd.cu"
#include "tasks.h"

namespace fastgpt::cuda {

// What attention_bwd leaves to another file: this task has nothing for it.
void attention_bwd_fp32(const AttentionBwd&, bool, cudaStream_t) {}

}  // namespace fastgpt::cuda

extern "C" void attention_bwd(const fp16* dout, const fp16* q, const fp16* k, const fp16* v, const fp16* o,
                              const float* lse, fp16* dq, fp16* dk, fp16* dv, int B, int H, int T, int D, float scale,
                              cudaStream_t stream) {
  using namespace fastgpt;
  const auto heads = [&](const fp16* x) { return Heads{const_cast<fp16*>(x), int64_t{H} * T * D, int64_t{T} * D, D}; };
  const AttentionShape shape = {B, H, T, T, D};
  lessons::Scratch<float> delta(static_cast<size_t>(B) * H * T, stream);
  cuda::attention_bwd({shape,
                       heads(dout),
                       heads(q),
                       heads(k),
                       heads(v),
                       heads(o),
                       heads(dq),
                       heads(dk),
                       heads(dv),
                       lse,
                       delta.data(),
                       nullptr,
                       {nullptr, 0, 1.0f},
                       scale,
                       true,
                       Dtype::fp16},
                      stream);
}
