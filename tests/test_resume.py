"""Runs that are killed, stopped or short of room: they go on, to the bytes of a run that was left alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastgpt import GPTConfig, checkpoint, metrics
from fastgpt import train as training
from fastgpt.checkpoint import Making, checkpoint_names, find_checkpoint, load_model, open_checkpoint, read_config
from fastgpt.config import TrainConfig, TrainingError, UserError
from fastgpt.data import prepare
from fastgpt.files import lock
from fastgpt.metrics import read_metrics
from fastgpt.pretrained import Pretrained
from fastgpt.train import Trainer

MODEL = GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.2)
CONFIG = TrainConfig(
    device="cpu",
    batch_size=3,
    grad_accum=2,
    max_iters=40,
    lr=1e-2,
    min_lr=1e-3,
    warmup_iters=4,
    eval_interval=8,
    eval_iters=2,
    final_eval_iters=3,
    log_interval=3,
    checkpoint_interval=5,
)

# Killed processes are forked from one that has loaded everything: loading takes seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["fastgpt.train", "torch._dynamo"])


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(training, "plot_losses", lambda *_: None)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)


def trainer(run: Path, checkpoint: str = "last", model: GPTConfig = MODEL, **changes: Any) -> Trainer:
    """Of a new run, or of the one in the folder."""
    resume = (run / "config.json").exists()
    before = read_config(run)[1] if resume else dataclasses.replace(CONFIG, data=str(run.parent / "text.txt"))
    config = dataclasses.replace(before, **changes)
    model = read_config(run)[0] if resume else model
    console = Console(file=(run.parent / "console.txt").open("a"), width=200)
    return Trainer(model, config, run, resume=resume, checkpoint=checkpoint, console=console)


def outcome(run: Path) -> dict[str, Any]:
    """What a run left, byte for byte, but for the time it took."""
    folder, _ = open_checkpoint(run)
    state = json.loads((folder / "state.json").read_text())
    del state["elapsed_s"]
    return {
        "weights": (folder / "model.safetensors").read_bytes(),
        "training": (folder / "training.safetensors").read_bytes(),
        "state": state,
        "losses": [[line[name] for name in ("step", "split", "loss", "lr", "batches")] for line in read_metrics(run)],
        "checkpoints": [*checkpoint_names(run), (run / "checkpoints.json").read_text()],
    }


def before_each(call: Callable[..., Any], do: Callable[[], None]) -> Callable[..., Any]:
    def both(*args: Any) -> Any:
        do()
        return call(*args)

    return both


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_step(step: int, t: Trainer) -> None:
    t._step = before_each(t._step, lambda: die() if t.state.step == step else None)  # type: ignore[method-assign]


def die_when_syncing(number: int, t: Trainer) -> None:
    """On a slow disk, in the writer's thread."""
    count = iter(range(number))

    def wait_or_die() -> None:
        time.sleep(0.01)
        if next(count, None) is None:
            die()

    checkpoint.sync = before_each(checkpoint.sync, wait_or_die)


def on_a_slow_disk(t: Trainer) -> None:
    checkpoint.sync = before_each(checkpoint.sync, lambda: time.sleep(0.003))


def train_in_a_process(run: Path, prepare: Callable[[Trainer], None] | None, changes: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    training.plot_losses = lambda *_: None
    t = trainer(run, **changes)
    if prepare:
        prepare(t)
    t.run_until_done()


def start(run: Path, prepare: Callable[[Trainer], None] | None = None, **changes: Any) -> Any:
    process = PROCESSES.Process(target=train_in_a_process, args=(run, prepare, changes))
    process.start()
    return process


def exit_code(process: Any) -> int:
    process.join(120)
    return process.exitcode


class At:
    """``function(argument, trainer)`` as a function of the trainer that can be sent to a process."""

    def __init__(self, function: Callable[..., None], argument: int) -> None:
        self.function, self.argument = function, argument

    def __call__(self, t: Trainer) -> None:
        self.function(self.argument, t)


@pytest.mark.parametrize("resume", [True, False])
def test_another_process_in_the_same_run_is_refused(tmp_path, resume):
    run = tmp_path / "run"
    if resume:
        trainer(run, max_iters=2).run_until_done()
    run.mkdir(exist_ok=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    handle = lock(run)  # as another process has it
    with pytest.raises(UserError, match="run: another fastgpt train is at work here: wait for its end, or choose "):
        trainer(run, max_iters=2)  # which would be refused as done already, had the checkpoint been looked at
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    os.close(handle)
    trainer(run, max_iters=4)  # whoever has it may think again
    t, held = trainer(run, max_iters=4), []
    t._step = before_each(t._step, lambda: held.append(lock(run)))  # type: ignore[method-assign]
    t.run_until_done()
    assert held == [None] * (2 if resume else 4)
    os.close(lock(run))


@pytest.mark.parametrize("backend", ["cpp", pytest.param("reference", marks=pytest.mark.full)])
def test_a_run_killed_at_step_23_and_resumed_leaves_the_same_bytes(tmp_path, backend):
    assert exit_code(start(tmp_path / "killed", At(die_at_step, 23), backend=backend)) == -signal.SIGKILL
    assert open_checkpoint(tmp_path / "killed")[1].step in (15, 16, 20)  # the last may not have been whole yet
    assert exit_code(start(tmp_path / "killed")) == 0
    trainer(tmp_path / "whole", backend=backend).run_until_done()
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    "syncs", [7, pytest.param(5, marks=pytest.mark.full), pytest.param(12, marks=pytest.mark.full)]
)
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, syncs):
    run = tmp_path / "killed"
    assert exit_code(start(run, At(die_when_syncing, syncs))) == -signal.SIGKILL
    left = checkpoint_names(run)
    assert all(open_checkpoint(run, name) for name in left)
    trainer(run).run_until_done()
    trainer(tmp_path / "whole").run_until_done()
    assert outcome(run) == outcome(tmp_path / "whole")
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.full
def test_runs_killed_at_25_random_moments_leave_the_same_bytes(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    often = {"checkpoint_interval": 1, "eval_interval": 6}
    began = time.monotonic()
    assert exit_code(start(tmp_path / "whole", on_a_slow_disk, **often)) == 0
    seconds = time.monotonic() - began
    wanted = outcome(tmp_path / "whole")
    kills = 0
    steps = set()
    names = (f"run-{number}" for number in itertools.count())
    run = tmp_path / next(names)
    while kills < 25:
        process = start(run, on_a_slow_disk, **often)
        process.join(moments.uniform(0, seconds))
        process.kill()
        assert exit_code(process) in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
        step = open_checkpoint(run)[1].step if (run / "checkpoints.json").exists() else 0
        if step < CONFIG.max_iters:
            steps.add(step)
        else:  # this one came through, even if it was killed when all was written
            got = outcome(run)
            if process.exitcode:  # and one more checkpoint was still to be deleted
                got["checkpoints"] = [name for name in got["checkpoints"] if name in wanted["checkpoints"]]
            assert got == wanted
            run = tmp_path / next(names)
    assert exit_code(start(run, **often)) == 0
    assert outcome(run) == wanted
    assert len(steps) > 5, "the kills did not fall into the runs"


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_beginning(tmp_path):
    t = trainer(tmp_path / "killed")
    for _ in range(4):
        t._step()
    assert not (tmp_path / "killed" / "checkpoints.json").exists()
    trainer(tmp_path / "killed").run_until_done()
    trainer(tmp_path / "whole").run_until_done()
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_run_on_a_prepared_folder_goes_on_with_its_tokens(tmp_path):
    def prepared(tokenizer):
        return prepare(str(tmp_path / "text.txt"), tokenizer, tmp_path / "tokens")

    prepared("bpe:270")
    settings = {"data": str(tmp_path / "tokens"), "max_iters": 10}
    t = trainer(tmp_path / "halves", **settings)
    t._step = before_each(t._step, lambda: setattr(t, "_stop", t.state.step == 4))
    assert t.run_until_done() is False
    trainer(tmp_path / "halves").run_until_done()
    trainer(tmp_path / "whole", **settings).run_until_done()
    assert outcome(tmp_path / "halves") == outcome(tmp_path / "whole")
    shutil.rmtree(tmp_path / "tokens")
    prepared("byte")
    with pytest.raises(UserError, match="tokens: prepared with tokenizer byte, which is not the run's"):
        trainer(tmp_path / "halves", max_iters=12)


def test_the_tokenizer_of_a_run_may_be_named_when_it_is_resumed(tmp_path, command):
    run = tmp_path / "run"
    trainer(run, max_iters=2, eval_interval=2, sample_tokens=0).run_until_done()
    for steps, named in ((3, "char"), (4, "auto"), (5, run / "tokenizer.json")):
        code, out, err = command("train", "--resume", f"--out={run}", f"--max-iters={steps}", f"--tokenizer={named}")
        assert (code, err) == (0, "")
        assert "tokenizer '" not in out  # which would be said to have changed
    for named in ("byte", "bpe:300"):
        code, out, err = command("train", "--resume", f"--out={run}", "--max-iters=9", f"--tokenizer={named}")
        assert (code, err) == (2, "fastgpt: --tokenizer cannot change when a run is resumed: it is char\n")


def test_a_run_from_given_weights_that_wrote_no_checkpoint_is_not_begun_from_others(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, data=str(tmp_path / "text.txt"), init="elsewhere", tokenizer="char")
    weights = Pretrained(dataclasses.replace(MODEL, vocab_size=28), {})
    monkeypatch.setattr(Pretrained, "fill", lambda self, model: None)
    Trainer(weights.config, config, tmp_path / "run", init=weights, console=Console(quiet=True))
    with pytest.raises(UserError, match="killed before its first checkpoint: begin it anew, with --init elsewhere"):
        trainer(tmp_path / "run")


def test_a_run_may_go_back_to_an_earlier_checkpoint(tmp_path):
    run = tmp_path / "run"
    trainer(run, keep=4).run_until_done()
    whole = outcome(run)
    assert {"step-00000030", "step-00000035", "step-00000040"} <= set(checkpoint_names(run))
    t = trainer(run, checkpoint="step-30")
    assert find_checkpoint(run).name == "step-00000030"
    assert max(line["step"] for line in read_metrics(run)) == 30
    assert t.run_until_done() is True
    again = outcome(run)
    assert again.pop("checkpoints")[-2:] == whole.pop("checkpoints")[-2:]
    assert again == whole


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    t = trainer(tmp_path / "run", max_iters=9, keep=3)
    gone_on = threading.Event()
    real = Making.fill
    weights = {}

    def fill(making, *tensors):
        assert gone_on.wait(30), "the run waited for its checkpoint"
        return real(making, *tensors)

    def watch():
        if t.state.step == 5:
            weights.update({name: p.detach().clone() for name, p in t.model.named_parameters()})
        if t.state.step == 7:
            gone_on.set()

    monkeypatch.setattr(Making, "fill", fill)
    t._step = before_each(t._step, watch)
    t.run_until_done()
    model, _, _, state = load_model(tmp_path / "run", "step-5")
    assert state.step == 5
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())  # and not those of step 7


def test_a_disk_without_room_ends_the_run_with_its_reason(tmp_path):
    run = tmp_path / "run"
    t = trainer(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    t._step = before_each(
        t._step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if t.state.step > 7 else soft, hard))
    )
    try:
        with pytest.raises(
            TrainingError,
            match=r"the checkpoint of step (8|10) could not be written \(.*File too large.*\), so the run was stopped; "
            r"step-0000000[58] stands in",
        ):
            t.run_until_done()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert t.state.step < 40
    assert open_checkpoint(run)[1].step in (5, 8)
    assert [path.name for path in (run / "checkpoints").iterdir()] == checkpoint_names(run)
    trainer(run).run_until_done()


def test_a_damaged_checkpoint_is_named_and_another_offered(tmp_path):
    run = tmp_path / "run"
    trainer(run).run_until_done()
    path = find_checkpoint(run) / "training.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        UserError,
        match=r"step-00000040/training\.safetensors: damaged: its sha256 .*; --checkpoint step-00000035 is whole",
    ):
        trainer(run, max_iters=50)
    assert trainer(run, checkpoint="step-35", max_iters=50).run_until_done() is True
    assert open_checkpoint(run)[1].step == 50


def test_other_settings_are_said_unless_they_change_nothing(tmp_path):
    run = tmp_path / "run"
    t = trainer(run)
    t._step = before_each(t._step, lambda: setattr(t, "_stop", t.state.step == 4))
    assert t.run_until_done() is False
    trainer(run, keep=3, eval_iters=1, log_interval=1)
    assert "another run" not in (tmp_path / "console.txt").read_text()
    assert trainer(run, lr=0.02, max_iters=7, batch_size=2).run_until_done() is True
    said = (tmp_path / "console.txt").read_text()
    assert "from step 5 on this is another run: batch_size 3 -> 2, max_iters 40 -> 7, lr 0.01 -> 0.02" in said


def test_another_number_of_processes_is_said_where_they_drop(tmp_path):
    for dropout, said in ((0.2, "from step 5 on this is another run: processes 2 -> 1"), (0.0, "")):
        run = tmp_path / f"run-{dropout}"
        t = trainer(run, model=dataclasses.replace(MODEL, dropout=dropout))
        t.state.processes = 2
        t._step = before_each(t._step, lambda t=t: setattr(t, "_stop", t.state.step == 4))
        assert t.run_until_done() is False
        (tmp_path / "console.txt").write_text("")
        t = trainer(run, max_iters=40)
        assert t.state.processes == 1
        assert [line for line in (tmp_path / "console.txt").read_text().splitlines() if "another run" in line] == (
            [said] if said else []
        )


def test_what_is_damaged_beyond_the_checkpoint_is_dropped_and_else_nothing_is_written(tmp_path):
    run = tmp_path / "run"
    trainer(run, max_iters=10).run_until_done()
    lines = (run / "metrics.jsonl").read_bytes()
    for damage in (b"\0\0\0\0\n", b"\xff\n", b"{}\n"):
        (run / "metrics.jsonl").write_bytes(lines + damage + lines)
        trainer(run, max_iters=11)
        assert (run / "metrics.jsonl").read_bytes() == lines
    (run / "metrics.jsonl").write_bytes(b"\0\n" + lines)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 is damaged"):
        trainer(run, max_iters=12, checkpoint="step-8")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_checkpoint_is_not_there_before_the_lines_that_lead_to_it(tmp_path, monkeypatch):
    run = tmp_path / "run"
    synced, saved = [], []
    monkeypatch.setattr(metrics, "sync", lambda path: synced.append(path.read_text()))
    t = trainer(run, max_iters=10)
    t._writer.save = before_each(t._writer.save, lambda: saved.append((run / "metrics.jsonl").read_text()))
    t.run_until_done()
    assert len(saved) > 1
    assert synced == saved
