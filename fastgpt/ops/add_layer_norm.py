from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import dispatch
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
    return dispatch.run("add_layer_norm", backend, x, residual, weight, bias, dropout_p, eps, seed)
