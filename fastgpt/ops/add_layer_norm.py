from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.dispatch import Kernels
from fastgpt.ops.backward import apply, first_derivative
from fastgpt.ops.checks import check_device, check_dropout, check_norm, check_tensor
from fastgpt.ops.seed import seed_for


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add ``dropout(x)`` to the residual stream and normalise the sum: what stands between two sublayers of a GPT.

    Args:
        x: (..., N), a sublayer's output, fp32, fp16 or bf16 (float64 on the reference).
        residual: the shape and device of ``x``; its dtype may differ (fp32 beside half-precision ``x``).
        weight, bias: (N,), on ``x``'s device, in its dtype, or fp32 beside half precision; ``bias`` may be None.
        dropout_p: probability that an element of ``x`` is dropped, in [0, 1).
        eps: added to the variance before the square root.
        seed: int64 tensor of one element that determines the mask; None draws one from the device's default generator.
        backend: "reference", "torch", "triton", "cpp" or "cuda"; None asks ``fastgpt.dispatch``.
    Returns:
        y, (..., N) in ``x.dtype``: ``layer_norm(residual_out, weight, bias, eps)``.
        residual_out, (..., N) in the promoted dtype of x and residual: ``dropout(x) + residual``.
        Gradients flow to x, residual, weight and bias.
    Raises:
        TypeError: an argument that is not a tensor or number.
        ValueError: a wrong shape, dtype or device, ``dropout_p`` outside [0, 1), or a backend that cannot run it.
    """
    check_norm("add_layer_norm", x, weight, bias, eps)
    check_tensor("add_layer_norm", "residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"add_layer_norm: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    check_device("add_layer_norm", "residual", residual, x, "x")
    if (residual.dtype == torch.float64) != (x.dtype == torch.float64):
        raise ValueError(f"add_layer_norm: residual must not mix float64 with x's {x.dtype}, got {residual.dtype}")
    check_dropout("add_layer_norm", dropout_p, seed, x)
    seed = seed_for(dropout_p, seed, x.device)
    args = (x, residual, weight, bias, dropout_p, eps, seed)
    return dispatch.run("add_layer_norm", backend, *args, on_kernels=partial(apply, _AddLayerNorm))


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dropout_p: float,
        eps: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, residual_out, mean, rstd = kernels.fwd(x, residual, weight, bias, dropout_p, eps, seed)
        ctx.save_for_backward(residual_out, weight, mean, rstd, seed)
        ctx.set_materialize_grads(False)  # the last norm of a model ends the stream: no zeros need be read for it
        ctx.kernels, ctx.dropout_p, ctx.has_bias = kernels, dropout_p, bias is not None
        ctx.dtypes = (x.dtype, residual.dtype)
        return y, residual_out

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        residual_out, weight, mean, rstd, seed = ctx.saved_tensors
        dy, dresidual_out = grads
        if dy is None:
            dy = torch.zeros_like(residual_out, dtype=ctx.dtypes[0])
        dx, dresidual, dweight, dbias = ctx.kernels.bwd(
            dy, dresidual_out, residual_out, weight, mean, rstd, ctx.dropout_p, seed, *ctx.dtypes
        )
        if seed is None and ctx.dtypes[0] == ctx.dtypes[1]:
            dx = dresidual  # the one gradient is both
        return None, dx, dresidual, dweight, dbias if ctx.has_bias else None, None, None, None
