"""Kernels broken on purpose: for each fault, the tests named beside it go red.

The package is put together anew in a folder of links, in which one file is changed; the tests run against that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.full


@dataclass(frozen=True)
class Mutant:
    """``file`` of triton_kernels with ``old`` replaced by ``new``, and the tests (a file and a -k) that must fail."""

    fault: str
    file: str
    old: str
    new: str
    tests: str
    select: str = "obeys"


MUTANTS = [
    Mutant(
        "the causal mask is dropped",
        "attention",
        "seen = seen & (offs_n[None, :] <= (offs_m + shift)[:, None])",
        "pass",
        "attention",
    ),
    Mutant(
        "softmax's causal mask is dropped",
        "softmax",
        "visible = visible & (offs_n[None, :] <= (offs_m % Tq + N - Tq)[:, None])",
        "pass",
        "softmax",
    ),
    Mutant(
        "dk and dv are swapped",
        "attention",
        "dk, dv, *inputs, *dk.stride()[:3], *dv.stride()[:3]",
        "dv, dk, *inputs, *dv.stride()[:3], *dk.stride()[:3]",
        "attention",
    ),
    Mutant(
        "the last partial tile of keys is skipped in the forward",
        "attention",
        "    blind = l_i == 0.0\n",
        "    blind = (l_i == 0.0) | (valid % BLOCK_N != 0)\n",
        "attention",
    ),
    Mutant(
        "the last partial tile of keys is skipped for dq",
        "attention",
        "        dq = _bwd_dq_tiles(\n            dq,\n",
        "        end = end // BLOCK_N * BLOCK_N\n        dq = _bwd_dq_tiles(\n            dq,\n",
        "attention",
    ),
    Mutant(
        "the last partial tile of rows is skipped",
        "layer_norm",
        'kernel[(cdiv(M, blocks["BLOCK_M"]),)](y, mean',
        'kernel[(M // blocks["BLOCK_M"],)](y, mean',
        "layer_norm",
    ),
    Mutant(
        "the output is not rescaled when the maximum grows",
        "attention",
        "acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None]",
        "acc = tl.dot(p.to(v.dtype), v, acc",
        "attention",
    ),
    Mutant(
        "delta is left out of ds",
        "attention",
        "ds = p * (dp - delta[:, None])",
        "ds = p * dp",
        "attention",
    ),
    Mutant(
        "rstd is kept in the input's dtype",
        "layer_norm",
        "    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)",
        "    tl.store(rstd_ptr + offs_m, rstd.to(x_ptr.dtype.element_ty).to(tl.float32), mask=mask_m)",
        "layer_norm",
    ),
    Mutant(
        "rstd is kept in the input's dtype where a residual is added",
        "add_layer_norm",
        "    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)",
        "    tl.store(rstd_ptr + offs_m, rstd.to(x_ptr.dtype.element_ty).to(tl.float32), mask=mask_m)",
        "add_layer_norm",
    ),
    Mutant(
        "Philox's counter is shifted by one",
        "philox",
        "n = (rows[:, None] * N + start_n) // 4 + tl.arange",
        "n = (rows[:, None] * N + start_n) // 4 + 1 + tl.arange",
        "dropout",
    ),
    Mutant(
        "Philox's counter is shifted by one where a residual is added",
        "philox",
        "n = (rows[:, None] * N + start_n) // 4 + tl.arange",
        "n = (rows[:, None] * N + start_n) // 4 + 1 + tl.arange",
        "add_layer_norm",
    ),
    Mutant(
        "attention's Philox counter is shifted by one",
        "attention",
        "quads = ((start_n + tl.arange(0, BLOCK_N // 4) * 4) // 4)",
        "quads = ((start_n + tl.arange(0, BLOCK_N // 4) * 4) // 4 + 1)",
        "attention",
        "dropout",
    ),
    Mutant(
        "one line of the partial sums is left out",
        "column_sum",
        "inside = (line < programs)[:, None]",
        "inside = (line < programs - 1)[:, None]",
        "layer_norm",
    ),
    Mutant(
        "the residual stream's gradient is left out",
        "add_layer_norm",
        "if dresidual_out_ptr is not None:",
        "if dresidual_out_ptr is None:",
        "add_layer_norm",
    ),
    Mutant(
        "ignored targets have a gradient",
        "cross_entropy",
        "scale = tl.where(counted, scale, 0.0)",
        "scale = tl.where(counted, scale, scale)",
        "cross_entropy",
    ),
    Mutant(
        "GELU's derivative forgets the density",
        "gelu",
        "+ z * density",
        "",
        "gelu",
    ),
    Mutant(
        "AdamW corrects both means alike",
        "adamw",
        "correction2 = _correction(step, log_beta2_high, log_beta2_low)",
        "correction2 = _correction(step, log_beta1_high, log_beta1_low)",
        "adamw",
    ),
    Mutant(
        "AdamW leaves out the last partial block",
        "adamw",
        "offsets < size,",
        "offsets < 0,",
        "adamw",
    ),
    Mutant(
        "the norm counts the last block alone",
        "clip_grad_norm",
        "sums += grad * grad",
        "sums = grad * grad",
        "clip_grad_norm",
        "triton",
    ),
]


def run_tests(tree: Path, tests: str, select: str) -> int:
    """pytest's exit code: 0 if all passed, 1 if some failed, other values if it could not run."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests" / f"test_{tests}.py"), "-k", f"triton and {select}"]
    # Not in the checkout, whose own fastgpt would be found before the tree.
    return subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True).returncode


def package_of_links(folder: Path) -> Path:
    """``folder``/fastgpt as it is installed, of links to this checkout's files."""
    package = folder / "fastgpt"
    package.mkdir(parents=True)
    for path in (ROOT / "fastgpt").iterdir():
        (package / path.name).symlink_to(path)
    (package / "benchmarks").symlink_to(ROOT / "benchmarks")
    (package / "triton_kernels").mkdir()
    for path in (ROOT / "triton_kernels").glob("*.py"):
        (package / "triton_kernels" / path.name).symlink_to(path)
    return package


def test_the_unchanged_package_passes(tmp_path: Path) -> None:
    package_of_links(tmp_path)
    assert run_tests(tmp_path, "layer_norm", "obeys") == 0


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_a_mutant_is_found(mutant: Mutant, tmp_path: Path) -> None:
    file = package_of_links(tmp_path) / "triton_kernels" / f"{mutant.file}.py"
    source = file.read_text()
    assert mutant.old in source, "the kernel has changed: write the mutant anew"
    file.unlink()
    file.write_text(source.replace(mutant.old, mutant.new))
    assert run_tests(tmp_path, mutant.tests, mutant.select) == 1
