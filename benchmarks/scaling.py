"""`fastgpt bench scaling`: training speed and memory as the model, the sequences and the batch grow, beside PyTorch's.

A case is a model, a length of sequences and a batch. Its competitors (each backend, eager and compiled, in each dtype,
and the peers likewise) start from the same weights. Each first makes a few steps that must give what plain PyTorch
gives in fp32: whoever computes something else is named as wrong and never timed. Then they take turns on the same
batches. A sample is a number of consecutive training steps, the same for all.

- A step is the next batch ("data"), "forward", "backward", and clipping, AdamW and zero_grad ("optimizer").
- Peak memory: what the weights and the optimizer hold, and what a step adds to that at most, as PyTorch's allocator
  counts: on a CPU, what libraries allocate for themselves is not in it.
- MFU: ``GPT.flops_per_token`` times tokens per second, over the peak that the GPU's maker states (``devices.py``; none
  for a CPU or a GPU that is not in the table), and over the matrix product measured before the run.
- The exponents: x, where milliseconds a token, or bytes of memory, grow as the x-th power of parameters, length or
  batch; the slope of a line through the logarithms.

The ladder goes on until memory ends: on a GPU when an allocation fails, on a CPU, where the system would kill the
process first, when an estimate says so. On a GPU that cannot hold all competitors at once, those who are not in turn
wait in the host's memory.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import GPT, dispatch
from fastgpt.benchmarks import models, session
from fastgpt.benchmarks.harness import (
    FEWEST_ROUNDS,
    Ceilings,
    Contestant,
    Sample,
    interleave,
    matmul_rate,
    print_table,
    ratios,
)
from fastgpt.benchmarks.machine import OtherWork
from fastgpt.benchmarks.models import LADDER, Competitor, Mode, step
from fastgpt.benchmarks.result import Result, spread
from fastgpt.benchmarks.session import MEMORY_ENDS, Outcome
from fastgpt.config import GPTConfig, TrainConfig, UserError
from fastgpt.data import Batches
from fastgpt.devices import model_flops_utilization
from fastgpt.placement import DTYPES

PARTS = ("data", "forward", "backward", "optimizer")
SAMPLE_SECONDS = 0.25
CASE_SECONDS = 120.0  # beyond the fewest rounds
MEMORY_SHARE = 0.9  # of what is free, that competitors may take
MIB, GIB = 1 << 20, 1 << 30

MODES: tuple[Mode, ...] = ("eager", "compile")
UNFUSED = ("reference", models.PLAIN_NAIVE)  # whose attention has a T x T matrix
PARAMETERS, BLOCK_SIZE, BATCH_SIZE = "parameters", "block_size", "batch_size"

# What is measured where nothing else is asked for. The batches of the ladder have about the same number of tokens each.
DEFAULT_DTYPES = {"cpu": ["fp32", "bf16"], "cuda": ["bf16"]}
DEFAULT_TOKENS = {"cpu": 3072, "cuda": 16384}
DEFAULT_SWEEP = {"cpu": "shakespeare", "cuda": "gpt2"}
DEFAULT_BLOCK_SIZES = {"cpu": [64, 128, 256, 512], "cuda": [256, 512, 1024, 2048]}
DEFAULT_BATCH_SIZES = {"cpu": [1, 4, 12, 24], "cuda": [1, 4, 16, 32]}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says; an empty list takes the defaults of the device.

    Args:
        models: rungs of ``LADDER``.
        sweep: the rung whose length of sequences and batch are varied; "" is the device's default.
        block_sizes, batch_sizes: that it is measured with; [0] varies nothing.
        tokens: of a batch, about, where the batch is not what is varied; 0 is the device's default.
        nanogpt: a checkout.
    Raises:
        UserError: a name that is not there, or a number out of its range.
    """

    device: torch.device
    models: list[str] = dataclasses.field(default_factory=list)
    backends: list[str] = dataclasses.field(default_factory=list)
    modes: list[str] = dataclasses.field(default_factory=list)
    dtypes: list[str] = dataclasses.field(default_factory=list)
    sweep: str = ""
    block_sizes: list[int] = dataclasses.field(default_factory=list)
    batch_sizes: list[int] = dataclasses.field(default_factory=list)
    tokens: int = 0
    dropout: float = 0.0
    rounds: int = 15
    nanogpt: Path | None = None

    def __post_init__(self) -> None:
        kind = self.device.type
        session.fill_in(
            self,
            models=list(LADDER),
            modes=list(MODES),
            dtypes=DEFAULT_DTYPES[kind],
            sweep=DEFAULT_SWEEP[kind],
            block_sizes=DEFAULT_BLOCK_SIZES[kind],
            batch_sizes=DEFAULT_BATCH_SIZES[kind],
            tokens=DEFAULT_TOKENS[kind],
        )
        session.require_known("model", [*self.models, self.sweep], LADDER)
        session.require_known("mode", self.modes, MODES)
        session.require_known("dtype", self.dtypes, DTYPES)
        for name, sizes in (("block-size", self.block_sizes), ("batch-size", self.batch_sizes)):
            if sizes != [0]:
                session.require_at_least(name, min(sizes), 1)
        session.require_at_least("tokens", self.tokens, 1)
        session.require_at_least("rounds", self.rounds, FEWEST_ROUNDS)
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be in [0, 1), got {self.dropout:g}")

    def settings(self) -> dict[str, Any]:
        """What a file says of them, and what must be the same where one is resumed."""
        return session.settings_of(self)


class Entrant(NamedTuple):
    """Who takes part, and how: a backend or a peer, eager or compiled, in fp32 or with autocast."""

    name: str
    mode: Mode
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}, {self.mode}, {self.dtype}"

    @property
    def ours(self) -> bool:
        return self.name in dispatch.BACKENDS


@dataclasses.dataclass(frozen=True)
class Case:
    """Who takes turns: ``who`` on this model and batch."""

    model: str
    config: GPTConfig
    train: TrainConfig
    batch_size: int
    who: tuple[Entrant, ...]

    @property
    def name(self) -> str:
        return f"{self.model}, {self.batch_size} x {self.config.block_size} tokens"

    @property
    def tokens(self) -> int:
        return self.batch_size * self.config.block_size

    @property
    def flops_per_token(self) -> int:
        with torch.device("meta"):
            return GPT(self.config).flops_per_token()

    def key(self) -> dict[str, Any]:
        return {
            "model": models.describe_model(self.model, self.config),
            "block_size": self.config.block_size,
            "batch_size": self.batch_size,
        }


def sweeps(options: Options, names: Sequence[str]) -> dict[str, list[Case]]:
    """By what grows, the cases in which it does; some are in more than one list."""
    who = tuple(
        Entrant(name, mode, dtype)
        for dtype in options.dtypes
        for name in names
        for mode in MODES
        if mode in options.modes
    )

    def case(model: str, block_size: int = 0, batch_size: int = 0) -> Case:
        config, train = LADDER[model]
        config = dataclasses.replace(config, block_size=block_size or config.block_size, dropout=options.dropout)
        return Case(model, config, train, batch_size or max(1, options.tokens // config.block_size), who)

    return {
        PARAMETERS: [case(model) for model in LADDER if model in options.models],
        BLOCK_SIZE: [case(options.sweep, block_size=T) for T in sorted(set(options.block_sizes) - {0})],
        BATCH_SIZE: [case(options.sweep, batch_size=B) for B in sorted(set(options.batch_sizes) - {0})],
    }


def scale(
    options: Options,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    limit_s: float | None = None,
    commit: str | None = None,
) -> Result:
    """The command. See ``session.start`` and ``session.run`` for the arguments and for what is returned."""
    backends, absent = models.choose_backends(options.backends, options.device)
    names = [*backends, *models.peers(backends, options.nanogpt, options.device)]
    # Where memory does not do for all, it is the last that are left out.
    found = sweeps(options, sorted(names, key=UNFUSED.__contains__))
    result = session.start("scaling", options, out=out, resume=resume, commit=commit)
    cases = list(dict.fromkeys(itertools.chain(*found.values())))
    return session.run(
        result,
        cases,
        Training(options).measure,
        options.device,
        absent,
        limit_s=limit_s,
        summarize=lambda rows: {"growth": growth(found, rows)},
        show=show,
    )


# ---------------------------------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """Why a competitor is not timed."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A competitor that was found to be right, the bytes that it holds and that a step adds, and a step's seconds."""

    competitor: Competitor
    held: int
    rise: int
    seconds: float


class Training:
    """Measures cases; remembers where memory ended, so as not to try what is larger still."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = options.device
        self.ended: Case | None = None

    def measure(self, case: Case, ceilings: Ceilings, others: OtherWork) -> Outcome:
        """The rows of a case, and who has none."""
        if self.ended is not None and _parameters(self.ended) < _parameters(case):
            return _nobody(case, f"{MEMORY_ENDS}: it did at {self.ended.name}")
        with _compiling() if "compile" in self.options.modes else nullcontext():
            batches = models.random_batches(case.config, case.batch_size, self.device)
            try:
                self._require_room(case.config, min(case.batch_size, models.truth_batch(case.config)), "fp32")
                torch.manual_seed(case.train.seed)
                weights = GPT(case.config).state_dict()
                truth = models.true_steps(case.config, case.train, weights, batches[0])
            except (Refused, RuntimeError) as error:
                reason = _reason(error)
                if not reason.startswith(MEMORY_ENDS):
                    raise
                self.ended = case
                return _nobody(case, reason)
            ready: dict[Entrant, Ready] = {}
            left_out = {}
            for entrant in case.who:
                try:
                    ready[entrant] = self._prepare(entrant, case, weights, truth, batches)
                except Exception as error:  # whatever one of them fails with, the others are to be timed
                    left_out[str(entrant)] = _reason(error)
                if str(entrant) in left_out:
                    self._free()
            if not ready and all(reason.startswith(MEMORY_ENDS) for reason in left_out.values()):
                self.ended = case
            self._free()
            return Outcome(self._time(case, ready, batches, ceilings, others) if ready else [], left_out)

    def _require_room(self, config: GPTConfig, batch_size: int, dtype: str, *, unfused: bool = False) -> None:
        """
        Raises:
            Refused: on a CPU, where too much memory gets a process killed, there will not be enough.
        """
        free = free_bytes() if self.device.type == "cpu" else None
        needed = estimated_bytes(config, batch_size, dtype, unfused)
        if free is not None and needed > MEMORY_SHARE * free:
            raise Refused(f"{MEMORY_ENDS}: it takes about {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free")

    def _prepare(
        self,
        entrant: Entrant,
        case: Case,
        weights: dict[str, Tensor],
        truth: list[models.Checked],
        batches: Batches,
    ) -> Ready:
        """
        Raises:
            Refused: its results are wrong, or there is no room for it.
        """
        self._require_room(case.config, case.batch_size, entrant.dtype, unfused=entrant.name in UNFUSED)
        dtype = DTYPES[entrant.dtype]
        competitor = models.build_competitor(
            entrant.name,
            case.config,
            case.train,
            weights,
            self.device,
            dtype=dtype,
            mode=entrant.mode,
            nanogpt=self.options.nanogpt,
        )
        found = models.first_steps(competitor, batches[0], case.config.dropout)
        wrong = models.difference(found, truth, dtype)
        if wrong is not None:
            raise Refused(wrong)
        rise = memory_rise(lambda: take_sample(competitor, batches, 0, 1), self.device)
        seconds = sum(take_sample(competitor, batches, 0, 1).values()) / 1e3
        held = competitor.held_bytes()
        if self.device.type == "cuda":  # the next one is to have the GPU for itself, too
            free = free_bytes()
            if free is not None and held > MEMORY_SHARE * free:
                raise Refused(
                    f"{MEMORY_ENDS}: {held / GIB:.1f} GiB would have to wait for their turn in the host's memory, of "
                    f"which {free / GIB:.1f} GiB are free: name fewer competitors"
                )
            competitor.move(torch.device("cpu"))
        return Ready(competitor, held, rise, seconds)

    def _time(
        self, case: Case, ready: dict[Entrant, Ready], batches: Batches, ceilings: Ceilings, others: OtherWork
    ) -> list[dict[str, Any]]:
        steps = max(1, math.ceil(SAMPLE_SECONDS / min(one.seconds for one in ready.values())))
        swapping = False
        if self.device.type == "cuda":
            together = sum(one.held for one in ready.values()) + max(one.rise for one in ready.values())
            swapping = together > MEMORY_SHARE * torch.cuda.mem_get_info(self.device)[0]
            if not swapping:
                for one in ready.values():
                    one.competitor.move(self.device)
        splits: dict[Entrant, list[dict[str, float]]] = {entrant: [] for entrant in ready}
        contestants = {
            str(entrant): self._contestant(one.competitor, batches, steps, swapping, splits[entrant].append)
            for entrant, one in ready.items()
        }
        with others:
            samples = interleave(contestants, _time_of_its_own, self.options.rounds, CASE_SECONDS)
        times = {entrant: [sample.ms for sample in samples[str(entrant)]] for entrant in ready}
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        flops = case.flops_per_token
        rows = []
        for entrant, ms in times.items():
            speed = spread(1e3 * case.tokens / sample for sample in ms)
            kept = splits[entrant][-len(ms) :]  # those before were the warm-up
            measured = matmul_rate(ceilings, entrant.dtype)
            rows.append(
                {
                    **case.key(),
                    "dtype": entrant.dtype,
                    "competitor": entrant.name,
                    "mode": entrant.mode,
                    "step_ms": spread(ms),
                    "split_ms": {part: spread(split[part] for split in kept)["median"] for part in PARTS},
                    "tokens_per_s": speed,
                    "peak_memory_bytes": ready[entrant].held + ready[entrant].rise,
                    "flops_per_token": flops,
                    "mfu": model_flops_utilization(speed["median"] * flops, gpu, entrant.dtype, measured),
                    "samples_ms": ms,
                    "ratios": ratios_of(entrant, times),
                }
            )
        return rows

    def _contestant(
        self,
        competitor: Competitor,
        batches: Batches,
        steps: int,
        swapping: bool,
        keep: Callable[[dict[str, float]], None],
    ) -> Contestant:
        """Each call is a sample; the n-th ones of all competitors are on the same batches."""
        numbers = itertools.count()

        def call(_: Any) -> float:
            if swapping:
                competitor.move(self.device)
            split = take_sample(competitor, batches, next(numbers) * steps, steps)
            if swapping:
                competitor.move(torch.device("cpu"))
            keep(split)
            return sum(split.values())

        return Contestant(call)

    def _free(self) -> None:
        """Give back what has been let go of."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def ratios_of(entrant: Entrant, times: dict[Entrant, list[float]]) -> dict[str, dict[str, float]]:
    """One of ours' ratio to each peer, who is named as "plain, eager", and with its dtype where that is another."""
    if not entrant.ours:
        return {}
    names = {peer: f"{peer.name}, {peer.mode}" if peer.dtype == entrant.dtype else str(peer) for peer in times}
    return {names[peer]: ratios(times[entrant], theirs) for peer, theirs in times.items() if not peer.ours}


def _parameters(case: Case) -> int:
    return case.key()["model"]["parameters"]


def _nobody(case: Case, reason: str) -> Outcome:
    return Outcome([], {str(entrant): reason for entrant in case.who})


def _compiling() -> AbstractContextManager[Any]:
    """Every competitor gets code of its own, however many there are, or fails: without this, torch.compile goes over to
    eager mode at the ninth without a word that counts."""
    import torch._dynamo.config  # takes a second to load

    return torch._dynamo.config.patch(recompile_limit=1024, fail_on_recompile_limit_hit=True)


def _time_of_its_own(contestant: Contestant, stall_ms: float) -> Sample:
    """The harness's timer of what takes its time itself."""
    return Sample(contestant.call(contestant.prepare()), None)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, Refused) else session.reason_of(error)


def take_sample(competitor: Competitor, batches: Batches, first: int, steps: int) -> dict[str, float]:
    """Milliseconds a step, by part, over consecutive ``steps`` of training on the batches from ``first`` on."""
    clock = StepClock(competitor.device)
    gc.collect(1)  # what the last sample left; all that PyTorch has loaded takes a fifth of a second to go through
    with competitor.scope():
        clock("")
        for index in range(first, first + steps):
            batch = batches[index]
            clock("data")
            step(competitor, batch, clock)
    return {part: ms / steps for part, ms in clock.milliseconds().items()}


class StepClock:
    """Called at the end of each part of a step, with its name: on a GPU by events, which wait for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.ends: list[tuple[str, Any]] = []

    def __call__(self, part: str) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ends.append((part, event))
        else:
            self.ends.append((part, time.perf_counter()))

    def milliseconds(self) -> dict[str, float]:
        """By part, from the end of the part before; the first call is where time begins."""
        if self.on_gpu:
            self.ends[-1][1].synchronize()
        total = dict.fromkeys(PARTS, 0.0)
        for (_, began), (part, ended) in itertools.pairwise(self.ends):
            total[part] += began.elapsed_time(ended) if self.on_gpu else 1e3 * (ended - began)
        return total


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def memory_rise(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that ``call`` holds at its worst moment beyond those that were held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it reports on stderr that it begins and ends
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes, initial=0))


def estimated_bytes(config: GPTConfig, batch_size: int, dtype: str, unfused: bool) -> int:
    """What training takes, about: weights, gradients, AdamW's two means; the activations that wait for the backward
    (Korthikanti et al., 2022, eq. 2: 34 bytes a token and width in 16 bits); logits and their gradient. ``unfused``:
    the T x T matrices exist, some six in fp32 for each head."""
    with torch.device("meta"):
        parameters = GPT(config).num_params()
    tokens = batch_size * config.block_size
    wide = 2 if dtype == "fp32" else 1
    activations = config.n_layer * tokens * config.n_embd * 34 * wide
    matrices = config.n_layer * tokens * config.n_head * config.block_size * 24 if unfused else 0
    return 16 * parameters + activations + matrices + 2 * 4 * tokens * config.padded_vocab_size


def free_bytes() -> int | None:
    """Memory that this process can still have; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) << 10
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


# ---------------------------------------------------------------------------------------------------------------------
# What is said of it
# ---------------------------------------------------------------------------------------------------------------------


def growth(found: dict[str, list[Case]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exponents, for each sweep and competitor that has two cases of it at least.

    Returns:
        {"sweep", "competitor", "mode", "dtype", "points", "ms_per_token", "peak_memory_bytes"}: the last two are the
        exponents by which those grow with what the sweep varies.
    """
    fitted = []
    for sweep, cases in found.items():
        lines: dict[tuple[str, str, str], list[tuple[float, float, float]]] = {}
        for row, case in itertools.product(rows, cases):
            if all(row[name] == value for name, value in case.key().items()):
                size = row["model"][PARAMETERS] if sweep == PARAMETERS else row[sweep]
                point = (size, row["step_ms"]["median"] / case.tokens, row["peak_memory_bytes"])
                lines.setdefault((row["competitor"], row["mode"], row["dtype"]), []).append(point)
        for (competitor, mode, dtype), points in lines.items():
            if len(points) > 1:
                sizes, times, memory = zip(*points, strict=True)
                fitted.append(
                    {
                        "sweep": sweep,
                        "competitor": competitor,
                        "mode": mode,
                        "dtype": dtype,
                        "points": len(points),
                        "ms_per_token": exponent(sizes, times),
                        "peak_memory_bytes": exponent(sizes, memory),
                    }
                )
    return fitted


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the straight line that is nearest, by least squares, to log(values) over log(sizes)."""
    x, y = ([math.log(value) for value in of] for of in (sizes, values))
    mean_x, mean_y = (math.fsum(of) / len(of) for of in (x, y))
    covariance = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.fsum((a - mean_x) ** 2 for a in x)


def show(case: Case, outcome: Outcome) -> None:
    """Print a case's table."""
    rows = []
    for row in outcome.rows:
        mfu = row["mfu"]
        alike = [peer for peer in row["ratios"] if peer.count(",") == 1]  # of the same dtype
        best = min(alike, key=lambda peer: row["ratios"][peer]["median"], default=None)
        rows.append(
            (
                f"  {row['competitor']}, {row['mode']}, {row['dtype']}",
                "{median:.2f} ({min:.2f}, {max:.2f})".format_map(row["step_ms"]),
                *(f"{row['split_ms'][part]:.2f}" for part in PARTS),
                f"{row['tokens_per_s']['median']:,.0f}",
                f"{row['peak_memory_bytes'] / MIB:,.0f}",
                "" if mfu["of_peak"] is None else f"{mfu['of_peak']:.1%}",
                f"{mfu['of_measured']:.1%}",
                "" if best is None else "{median:.2f}x ({min:.2f}, {max:.2f})".format_map(row["ratios"][best]),
                best or "",
            )
        )
    headings = ("ms a step (min, max)", *PARTS, "tokens/s", "peak MiB", "MFU", "of matmul", "best peer's / its", "")
    if rows:
        print_table((case.name, *headings), rows)
    session.show_left_out(case, outcome)
