"""Triton rungs: run and counted in Triton's interpreter or run on a GPU, and compiled without one.

Triton asks for TRITON_INTERPRET when it decorates a kernel, so that a process either interprets or compiles. Rungs run in
this one; they are compiled in another, which is this file run by itself:

    python -m lessons.kernels.triton_rung 90 lessons/kernels/softmax/05_rows_together.py
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgpt.benchmarks.errors import poisoned_memory
from fastgpt.triton_kernels import launch
from fastgpt.triton_kernels.compiled import SHARED_LIMIT, Compiled, compiling_for
from fastgpt.triton_kernels.library import interpreting
from lessons.kernels.rung import Counts, Execution, Rung, RungError, read_rung
from lessons.kernels.tasks import Problem, Sizes, Task
from lessons.kernels.triton_counters import COUNTERS as INTERPRETED
from lessons.kernels.triton_counters import counting

HOPPER = 90  # what kernels are compiled for, and pick their blocks for, where there is no GPU
ROOT = Path(__file__).parents[2]

COMPILED = {
    "registers": "of a thread, in the kernel that takes the most",
    "spilled bytes": "of a thread, beyond its registers, of all kernels",
    "shared bytes": "of shared memory of a block, in the kernel that takes the most",
    "load width": "bytes that a thread loads from global memory at once, at most",
    "store width": "bytes that a thread stores to global memory at once, at most",
    "loads compiled": "instructions that load from global memory, asynchronous ones too",
    "tensor-core instructions": "mma.sync, wgmma, tcgen05",
    "async copies": "instructions that copy to shared memory while the thread goes on: cp.async",
    "multiplications": "instructions that multiply in fp32, with an addition or without",
}
COUNTERS = (*INTERPRETED, *COMPILED)

_TENSOR_CORE = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
_MULTIPLY = ("mul.f32", "mul.rn.f32", "mul.f32x2", "fma.rn.f32", "fma.rn.f32x2")

# What the compiler made of a rung, by its file, or why it did not.
_compiled: dict[Path, Counts | str] = {}


def counted_sizes(task: Task) -> Sizes:
    """Where a rung's counters are read: few rows, since the interpreter is slow, but rows that are long enough.

    Of attention that means sequences where a causal mask begins to hide whole tiles of 64 or 128 queries.
    """
    return {**task.counted, **({"M": 16} if "M" in task.counted else {"T": 512})}


class Call:
    """A rung's function with the arguments of a problem, ready to be called.

    Raises:
        RungError: the file cannot be loaded.
    """

    def __init__(self, rung: Rung, problem: Problem) -> None:
        self.rung = rung
        self.names = tuple(problem.truth)
        self.arguments = (*problem.inputs.values(), *problem.constants)
        self.function: Callable[..., Tensor | tuple[Tensor, ...]] = getattr(_load(rung.path), rung.task.name)
        self.outputs: dict[str, Tensor] = {}

    def __call__(self) -> None:
        """Launch the kernels and keep what they give.

        Raises:
            RungError: what Python or Triton say of it.
        """
        with _told_of(self.rung.path):
            results = self.function(*self.arguments)
            results = (results,) if isinstance(results, Tensor) else tuple(results)
            if len(results) != len(self.names):
                raise ValueError(f"{self.rung.task.name} has to return {', '.join(self.names)}, not {len(results)} tensors")
        self.outputs = dict(zip(self.names, results, strict=True))


def run(rung: Rung, problem: Problem, *, count: bool = False) -> Execution:
    """Run a rung once, on a GPU or in the interpreter; tensors that it makes start out as NaN.

    Args:
        count: in the interpreter, count what it does.

    Raises:
        RungError: it cannot be loaded or run, or there is neither a GPU nor the interpreter.
    """
    call = Call(rung, problem)
    if not interpreting():
        if not torch.cuda.is_available():
            raise RungError("there is no GPU, and Triton's interpreter is off: set TRITON_INTERPRET=1")
        with poisoned_memory():
            call()
        torch.cuda.synchronize()
        return Execution(call.outputs)
    # The package's kernels take smaller tiles in the interpreter, which has no use for large ones; here they are to take
    # those of a GPU. And NumPy speaks up where a GPU would give an infinity without a word.
    with poisoned_memory(), launch.recording(HOPPER), np.errstate(all="ignore"), counting() as counts:
        call()
    return Execution(call.outputs, counts if count else {})


def build(rungs: Sequence[Rung]) -> None:
    """Compile what was not compiled yet, all in one process; what is wrong with a rung is told by ``resources``."""
    waiting = [rung.path for rung in rungs if rung.path not in _compiled]
    if not waiting:
        return
    arch = launch.generation(torch.device("cuda")) if torch.cuda.is_available() else HOPPER
    command = [sys.executable, "-m", "lessons.kernels.triton_rung", str(arch), *map(str, waiting)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RungError(f"the process that compiles Triton kernels failed:\n{done.stderr.rstrip()}")
    answers = json.loads(done.stdout.splitlines()[-1])
    _compiled.update(zip(waiting, answers, strict=True))


def resources(rung: Rung) -> Counts:
    """What the compiler made of a rung's kernels, by the names of ``COMPILED``: for the GPU of this machine, else Hopper.

    Raises:
        RungError: the compiler's words.
    """
    build([rung])
    found = _compiled[rung.path]
    if isinstance(found, str):
        raise RungError(found)
    return found


def compiled(rung: Rung, arch: int) -> dict[str, int]:
    """What ``resources`` says, found in this process, which must not be interpreting.

    Args:
        arch: a key of ``SHARED_LIMIT``: 90 for sm_90.

    Raises:
        RungError: the compiler's words.
    """
    call = Call(rung, Problem(rung.task, counted_sizes(rung.task), torch.device("cpu")))
    with compiling_for(arch) as kernels:
        call()
    if not kernels:
        raise RungError(f"{rung.path.name} launches no Triton kernel")
    return _summary(kernels)


def _summary(kernels: Sequence[Compiled]) -> dict[str, int]:
    resources = [kernel.resources() for kernel in kernels]
    loads = sum((kernel.global_loads() for kernel in kernels), Counter())
    stores = sum((kernel.global_stores() for kernel in kernels), Counter())

    def total(*mnemonics: str) -> int:
        return sum(kernel.count(mnemonic) for kernel in kernels for mnemonic in mnemonics)

    counts = {
        "registers": max(each.registers for each in resources),
        "spilled bytes": sum(each.spill_bytes for each in resources),
        "shared bytes": max(kernel.shared for kernel in kernels),
        "load width": max(loads, default=0),
        "store width": max(stores, default=0),
        "loads compiled": loads.total(),
        "tensor-core instructions": total(*_TENSOR_CORE),
        "async copies": total("cp.async.ca", "cp.async.cg"),
        "multiplications": total(*_MULTIPLY),
    }
    assert counts.keys() == COMPILED.keys()
    return counts


def _load(path: Path) -> ModuleType:
    """The file as a module of its own, run anew each time: a file may have changed since.

    Raises:
        RungError: what Python says of it.
    """
    spec = importlib.util.spec_from_file_location(f"rung_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _told_of(path):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Whatever a reader's file raises, with the last line of the file that it went through.

    Raises:
        RungError: any exception.
    """
    try:
        yield
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:  # Triton wraps what goes wrong in a kernel
            root = root.__cause__
        frames = [*traceback.extract_tb(error.__traceback__), *traceback.extract_tb(root.__traceback__)]
        lines = [frame.lineno for frame in frames if Path(frame.filename) == path]
        place = f"{path.name}, line {lines[-1]}" if lines else path.name
        raise RungError(f"{place}: {type(root).__name__}: {root}".rstrip(": ")) from error


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what Triton's compiler makes of rungs, as a line of JSON.")
    parser.add_argument("arch", type=int, choices=tuple(SHARED_LIMIT), help="the compute capability: 90 for sm_90")
    parser.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    answers: list[Any] = []
    for path in args.files:
        try:
            answers.append(compiled(read_rung(path), args.arch))
        except RungError as error:
            answers.append(str(error))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
