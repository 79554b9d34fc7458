"""Softmax, the row cut into a piece for each lane.

A program has one row, and each of its 128 lanes a piece of it that lies side by side, as one would share a row out
among the cores of a CPU. All lanes walk along their pieces together: for the maximum, for the sum of exponentials,
and to write the result.

Moves: 12 bytes read and 4 written an element are asked for. But the 128 numbers of a load lie a piece apart from each
other, and memory moves sectors of 32 bytes: in a row of 1024, each number brings seven along that nobody wants yet.

Last rung: there is none.

Gains: it is right, whatever the length of a row.

Promise: load bytes == 196608
Promise: load sectors == 49152
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _softmax_kernel(y_ptr, x_ptr, N, LANES: tl.constexpr):
    row = tl.program_id(0)
    x_ptr += row * N
    y_ptr += row * N
    piece = tl.cdiv(N, LANES)
    first = tl.arange(0, LANES) * piece
    # Each lane keeps a maximum and a sum of its own; the lanes meet once, at the end of a pass.
    maxima = tl.full((LANES,), float("-inf"), tl.float32)
    for i in tl.range(piece):
        maxima = tl.maximum(maxima, tl.load(x_ptr + first + i, mask=first + i < N, other=float("-inf")))
    largest = tl.max(maxima, axis=0)
    sums = tl.zeros((LANES,), tl.float32)
    for i in tl.range(piece):
        sums += tl.exp(tl.load(x_ptr + first + i, mask=first + i < N, other=float("-inf")) - largest)
    total = tl.sum(sums, axis=0)
    for i in tl.range(piece):
        x = tl.load(x_ptr + first + i, mask=first + i < N, other=float("-inf"))
        tl.store(y_ptr + first + i, tl.exp(x - largest) / total, mask=first + i < N)


def softmax(x: Tensor) -> Tensor:
    M, N = x.shape
    y = torch.empty_like(x)
    _softmax_kernel[(M,)](y, x, N, LANES=128, num_warps=4)
    return y
