"""What the Triton kernels compile to for GPUs that are not here: does it fit, spill, move memory in wide pieces?

``triton_matrix.py`` compiles them, in processes of its own: in this one Triton may be interpreting. The normal tier
looks at two ops on one chip, the full tier at every variant on three.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import triton
from triton_matrix import MARK, Accesses, Kernel, Report, cases, document

import fastgpt.triton_kernels
from fastgpt.triton_kernels.compiled import SHARED_LIMIT

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "kernels.md"
ARCHS = (80, 90, 100)
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@dataclass(frozen=True)
class Allowed:
    """Spills that are no fault: of kernels and variants that match, on some chips, up to a number of bytes a thread.

    ``by_choice`` says that the thread could have had more registers: ptxas spilled to fit another block in.
    """

    reason: str
    most: int
    kernel: str
    variant: str = ""
    archs: tuple[int, ...] = ARCHS
    by_choice: bool = False

    def covers(self, kernel: Kernel) -> bool:
        room = min(255, 65536 // (32 * kernel.num_warps))
        return (
            kernel.spill_bytes <= self.most
            and kernel.arch in self.archs
            and re.search(self.kernel, kernel.name) is not None
            and re.search(self.variant, kernel.variant) is not None
            and (kernel.registers < room or not self.by_choice)
        )


ALLOWED_SPILLS = [
    Allowed("ptxas trades up to eight registers for one more block on a multiprocessor", 32, "", by_choice=True),
    Allowed(
        "rows of an odd length, which no model has, are read one by one, each by an address", 432, "", r"^N=\d*[13579] "
    ),
    Allowed(
        "dk and dv of 64 keys (wgmma takes no fewer) fill the registers", 488, "bwd_dkdv", r"^D=(160|256) bf16", (90,)
    ),
    Allowed("dropout's ten rounds beside dq of 256 columns", 96, "bwd_dq", r"^D=(160|256) bf16.* dropout", (90,)),
    Allowed(
        "four numbers: half the tile would have every query read twice as often", 16, "bwd_d", r"^D=\d+ bf16", (80,)
    ),
    Allowed("masks of a padded head beside tiles of fp32", 40, "bwd_dkdv", r"^D=40 fp32", (90, 100)),
    Allowed("32 warps leave 64 registers to rows beyond 4096", 64, "layer_norm_bwd", r"^N=6144 "),
    Allowed(
        "what a smaller share of the row would save here, it would read twice",
        48,
        "cross_entropy_fwd_long",
        r"^N=50304 ",
    ),
]

# What a memory-bound kernel reads and writes: (M, N) tensors, and lines of N that only tall tiles cut up.
ROWS = {
    *("x_ptr", "y_ptr", "dx_ptr", "dy_ptr", "logits_ptr", "dlogits_ptr"),
    *("residual_ptr", "residual_out_ptr", "dresidual_ptr", "dresidual_out_ptr"),
}
LINES = {"weight_ptr", "bias_ptr", "partial_ptr"}


def kernel_names() -> set[str]:
    files = Path(fastgpt.triton_kernels.__file__).parent.glob("*.py")
    return {name for file in files for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE)}


def run_python(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    result = subprocess.run([sys.executable, *arguments], cwd=TESTS, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_matrix(out: Path, *arguments: str) -> Report:
    run_python("triton_matrix.py", *arguments, "--out", str(out))
    return Report.read(out)


@pytest.fixture(scope="module", params=["quick", pytest.param("whole", marks=pytest.mark.full)])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("matrix")
    if request.param == "quick":
        return run_matrix(folder / "quick.json", "--arch", "90", "--quick")
    files = {case.file for case in cases()}
    # The longest first: two processes then end at about the same time.
    jobs = [(arch, only) for only in ({"attention"}, files - {"attention"}) for arch in sorted(ARCHS, reverse=True)]

    def run(job: tuple[int, set[str]]) -> Report:
        arch, only = job
        options = [option for file in sorted(only) for option in ("--only", file)]
        return run_matrix(folder / f"{arch}_{len(only)}.json", "--arch", str(arch), *options)

    with ThreadPoolExecutor(2) as pool:
        return Report.joined(list(pool.map(run, jobs)))


def named(kernel: Kernel) -> str:
    return f"sm_{kernel.arch} {kernel.name} {kernel.variant}"


def test_every_variant_compiles_and_fits(report: Report) -> None:
    assert report.failures == []
    assert [named(kernel) for kernel in report.kernels if kernel.shared > SHARED_LIMIT[kernel.arch]] == []


def test_nothing_spills_but_what_is_listed(report: Report) -> None:
    spilling = [kernel for kernel in report.kernels if kernel.spill_bytes]
    listed = [kernel for kernel in spilling if any(allowed.covers(kernel) for allowed in ALLOWED_SPILLS)]
    assert [f"{named(k)}: {k.spill_bytes} bytes, {k.registers} registers" for k in spilling if k not in listed] == []
    if {k.arch for k in report.kernels} == set(ARCHS):
        assert [allowed.reason for allowed in ALLOWED_SPILLS if not any(map(allowed.covers, spilling))] == []


def test_half_precision_attention_is_on_the_tensor_cores(report: Report) -> None:
    kernels = [k for k in report.kernels if re.fullmatch(r"_attention_(fwd|bwd_dq|bwd_dkdv)_kernel", k.name)]
    kernels = [k for k in kernels if {"bf16", "fp16"} & set(k.variant.split())]
    assert len({k.name for k in kernels}) == 3
    assert [named(k) for k in kernels if TENSOR_CORE[k.arch] not in k.tensor_cores] == []


def narrow(kernel: Kernel) -> Iterator[str]:
    """What of the (M, N) tensors a kernel moves in pieces of less than 16 bytes, and of lines of N in flat tiles."""
    wanted = ROWS | LINES if kernel.tile.get("BLOCK_M", 1) == 1 else ROWS
    for kind, accesses in (("loads", kernel.loads), ("stores", kernel.stores)):
        for argument in wanted & accesses.keys():
            few = Counter({size: n for size, n in accesses[argument].items() if size < 16})
            if argument == "logits_ptr" and "targets_ptr" in kernel.loads and kind == "loads":
                few.subtract(dict.fromkeys(few, sum(kernel.loads["targets_ptr"].values())))  # the target's own logit
            wide, single = wide_and_narrow_bytes(accesses, argument)
            if "HELD" in kernel.tile and 16 * single <= wide:
                continue  # what a row has beyond the part that is held, in pieces that leave that its registers
            if +few:
                yield f"{named(kernel)}: {kind} of {argument}: {accesses[argument]}"


def wide_and_narrow_bytes(accesses: Accesses, argument: str) -> tuple[int, int]:
    sizes = accesses.get(argument, {})
    wide = sum(size * n for size, n in sizes.items() if size >= 16)
    return wide, sum(size * n for size, n in sizes.items()) - wide


def test_memory_moves_in_pieces_of_16_bytes(report: Report) -> None:
    """Wherever a row is made of such pieces. Single numbers, a row's mean or a seed, are narrow and no matter."""
    lengths = [(kernel, re.match(r"N=(\d+) ", kernel.variant)) for kernel in report.kernels]
    aligned = [kernel for kernel, N in lengths if N and int(N[1]) % 16 == 0]
    assert [line for kernel in aligned for line in narrow(kernel)] == []
    moved = {k.name for k in aligned if (ROWS | LINES) & (k.loads.keys() | k.stores.keys())}
    # The kernels that go over lists of tensors: one branch for whole blocks, one with a mask for a tensor's last.
    for kernel in report.kernels:
        for accesses in (kernel.loads, kernel.stores):
            wide, single = wide_and_narrow_bytes(accesses, "")
            assert wide >= single, named(kernel)
            moved |= {kernel.name} if wide else set()
    attention = {name for name in kernel_names() if "attention" in name}
    assert {k.name for k in report.kernels} - attention - {"_write_addresses_kernel"} == moved


def test_no_kernel_compiles_again_for_another_row_count(report: Report) -> None:
    assert report.recompiled == []
    variants = Counter((named(kernel), *kernel.tile.values()) for kernel in report.kernels)
    assert [variant for variant, n in variants.items() if n > 1] == []


@pytest.mark.full
@pytest.mark.parametrize("report", ["whole"], indirect=True)
def test_the_matrix_has_every_kernel_and_the_document_is_its_table(report: Report) -> None:
    assert {(k.name, k.arch) for k in report.kernels} == {(name, arch) for name in kernel_names() for arch in ARCHS}
    written = MARK + DOCUMENT.read_text().split(MARK)[1]
    if f"Triton {triton.__version__}." in written:
        assert written == document(report.kernels), "run `make kernel-table`"


def test_the_document_has_every_kernel_on_every_chip() -> None:
    _, *tables = re.split(r"^## sm_\d+$", DOCUMENT.read_text().split(MARK)[1], flags=re.MULTILINE)
    assert len(tables) == len(ARCHS)
    for table in tables:
        shown = set(re.findall(r"^\| (\w+) \|", table, re.MULTILINE))
        assert {f"_{name}_kernel" for name in shown - {"kernel"}} == kernel_names()


@pytest.mark.full
def test_the_matrix_sees_what_is_wrong() -> None:
    """Too few warps for a row, tiles beyond any shared memory, and a count that a kernel is specialised on."""
    found = run_python(
        "-c",
        "from fastgpt.triton_kernels import softmax\n"
        "from fastgpt.triton_kernels.launch import forced_blocks\n"
        "import triton_matrix as m\n"
        "wide = {'BLOCK_M': 1, 'BLOCK_N': 16384, 'num_warps': 1}\n"
        "huge = {'BLOCK_M': 256, 'BLOCK_N': 256, 'num_warps': 8, 'num_stages': 4}\n"
        "norm = m.Case('softmax', 'N=12288', m._softmax(m.F32, 12288, True))\n"
        "heads = m.Case('attention', 'D=128', m._attention(m.BF16, 128, True, 0.0))\n"
        "with forced_blocks('softmax_fwd', wide), forced_blocks('attention_fwd', huge):\n"
        "    report = m.compile_all(80, [norm, heads])\n"
        "print(max(k.spill_bytes for k in report.kernels) > 0, report.failures)\n"
        "next(p for p in softmax._softmax_bwd_kernel.params if p.name == 'M').do_not_specialize = False\n"
        "print(m.compile_all(80, [norm]).recompiled)\n",
    ).splitlines()
    assert found[0].startswith("True ['sm_80 _attention_fwd_kernel D=128 bf16 causal: out of resource: shared memory")
    assert "_softmax_bwd_kernel N=12288 fp32 causal" in found[1]
