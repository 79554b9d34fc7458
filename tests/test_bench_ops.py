"""`pytest benchmarks`: what pytest-benchmark writes of the cases, and compares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.full
def test_runs_are_written_and_compared(tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        chosen = ["-k", "gelu and tanh and (torch or triton or cuda)", "-p", "no:cacheprovider"]
        storage = f"--benchmark-storage=file://{tmp_path}"
        command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), *chosen, storage, *options]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        environment.pop("PYTEST_XDIST_WORKER", None)  # in whose processes pytest-benchmark times nothing
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    first = run("--benchmark-save=first", "-rs")
    assert first.returncode == 0, first.stdout
    assert "it runs in Triton's interpreter, whose time says nothing of the kernel's" in first.stdout
    (path,) = tmp_path.rglob("*first.json")
    timed = {row["name"]: row for row in json.loads(path.read_text())["benchmarks"]}
    parts = {name.rpartition(", ")[2] for name in timed}
    assert parts == {f"{part}-{name}]" for part in ("forward", "backward") for name in ("torch", "torch eager")}
    for row in timed.values():
        assert row["stats"]["median"] > 0
        assert row["extra_info"]["relative_error"] < 1e-5
    second = run("--benchmark-compare=0001", "--benchmark-compare-fail=median:100000%")
    assert second.returncode == 0, second.stdout
    assert "NOW" in second.stdout
