"""Layer norm with mean and variance from one pass.

The tempting way is to sum x and x * x, and to take the variance as the difference of two means. Where the mean is
large beside the spread, that difference of two nearly equal numbers has no digits left. Welford's way has: each lane
keeps a mean and a sum of squared distances from it, and moves both with every element; at the end the lanes'
distances from the mean of all are added (Welford, "Note on a method for calculating corrected sums of squares and
products", 1962; Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
1979).

Moves: 8 bytes of x and 8 of weight and bias read, 4 written an element.

Last rung: it read the row three times, because the squares waited for the mean.

Gains: one of five reads.

Promise: load bytes == 0.8 x 01_three_passes
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
    counts = tl.zeros((BLOCK_N,), tl.float32)
    means = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = cols < N
        x = tl.load(x_ptr + cols, mask=inside, other=0.0)
        counts += inside.to(tl.float32)
        before = tl.where(inside, x - means, 0.0)
        means += before / tl.maximum(counts, 1.0)
        squares += before * (x - means)
    # Distances from the first lane's mean, which is near all others: their sum keeps its digits.
    near = tl.sum(tl.where(tl.arange(0, BLOCK_N) == 0, means, 0.0), axis=0)
    mean = near + tl.sum(counts * (means - near), axis=0) / N
    apart = means - mean
    rstd = tl.rsqrt(tl.sum(squares + counts * apart * apart, axis=0) / N + eps)
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
