"""Triton rungs: counted in Triton's interpreter, run on a GPU or in the interpreter, and compiled without a GPU.

Triton asks for TRITON_INTERPRET when it decorates a kernel, so that a process either interprets or compiles. What this
process cannot do, another does, which is this file run by itself:

    TRITON_INTERPRET=1 python -m lessons.kernels.triton_rung lessons/kernels/softmax/05_rows_together.py
    TRITON_INTERPRET=0 python -m lessons.kernels.triton_rung --arch 90 lessons/kernels/softmax/05_rows_together.py
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

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

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
# What the figure of a climb shows.
CLIMBED = ("load bytes", "load sectors", "atomics", "dots", "tensor-core instructions")

_TENSOR_CORE = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
_MULTIPLY = ("mul.f32", "mul.rn.f32", "mul.f32x2", "fma.rn.f32", "fma.rn.f32x2")

# What other processes answered, by the question, a rung's file and when it was written: counters, or what is wrong.
_answers: dict[tuple[str, Path, int], Counts | str] = {}


def counting_device() -> torch.device:
    """Where rungs are held to small problems: a GPU, or a CPU in the interpreter."""
    return torch.device("cpu" if interpreting() else "cuda")


def counted_sizes(task: Task) -> Sizes:
    """Where a rung's counters are read: few rows, since the interpreter is slow, but rows that are long enough.

    Of attention that means sequences where a causal mask begins to hide whole tiles of 64 or 128 queries.
    """
    return {**task.counted, **({"M": 16} if "M" in task.counted else {"T": 256})}


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
            wanted = f"{self.rung.task.name} has to return {', '.join(self.names)}"
            results = results if isinstance(results, (tuple, list)) else (results,)
            for result in results:
                if not isinstance(result, Tensor):
                    raise TypeError(f"{wanted}, and returned {type(result).__name__}")
            if len(results) != len(self.names):
                raise ValueError(f"{wanted}, not {len(results)} tensors")
        self.outputs = dict(zip(self.names, results, strict=True))


def run(rung: Rung, problem: Problem, *, count: bool = False) -> Execution:
    """Run a rung once, where the problem is: on a GPU or in the interpreter. Tensors that it makes start out as NaN.

    Args:
        count: add the counters of ``INTERPRETED``; on a GPU as the interpreter, in another process, found them.

    Raises:
        RungError: it cannot be loaded or run.
    """
    call = Call(rung, problem)
    if not interpreting():
        with poisoned_memory():
            call()
        torch.cuda.synchronize()
        return Execution(call.outputs, _told("counted", rung) if count else {})
    # The package's kernels take small tiles in the interpreter, and here are to take those of a GPU. NumPy would warn
    # of what a GPU does without a word, such as a division by 0 in a row beyond the last.
    with poisoned_memory(), launch.recording(HOPPER), np.errstate(all="ignore"), counting() as counts:
        call()
    return Execution(call.outputs, counts if count else {})


def build(rungs: Sequence[Rung]) -> None:
    """Have other processes, one for all rungs, do what this one cannot; what is wrong with a rung is told later."""
    _ask("compiled", rungs, "--arch", str(_arch()))
    if not interpreting():
        _ask("counted", rungs)


def resources(rung: Rung) -> Counts:
    """What the compiler made of a rung, by the names of ``COMPILED``: for this machine's GPU, else for Hopper's.

    Raises:
        RungError: the compiler's words.
    """
    return _told("compiled", rung)


def counted(rung: Rung) -> Counts:
    """What a rung does in the interpreter, which this process has to be using.

    Raises:
        RungError: what Python or Triton say of it.
    """
    return run(rung, Problem(rung.task, counted_sizes(rung.task), torch.device("cpu")), count=True).counts


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


def _arch() -> int:
    return launch.generation(torch.device("cuda")) if torch.cuda.is_available() else HOPPER


def _key(question: str, rung: Rung) -> tuple[str, Path, int]:
    return question, rung.path, rung.path.stat().st_mtime_ns


def _ask(question: str, rungs: Sequence[Rung], *options: str) -> None:
    """Fill ``_answers`` for the rungs that have none yet.

    Raises:
        RungError: the process that was to answer failed.
    """
    waiting = [rung for rung in rungs if _key(question, rung) not in _answers]
    if not waiting:
        return
    files = [str(rung.path) for rung in waiting]
    command = [sys.executable, "-m", "lessons.kernels.triton_rung", *options, *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1" if question == "counted" else "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RungError(f"the process by which kernels are {question} failed:\n{done.stderr.rstrip()}")
    answers = json.loads(done.stdout.splitlines()[-1])
    _answers.update({_key(question, rung): answer for rung, answer in zip(waiting, answers, strict=True)})


def _told(question: str, rung: Rung) -> Counts:
    if _key(question, rung) not in _answers:
        build([rung])
    answer = _answers[_key(question, rung)]
    if isinstance(answer, str):
        raise RungError(answer)
    return answer


def _summary(kernels: Sequence[Compiled]) -> dict[str, int]:
    resources = [kernel.resources() for kernel in kernels]
    loads: Counter[int] = sum((kernel.global_loads() for kernel in kernels), Counter())
    stores: Counter[int] = sum((kernel.global_stores() for kernel in kernels), Counter())

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
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _told_of(path):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Whatever a reader's file raises, with the last line of the file that it went through.

    Raises:
        RungError: any exception, and sys.exit, or a file could end the command as if all were well.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        root: BaseException = error
        while root.__cause__ is not None:  # Triton wraps what goes wrong in a kernel
            root = root.__cause__
        frames = [*traceback.extract_tb(error.__traceback__), *traceback.extract_tb(root.__traceback__)]
        lines = [frame.lineno for frame in frames if Path(frame.filename) == path]
        place = f"{path.name}, line {lines[-1]}" if lines else path.name
        raise RungError(f"{place}: {type(root).__name__}: {root}".rstrip(": ")) from error


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a line of JSON: what is counted of rungs, or compiled of them.")
    parser.add_argument("--arch", type=int, choices=tuple(SHARED_LIMIT), help="compile for it: 90 for sm_90")
    parser.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    answers: list[Any] = []
    for path in args.files:
        try:
            rung = read_rung(path)
            answers.append(compiled(rung, args.arch) if args.arch else counted(rung))
        except RungError as error:
            answers.append(str(error))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
