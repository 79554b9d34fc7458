from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.dispatch import Kernels
from fastgpt.ops.backward import apply, first_derivative
from fastgpt.ops.checks import check_flag, check_number, check_tensor


def softmax(x: Tensor, *, scale: float = 1.0, is_causal: bool = False, backend: str | None = None) -> Tensor:
    """softmax(``scale`` * ``x``) over the last dimension, with an optional causal mask, in one pass.

    Args:
        x: (..., N), fp32, fp16 or bf16 (float64 on the reference); with ``is_causal`` (..., Tq, Tk).
        scale: factor applied before the exponential.
        is_causal: row i of the last two dimensions sees columns up to i + Tk - Tq (aligned at the bottom right); a row
            that sees none gives 0.
        backend: "reference", "torch", "triton", "cpp" or "cuda"; None asks ``fastgpt.dispatch``.
    Returns:
        The shape and dtype of ``x``; sums are fp32; gradients flow to ``x``.
    Raises:
        TypeError: an argument that is not a tensor or number.
        ValueError: a wrong shape or dtype, or a backend that cannot run it, with the reason.
    """
    check_tensor("softmax", "x", x)
    check_flag("softmax", "is_causal", is_causal)
    if is_causal and x.dim() < 2:
        raise ValueError(f"softmax: x must be (..., Tq, Tk) with is_causal, got shape {tuple(x.shape)}")
    check_number("softmax", "scale", scale)
    return dispatch.run("softmax", backend, x, scale, is_causal, on_kernels=partial(apply, _Softmax))


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, scale: float, is_causal: bool) -> Tensor:
        y = kernels.fwd(x, scale, is_causal)
        ctx.save_for_backward(y)
        ctx.kernels, ctx.options = kernels, (scale, is_causal)
        return y

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (y,) = ctx.saved_tensors
        return None, ctx.kernels.bwd(grads[0], y, *ctx.options), None, None
