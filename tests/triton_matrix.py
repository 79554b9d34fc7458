"""Compile every Triton kernel, in the variants that the default tables can pick, for GPUs that are not there.

    python tests/triton_matrix.py --arch 90 [--only attention] [--out FILE.json]
    python tests/triton_matrix.py --doc docs/kernels.md

The launch functions of ``fastgpt.triton_kernels`` are called on CPU tensors inside ``compiling_for``: what compiles is
what a GPU would run, and nothing runs. Each kernel's registers, spills, shared memory and instructions are printed.

Every class of the tables is here: row lengths by powers of two, head sizes, bytes of an element, dropout. Rows come in
two variants: with as much to hold as there can be (a bias, fp32 parameters, dropout, the causal mask, the gradient of a
loss) and with little. Left out, as the same code but for a constant, a conversion or one number more:

- fp16, but for one row length and two head sizes: a conversion to fp16 in the place of one to bf16;
- of row lengths that are no multiple of 16 and of those below 2048 that the tables treat alike, all but a few variants;
- of padded head sizes, all but one of each class, and those without the causal mask;
- seqlens_k and a negative scale, but for one head size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import dtype as Dtype
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from fastgpt.triton_kernels import (
    adamw,
    add_layer_norm,
    attention,
    clip_grad_norm,
    column_sum,
    cross_entropy,
    dropout,
    gelu,
    layer_norm,
    linear_cross_entropy,
    softmax,
)
from fastgpt.triton_kernels.compiled import MULTIPROCESSORS, Compiled, compiling_for

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# Batch and sequence length of the calls. The first pair compiles, the others have to find what they need.
SIZES = ((2, 16), (1, 1), (2, 1), (3, 1), (1, 16), (1, 17), (3, 17), (2, 64), (1, 100), (2, 100))

TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")

# Rows that are whole numbers of 16-byte pieces, one length for each class and one beyond them all.
LENGTHS = (768, 50304, 16, 48, 3072, 6144, 12288, 24576)
LENGTHS_OF_ONE_TILE = (32, 96, 192, 384, 1536)
LENGTHS_UNALIGNED = (1, 1001, 8191, 12289, 24577, 50257)


@dataclass(frozen=True)
class Case:
    """One variant of one file's launch functions.

    Args:
        file: the file of ``triton_kernels``.
        shape: what kernels may depend on beside dtypes and flags: "N=768".
        call: launches them for a batch and a sequence length.
        documented: whether docs/kernels.md shows it.
    """

    file: str
    shape: str
    call: Callable[[int, int], object]
    documented: bool = False


@dataclass(frozen=True)
class Kernel:
    """What one kernel came to.

    Args:
        variant: shape, dtypes and flags, in words.
        tile: the BLOCK_... constants.
        shared: bytes of shared memory of a block.
        tensor_cores: tensor-core instructions, by mnemonic.
        loads, stores: instructions on global memory, by argument and by the bytes that a thread moves at once.
            "" stands for what lies at an address that the kernel itself read from memory.
    """

    name: str
    arch: int
    variant: str
    documented: bool
    tile: dict[str, int]
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared: int
    tensor_cores: dict[str, int]
    loads: dict[str, dict[int, int]]
    stores: dict[str, dict[int, int]]


@dataclass
class Report:
    """Of one run: the kernels, what failed to compile or launch, and what compiled again for another row count."""

    kernels: list[Kernel]
    failures: list[str]
    recompiled: list[str]

    @staticmethod
    def read(path: Path) -> Report:
        """Read what ``--out`` wrote, where the keys of numbers have become strings."""
        report = Report(**json.loads(path.read_text()))
        for kernel in report.kernels:
            for kind in ("loads", "stores"):
                kernel[kind] = {name: {int(k): n for k, n in sizes.items()} for name, sizes in kernel[kind].items()}
        report.kernels = [Kernel(**kernel) for kernel in report.kernels]
        return report

    @staticmethod
    def joined(reports: Sequence[Report]) -> Report:
        fields = [field.name for field in dataclasses.fields(Report)]
        return Report(*([x for report in reports for x in getattr(report, name)] for name in fields))


# ---------------------------------------------------------------------------------------------------------------------
# The variants
# ---------------------------------------------------------------------------------------------------------------------


def _seed(p: float) -> torch.Tensor | None:
    return torch.zeros(1, dtype=torch.int64) if p else None


def _softmax(dtype: Dtype, N: int, is_causal: bool) -> Callable[[int, int], None]:
    def call(B: int, T: int) -> None:
        x = torch.empty(B, T, N, dtype=dtype)
        softmax.softmax_fwd(x, 0.5, is_causal)
        softmax.softmax_bwd(x, x, 0.5, is_causal)

    return call


def _layer_norm(dtype: Dtype, N: int, weight_dtype: Dtype, has_bias: bool) -> Callable[[int, int], None]:
    def call(B: int, T: int) -> None:
        x, weight = torch.empty(B, T, N, dtype=dtype), torch.empty(N, dtype=weight_dtype)
        _, mean, rstd = layer_norm.layer_norm_fwd(x, weight, weight if has_bias else None, 1e-5)
        layer_norm.layer_norm_bwd(x, x, weight, mean, rstd)

    return call


def _add_layer_norm(
    dtype: Dtype, N: int, residual_dtype: Dtype, weight_dtype: Dtype, has_bias: bool, p: float, last: bool = False
) -> Callable[[int, int], None]:
    def call(B: int, T: int) -> None:
        x, residual = torch.empty(B, T, N, dtype=dtype), torch.empty(B, T, N, dtype=residual_dtype)
        weight = torch.empty(N, dtype=weight_dtype)
        bias, seed = weight if has_bias else None, _seed(p)
        _, total, mean, rstd = add_layer_norm.add_layer_norm_fwd(x, residual, weight, bias, p, 1e-5, seed)
        dtotal = None if last else total
        add_layer_norm.add_layer_norm_bwd(x, dtotal, total, weight, mean, rstd, p, seed, dtype, residual_dtype)

    return call


def _gelu(dtype: Dtype, N: int, bias_dtype: Dtype | None, approximate: str) -> Callable[[int, int], None]:
    def call(B: int, T: int) -> None:
        x = torch.empty(B, T, N, dtype=dtype)
        bias = None if bias_dtype is None else torch.empty(N, dtype=bias_dtype)
        gelu.gelu_fwd(x, bias, approximate)
        gelu.gelu_bwd(x, x, bias, approximate)

    return call


def _dropout(dtype: Dtype, N: int) -> Callable[[int, int], object]:
    return lambda B, T: dropout.dropout_fwd(torch.empty(B, T, N, dtype=dtype), 0.1, torch.zeros(1, dtype=torch.int64))


def _cross_entropy(dtype: Dtype, V: int, with_gradient: bool) -> Callable[[int, int], None]:
    def call(B: int, T: int) -> None:
        logits, targets = torch.empty(B * T, V, dtype=dtype), torch.zeros(B * T, dtype=torch.int64)
        _, stats, inverse_count, dlogits = cross_entropy.cross_entropy_fwd(logits, targets, -100, with_gradient)
        if with_gradient:
            cross_entropy.scale_gradient_(dlogits, inverse_count)
            cross_entropy.cross_entropy_bwd(inverse_count, logits, targets, -100, stats, inverse_count)

    return call


def _linear_cross_entropy(dtype: Dtype, V: int, with_gradient: bool) -> Callable[[int, int], None]:
    """In chunks of at most 17 rows: a chunk may begin at any row."""

    def call(B: int, T: int) -> None:
        x, weight = torch.zeros(B * T, 8, dtype=dtype), torch.zeros(V, 8, dtype=dtype)
        targets = torch.zeros(B * T, dtype=torch.int64)
        with mock.patch.object(linear_cross_entropy, "LOGITS_AT_ONCE", 17 * V):
            linear_cross_entropy.linear_cross_entropy_fwd(x, weight, targets, -100, with_gradient)

    return call


def _adamw(*dtypes: Dtype) -> Callable[[int, int], None]:
    """Lists of B large and T small tensors, in the four dtypes."""

    def call(B: int, T: int) -> None:
        lists = [[torch.empty(n, dtype=dtype) for n in (*[1 << 14] * B, *[3] * T)] for dtype in dtypes]
        number = torch.zeros(())
        adamw.adamw_(*lists, number, number, [0.9, 0.99], 1e-8, 0.1)

    return call


def _clip_grad_norm(*dtypes: Dtype) -> Callable[[int, int], None]:
    """Lists of B large and T small tensors in each dtype; a large one has work for every program there may be."""

    def call(B: int, T: int) -> None:
        grads = [torch.empty(n, dtype=dtype) for dtype in dtypes for n in (*[1 << 21] * B, *[3] * T)]
        clip_grad_norm.clip_grad_norm_(grads, 1.0)

    return call


def _attention(
    dtype: Dtype, D: int, is_causal: bool, p: float, scale: float = 1.0, some_keys: bool = False
) -> Callable[[int, int], None]:
    """Both layouts, and other lengths of keys than of queries: for all of them the same kernels."""

    def call(B: int, T: int) -> None:
        H = 2
        seqlens_k = torch.zeros(B, dtype=torch.int32) if some_keys else None
        options = (is_causal, p, scale, seqlens_k, _seed(p))
        qkv = torch.empty(B, T, 3, H, D, dtype=dtype)
        o, lse = attention.attention_qkvpacked_fwd(qkv, *options)
        attention.attention_qkvpacked_bwd(o, qkv, o, lse, *options)
        q, k = torch.empty(B, H, T, D, dtype=dtype), torch.empty(B, H, T + 3, D, dtype=dtype)
        o, lse = attention.attention_fwd(q, k, k, *options)
        attention.attention_bwd(o, q, k, k, o, lse, *options)

    return call


def cases() -> Iterator[Case]:
    """All variants, those that docs/kernels.md shows first: a kernel that several need is named after the first."""
    yield from sorted(_all_cases(), key=lambda case: not case.documented)


def quick_cases() -> Iterator[Case]:
    """One memory-bound op and one that multiplies matrices, for a check that takes seconds."""
    yield Case("layer_norm", "N=768", _layer_norm(BF16, 768, F32, True))
    yield Case("attention", "D=64", _attention(BF16, 64, True, 0.0))


def _all_cases() -> Iterator[Case]:
    both = (BF16, F32)
    for N in (*LENGTHS, *LENGTHS_UNALIGNED):
        for dtype in both:
            yield from _row_cases(dtype, N, documented=N in LENGTHS[:2])
    for N in LENGTHS_OF_ONE_TILE:
        yield from _row_cases(BF16, N)
    yield from _row_cases(F16, 768)
    for N in LENGTHS:
        for dtype in both:
            yield from _light_row_cases(dtype, N)
    for dtype in (BF16, F32, F16):
        yield Case("adamw", "", _adamw(*[dtype] * 4), documented=dtype in both)
        yield Case("clip_grad_norm", "", _clip_grad_norm(dtype), documented=dtype in both)
    yield Case("adamw", "", _adamw(BF16, BF16, F32, F32))
    yield Case("clip_grad_norm", "", _clip_grad_norm(BF16, F32))
    for D in (64, 128, 16, 32, 256):
        for dtype in both:
            for is_causal in (True, False):
                for p in (0.0, 0.1):
                    documented = is_causal and (D == 64 or (D == 128 and dtype == BF16))
                    yield Case("attention", f"D={D}", _attention(dtype, D, is_causal, p), documented)
    for p in (0.0, 0.1):
        for D in (40, 80, 160):
            for dtype in both:
                yield Case("attention", f"D={D}", _attention(dtype, D, True, p))
        for D in (64, 128):
            yield Case("attention", f"D={D}", _attention(F16, D, True, p))
    yield Case("attention", "D=64", _attention(BF16, 64, True, 0.1, some_keys=True))
    yield Case("attention", "D=64", _attention(BF16, 64, True, 0.1, scale=-1.0))


def _row_cases(dtype: Dtype, N: int, documented: bool = False) -> Iterator[Case]:
    shape = f"N={N}"
    yield Case("softmax", shape, _softmax(dtype, N, True), documented)
    yield Case("layer_norm", shape, _layer_norm(dtype, N, F32, True), documented)
    yield Case("add_layer_norm", shape, _add_layer_norm(dtype, N, F32, F32, True, 0.1), documented)
    yield Case("gelu", shape, _gelu(dtype, N, dtype, "tanh"), documented)
    yield Case("dropout", shape, _dropout(dtype, N), documented)
    yield Case("cross_entropy", shape, _cross_entropy(dtype, N, True), documented)


def _light_row_cases(dtype: Dtype, N: int) -> Iterator[Case]:
    shape = f"N={N}"
    yield Case("softmax", shape, _softmax(dtype, N, False))
    yield Case("layer_norm", shape, _layer_norm(dtype, N, dtype, False))
    yield Case("add_layer_norm", shape, _add_layer_norm(dtype, N, dtype, dtype, False, 0.0))
    yield Case("add_layer_norm", shape, _add_layer_norm(dtype, N, F32, F32, True, 0.0, last=True))
    yield Case("gelu", shape, _gelu(dtype, N, None, "none"))
    yield Case("gelu", shape, _gelu(dtype, N, F32, "none"))
    yield Case("cross_entropy", shape, _cross_entropy(dtype, N, False))
    yield Case("linear_cross_entropy", shape, _linear_cross_entropy(dtype, N, True))
    yield Case("linear_cross_entropy", shape, _linear_cross_entropy(dtype, N, False))


# ---------------------------------------------------------------------------------------------------------------------
# What they compile to
# ---------------------------------------------------------------------------------------------------------------------


def compile_all(arch: int, chosen: Sequence[Case]) -> Report:
    """Compile the chosen cases for ``arch``, then call them for all other ``SIZES`` too."""
    report = Report([], [], [])
    with contextlib.ExitStack() as stack:
        for module in (column_sum, gelu, clip_grad_norm):
            stack.enter_context(mock.patch.object(module, "num_sms", return_value=MULTIPROCESSORS[arch]))
        compiled = stack.enter_context(compiling_for(arch))
        for case in chosen:
            before, first = len(compiled), None
            try:
                case.call(*SIZES[0])
                first = len(compiled)
                for size in SIZES[1:]:
                    case.call(*size)
            except OutOfResources as error:  # of the kernel that compiled last
                report.failures.append(f"sm_{arch} {' '.join(_words(compiled[-1], case))}: {error}")
            except TritonError as error:
                report.failures.append(f"sm_{arch} {case.file} {case.shape}: {error}")
            first = len(compiled) if first is None else first
            report.kernels += [_examine(kernel, case) for kernel in compiled[before:first]]
            report.recompiled += [f"sm_{arch} {' '.join(_words(kernel, case))}" for kernel in compiled[first:]]
    return report


def _examine(kernel: Compiled, case: Case) -> Kernel:
    name, *words = _words(kernel, case)
    resources = kernel.resources()
    loads, stores = accesses(kernel)
    return Kernel(
        name=name,
        arch=kernel.arch,
        variant=" ".join(words),
        documented=case.documented,
        tile={k: v for k, v in kernel.constants.items() if k in _TILE},
        num_warps=kernel.num_warps,
        num_stages=kernel.num_stages,
        registers=resources.registers,
        spill_bytes=resources.spill_bytes,
        shared=kernel.shared,
        tensor_cores={mnemonic: n for mnemonic in TENSOR_CORES if (n := kernel.count(mnemonic))},
        loads=loads,
        stores=stores,
    )


_TILE = ("BLOCK", "BLOCK_M", "BLOCK_N", "HELD", "HELD_TOO", "PARTIALS")
_FLAGS = {"IS_CAUSAL": "causal", "TANH": "tanh", "NEGATE": "negated"}
_OPTIONAL = {
    "bias_ptr": "bias",
    "seed_ptr": "dropout",
    "seqlens_k_ptr": "seqlens_k",
    "dx_ptr": "dx",
    "dresidual_out_ptr": "dresidual_out",
    "second_ptr": "second",
    "grad_scale_ptr": "grad_scale",
    "dlogits_ptr": "dlogits",
}
# Kept in fp32 whatever the dtype of the rest.
_ALWAYS_F32 = re.compile(r"(lse|delta|mean|rstd|partial|stats|losses|grad_scale|factor|norm|step|lr)_ptr")


def _words(kernel: Compiled, case: Case) -> list[str]:
    """The kernel's name, and what it was specialised on: shape, dtypes, the options it was given."""
    dtypes = {}
    for name, ty in kernel.signature.items():
        found = re.search(r"\*((?:fp|bf)\d+)", str(ty))
        if found and not _ALWAYS_F32.fullmatch(name):
            dtypes[name.removesuffix("_ptr")] = found[1]
    dtypes |= {name.lower(): str(value) for name, value in kernel.constants.items() if isinstance(value, tl.dtype)}
    main = next(iter(dtypes.values()), "")
    others = {ty: [name for name in dtypes if dtypes[name] == ty] for ty in dtypes.values() if ty != main}
    words = [case.shape, main] + [f"({', '.join(names)} {ty})" for ty, names in others.items()]
    words += [word for flag, word in _FLAGS.items() if kernel.constants.get(flag)]
    words += [word for name, word in _OPTIONAL.items() if name in kernel.signature]
    return [kernel.name, *filter(None, words)]


_INSTRUCTION = re.compile(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*?);")
_REGISTER = re.compile(r"%(?!p\d)\w+")
Accesses = dict[str, dict[int, int]]


def accesses(kernel: Compiled) -> tuple[Accesses, Accesses]:
    """Global loads and stores: how many instructions, by argument and by the bytes that a thread moves at once.

    An address is followed back through the PTX to the argument that it was computed from; one that was itself read
    from memory counts for the argument "".
    """
    pointers = [name if str(ty).startswith("*") else "" for name, ty in _flat(kernel.signature)]
    instructions = [found.groups() for line in kernel.ptx.splitlines() if (found := _INSTRUCTION.match(line))]
    origins: dict[str, set[str]] = defaultdict(set)
    before = -1
    while before != (before := sum(map(len, origins.values()))):
        for opcode, operands in instructions:
            if opcode.startswith("ld.param"):
                register, index = re.fullmatch(r"(%\w+), \[\w+?_param_(\d+)(?:\+\d+)?\]", operands).groups()
                if int(index) < len(pointers):
                    origins[register] |= {pointers[int(index)]} - {""}
            elif not opcode.startswith(("ld.", "st.")):
                target, *sources = _operands(operands)
                for source in sources:
                    for register in _REGISTER.findall(target):
                        origins[register] |= set().union(*(origins[name] for name in _REGISTER.findall(source)))
    loads: dict[str, Counter[int]] = defaultdict(Counter)
    stores: dict[str, Counter[int]] = defaultdict(Counter)
    for opcode, operands in instructions:
        kind, *parts = opcode.split(".")
        if "global" not in parts or kind not in ("ld", "st", "cp"):
            continue
        places = re.findall(r"\[([^\]]*)\]", operands)
        origin = set().union(*(origins[name] for name in _REGISTER.findall(places[-1])))
        if kind == "cp":
            size = int(operands.split(",")[2], 0)
        else:
            length = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d+", part)), 1)
            size = length * int(re.sub(r"\D", "", parts[-1])) // 8
        (stores if kind == "st" else loads)["/".join(sorted(origin))][size] += 1
    return _plain(loads), _plain(stores)


def _flat(signature: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, ty in signature.items():
        yield from ((name, part) for part in (ty if isinstance(ty, tuple) else (ty,)))


def _operands(operands: str) -> list[str]:
    """Split at the commas that are not within braces or brackets."""
    return re.split(r",\s*(?![^{\[]*[}\]])", operands)


def _plain(counts: dict[str, Counter[int]]) -> Accesses:
    return {name: dict(sorted(sizes.items())) for name, sizes in sorted(counts.items())}


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

MARK = "<!-- what follows is written by `make kernel-table` -->"
_HEADER = """\
| kernel | variant | tile | warps | stages | registers | spilled | shared | tensor cores | loads | stores |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def table(kernels: Sequence[Kernel]) -> str:
    return _HEADER + "".join(map(_line, sorted(kernels, key=lambda kernel: (kernel.name, kernel.variant))))


def _line(kernel: Kernel) -> str:
    cells = (
        kernel.name.strip("_").removesuffix("_kernel"),
        kernel.variant,
        " x ".join(str(size) for size in kernel.tile.values()),
        kernel.num_warps,
        kernel.num_stages,
        kernel.registers,
        kernel.spill_bytes,
        kernel.shared,
        ", ".join(f"{n} {mnemonic}" for mnemonic, n in kernel.tensor_cores.items()),
        _widths(kernel.loads),
        _widths(kernel.stores),
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def _widths(counts: Accesses) -> str:
    total: Counter[int] = Counter()
    for sizes in counts.values():
        total.update(sizes)
    return ", ".join(f"{n} of {size}" for size, n in sorted(total.items(), reverse=True))


def document(kernels: Sequence[Kernel]) -> str:
    """The generated part of docs/kernels.md."""
    shown = [kernel for kernel in kernels if kernel.documented]
    parts = [f"{MARK}\n\nTriton {triton.__version__}.\n"]
    for arch in sorted({kernel.arch for kernel in shown}):
        parts.append(f"\n## sm_{arch}\n\n" + table([kernel for kernel in shown if kernel.arch == arch]))
    return "".join(parts)


def write_document(path: Path, archs: Sequence[int]) -> Report:
    chosen = [case for case in cases() if case.documented]
    report = Report.joined([compile_all(arch, chosen) for arch in archs])
    path.write_text(path.read_text().split(MARK)[0] + document(report.kernels))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="the compute capability: 90 for sm_90")
    parser.add_argument("--only", action="append", help="a file of triton_kernels; may be given several times")
    parser.add_argument("--quick", action="store_true", help="one layer norm and one attention")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--doc", type=Path, help="write the documented part for sm_80, sm_90 and sm_100 into this file")
    args = parser.parse_args()
    if args.doc:
        report = write_document(args.doc, (80, 90, 100))
    else:
        candidates = quick_cases() if args.quick else cases()
        report = compile_all(args.arch, [case for case in candidates if not args.only or case.file in args.only])
    if args.out:
        args.out.write_text(json.dumps(dataclasses.asdict(report)))
    print(table(report.kernels))
    for line in report.failures:
        print(f"failed: {line}")
    for line in report.recompiled:
        print(f"compiled again for another row count: {line}")


if __name__ == "__main__":
    main()
