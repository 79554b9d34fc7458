"""Causal attention as its formula reads, in three kernels: scores, softmax, weighted sum of values.

Between them lies the (T, T) matrix of scores, and then of probabilities, in memory. Products are made in fp32,
exactly, which tensor cores cannot do: they run on the ordinary cores, a multiplication and addition at a time.

Moves: 16 bytes for each pair of a query and a key, the matrix being written and read twice, and tiles of q, k and v.

Last rung: there is none.

Gains: it is right.

Promise: store bytes >= 1048576
Promise: tensor-core instructions == 0
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _scores_kernel(s_ptr, q_ptr, k_ptr, T, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(2).to(tl.int64)
    queries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keys = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + head * T * D + queries[:, None] * D + d[None, :], mask=(queries < T)[:, None], other=0.0)
    k = tl.load(k_ptr + head * T * D + keys[:, None] * D + d[None, :], mask=(keys < T)[:, None], other=0.0)
    s = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee") * scale
    s = tl.where(keys[None, :] <= queries[:, None], s, float("-inf"))
    inside = (queries < T)[:, None] & (keys < T)[None, :]
    tl.store(s_ptr + head * T * T + queries[:, None] * T + keys[None, :], s, mask=inside)


@triton.jit
def _softmax_kernel(s_ptr, lse_ptr, rows, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (keys < T)[None, :]
    s_ptrs = s_ptr + row[:, None] * T + keys[None, :]
    s = tl.load(s_ptrs, mask=inside, other=float("-inf"))
    largest = tl.max(s, axis=1)
    largest = tl.where(row < rows, largest, 0.0)  # of a row beyond the last it is -inf, and -inf - -inf is NaN
    e = tl.exp(s - largest[:, None])
    total = tl.sum(e, axis=1)
    tl.store(s_ptrs, e / total[:, None], mask=inside)
    tl.store(lse_ptr + row, largest + tl.log(total), mask=row < rows)


@triton.jit
def _values_kernel(o_ptr, p_ptr, v_ptr, T, D: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    queries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    o = tl.zeros((BLOCK, D), tl.float32)
    for start in tl.range(0, T, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        inside = (queries < T)[:, None] & (keys < T)[None, :]
        p = tl.load(p_ptr + head * T * T + queries[:, None] * T + keys[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptr + head * T * D + keys[:, None] * D + d[None, :], mask=(keys < T)[:, None], other=0.0)
        o = tl.dot(p, v.to(tl.float32), o, input_precision="ieee")
    o_ptrs = o_ptr + head * T * D + queries[:, None] * D + d[None, :]
    tl.store(o_ptrs, o.to(tl.float16), mask=(queries < T)[:, None])


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, H, T, D = q.shape
    o, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)
    s = q.new_empty(B, H, T, T, dtype=torch.float32)
    tiles, rows, BLOCK_N = triton.cdiv(T, 64), B * H * T, triton.next_power_of_2(T)
    BLOCK_M = max(1, 8192 // BLOCK_N)
    _scores_kernel[(tiles, tiles, B * H)](s, q, k, T, scale, D=D, BLOCK=64, num_warps=8, num_stages=1)
    _softmax_kernel[(triton.cdiv(rows, BLOCK_M),)](s, lse, rows, T, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=8)
    _values_kernel[(tiles, B * H)](o, s, v, T, D=D, BLOCK=64, num_warps=8, num_stages=1)
    return o, lse
