"""Layer norm as its definition reads: the mean, then the variance, then the result.

A program has one row, and takes 128 elements of it at a time.

Moves: 12 bytes of x and 8 of weight and bias read, 4 written an element.

Last rung: there is none.

Gains: it is right, whatever the length of a row.

Promise: load bytes == 327680
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _layer_norm_kernel(y_ptr, mean_ptr, rstd_ptr, x_ptr, weight_ptr, bias_ptr, N, eps, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    x_ptr += row * N
    y_ptr += row * N
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        sums += tl.load(x_ptr + cols, mask=cols < N, other=0.0)
    mean = tl.sum(sums, axis=0) / N
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        centred = tl.where(cols < N, tl.load(x_ptr + cols, mask=cols < N, other=0.0) - mean, 0.0)
        squares += centred * centred
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / N + eps)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + cols, mask=cols < N, other=0.0)
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0)
        bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0)
        tl.store(y_ptr + cols, (x - mean) * rstd * weight + bias, mask=cols < N)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    M, N = x.shape
    y, mean, rstd = torch.empty_like(x), x.new_empty(M), x.new_empty(M)
    _layer_norm_kernel[(M,)](y, mean, rstd, x, weight, bias, N, eps, BLOCK_N=128, num_warps=4)
    return y, mean, rstd
