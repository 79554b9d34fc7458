"""CUDA rungs: compiled just in time, by the C++ compiler for the emulator or by nvcc for a GPU, run and counted.

A problem on the CPU is the emulator's, and one on a GPU is the GPU's.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import operator
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastgpt import emulator, extension
from lessons.kernels.rung import Execution, Rung, RungError
from lessons.kernels.tasks import Problem, Sizes, Task

FOLDER = Path(__file__).parent
SECTOR_BYTES = 32
HOPPER = (9, 0)  # compiled for where there is no GPU
COUNTERS = (
    "launches",
    "load requests",
    "load sectors",
    "sectors per load request",
    "store requests",
    "store sectors",
    "sectors per store request",
    "bytes wanted",
    "bytes moved",
    "shared accesses",
    "bank conflicts",
    "barriers",
    "ldmatrix",
    "mma",
    "async copies",
)
CLIMBED = ("bytes moved", "load requests", "barriers", "bank conflicts", "mma")  # what the figure shows


def counting_device() -> torch.device:
    """Where rungs are counted and held to small problems: in the emulator, or on a GPU where that cannot be had.

    Raises:
        RungError: there is neither.
    """
    reason = emulator.missing()
    if reason is None:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RungError(reason)
    return torch.device("cuda")


def counted_sizes(task: Task) -> Sizes:
    """Where a rung's counters are read."""
    return task.counted


def build(rungs: Sequence[Rung]) -> None:
    """Compile what has changed of several rungs, side by side. What is wrong with one is told when it runs."""
    todo: list[Callable[[Rung], Any]] = [_compile_for_emulator] if emulator.missing() is None else []
    if torch.cuda.is_available():
        todo.append(_compile_for_gpu)
    if find_nvcc():
        todo.append(resources)
    if _compile_for_emulator in todo:
        emulator.runtime()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for future in [pool.submit(compile_it, rung) for compile_it in todo for rung in rungs]:
            future.exception()


class Call:
    """A rung's function with the arguments of a problem, ready to be called; ``outputs`` start out as NaN.

    Raises:
        RungError: it does not compile.
    """

    def __init__(self, rung: Rung, problem: Problem) -> None:
        device = problem.device
        self.function = _function(_compile_for_gpu(rung) if device.type == "cuda" else _compile_for_emulator(rung))
        self.outputs = {
            name: torch.full(true.shape, torch.nan, dtype=problem.task.dtypes[name], device=device)
            for name, true in problem.truth.items()
        }
        self.tensors = {**problem.inputs, **self.outputs}
        self.bounds = emulator.bounds if device.type == "cpu" else contextlib.nullcontext
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        self.values = [
            *(ctypes.c_void_p(x.data_ptr()) for x in self.tensors.values()),
            *(ctypes.c_int(n) for n in problem.sizes.values()),
            *(ctypes.c_float(value) for value in problem.constants),
            ctypes.c_void_p(stream),
        ]
        self.arguments = (ctypes.c_void_p * len(self.values))(*(ctypes.addressof(value) for value in self.values))

    def __call__(self) -> None:
        """Launch the kernels.

        Raises:
            RungError: in the emulator, what it found; on a GPU, a launch that was refused.
        """
        with self.bounds(self.tensors):
            error = self.function(self.arguments)
        if error is not None:
            raise RungError(error.decode())


def run(rung: Rung, problem: Problem, *, count: bool = False, order: str = "skewed", copies: str = "lazy") -> Execution:
    """Run a rung once, on a GPU or in the emulator.

    Args:
        count: in the emulator, read its counters.
        order, copies: the emulator's schedule: by itself one in which a kernel that relies on luck has little.

    Raises:
        RungError: it does not compile, or the emulator or the GPU finds it at fault.
    """
    call = Call(rung, problem)
    if problem.device.type == "cuda":
        call()
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise RungError(f"the GPU stopped: {error}") from error
        return Execution(call.outputs)
    with emulator.schedule(order, copies, count_banks=count, count_memory=count) as module:
        module.reset_counters()
        call()
        if not count:
            return Execution(call.outputs)
        launched = module.counters()
        _launched[rung.path] = set(launched)
        return Execution(call.outputs, _counts(launched.values()))


# Of the kernels in a rung's file those that were launched when it was counted, by the emulator's names for them.
_launched: dict[Path, set[str]] = {}


def _counts(kernels: Iterable[Any]) -> dict[str, float]:
    """The emulator's counters, summed over a rung's kernels, by the names of ``COUNTERS``."""
    kernels = list(kernels)

    def total(name: str) -> int:
        return sum(operator.attrgetter(name)(kernel) for kernel in kernels)

    counts = {
        "launches": total("launches"),
        "load requests": total("loads.requests"),
        "load sectors": total("loads.sectors"),
        "sectors per load request": _ratio(total("loads.sectors"), total("loads.requests")),
        "store requests": total("stores.requests"),
        "store sectors": total("stores.sectors"),
        "sectors per store request": _ratio(total("stores.sectors"), total("stores.requests")),
        "bytes wanted": total("loads.bytes") + total("stores.bytes"),
        "bytes moved": SECTOR_BYTES * (total("loads.sectors") + total("stores.sectors")),
        "shared accesses": total("shared_accesses"),
        "bank conflicts": total("bank_conflicts"),
        "barriers": total("barriers"),
        "ldmatrix": total("ldmatrix"),
        "mma": total("mma"),
        "async copies": total("copies"),
    }
    assert tuple(counts) == COUNTERS
    return counts


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------------------------------

_INCLUDES = (f"-I{FOLDER}", f"-I{extension.source_folder() / 'cuda'}")


@functools.cache
def _function(library: Path) -> Any:
    function = ctypes.CDLL(str(library)).fastgpt_rung
    function.restype = ctypes.c_char_p
    return function


def _compile_for_emulator(rung: Rung) -> Path:
    """The rung as a library with the function of entry.cu, compiled where it is not up to date."""
    libraries = ["-x", "none", str(emulator.runtime().__file__)]
    return _built(rung, [*emulator.compile_command(), "-fPIC", "-shared"], libraries, ".so")[0]


def _compile_for_gpu(rung: Rung) -> Path:
    return _built(rung, [*_nvcc(), "-shared", "-Xcompiler", "-fPIC"], [], ".so")[0]


def _nvcc() -> list[str]:
    nvcc = find_nvcc()
    if nvcc is None:
        raise RungError("registers are nvcc's to count, which is neither on PATH nor in /usr/local/cuda")
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else HOPPER
    return [nvcc, "-std=c++17", "-O3", f"-arch=sm_{major}{minor}", "-Xptxas=-v"]


def find_nvcc() -> str | None:
    """nvcc's path, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


def _built(rung: Rung, command: list[str], libraries: list[str], suffix: str) -> tuple[Path, str]:
    """What a command makes of a rung, and what it said, from the cache where nothing that it read has changed.

    Raises:
        RungError: the compiler's words.
    """
    whole = [*command, *_INCLUDES, f'-DFASTGPT_RUNG="{rung.path}"', f"-DFASTGPT_TASK={rung.task.name}"]
    key = hashlib.sha256(repr((whole, libraries)).encode()).hexdigest()[:16]
    folder = emulator.cache_folder() / "fastgpt_lessons"
    target, said, read = (folder / f"{rung.stem}_{key}{end}" for end in (suffix, ".txt", ".d"))
    if _is_newer(target, read):
        return target, said.read_text()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as passing:  # others may build the same at this moment
        made, listed = Path(passing, "made"), Path(passing, "listed")
        whole += [str(FOLDER / "entry.cu"), "-MD", "-MF", str(listed), "-o", str(made), *libraries]
        done = subprocess.run(whole, capture_output=True, text=True, env={**os.environ, "LD_PRELOAD": ""})
        if done.returncode:
            raise RungError(f"{rung.path.name} does not compile:\n{done.stdout}{done.stderr}".rstrip())
        said.write_text(done.stdout + done.stderr)
        listed.replace(read)
        made.replace(target)
    return target, said.read_text()


def _is_newer(target: Path, read: Path) -> bool:
    """Whether the target is newer than all files of the compiler's list of what it read (a rule of make)."""
    if not (target.exists() and read.exists()):
        return False
    listed = (
        read.read_text().partition(":")[2].replace("\\\n", " ").strip()
    )  # as make has it: "\\ " is a space in a name
    files = [Path(file.replace("\\ ", " ")) for file in re.split(r"(?<!\\)\s+", listed)]
    made = target.stat().st_mtime_ns
    return all(file.exists() and file.stat().st_mtime_ns < made for file in files)


# ---------------------------------------------------------------------------------------------------------------------
# What the compiler made of it
# ---------------------------------------------------------------------------------------------------------------------

_USED = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_SHARED = re.compile(r"(\d+) bytes smem")


def resources(rung: Rung) -> dict[str, float]:
    """By nvcc, for this machine's GPU or else for an H100.

    Of those kernels that it was seen to launch, else of all in the file: the most registers of a thread, and bytes of
    shared memory (but for those that a launch states), that one of them takes; and the bytes that they spill.

    Raises:
        RungError: there is no nvcc, or it does not compile.
    """
    said = _built(rung, [*_nvcc(), "-cubin"], [], ".cubin")[1]
    parts = re.split(r"Compiling entry function '(\w+)'", said)[1:]
    kernels = {_kernel_name(symbol): text for symbol, text in zip(parts[::2], parts[1::2], strict=True)}
    launched = _launched.get(rung.path, set()) & kernels.keys() or kernels.keys()
    said = "".join(kernels[name] for name in launched)
    return {
        "registers": max((int(n) for n in _USED.findall(said)), default=0),
        "spilled bytes": sum(int(stores) + int(loads) for stores, loads in _SPILLED.findall(said)),
        "static shared bytes": max((int(n) for n in _SHARED.findall(said)), default=0),
    }


def _kernel_name(symbol: str) -> str:
    """The emulator's name for a kernel of that linker name: "softmax_fwd_kernel<float, 4>"."""
    plain = torch._C._demangle(symbol).replace("(anonymous namespace)::", "")
    plain = re.sub(r"\((?:int|bool|unsigned int|long)\)", "", plain.removeprefix("void ").partition(">(")[0])
    name, bracket, arguments = plain.partition("(")[0].partition("<")
    return f"{name.rpartition('::')[2]}{bracket}{arguments}{'>' if bracket else ''}"
