"""Every op of a kernel backend once, on small odd shapes: what the sanitizer and the tests of the kernels call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.benchmarks.cases import as_tuple


def small_calls(
    device: torch.device | str, dtype: torch.dtype = torch.bfloat16, batch: int = 2, backend: str = "triton"
) -> dict[str, Callable[[], list[Tensor]]]:
    """Every op on a kernel backend, forward and backward, on small odd shapes: {name: a call}.

    A call returns all that the op has computed, from inputs, upstream gradients and dropout seeds that stay the same.
    ``batch`` changes only how many rows or sequences there are.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # the same inputs on every device
    seed = torch.tensor([-0x123456789ABCDEF], device=device)

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, device="cpu") + 0.5).to(device, dtype).requires_grad_()

    def classes(count: int, rows: int) -> Tensor:
        return torch.randint(count, (rows,), generator=generator, device="cpu").to(device)

    def of(op: Callable[..., Any], *leaves: Tensor, **options: Any) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            outputs = as_tuple(op(*leaves, **options, backend=backend))
            upstream = [y.detach().cos() for y in outputs]
            return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]

        return run

    def lists(count: int) -> list[list[Tensor]]:
        shapes = [(5,), (7, 9), (515, 3), (2049,), (97, 301)]
        return [[leaf(*shape, dtype=torch.float32).detach() for shape in shapes] for _ in range(count)]

    def adamw() -> list[Tensor]:
        params, grads, exp_avgs, exp_avg_sqs = ([x.clone() for x in tensors] for tensors in moments)
        scalars = torch.ones((), device=device), torch.full((), 1e-2, device=device)
        options: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        ops.adamw_(params, grads, exp_avgs, exp_avg_sqs, scalars[0], lr=scalars[1], **options, backend=backend)
        return [*params, *exp_avgs, *exp_avg_sqs]

    def clip() -> list[Tensor]:
        grads = [x.clone() for x in moments[1]]
        return [ops.clip_grad_norm_(grads, 0.5, backend=backend), *grads]

    moments = lists(4)
    moments[3] = [x.square() for x in moments[3]]
    seqlens = torch.arange(batch, dtype=torch.int32, device=device) % 3 * 20 + 7
    rows, N = 33 * batch, 515
    return {
        "attention": of(
            ops.attention, *(leaf(batch, 2, 67, 40) for _ in "qkv"), dropout_p=0.2, seqlens_k=seqlens, seed=seed
        ),
        "attention, not causal": of(ops.attention, *(leaf(batch, 2, 67, 64) for _ in "qkv"), is_causal=False),
        "attention_qkvpacked": of(ops.attention_qkvpacked, leaf(batch, 67, 3, 2, 64)),
        "softmax": of(ops.softmax, leaf(batch, 33, 65), scale=0.3, is_causal=True),
        "softmax, long rows": of(ops.softmax, leaf(batch, 40001)),
        "layer_norm": of(ops.layer_norm, leaf(rows, N), leaf(N), leaf(N)),
        "layer_norm, long rows": of(ops.layer_norm, leaf(batch, 20001), leaf(20001), leaf(20001)),
        "add_layer_norm": of(
            ops.add_layer_norm, leaf(rows, N), leaf(rows, N), leaf(N), leaf(N), dropout_p=0.2, seed=seed
        ),
        "gelu": of(ops.gelu, leaf(rows, N), leaf(N), approximate="tanh"),
        "cross_entropy": of(functools.partial(ops.cross_entropy, targets=classes(N, rows)), leaf(rows, N)),
        "cross_entropy, long rows": of(
            functools.partial(ops.cross_entropy, targets=classes(20001, batch)), leaf(batch, 20001)
        ),
        # In fp16 the gradient is made in the backward, from a second reading.
        "cross_entropy, fp16": of(
            functools.partial(ops.cross_entropy, targets=classes(N, rows)), leaf(rows, N, dtype=torch.float16)
        ),
        "linear_cross_entropy": of(
            functools.partial(ops.linear_cross_entropy, targets=classes(N, rows)), leaf(rows, 64), leaf(N, 64)
        ),
        "dropout": of(ops.dropout, leaf(rows, N), p=0.2, seed=seed),
        "adamw_": adamw,
        "clip_grad_norm_": clip,
    }
