// attention 9: the package's own kernel, csrc/cuda/attention_fwd.cu.
//
// It is the last rung for all shapes: heads of up to 256 columns, any strides, lengths of keys, dropout, bf16 and fp16.
//
// Moves: q, o and lse once; k and v as far as they are seen, once for every 128 queries.
//
// Last rung: a warp has 16 queries, so that each operand that ldmatrix fetches is used for one mma of 16 rows; and o is
// written from where the sums lie, 4 bytes a lane, in pieces of 16 bytes.
//
// Gains: a warp has 32 queries, which share what is fetched; a tile has 64 keys, so that barriers are fewer; o goes by
// way of shared memory and leaves it 16 bytes a lane. The larger tiles cost a little at the diagonal, where more of a
// tile is computed in vain.
//
// Promise: ldmatrix <= 0.8 x 08_causal
// Promise: barriers <= 0.5 x 08_causal
// Promise: store requests <= 0.4 x 08_causal
// Promise: bank conflicts == 0

#include "attention_fwd.cu"
#include "tasks.h"

namespace fastgpt::cuda {

// What attention_fwd leaves to other files: this task has nothing for them.
void attention_fwd_fp32(const AttentionFwd&, bool, cudaStream_t) {}
bool attention_fwd_sm90(const AttentionFwd&, bool, cudaStream_t) { return false; }

}  // namespace fastgpt::cuda

extern "C" void attention(const fp16* q, const fp16* k, const fp16* v, fp16* o, float* lse, int B, int H, int T, int D,
                          float scale, cudaStream_t stream) {
  using namespace fastgpt;
  const auto heads = [&](const fp16* x) { return Heads{const_cast<fp16*>(x), int64_t{H} * T * D, int64_t{T} * D, D}; };
  const AttentionShape shape = {B, H, T, T, D};
  cuda::attention_fwd(
      {shape, heads(q), heads(k), heads(v), heads(o), lse, nullptr, {nullptr, 0, 1.0f}, scale, true, Dtype::fp16},
      stream);
}
