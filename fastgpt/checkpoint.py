"""A run's folder: its settings, and checkpoints that are whole at every moment.

    RUN/config.json          the model's and the run's settings, and the versions they ran with
    RUN/tokenizer.json       the tokenizer
    RUN/metrics.jsonl        see fastgpt.metrics
    RUN/checkpoints.json     {"last": "step-00000500", "best": "step-00000250"}
    RUN/checkpoints/step-N/  model.safetensors    weights, under GPT-2's names
                             training.safetensors AdamW's moments, and the states of the random generators
                             state.json           step, losses, elapsed seconds, gradient scaler

A checkpoint is written beside the others under a passing name, renamed when it is whole, and only then pointed at by
checkpoints.json, which is itself replaced in one step. Killed at any moment, a run leaves what it pointed at before.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgpt.config import MODEL_CONFIGS, BigramConfig, ModelConfig, TrainConfig, UserError, field_types
from fastgpt.files import json_bytes, read_json, write_atomically
from fastgpt.model import GPT, Bigram
from fastgpt.optim import AdamW
from fastgpt.tensor_files import read_tensors, tensor_names
from fastgpt.tokenizer import Tokenizer, read_tokenizer

Which = Literal["last", "best"]

CHECKPOINTS = "checkpoints.json"


@dataclass
class RunState:
    """Where a run stands: what state.json holds."""

    step: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    elapsed_s: float = 0.0
    scaler: dict[str, Any] = dataclasses.field(default_factory=dict)


def build_model(config: ModelConfig) -> GPT | Bigram:
    return Bigram(config) if isinstance(config, BigramConfig) else GPT(config)


def write_config(
    run: Path, model: ModelConfig, train: TrainConfig, tokenizer: Tokenizer, versions: dict[str, str]
) -> None:
    """Write config.json, which notes the versions, and tokenizer.json."""
    kind = next(name for name, cls in MODEL_CONFIGS.items() if isinstance(model, cls))
    settings = {
        "versions": versions,
        "model": {"type": kind, **dataclasses.asdict(model)},
        "train": dataclasses.asdict(train),
    }
    write_atomically(run / "tokenizer.json", json_bytes(tokenizer.to_json()))
    write_atomically(run / "config.json", json_bytes(settings))


def read_config(run: Path) -> tuple[ModelConfig, TrainConfig, Tokenizer]:
    """
    Raises:
        UserError: no run there, or settings that cannot be read.
    """
    if not (run / "config.json").is_file():
        raise UserError(f"{run}: there is no run in this folder (no config.json)")
    path = run / "config.json"
    settings = read_json(path)
    model, train = settings.get("model"), settings.get("train")
    if not isinstance(model, dict) or not isinstance(train, dict):
        raise UserError(f"{path}: damaged: it must hold the objects model and train")
    kind = model.pop("type", None)
    config = MODEL_CONFIGS.get(kind) if isinstance(kind, str) else None
    if config is None:
        raise UserError(f"{path}: the model's type must be one of {', '.join(MODEL_CONFIGS)}")
    for section, cls in ((model, config), (train, TrainConfig)):
        unknown = section.keys() - field_types(cls).keys()
        if unknown:
            raise UserError(f"{path}: unknown setting {min(unknown)!r}")
    return config(**model), TrainConfig(**train), read_tokenizer(run / "tokenizer.json")


def save_checkpoint(run: Path, state: RunState, model: nn.Module, optimizer: AdamW, best: bool) -> Path:
    """Write a checkpoint, point "last" (and "best") at it, delete those that nothing points at. Returns its folder."""
    pointers = _pointers(run)
    name = f"step-{state.step:08d}"
    folder = run / "checkpoints" / name
    if name not in pointers.values():
        shutil.rmtree(folder, ignore_errors=True)  # whole, but never pointed at: a kill came between
        made = folder.with_name(f".new-{name}")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        save_file(_weights(model), made / "model.safetensors")
        save_file(_training_tensors(model, optimizer), made / "training.safetensors")
        (made / "state.json").write_bytes(json_bytes(dataclasses.asdict(state)))
        for path in [*made.iterdir(), made]:
            _sync(path)
        made.rename(folder)
        _sync(folder.parent)
    pointers["last"] = name
    if best or "best" not in pointers:
        pointers["best"] = name
    write_atomically(run / CHECKPOINTS, json_bytes(pointers))
    for other in folder.parent.iterdir():
        if other.name not in pointers.values():
            shutil.rmtree(other)
    return folder


def find_checkpoint(run: Path, which: Which = "last") -> Path:
    """The folder of the last or best checkpoint.

    Raises:
        UserError: the run has none.
    """
    pointers = _pointers(run)
    if which not in pointers:
        raise UserError(f"{run}: this run has no checkpoint yet")
    return run / "checkpoints" / pointers[which]


def load_model(run: Path, which: Which = "best") -> tuple[GPT | Bigram, Tokenizer, TrainConfig, RunState]:
    """The model of a run's checkpoint, on the CPU and in evaluation mode, and what belongs to it.

    Raises:
        UserError: no run or checkpoint there, or a damaged one.
    """
    config, train, tokenizer = read_config(run)
    folder = find_checkpoint(run, which)
    model = build_model(config)
    load_weights(model, folder / "model.safetensors")
    return model.eval(), tokenizer, train, read_state(folder)


def read_state(folder: Path) -> RunState:
    """
    Raises:
        UserError: a damaged file.
    """
    path = folder / "state.json"
    data = read_json(path)
    wanted = {f.name for f in dataclasses.fields(RunState)}
    if data.keys() != wanted:
        raise UserError(f"{path}: damaged: it must hold {', '.join(sorted(wanted))}")
    losses = [data[name] for name in ("train_loss", "val_loss", "best_val_loss") if data[name] is not None]
    if not (
        isinstance(data["step"], int)
        and data["step"] > 0
        and isinstance(data["scaler"], dict)
        and all(isinstance(number, (int, float)) for number in (data["elapsed_s"], *losses))
    ):
        raise UserError(f"{path}: damaged: a value has the wrong type")
    return RunState(**data)


def load_weights(model: nn.Module, path: Path) -> None:
    """
    Raises:
        UserError: a damaged file, or tensors that are not the model's.
    """
    own = _weights(model)
    tensors = read_tensors(path, own)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def load_training(folder: Path, model: nn.Module, optimizer: AdamW) -> None:
    """Put AdamW's moments and the random generators back to where ``folder`` left them.

    Raises:
        UserError: a damaged file.
    """
    path = folder / "training.safetensors"
    moments = {
        f"{moment}.{name}": param for name, param in model.named_parameters() for moment in ("exp_avg", "exp_avg_sq")
    }
    like = {"step": torch.zeros(()), "rng.cpu": torch.get_rng_state(), **moments}
    device = next(model.parameters()).device
    if device.type == "cuda" and "rng.cuda" in tensor_names(path):  # a run that moved to a GPU goes on from its seed
        like["rng.cuda"] = torch.cuda.get_rng_state(device)
    tensors = read_tensors(path, like)
    for group in optimizer.param_groups:
        group["step"] = tensors["step"].to(group["params"][0].device, copy=True)
    for name, param in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[param][moment] = tensors[f"{moment}.{name}"].to(param.device)
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters, a shared one once under its first name."""
    return {name: p.detach() for name, p in model.named_parameters()}


def _training_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    tensors = {"step": optimizer.param_groups[0]["step"], "rng.cpu": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    for name, param in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[param][moment]
    return tensors


def _pointers(run: Path) -> dict[str, str]:
    path = run / CHECKPOINTS
    if not path.is_file():
        return {}
    pointers = read_json(path)
    for which, name in pointers.items():
        if not isinstance(name, str) or not re.fullmatch(r"step-\d+", name):
            raise UserError(f"{path}: damaged: {which} must be the name of a checkpoint, got {name!r}")
    return pointers


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
