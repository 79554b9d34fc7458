"""What nvcc makes of the CUDA kernels, for GPUs that are not here: do they spill, fit, use the tensor cores?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_compile import ARCHS, CHIPS, FOLDER, MARK, ROOT, Kernel, Machine, document, kernels

DOCUMENT = ROOT / "docs" / "cuda.md"
LIBRARY = FOLDER / "lib" / "fastgpt" / "_cuda.abi3.so"

# What of attention in half precision has no products to leave to the tensor cores.
NO_PRODUCTS = {"attention_bwd_delta"}
# What is for 9.0 alone.
HOPPER = {"attention_fwd_sm90"}
# What a block may have on 8.6, 8.9 and 12.0: they run the machine code of 8.0, or the same source.
SHARED_EVERYWHERE = 99 * 1024


@pytest.fixture(scope="session")
def report() -> list[Kernel]:
    """Compiled without a warning and without a spill, or this is the error of every test."""
    try:
        return kernels(FOLDER)
    except RuntimeError as error:
        missing = re.search(r"there was no (nvcc|ninja|C\+\+ compiler) .*", str(error))
        if missing:
            pytest.skip(missing[0])
        raise


@pytest.mark.full
def test_every_kernel_is_launched_by_some_call(report: list[Kernel]) -> None:
    assert {kernel.arch for kernel in report} == set(ARCHS)
    idle = {f"{kernel.name}<{kernel.variant}>" for kernel in report if kernel.threads == 0}
    assert not idle, "cuda_compile.calls() lacks what launches these, or nothing does"


@pytest.mark.full
def test_nothing_lies_in_local_memory(report: list[Kernel]) -> None:
    """Neither spilled registers nor arrays that are indexed by what the compiler does not know."""
    for kernel in report:
        machine = kernel.machine
        assert (machine.local, machine.count("LDL"), machine.count("STL")) == (0, 0, 0), kernel


@pytest.mark.full
def test_blocks_fit_every_gpu(report: list[Kernel]) -> None:
    for kernel in report:
        limit = CHIPS[kernel.arch].shared_of_block
        assert kernel.shared <= (limit if kernel.name in HOPPER else min(limit, SHARED_EVERYWHERE)), kernel
        assert kernel.threads == 0 or kernel.resident_warps() > 0, kernel


@pytest.mark.full
def test_attention_in_half_precision_uses_the_tensor_cores(report: list[Kernel]) -> None:
    for kernel in report:
        if kernel.name.startswith("attention") and re.search("bf16|fp16", kernel.variant):
            mnemonics = ("HGMMA", "UTMALDG", "USETMAXREG") if kernel.name in HOPPER else ("HMMA", "LDSM", "LDGSTS")
            counts = {mnemonic: kernel.machine.count(mnemonic) for mnemonic in mnemonics}
            assert all(counts.values()) != (kernel.name in NO_PRODUCTS), (kernel.name, kernel.variant, counts)


@pytest.mark.full
def test_the_document_is_up_to_date(report: list[Kernel]) -> None:
    written = DOCUMENT.read_text().partition(MARK)
    now = document(report, FOLDER)
    versions = [re.search(r"^nvcc [\d.]+", text, re.MULTILINE) for text in (written[2], now)]
    if versions[0] and versions[0][0] != versions[1][0]:
        pytest.skip(f"docs/cuda.md was written by {versions[0][0]}, and this is {versions[1][0]}")
    assert written[1] + written[2] == now, "make cuda-table writes it anew"


# Torch's CUDA half is played by a library of that name.
LOADS = """
import ctypes, sys
import torch
from fastgpt import extension
stand_in, library, *ops = sys.argv[1:]
ctypes.CDLL(stand_in, ctypes.RTLD_GLOBAL)
torch.ops.load_library(library)
for op in ops:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgpt_cuda::{op}", "CUDA"), op
error = ctypes.CDLL(library).fastgpt_cuda_error
error.restype = ctypes.c_char_p
print(error())
"""


@pytest.mark.full
def test_the_library_loads_where_torch_has_cuda(report: list[Kernel], tmp_path: Path) -> None:
    symbols = [line.split() for line in run("nm", "--dynamic", LIBRARY).splitlines()]
    of_torch = [words[-1] for words in symbols if words[-2] == "U" and re.match("aoti_torch_.*cuda", words[-1])]
    assert of_torch
    # CUDA's runtime is inside, and neither to be seen nor looked for outside.
    assert not [words for words in symbols if re.match("_*(cuda|cu[A-Z])", words[-1])]
    stand_in = tmp_path / "libtorch_cuda.so"
    source = tmp_path / "torch_cuda.cpp"
    source.write_text("".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in of_torch))
    run("c++", "-shared", "-fPIC", f"-Wl,-soname,{stand_in.name}", source, "-o", stand_in)
    bindings = "".join(path.read_text() for path in ROOT.glob("csrc/bindings/cuda/*.cpp"))
    ops = re.findall(r'm\.impl\("(\w+)"', bindings)
    assert ops
    said = run(sys.executable, "-c", LOADS, stand_in, LIBRARY, *ops)
    if not os.path.exists("/dev/nvidiactl"):
        assert "driver" in said  # CUDA's word for it


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_resident_warps_are_those_of_the_occupancy_calculator() -> None:
    def warps(arch: int, threads: int, registers: int, shared: int) -> int:
        return Kernel("", arch, threads, shared, Machine(registers, 0, shared, {})).resident_warps()

    assert warps(80, 256, 32, 0) == 64
    assert warps(80, 256, 64, 0) == 32
    assert warps(80, 128, 255, 0) == 8
    assert warps(80, 128, 168, 0) == 12
    assert warps(80, 32, 16, 0) == 32  # blocks
    assert warps(80, 128, 64, 82 * 1024) == 4  # shared memory: with the system's kilobyte two are too many
    assert warps(80, 128, 64, 81 * 1024) == 8
    assert warps(90, 128, 64, 75 * 1024) == 12
    assert warps(80, 1024, 65, 0) == 0
