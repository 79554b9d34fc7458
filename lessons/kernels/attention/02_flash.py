"""Causal attention in one kernel that never writes the scores down: FlashAttention.

A program has 64 queries and walks over the keys, 64 at a time. A tile of scores is made, used and dropped on chip.
For each query the program keeps the largest score so far, the sum of exponentials and the weighted sum of values, and
rescales both sums whenever the maximum grows: the online softmax (Dao et al., "FlashAttention", 2022).

Moves: q and o once, k and v once for each tile of 64 queries.

Last rung: the (T, T) matrix went through memory four times.

Gains: hardly anything is written but the result, and the reads fall to a third.

Promise: launches == 1
Promise: load bytes <= 0.34 x 01_three_kernels
Promise: store bytes <= 0.07 x 01_three_kernels
Promise: dots == 1 x 01_three_kernels
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _attention_kernel(
    o_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, T, scale, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    head = tl.program_id(1).to(tl.int64)
    queries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    q_offsets = head * T * D + queries[:, None] * D + d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=(queries < T)[:, None], other=0.0).to(tl.float32)
    o = tl.zeros((BLOCK_M, D), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, T, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_offsets = head * T * D + keys[:, None] * D + d[None, :]
        k = tl.load(k_ptr + k_offsets, mask=(keys < T)[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + k_offsets, mask=(keys < T)[:, None], other=0.0).to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(keys[None, :] <= queries[:, None], s, float("-inf"))
        # The first tile has a key that each query sees, so that there is a maximum from then on.
        grown = tl.maximum(largest, tl.max(s, axis=1))
        p = tl.exp(s - grown[:, None])
        correction = tl.exp(largest - grown)
        total = total * correction + tl.sum(p, axis=1)
        o = tl.dot(p, v, o * correction[:, None], input_precision="ieee")
        largest = grown
    tl.store(o_ptr + q_offsets, (o / total[:, None]).to(tl.float16), mask=(queries < T)[:, None])
    tl.store(lse_ptr + head * T + queries, largest + tl.log(total), mask=queries < T)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, H, T, D = q.shape
    o, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1}
    _attention_kernel[(triton.cdiv(T, 64), B * H)](o, lse, q, k, v, T, scale, D=D, **blocks)
    return o, lse
