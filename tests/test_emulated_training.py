"""The whole model trains on the CUDA kernels in the emulator, and every op runs its own kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, and is what the cuda backend takes")

COMMAND = """
import json, sys
from fastgpt.cli import main
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
if "cuda" in sys.argv:
    from fastgpt import emulator
    print("LAUNCHES " + json.dumps({name: n.launches for name, n in emulator.load().counters().items()}))
"""

# By op, what its kernels' names begin with.
KERNELS = {
    "attention_qkvpacked": ["attention_fwd", "attention_bwd"],
    "softmax": ["softmax_fwd"],
    "layer_norm": ["layer_norm_fwd", "layer_norm_bwd"],
    "add_layer_norm": ["add_layer_norm_fwd", "add_layer_norm_bwd"],
    "gelu": ["gelu_fwd", "gelu_bwd"],
    "linear_cross_entropy": ["cross_entropy_fwd"],
    "dropout": ["dropout"],
    "adamw_": ["adamw"],
    "clip_grad_norm_": ["clip_grad_norm"],
}


def losses(backend: str, folder: Path) -> tuple[list[float], dict[str, int]]:
    """Training losses of 20 steps by `fastgpt train`, the validation losses, and launches by kernel."""
    run = folder / backend
    arguments = {
        "data": folder / "text.txt", "out": run, "device": "cpu", "n-layer": 2, "n-head": 2, "n-embd": 32,
        "block-size": 16, "dropout": 0.2, "batch-size": 4, "max-iters": 20, "lr": 1e-2, "warmup-iters": 2,
        "eval-interval": 10, "eval-iters": 2, "final-eval-iters": 2, "log-interval": 1, "sample-tokens": 4,
    }  # fmt: skip
    command = [sys.executable, "-c", COMMAND, "train", "--backend", backend]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    launches = [line.removeprefix("LAUNCHES ") for line in done.stdout.splitlines() if line.startswith("LAUNCHES ")]
    return [row["loss"] for row in rows], json.loads(launches[0]) if launches else {}


def test_a_model_trains_as_on_the_reference(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    got, launches = losses("cuda", tmp_path)
    wanted, _ = losses("reference", tmp_path)
    assert len(got) == len(wanted) >= 20
    assert max(abs(g - w) for g, w in zip(got, wanted, strict=True)) < 1e-4
    assert got[-1] < got[0] - 0.3
    for op, kernels in KERNELS.items():
        for kernel in kernels:
            assert any(name.startswith(kernel) and count > 0 for name, count in launches.items()), (
                op,
                kernel,
                launches,
            )
