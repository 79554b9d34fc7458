"""cross_entropy(x @ weight.T, targets) without the full (M, V) logits: a language model's last layer and its loss.

The rows go through in chunks. Each chunk's logits are made by a matrix product (cuBLAS), turned in place into their own
gradient by one pass of ``cross_entropy``'s kernel while they are hot, and used up at once by the two matrix products
that make dx and dweight. So the logits are made once, a chunk of them is all there ever is, and the backward has only
to multiply two finished gradients by a scalar.

What moves, for M rows, C columns, V classes and elements of s bytes: 3 M V s for the logits (written, read,
overwritten) and 2 M V s to read their gradient twice, out of L2 as far as that holds a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.triton_kernels.cross_entropy import loss_and_gradient

# Logits of one chunk: 256 MiB in half precision, 2668 rows of GPT-2's vocabulary. Fewer, larger matrix products keep
# the tensor cores busy and add dweight up less often.
LOGITS_AT_ONCE = 1 << 27


def linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean loss, 1 / count, and the gradients of the sum of losses: dx in x's dtype, dweight in fp32.

    The gradients are left undivided: times 1 / count they might fall below fp16's smallest normal number. They have no
    elements unless they are wanted.
    """
    M, V = x.shape[0], weight.shape[0]
    inverse_count = 1.0 / (targets != ignore_index).sum(dtype=torch.float32)
    dx = torch.empty(x.shape if with_gradient else (0, x.shape[1]), dtype=x.dtype, device=x.device)
    dweight = torch.zeros(weight.shape if with_gradient else (0, x.shape[1]), dtype=torch.float32, device=weight.device)
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    # In sixteens: where targets lie in memory then makes all chunks alike, and the loss's kernel compiles once.
    rows = max(16, LOGITS_AT_ONCE // V // 16 * 16)
    for start in range(0, M, rows):
        chunk = slice(start, start + rows)
        logits = x[chunk] @ weight.mT  # (rows, V): ours alone, so its gradient may take its place
        losses, _ = loss_and_gradient(logits, targets[chunk], ignore_index, logits if with_gradient else None, None)
        total = total + losses.sum()
        if not with_gradient:
            continue
        dlogits = logits
        torch.mm(dlogits, weight, out=dx[chunk])
        if x.dtype == torch.float16:
            # Shrunk by a power of two, so that a sum over all rows of the chunk stays within fp16.
            shrink = 2.0 ** -len(dlogits).bit_length()
            dweight += (dlogits.mT @ (x[chunk] * shrink)).float() / shrink
        else:
            dweight += dlogits.mT @ x[chunk]
    return total * inverse_count, inverse_count, dx, dweight


if __name__ == "__main__":
    from fastgpt import reference
    from fastgpt.triton_kernels.selfcheck import check, gradients, sample, start

    M, C, V = start(small=(20, 16, 65), large=(4096, 768, 50304))
    x, weight = sample(M, C), sample(V, C) / C**0.5
    targets = torch.randint(V, (M,), device=x.device)

    def run() -> list[Tensor]:
        loss, inverse_count, dx, dweight = linear_cross_entropy_fwd(x, weight, targets, -100, True)
        return [loss, dx.float() * inverse_count, dweight * inverse_count]

    def truth(x: Tensor, weight: Tensor) -> Tensor:
        return reference.linear_cross_entropy(x, weight, targets, -100)

    one = torch.ones((), device=x.device)
    dx_and_dweight = gradients(truth, [x, weight], [one])
    check(
        "linear_cross_entropy_fwd",
        run,
        lambda: [truth(x.double(), weight.double()), *dx_and_dweight()],
        moved=5 * M * V * x.element_size(),
        operations=6 * M * V * C,
    )
