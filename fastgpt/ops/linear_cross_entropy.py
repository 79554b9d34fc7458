from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.dispatch import Kernels
from fastgpt.ops.autocast import as_autocast
from fastgpt.ops.backward import apply, first_derivative
from fastgpt.ops.checks import check_like, check_targets, check_tensor


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, backend: str | None = None
) -> Tensor:
    """``cross_entropy(x @ weight.T, targets)`` without the full (M, V) logits: a language model's last layer and loss.

    Only the reference makes all logits at once. Under autocast, x and weight are cast as ``F.linear`` casts them.

    Args:
        x: (M, C), fp32, fp16 or bf16 (float64 on the reference).
        weight: (V, C), in ``x``'s dtype, on its device.
        targets: (M,), int64, in [0, V) or ``ignore_index``, on ``x``'s device.
        ignore_index: target that counts neither in the loss nor in its mean.
        backend: "reference", "torch", "triton", "cpp" or "cuda"; None asks ``fastgpt.dispatch``.
    Returns:
        A scalar in fp32, NaN where no target counts; gradients flow to x and weight.
    Raises:
        TypeError: an argument that is not a tensor or int.
        ValueError: a wrong shape, dtype or device, a target out of range (looked at on a CPU, outside of
            torch.compile), or a backend that cannot run it, with the reason.
    """
    op = "linear_cross_entropy"
    check_tensor(op, "x", x, rank=2)
    check_tensor(op, "weight", weight, rank=2)
    x, weight = as_autocast(x), as_autocast(weight)
    check_like(op, "weight", weight, x, "x", (weight.shape[0], x.shape[1]))
    check_targets(op, targets, x, "x", weight.shape[0], ignore_index)
    return dispatch.run(op, backend, x, weight, targets, ignore_index, on_kernels=_linear_cross_entropy_on_kernels)


def _linear_cross_entropy_on_kernels(
    kernels: Kernels, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> Tensor:
    with_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return apply(_LinearCrossEntropy, kernels, x, weight, targets, ignore_index, with_gradient)


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward makes the gradients of the sum of losses beside it, so that no logits are kept or made twice."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_gradient: bool
    ) -> Tensor:
        loss, inverse_count, dx, dweight = kernels.fwd(x, weight, targets, ignore_index, with_gradient)
        ctx.save_for_backward(inverse_count, dx, dweight)
        ctx.dtype = x.dtype
        return loss

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inverse_count, dx, dweight = ctx.saved_tensors
        # Where no target counts, 1 / count is infinite, the loss NaN and every gradient 0. Multiplied in fp32: a GPU
        # would round the factor to the dtype of dx first.
        factor = torch.where(inverse_count.isinf(), 0.0, grads[0] * inverse_count)
        return None, (dx.float() * factor).to(ctx.dtype), (dweight * factor).to(ctx.dtype), None, None, None
