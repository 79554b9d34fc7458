"""How times are taken, for every benchmark: who takes turns with whom, by which clock, and what the machine can do.

- A clock: ``CudaTimer`` (events, the L2 cache flushed) or ``CpuTimer`` (perf_counter, the last cache flushed).
- ``interleave``: after a warm-up the contestants take turns, in an order that changes from round to round. A ratio is
  taken within a round, so that what slows the machine for a while slows both sides of it.
- ``measure_ceilings``: the bytes a second of a large copy and the FLOPs a second of a large matrix product, per dtype,
  before and after a run. Where they ``drifted`` the run is not valid.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastgpt.benchmarks.result import spread
from fastgpt.placement import DTYPES

if TYPE_CHECKING:
    from rich.progress import Progress

FEWEST_ROUNDS = 7  # below that a median is no figure to quote
WARMUP_ROUNDS = 2
SAMPLE_SECONDS = 0.02  # of a sample on a CPU, at least
RESERVE_S = 15.0  # of a run's time, for the ceilings at its end
MOST_DRIFT = {"cuda": 0.03, "cpu": 0.15}

Ceilings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """What is timed: ``call``, on what ``prepare`` has made outside of the time.

    Of several calls ``in_a_row`` the mean is taken, as they come: what the host spends on them is in the time, and the
    caches are warm.
    """

    call: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    in_a_row: int = 1


class Sample(NamedTuple):
    """Milliseconds of one call: of the device, and of the host to launch it, which on a CPU is the same and None."""

    ms: float
    host_ms: float | None


# Called with a contestant, and the milliseconds for which a GPU is kept busy while the host launches the call.
Timer = Callable[[Contestant, float], Sample]


def timer_for(device: torch.device, sample_seconds: float = SAMPLE_SECONDS) -> Timer:
    """The clock of a device; on a CPU a sample takes ``sample_seconds``, and 0 leaves the caches as they are, too."""
    if device.type == "cuda":
        return CudaTimer(device)
    return CpuTimer(sample_seconds, 2 * _last_cache_bytes() if sample_seconds else 0)


class CudaTimer:
    """Times a contestant by CUDA events.

    Before a single call the L2 cache is filled by reading something else (reading, since a cache full of unwritten
    lines would have to be written back in the call's time), and the GPU is kept busy for ``stall_ms``, so that the host
    has launched all of the call before the first of its kernels starts.
    """

    def __init__(self, device: torch.device) -> None:
        flushed = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 1 << 28)
        self.buffer = torch.zeros(flushed // 4, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cycles = 20_000_000
        for _ in range(2):  # the first time also loads the kernel
            self.start.record()
            torch.cuda._sleep(cycles)
            self.end.record()
            self.end.synchronize()
        self.cycles_per_ms = cycles / self.start.elapsed_time(self.end)

    def __call__(self, contestant: Contestant, stall_ms: float) -> Sample:
        state = contestant.prepare()
        if contestant.in_a_row == 1:
            self.buffer.sum()
            torch.cuda._sleep(int(stall_ms * self.cycles_per_ms))
        else:
            torch.cuda.synchronize()
        self.start.record()
        began = time.perf_counter()
        for _ in range(contestant.in_a_row):
            contestant.call(state)
        host_ms = 1e3 * (time.perf_counter() - began)
        self.end.record()
        self.end.synchronize()
        return Sample(self.start.elapsed_time(self.end) / contestant.in_a_row, host_ms / contestant.in_a_row)


class CpuTimer:
    """Times a contestant by ``time.perf_counter``: the mean of as many calls as ``seconds`` have room for, or of one.

    Before each call ``flushed`` bytes are read, so that its inputs come from memory; the time for that is not counted.
    """

    def __init__(self, seconds: float, flushed: int) -> None:
        self.seconds = seconds
        self.buffer = torch.ones(flushed // 4)  # zeros that nobody wrote are one page, over and over

    def __call__(self, contestant: Contestant, stall_ms: float) -> Sample:
        end = time.perf_counter() + self.seconds
        calls, elapsed = 0, 0.0
        while not calls or time.perf_counter() < end:
            state = contestant.prepare()
            if contestant.in_a_row == 1:
                self.buffer.sum()
            began = time.perf_counter()
            for _ in range(contestant.in_a_row):
                contestant.call(state)
            elapsed += time.perf_counter() - began
            calls += contestant.in_a_row
        return Sample(1e3 * elapsed / calls, None)


def _last_cache_bytes() -> int:
    """The size of the last of a core's caches; 32 MiB where the system does not say."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


def interleave(
    contestants: dict[str, Contestant],
    timer: Timer,
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Sample]]:
    """Samples of each contestant, who take turns, in an order that changes from round to round.

    After the warm-up come ``rounds`` rounds, or as many as take ``seconds``, but at least ``FEWEST_ROUNDS``.
    """
    stalls: dict[str, float] = {}
    for name, contestant in contestants.items():
        stalls[name] = 0.0
        for _ in range(1 if timer(contestant, 0.0).host_ms is None else WARMUP_ROUNDS):  # what compiles has done so now
            stalls[name] = max(stalls[name], 0.1 + 1.5 * (timer(contestant, 1.0).host_ms or 0.0))
    began = clock()
    for name, contestant in contestants.items():
        timer(contestant, stalls[name])
    fitting = int(seconds / max(clock() - began, 1e-9))
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    for number in range(max(FEWEST_ROUNDS, min(rounds, fitting))):
        for name in turn(list(contestants), number):
            samples[name].append(timer(contestants[name], stalls[name]))
    return samples


def turn(names: list[str], number: int) -> list[str]:
    """The order of a round: everyone is first in turn, and before the others as often as behind them."""
    start = number // 2 % len(names)
    order = names[start:] + names[:start]
    return order[::-1] if number % 2 else order


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of their time over ours, round by round: above 1 ours is faster."""
    return spread(their / our for our, their in zip(ours, theirs, strict=True))


def measure_ceilings(device: torch.device, timer: Timer, dtypes: Sequence[str]) -> Ceilings:
    """What a file keeps under "ceilings": bytes a second, read and written, of a copy, and FLOPs a second of a product
    of square matrices, the second one transposed, in fp32 and those of ``dtypes`` (names of ``DTYPES``).

    By the fastest sample, as STREAM has it (McCalpin, 1995): a ceiling is what the machine can do, and what others do
    on it for a moment only ever takes from that.
    """
    on_gpu = device.type == "cuda"
    source = torch.randn(1 << (28 if on_gpu else 25), device=device)  # 1 GiB, 128 MiB
    target = torch.empty_like(source)
    products = {name: dtype for name, dtype in DTYPES.items() if name in ("fp32", *dtypes)}
    sizes = {name: 8192 if on_gpu else _product_size(dtype) for name, dtype in products.items()}
    contestants = {name: _product(sizes[name], dtype, device) for name, dtype in products.items()}
    contestants["copy"] = Contestant(lambda _: target.copy_(source))
    # About a third of a second on a GPU, for the clocks to settle where this load lets them.
    for _ in range(200 if on_gpu else 1):
        contestants[next(reversed(products))].call(None)
    samples = interleave(contestants, timer, rounds=40, seconds=6.0)
    least = {name: min(sample.ms for sample in of_one) for name, of_one in samples.items()}
    return {
        "copy_bytes_per_s": 1e3 * 2 * source.nbytes / least["copy"],
        "matmul_flops_per_s": {name: 1e3 * 2 * sizes[name] ** 3 / least[name] for name in products},
    }


@functools.cache
def _product_size(dtype: torch.dtype) -> int:
    """How large the matrices of a product on the CPU are: 2048, or 512 where that would take seconds, as it does in
    bf16 on a processor that has no instructions for it."""
    if dtype == torch.float32:
        return 2048
    small = _product(512, dtype, torch.device("cpu"))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        small.call(None)
        seconds.append(time.perf_counter() - began)
    return 2048 if min(seconds) < 0.015 else 512


def _product(n: int, dtype: torch.dtype, device: torch.device) -> Contestant:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    return Contestant(lambda _: torch.mm(a, b.T, out=c))


def matmul_rate(ceilings: Ceilings, dtype: str) -> float:
    """The FLOPs a second that a matrix product in ``dtype`` can reach: those measured, or those of fp32 where that is
    more or the only one measured, since a product in half precision can be had in fp32."""
    rates = ceilings["matmul_flops_per_s"]
    return max(rates.get(dtype, 0.0), rates["fp32"])


def drifted(before: Ceilings, after: Ceilings, device: torch.device) -> list[str]:
    """A sentence for each ceiling that changed by more than ``MOST_DRIFT`` of such a device."""
    most = MOST_DRIFT[device.type]
    was, became = _flat(before), _flat(after)
    changes = {name: became[name] / was[name] - 1 for name in was}
    return [
        f"the ceiling of {name} changed by {change:+.1%} during the run; at most {most:.0%} is allowed"
        for name, change in changes.items()
        if not abs(change) <= most
    ]


def _flat(ceilings: Ceilings) -> dict[str, float]:
    products = {f"a product in {name}": rate for name, rate in ceilings["matmul_flops_per_s"].items()}
    return {"a copy": ceilings["copy_bytes_per_s"], **products}


def clean_up(device: torch.device) -> None:
    """Let go of what a case held, and wait for the device."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def first_line(error: BaseException | str) -> str:
    """An error as part of a sentence: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    line = lines[0][:300] if lines else "no message"
    return line if isinstance(error, str) else f"{type(error).__name__}: {line}"


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], say: Callable[[str], Any] = print) -> None:
    """Print columns, the first one flush left."""
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    for row in (headings, *rows):
        cells = (text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        say("  ".join((row[0].ljust(widths[0]), *cells)))


def progress_bar() -> Progress:
    """A bar on stderr with the time left, on a terminal; what is printed meanwhile appears above it."""
    from rich import progress  # the sanitizer's programs do without
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left:"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True, soft_wrap=True, highlight=False, markup=False),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
