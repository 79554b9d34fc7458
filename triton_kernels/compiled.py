"""Compiling Triton kernels for GPUs that are not there, through the code that launches them.

    with compiling_for(90) as kernels:
        softmax_fwd(torch.randn(8, 1024), 1)  # the real launch code, tensors on the CPU
    assert kernels[0].resources().spill_bytes == 0

Inside, Triton's driver is a stand-in: a launch specialises on its arguments and compiles as on the GPU, fails where the
GPU has not the shared memory for it (``triton.runtime.errors.OutOfResources``), and runs nothing: outputs stay as they
were allocated. An autotuned kernel is the exception: Triton tunes it once in a process, whatever the GPU.
"""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

# Bytes of shared memory that a block may have, by compute capability (CUDA's programming guide, CUTLASS's arch.h).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# Multiprocessors of an A100, an RTX 3090, an H100, a B200 and an RTX 5090, for launches that size their grid by them.
MULTIPROCESSORS = {80: 108, 86: 82, 90: 132, 100: 148, 120: 170}

_MAX_GRID = (2**31 - 1, 65535, 65535)

# Triton keeps kernels and shared memory limits by device number, so each context takes a number that was never used.
_DEVICES = itertools.count(1000)

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_OPCODE = re.compile(r"(?<![\w.%$@:])[a-z]\w*(?:(?:\.|::)\w+)*")
_COPY_SIZE = re.compile(r"cp\.async\.c[ag]\.shared[^;]*?\][^;\]]*\],\s*(0x[0-9a-fA-F]+|\d+)")


@dataclass(frozen=True)
class Resources:
    """What a thread and a block take, as ``cuobjdump`` reads it from the binary.

    Args:
        registers: 32-bit registers of a thread.
        spill_bytes: local memory of a thread, where spilled registers go (and the arguments of ``device_print``).
        static_shared: shared memory of a block beyond what a launch asks for: from sm_90 on the 1024 bytes that the
            system keeps for itself, which are not part of ``SHARED_LIMIT``.
    """

    registers: int
    spill_bytes: int
    static_shared: int


@dataclass(frozen=True, eq=False)
class Compiled:
    """One kernel, compiled for one specialisation.

    Args:
        name: the kernel function's name.
        arch: the compute capability, 90 for sm_90.
        constants: the values compiled in, by argument: constexprs, None, and integers that were 1.
        signature: Triton's types of the arguments that are left to the launch, by argument.
        num_warps: warps of a block.
        num_stages: stages of the software pipeline.
        ptx: the PTX.
        cubin: the binary.
        shared: bytes of shared memory of a block, all of which Triton asks for at launch.
    """

    name: str
    arch: int
    constants: dict[str, Any]
    signature: dict[str, Any]
    num_warps: int
    num_stages: int
    ptx: str
    cubin: bytes
    shared: int

    def resources(self) -> Resources:
        return _resources(self.cubin)

    def count(self, mnemonic: str) -> int:
        """Count the PTX instructions that begin with ``mnemonic``, in whole parts: "mma.sync", "wgmma.mma_async"."""
        return sum(n for opcode, n in _opcodes(self.ptx).items() if f"{opcode}.".startswith(f"{mnemonic}."))

    def global_loads(self) -> Counter[int]:
        """Count the loads, cp.async too, by the bytes that a thread loads at once; TMA is in count("cp.async.bulk")."""
        copies = Counter(int(size, 0) for size in _COPY_SIZE.findall(self.ptx))
        return _accesses(self.ptx, "ld") + copies

    def global_stores(self) -> Counter[int]:
        """Count the stores by the bytes that a thread stores at once."""
        return _accesses(self.ptx, "st")


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Compiled]]:
    """Within, launches compile for a GPU generation and run nothing.

    Args:
        arch: the compute capability, a key of ``SHARED_LIMIT``.

    Yields:
        A list that grows by one with each kernel and specialisation, also one that a launch is then refused for.

    Raises:
        RuntimeError: Triton is interpreting (TRITON_INTERPRET).
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    kernels: list[Compiled] = []
    functions = []

    def record(*, src: Any, metadata: dict[str, Any], metadata_group: dict[str, str], **_: Any) -> None:
        kernels.append(_compiled(src, metadata, metadata_group))
        functions.append(src.fn)

    stand_in = _Driver(arch, next(_DEVICES))
    # Not `driver.active`, which looks for a GPU where there was no driver yet.
    before, listener_before = driver._active, knobs.compilation.listener
    driver.set_active(stand_in)
    knobs.compilation.listener = record
    try:
        yield kernels
    finally:
        knobs.compilation.listener = listener_before
        driver.set_active(before)
        for function in functions:
            function.device_caches.pop(stand_in.device, None)


class _Driver(DriverBase):
    def __init__(self, arch: int, device: int) -> None:
        self.arch = arch
        self.device = device
        self.launcher_cls = lambda src, metadata: _launch
        properties = {
            "max_shared_mem": SHARED_LIMIT[arch],
            "max_num_regs": 65536,
            "multiprocessor_count": MULTIPROCESSORS[arch],
            "warpSize": 32,
        }
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties, load_binary=_load_binary)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return _benchmark


def _launch(x: int, y: int, z: int, *_: Any) -> None:
    for axis, (size, most) in enumerate(zip((x, y, z), _MAX_GRID, strict=True)):
        if not 0 <= size <= most:
            raise ValueError(f"the grid's axis {axis} is {size}; CUDA takes 0 to {most}")


def _load_binary(name: str, cubin: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
    """What CUDA says of a loaded kernel: its registers, its spills in 4-byte words and the most threads of a block.

    Without a module there is nothing that Triton would unload after the driver is gone.
    """
    resources = _resources(cubin)
    return None, None, resources.registers, resources.spill_bytes // 4, 1024


def _benchmark(call: Callable[[], Any], quantiles: Sequence[float], **_: Any) -> list[float]:
    call()
    return [0.0] * len(quantiles)


def _compiled(src: Any, metadata: dict[str, Any], files: dict[str, str]) -> Compiled:
    paths = {Path(path).suffix: Path(path) for path in files.values()}
    names = src.fn.arg_names
    return Compiled(
        name=src.fn.__name__,
        arch=metadata["target"].arch,
        constants={".".join([names[first], *map(str, rest)]): v for (first, *rest), v in src.constants.items()},
        signature={name: ty for name, ty in src.signature.items() if ty != "constexpr"},
        num_warps=metadata["num_warps"],
        num_stages=metadata["num_stages"],
        ptx=paths[".ptx"].read_text(),
        cubin=paths[".cubin"].read_bytes(),
        shared=metadata["shared"],
    )


@functools.cache
def _resources(cubin: bytes) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usages = [tuple(map(int, usage)) for usage in _USAGE.findall(report)]
    if len(usages) != 1:
        raise RuntimeError(f"cuobjdump was to report one kernel:\n{report}")
    registers, stack, shared, local = usages[0]
    return Resources(registers, stack + local, shared)


@functools.cache
def _opcodes(ptx: str) -> Counter[str]:
    return Counter(_OPCODE.findall(re.sub(r"//.*", "", ptx)))


def _accesses(ptx: str, kind: str) -> Counter[int]:
    """Count the global ``kind`` ("ld", "st") instructions by bytes: a vector's length times its element's width."""
    sizes: Counter[int] = Counter()
    for opcode, n in _opcodes(ptx).items():
        base, *parts = opcode.split(".")
        if base == kind and "global" in parts:
            length = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d+", part)), 1)
            sizes[length * int(re.sub(r"\D", "", parts[-1])) // 8] += n
    return sizes
