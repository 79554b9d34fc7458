"""Exercise 4: a wrong mask.

Causal attention without the T x T matrix: a program takes a block of queries of one head, walks through the blocks
of keys that they may see, and keeps a running maximum and sum. Blocks of keys that lie wholly in the future are not
read. The first block of queries comes out right.

Asked: query i sees keys 0 to i, and no other.

Hint: offsets within a block and positions in the sequence are not the same numbers. For which blocks of queries and
keys do they lead to the same mask?

Goal: dots <= 40
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, T, scale, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    first = tl.program_id(0) * BLOCK_M  # of this program's queries
    head = tl.program_id(1) * T * D
    in_m, in_n, in_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    offs_m = first + in_m
    at_m = head + offs_m[:, None] * D + in_d[None, :]
    q = tl.load(q_ptr + at_m, mask=offs_m[:, None] < T, other=0.0)

    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(0, tl.minimum(first + BLOCK_M, T), BLOCK_N):
        offs_n = start + in_n
        at_n = head + offs_n[:, None] * D + in_d[None, :]
        k = tl.load(k_ptr + at_n, mask=offs_n[:, None] < T, other=0.0)
        v = tl.load(v_ptr + at_n, mask=offs_n[:, None] < T, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(in_m[:, None] >= in_n[None, :], scores, float("-inf"))
        larger = tl.maximum(m_i, tl.max(scores, axis=1))
        p = tl.exp(scores - larger[:, None])
        alpha = tl.exp(m_i - larger)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v)
        m_i = larger

    tl.store(o_ptr + at_m, (acc / l_i[:, None]).to(tl.float16), mask=offs_m[:, None] < T)
    tl.store(lse_ptr + tl.program_id(1) * T + offs_m, m_i + tl.log(l_i), mask=offs_m < T)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, H, T, D = q.shape
    o = torch.empty_like(q)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(T, 64), B * H)
    _attention_kernel[grid](q, k, v, o, lse, T, scale, D=D, BLOCK_M=64, BLOCK_N=64)
    return o, lse
