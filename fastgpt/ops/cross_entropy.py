from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.dispatch import Kernels
from fastgpt.ops.backward import apply, first_derivative
from fastgpt.ops.checks import check_targets, check_tensor


def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, backend: str | None = None) -> Tensor:
    """Mean of -log softmax(``logits``)[target] over the targets that are not ``ignore_index``.

    Args:
        logits: (M, V), fp32, fp16 or bf16 (float64 on the reference); never changed.
        targets: (M,), int64, in [0, V) or ``ignore_index``, on the logits' device.
        ignore_index: target that counts neither in the loss nor in its mean.
        backend: "reference", "torch", "triton", "cpp" or "cuda"; None asks ``fastgpt.dispatch``.
    Returns:
        A scalar in fp32, NaN where no target counts; gradients flow to the logits.
    Raises:
        TypeError: an argument that is not a tensor or int.
        ValueError: a wrong shape, dtype or device, a target out of range (looked at on a CPU, outside of
            torch.compile), or a backend that cannot run it, with the reason.
    """
    check_tensor("cross_entropy", "logits", logits, rank=2)
    check_targets("cross_entropy", targets, logits, "logits", logits.shape[1], ignore_index)
    return dispatch.run("cross_entropy", backend, logits, targets, ignore_index, on_kernels=_cross_entropy_on_kernels)


def _cross_entropy_on_kernels(kernels: Kernels, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    # The forward writes the gradient in its own pass where there will be a backward. Not in fp16, which the division by
    # the count might take below its smallest normal number before a scaler's factor comes; and not for a compiler,
    # which cannot follow a gradient that is handed out once.
    at_once = torch.is_grad_enabled() and logits.requires_grad and logits.dtype != torch.float16
    at_once = at_once and not torch.compiler.is_compiling()
    return apply(_CrossEntropy, kernels, logits, targets, ignore_index, at_once)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, logits: Tensor, targets: Tensor, ignore_index: int, at_once: bool
    ) -> Tensor:
        loss, stats, inverse_count, dlogits = kernels.fwd(logits, targets, ignore_index, at_once)
        ctx.save_for_backward(logits, targets, stats, inverse_count)
        ctx.kernels, ctx.ignore_index = kernels, ignore_index
        ctx.dlogits = dlogits if at_once else None
        return loss

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if ctx.dlogits is not None:
            # Handed out once: whoever gets it may change it, and a second backward makes another.
            dlogits, ctx.dlogits = ctx.dlogits, None
            ctx.kernels.scale_(dlogits, grads[0])
        else:
            logits, targets, stats, inverse_count = ctx.saved_tensors
            dlogits = ctx.kernels.bwd(grads[0], logits, targets, ctx.ignore_index, stats, inverse_count)
        return None, dlogits, None, None, None
