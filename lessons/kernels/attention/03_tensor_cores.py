"""Causal attention on tensor cores: fp16 in, fp32 sums.

A tensor core multiplies small matrices of fp16 numbers and adds the products up in fp32: some hundred operations in
the time of one. All it takes is to leave q, k and v in fp16, and to round the probabilities to fp16 before they meet
v. They lie between 0 and 1, and are rounded no worse than the result.

Moves: as before, 2 bytes for each number of q and o, and T / 64 times 2 for each number of k and v.

Last rung: every product was an instruction of its own, in fp32.

Gains: thousands of multiplications become a few matrix instructions, and a tile takes half the registers.

Promise: tensor-core instructions >= 1
Promise: multiplications <= 0.2 x 02_flash
Promise: load bytes == 1 x 02_flash
Promise: spilled bytes == 0
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
    q = tl.load(q_ptr + q_offsets, mask=(queries < T)[:, None], other=0.0)
    o = tl.zeros((BLOCK_M, D), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, T, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_offsets = head * T * D + keys[:, None] * D + d[None, :]
        k = tl.load(k_ptr + k_offsets, mask=(keys < T)[:, None], other=0.0)
        v = tl.load(v_ptr + k_offsets, mask=(keys < T)[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        s = tl.where(keys[None, :] <= queries[:, None], s, float("-inf"))
        # The first tile has a key that each query sees, so that there is a maximum from then on.
        grown = tl.maximum(largest, tl.max(s, axis=1))
        p = tl.exp(s - grown[:, None])
        correction = tl.exp(largest - grown)
        total = total * correction + tl.sum(p, axis=1)
        o = tl.dot(p.to(tl.float16), v, o * correction[:, None])
        largest = grown
    tl.store(o_ptr + q_offsets, (o / total[:, None]).to(tl.float16), mask=(queries < T)[:, None])
    tl.store(lse_ptr + head * T + queries, largest + tl.log(total), mask=queries < T)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, H, T, D = q.shape
    o, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
    _attention_kernel[(triton.cdiv(T, 64), B * H)](o, lse, q, k, v, T, scale, D=D, **blocks)
    return o, lse
