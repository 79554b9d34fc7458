"""Layer norm's backward with partial sums of a few programs, which a second kernel adds up.

A few programs for each multiprocessor, no more, take one tile of rows after the other. Each keeps the sums for
dweight and dbias of its rows in registers, and leaves them in a line of its own when it is done.

Moves: 8 bytes read an element and 4 written; for each program weight, and two lines of sums that are written and
read.

Last rung: it had 2 atomic additions for each element of x, and other last bits each time.

Gains: no atomics, the same bits each time, and weight read once a program instead of once a row.

Promise: atomics == 0
Promise: load bytes < 1 x 07_bwd_atomics
Promise: load width == 16
Promise: spilled bytes == 0
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton_kernels.launch import num_sms


@triton.jit
def _bwd_kernel(
    dx_ptr,
    partial_ptr,  # (2, programs, N)
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_N)
    weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0)[None, :]
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in tl.range(pid, tl.cdiv(M, BLOCK_M), programs):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        offsets = rows[:, None] * N + cols[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        x_hat = tl.where(inside, (x - mean) * rstd, 0.0)
        g = dy * weight
        along = (tl.sum(g * x_hat, axis=1) / N)[:, None]
        tl.store(dx_ptr + offsets, (g - (tl.sum(g, axis=1) / N)[:, None] - x_hat * along) * rstd, mask=inside)
        dweight += dy * x_hat
        dbias += dy
    tl.store(partial_ptr + pid * N + cols, tl.sum(dweight, axis=0), mask=cols < N)
    tl.store(partial_ptr + (programs + pid) * N + cols, tl.sum(dbias, axis=0), mask=cols < N)


@triton.jit
def _column_sum_kernel(sums_ptr, partial_ptr, programs, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    which = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, programs, BLOCK_M):
        lines = start + tl.arange(0, BLOCK_M)
        inside = (lines < programs)[:, None] & (cols < N)[None, :]
        offsets = (which * programs + lines)[:, None] * N + cols[None, :]
        sums += tl.load(partial_ptr + offsets, mask=inside, other=0.0)
    tl.store(sums_ptr + which * N + cols, tl.sum(sums, axis=0), mask=cols < N)


def layer_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    M, N = x.shape
    BLOCK_N = triton.next_power_of_2(N)
    BLOCK_M = max(1, 2048 // BLOCK_N)
    programs = min(triton.cdiv(M, BLOCK_M), 2 * num_sms(x.device))
    dx, partial, sums = torch.empty_like(x), x.new_empty(2, programs, N), x.new_empty(2, N)
    blocks = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": 8}
    _bwd_kernel[(programs,)](dx, partial, dy, x, weight, mean, rstd, M, N, **blocks)
    _column_sum_kernel[(triton.cdiv(N, 32), 2)](sums, partial, programs, N, BLOCK_M=32, BLOCK_N=32, num_warps=4)
    return dx, sums[0], sums[1]
