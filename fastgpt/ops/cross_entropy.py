from __future__ import annotations

from torch import Tensor

from fastgpt import dispatch
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
    return dispatch.run("cross_entropy", backend, logits, targets, ignore_index)
