"""Better block shapes for the GPU at hand: what `fastgpt tune` measures and stores.

A case below is a few calls of a kernel file's functions, at the shapes of a model's training step. Which kernels a call
launches, for which shape class and with which default, the launch code itself says (``launch.recording``), on meta
tensors and with nothing launched. Each kernel and shape class is then tuned through the first call that asks for it.

Times are those of a whole call: a kernel that is a small part of one, as attention's delta is, has little to win and
keeps its default.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError
from triton.runtime import KernelInterface, OutOfResources

from fastgpt.triton_kernels.adamw import adamw_
from fastgpt.triton_kernels.add_layer_norm import add_layer_norm_bwd, add_layer_norm_fwd
from fastgpt.triton_kernels.attention import attention_qkvpacked_bwd, attention_qkvpacked_fwd
from fastgpt.triton_kernels.clip_grad_norm import clip_grad_norm_
from fastgpt.triton_kernels.column_sum import column_sum, partial_sums
from fastgpt.triton_kernels.cross_entropy import cross_entropy_bwd, cross_entropy_fwd, scale_gradient_
from fastgpt.triton_kernels.dropout import dropout_fwd
from fastgpt.triton_kernels.gelu import gelu_bwd, gelu_fwd
from fastgpt.triton_kernels.launch import (
    Asked,
    Blocks,
    StoredBlocksError,
    forced_blocks,
    generation,
    listed,
    read_blocks,
    recording,
    tuned_blocks,
    write_blocks,
)
from fastgpt.triton_kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
from fastgpt.triton_kernels.linear_cross_entropy import LOGITS_AT_ONCE
from fastgpt.triton_kernels.softmax import softmax_bwd, softmax_fwd

# What a candidate must win to be stored, and the rounds of the measurement that decides it.
LEAST_GAIN = 0.02
ROUNDS = 5

# Elements of a tensor beyond which a case leaves out rows: a GPU is long busy by then, and its memory may be short.
MOST_ELEMENTS = 1 << 27

# Parameters, their gradients and the residual stream are fp32, whatever autocast does to activations.
MASTER = torch.float32

Call = Callable[[], Any]


@dataclass(frozen=True)
class Workload:
    """The training step to tune for, named as in ``GPTConfig``; ``vocab_size`` padded, ``dtype`` of activations."""

    batch_size: int
    block_size: int
    n_head: int
    n_embd: int
    vocab_size: int
    dropout: float
    bias: bool
    gelu: str
    dtype: torch.dtype


class Job(NamedTuple):
    """A kernel and shape class to tune: what its launch asked for, and a call that launches it, on fresh inputs."""

    kernel: str
    shape_class: str
    asked: Asked
    make: Callable[[torch.device], Call]


class Result(NamedTuple):
    """The best options, None where those are the default; times in ms; the candidates that did not run, by reason."""

    blocks: Blocks | None
    default_ms: float
    ms: float
    skipped: Counter[str]


# ---------------------------------------------------------------------------------------------------------------------
# The cases: inputs on a device, and calls that return what they computed
# ---------------------------------------------------------------------------------------------------------------------


def _column_sum(w: Workload, device: torch.device) -> list[Call]:
    partial = partial_sums(2, _tokens(w, w.n_embd), w.n_embd, device).normal_()
    return [lambda: column_sum(partial, MASTER)]


def _attention(w: Workload, device: torch.device) -> list[Call]:
    batch = max(1, _tokens(w, 3 * w.n_embd) // w.block_size)
    qkv = torch.randn(batch, w.block_size, 3, w.n_head, w.n_embd // w.n_head, dtype=w.dtype, device=device)
    options = (True, w.dropout, (w.n_embd // w.n_head) ** -0.5, None, _seed(w.dropout, device))
    o, lse = attention_qkvpacked_fwd(qkv, *options)
    do = torch.randn_like(o)
    return [
        lambda: attention_qkvpacked_fwd(qkv, *options),
        lambda: attention_qkvpacked_bwd(do, qkv, o, lse, *options),
    ]


def _softmax(w: Workload, device: torch.device) -> list[Call]:
    T = w.block_size
    x, dy = (torch.randn(_heads(w), T, T, dtype=w.dtype, device=device) for _ in range(2))
    y = softmax_fwd(x, 1.0, True)
    return [lambda: softmax_fwd(x, 1.0, True), lambda: softmax_bwd(dy, y, 1.0, True)]


def _layer_norm(w: Workload, device: torch.device) -> list[Call]:
    x, dy = (torch.randn(_tokens(w, w.n_embd), w.n_embd, dtype=MASTER, device=device) for _ in range(2))
    weight, bias = _weight_and_bias(w, w.n_embd, device)
    _, mean, rstd = layer_norm_fwd(x, weight, bias, 1e-5)
    return [lambda: layer_norm_fwd(x, weight, bias, 1e-5), lambda: layer_norm_bwd(dy, x, weight, mean, rstd)]


def _add_layer_norm(w: Workload, device: torch.device) -> list[Call]:
    shape = (_tokens(w, w.n_embd), w.n_embd)
    x, dy = (torch.randn(shape, dtype=w.dtype, device=device) for _ in range(2))
    residual, dresidual_out = (torch.randn(shape, dtype=MASTER, device=device) for _ in range(2))
    weight, bias = _weight_and_bias(w, w.n_embd, device)
    p, seed = w.dropout, _seed(w.dropout, device)
    _, residual_out, mean, rstd = add_layer_norm_fwd(x, residual, weight, bias, p, 1e-5, seed)
    return [
        lambda: add_layer_norm_fwd(x, residual, weight, bias, p, 1e-5, seed),
        lambda: add_layer_norm_bwd(
            dy, dresidual_out, residual_out, weight, mean, rstd, p, seed, x.dtype, residual.dtype
        ),
    ]


def _gelu(w: Workload, device: torch.device) -> list[Call]:
    width = 4 * w.n_embd
    x, dy = (torch.randn(_tokens(w, width), width, dtype=w.dtype, device=device) for _ in range(2))
    _, bias = _weight_and_bias(w, width, device)
    return [lambda: gelu_fwd(x, bias, w.gelu), lambda: gelu_bwd(dy, x, bias, w.gelu)]


def _dropout(w: Workload, device: torch.device) -> list[Call]:
    T = w.block_size
    embedding = torch.randn(_tokens(w, w.n_embd), w.n_embd, dtype=MASTER, device=device)
    weights = torch.randn(_heads(w) * T, T, dtype=w.dtype, device=device)
    p = w.dropout or 0.1  # a model without dropout never calls it
    seed = _seed(p, device)
    return [lambda: dropout_fwd(embedding, p, seed), lambda: dropout_fwd(weights, p, seed)]


def _cross_entropy(w: Workload, device: torch.device) -> list[Call]:
    # As many rows as linear_cross_entropy hands over at a time.
    rows = _tokens(w, w.vocab_size, LOGITS_AT_ONCE)
    logits = torch.randn(rows, w.vocab_size, dtype=w.dtype, device=device)
    targets = torch.randint(w.vocab_size, (rows,), device=device)
    _, stats, inverse_count, gradient = cross_entropy_fwd(logits, targets, -100, True)
    dloss = torch.ones((), device=device)

    def scale() -> Tensor:
        scale_gradient_(gradient, -dloss)  # by 1 it would move nothing, and by anything else run away
        return gradient

    return [
        lambda: cross_entropy_fwd(logits, targets, -100, True),
        lambda: cross_entropy_bwd(dloss, logits, targets, -100, stats, inverse_count),
        scale,
    ]


def _adamw(w: Workload, device: torch.device) -> list[Call]:
    params, grads, exp_avgs = (_like_parameters(w, device) for _ in range(3))
    exp_avg_sqs = [x.square() for x in _like_parameters(w, device)]
    step, lr = torch.ones((), device=device), torch.full((), 1e-4, device=device)

    def run() -> list[Tensor]:
        adamw_(params, grads, exp_avgs, exp_avg_sqs, step, lr, [0.9, 0.95], 1e-8, 0.1)
        return [*params, *exp_avgs, *exp_avg_sqs]

    return [run]


def _clip_grad_norm(w: Workload, device: torch.device) -> list[Call]:
    grads = _like_parameters(w, device)
    # To a norm of 0: any other would leave nothing to clip for the calls after the first.
    return [lambda: [clip_grad_norm_(grads, 0.0), *grads]]


# column_sum comes first: other calls launch it too, but spend little of their time in it.
CASES: tuple[Callable[[Workload, torch.device], list[Call]], ...] = (
    _column_sum,
    _attention,
    _softmax,
    _layer_norm,
    _add_layer_norm,
    _gelu,
    _dropout,
    _cross_entropy,
    _adamw,
    _clip_grad_norm,
)


def _tokens(w: Workload, width: int, most: int = MOST_ELEMENTS) -> int:
    """Rows of ``width``: a step's tokens, but not more than ``most`` elements."""
    return max(1, min(w.batch_size * w.block_size, most // width))


def _heads(w: Workload) -> int:
    """Matrices of attention weights: a step's, but not more than ``MOST_ELEMENTS``."""
    return max(1, min(w.batch_size * w.n_head, MOST_ELEMENTS // w.block_size**2))


def _seed(dropout_p: float, device: torch.device) -> Tensor | None:
    return torch.ones(1, dtype=torch.int64, device=device) if dropout_p else None


def _weight_and_bias(w: Workload, width: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    weight, bias = (torch.randn(width, dtype=MASTER, device=device) for _ in range(2))
    return weight, bias if w.bias else None


def _like_parameters(w: Workload, device: torch.device) -> list[Tensor]:
    """Tensors of the sizes of the embedding's and two blocks' parameters: more than any GPU's L2 holds, in a GPT-2."""
    C = w.n_embd
    block = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (C,), (C,)]
    return [torch.randn(size, dtype=MASTER, device=device) for size in [(w.vocab_size, C), *block, *block]]


# ---------------------------------------------------------------------------------------------------------------------
# What there is to tune
# ---------------------------------------------------------------------------------------------------------------------


def jobs(workload: Workload, generation: int) -> list[Job]:
    """Every kernel and shape class of the workload, with the defaults of a GPU generation; needs no GPU."""
    found: dict[tuple[str, str], Job] = {}
    meta = torch.device("meta")
    with _launching_nothing():
        for case in CASES:
            with recording(generation):
                calls = case(workload, meta)
            for index, call in enumerate(calls):
                with recording(generation) as asked:
                    call()
                make = functools.partial(_fresh_call, case, workload, index)
                for (kernel, shape_class), what in asked.items():
                    found.setdefault((kernel, shape_class), Job(kernel, shape_class, what, make))
    return list(found.values())


def _fresh_call(
    case: Callable[[Workload, torch.device], list[Call]], workload: Workload, index: int, device: torch.device
) -> Call:
    torch.manual_seed(0)
    return case(workload, device)[index]


@contextlib.contextmanager
def _launching_nothing() -> Iterator[None]:
    launch = KernelInterface.__getitem__
    KernelInterface.__getitem__ = lambda self, grid: lambda *args, **options: None
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launch


def candidates(job: Job) -> list[Blocks]:
    """What to try beside the default: each block size and the warps halved or doubled, and a stage more or less.

    A warp's share of a block stays within half and twice the default's, and its share of one side within twice: beyond,
    it runs out of registers, or of work.
    """
    default = job.asked.default
    free = {name: _choices(job, name) for name in default if name not in job.asked.fixed}
    tried = ({**default, **dict(zip(free, values, strict=True))} for values in itertools.product(*free.values()))
    return [blocks for blocks in tried if blocks != default and _is_sensible(blocks, default)]


def _choices(job: Job, name: str) -> list[int]:
    value = job.asked.default[name]
    if name == "num_stages":
        return [n for n in (value - 1, value, value + 1) if 1 <= n <= 4]
    if name == "num_warps":
        return [n for n in (value // 2, value, value * 2) if 1 <= n <= 32]
    if not name.startswith("BLOCK"):
        return [value]
    # A matrix product takes no side below 16; dropout's bits come four columns at a time.
    least = 16 if job.kernel.startswith("attention") else 4 if name == "BLOCK_N" else 1
    return [n for n in (value // 2, value, value * 2) if n >= min(least, value)]


def _is_sensible(blocks: Blocks, default: Blocks) -> bool:
    warps = blocks["num_warps"] / default["num_warps"]
    sides = [blocks[name] / default[name] for name in default if name.startswith("BLOCK")]
    return 0.5 <= math.prod(sides) / warps <= 2 and max(sides) / warps <= 2


# ---------------------------------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------------------------------


def median_ms(call: Call) -> float:
    """The median time of ``call`` on the current GPU, each time with a cold L2 cache."""
    return triton.testing.do_bench(call, return_mode="median")


def tune(
    todo: Sequence[Job],
    device: torch.device,
    path: Path,
    say: Callable[[str], None],
    timer: Callable[[Call], float] = median_ms,
) -> None:
    """Do the jobs on ``device`` one by one, and write what each one found into the table in ``path`` at once.

    Args:
        todo: of ``jobs``.
        device: the current one.
        path: of ``launch.cache_file``; what it holds of other kernels and shape classes stays.
        say: told a line for each job, and for what else a user should know.
        timer: times a call.
    """
    write_blocks(path, _table_in(path, say))  # a place that cannot be written should be known before the measuring
    for job in todo:
        # Whatever was stored before: the default is what a candidate has to beat.
        with recording(generation(device)):
            try:
                result = search(job, device, say, timer)
            except TritonError as error:
                say(f"{job.kernel}, {job.shape_class}: left alone, for its default does not run: {_reason(error)}")
                continue
        table = _table_in(path, say)
        # The kernel's entries of an older fastgpt, with other options, go: a launch would refuse them.
        of_kernel = {k: v for k, v in table.pop(job.kernel, {}).items() if v.keys() == job.asked.default.keys()}
        of_kernel.pop(job.shape_class, None)
        if result.blocks is not None:
            of_kernel[job.shape_class] = result.blocks
        write_blocks(path, {**table, job.kernel: of_kernel} if of_kernel else table)
        tuned_blocks.cache_clear()
        say(_describe(job, result))


def search(job: Job, device: torch.device, say: Callable[[str], None], timer: Callable[[Call], float]) -> Result:
    """The fastest candidate that gives the default's result, if it is faster than that by more than ``LEAST_GAIN``.

    Raises:
        TritonError: the default does not run.
    """
    default = job.asked.default
    truth = _results(job, default, device)
    call = job.make(device)

    def timed(blocks: Blocks) -> float:
        with forced_blocks(job.kernel, blocks):
            return timer(call)

    best, best_ms = default, timed(default)
    default_ms, skipped = best_ms, Counter[str]()
    for blocks in candidates(job):
        try:
            right = _agree(_results(job, blocks, device), truth)
            ms = timed(blocks) if right else math.inf
        except TritonError as error:
            skipped[_reason(error)] += 1
            continue
        except RuntimeError as error:
            if "PassManager" not in str(error):  # how Triton's compiler fails; any other has to be seen
                raise
            skipped["the compiler failed"] += 1
            continue
        if not right:
            say(f"{job.kernel}, {job.shape_class}: a wrong result with {listed(blocks)}, which is left out")
        if ms < best_ms:
            best, best_ms = blocks, ms
    if best is default:
        return Result(None, default_ms, default_ms, skipped)
    # The fastest of many may be just the luckiest. In turns, a GPU that slows down slows both.
    rounds = [(timed(default), timed(best)) for _ in range(ROUNDS)]
    default_ms, best_ms = (statistics.median(times) for times in zip(*rounds, strict=True))
    if best_ms < (1 - LEAST_GAIN) * default_ms:
        return Result(best, default_ms, best_ms, skipped)
    return Result(None, default_ms, default_ms, skipped)


def _results(job: Job, blocks: Blocks, device: torch.device) -> list[Tensor]:
    """What the job's call computes from fresh inputs, since some calls work in place."""
    call = job.make(device)
    with forced_blocks(job.kernel, blocks):
        results = call()
    return [results] if isinstance(results, Tensor) else list(results)


def _agree(results: list[Tensor], truth: list[Tensor]) -> bool:
    """Whether all are the same but for rounding, of sums in another order and of results to their dtype."""
    for x, y in zip(results, truth, strict=True):
        if y.numel():
            allowed = max(2 * torch.finfo(y.dtype).eps, 2**-14) * y.abs().max().float()
            if not bool(((x.float() - y.float()).abs() <= allowed).all()):
                return False
    return True


def _table_in(path: Path, say: Callable[[str], None]) -> dict[str, dict[str, Blocks]]:
    try:
        return read_blocks(path)
    except StoredBlocksError:
        say(f"{path} was damaged and begins anew")
        return {}


def _reason(error: TritonError) -> str:
    """One line for what a launch failed for; Triton's own gives the source and then, last, the message."""
    if isinstance(error, OutOfResources):
        return f"out of {error.name}"
    return (str(error).splitlines() or [type(error).__name__])[-1]


def _describe(job: Job, result: Result) -> str:
    line = f"{job.kernel}, {job.shape_class}: {result.default_ms:.4g} ms"
    if result.blocks is None:
        line += ", the default stays"
    else:
        line += f", {1 - result.ms / result.default_ms:.1%} less with {listed(result.blocks)}"
    if result.skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in result.skipped.items())
        line += f" ({sum(result.skipped.values())} of {len(candidates(job))} candidates did not run: {reasons})"
    return line
