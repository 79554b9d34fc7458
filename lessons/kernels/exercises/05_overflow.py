"""Exercise 5: overflow in exp.

Softmax with a program for each row, which holds the whole row and reads it once. It is the formula as it stands in
books, and it is right for the small numbers on which one tries a new kernel. Beyond 88.7 the exponential is larger
than any fp32.

Asked: the same for x of any size, from one read of x.

Hint: softmax(x) = softmax(x - c) for every c that is the same along the row. Which c makes the largest exponent 0?

Goal: load bytes <= 65536
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _softmax_kernel(y_ptr, x_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + row * N + cols, mask=cols < N, other=float("-inf"))
    numerator = tl.exp(x)
    tl.store(y_ptr + row * N + cols, numerator / tl.sum(numerator, axis=0), mask=cols < N)


def softmax(x: Tensor) -> Tensor:
    M, N = x.shape
    y = torch.empty_like(x)
    _softmax_kernel[(M,)](y, x, N, BLOCK_N=triton.next_power_of_2(N))
    return y
