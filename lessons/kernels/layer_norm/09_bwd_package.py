"""Layer norm's backward as fastgpt ships it: triton_kernels/layer_norm.py.

Moves: 8 bytes read an element and 4 written, and two lines of sums for each program; rows beyond 8192 elements take
two kernels in passes.

Last rung: a long row spilled.

Gains: no speed on these sizes. Rows and warps go by the length of a row; half precision; 64-bit offsets.

Promise: atomics == 0
Promise: load bytes <= 1 x 08_bwd_partial_sums
Promise: load width == 16
Promise: spilled bytes == 0
"""

from torch import Tensor

from fastgpt.triton_kernels.layer_norm import layer_norm_bwd as package_layer_norm_bwd


def layer_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return package_layer_norm_bwd(dy, x, weight, mean, rstd)
