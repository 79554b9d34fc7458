import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgpt import GPT, GPTConfig, checkpoint
from fastgpt.checkpoint import (
    RunState,
    Snapshot,
    checkpoint_names,
    find_checkpoint,
    go_back_to,
    load_model,
    load_training,
    read_config,
    write_checkpoint,
    write_config,
)
from fastgpt.config import TrainConfig, TrainingError, UserError
from fastgpt.files import new_folder, write_atomically
from fastgpt.optim import build_optimizer
from fastgpt.tokenizer import CharTokenizer

CONFIG = GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8)


@pytest.fixture
def run(tmp_path):
    write_config(tmp_path, CONFIG, TrainConfig(), CharTokenizer("abcde"), {"fastgpt": "0"})
    return tmp_path


def stepped_model():
    model = GPT(CONFIG)
    optimizer = build_optimizer(model, TrainConfig())
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))[1].backward()
    optimizer.step()
    return model, optimizer


def save(run: Path, step: int, best: bool = False, keep: int = 1):
    model, optimizer = stepped_model()
    write_checkpoint(run, Snapshot.take(RunState(step=step), model, optimizer), best, keep)
    return model, optimizer


def test_settings_survive(run):
    assert read_config(run)[:2] == (CONFIG, TrainConfig())
    assert read_config(run)[2].characters == "abcde"


def test_weights_carry_their_names_once(run):
    save(run, 1)
    tensors = load_file(find_checkpoint(run) / "model.safetensors")
    assert "transformer.h.0.attn.c_attn.weight" in tensors
    assert "lm_head.weight" not in tensors  # tied to wte
    assert set(tensors) == {name for name, _ in GPT(CONFIG).named_parameters()}


def test_the_optimizer_and_the_random_state_come_back(run):
    model, optimizer = save(run, 1)
    wanted = torch.rand(3)  # drawn after the checkpoint
    other = GPT(CONFIG)
    loaded = build_optimizer(other, TrainConfig())
    load_training(find_checkpoint(run), other, loaded)
    assert torch.equal(torch.rand(3), wanted)
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][moment], loaded.state[q][moment]), name
    assert loaded.param_groups[0]["step"] == 1


@pytest.mark.parametrize(("keep", "kept"), [(1, [3, 5]), (2, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_last_ones_are_kept_beside_the_best(run, keep, kept):
    for step, best in ((1, True), (2, False), (3, True), (4, False), (5, False)):
        save(run, step, best, keep)
    assert find_checkpoint(run, "last").name == "step-00000005"
    assert find_checkpoint(run, "best").name == "step-00000003"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-0000000{step}" for step in kept]
    assert find_checkpoint(run, "step-3") == find_checkpoint(run, "step-00000003") == find_checkpoint(run, "best")
    with pytest.raises(
        UserError, match=r"there is no checkpoint step-00000007; there is .*step-00000003, .*step-00000005"
    ):
        find_checkpoint(run, "step-7")
    with pytest.raises(UserError, match=r"there is no checkpoint \.\./x; there is "):
        find_checkpoint(run, "../x")


def test_what_a_kill_left_of_a_checkpoint_goes_with_it(run):
    for step in (1, 2):
        save(run, step, best=True, keep=2)
    for name in ("step-00000001", "step-00000002", "step-00000007"):
        (run / "checkpoints" / f".new-{name}").mkdir()
    save(run, 3, best=True)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_kill_while_an_abandoned_checkpoint_goes_leaves_none_that_is_half(run, monkeypatch):
    save(run, 1, best=True)
    save(run, 2)
    go_back_to(run, "step-00000001")

    def cut_short(path, ignore_errors=False):
        for left in Path(path).glob("state.json"):
            left.unlink()
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", cut_short)
        with pytest.raises(Killed):
            save(run, 2)
    assert checkpoint_names(run) == ["step-00000001"]
    save(run, 2)
    assert load_model(run, "last")[3].step == 2
    assert not list((run / "checkpoints").glob(".new-*"))


def test_the_sums_are_those_that_sha256sum_checks(run):
    save(run, 1)
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum")
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=find_checkpoint(run), check=True)


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_a_checkpoint_that_nobody_could_go_on_from_is_not_written(run, what):
    save(run, 1)
    model, optimizer = stepped_model()
    p = model.transformer.wpe.weight
    (p.data if what == "weight" else optimizer.state[p]["exp_avg_sq"])[0, 0] = float("inf")
    with pytest.raises(
        TrainingError, match=r"wpe.weight became NaN or infinite by step 2, .*; step-00000001 stands in"
    ):
        write_checkpoint(run, Snapshot.take(RunState(step=2), model, optimizer), True, 1)
    assert checkpoint_names(run) == ["step-00000001"]


class Killed(BaseException):
    pass


def calls_that_change_files(run: Path, monkeypatch, stop_at: int | None) -> int:
    """Save a checkpoint, dying before file-system call number ``stop_at``; returns how many there were."""
    count = 0

    def counted(real):
        def call(*args, **kwargs):
            nonlocal count
            if count == stop_at:
                raise Killed
            count += 1
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for owner, name in (
            (os, "replace"),
            (os, "fsync"),
            (Path, "rename"),
            (Path, "mkdir"),
            (Path, "write_bytes"),
            (Path, "write_text"),
            (shutil, "rmtree"),
            (checkpoint, "save_tensors"),
        ):
            patched.setattr(owner, name, counted(getattr(owner, name)))
        with contextlib.suppress(Killed):
            save(run, 2, best=True)
    return count


def test_a_kill_at_any_moment_leaves_a_checkpoint_that_reads(run, monkeypatch):
    save(run, 1, best=True)
    shutil.copytree(run, run.parent / "before")
    calls = calls_that_change_files(run, monkeypatch, None)
    assert calls > 10
    seen = set()
    for moment in range(calls):
        again = run.parent / f"killed-{moment}"
        shutil.copytree(run.parent / "before", again)
        calls_that_change_files(again, monkeypatch, moment)
        for which in ("last", "best", *checkpoint_names(again)):
            model, _, _, state = load_model(again, which)
            load_training(find_checkpoint(again, which), model, build_optimizer(model, TrainConfig()))
            seen.add(state.step)
        save(again, 2)  # and the run can go on
        assert load_model(again, "last")[3].step == 2
    assert seen == {1, 2}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_filled_beside_what_a_kill_left_by_the_first_who_gets_there(tmp_path):
    """A container's processes have few ids, and the one that was killed had this one's."""
    (tmp_path / f".new-x-{os.getpid()}").mkdir()
    with new_folder(tmp_path / "x") as first:
        (first / "file").write_text("first")
        with new_folder(tmp_path / "x") as second:
            (second / "file").write_text("second")
    assert [path.read_text() for path in (tmp_path / "x").iterdir()] == ["second"]
    assert not first.exists()
    assert not second.exists()
    with pytest.raises(FileExistsError, match="of the block"), new_folder(tmp_path / "x"):
        raise FileExistsError(17, "of the block")


def test_another_gets_there_between_a_look_and_the_rename(tmp_path, monkeypatch):
    real = Path.rename

    def rename(path, target):
        target.mkdir()
        (target / "file").write_text("another's")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with new_folder(tmp_path / "x") as mine:
        (mine / "file").write_text("mine")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "file").read_text() == "another's"


class TestDamage:
    def test_no_run(self, tmp_path):
        with pytest.raises(UserError, match="there is no run in this folder"):
            load_model(tmp_path / "nowhere")

    def test_no_checkpoint_yet(self, run):
        with pytest.raises(UserError, match="this run has no checkpoint yet"):
            load_model(run)

    @pytest.mark.parametrize(
        ("file", "content", "sentence"),
        [
            ("config.json", b"{", "config.json: cannot be read"),
            ("config.json", b"[]", "config.json: damaged: it must hold one JSON object"),
            ("config.json", b'{"model": {"type": "rnn"}, "train": {}}', "the model's type must be one of gpt, bigram"),
            ("config.json", b'{"model": {"type": "gpt", "n_leyer": 1}, "train": {}}', "unknown setting 'n_leyer'"),
            (
                "config.json",
                b'{"model": {"type": "gpt", "n_layer": "1"}, "train": {}}',
                "n_layer must be a whole number",
            ),
            ("tokenizer.json", b'{"type": "char"}', "a tokenizer must be"),
            ("checkpoints.json", b"", "checkpoints.json: cannot be read"),
            ("config.json", b'{"model": 3}', "damaged: it must hold the objects model and train"),
            ("config.json", b'{"model": {"type": ["gpt"]}, "train": {}}', "the model's type must be one of"),
            ("checkpoints.json", b'{"best": 3}', "damaged: best must be the name of a checkpoint, got 3"),
            ("checkpoints.json", b'{"best": "../../x"}', "damaged: best must be the name of a checkpoint"),
        ],
    )
    def test_a_damaged_file_is_named(self, run, file, content, sentence):
        save(run, 1, best=True)
        (run / file).write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            load_model(run)

    @pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "state.json"])
    @pytest.mark.parametrize("damage", ["truncated", "a bit", "missing"])
    def test_a_damaged_checkpoint_is_named_and_another_offered(self, run, file, damage):
        save(run, 1)
        save(run, 2, keep=2)
        path = find_checkpoint(run) / file
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-10])
        elif damage == "a bit":
            content = path.read_bytes()
            path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        else:
            path.unlink()
        why = "there is no such file" if damage == "missing" else "its sha256 is not the one in SHA256SUMS"
        with pytest.raises(
            UserError, match=rf"step-00000002/{file}: damaged: {why}; --checkpoint step-00000001 is whole"
        ):
            load_model(run, "last")
        assert load_model(run, "step-1")[3].step == 1
        (run / "checkpoints/step-00000001/state.json").write_bytes(b"{}")
        with pytest.raises(UserError, match=rf"{file}: damaged: {why}; no other checkpoint is whole"):
            load_model(run, "last")
