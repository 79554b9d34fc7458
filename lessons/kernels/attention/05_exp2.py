"""Causal attention in powers of two.

A GPU has an instruction for 2^x, not for e^x: exp(x) is 2^(x * log2(e)), a multiplication more. The scores are
multiplied by the scale anyway. So log2(e) goes into the scale, once and for all, and maxima and sums are kept in
powers of two.

Moves: as before, 2 bytes for each number of q and o, and (T / 64 + 1) / 2 times 2 for each number of k and v.

Last rung: an exponential of each score took two instructions. While tensor cores do the products, the ordinary cores
have the softmax to do, and it is they who are late.

Gains: a multiplication less for each score.

Promise: multiplications <= 0.75 x 04_causal_skip
Promise: dots == 1 x 04_causal_skip
Promise: async copies == 0
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


@triton.jit
def _attention_kernel(
    o_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, T, scale_log2, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    head = tl.program_id(1).to(tl.int64)
    queries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    q_offsets = head * T * D + queries[:, None] * D + d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=(queries < T)[:, None], other=0.0)
    o = tl.zeros((BLOCK_M, D), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # The last query of the tile sees no key beyond itself.
    for start in tl.range(0, tl.minimum((tl.program_id(0) + 1) * BLOCK_M, T), BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_offsets = head * T * D + keys[:, None] * D + d[None, :]
        k = tl.load(k_ptr + k_offsets, mask=(keys < T)[:, None], other=0.0)
        v = tl.load(v_ptr + k_offsets, mask=(keys < T)[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale_log2
        s = tl.where(keys[None, :] <= queries[:, None], s, float("-inf"))
        # The first tile has a key that each query sees, so that there is a maximum from then on.
        grown = tl.maximum(largest, tl.max(s, axis=1))
        p = tl.exp2(s - grown[:, None])
        correction = tl.exp2(largest - grown)
        total = total * correction + tl.sum(p, axis=1)
        o = tl.dot(p.to(tl.float16), v, o * correction[:, None])
        largest = grown
    tl.store(o_ptr + q_offsets, (o / total[:, None]).to(tl.float16), mask=(queries < T)[:, None])
    tl.store(lse_ptr + head * T + queries, (largest + tl.log2(total)) * 0.6931471805599453, mask=queries < T)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, H, T, D = q.shape
    o, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
    _attention_kernel[(triton.cdiv(T, 64), B * H)](o, lse, q, k, v, T, scale * LOG2_E, D=D, **blocks)
    return o, lse
