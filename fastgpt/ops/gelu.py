from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.dispatch import Kernels
from fastgpt.ops.backward import apply, first_derivative
from fastgpt.ops.checks import check_parameter, check_tensor


def gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none", backend: str | None = None) -> Tensor:
    """GELU of ``x + bias`` in one pass (Hendrycks and Gimpel, 2016).

    Args:
        x: (..., N), fp32, fp16 or bf16 (float64 on the reference).
        bias: (N,), on ``x``'s device, in its dtype, or fp32 beside half precision; may be None.
        approximate: "none" for x * Phi(x), "tanh" for the approximation that GPT-2 was trained with.
        backend: "reference", "torch", "triton", "cpp" or "cuda"; None asks ``fastgpt.dispatch``.
    Returns:
        (..., N) in ``x.dtype``; gradients flow to x and bias.
    Raises:
        TypeError: an argument that is not a tensor.
        ValueError: a wrong shape, dtype, device or ``approximate``, or a backend that cannot run it, with the reason.
    """
    check_tensor("gelu", "x", x)
    if bias is not None:
        check_parameter("gelu", "bias", bias, x, "x", x.shape[-1:])
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return dispatch.run("gelu", backend, x, bias, approximate, on_kernels=partial(apply, _GELU))


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.kernels, ctx.approximate = kernels, approximate
        return kernels.fwd(x, bias, approximate)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, bias = ctx.saved_tensors
        dx, dbias = ctx.kernels.bwd(grads[0], x, bias, ctx.approximate)
        return None, dx, None if bias is None else dbias, None
