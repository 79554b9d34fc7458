"""The marks of the CPU kernels: every op and the training step beside the fastest that PyTorch has for the same.

    python -m fastgpt.benchmarks.cpu [--only attention layer_norm] [--json]

In one process ours and its peers take turns, in an order that changes from round to round. A sample is a call, or as
many calls as take 20 ms; a call of an op is its forward and its backward. A ratio is taken within a round, peer's time
by ours (above 1: ours is faster), and its median over the rounds is held to the mark. Of several peers the one with
the least median time counts. A case without a mark is reported only.

Nothing is timed that is wrong: each case's results are first compared with those of the peer in fp32. Where something
is dropped, the peer draws another mask; there ours is held to the reference backend, in fp32 and with our mask. Of
training steps the losses are compared, without dropout.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgpt
from fastgpt import GPT, dispatch, extension, ops, use_backend
from fastgpt.benchmarks.gpu_cases import largest_error
from fastgpt.benchmarks.gpu_check import REPOSITORY, commit_of, print_table, turn
from fastgpt.benchmarks.machine import OtherWork, describe_machine
from fastgpt.benchmarks.plain import PlainGPT
from fastgpt.benchmarks.training_step import (
    FEWEST_ROUNDS,
    VOCAB_SIZE,
    Batch,
    Competitor,
    check_losses,
    fastgpt_competitor,
    import_nanogpt,
    nanogpt_competitor,
    plain_competitor,
    random_batches,
    step,
)
from fastgpt.config import PRESETS, GPTConfig, TrainConfig
from fastgpt.files import write_atomically
from fastgpt.optim import AdamW, gradients

OURS = "fastgpt"
FP32, BF16 = torch.float32, torch.bfloat16
# ||result - truth|| / ||truth||. Loose: it is the tests that say whether a kernel is right, and PyTorch's own layer
# norm, which sums its parameters' gradients in bf16, is off by 0.07.
ALLOWED_ERROR = {FP32: 1e-3, BF16: 0.1}
SAMPLE_SECONDS = 0.02
DROPOUT = 0.2
DTYPES = (FP32, BF16)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says about the cases."""

    backend: str = "cpp"
    nanogpt: Path | None = None
    quick: bool = False

    def fit(self, *sizes: int) -> tuple[int, ...]:
        return tuple(min(size, 16) for size in sizes) if self.quick else sizes


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed under one name.

    Args:
        name: the op, or what else it is, and the sizes.
        contestants: calls, ``OURS`` and its peers.
        marks: by the peers of which the fastest counts, the least that the ratio may be; None sets no mark.
        check: raises SystemExit where ours is wrong.
    """

    name: str
    contestants: dict[str, Callable[[], Any]]
    marks: dict[tuple[str, ...], float | None]
    check: Callable[[], None]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt.benchmarks.cpu",
        description="Hold the CPU kernels to their marks: each op, and the training step, beside PyTorch's.",
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--backend", choices=dispatch.BACKENDS, default="cpp", help="ours; default: cpp")
    parser.add_argument("--rounds", type=int, default=9, help=f"default: 9; at least {FEWEST_ROUNDS}")
    parser.add_argument(
        "--nanogpt", type=Path, help="a checkout of nanoGPT, whose model.py is then the peer in training"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, one round, no torch.compile: only to try it out"
    )
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=REPOSITORY / "benchmarks" / "results",
        metavar="FOLDER",
        help="write every sample to a file in this folder; without one named: %(const)s",
    )
    args = parser.parse_args(argv)
    if args.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds must be at least {FEWEST_ROUNDS}, got {args.rounds}")
    if args.nanogpt and not (args.nanogpt / "model.py").is_file():
        parser.error(f"--nanogpt: there is no model.py in {args.nanogpt}")
    for op in dispatch.OPS:
        reason = dispatch.reason_against(op, args.backend, "cpu", FP32)
        if reason is not None:
            parser.error(f"--backend {args.backend}: {reason}")

    machine = {
        **describe_machine(),
        "isa": None if extension.cpp_missing() else extension.isa(),
        "fastgpt": fastgpt.__version__,
        "commit": commit_of(REPOSITORY),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; fastgpt {machine['fastgpt']}, "
        f"backend {args.backend}, C++ kernels for {machine['isa'] or 'nothing'}; torch {machine['torch']}, "
        f"Python {machine['python']}; load average {machine['load_before']:.2f}"
    )
    options = Options(args.backend, args.nanogpt, args.quick)
    rounds, seconds = (1, 0.0) if args.quick else (args.rounds, SAMPLE_SECONDS)
    results = []
    others = OtherWork()
    for group in dict.fromkeys(args.only):
        found = []
        torch.manual_seed(0)
        with use_backend(args.backend):
            for case in GROUPS[group](options):
                found += run_case(case, rounds, seconds, others)
        print(f"\n{group}")
        report(found)
        results += [{"group": group, **result} for result in found]
    machine["load_after"] = os.getloadavg()[0]
    machine["others_cores"] = others.cores
    reached = [result["reached"] for result in results if result["reached"] is not None]
    print(
        f"\n{sum(reached)} of {len(reached)} marks reached, medians of {rounds} rounds. Load average after: "
        f"{machine['load_after']:.2f} (our own work is in it).\n{others}"
    )
    if args.quick:
        print("--quick: none of these figures means anything.")
    if args.json:
        settings = {"backend": args.backend, "rounds": rounds, "quick": args.quick, "nanogpt": args.nanogpt is not None}
        content = {"machine": machine, "settings": settings, "results": results}
        path = args.json / f"cpu_{machine['date'].partition('+')[0].replace(':', '-')}.json"
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
        print(path)


def run_case(case: Case, rounds: int, seconds: float, others: OtherWork) -> list[dict[str, Any]]:
    """Check the case, then time it.

    Args:
        case: whose contestants to time.
        rounds: samples of each.
        seconds: that a sample lasts at least.
        others: counts what other programs do meanwhile.
    Returns:
        For each of the case's marks what ``--json`` writes.
    Raises:
        SystemExit: ours is wrong.
    """
    case.check()
    gc.collect()
    samples: dict[str, list[float]] = {name: [] for name in case.contestants}
    for call in case.contestants.values():
        sample_ms(call, seconds)
    here = OtherWork()
    with others, here:
        for number in range(rounds):
            for name in turn(list(samples), number):
                samples[name].append(sample_ms(case.contestants[name], seconds))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    results = []
    for peers, mark in case.marks.items():
        peer = min(peers, key=medians.__getitem__)
        ratios = [theirs / ours for theirs, ours in zip(samples[peer], samples[OURS], strict=True)]
        ratio = statistics.median(ratios)
        results.append(
            {
                "case": case.name,
                "peer": peer,
                "peers": peers,
                "ours_ms": medians[OURS],
                "peer_ms": medians[peer],
                "ratio": {"median": ratio, "min": min(ratios), "max": max(ratios)},
                "mark": mark,
                "reached": None if mark is None else ratio >= mark,
                "others_cores": here.cores,
                "samples_ms": {name: samples[name] for name in (OURS, *peers)},
            }
        )
    return results


def sample_ms(call: Callable[[], Any], seconds: float) -> float:
    """The mean time of a call, over as many of them as take ``seconds``, but at least one."""
    start = time.perf_counter()
    count, elapsed = 0, 0.0
    while not count or elapsed < seconds:
        call()
        count += 1
        elapsed = time.perf_counter() - start
    return 1e3 * elapsed / count


def report(results: Sequence[dict[str, Any]]) -> None:
    """Print a group's table."""
    rows = []
    for result in results:
        verdict = {None: "", True: "pass", False: "falls short"}[result["reached"]]
        others = result["others_cores"]
        rows.append(
            (
                f"  {result['case']}",
                f"{result['ours_ms']:.3f}",
                f"{result['peer_ms']:.3f}",
                result["peer"],
                "{median:.2f}x ({min:.2f}, {max:.2f})".format_map(result["ratio"]),
                "" if result["mark"] is None else f"{result['mark']:.1f}x",
                verdict,
                "" if others is None else f"{others:.2f}",
            )
        )
    print_table(("", "ours, ms", "peer, ms", "peer", "ratio (min, max)", "mark", "", "others' cores"), rows)


# ---------------------------------------------------------------------------------------------------------------------
# The cases, by group. Sizes are named as in the ops' docstrings.
# ---------------------------------------------------------------------------------------------------------------------


def attention_cases(options: Options) -> Iterator[Case]:
    """On q, k and v as they are; and on the projection's output, which the peer takes apart as nanoGPT does."""
    short, long = (12, 6, 256, 64), (4, 12, 1024, 64)
    for sizes, dtype, dropout_p, mark in (
        (short, BF16, 0.0, 2.0),
        (short, FP32, 0.0, 1.3),
        (long, BF16, 0.0, 1.5),
        (long, FP32, 0.0, 1.1),
        (short, FP32, DROPOUT, 3.0),
    ):
        B, H, T, D = options.fit(*sizes)
        name = f"B{B} H{H} T{T} D{D}" + (f", dropout {dropout_p}" if dropout_p else "")
        yield differentiable(
            f"attention {name}",
            mark,
            partial(ops.attention, dropout_p=dropout_p),
            partial(F.scaled_dot_product_attention, is_causal=True, dropout_p=dropout_p),
            leaves(dtype, *[(B, H, T, D)] * 3),
            "SDPA",
            drops=dropout_p > 0,
        )
        yield differentiable(
            f"attention_qkvpacked {name}",
            None,
            partial(packed_attention, heads=H, dropout_p=dropout_p),
            partial(split_attention, heads=H, dropout_p=dropout_p),
            leaves(dtype, (B, T, 3 * H * D)),
            "split, transpose, SDPA",
            drops=dropout_p > 0,
        )


def packed_attention(x: Tensor, heads: int, dropout_p: float) -> Tensor:
    return ops.attention_qkvpacked(x.unflatten(-1, (3, heads, -1)), dropout_p=dropout_p).flatten(-2)  # (B, T, H * D)


def split_attention(x: Tensor, heads: int, dropout_p: float) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in x.chunk(3, dim=-1))  # (B, H, T, D)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)  # (B, H, T, D)
    return y.transpose(1, 2).contiguous().flatten(-2)  # (B, T, H * D)


def softmax_cases(options: Options) -> Iterator[Case]:
    for sizes, dtype in itertools.product(((12, 6, 256), (4, 12, 1024)), DTYPES):
        B, H, T = options.fit(*sizes)
        name = f"softmax {B * H * T} x {T}"
        yield differentiable(name, 1.0, ops.softmax, plain_softmax, leaves(dtype, (B, H, T, T)))
        yield differentiable(
            f"{name}, causal",
            1.5,
            partial(ops.softmax, scale=0.125, is_causal=True),
            partial(masked_softmax, scale=0.125, hidden=torch.ones(T, T, dtype=torch.bool).triu(1)),
            leaves(dtype, (B, H, T, T)),
            "scale, mask, softmax",
        )


def plain_softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, dim=-1)


def masked_softmax(x: Tensor, scale: float, hidden: Tensor) -> Tensor:
    return torch.softmax((x * scale).masked_fill(hidden, -torch.inf), dim=-1)


def layer_norm_cases(options: Options) -> Iterator[Case]:
    for name, rows, parameters in norm_shapes(options):
        for dtype in DTYPES:
            inputs = leaves(dtype, rows, *parameters)
            yield differentiable(f"layer_norm {name}", 1.0, ops.layer_norm, plain_layer_norm, inputs)


def add_layer_norm_cases(options: Options) -> Iterator[Case]:
    for name, rows, parameters in norm_shapes(options):
        for dtype in DTYPES:
            yield differentiable(
                f"add_layer_norm {name}, dropout {DROPOUT}",
                2.0,
                partial(ops.add_layer_norm, dropout_p=DROPOUT),
                plain_add_layer_norm,
                leaves(dtype, rows, rows, *parameters),
                "dropout, add, layer_norm",
                drops=True,
            )


def norm_shapes(options: Options) -> Iterator[tuple[str, tuple[int, ...], list[tuple[int, ...]]]]:
    """Name, rows and parameters: without a bias, as the 10.65M model has it, and with one, as GPT-2 has it."""
    for sizes, bias in (((3072, 384), False), ((4096, 768), True)):
        M, N = options.fit(*sizes)
        yield f"{M} x {N}" + (", bias" if bias else ""), (M, N), [(N,)] * (1 + bias)


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def plain_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    residual = F.dropout(x, DROPOUT) + residual
    return F.layer_norm(residual, weight.shape, weight, bias), residual


def gelu_cases(options: Options) -> Iterator[Case]:
    shapes = ((3072, 1536), (4096, 3072))
    for sizes, approximate, dtype in itertools.product(shapes, ("none", "tanh"), DTYPES):
        M, N = options.fit(*sizes)
        name = f"gelu {M} x {N}" + (", tanh" if approximate == "tanh" else "")
        ours = partial(ops.gelu, approximate=approximate)
        yield differentiable(name, 1.0, ours, partial(F.gelu, approximate=approximate), leaves(dtype, (M, N)))
        peer = partial(plain_bias_gelu, approximate=approximate)
        yield differentiable(f"{name}, bias", 1.5, ours, peer, leaves(dtype, (M, N), (N,)), "add, gelu")


def plain_bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(x + bias, approximate=approximate)


def cross_entropy_cases(options: Options) -> Iterator[Case]:
    for sizes, dtype in itertools.product(((3072, 65), (1024, 50304)), DTYPES):
        M, V = options.fit(*sizes)
        targets = torch.randint(V, (M,))
        ours, peer = partial(ops.cross_entropy, targets=targets), partial(F.cross_entropy, target=targets)
        yield differentiable(f"cross_entropy {M} x {V}", 1.0, ours, peer, leaves(dtype, (M, V)))


def linear_cross_entropy_cases(options: Options) -> Iterator[Case]:
    for sizes, dtype in itertools.product(((3072, 384, 65), (1024, 768, 50304)), DTYPES):
        M, C, V = options.fit(*sizes)
        x, weight = leaves(dtype, (M, C), (V, C))
        with torch.no_grad():
            weight *= 0.02  # as a model starts: larger logits would leave the loss to the rounding of a few
        targets = torch.randint(V, (M,))
        yield differentiable(
            f"linear_cross_entropy {M} x {C} x {V}",
            None,
            partial(ops.linear_cross_entropy, targets=targets),
            partial(plain_linear_cross_entropy, targets=targets),
            [x, weight],
            "linear, cross_entropy",
        )


def plain_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), targets)


def dropout_cases(options: Options) -> Iterator[Case]:
    for sizes, dtype in itertools.product(((3072, 384), (4096, 768)), DTYPES):
        M, N = options.fit(*sizes)
        ours, peer = partial(ops.dropout, p=DROPOUT), partial(F.dropout, p=DROPOUT)
        yield differentiable(f"dropout {M} x {N}, p {DROPOUT}", None, ours, peer, leaves(dtype, (M, N)), drops=True)


def adamw_cases(options: Options) -> Iterator[Case]:
    """The optimizers' whole step, in which there is more than the kernel."""
    config, train = model_and_training(options)
    model = GPT(config)
    before = [p.detach() for p in model.parameters()]
    grads = [torch.randn_like(p) for p in before]
    peer = "AdamW(fused=True)"
    copies: dict[str, list[Tensor]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for name, optimizer in ((OURS, AdamW), (peer, partial(torch.optim.AdamW, fused=True))):
        copies[name] = [p.clone().requires_grad_() for p in before]
        for p, grad in zip(copies[name], grads, strict=True):
            p.grad = grad
        decayed = [p for p in copies[name] if p.dim() >= 2]
        others = [p for p in copies[name] if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
        steps[name] = optimizer(groups, lr=train.lr, betas=(train.beta1, train.beta2)).step
    name = f"adamw_, {_size(model)}"

    def check() -> None:
        updates = {}
        for who, call in steps.items():
            call()
            updates[who] = [after.detach() - p for after, p in zip(copies[who], before, strict=True)]
        agree(name, updates[OURS], updates[peer], FP32)

    yield Case(name, steps, {(peer,): 1.0}, check)


def clip_grad_norm_cases(options: Options) -> Iterator[Case]:
    """Each call asks for a little less than the one before, so that none finds its gradients clipped."""
    model = GPT(model_and_training(options)[0])
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)
    ours, theirs = [grad.clone() for grad in gradients(model)], gradients(model)
    our_limits, their_limits = ((0.999**n for n in itertools.count()) for _ in range(2))
    peer = "nn.utils.clip_grad_norm_"
    calls: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: ops.clip_grad_norm_(ours, next(our_limits)),
        peer: lambda: nn.utils.clip_grad_norm_(parameters, next(their_limits)),
    }
    name = f"clip_grad_norm_, {_size(model)}"

    def check() -> None:
        agree(name, [calls[OURS](), *ours], [calls[peer](), *theirs], FP32)

    yield Case(name, calls, {(peer,): None}, check)


def overhead_cases(options: Options) -> Iterator[Case]:
    """On 8 x 64 numbers, where the time is that of the calls: twice PyTorch's at most, so a ratio of a half."""
    x = (8, 64)
    yield differentiable("layer_norm 8 x 64", 0.5, ops.layer_norm, plain_layer_norm, leaves(FP32, x, (64,), (64,)))
    yield differentiable("gelu 8 x 64", 0.5, ops.gelu, F.gelu, leaves(FP32, x))
    yield differentiable("softmax 8 x 64", 0.5, ops.softmax, plain_softmax, leaves(FP32, x))


def training_cases(options: Options) -> Iterator[Case]:
    """A whole step: forward, backward, clipping, AdamW. Ours is in bf16 autocast, its peer in each way it can run."""
    config, train = model_and_training(options)
    every = [("eager", FP32), ("eager", BF16), ("compiled", FP32), ("compiled", BF16)]
    for dropout_p, modes in ((0.0, every[:2] if options.quick else every), (DROPOUT, every[:1])):
        config = dataclasses.replace(config, dropout=dropout_p)
        model = GPT(config)
        weights = model.state_dict()
        peers = [training_peer(options, mode, dtype, config, train, weights) for mode, dtype in modes]
        ours = fastgpt_competitor(OURS, options.backend, config, train, weights)
        competitors = [*peers, dataclasses.replace(ours, dtype=BF16)]
        eager_fp32, *_ = names = tuple(peer.name for peer in peers)
        marks: dict[tuple[str, ...], float | None] = (
            {(eager_fp32,): 2.5} if dropout_p else {(eager_fp32,): 2.2, names: 1.2}
        )
        batches = random_batches(config, *options.fit(12))
        yield Case(
            f"training step, {_size(model)}, batch {len(batches[0][0])} x {config.block_size}, dropout {dropout_p:g}",
            {competitor.name: partial(next_step, competitor, itertools.cycle(batches)) for competitor in competitors},
            marks,
            partial(check_losses, competitors, batches),
        )


def next_step(competitor: Competitor, batches: Iterator[Batch]) -> None:
    step(competitor, next(batches))


def training_peer(
    options: Options,
    mode: str,
    dtype: torch.dtype,
    config: GPTConfig,
    train: TrainConfig,
    weights: dict[str, Tensor],
) -> Competitor:
    """nanoGPT, or where there is no checkout the same model in plain PyTorch, eager or compiled."""
    name = f"{'nanoGPT' if options.nanogpt else 'plain'} {mode} {'bf16' if dtype == BF16 else 'fp32'}"
    if options.nanogpt:
        module = import_nanogpt(options.nanogpt)
        peer = nanogpt_competitor(name, module, config, train, weights, flash=True)
    else:
        peer = plain_competitor(name, PlainGPT(config, "fused"), train, weights)
    if mode == "compiled":
        peer.model.compile()
    return dataclasses.replace(peer, dtype=dtype)


def model_and_training(options: Options) -> tuple[GPTConfig, TrainConfig]:
    """The 10.65M model, without dropout."""
    preset = PRESETS["shakespeare"]
    assert isinstance(preset.model, GPTConfig)
    config = dataclasses.replace(preset.model, vocab_size=VOCAB_SIZE, dropout=0.0)
    if options.quick:
        config = dataclasses.replace(config, block_size=16, n_layer=1, n_head=2, n_embd=32)
    return config, preset.train


GROUPS: dict[str, Callable[[Options], Iterator[Case]]] = {
    "attention": attention_cases,
    "softmax": softmax_cases,
    "layer_norm": layer_norm_cases,
    "add_layer_norm": add_layer_norm_cases,
    "gelu": gelu_cases,
    "cross_entropy": cross_entropy_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "dropout": dropout_cases,
    "adamw_": adamw_cases,
    "clip_grad_norm_": clip_grad_norm_cases,
    "overhead": overhead_cases,
    "training": training_cases,
}


def differentiable(
    name: str,
    mark: float | None,
    ours: Callable[..., Any],
    peer: Callable[..., Any],
    inputs: list[Tensor],
    peer_name: str = "torch eager",
    *,
    drops: bool = False,
) -> Case:
    """The case of an op's forward and backward on ``inputs``; ``drops``: ours and the peer draw masks of their own."""
    dtype = inputs[0].dtype
    name = f"{name}, {'bf16' if dtype == BF16 else 'fp32'}"
    with torch.no_grad():
        outputs = _as_tuple(peer(*inputs))
    # A loss is where a backward starts.
    upstream = [torch.randn_like(y) if y.dim() else None for y in outputs]

    def check() -> None:
        wide_inputs = [x.detach().float().requires_grad_() for x in inputs]
        wide_upstream = [None if dy is None else dy.float() for dy in upstream]
        torch.manual_seed(0)
        got = results(ours, inputs, upstream)
        torch.manual_seed(0)
        if drops:
            with use_backend("reference"):
                want = results(ours, wide_inputs, wide_upstream)
        else:
            want = results(peer, wide_inputs, wide_upstream)
        agree(name, got, want, dtype)

    calls = {OURS: lambda: results(ours, inputs, upstream), peer_name: lambda: results(peer, inputs, upstream)}
    return Case(name, calls, {(peer_name,): mark}, check)


def results(fn: Callable[..., Any], inputs: list[Tensor], upstream: Sequence[Tensor | None]) -> list[Tensor]:
    """Outputs, then gradients."""
    outputs = _as_tuple(fn(*inputs))
    return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]


def agree(name: str, got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype) -> None:
    """
    Raises:
        SystemExit: an output or gradient differs by more than is allowed in ``dtype``.
    """
    with torch.no_grad():
        error = largest_error(got, want)
    if not error <= ALLOWED_ERROR[dtype]:
        raise SystemExit(
            f"{name}: our results differ from the right ones by {error:.2g} of their size, where "
            f"{ALLOWED_ERROR[dtype]:g} is allowed, so that their time would mean nothing."
        )


def leaves(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _size(model: GPT) -> str:
    return f"{model.num_params(positions=False) / 1e6:.2f}M parameters"


if __name__ == "__main__":
    main()
