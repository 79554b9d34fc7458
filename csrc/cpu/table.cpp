// The kernels of one instruction set, in a table. Compiled, as every kernel is, once per instruction set.

#include "kernels.h"

#define FASTGPT_STRING_OF(name) #name
#define FASTGPT_STRING(name) FASTGPT_STRING_OF(name)

namespace fastgpt::FASTGPT_ISA {

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
void math(const Pool&, const Math&);

extern const Kernels table;
const Kernels table = {
    FASTGPT_STRING(FASTGPT_ISA),
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
    math,
};

}  // namespace fastgpt::FASTGPT_ISA
