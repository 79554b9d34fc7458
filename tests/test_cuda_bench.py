"""What of the benchmarks only a GPU can show: its clock, its ceilings, its memory, and whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from error_rule import DEVICE

from fastgpt import GPT, GPTConfig
from fastgpt.benchmarks import generation, harness, kernels, models, result, scaling, session
from fastgpt.benchmarks.harness import Contestant, CudaTimer
from fastgpt.benchmarks.session import Plan
from fastgpt.config import TrainConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIG = GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=2, n_embd=64, bias=False, gelu="none")
CEILINGS = {"copy_bytes_per_s": 1e12, "matmul_flops_per_s": {"fp32": 1e13, "bf16": 1e14, "fp16": 1e14}}


@pytest.fixture
def timer() -> CudaTimer:
    return CudaTimer(torch.device(DEVICE))


def asleep(timer: CudaTimer, ms: float) -> Callable[[Any], None]:
    return lambda _: torch.cuda._sleep(int(ms * timer.cycles_per_ms))


def test_a_sample_is_what_the_gpu_took(timer):
    """Neither what comes before the call nor the stall is in it; the clock of the cycles may change."""
    slow = Contestant(asleep(timer, 4.0), lambda: asleep(timer, 20.0)(None))
    sample = min(timer(slow, 1.0) for _ in range(3))
    assert sample.ms == pytest.approx(4.0, rel=0.3)
    assert sample.host_ms is not None
    assert sample.host_ms < 4.0, "the launch takes no time of the kernel's"
    in_a_row = min(timer(Contestant(asleep(timer, 2.0), in_a_row=5), 0.0) for _ in range(3))
    assert in_a_row.ms == pytest.approx(2.0, rel=0.3)


def test_the_launching_of_many_kernels_is_in_the_shadow_of_the_stall(timer):
    x = torch.ones(8, device=DEVICE)

    def call(_: Any) -> None:
        for _ in range(50):
            x.add_(0)

    stalled, bare = (min(timer(Contestant(call), stall) for _ in range(5)) for stall in (5.0, 0.0))
    assert stalled.ms <= bare.ms


def test_a_call_finds_the_cache_full_of_something_else(timer):
    """Also of what was read just before, to prepare the call."""
    x = torch.ones(torch.cuda.get_device_properties(DEVICE).L2_cache_size // 8, device=DEVICE)
    cold = min(timer(Contestant(lambda _: x.sum()), 1.0).ms for _ in range(9))
    warm = min(timer(Contestant(lambda _: x.sum(), lambda: x.sum()), 1.0).ms for _ in range(9))
    assert warm == pytest.approx(cold, rel=0.3)
    assert timer.buffer.nbytes >= 4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size


def test_ceilings(timer):
    found = harness.measure_ceilings(torch.device(DEVICE), timer, ["bf16", "fp16"])
    rates = found["matmul_flops_per_s"]
    assert rates.keys() == {"fp32", "bf16", "fp16"}
    assert 1e11 < found["copy_bytes_per_s"] < 1e14
    assert 1e12 < rates["fp32"] < rates["bf16"] < 1e16


def test_the_parts_of_a_step_are_told_apart(timer):
    clock = scaling.StepClock(torch.device(DEVICE))
    clock("")
    for part, ms in zip(scaling.PARTS, (1.0, 2.0, 4.0, 8.0), strict=True):
        asleep(timer, ms)(None)
        clock(part)
    parts = clock.milliseconds()
    assert list(parts) == list(scaling.PARTS)
    for part, ms in zip(scaling.PARTS, (1.0, 2.0, 4.0, 8.0), strict=True):
        assert parts[part] == pytest.approx(ms, rel=0.4)


def test_memory_is_counted_as_the_allocator_does():
    kept = []

    def call() -> None:
        x = torch.empty(1 << 20, device=DEVICE)
        y = x + 1
        del x
        kept.append(y + 1)

    assert scaling.memory_rise(call, torch.device(DEVICE)) == 8 << 20


def test_who_waits_in_the_hosts_memory_leaves_the_gpu_and_goes_on():
    torch.manual_seed(0)
    weights = GPT(CONFIG).state_dict()
    device, batch = torch.device(DEVICE), models.random_batches(CONFIG, 4, DEVICE)[0]
    moved, stays = (models.build_competitor("torch", CONFIG, TrainConfig(), weights, device) for _ in range(2))
    losses = []
    for competitor in (moved, stays):
        with competitor.scope():
            models.step(competitor, batch)
            if competitor is moved:
                before = torch.cuda.memory_allocated()
                competitor.move(torch.device("cpu"))
                left = before - torch.cuda.memory_allocated()
                assert left >= 0.9 * competitor.held_bytes()
                assert competitor.device.type == "cpu"
                competitor.move(device)
                assert torch.cuda.memory_allocated() - (before - left) >= 0.9 * left
            losses.append([models.step(competitor, batch).item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), "PyTorch's attention has a backward that may differ by bits"


def test_out_of_memory_is_where_memory_ends():
    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(1 << 50, device=DEVICE)
    assert session.reason_of(error.value).startswith(session.MEMORY_ENDS)


# Whole runs


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.LADDER, "tiny", (CONFIG, TrainConfig()))
    monkeypatch.setattr(session, "measure_ceilings", lambda *_: CEILINGS)
    for module in (scaling, generation):
        monkeypatch.setattr(module, "CASE_SECONDS", 0.0)
    monkeypatch.setattr(scaling, "SAMPLE_SECONDS", 0.0)


def checked(file: result.Result) -> list[dict[str, Any]]:
    data = json.loads(file.path.read_text())
    assert result.violations(data) == []
    assert (data["problems"], data["complete"], data["valid"]) == ([], True, True)
    assert data["machine"]["gpu"] == torch.cuda.get_device_name()
    return data["results"]


def whole_models(**settings: Any) -> dict[str, Any]:
    return {"device": torch.device(DEVICE), "models": ["tiny"], "dtypes": ["bf16"], "rounds": 7, **settings}


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("room", [True, False])
def test_training_steps_are_timed(room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all competitors on the GPU, and with all but one of them in the host's memory."""
    if not room:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    fixed = {"sweep": "tiny", "block_sizes": [0], "batch_sizes": [0], "tokens": 256, "modes": ["eager"]}
    rows = checked(scaling.scale(scaling.Options(**whole_models(**fixed)), Plan(out=tmp_path / "run.json")))
    assert {"reference", "torch", "plain", "plain naive"} <= {row["competitor"] for row in rows}
    for row in rows:
        assert sum(row["split_ms"].values()) == pytest.approx(row["step_ms"]["median"], rel=0.5)
        assert row["peak_memory_bytes"] > 16 * row["model"]["parameters"]


@pytest.mark.usefixtures("_quick")
def test_generation_is_timed(tmp_path: Path) -> None:
    given = generation.Options(**whole_models(batch_sizes=[1, 3], contexts=[9], new_tokens=5))
    rows = checked(generation.run(given, Plan(out=tmp_path / "run.json")))
    assert {(row["competitor"], row["batch_size"]) for row in rows} >= {("torch", 1), ("torch", 3)}


@pytest.mark.usefixtures("_quick")
def test_kernels_are_timed(tmp_path: Path) -> None:
    given = kernels.Options(torch.device(DEVICE), "tiny", ("bf16",), only=("gelu, M",), without=("torch.compile",))
    rows = checked(kernels.measure(given, Plan(out=tmp_path / "run.json")))
    for row in rows:
        assert {"torch", "torch eager"} <= row["competitors"].keys()
        assert all(one["host_ms"] is not None for one in row["competitors"].values())
