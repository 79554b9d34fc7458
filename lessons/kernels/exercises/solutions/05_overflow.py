"""Exercise 5, solved: overflow in exp.

Answer: The row's maximum is taken off before the exponential. The largest exponent is then 0, the sum between 1 and
N, and what underflows to 0 is too small to show. It takes no further read: the row is at hand.

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
    numerator = tl.exp(x - tl.max(x, axis=0))
    tl.store(y_ptr + row * N + cols, numerator / tl.sum(numerator, axis=0), mask=cols < N)


def softmax(x: Tensor) -> Tensor:
    M, N = x.shape
    y = torch.empty_like(x)
    _softmax_kernel[(M,)](y, x, N, BLOCK_N=triton.next_power_of_2(N))
    return y
