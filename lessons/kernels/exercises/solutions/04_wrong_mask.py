"""Exercise 4, solved: a wrong mask.

Answer: The mask compares positions in the sequence, offs_m and offs_n. Within a block the offsets of queries and
keys agree with them only where both blocks start at the same place, on the diagonal; the keys before it are all in
the past, and the mask of the offsets hid half of those.

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
    offs_m, in_d = first + tl.arange(0, BLOCK_M), tl.arange(0, D)
    at_m = head + offs_m[:, None] * D + in_d[None, :]
    q = tl.load(q_ptr + at_m, mask=offs_m[:, None] < T, other=0.0)

    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(0, tl.minimum(first + BLOCK_M, T), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        at_n = head + offs_n[:, None] * D + in_d[None, :]
        k = tl.load(k_ptr + at_n, mask=offs_n[:, None] < T, other=0.0)
        v = tl.load(v_ptr + at_n, mask=offs_n[:, None] < T, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(offs_m[:, None] >= offs_n[None, :], scores, float("-inf"))
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
