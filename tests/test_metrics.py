"""What can be seen of a run: its metrics, pictures, TensorBoard's files, the bar and the profile."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from fastgpt import GPTConfig, metrics
from fastgpt.config import TrainConfig, UserError
from fastgpt.metrics import plot_losses, read_metrics
from fastgpt.train import Trainer

MODEL = GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16)
CONFIG = TrainConfig(
    device="cpu", batch_size=2, max_iters=10, eval_interval=5, eval_iters=1, final_eval_iters=1, log_interval=2
)
TOKENS = 2 * 16  # of a step


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """Trains and returns the trainer, whose console is a text."""
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastgpt.train.plot_losses", lambda *_: None)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)

    def run(name: str, **changes: Any) -> Trainer:
        config = dataclasses.replace(CONFIG, data=str(tmp_path / "text.txt"), **changes)
        console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
        trainer = Trainer(MODEL, config, tmp_path / name, console=console)
        trainer.run_until_done()
        return trainer

    return run


def printed(trainer: Trainer) -> str:
    file = trainer.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_every_metric_is_explained_and_right(
    train: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train("plain")
    lines = read_metrics(tmp_path / "plain")
    explained = set(re.findall(r"^    (\w+(?:, \w+)*)  ", metrics.__doc__ or "", re.MULTILINE))
    assert {name for names in explained for name in names.split(", ")} == set(lines[0])
    for line in lines:
        assert line["tokens"] == line["step"] * TOKENS
        assert line["mfu"] is None, "nobody states a CPU's peak"
        assert 10e6 < line["peak_memory_bytes"] < 100e9
    kinds = [(line["step"], line["split"], line["evaluation"]) for line in lines]
    assert kinds[:5] == [
        (0, "train", True),
        (0, "val", True),
        (2, "train", False),
        (4, "train", False),
        (5, "train", False),
    ]
    assert re.search(r"[\d,]+ tokens/s, \d\.\d\d GiB.*loss \d", printed(plain))

    monkeypatch.setattr("fastgpt.train.peak_flops", lambda gpu, dtype: {(None, "fp32"): 1e12}[gpu, dtype])
    known = train("known")
    of_steps = [line for line in read_metrics(tmp_path / "known") if line["step"] > 0]
    for line in of_steps:
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] * known.model.flops_per_token() / 1e12)
    assert re.search(r"tokens/s, MFU \d+%, \d", printed(known))


def test_tensorboard_shows_what_metrics_jsonl_has(train: Callable[..., Trainer], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train("run", tensorboard=True)
    shown = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    shown.Reload()
    lines = read_metrics(tmp_path / "run")
    wanted = {
        "evaluation/train": ("loss", lambda line: line["evaluation"] and line["split"] == "train"),
        "evaluation/val": ("loss", lambda line: line["split"] == "val"),
    }
    for name in ("loss", "lr", "tokens_per_s", "peak_memory_bytes"):  # no mfu on a CPU
        wanted[f"training/{name}"] = (name, lambda line: not line["evaluation"])
    assert set(shown.Tags()["scalars"]) == set(wanted)
    for tag, (name, chosen) in wanted.items():
        points = [(point.step, point.value) for point in shown.Scalars(tag)]
        expected = [(line["step"], line[name]) for line in lines if chosen(line)]
        assert points == [(step, pytest.approx(value)) for step, value in expected], tag


def test_without_tensorboard_the_run_does_not_begin(
    train: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package tensorboard: pip install 'fastgpt\[tensorboard\]'"):
        train("run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def write_run(run: Path, tokens: int | None = 100) -> Path:
    run.mkdir(parents=True)
    lines = []
    for step in (0, 1, 2):
        common = {"step": step, "elapsed_s": step / 4, **({} if tokens is None else {"tokens": step * tokens})}
        lines += [
            {**common, "split": "train", "evaluation": False, "loss": 5.0 - step},
            {**common, "split": "train", "evaluation": True, "loss": 0.5},
            {**common, "split": "val", "evaluation": True, "loss": 6.0 - step},
        ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def curves(monkeypatch: pytest.MonkeyPatch, *args: Any) -> dict[str, tuple[list[float], list[float]]]:
    """{label: (xs, ys)} of what ``plot_losses`` draws."""
    figures = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or real(self, *a, **k))
    plot_losses(*args)
    found = figures[-1].axes[0].get_lines()
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in found}


def test_a_picture_overlays_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, again = write_run(tmp_path / "a"), write_run(tmp_path / "b", 300), write_run(tmp_path / "more" / "a")
    out = tmp_path / "new" / "loss.png"
    assert curves(monkeypatch, [a], out) == {"train": ([0, 1, 2], [5, 4, 3]), "val": ([0, 1, 2], [6, 5, 4])}
    assert out.read_bytes().startswith(b"\x89PNG")
    assert curves(monkeypatch, [a, b], out, "tokens") == {
        "a, train": ([0, 100, 200], [5, 4, 3]),
        "a, val": ([0, 100, 200], [6, 5, 4]),
        "b, train": ([0, 300, 600], [5, 4, 3]),
        "b, val": ([0, 300, 600], [6, 5, 4]),
    }
    assert curves(monkeypatch, [a], out, "time")["val"] == ([0, 0.25, 0.5], [6, 5, 4])
    assert f"{again}, val" in curves(monkeypatch, [a, again], out)


def test_the_plot_command(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    a, old = write_run(tmp_path / "a"), write_run(tmp_path / "old", None)
    out = tmp_path / "both.svg"
    assert command("plot", a, old, "--out", out) == (0, f"{out}\n", "")
    assert "<svg" in out.read_text()
    for arguments, sentence in (
        ([a, "--out", "loss.txt"], "loss.txt: the picture must be a .png, .svg or .pdf file"),
        ([old, "--x", "tokens", "--out", out], f"{old}/metrics.jsonl: the line of step 0 has no tokens"),
        (
            [tmp_path / "none", "--out", out],
            f"{tmp_path}/none/metrics.jsonl: cannot be read: No such file or directory",
        ),
        ([a, "--x", "hours"], "hours"),
    ):
        code, _, err = command("plot", *arguments)
        assert code == 2
        assert sentence in err


def test_a_profile_is_a_trace_and_a_table(train: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = train("run", profile=True)
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    steps = {name for name in names if name.startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#6", "ProfilerStep#7", "ProfilerStep#8"}  # the profiler counts from 0
    assert any("cross_entropy" in name for name in names)
    assert "steps 7 to 9 are traced in" in printed(trainer)
    rows = re.findall(r" ([\d.]+)% +([\d.]+) ms +([\d.]+) calls a step  \S+", printed(trainer))
    assert len(rows) == 8
    shares = [float(share) for share, _, _ in rows]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.5


def test_a_run_too_short_to_profile_says_so(train: Callable[..., Trainer], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="profile traces steps 7 to 9 of a start, and this one has only 8"):
        train("run", profile=True, max_iters=8)
    assert not (tmp_path / "run").exists()
