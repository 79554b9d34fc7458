"""Time a whole training step of fastgpt on a CPU beside plain PyTorch, and beside nanoGPT where a checkout is given.

    python -m fastgpt.benchmarks.training_step --nanogpt ~/nanoGPT --json step.json

All competitors run in one process, from the same weights and on the same batches of random tokens, in fp32. A step is
forward, backward, clipping, AdamW and zero_grad. A sample is a number of consecutive steps, the same for all, that the
fastest takes about a second for. In each round every competitor gives one sample, in an order that changes from round
to round so that over a cycle of rounds each one follows each other equally often. A ratio is taken within a round,
peer's time by ours (above 1: ours is faster); its median over the rounds is reported beside the least and the greatest.

Nothing is timed unless all competitors agree on the loss, before and after training steps without dropout. With
dropout each draws its own masks: fastgpt the ones it defines for every backend, the peers PyTorch's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import io
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastgpt import GPT, ops, use_backend
from fastgpt.benchmarks.machine import OtherWork
from fastgpt.benchmarks.plain import PlainGPT, plain_optimizer
from fastgpt.benchmarks.result import describe_machine
from fastgpt.config import PRESETS, GPTConfig, TrainConfig
from fastgpt.optim import build_optimizer, gradients

PRESET_NAMES = ("shakespeare-cpu", "shakespeare")
VOCAB_SIZE = 65  # symbols of Tiny Shakespeare
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # nats
CHECKED_STEPS = 3
WARMUP_STEPS = 3
SAMPLE_SECONDS = 1.0
FEWEST_ROUNDS = 7  # below that a median is no figure to quote

FASTGPT_TORCH, FASTGPT_REFERENCE = "fastgpt torch", "fastgpt reference"
PLAIN_FUSED, PLAIN_NAIVE = "plain fused", "plain naive"
NANOGPT, NANOGPT_UNFUSED = "nanoGPT", "nanoGPT, flash off"

# (ours, peer): the ratios that are reported, where both run.
CONTESTS = (
    (FASTGPT_TORCH, PLAIN_FUSED),
    (FASTGPT_REFERENCE, PLAIN_NAIVE),
    (PLAIN_FUSED, NANOGPT),
    (FASTGPT_TORCH, NANOGPT),
    (FASTGPT_REFERENCE, NANOGPT_UNFUSED),
)

Batch = tuple[Tensor, Tensor]  # tokens and targets, both (B, T)


@dataclasses.dataclass(frozen=True)
class Competitor:
    """A model with what updates it; ``scope`` is entered around its steps, autocast to ``dtype`` around its forward."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    clip: Callable[[], Any]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    dtype: torch.dtype = torch.float32


@dataclasses.dataclass(frozen=True)
class Sample:
    """Seconds a step, averaged over the consecutive steps of the sample; the first two add up to the third."""

    forward_backward: float
    update: float
    step: float


def main() -> None:
    """Command line: see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt.benchmarks.training_step",
        description="Time a whole training step of fastgpt beside plain PyTorch, in fp32 on the CPU.",
    )
    parser.add_argument("--preset", nargs="+", choices=PRESET_NAMES, default=PRESET_NAMES, help="default: both")
    parser.add_argument("--dropout", type=float, default=0.0, help="of every model, in [0, 1); default: 0")
    parser.add_argument("--batch-size", type=int, default=12, help="sequences a step; default: 12")
    parser.add_argument("--rounds", type=int, default=9, help=f"default: 9; below {FEWEST_ROUNDS} only to try it out")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, whose model.py then competes too")
    parser.add_argument("--json", type=Path, help="file for the figures and every sample")
    args = parser.parse_args()
    if args.rounds < 1 or args.batch_size < 1:
        parser.error("--rounds and --batch-size must be at least 1")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout must be in [0, 1), got {args.dropout}")
    if args.nanogpt and not (args.nanogpt / "model.py").is_file():
        parser.error(f"--nanogpt: there is no model.py in {args.nanogpt}")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.absolute().parent}")

    console = Console(width=None if sys.stdout.isatty() else 100)
    machine = describe_machine(torch.device("cpu"))
    machine |= {"torch": torch.__version__, "load_before": os.getloadavg()[0]}
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores; torch {machine['torch']}, {machine['threads']} threads; "
        f"load average {machine['load_before']:.2f}",
        highlight=False,
    )
    if args.rounds < FEWEST_ROUNDS:
        console.print(f"Warning: medians of fewer than {FEWEST_ROUNDS} rounds are no figures.", style="bold yellow")
    results = []
    others = OtherWork()
    for preset in args.preset:
        result = measure(preset, args.batch_size, args.dropout, args.rounds, others, args.nanogpt)
        report(console, result)
        results.append(result)
    machine["load_after"] = os.getloadavg()[0]
    machine["others_cores"] = others.cores
    console.print(
        f"Load average after: {machine['load_after']:.2f} (this program's own work is in it). {others}",
        highlight=False,
        style="bold yellow" if others.busy else None,
    )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def measure(
    preset: str, batch_size: int, dropout: float, rounds: int, others: OtherWork, nanogpt: Path | None = None
) -> dict[str, Any]:
    """Check that the competitors agree, then time them.

    Args:
        preset: one of ``PRESET_NAMES``; the batch size and the dropout given replace its own.
        rounds: samples of each competitor.
        others: counts what other programs do while they are taken.
        nanogpt: a checkout of nanoGPT; None leaves it out.
    Returns:
        What ``--json`` writes for a preset: settings, every competitor's samples with their medians, and the ratios.
    Raises:
        SystemExit: the competitors' losses differ by more than ``LOSS_TOLERANCE``.
    """
    train = PRESETS[preset].train
    model = PRESETS[preset].model
    assert isinstance(model, GPTConfig)
    config = dataclasses.replace(model, vocab_size=VOCAB_SIZE, dropout=dropout)
    competitors = build_competitors(config, train, nanogpt)
    ours = competitors[0].model
    assert isinstance(ours, GPT)
    batches = random_batches(config, batch_size)
    check_losses(competitors, batches)
    steps = _warm_up(competitors, batches)
    samples: dict[str, list[Sample]] = {competitor.name: [] for competitor in competitors}
    with others:
        for order in balanced_orders(len(competitors), rounds):
            for index in order:
                samples[competitors[index].name].append(take_sample(competitors[index], batches, steps))
    tokens = batch_size * config.block_size
    return {
        "preset": preset,
        "batch_size": batch_size,
        "block_size": config.block_size,
        "dropout": dropout,
        "parameters": ours.num_params(positions=False),
        "rounds": rounds,
        "steps_per_sample": steps,
        "competitors": {name: _summary(of_one, tokens) for name, of_one in samples.items()},
        "ratios": [_ratio(*pair, samples) for pair in CONTESTS if samples.keys() >= set(pair)],
    }


def build_competitors(config: GPTConfig, train: TrainConfig, nanogpt: Path | None) -> list[Competitor]:
    """All competitors with the same weights; an even number of them, as ``balanced_orders`` needs."""
    torch.manual_seed(train.seed)
    weights = GPT(config).state_dict()
    competitors = [
        fastgpt_competitor(FASTGPT_TORCH, "torch", config, train, weights),
        plain_competitor(PLAIN_FUSED, PlainGPT(config, "fused"), train, weights),
        fastgpt_competitor(FASTGPT_REFERENCE, "reference", config, train, weights),
        plain_competitor(PLAIN_NAIVE, PlainGPT(config, "naive"), train, weights),
    ]
    if nanogpt is not None:
        module = import_nanogpt(nanogpt)
        competitors.append(nanogpt_competitor(NANOGPT, module, config, train, weights, flash=True))
        competitors.append(nanogpt_competitor(NANOGPT_UNFUSED, module, config, train, weights, flash=False))
    return competitors


def random_batches(config: GPTConfig, batch_size: int, count: int = 8) -> list[Batch]:
    """``count`` batches of uniformly random tokens; the targets are the tokens that follow."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, config.block_size + 1)
    rows = [torch.randint(config.vocab_size, shape, generator=generator) for _ in range(count)]
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


def check_losses(competitors: list[Competitor], batches: list[Batch]) -> None:
    """Compare the losses over a few training steps without dropout, the later of which show the updates as well.

    Raises:
        SystemExit: a loss differs from the first competitor's by more than ``LOSS_TOLERANCE``.
    """
    expected: list[float] = []
    for competitor in competitors:
        competitor.model.eval()  # which is what switches dropout off in all of them
        with competitor.scope():
            losses = [step(competitor, batch)[0].item() for batch in batches[:CHECKED_STEPS]]
        competitor.model.train()
        expected = expected or losses
        for number, (loss, wanted) in enumerate(zip(losses, expected, strict=True), start=1):
            if not abs(loss - wanted) <= LOSS_TOLERANCE[competitor.dtype]:  # a NaN differs, too
                raise SystemExit(
                    f"Nothing was timed: at step {number} the loss of {competitor.name} is {loss:.7f} where that of "
                    f"{competitors[0].name} is {wanted:.7f}, so they do not compute the same thing."
                )


def step(competitor: Competitor, batch: Batch) -> tuple[Tensor, float]:
    """One training step: its loss, and the seconds that forward and backward took of it."""
    start = time.perf_counter()
    with torch.autocast("cpu", competitor.dtype, enabled=competitor.dtype != torch.float32):
        _, loss = competitor.model(*batch)
    loss.backward()
    forward_backward = time.perf_counter() - start
    competitor.clip()
    competitor.optimizer.step()
    competitor.optimizer.zero_grad(set_to_none=True)
    return loss.detach(), forward_backward


def take_sample(competitor: Competitor, batches: list[Batch], steps: int) -> Sample:
    """The mean of ``steps`` consecutive training steps."""
    gc.collect()
    forward_backward = 0.0
    with competitor.scope():
        start = time.perf_counter()
        for index in range(steps):
            forward_backward += step(competitor, batches[index % len(batches)])[1]
        total = time.perf_counter() - start
    return Sample(forward_backward / steps, (total - forward_backward) / steps, total / steps)


def balanced_orders(count: int, rounds: int) -> Iterator[list[int]]:
    """For each round an order of an even ``count`` of competitors.

    Each cycle of ``count`` rounds puts everyone once in every place, and once right after each of the others (the
    Latin square of Williams, 1949). Rotating one order would keep everyone behind the same neighbour.
    """
    first = [(k + 1) // 2 if k % 2 else (count - k // 2) % count for k in range(count)]  # 0, 1, count - 1, 2, ...
    for number in range(rounds):
        yield [(index + number) % count for index in first]


def report(console: Console, result: dict[str, Any]) -> None:
    """Print the two tables of a preset."""
    title = (
        f"{result['preset']}: {result['parameters'] / 1e6:.2f}M parameters, batch {result['batch_size']} x "
        f"{result['block_size']} tokens, fp32, dropout {result['dropout']:g}; medians of {result['rounds']} rounds, "
        f"{result['steps_per_sample']} steps a sample"
    )
    times = Table("", title=title, title_justify="left", title_style="bold")
    for heading in ("ms a step", "forward + backward", "clip + AdamW", "tokens/s"):
        times.add_column(heading, justify="right")
    for name, figures in result["competitors"].items():
        milliseconds = (f"{figures[part]:.2f}" for part in ("step_ms", "forward_backward_ms", "update_ms"))
        times.add_row(name, *milliseconds, f"{figures['tokens_per_second']:,.0f}")
    ratios = Table("speed, median (min, max)")
    for heading in ("whole step", "forward + backward"):
        ratios.add_column(heading, justify="right")
    for ratio in result["ratios"]:
        cells = (
            "{median:.3f}x ({min:.3f}, {max:.3f})".format_map(ratio[part]) for part in ("step", "forward_backward")
        )
        ratios.add_row(f"{ratio['ours']} against {ratio['peer']}", *cells)
    console.print(times, ratios)


def fastgpt_competitor(
    name: str, backend: str, config: GPTConfig, train: TrainConfig, weights: dict[str, Tensor]
) -> Competitor:
    model = GPT(config)
    model.load_state_dict(weights)
    return Competitor(
        name,
        model,
        build_optimizer(model, train),
        lambda: ops.clip_grad_norm_(gradients(model), train.grad_clip),
        lambda: use_backend(backend),
    )


def plain_competitor(
    name: str,
    model: nn.Module,
    train: TrainConfig,
    weights: dict[str, Tensor],
    build: Callable[[nn.Module, TrainConfig], torch.optim.Optimizer] = plain_optimizer,
) -> Competitor:
    model.load_state_dict(weights)
    parameters = list(model.parameters())
    return Competitor(name, model, build(model, train), lambda: nn.utils.clip_grad_norm_(parameters, train.grad_clip))


def import_nanogpt(checkout: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def nanogpt_competitor(
    name: str, module: ModuleType, config: GPTConfig, train: TrainConfig, weights: dict[str, Tensor], *, flash: bool
) -> Competitor:
    """nanoGPT's model and optimizer; it knows the exact GELU and tied weights only, as our presets here have them."""
    sizes = {field: getattr(config, field) for field in ("block_size", "n_layer", "n_head", "n_embd")}
    settings = module.GPTConfig(vocab_size=config.padded_vocab_size, dropout=config.dropout, bias=config.bias, **sizes)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
        model = module.GPT(settings)

    def build(model: Any, train: TrainConfig) -> torch.optim.Optimizer:
        with contextlib.redirect_stdout(io.StringIO()):
            return model.configure_optimizers(train.weight_decay, train.lr, (train.beta1, train.beta2), "cpu")

    competitor = plain_competitor(name, model, train, weights, build)
    for block in model.transformer.h:
        block.attn.flash = flash
        if not flash:  # what its own constructor does on a PyTorch without scaled_dot_product_attention
            visible = torch.ones(1, 1, config.block_size, config.block_size).tril()
            block.attn.register_buffer("bias", visible)
    return competitor


def _warm_up(competitors: list[Competitor], batches: list[Batch]) -> int:
    """Run each competitor a little and return how many steps make a sample."""
    fastest = min(take_sample(competitor, batches, WARMUP_STEPS).step for competitor in competitors)
    return max(1, math.ceil(SAMPLE_SECONDS / fastest))


def _summary(samples: list[Sample], tokens: int) -> dict[str, Any]:
    parts = ("step", "forward_backward", "update")
    milliseconds = {part: [1e3 * getattr(sample, part) for sample in samples] for part in parts}
    medians = {part: statistics.median(values) for part, values in milliseconds.items()}
    return {
        **{f"{part}_ms": median for part, median in medians.items()},
        "tokens_per_second": 1e3 * tokens / medians["step"],
        "samples_ms": milliseconds,
    }


def _ratio(ours: str, peer: str, samples: dict[str, list[Sample]]) -> dict[str, Any]:
    result: dict[str, Any] = {"ours": ours, "peer": peer}
    for part in ("step", "forward_backward"):
        pairs = zip(samples[ours], samples[peer], strict=True)
        values = [getattr(theirs, part) / getattr(mine, part) for mine, theirs in pairs]
        result[part] = {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "per_round": values,
        }
    return result


if __name__ == "__main__":
    main()
