"""Attention's backward as fastgpt ships it: triton_kernels/attention.py.

Moves: as before, in tiles of 128 keys for dk and dv, and of 128 queries for dq.

Last rung: every tile carried the mask; small tiles read their counterparts often; exponentials took an instruction
more than in powers of two.

Gains: fewer reads, masks only where the diagonal or an end cuts a tile, exp2; tiles by GPU generation and head size,
dropout, any strides, bf16 and fp32.

Promise: atomics == 0
Promise: load bytes <= 0.8 x 10_bwd_split
Promise: tensor-core instructions >= 1
Promise: spilled bytes == 0
"""

from torch import Tensor

from fastgpt.triton_kernels.attention import attention_bwd as package_attention_bwd


def attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return package_attention_bwd(do, q, k, v, o, lse, True, 0.0, scale, None, None)
