"""A run's folder from someone who means harm: each refused in one sentence, nothing executed, memory bounded."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastgpt import GPT, GPTConfig
from fastgpt.checkpoint import (
    SUMS,
    RunState,
    Snapshot,
    load_model,
    load_training,
    open_checkpoint,
    write_checkpoint,
    write_config,
)
from fastgpt.config import TrainConfig, UserError
from fastgpt.files import sha256_of
from fastgpt.optim import build_optimizer
from fastgpt.tensor_files import save_tensors
from fastgpt.tokenizer import CharTokenizer

CONFIG = GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8)
STEP = "checkpoints/step-00000001"
FILES = ("model.safetensors", "training.safetensors", "state.json")
MODEL, TRAINING, STATE = (f"{STEP}/{name}" for name in FILES)

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["fastgpt.train", "torch._dynamo"])


class Bomb:
    """Unpickled, it leaves the file ``exploded``."""

    def __init__(self, exploded: Path) -> None:
        self.exploded = exploded

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.exploded),)


def raw(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        path = run / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_config(section: str, **changes: object) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        settings = json.loads((run / "config.json").read_text())
        edit_json("config.json", **{section: {**settings[section], **changes}})(run)

    return edit


def edit_tensors(
    name: str, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Callable[[Path], None]:
    return lambda run: save_file(edit(load_file(run / name)), run / name)


def scaler(**changes: object) -> dict[str, object]:
    return {**torch.amp.GradScaler("cpu").state_dict(), **changes}


def with_nan(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {**tensors, name: torch.full_like(tensors[name], float("nan"))}


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(content)


def link_elsewhere(name: str) -> Callable[[Path], None]:
    def link(run: Path) -> None:
        (run / name).rename(run / "elsewhere")
        (run / name).symlink_to(run / "elsewhere")

    return link


def pipe(run: Path) -> None:
    (run / MODEL).unlink()
    os.mkfifo(run / MODEL)


def add_a_line_of_sums(run: Path) -> None:
    sum_again(run)
    with (run / STEP / SUMS).open("a") as file:
        file.write(f"{'0' * 64}  ../../../passwd\n")


def sum_again(run: Path) -> None:
    names = sorted(path.name for path in (run / STEP).iterdir() if path.suffix in (".safetensors", ".json"))
    (run / STEP / SUMS).write_text("".join(f"{sha256_of(run / STEP / name)}  {name}\n" for name in names))


def part(kind: str, number: int) -> str:
    return f"{STEP}/{kind}-0000{number}-of-00002.safetensors"


def in_two(harm: Callable[[Path], object] = lambda run: None) -> Callable[[Path], None]:
    """``harm`` done to the run when its checkpoint is in two parts, as two processes write a sharded one."""

    def split(run: Path) -> None:
        for kind, path in (("model", run / MODEL), ("training", run / TRAINING)):
            tensors = load_file(path)
            for number in (1, 2):
                first = {name: (number - 1) * -(-len(t) // 2) for name, t in tensors.items() if t.dim()}
                mine = {name: tensors[name].chunk(2)[number - 1].clone() for name in first}
                offsets = {name: [row] + [0] * (mine[name].dim() - 1) for name, row in first.items()}
                if number == 1:
                    mine |= {name: t for name, t in tensors.items() if name not in first}
                save_tensors(mine, run / part(kind, number), {**dict.fromkeys(mine, ()), **offsets})
            path.unlink()
        harm(run)

    return split


def edit_part(
    kind: str, number: int, edit: Callable[[torch.Tensor], torch.Tensor], further: int = 0
) -> Callable[[Path], None]:
    """Change the tensors of a part, and what its header says of the rows that they are."""

    def change(run: Path) -> None:
        path = run / part(kind, number)
        with safe_open(path, "pt") as file:
            sharding = json.loads(file.metadata()["DCP_SHARDING_INFO"])
        offsets = {
            name: [entry["saved_offsets"][0] + further, *entry["saved_offsets"][1:]] for name, entry in sharding.items()
        }
        save_tensors({name: edit(tensor) for name, tensor in load_file(path).items()}, path, offsets)

    return change


# What is done to a run, and what is said of it. The sums are those of what was done, but where they are the matter.
HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda run: os.truncate(run / MODEL, 500), "model.safetensors: cannot be read: "),
    "empty": (write(MODEL, b""), "model.safetensors: cannot be read: "),
    "wrong shapes": (
        edit_tensors(MODEL, lambda t: {**t, "transformer.ln_f.weight": torch.ones(9)}),
        "transformer.ln_f.weight must have shape (8,), got (9,)",
    ),
    "a shape of many zeros": (
        edit_tensors(MODEL, lambda t: {**t, "transformer.ln_f.weight": torch.ones(0, 1 << 40)}),
        "transformer.ln_f.weight must have shape (8,), got (0, 1099511627776)",
    ),
    "NaN weights": (
        edit_tensors(MODEL, with_nan("transformer.wpe.weight")),
        "damaged: transformer.wpe.weight holds a NaN or an infinity",
    ),
    "NaN moments": (
        edit_tensors(TRAINING, with_nan("exp_avg.transformer.wpe.weight")),
        "damaged: exp_avg.transformer.wpe.weight holds a NaN or an infinity",
    ),
    "moments of another shape": (
        edit_tensors(TRAINING, lambda t: {**t, "exp_avg_sq.transformer.wpe.weight": torch.ones(8, 9)}),
        "exp_avg_sq.transformer.wpe.weight must have shape (8, 8), got (8, 9)",
    ),
    "a generator's state of garbage": (
        edit_tensors(TRAINING, lambda t: {**t, "rng.cpu": torch.full_like(t["rng.cpu"], 255)}),
        "training.safetensors: damaged: not the state of a random generator: ",
    ),
    "a generator's state that is short": (
        edit_tensors(TRAINING, lambda t: {**t, "rng.cpu": torch.zeros(7, dtype=torch.uint8)}),
        "rng.cpu must have shape (5056,), got (7,)",
    ),
    "a header of 10^12 bytes": (write(MODEL, raw(b"{}", 10**12)), "its header would have 1,000,000,000,000 bytes"),
    "names with ../": (
        edit_tensors(MODEL, lambda t: {f"../../{name}": tensor for name, tensor in t.items()}),
        "damaged: it lacks ",
    ),
    "a pickle": (lambda run: (run / MODEL).write_bytes(pickle.dumps(Bomb(run / "exploded"))), "not a safetensors file"),
    "a pickle of torch's": (
        lambda run: torch.save({"model": Bomb(run / "exploded")}, run / MODEL),
        "not a safetensors file",
    ),
    "a pickle for JSON": (
        lambda run: (run / STATE).write_bytes(pickle.dumps(Bomb(run / "exploded"))),
        "state.json: cannot be read",
    ),
    "JSON without end": (write(STATE, b"[" * 10**6), "state.json: cannot be read"),
    "another step": (edit_json(STATE, step=2), "state.json: damaged: a value has the wrong type"),
    "a step beyond all numbers": (edit_json(STATE, step=10**30), "state.json: damaged: a value has the wrong type"),
    "a loss that is none": (edit_json(STATE, val_loss=float("nan")), "state.json: damaged: a value has the wrong type"),
    "a scaler of texts": (edit_json(STATE, scaler={"scale": "x"}), "state.json: damaged: a value has the wrong type"),
    "a loss of 401 digits": (edit_json(STATE, train_loss=10**400), "state.json: damaged: a value has the wrong type"),
    "seconds of 401 digits": (edit_json(STATE, elapsed_s=10**400), "state.json: damaged: a value has the wrong type"),
    "seconds that are true": (edit_json(STATE, elapsed_s=True), "state.json: damaged: a value has the wrong type"),
    "seconds below 0": (edit_json(STATE, elapsed_s=-1.0), "state.json: damaged: a value has the wrong type"),
    "a step that is true": (edit_json(STATE, step=True), "state.json: damaged: a value has the wrong type"),
    "no process": (edit_json(STATE, processes=0), "state.json: damaged: a value has the wrong type"),
    "a scale of 401 digits": (edit_json(STATE, scaler=scaler(scale=10**400)), "a value has the wrong type"),
    "a scaler's steps beyond int32": (edit_json(STATE, scaler=scaler(_growth_tracker=2**31)), "a value has the wrong"),
    "half a step of a scaler": (edit_json(STATE, scaler=scaler(growth_interval=0.5)), "a value has the wrong type"),
    "a pointer of 401 digits": (edit_json("checkpoints.json", last=10**400), "the name of a checkpoint, got 0x"),
    "a pointer with ../": (
        edit_json("checkpoints.json", last="../../step-00000001"),
        "checkpoints.json: damaged: last must be the name of a checkpoint",
    ),
    "a pointer to nothing": (
        edit_json("checkpoints.json", last="step-00000007"),
        "there is no checkpoint step-00000007; there is step-00000001",
    ),
    "sums with ../": (add_a_line_of_sums, "SHA256SUMS: damaged: it must name model.safetensors, "),
    "sums of another": (
        write(f"{STEP}/{SUMS}", b"0" * 64 + b"  model.safetensors\n"),
        "model.safetensors: damaged: its sha256 is not the one in SHA256SUMS",
    ),
    "a linked file": (link_elsewhere(MODEL), "model.safetensors: damaged: there is no such file"),
    "a linked checkpoint": (link_elsewhere(STEP), "there is no checkpoint step-00000001; there is none"),
    "a pipe": (pipe, "model.safetensors: damaged: there is no such file"),
    "a part less": (
        in_two(lambda run: (run / part("training", 2)).unlink()),
        "training-00002-of-00002.safetensors: damaged: ",
    ),
    "a part twice": (
        in_two(lambda run: shutil.copy(run / part("model", 1), run / part("model", 2))),
        ": damaged: its files have row 0 of transformer.",
    ),
    "a part of numbers alone": (
        in_two(lambda run: save_file(load_file(run / part("model", 2)), run / part("model", 2))),
        ": damaged: its files have row 0 of transformer.",
    ),
    "a part of NaN": (
        in_two(edit_part("model", 2, lambda t: t.fill_(float("nan")))),
        "step-00000001: damaged: transformer.",
    ),
    "a part of 2^60 rows on": (
        in_two(edit_part("model", 2, lambda t: t, 2**60)),
        ": damaged: its files have row ",
    ),
    "a linked part": (
        in_two(link_elsewhere(part("model", 2))),
        "model-00002-of-00002.safetensors: damaged: there is no such",
    ),
    "a pickled part": (
        in_two(lambda run: (run / part("training", 1)).write_bytes(pickle.dumps(Bomb(run / "exploded")))),
        "not a safetensors file",
    ),
    "sums of 10^4 parts": (
        lambda run: (run / STEP / SUMS).write_text("".join(f"{'0' * 64}  model-{i:05d}\n" for i in range(10**4))),
        "model-00001-of-10000.safetensors: damaged: there is no such file",
    ),
    "2^23 layers": (edit_config("model", n_layer=1 << 23), "the settings ask for 8,388,608 layers and "),
    "a few more layers": (edit_config("model", n_layer=4), "damaged: it lacks transformer.h.1."),
    "10^30 layers": (edit_config("model", n_layer=10**30), "n_layer must be less than 2^24"),
    "a width of 2^23": (edit_config("model", n_embd=1 << 23), "the settings ask for 1 layers and "),
    "a vocabulary of 2^23": (edit_config("model", vocab_size=1 << 23), "the settings ask for 1 layers and "),
    "rows without end": (edit_config("model", vocab_multiple=1 << 23), "the settings ask for 1 layers and "),
    "a context of 2^23": (edit_config("model", block_size=1 << 23), "the settings ask for 1 layers and "),
    "batches of 10^30": (edit_config("train", batch_size=10**30), "batch_size must be less than 2^20"),
    "a rate of 401 digits": (edit_config("train", lr=10**400), "lr must be a number that a float can hold, got 0x"),
    "a dropout of 401 digits": (edit_config("model", dropout=10**400), "dropout must be a number that a float can"),
    "an infinite rate": (edit_config("train", lr=float("inf")), "lr must be greater than 0 and finite"),
}
SUMS_AS_THEY_ARE = ("sums of 10^4 parts", "sums with ../", "sums of another", "a linked checkpoint", "a pipe")

KIB = 1024
MOST = 64 * KIB  # in KiB, beyond what the process has before


def read(run: Path) -> str:
    """What is said of a run, or nothing where it is read."""
    try:
        model, _, train, _ = load_model(run, "last")
        load_training(open_checkpoint(run)[0], model, build_optimizer(model, train))
    except UserError as error:
        return str(error)
    return ""


def read_all(runs: list[Path], answers: Any) -> None:
    """What is said of each, and the KiB that it took; where memory is bounded."""
    torch.set_num_threads(1)
    read(runs[0])  # loads what is loaded late
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 4 * MOST * KIB  # addresses
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = [read(run) for run in runs]
    answers.send((said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_config(run, CONFIG, TrainConfig(), CharTokenizer("abcde"), {"fastgpt": "0"})
    model = GPT(CONFIG)
    optimizer = build_optimizer(model, TrainConfig())
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))[1].backward()
    optimizer.step()
    write_checkpoint(run, Snapshot.take(RunState(step=1), model, optimizer), True, 1)
    return run


def test_each_is_refused_in_one_sentence_with_nothing_executed_in_bounded_memory(run, tmp_path):
    runs = {"": run}
    for name, (do, _) in HARM.items():
        runs[name] = tmp_path / name.replace("/", "|")
        shutil.copytree(run, runs[name])
        do(runs[name])
        if name not in SUMS_AS_THEY_ARE:
            sum_again(runs[name])
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=read_all, args=(list(runs.values()), sender))
    process.start()
    sender.close()
    said, memory = receiver.recv()
    process.join()
    assert said[0] == ""
    for (name, (_, sentence)), answer in zip(HARM.items(), said[1:], strict=True):
        assert sentence in answer, f"{name}: {answer}"
        assert "\n" not in answer, name
        assert "0" * 41 not in answer, name
        assert not (runs[name] / "exploded").exists(), name
    assert memory < MOST, f"{memory} KiB"


def test_a_checkpoint_in_two_parts_is_read_and_what_pytorch_would_unpickle_is_not(run, tmp_path):
    wanted = load_model(run)[0].state_dict()
    in_two()(run)
    sum_again(run)
    (run / STEP / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))  # of other checkpoints of DCP's
    assert read(run) == ""
    for name, tensor in load_model(run)[0].state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert not (tmp_path / "exploded").exists()


def test_a_bomb_explodes_where_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


def test_what_a_link_leads_to_is_not_deleted(run, tmp_path):
    """A checkpoint's place may be a link to another disk; what lies there beside checkpoints stays."""
    elsewhere = tmp_path / "elsewhere"
    (run / "checkpoints").rename(elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)
    (elsewhere / "thesis").mkdir()
    (tmp_path / "photos").mkdir()
    (elsewhere / "step-00000000").symlink_to(tmp_path / "photos")
    model = load_model(run)[0]
    optimizer = build_optimizer(model, TrainConfig())
    load_training(open_checkpoint(run)[0], model, optimizer)
    for step in (2, 3):
        write_checkpoint(run, Snapshot.take(RunState(step=step), model, optimizer), True, 1)
    assert {path.name for path in elsewhere.iterdir()} == {"thesis", "step-00000000", "step-00000003"}
    assert (tmp_path / "photos").exists()
