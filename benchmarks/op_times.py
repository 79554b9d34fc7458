"""Time each op, forward and backward, on the reference and the torch backend: what dispatch.PREFERRED goes by.

    python -m fastgpt.benchmarks.op_times [--rounds 9] [--dtype fp32]

Shapes are those of a 10.65M model's training step at batch 12: T = 256, C = 384, H = 6, V = 65. The backends take turns
in one process; a figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastgpt import ops
from fastgpt.benchmarks.training_step import describe_machine

B, T, C, H, V = 12, 256, 384, 6, 65
BACKENDS = ("torch", "reference")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases(dtype: torch.dtype) -> dict[str, Callable[[str], Any]]:
    """{op: a call of it on a backend, forward and backward}."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    def with_gradients(op: Callable[..., Any], *args: Any, **settings: Any) -> Callable[[str], None]:
        def call(backend: str) -> None:
            outputs = op(*args, **settings, backend=backend)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

        return call

    targets = torch.randint(V, (B * T,))
    sizes = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (C,)] * 6
    lists = [[torch.rand(size) for size in sizes] for _ in range(4)]
    scalars = torch.ones(()), torch.full((), 1e-3)

    def adamw(backend: str) -> None:
        step, lr = scalars
        ops.adamw_(*lists, step, lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, backend=backend)

    return {
        "attention": with_gradients(ops.attention, *(leaf(B, H, T, C // H) for _ in range(3))),
        "attention, dropout 0.2": with_gradients(
            ops.attention, *(leaf(B, H, T, C // H) for _ in range(3)), dropout_p=0.2
        ),
        "attention_qkvpacked": with_gradients(ops.attention_qkvpacked, leaf(B, T, 3, H, C // H)),
        "softmax, causal": with_gradients(ops.softmax, leaf(B, H, T, T), scale=0.125, is_causal=True),
        "layer_norm": with_gradients(ops.layer_norm, leaf(B, T, C), leaf(C)),
        "add_layer_norm": with_gradients(ops.add_layer_norm, leaf(B, T, C), leaf(B, T, C), leaf(C)),
        "gelu": with_gradients(ops.gelu, leaf(B, T, 4 * C)),
        "gelu with bias, tanh": with_gradients(ops.gelu, leaf(B, T, 4 * C), leaf(4 * C), approximate="tanh"),
        "cross_entropy": with_gradients(ops.cross_entropy, leaf(B * T, V), targets),
        "linear_cross_entropy": with_gradients(ops.linear_cross_entropy, leaf(B * T, C), leaf(V, C), targets),
        "dropout 0.2": with_gradients(ops.dropout, leaf(B, T, C), 0.2),
        "adamw_": adamw,
        "clip_grad_norm_": lambda backend: ops.clip_grad_norm_(lists[1], 1.0, backend=backend),
    }


def main() -> None:
    """Command line: see ``--help``."""
    parser = argparse.ArgumentParser(description="Time each op on the reference and the torch backend.")
    parser.add_argument("--rounds", type=int, default=9, help="default: 9")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default: fp32")
    args = parser.parse_args()
    machine = describe_machine()
    console = Console(width=100, highlight=False)
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores; torch {machine['torch']}, {machine['threads']} threads; "
        f"load average {machine['load_before']:.2f}"
    )
    table = Table("op, forward and backward", title=f"{args.dtype}, medians of {args.rounds} rounds")
    for heading in (*(f"{backend}, ms" for backend in BACKENDS), "reference / torch"):
        table.add_column(heading, justify="right")
    for name, call in cases(DTYPES[args.dtype]).items():
        samples: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
        for number in range(args.rounds + 1):
            for backend in BACKENDS if number % 2 else reversed(BACKENDS):
                start = time.perf_counter()
                call(backend)
                if number:  # the first round warms up
                    samples[backend].append(1e3 * (time.perf_counter() - start))
        torch_ms, reference_ms = (statistics.median(samples[backend]) for backend in BACKENDS)
        table.add_row(name, f"{torch_ms:.2f}", f"{reference_ms:.2f}", f"{reference_ms / torch_ms:.2f}x")
    console.print(table)


if __name__ == "__main__":
    main()
