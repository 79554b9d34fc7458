"""benchmarks/harness.py and machine.py: who is timed when, by which clock, and what else the machine was doing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgpt.benchmarks import harness, machine
from fastgpt.benchmarks.harness import Contestant, CpuTimer, Sample
from fastgpt.benchmarks.machine import OtherWork

CPU = torch.device("cpu")
CEILINGS = {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": {"fp32": 5e13, "bf16": 8e14}}


class FakeTimer:
    """Gives each contestant's scripted milliseconds, and remembers who was timed with which stall."""

    def __init__(self, ms: dict[str, Iterator[float]], host_ms: float | None = 0.5) -> None:
        self.ms, self.host_ms = ms, host_ms
        self.log: list[tuple[str, float]] = []

    def __call__(self, contestant: Contestant, stall_ms: float) -> Sample:
        name = contestant.call(contestant.prepare())
        self.log.append((name, stall_ms))
        return Sample(next(self.ms[name]), self.host_ms)


def contestants(*names: str) -> dict[str, Contestant]:
    return {name: Contestant(lambda _, name=name: name) for name in names}


def still() -> float:
    return 0.0


def test_contestants_take_turns() -> None:
    timer = FakeTimer({name: itertools.repeat(1.0) for name in "abc"})
    samples = harness.interleave(contestants(*"abc"), timer, 12, 4.0, still)
    assert {name: len(of_one) for name, of_one in samples.items()} == {"a": 12, "b": 12, "c": 12}
    timed = [name for name, _ in timer.log[-36:]]
    rounds = ["".join(timed[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    for first, second in itertools.permutations("abc", 2):
        before = sum(order.index(first) < order.index(second) for order in rounds)
        assert before == 6, f"{first} stands before {second} in {before} of 12 rounds"
    assert {order[0] for order in rounds} == set("abc")


def test_the_first_calls_do_not_count_and_the_stall_covers_the_launching() -> None:
    slow_at_first = itertools.chain([900.0, 90.0, 9.0, 9.0], itertools.repeat(1.0))
    timer = FakeTimer({"a": slow_at_first}, host_ms=2.0)
    samples = harness.interleave(contestants("a"), timer, 8, 4.0, still)
    assert [sample.ms for sample in samples["a"]] == [1.0] * 8
    assert timer.log[0] == ("a", 0.0)
    assert all(stall > 2.0 for _, stall in timer.log[-8:])


@pytest.mark.parametrize(("seconds_a_round", "wanted"), [(0.001, 30), (0.4, 10), (60.0, harness.FEWEST_ROUNDS)])
def test_rounds_are_as_many_as_the_time_allows(seconds_a_round: float, wanted: int) -> None:
    now = itertools.count(step=seconds_a_round)
    timer = FakeTimer({"a": itertools.repeat(1.0)}, host_ms=None)
    samples = harness.interleave(contestants("a"), timer, 30, 4.0, lambda: next(now))
    assert len(samples["a"]) == wanted


def test_ratios_are_taken_within_a_round() -> None:
    assert harness.ratios([2.0, 4.0, 3.0], [4.0, 4.0, 9.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_a_cpu_sample_is_the_mean_of_the_calls_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call takes 4 ms by this clock, and what prepares it 2; 20 ms have room for 4, and the last is not cut."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    states = []

    def passes(seconds: float) -> None:
        now[0] += seconds

    def call(state: int) -> None:
        states.append(state)
        passes(0.004)

    numbers = itertools.count()
    contestant = Contestant(call, lambda: passes(0.002) or next(numbers))
    sample = CpuTimer(0.02, 0)(contestant, 0.0)
    assert sample == (pytest.approx(4.0), None)
    assert states == [0, 1, 2, 3], "each call has a state of its own"
    states.clear()
    assert CpuTimer(0.0, 0)(Contestant(call, lambda: 7, in_a_row=3), 0.0).ms == pytest.approx(4.0)
    assert states == [7, 7, 7]


class Gpu:
    """In place of torch.cuda: each kernel that is launched takes its time once those before it have ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host_ms = self.busy_until_ms = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = max(gpu.host_ms, gpu.busy_until_ms)

            def synchronize(self) -> None:
                gpu.host_ms = max(gpu.host_ms, self.at)

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(cycles / 1e6, 0.0))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.launch(0.0, self.busy_until_ms - self.host_ms))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1 << 20))
        monkeypatch.setattr(harness.time, "perf_counter", lambda: 1e-3 * self.host_ms)

    def launch(self, ms: float, host_ms: float = 0.1) -> None:
        self.host_ms += max(0.0, host_ms)
        self.busy_until_ms = max(self.host_ms, self.busy_until_ms) + ms


def test_a_gpu_sample_is_what_the_device_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three kernels of 0.02 ms, each of which takes the host 0.1 ms to launch: in the stall's shadow 0.06 ms."""
    gpu = Gpu(monkeypatch)
    timer = harness.CudaTimer(CPU)
    assert timer.cycles_per_ms == pytest.approx(1e6)
    assert timer.buffer.nbytes == 1 << 28
    read = []
    monkeypatch.setattr(timer, "buffer", SimpleNamespace(sum=lambda: read.append(gpu.launch(0.05))))

    def call(_: None) -> None:
        for _ in range(3):
            gpu.launch(0.02)

    contestant = Contestant(call, lambda: (gpu.launch(7.0), gpu.launch(0.0, host_ms=9.0)))
    assert timer(contestant, 1.0) == (pytest.approx(0.06), pytest.approx(0.3))
    assert len(read) == 1
    assert timer(contestant, 0.0).ms > 0.06, "without a stall it may wait for the host"
    in_a_row = timer(Contestant(call, in_a_row=4), 1.0)
    assert in_a_row == (pytest.approx(0.3, abs=0.01), pytest.approx(0.3)), "the host's time is in it"


def test_what_is_read_before_a_call_is_not_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = CpuTimer(0.0, 1 << 20)
    assert timer.buffer.nbytes == 1 << 20
    assert timer.buffer.all(), "what was never written lies in one page, and its reading flushes nothing"
    assert harness._last_cache_bytes() >= 1 << 18
    now, read = [0.0], []

    class Buffer:
        def sum(self) -> None:
            read.append(now[0])
            now[0] += 1.0

    def call(_: None) -> None:
        now[0] += 0.004

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timer, "buffer", Buffer())
    assert timer(Contestant(call), 0.0).ms == pytest.approx(4.0)
    assert len(read) == 1
    timer(Contestant(call, in_a_row=2), 0.0)
    assert len(read) == 1, "calls in a row find the caches as they are"


@pytest.mark.parametrize(
    ("device", "factor", "valid"),
    [
        ("cuda", 1.029, True),
        ("cuda", 0.971, True),
        ("cuda", 1.031, False),
        ("cuda", 0.969, False),
        ("cpu", 1.149, True),
        ("cpu", 0.849, False),
        ("cpu", float("nan"), False),
    ],
)
@pytest.mark.parametrize("which", ["a copy", "a product in bf16"])
def test_what_counts_as_drift(which: str, device: str, factor: float, valid: bool) -> None:
    after = {**CEILINGS, "matmul_flops_per_s": dict(CEILINGS["matmul_flops_per_s"])}
    if which == "a copy":
        after["copy_bytes_per_s"] *= factor
    else:
        after["matmul_flops_per_s"]["bf16"] *= factor
    problems = harness.drifted(CEILINGS, after, torch.device(device))
    assert [problem.partition(" changed")[0] for problem in problems] == [f"the ceiling of {which}"] * (not valid)


@pytest.mark.parametrize("dtypes", [["bf16"], ["fp32"]])
def test_ceilings_are_rates_of_what_was_done(dtypes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_product_size", lambda dtype: 64)
    times = {"copy": 2.0, "fp32": 0.5, "bf16": 0.25}

    def interleaved(contestants: dict[str, Contestant], *_: object, **__: object) -> dict[str, list[Sample]]:
        for contestant in contestants.values():
            contestant.call(None)
        return {name: [Sample(3 * times[name], None), Sample(times[name], None)] for name in contestants}

    monkeypatch.setattr(harness, "interleave", interleaved)
    ceilings = harness.measure_ceilings(CPU, CpuTimer(0.0, 0), dtypes)
    assert ceilings["copy_bytes_per_s"] == pytest.approx(2 * (1 << 27) / 2e-3)
    rates = {name: 2e3 * 64**3 / times[name] for name in {"fp32", *dtypes}}
    assert ceilings["matmul_flops_per_s"] == pytest.approx(rates)


@pytest.mark.parametrize(("milliseconds", "size"), [(5, 2048), (20, 512)])
def test_a_product_that_takes_long_is_a_smaller_one(
    milliseconds: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def call(_: None) -> None:
        now[0] += 1e-3 * milliseconds

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(harness, "_product", lambda n, dtype, device: Contestant(call))
    size_of = harness._product_size.__wrapped__  # what it remembers is of this machine
    assert size_of(torch.bfloat16) == size
    assert size_of(torch.float32) == 2048


@pytest.mark.parametrize(("dtype", "rate"), [("fp32", 3.0), ("bf16", 3.0), ("fp16", 3.0)])
def test_a_product_in_half_precision_can_be_had_in_fp32(dtype: str, rate: float) -> None:
    assert harness.matmul_rate({"matmul_flops_per_s": {"fp32": 3.0, "bf16": 1.0}}, dtype) == rate
    assert harness.matmul_rate(CEILINGS, "bf16") == 8e14


def test_a_table_has_columns(capsys: pytest.CaptureFixture[str]) -> None:
    harness.print_table(("name", "ms"), [("a", "10"), ("longer", "1")])
    assert capsys.readouterr().out.splitlines() == ["name    ms", "a       10", "longer   1"]


def test_an_error_in_a_line() -> None:
    assert harness.first_line(ValueError("one\ntwo")) == "ValueError: one"
    assert harness.first_line("  one\ntwo") == "one"
    assert harness.first_line(KeyboardInterrupt()) == "KeyboardInterrupt: no message"


@pytest.mark.parametrize(("others_cores", "said"), [(0.0, "was quiet"), (0.5, "was busy")])
def test_our_own_work_is_not_that_of_others(others_cores: float, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((10.0, 14.0))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    own = iter((3.0, 10.0))
    monkeypatch.setattr(machine.time, "process_time", lambda: next(own))
    busy = iter((100.0, 107.0 + 4 * others_cores))
    monkeypatch.setattr(machine, "_busy_seconds", lambda: next(busy))
    with OtherWork() as others:
        pass
    assert others.cores == pytest.approx(others_cores)
    assert said in str(others)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the kernel does not tell")
def test_the_kernel_counts_what_we_do() -> None:
    """Half a second of work on a core is half a second in /proc/stat, but for a few ticks."""
    before, start = machine._busy_seconds(), time.process_time()
    while time.process_time() - start < 0.5:
        pass
    assert machine._busy_seconds() - before >= 0.45
