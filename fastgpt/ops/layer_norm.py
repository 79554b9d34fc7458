from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.dispatch import Kernels
from fastgpt.ops.backward import apply, first_derivative
from fastgpt.ops.checks import check_norm


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, backend: str | None = None
) -> Tensor:
    """Normalise ``x`` over its last dimension, then scale and shift (Ba et al., 2016, eq. 4).

    Args:
        x: (..., N), fp32, fp16 or bf16 (float64 on the reference).
        weight, bias: (N,), on ``x``'s device, in its dtype, or fp32 beside half precision; ``bias`` may be None.
        eps: added to the variance before the square root.
        backend: "reference", "torch", "triton", "cpp" or "cuda"; None asks ``fastgpt.dispatch``.
    Returns:
        (..., N) in ``x.dtype``; sums are fp32; gradients flow to x, weight and bias.
    Raises:
        TypeError: an argument that is not a tensor or number.
        ValueError: a wrong shape, dtype or device, or a backend that cannot run it, with the reason.
    """
    check_norm("layer_norm", x, weight, bias, eps)
    return dispatch.run("layer_norm", backend, x, weight, bias, eps, on_kernels=partial(apply, _LayerNorm))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = kernels.fwd(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.kernels, ctx.has_bias = kernels, bias is not None
        return y

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        dx, dweight, dbias = ctx.kernels.bwd(grads[0], *ctx.saved_tensors)
        return None, dx, dweight, dbias if ctx.has_bias else None, None
