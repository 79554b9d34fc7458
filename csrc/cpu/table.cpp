// The kernels of one instruction set, in a table. Compiled, as every kernel is, once per instruction set.

#include "kernels.h"

#define FASTGPT_STRING_OF(name) #name
#define FASTGPT_STRING(name) FASTGPT_STRING_OF(name)

namespace fastgpt::FASTGPT_ISA {

void attention_fwd(const Pool&, const AttentionFwd&);
void attention_bwd(const Pool&, const AttentionBwd&);
void layer_norm_fwd(const Pool&, const LayerNormFwd&);
void layer_norm_bwd(const Pool&, const LayerNormBwd&);
void gelu_fwd(const Pool&, const GeluFwd&);
void gelu_bwd(const Pool&, const GeluBwd&);
void softmax_fwd(const Pool&, const SoftmaxFwd&);
void softmax_bwd(const Pool&, const SoftmaxBwd&);
void cross_entropy_fwd(const Pool&, const CrossEntropyFwd&);
void cross_entropy_bwd(const Pool&, const CrossEntropyBwd&);
void scale_gradient(const Pool&, const ScaleGradient&);
void add_scaled(const Pool&, const AddScaled&);
void linear_row(const Pool&, const LinearRow&);
void math(const Pool&, const Math&);
void dropout(const Pool&, const Dropout&);
void add_layer_norm_fwd(const Pool&, const AddLayerNormFwd&);
void add_layer_norm_bwd(const Pool&, const AddLayerNormBwd&);
void adamw(const Pool&, const Adamw&);
void clip_grad_norm(const Pool&, const ClipGradNorm&);

extern const Kernels table;
const Kernels table = {
    FASTGPT_STRING(FASTGPT_ISA),
    attention_fwd,
    attention_bwd,
    layer_norm_fwd,
    layer_norm_bwd,
    gelu_fwd,
    gelu_bwd,
    softmax_fwd,
    softmax_bwd,
    cross_entropy_fwd,
    cross_entropy_bwd,
    scale_gradient,
    add_scaled,
    linear_row,
    math,
    dropout,
    add_layer_norm_fwd,
    add_layer_norm_bwd,
    adamw,
    clip_grad_norm,
};

}  // namespace fastgpt::FASTGPT_ISA
