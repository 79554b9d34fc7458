"""Calls of every op of the cuda backend, forward and backward, that reach every kernel and every barrier in them.

For tests that run the kernels in the emulator many times over: small, but of several blocks, warps and tiles each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from error_rule import sample
from torch import Tensor

from fastgpt import ops

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

Case = Callable[[], list[Tensor]]


def cases() -> dict[str, Case]:
    """By a name that begins with the op's; what a case returns is new each time, and should be the same bits."""
    torch.manual_seed(0)
    drop = {"dropout_p": 0.2, "seed": torch.tensor([7])}
    seqlens_k = torch.tensor([70, 33, 0], dtype=torch.int32)  # the last one's queries see nothing
    return {
        "attention in fp32": both_ways(ops.attention, *heads(F32, 3, 1, 70, 24), seqlens_k=seqlens_k, **drop),
        "attention in bf16": both_ways(ops.attention, *heads(BF16, 3, 1, 150, 64), seqlens_k=seqlens_k, **drop),
        "attention in fp16, wide heads": both_ways(ops.attention, *heads(F16, 1, 1, 140, 256), is_causal=False),
        "attention in bf16, heads of 96": both_ways(ops.attention, *heads(BF16, 1, 1, 200, 96)),
        "attention in Hopper's instructions": on_hopper(
            both_ways(ops.attention, *heads(BF16, 1, 1, 400, 64), is_causal=False)
        ),
        "attention in Hopper's instructions, heads of 128": on_hopper(
            both_ways(ops.attention, *heads(F16, 1, 1, 390, 128), **drop)
        ),
        "attention_qkvpacked": both_ways(ops.attention_qkvpacked, sample(1, 130, 3, 2, 32, dtype=F16), **drop),
        "softmax": both_ways(ops.softmax, sample(2, 60, 50), is_causal=True),
        "softmax, rows of several warps": both_ways(ops.softmax, sample(3, 2049, dtype=BF16)),
        "softmax, rows that are read again": both_ways(ops.softmax, sample(2, 9001, dtype=F16)),
        "layer_norm": both_ways(ops.layer_norm, sample(100, 130), sample(130), sample(130)),
        "layer_norm, rows of several warps": both_ways(
            ops.layer_norm, sample(11, 2049, dtype=BF16), sample(2049), sample(2049)
        ),
        "layer_norm, rows that are read again": both_ways(ops.layer_norm, *(sample(*s) for s in ((9, 4500), (4500,)))),
        "add_layer_norm": both_ways(
            ops.add_layer_norm, sample(70, 132), sample(70, 132), sample(132), sample(132), **drop
        ),
        "add_layer_norm, an fp32 stream": both_ways(
            ops.add_layer_norm, sample(9, 1031, dtype=BF16), sample(9, 1031), sample(1031, dtype=BF16), **drop
        ),
        "add_layer_norm, rows that are read again": both_ways(
            ops.add_layer_norm, *(sample(2, 8200, dtype=F16) for _ in range(2)), sample(8200, dtype=F16)
        ),
        "gelu": both_ways(ops.gelu, sample(100, 130), sample(130)),
        "gelu by tanh": both_ways(ops.gelu, sample(70, 33, dtype=BF16), sample(33, dtype=BF16), approximate="tanh"),
        "cross_entropy": both_ways(ops.cross_entropy, sample(40, 130), targets=classes(40, 130)),
        "cross_entropy, rows in shared memory": both_ways(
            ops.cross_entropy, sample(3, 9001, dtype=BF16), targets=classes(3, 9001)
        ),
        "cross_entropy, rows that are read again": both_ways(
            ops.cross_entropy, sample(2, 30001), targets=classes(2, 30001)
        ),
        "linear_cross_entropy": both_ways(
            ops.linear_cross_entropy, sample(40, 16), sample(130, 16), targets=classes(40, 130)
        ),
        "dropout": both_ways(ops.dropout, sample(50, 90, dtype=F16), p=0.3, seed=torch.tensor([7])),
        "adamw_": step(F32),
        "adamw_ of half precision": step(BF16),
        "clip_grad_norm_": clip(1.0),
        "clip_grad_norm_ that changes nothing": clip(1e6),
    }


def on_hopper(case: Case) -> Case:
    """With csrc/cuda/attention_fwd_sm90.cu for the forward."""

    def run() -> list[Tensor]:
        with mock.patch.dict(os.environ, FASTGPT_HOPPER_ATTENTION="1"):
            return case()

    return run


def heads(dtype: torch.dtype, *shape: int) -> list[Tensor]:
    return [sample(*shape, dtype=dtype) for _ in range(3)]


def classes(rows: int, count: int) -> Tensor:
    return torch.randint(count, (rows,)).index_fill(0, torch.tensor([1]), -100)


def both_ways(op: Callable[..., Any], *inputs: Tensor, **options: Any) -> Case:
    """Outputs, and the gradients of the inputs."""

    def run() -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = op(*leaves, **options, backend="cuda")
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype) for y in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    return run


# More tensors than one launch takes, of several sizes, some of several blocks.
SIZES = [(3, 8192), (8191,), (8193,), (), (0, 2), (70, 90), *[(5,)] * 160]


def step(dtype: torch.dtype) -> Case:
    params, grads = ([sample(*size, dtype=dtype) for size in SIZES] for _ in range(2))
    means = [[sample(*size).abs() for size in SIZES] for _ in range(2)]

    def run() -> list[Tensor]:
        own = [[x.clone() for x in tensors] for tensors in (params, grads, *means)]
        options = {"lr": torch.tensor(0.1), "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        ops.adamw_(*own, torch.tensor(3.0), **options, backend="cuda")
        return [x for tensors in own for x in tensors]

    return run


def clip(max_norm: float) -> Case:
    grads = [sample(*size, dtype=(F32, BF16)[i % 2]) for i, size in enumerate(SIZES)]

    def run() -> list[Tensor]:
        own = [x.clone() for x in grads]
        return [ops.clip_grad_norm_(own, max_norm, backend="cuda"), *own]

    return run
