"""Attention's backward with its matrices in memory, in three kernels.

With p = exp(scale * q k^T - lse), which lse makes again without a maximum or a sum: dv = p^T do, dp = do v^T, ds = p
* (dp - sum(do * o)), dq = scale * ds k, dk = scale * ds^T q. The first kernel leaves p and ds in memory, fp16
matrices of (T, T); the second walks down their columns for dk and dv, the third along their rows for dq.

Moves: 10 bytes for each pair of a query and a key (p and ds are written once, and 3 of the two are read), and tiles
of the rest.

Last rung: there is none for the backward.

Gains: it is right, with the fewest products that there can be: 5 for each tile.

Promise: dots == 160
Promise: atomics == 0
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _matrices_kernel(
    p_ptr, ds_ptr, do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, T, scale, D: tl.constexpr, BLOCK: tl.constexpr
):
    head = tl.program_id(2).to(tl.int64)
    queries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keys = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    q_offsets = head * T * D + queries[:, None] * D + d[None, :]
    k_offsets = head * T * D + keys[:, None] * D + d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=(queries < T)[:, None], other=0.0)
    do = tl.load(do_ptr + q_offsets, mask=(queries < T)[:, None], other=0.0)
    o = tl.load(o_ptr + q_offsets, mask=(queries < T)[:, None], other=0.0)
    k = tl.load(k_ptr + k_offsets, mask=(keys < T)[:, None], other=0.0)
    v = tl.load(v_ptr + k_offsets, mask=(keys < T)[:, None], other=0.0)
    lse = tl.load(lse_ptr + head * T + queries, mask=queries < T, other=float("inf"))
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    p = tl.exp(tl.dot(q, tl.trans(k)) * scale - lse[:, None])
    p = tl.where(keys[None, :] <= queries[:, None], p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None])
    inside = (queries < T)[:, None] & (keys < T)[None, :]
    offsets = head * T * T + queries[:, None] * T + keys[None, :]
    tl.store(p_ptr + offsets, p.to(tl.float16), mask=inside)
    tl.store(ds_ptr + offsets, ds.to(tl.float16), mask=inside)


@triton.jit
def _dkdv_kernel(dk_ptr, dv_ptr, p_ptr, ds_ptr, do_ptr, q_ptr, T, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    keys = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    dk = tl.zeros((BLOCK, D), tl.float32)
    dv = tl.zeros((BLOCK, D), tl.float32)
    for start in tl.range(0, T, BLOCK):
        queries = start + tl.arange(0, BLOCK)
        inside = (queries < T)[:, None] & (keys < T)[None, :]
        offsets = head * T * T + queries[:, None] * T + keys[None, :]
        q_offsets = head * T * D + queries[:, None] * D + d[None, :]
        p = tl.load(p_ptr + offsets, mask=inside, other=0.0)
        ds = tl.load(ds_ptr + offsets, mask=inside, other=0.0)
        q = tl.load(q_ptr + q_offsets, mask=(queries < T)[:, None], other=0.0)
        do = tl.load(do_ptr + q_offsets, mask=(queries < T)[:, None], other=0.0)
        dv = tl.dot(tl.trans(p), do, dv)
        dk = tl.dot(tl.trans(ds), q, dk)
    k_offsets = head * T * D + keys[:, None] * D + d[None, :]
    tl.store(dk_ptr + k_offsets, (dk * scale).to(tl.float16), mask=(keys < T)[:, None])
    tl.store(dv_ptr + k_offsets, dv.to(tl.float16), mask=(keys < T)[:, None])


@triton.jit
def _dq_kernel(dq_ptr, ds_ptr, k_ptr, T, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    queries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    dq = tl.zeros((BLOCK, D), tl.float32)
    for start in tl.range(0, T, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        inside = (queries < T)[:, None] & (keys < T)[None, :]
        ds = tl.load(ds_ptr + head * T * T + queries[:, None] * T + keys[None, :], mask=inside, other=0.0)
        k = tl.load(k_ptr + head * T * D + keys[:, None] * D + d[None, :], mask=(keys < T)[:, None], other=0.0)
        dq = tl.dot(ds, k, dq)
    q_offsets = head * T * D + queries[:, None] * D + d[None, :]
    tl.store(dq_ptr + q_offsets, (dq * scale).to(tl.float16), mask=(queries < T)[:, None])


def attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, D = q.shape
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    p, ds = q.new_empty(B, H, T, T), q.new_empty(B, H, T, T)
    tiles = triton.cdiv(T, 64)
    blocks = {"D": D, "BLOCK": 64, "num_warps": 4}
    _matrices_kernel[(tiles, tiles, B * H)](p, ds, do, q, k, v, o, lse, T, scale, **blocks)
    _dkdv_kernel[(tiles, B * H)](dk, dv, p, ds, do, q, T, scale, **blocks)
    _dq_kernel[(tiles, B * H)](dq, ds, k, T, scale, **blocks)
    return dq, dk, dv
