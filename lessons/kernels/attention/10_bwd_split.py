"""Attention's backward in two kernels: one owns keys, the other queries.

The first walks over queries for dk and dv, the second over keys for dq. Both make the tiles of p and ds for
themselves. sum(do * o), which each query needs in both, is made once, in a small kernel before.

Moves: q, do and two numbers a query once for each tile of 64 keys, k and v once for each tile of 64 queries, about half
of that since it is causal; the rest once.

Last rung: an atomic addition for each number of dq and each tile of keys.

Gains: no atomics, and the same bits each time. The price: 7 products a tile where 5 would do. Whether that is faster,
too, only a GPU can say; it is what the package does, since a run that can be repeated is worth more.

Promise: atomics == 0
Promise: dots <= 1.41 x 09_bwd_atomics
Promise: tensor-core instructions >= 1
Promise: spilled bytes == 0
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _delta_kernel(delta_ptr, do_ptr, o_ptr, rows, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offsets = row[:, None] * D + tl.arange(0, D)[None, :]
    do = tl.load(do_ptr + offsets, mask=(row < rows)[:, None], other=0.0)
    o = tl.load(o_ptr + offsets, mask=(row < rows)[:, None], other=0.0)
    tl.store(delta_ptr + row, tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1), mask=row < rows)


@triton.jit
def _dkdv_kernel(
    dk_ptr, dv_ptr, do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, T, scale, D: tl.constexpr, BLOCK: tl.constexpr
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
    for start in tl.range(first, T, BLOCK):
        queries = start + tl.arange(0, BLOCK)
        q_offsets = head * T * D + queries[:, None] * D + d[None, :]
        q = tl.load(q_ptr + q_offsets, mask=(queries < T)[:, None], other=0.0)
        do = tl.load(do_ptr + q_offsets, mask=(queries < T)[:, None], other=0.0)
        lse = tl.load(lse_ptr + head * T + queries, mask=queries < T, other=float("inf"))
        delta = tl.load(delta_ptr + head * T + queries, mask=queries < T, other=0.0)
        # Keys down and queries across, so that p and ds need not be turned round before they are multiplied.
        p = tl.exp(tl.dot(k, tl.trans(q)) * scale - lse[None, :])
        p = tl.where(keys[:, None] <= queries[None, :], p, 0.0)
        dv = tl.dot(p.to(tl.float16), do, dv)
        ds = p * (tl.dot(v, tl.trans(do)) - delta[None, :])
        dk = tl.dot(ds.to(tl.float16), q, dk)
    tl.store(dk_ptr + k_offsets, (dk * scale).to(tl.float16), mask=(keys < T)[:, None])
    tl.store(dv_ptr + k_offsets, dv.to(tl.float16), mask=(keys < T)[:, None])


@triton.jit
def _dq_kernel(dq_ptr, do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, T, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    queries = first + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    q_offsets = head * T * D + queries[:, None] * D + d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=(queries < T)[:, None], other=0.0)
    do = tl.load(do_ptr + q_offsets, mask=(queries < T)[:, None], other=0.0)
    lse = tl.load(lse_ptr + head * T + queries, mask=queries < T, other=float("inf"))
    delta = tl.load(delta_ptr + head * T + queries, mask=queries < T, other=0.0)
    dq = tl.zeros((BLOCK, D), tl.float32)
    for start in tl.range(0, tl.minimum(first + BLOCK, T), BLOCK):
        keys = start + tl.arange(0, BLOCK)
        k_offsets = head * T * D + keys[:, None] * D + d[None, :]
        k = tl.load(k_ptr + k_offsets, mask=(keys < T)[:, None], other=0.0)
        v = tl.load(v_ptr + k_offsets, mask=(keys < T)[:, None], other=0.0)
        p = tl.exp(tl.dot(q, tl.trans(k)) * scale - lse[:, None])
        p = tl.where(keys[None, :] <= queries[:, None], p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None])
        dq = tl.dot(ds.to(tl.float16), k, dq)
    tl.store(dq_ptr + q_offsets, (dq * scale).to(tl.float16), mask=(queries < T)[:, None])


def attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, D = q.shape
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    rows, grid = B * H * T, (triton.cdiv(T, 64), B * H)
    blocks = {"D": D, "BLOCK": 64, "num_warps": 4}
    _delta_kernel[(triton.cdiv(rows, 64),)](delta, do, o, rows, **blocks)
    _dkdv_kernel[grid](dk, dv, do, q, k, v, lse, delta, T, scale, **blocks)
    _dq_kernel[grid](dq, do, q, k, v, lse, delta, T, scale, **blocks)
    return dq, dk, dv
