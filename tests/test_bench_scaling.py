"""`fastgpt bench scaling`: who competes, what is checked, what a step is made of and holds, and what is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nanogpt_stub import write_checkout

from fastgpt import GPT, cli, devices, dispatch, ops
from fastgpt.benchmarks import models, result, scaling, session
from fastgpt.benchmarks.kernels import say_how_it_ended
from fastgpt.benchmarks.models import LADDER, PLAIN, PLAIN_NAIVE
from fastgpt.benchmarks.scaling import Entrant, Options
from fastgpt.config import PRESETS, GPTConfig, TrainConfig, UserError
from fastgpt.placement import DTYPES

CPU = torch.device("cpu")
CEILINGS = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": {"fp32": 1e11, "bf16": 2e11}}
TINY = {
    name: (GPTConfig(block_size=8, vocab_size=33, n_layer=1, n_head=2, n_embd=width, bias=False, gelu="none"), train)
    for name, width, train in (("tiny", 16, TrainConfig()), ("wider", 32, TrainConfig()))
}
SETTINGS: dict[str, Any] = {"models": ["tiny"], "modes": ["eager"], "dtypes": ["fp32"], "sweep": "tiny", "tokens": 32}
FIXED = {"block_sizes": [0], "batch_sizes": [0]}


@pytest.fixture
def nanogpt(tmp_path: Path) -> Path:
    return write_checkout(tmp_path / "nanoGPT")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models, short samples, and ceilings that nobody has to measure."""
    for name, rung in TINY.items():
        monkeypatch.setitem(LADDER, name, rung)
    monkeypatch.setattr(scaling, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(scaling, "CASE_SECONDS", 0.0)
    monkeypatch.setattr(session, "measure_ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(session, "timer_for", lambda _: None)


def options(**settings: Any) -> Options:
    return Options(CPU, **{**SETTINGS, **FIXED, **settings})


def test_a_run_has_every_competitor_and_follows_the_schema(tmp_path, nanogpt, capsys):
    """Ladder and batch sizes; the models are known, and what a row says of each other's fields is so."""
    given = options(models=["tiny", "wider"], batch_sizes=[2, 4], backends=["torch", "reference"], nanogpt=nanogpt)
    file = scaling.scale(given, out=tmp_path / "run.json", commit="abc")
    data = json.loads((tmp_path / "run.json").read_text())
    assert result.violations(data) == []
    assert (data["kind"], data["commit"], data["complete"], data["valid"]) == ("scaling", "abc", True, True)
    assert say_how_it_ended(file) == 0
    cases = {(row["model"]["name"], row["batch_size"]) for row in data["results"]}
    assert cases == {("tiny", 4), ("wider", 4), ("tiny", 2)}, "the ladder, and a batch that is not in it"
    assert [row["competitor"] for row in data["results"]] == [
        "torch",
        "plain",
        "nanoGPT",
        "reference",
        "plain naive",
    ] * 3
    for row in data["results"]:
        assert row["block_size"] == 8
        assert 0 < sum(row["split_ms"].values()) <= 4 * row["step_ms"]["max"]
        assert row["tokens_per_s"]["median"] == pytest.approx(8e3 * row["batch_size"] / row["step_ms"]["median"])
        assert row["mfu"]["of_peak"] is None
        achieved = row["tokens_per_s"]["median"] * row["flops_per_token"]
        assert row["mfu"]["of_measured"] == pytest.approx(achieved / 1e11)
        width = row["model"]["n_embd"]
        assert row["model"]["parameters"] == 12 * width**2 + 33 * width + 3 * width
        assert row["flops_per_token"] == 6 * (12 * width**2 + 33 * width) + 12 * width * 8
        assert row["peak_memory_bytes"] > 4 * 4 * row["model"]["parameters"], "weights, gradients, and two means"
        peers = (
            {"plain, eager", "plain naive, eager", "nanoGPT, eager"}
            if row["competitor"] in dispatch.BACKENDS
            else set()
        )
        assert row["ratios"].keys() == peers
    lines = {(line["sweep"], line["competitor"], line["points"]) for line in data["summary"]["growth"]}
    assert lines == {
        (sweep, name, 2)
        for sweep in ("parameters", "batch_size")
        for name in ("torch", "reference", PLAIN, PLAIN_NAIVE, "nanoGPT")
    }
    printed = capsys.readouterr().out
    assert "tiny, 4 x 8 tokens" in printed
    assert "nanoGPT, eager, fp32" in printed
    assert "number of parameters" not in printed


def test_what_is_not_there_is_named_with_its_reason(tmp_path):
    absent = scaling.scale(options(), out=tmp_path / "run.json").data["absent"]
    assert "--vs" in absent["nanoGPT"]
    for backend in ("triton", "cuda"):
        assert backend in absent


def wrong_forward(op):
    return lambda *args, **settings: op(*args, **settings) * 1.5


def wrong_backward(op):
    """Values are right, and gradients a tenth too large."""

    def call(*args, **settings):
        y = op(*args, **settings)
        return y + 0.1 * (y - y.detach())

    return call


@pytest.mark.parametrize("fault", [wrong_forward, wrong_backward])
def test_a_wrong_kernel_is_refused_and_never_timed(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "gelu", fault(ops.gelu))
    interleave = scaling.interleave

    def timed(contestants: dict[str, Any], *args: Any) -> Any:
        assert contestants.keys() == {"plain, eager, fp32"}
        return interleave(contestants, *args)

    monkeypatch.setattr(scaling, "interleave", timed)
    file = scaling.scale(options(backends=["torch"]), out=tmp_path / "run.json")
    (problem,) = file.data["problems"]
    assert problem.startswith("tiny, 4 x 8 tokens: torch, eager, fp32: wrong: at step 1 ")
    assert [row["competitor"] for row in file.rows] == [PLAIN]
    assert say_how_it_ended(file) == 1


def test_a_wrong_update_shows_at_the_next_step():
    config, train = TINY["tiny"]
    weights, batch = GPT(config).state_dict(), models.random_batches(config, 4)[0]
    truth = models.true_steps(config, train, weights, batch)
    assert truth[0].loss - truth[-1].loss > 10 * models.ALLOWED_LOSS[torch.float32], "the batch is being learnt"

    def of(rate: float) -> str | None:
        mine = models.build_competitor("torch", config, dataclasses.replace(train, lr=rate * train.lr), weights, CPU)
        return models.difference(models.first_steps(mine, batch, 0.0), truth, torch.float32)

    assert of(1.0) is None
    assert (of(1.2) or "").startswith("wrong: at step 2 its loss")


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("nan")), (1.2, 1.0), (1.0, 1.2)])
def test_what_differs_is_wrong(loss, norm):
    truth = [models.Checked(1.0, {"large": 100.0, "small": 1.0, "tiny": 1e-9})]
    assert models.difference(truth, truth, torch.bfloat16) is None
    wrong = [models.Checked(loss, {"large": 100.0, "small": norm, "tiny": 1e-9})]
    assert models.difference(wrong, truth, torch.bfloat16) is not None
    rounded = [models.Checked(1.0, {"large": 100.0, "small": 1.0, "tiny": 1e-3})]
    assert models.difference(rounded, truth, torch.bfloat16) is None


def test_the_truth_may_be_computed_in_parts(monkeypatch):
    config, train = TINY["tiny"]
    weights, batch = GPT(config).state_dict(), models.random_batches(config, 5)[0]
    whole = models.true_steps(config, train, weights, batch)
    monkeypatch.setattr(models, "TRUTH_TOKENS", 16)  # parts of 2, 2 and 1 sequences
    for part, all_at_once in zip(models.true_steps(config, train, weights, batch), whole, strict=True):
        assert part.loss == pytest.approx(all_at_once.loss, rel=1e-5)
        assert part.norms == pytest.approx(all_at_once.norms, rel=1e-4)


def test_all_dtypes_take_turns_together():
    times = {
        Entrant("cpp", "eager", "bf16"): [1.0, 2.0],
        Entrant(PLAIN, "eager", "bf16"): [2.0, 4.0],
        Entrant(PLAIN, "eager", "fp32"): [3.0, 8.0],
    }
    ours = next(iter(times))
    found = {name: ratio["median"] for name, ratio in scaling.ratios_of(ours, times).items()}
    assert found == {"plain, eager": 2.0, "plain, eager, fp32": 3.5}


def test_the_parts_of_a_step_are_told_apart(monkeypatch):
    ends = iter((10.0, 10.001, 10.004, 10.010, 10.020, 10.021, 10.025, 10.033, 10.043))
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: next(ends))
    clock = scaling.StepClock(CPU)
    for part in ("", *scaling.PARTS, *scaling.PARTS):
        clock(part)
    assert clock.milliseconds() == pytest.approx({"data": 2, "forward": 7, "backward": 14, "optimizer": 20})


def test_a_sample_is_the_mean_of_its_steps_and_the_sum_of_its_parts(monkeypatch):
    monkeypatch.setattr(scaling.StepClock, "milliseconds", lambda self: {"data": 2.0, "forward": 4.0 * len(self.ends)})
    config = TINY["tiny"][0]
    competitor = models.build_competitor(PLAIN, *TINY["tiny"], GPT(config).state_dict(), CPU)
    kept: list[dict[str, float]] = []
    batches = models.random_batches(config, 2)
    contestant = scaling.Training(options())._contestant(competitor, batches, 2, False, kept.append)
    assert contestant.call(None) == 19.0
    assert kept == [{"data": 1.0, "forward": 18.0}], "begun once, and two steps of four parts"


def test_competitors_see_the_same_batches():
    """However many samples each has given before: the n-th of all are on the same batches."""
    config, train = TINY["tiny"]
    weights = GPT(config).state_dict()
    seen: list[int] = []

    class Batches:
        def __getitem__(self, index: int) -> models.Batch:
            seen.append(index)
            return models.random_batches(config, 2)[index]

    training = scaling.Training(options())
    for name in ("torch", PLAIN):
        competitor = models.build_competitor(name, config, train, weights, CPU)
        contestant = training._contestant(competitor, Batches(), 2, False, lambda split: None)  # type: ignore[arg-type]
        contestant.call(None)
        contestant.call(None)
    assert seen == [0, 1, 2, 3] * 2


# Memory


def test_memory_is_counted_exactly():
    kept = []

    def call() -> None:
        x = torch.empty(1000, 1000)
        y = x + 1
        del x
        kept.append(y + 1)

    assert 8_000_000 <= scaling.memory_rise(call, CPU) < 8_000_100
    competitor = models.build_competitor(PLAIN, *TINY["tiny"], GPT(TINY["tiny"][0]).state_dict(), CPU)
    weights = 4 * sum(p.numel() for p in competitor.model.parameters())
    assert competitor.held_bytes() == weights
    models.step(competitor, models.random_batches(TINY["tiny"][0], 2)[0])
    assert 3 * weights <= competitor.held_bytes() <= 3 * weights + 4 * 100, "AdamW's two means, and its counts of steps"


@pytest.mark.parametrize("name", ["torch", PLAIN])
def test_what_is_moved_is_all_that_a_competitor_holds(name):
    """It goes on from copies as if nothing had happened, and nobody looks at where they came from."""
    weights, batch = GPT(TINY["tiny"][0]).state_dict(), models.random_batches(TINY["tiny"][0], 2)[0]
    moved, stays = (models.build_competitor(name, *TINY["tiny"], weights, CPU) for _ in range(2))
    losses = []
    for competitor in (moved, stays):
        with competitor.scope():
            models.step(competitor, batch)
            if competitor is moved:
                for tensor, put in list(moved.tensors()):
                    put(tensor.clone())
                    tensor.fill_(float("nan"))
            losses.append([models.step(competitor, batch).item() for _ in range(3)])
    assert losses[0] == losses[1]


def test_the_estimate_is_near_what_is_measured():
    """Within a third, where activations are most of it."""
    config = dataclasses.replace(TINY["tiny"][0], block_size=64, n_layer=3, n_embd=64)
    competitor = models.build_competitor("torch", config, TrainConfig(), GPT(config).state_dict(), CPU)
    batches = models.random_batches(config, 16)
    models.step(competitor, batches[0])
    rise = scaling.memory_rise(lambda: models.step(competitor, batches[0]), CPU)
    estimate = scaling.estimated_bytes(config, 16, "fp32", unfused=False)
    assert estimate == pytest.approx(competitor.held_bytes() + rise, rel=0.33)
    assert scaling.estimated_bytes(config, 16, "fp32", unfused=True) > estimate


@pytest.mark.parametrize("failing", ["estimate", "allocation"])
def test_the_ladder_ends_where_memory_does(failing, tmp_path, monkeypatch):
    """No fault: the run is valid, says why, and does not try what is larger still."""
    if failing == "estimate":
        monkeypatch.setattr(scaling, "free_bytes", lambda: 1000)
    else:
        build = models.build_competitor

        def fail(*args: Any, **settings: Any) -> Any:
            torch.empty(1 << 60)
            return build(*args, **settings)

        monkeypatch.setattr(models, "build_competitor", fail)
    tried = []
    require = scaling.Training._require_room

    def try_it(self: Any, config: GPTConfig, *args: Any, **settings: Any) -> None:
        tried.append(config)
        require(self, config, *args, **settings)

    monkeypatch.setattr(scaling.Training, "_require_room", try_it)
    file = scaling.scale(options(models=["tiny", "wider"], backends=["torch"]), out=tmp_path / "run.json")
    assert file.rows == []
    assert say_how_it_ended(file) == 0
    assert set(tried) == {TINY["tiny"][0]}
    reasons = file.data["summary"]["left_out"]
    assert all(reason.startswith(session.MEMORY_ENDS) for of_case in reasons.values() for reason in of_case.values())
    assert reasons["wider, 4 x 8 tokens"]["torch, eager, fp32"] == "memory ends here: it did at tiny, 4 x 8 tokens"


def test_a_competitor_that_fails_leaves_the_others(tmp_path, monkeypatch):
    build = models.build_competitor

    def fail(name: str, *args: Any, **settings: Any) -> Any:
        if name == "torch":
            raise ValueError("no such thing\nmore")
        return build(name, *args, **settings)

    monkeypatch.setattr(models, "build_competitor", fail)
    file = scaling.scale(options(backends=["torch"]), out=tmp_path / "run.json")
    assert file.data["problems"] == ["tiny, 4 x 8 tokens: torch, eager, fp32: ValueError: no such thing"]
    assert [row["competitor"] for row in file.rows] == [PLAIN]


# Interrupted and resumed


def test_a_run_that_was_cut_short_is_resumed(tmp_path, monkeypatch):
    """The rows that are there stay as they are, with what was said of them; other settings are refused."""
    given = options(models=["tiny", "wider"], backends=["torch"])
    measure = scaling.Training.measure

    def cut_short(self: Any, case: Any, *args: Any) -> session.Outcome:
        if case.model == "wider":
            raise KeyboardInterrupt
        return measure(self, case, *args)._replace(left_out={"torch, compile, fp32": "wrong: it is"})

    monkeypatch.setattr(scaling.Training, "measure", cut_short)
    path = tmp_path / "run.json"
    with pytest.raises(KeyboardInterrupt):
        scaling.scale(given, out=path)
    before = json.loads(path.read_text())
    assert (before["complete"], before["valid"]) == (False, False)
    monkeypatch.setattr(scaling.Training, "measure", measure)
    file = scaling.scale(given, resume=path)
    assert file.rows[: len(before["results"])] == before["results"]
    assert [row["model"]["name"] for row in file.rows] == ["tiny", "tiny", "wider", "wider"]
    assert file.data["problems"] == ["tiny, 4 x 8 tokens: torch, compile, fp32: wrong: it is"]
    with pytest.raises(UserError, match="cannot be resumed: it is of another choice of settings"):
        scaling.scale(options(models=["tiny"], backends=["torch"]), resume=path)
    with pytest.raises(UserError, match="--resume goes on in its own file: leave out --out"):
        scaling.scale(given, resume=path, out=path)


def test_a_run_ends_in_time(tmp_path, monkeypatch):
    given = options(models=["tiny", "wider"], backends=["torch"])
    file = scaling.scale(given, out=tmp_path / "run.json", limit_s=0.0)
    assert file.rows == []
    assert (file.data["complete"], file.data["valid"]) == (False, False)
    assert "the time did not do for wider, 4 x 8 tokens" in file.data["problems"]


def test_ceilings_that_moved_make_a_run_invalid(tmp_path, monkeypatch):
    found = iter((CEILINGS, {**CEILINGS, "copy_bytes_per_s": 2e10}))
    monkeypatch.setattr(session, "measure_ceilings", lambda *_: next(found))
    file = scaling.scale(options(backends=["torch"]), out=tmp_path / "run.json")
    assert (file.data["complete"], file.data["valid"]) == (True, False)
    assert "changed by +100.0%" in file.data["problems"][0]


# Who competes


def test_the_ladder_ascends_from_a_million_to_gpt2_xl():
    sizes = [models.describe_model(name, config)["parameters"] for name, (config, _) in list(LADDER.items())[:8]]
    assert sizes == sorted(sizes)
    assert 0.79e6 < sizes[0] < 0.81e6
    assert 1.55e9 < sizes[-1] < 1.56e9
    for name in PRESETS.keys() - {"bigram", "finetune-shakespeare"}:
        assert name in LADDER
    assert all(config.gelu == "none" and config.tie_weights for config, _ in LADDER.values()), "as nanoGPT's"


def test_backends_that_are_emulated_are_not_timed(own_table):
    """In these tests Triton's interpreter and the emulator of CUDA are there, and run every op."""
    usable, absent = models.usable_backends(CPU)
    assert {"torch", "reference"} <= set(usable)
    assert {"triton", "cuda"} <= absent.keys()
    with pytest.raises(UserError, match="backend 'cuda' cannot be timed here: "):
        models.choose_backends(["cuda"], CPU)
    with pytest.raises(UserError, match="there is no backend 'fast'"):
        models.choose_backends(["fast"], CPU)
    assert models.choose_backends(["torch", "torch"], CPU) == (["torch"], {})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"models": ["gpt5"]}, "there is no model 'gpt5' to measure; there are shakespeare-cpu"),
        ({"sweep": "gpt5"}, "there is no model 'gpt5'"),
        ({"modes": ["lazy"]}, "there is no mode 'lazy'"),
        ({"dtypes": ["fp8"]}, "there is no dtype 'fp8'"),
        ({"block_sizes": [0, 8]}, "--block-size must be at least 1, got 0"),
        ({"batch_sizes": [-1]}, "--batch-size must be at least 1, got -1"),
        ({"tokens": -1}, "--tokens must be at least 1"),
        ({"rounds": 3}, "--rounds must be at least 7"),
        ({"dropout": 1.0}, r"--dropout must be in \[0, 1\), got 1"),
    ],
)
def test_settings_that_cannot_be_followed(settings, said):
    with pytest.raises(UserError, match=said):
        options(**settings)


@pytest.mark.parametrize("text", ["nanogpt", "nanogpt=", "lit=/tmp", "nanogpt=/nowhere"])
def test_vs_names_a_checkout(text):
    with pytest.raises(UserError, match=r"^--vs"):
        models.parse_vs(text)


def test_vs_is_optional(nanogpt):
    assert models.parse_vs(None) is None
    assert models.parse_vs(f"nanogpt={nanogpt}") == nanogpt


def test_defaults_vary_one_thing_at_a_time():
    given = Options(CPU)
    found = scaling.sweeps(given, ["torch"])
    assert [case.model for case in found["parameters"]] == list(LADDER)
    assert {case.model for sweep in ("block_size", "batch_size") for case in found[sweep]} == {"shakespeare"}
    assert [case.config.block_size for case in found["block_size"]] == given.block_sizes
    assert len({case.tokens for case in found["block_size"]}) == 1
    assert [case.batch_size for case in found["batch_size"]] == given.batch_sizes
    shared = set(found["parameters"]) & set(found["block_size"]) & set(found["batch_size"])
    assert len(shared) == 1, "the case from which length and batch depart is on the ladder"
    assert {(who.mode, who.dtype) for who in next(iter(shared)).who} == {
        (mode, dtype) for mode in ("eager", "compile") for dtype in ("fp32", "bf16")
    }


@pytest.mark.parametrize(("dtype", "dropout"), [("fp16", 0.0), ("bf16", 0.0), ("fp32", 0.3)])
def test_gradient_scaling_and_dropout_are_no_errors(dtype, dropout, nanogpt):
    """What a scaler multiplies is divided by before it is compared, and the steps that are compared drop nothing."""
    config, train = TINY["wider"]
    config = dataclasses.replace(config, dropout=dropout)
    weights, batch = GPT(config).state_dict(), models.random_batches(config, 4)[0]
    truth = models.true_steps(config, train, weights, batch)
    for name in ("torch", PLAIN_NAIVE, "nanoGPT"):
        mine = models.build_competitor(name, config, train, weights, CPU, dtype=DTYPES[dtype], nanogpt=nanogpt)
        assert mine.scaler.is_enabled() == (dtype == "fp16")
        assert models.difference(models.first_steps(mine, batch, dropout), truth, DTYPES[dtype]) is None, name
        assert mine.model.training


@pytest.mark.full
def test_compiled_competitors_agree(tmp_path, nanogpt):
    """More of them than torch.compile keeps versions of one function by itself."""
    given = options(modes=["compile"], dtypes=["fp32", "bf16"], backends=["torch", "reference"], nanogpt=nanogpt)
    file = scaling.scale(given, out=tmp_path / "run.json")
    assert file.data["problems"] == []
    names = ["torch", PLAIN, "nanoGPT", "reference", PLAIN_NAIVE]
    assert [(row["competitor"], row["mode"]) for row in file.rows] == [(name, "compile") for name in 2 * names]


@pytest.mark.full
def test_two_models_of_nanogpt_are_compiled_apart(nanogpt):
    """Two of one class would share their code, and with it the attention that the first was traced with."""
    config, train = TINY["tiny"]
    weights, batch = GPT(config).state_dict(), models.random_batches(config, 2)[0]
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters["stats"]
    counts.clear()
    for _ in range(2):
        model = models.build_competitor("nanoGPT", config, train, weights, CPU, nanogpt=nanogpt).model
        model.compile(backend="eager")
        model(*batch)
    assert counts["unique_graphs"] == 2


# Figures


def test_exponents():
    assert scaling.exponent([1, 10, 100], [3, 30, 300]) == pytest.approx(1)
    assert scaling.exponent([1, 2, 4], [8, 2, 0.5]) == pytest.approx(-2)
    assert scaling.exponent([1, 2, 4, 8], [1, 2, 1, 2]) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("gpu", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("Tesla T4", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA H100", "bf16", None),
        (None, "fp32", None),
    ],
)
def test_peaks_are_those_of_the_gpu_that_is_there(gpu, dtype, peak):
    assert devices.peak_flops(gpu, dtype) == peak


def test_tf32_has_a_peak_of_its_own():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert devices.peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 156e12
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_mfu_stands_beside_the_measured_product():
    assert devices.model_flops_utilization(4e14, "NVIDIA H200", "bf16", 8e14) == {
        "of_peak": pytest.approx(4e14 / 989.4e12),
        "of_measured": 0.5,
    }
    assert devices.model_flops_utilization(4e14, "another", "bf16", 8e14)["of_peak"] is None


# The command line


def test_the_command(tmp_path, nanogpt, monkeypatch, capsys):
    path = tmp_path / "run.json"
    command = (
        "fastgpt bench scaling --model tiny --sweep tiny --block-size 0 --batch-size 0 --tokens 16 --backend torch "
        f"--mode eager --dtype fp32 --dtype bf16 --vs nanogpt={nanogpt} --rounds 7 --device cpu --out {path}"
    )
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    assert f"valid: {path}" in capsys.readouterr().out
    rows = json.loads(path.read_text())["results"]
    assert [(row["competitor"], row["dtype"]) for row in rows] == [
        (name, dtype) for dtype in ("fp32", "bf16") for name in ("torch", PLAIN, "nanoGPT")
    ]
    assert rows[3]["ratios"].keys() == {
        *("plain, eager", "nanoGPT, eager"),
        *("plain, eager, fp32", "nanoGPT, eager, fp32"),
    }


def test_a_wrong_command_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fastgpt", "bench", "scaling", "--model=gpt5", "--device=cpu"])
    with pytest.raises(SystemExit) as refused:
        cli.main()
    assert refused.value.code == 2
    assert capsys.readouterr().err.startswith("fastgpt: there is no model 'gpt5' to measure; there are ")
