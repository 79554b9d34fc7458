"""Attention's backward in one kernel that never writes a matrix down.

A program has 64 keys and walks over the queries that see them, 64 at a time; dk and dv gather in registers. What a
tile gives to dq is added to that of other programs by atomic operations, in fp32.

Moves: k, v, dk and dv once, 2 bytes a number; q, do and o once for each tile of 64 keys; and T * D atomic additions of
4 bytes for each tile of keys. Of what goes by tiles about half, since it is causal.

Last rung: p and ds went through memory, five times in all, and tiles above the diagonal were computed.

Gains: nothing of (T, T) in memory, and 5 products only for tiles on or below the diagonal. The price: dq is cleared
before and rounded after, atomic additions queue up where programs meet, and its last bits differ from run to run.

Promise: dots == 0.625 x 08_bwd_matrices
Promise: load bytes <= 0.25 x 08_bwd_matrices
Promise: store bytes <= 0.2 x 08_bwd_matrices
Promise: atomics == 81920
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _bwd_kernel(
    dq_ptr,  # fp32, zeros
    dk_ptr,
    dv_ptr,
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    T,
    scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    keys = first + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    k_offsets = head * T * D + keys[:, None] * D + d[None, :]
    k = tl.load(k_ptr + k_offsets, mask=(keys < T)[:, None], other=0.0)
    v = tl.load(v_ptr + k_offsets, mask=(keys < T)[:, None], other=0.0)
    dk = tl.zeros((BLOCK, D), tl.float32)
    dv = tl.zeros((BLOCK, D), tl.float32)
    # The first query that sees one of these keys is the first of them.
    for start in tl.range(first, T, BLOCK):
        queries = start + tl.arange(0, BLOCK)
        q_offsets = head * T * D + queries[:, None] * D + d[None, :]
        q = tl.load(q_ptr + q_offsets, mask=(queries < T)[:, None], other=0.0)
        do = tl.load(do_ptr + q_offsets, mask=(queries < T)[:, None], other=0.0)
        o = tl.load(o_ptr + q_offsets, mask=(queries < T)[:, None], other=0.0)
        lse = tl.load(lse_ptr + head * T + queries, mask=queries < T, other=float("inf"))
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
        p = tl.exp(tl.dot(q, tl.trans(k)) * scale - lse[:, None])
        p = tl.where(keys[None, :] <= queries[:, None], p, 0.0)
        dv = tl.dot(tl.trans(p.to(tl.float16)), do, dv)
        ds = (p * (tl.dot(do, tl.trans(v)) - delta[:, None])).to(tl.float16)
        dk = tl.dot(tl.trans(ds), q, dk)
        tl.atomic_add(dq_ptr + q_offsets, tl.dot(ds, k) * scale, mask=(queries < T)[:, None])
    tl.store(dk_ptr + k_offsets, (dk * scale).to(tl.float16), mask=(keys < T)[:, None])
    tl.store(dv_ptr + k_offsets, dv.to(tl.float16), mask=(keys < T)[:, None])


def attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, D = q.shape
    dq, dk, dv = torch.zeros_like(q, dtype=torch.float32), torch.empty_like(k), torch.empty_like(v)
    grid = (triton.cdiv(T, 64), B * H)
    _bwd_kernel[grid](dq, dk, dv, do, q, k, v, o, lse, T, scale, D=D, BLOCK=64, num_warps=4)
    return dq.to(q.dtype), dk, dv
