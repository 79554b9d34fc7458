"""Compiling the CUDA kernels for GPUs that are not there, and reading what came out.

    python tests/cuda_compile.py --doc docs/cuda.md

setup.py compiles them as it does for a wheel, but with every warning and every spilled register an error. What a thread
takes and the instructions are read from the machine code, by the cuobjdump in the Triton wheel. Threads and shared
memory of a block are chosen where a kernel is launched: the same object files are linked to a stand-in for CUDA's
runtime (``cuda_launches.cpp``) and their launchers called, on CPU tensors, through the bindings.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from fastgpt import emulator, kernel_ops

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "cuda_compiled"
ARCHS = (80, 90)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Chip:
    """Of a multiprocessor: warps and blocks at a time, bytes of shared memory; and how many of them a block may have.

    From CUDA's programming guide, "Technical Specifications per Compute Capability".
    """

    warps: int
    blocks: int
    shared: int
    shared_of_block: int


CHIPS = {
    80: Chip(64, 32, 164 * 1024, 163 * 1024),
    90: Chip(64, 32, 228 * 1024, 227 * 1024),
}
REGISTERS = 65536  # of a multiprocessor, dealt out to warps in pieces of 256
SYSTEM_SHARED = 1024  # of every block, beside its own


@dataclass(frozen=True)
class Machine:
    """What one kernel is compiled to: of a thread its registers and bytes of local memory, where spilled ones go; of a
    block the bytes of shared memory that a launch does not ask for; of the code how often each instruction occurs."""

    registers: int
    local: int
    static_shared: int
    opcodes: dict[str, int]

    def count(self, mnemonic: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if opcode.split(".")[0] == mnemonic)


@dataclass(frozen=True)
class Launch:
    """A kernel's linker name; of a block its threads and the bytes of shared memory that the launch asks for."""

    symbol: str
    threads: int
    shared: int


@dataclass(frozen=True)
class Kernel:
    """One kernel on one GPU, as one of its launches runs it."""

    symbol: str
    arch: int
    threads: int
    shared: int
    machine: Machine

    @property
    def name(self) -> str:
        return name_and_variant(self.symbol)[0]

    @property
    def variant(self) -> str:
        return name_and_variant(self.symbol)[1]

    def resident_warps(self) -> int:
        """Warps that a multiprocessor runs at a time; 0 where nothing launches the kernel."""
        if self.threads == 0:
            return 0
        chip, warps = CHIPS[self.arch], -(-self.threads // 32)
        registers_of_warp = -(-self.machine.registers * 32 // 256) * 256
        # Each of its four parts has a quarter of the registers, and its warps in fours.
        by_registers = REGISTERS // 4 // registers_of_warp * 4 // warps
        by_shared = chip.shared // (-(-self.shared // 128) * 128 + SYSTEM_SHARED)
        return min(by_registers, by_shared, chip.warps // warps, chip.blocks) * warps


# ----------------------------------------------------------------------------------------------------------------------
# Compiling
# ----------------------------------------------------------------------------------------------------------------------


def compile_kernels(folder: Path) -> list[Path]:
    """The object files of csrc/cuda, for all of ``ARCHS``; in a folder that has them only what changed is compiled.

    The library that they are linked to is ``folder``/lib/fastgpt/_cuda.abi3.so.

    Raises:
        RuntimeError: something does not compile, spills registers, draws a warning, or has wgmma wait where its source
            does not (the notes C7510 to C7520); with what was said.
    """
    build = folder / "build"
    settings = {name: value for name, value in os.environ.items() if not name.startswith("FASTGPT_")}
    settings |= {
        "FASTGPT_CPP": "0",
        "FASTGPT_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": ";".join(f"{arch / 10}" for arch in ARCHS),
        "NVCC_APPEND_FLAGS": "-Xptxas=-v,-warn-spills -Werror=all-warnings",
        "CFLAGS": f"-Wall -Wextra -Werror -isystem {Path(torch.__file__).parent / 'include'}",
    }
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder / "lib", "--build-temp", build]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(said)
    if notes := re.findall(r"^.*\(C75\d\d\).*$", said, re.MULTILINE):
        shutil.rmtree(build / "cuda")  # what is compiled already would not be spoken of again
        raise RuntimeError("\n".join(notes))
    return [build / "cuda" / f"{path.stem}.o" for path in sorted(ROOT.glob("csrc/cuda/*.cu"))]


_ARCH = re.compile(r"^arch = sm_(\d+)")
_FUNCTION = re.compile(r"^\s*Function (?:: )?(\w+):?$")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def read(object_file: Path) -> dict[tuple[int, str], Machine]:
    """{(arch, linker name): what it is compiled to} of all kernels in an object file."""
    usages: dict[tuple[int, str], tuple[int, ...]] = {}
    opcodes: dict[tuple[int, str], Counter[str]] = {}
    for key, line in _by_kernel(_cuobjdump("--dump-resource-usage", object_file)):
        if found := _USAGE.search(line):
            usages[key] = tuple(map(int, found.groups()))
    for key, line in _by_kernel(_cuobjdump("--dump-sass", object_file)):
        if found := _INSTRUCTION.match(line):
            opcodes.setdefault(key, Counter())[found[1]] += 1
    machines = {}
    for key, (registers, stack, shared, local) in usages.items():
        system = SYSTEM_SHARED if key[0] >= 90 else 0  # counted by cuobjdump from there on, where there is any
        machines[key] = Machine(registers, stack + local, max(0, shared - system), dict(opcodes[key]))
    return machines


def _cuobjdump(what: str, path: Path) -> str:
    done = subprocess.run([knobs.nvidia.cuobjdump.path, what, path], check=True, capture_output=True, text=True)
    return done.stdout


def _by_kernel(listing: str) -> Iterator[tuple[tuple[int, str], str]]:
    arch, name = 0, ""
    for line in listing.splitlines():
        if found := _ARCH.match(line):
            arch = int(found[1])
        elif found := _FUNCTION.match(line):
            name = found[1]
        else:
            yield (arch, name), line


@functools.cache
def name_and_variant(symbol: str) -> tuple[str, str]:
    """("layer_norm_fwd", "bf16, fp32, 4"): the kernel without _kernel, and its template's arguments."""
    plain = torch._C._demangle(symbol).replace("(anonymous namespace)::", "").replace("fastgpt::cuda::", "")
    found = re.match(r"(?:void )?(\w+?)(?:_kernel)?(?:<(.*?)>)?\(", plain)
    assert found is not None, plain
    variant = re.sub(r"\([\w ]+\)", "", found[2] or "")  # (int)4, (Home)2
    for cuda, ours in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32")):
        variant = re.sub(rf"\b{cuda}\b", ours, variant)
    return found[1], variant


# ----------------------------------------------------------------------------------------------------------------------
# Launching
# ----------------------------------------------------------------------------------------------------------------------


def launches(objects: Sequence[Path], folder: Path) -> set[Launch]:
    """What the launchers in the object files choose, for all of ``calls``; in a process whose ops they are."""
    command = [sys.executable, __file__, "--folder", folder, "--launch", *objects]
    settings = {name: value for name, value in os.environ.items() if not name.startswith("FASTGPT_")}
    found: set[Launch] = set()
    for hopper in ("0", "1"):
        settings["FASTGPT_HOPPER_ATTENTION"] = hopper
        done = subprocess.run(command, env=settings, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        found |= {Launch(**launch) for launch in json.loads(done.stdout.splitlines()[-1])}
    return found


def _launch_all(objects: Sequence[str], folder: Path) -> list[Launch]:
    from torch.utils.cpp_extension import load

    build = folder / "launches"
    build.mkdir(parents=True, exist_ok=True)
    (build / "fastgpt_launches.so").unlink(missing_ok=True)  # ninja does not know that it depends on the object files
    emulator.register_ops()
    sources = [*sorted(ROOT.glob("csrc/bindings/cuda/*.cpp")), Path(__file__).with_name("cuda_launches.cpp")]
    path = load(
        name="fastgpt_launches",
        sources=list(map(str, sources)),
        extra_cflags=["-O0", "-DFASTGPT_EMULATE"],  # on CPU tensors
        extra_ldflags=[*objects, "-Wl,-Bsymbolic"],  # not the CUDA runtime that torch may have loaded
        extra_include_paths=list(map(str, emulator.headers())),
        build_directory=str(build),
        with_cuda=False,
        is_python_module=False,
    )
    for name, args in calls():
        kernel_ops.op(emulator.NAMESPACE, name)(*args)
    library = ctypes.CDLL(path)
    library.fastgpt_launches.restype = ctypes.c_char_p
    lines = sorted(set(library.fastgpt_launches().decode().splitlines()))
    return [Launch(name, int(threads), int(shared)) for name, threads, shared in map(str.split, lines)]


def calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments of the dispatcher ops, such that every kernel is launched in every variant that there is."""
    seed, stats = torch.zeros(1, dtype=torch.int64), torch.empty(4)
    for dtype, N in itertools.product((F32, BF16, F16), (64, 768, 1001, 16384, 50304, 131072)):
        x = torch.empty(4, N, dtype=dtype)
        for is_causal in (False, True):
            yield "softmax_fwd", (x, 1.0, is_causal)
            yield "softmax_bwd", (x, x, 1.0, is_causal)
        yield "dropout_fwd", (x, 0.1, seed)
        yield "dropout_bwd", (x, 0.1, seed)
        targets, loss = torch.zeros(4, dtype=torch.int64), torch.empty(())
        for with_gradient in (False, True):
            yield "cross_entropy_fwd", (x, targets, -100, with_gradient)
        yield "cross_entropy_bwd", (loss, x, targets, -100, torch.empty(2, 4), loss)
        yield "scale_gradient_", (x, loss)
        for parameter_dtype in {dtype, F32}:
            weight = torch.empty(N, dtype=parameter_dtype)
            yield "layer_norm_fwd", (x, weight, weight, 1e-5)
            yield "layer_norm_bwd", (x, x, weight, stats, stats)
            for bias, approximate in itertools.product((None, weight), ("none", "tanh")):
                yield "gelu_fwd", (x, bias, approximate)
                yield "gelu_bwd", (x, x, bias, approximate)
            for residual_dtype, (p, drop) in itertools.product({dtype, F32}, ((0.0, None), (0.1, seed))):
                residual = torch.empty(4, N, dtype=residual_dtype)
                options = (weight, stats, stats, p, drop, dtype, residual_dtype)
                yield "add_layer_norm_fwd", (x, residual, weight, weight, p, 1e-5, drop)
                yield "add_layer_norm_bwd", (x, residual, residual, *options)
                yield "add_layer_norm_bwd", (x, None, residual, *options)
    for x_dtype, residual_dtype in ((F32, BF16), (F32, F16), (BF16, F16), (F16, BF16)):  # not those of autocast
        x, residual = torch.empty(4, 768, dtype=x_dtype), torch.empty(4, 768, dtype=residual_dtype)
        total, weight = x.float(), torch.empty(768)
        yield "add_layer_norm_fwd", (x, residual, weight, None, 0.0, 1e-5, None)
        yield "add_layer_norm_bwd", (x, total, total, weight, stats, stats, 0.0, None, x_dtype, residual_dtype)
    for dtype, weight_dtype in ((F32, F32), (BF16, BF16), (F16, F16)):
        for with_gradient in (False, True):
            x, weight = torch.zeros(4, 64, dtype=dtype), torch.zeros(1000, 64, dtype=weight_dtype)
            yield "linear_cross_entropy_fwd", (x, weight, torch.zeros(4, dtype=torch.int64), -100, with_gradient)
    for dtype, V in itertools.product((F32, BF16, F16), (20_000, 60_000)):  # longer rows lie elsewhere
        yield "cross_entropy_fwd", (torch.empty(4, V, dtype=dtype), torch.zeros(4, dtype=torch.int64), -100, True)
    for dtype, D in itertools.product((F32, BF16, F16), (8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)):
        qkv, lse = torch.empty(2, 70, 3, 2, D, dtype=dtype), torch.empty(2, 2, 70)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        o, packed_o = torch.empty_like(q), torch.empty(2, 70, 2, D, dtype=dtype)
        lengths = torch.full((2,), 70, dtype=torch.int32)
        for is_causal, (p, drop), valid in itertools.product(
            (False, True), ((0.0, None), (0.1, seed)), (None, lengths)
        ):
            options = (is_causal, p, 0.125, valid, drop)
            yield "attention_fwd", (q, k, v, *options)
            yield "attention_bwd", (o, q, k, v, o, lse, *options)
            yield "attention_qkvpacked_fwd", (qkv, *options)
            yield "attention_qkvpacked_bwd", (packed_o, qkv, packed_o, lse, *options)
    step, lr = torch.ones(()), torch.ones(())
    for dtype, grad_dtype in itertools.product((F32, BF16, F16), repeat=2):
        params, grads = ([torch.empty(n, dtype=t) for n in (7, 70_000)] for t in (dtype, grad_dtype))
        for state_dtype in {dtype, F32}:
            first, second = ([torch.empty(n, dtype=state_dtype) for n in (7, 70_000)] for _ in range(2))
            yield "adamw_", (params, grads, first, second, step, lr, [0.9, 0.95], 1e-8, 0.1)
        yield "clip_grad_norm_", (grads, 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------


def kernels(folder: Path) -> list[Kernel]:
    """All kernels with all of their launches; one that nothing launches has 0 threads."""
    objects = compile_kernels(folder)
    found: dict[str, list[Launch]] = {}
    for launch in launches(objects, folder):
        found.setdefault(launch.symbol, []).append(launch)
    report = []
    for (arch, symbol), machine in itertools.chain.from_iterable(read(path).items() for path in objects):
        for launch in found.get(symbol, [Launch(symbol, 0, 0)]):
            report.append(Kernel(symbol, arch, launch.threads, machine.static_shared + launch.shared, machine))
    return report


MARK = "<!-- what follows is written by `make cuda-table` -->"
_HEADER = """\
| kernel | variant | threads | registers | shared | warps | tensor cores | ldmatrix | async copies |
|---|---|---|---|---|---|---|---|---|
"""


def nvcc_version(folder: Path) -> str:
    """Of the nvcc that setup.py found."""
    nvcc = re.search(r"command = (\S+)", (folder / "build" / "cuda" / "build.ninja").read_text())[1]
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"V([\d.]+)", said)[1]


def document(report: Iterable[Kernel], folder: Path) -> str:
    """The generated part of docs/cuda.md."""
    parts = [f"{MARK}\n\nnvcc {nvcc_version(folder)}.\n"]
    for arch in ARCHS:
        rows = {_line(kernel) for kernel in report if kernel.arch == arch and "fp16" not in kernel.variant}
        parts.append(f"\n### sm_{arch}\n\n{_HEADER}{''.join(sorted(rows))}")
    return "".join(parts)


def _line(kernel: Kernel) -> str:
    machine = kernel.machine
    warps = f"{kernel.resident_warps()} of {CHIPS[kernel.arch].warps}"
    products = machine.count("HMMA") or machine.count("HGMMA")  # of a warp, of a warpgroup
    copies = machine.count("LDGSTS") or machine.count("UTMALDG")  # of 16 bytes, of a tile
    counts = (products or "", machine.count("LDSM") or "", copies or "")
    cells = (kernel.name, kernel.variant, kernel.threads, machine.registers, kernel.shared, warps, *counts)
    return f"| {' | '.join(map(str, cells))} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--doc", type=Path, help="write the table into this file")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to compile")
    parser.add_argument("--launch", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.launch:
        print(json.dumps([dataclasses.asdict(launch) for launch in _launch_all(args.launch, args.folder)]))
        return
    text = document(kernels(args.folder), args.folder)
    if args.doc:
        args.doc.write_text(args.doc.read_text().split(MARK)[0] + text)
    else:
        print(text)


if __name__ == "__main__":
    main()
