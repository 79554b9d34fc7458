from __future__ import annotations

from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops.autocast import as_autocast
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
    return dispatch.run(op, backend, x, weight, targets, ignore_index)
