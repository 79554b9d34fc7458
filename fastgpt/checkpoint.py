"""A run's folder: its settings, and checkpoints that are whole at every moment.

    RUN/config.json          the model's and the run's settings, and the versions they ran with
    RUN/tokenizer.json       the tokenizer
    RUN/metrics.jsonl        see fastgpt.metrics
    RUN/checkpoints.json     {"last": "step-00000500", "best": "step-00000250"}
    RUN/checkpoints/step-N/  model.safetensors    weights, under GPT-2's names
                             training.safetensors AdamW's moments, and the states of the random generators
                             state.json           step, losses, elapsed seconds, processes, gradient scaler
                             SHA256SUMS           of the other three, as sha256sum writes and checks them

Where N processes have a share of every tensor each ("fsdp"), each writes its own, into model-0000i-of-0000N.safetensors
and training-0000i-of-0000N.safetensors. Whoever reads takes the rows that it wants, from one file or from several.

A checkpoint is written beside the others under a passing name, renamed when it is whole, and only then pointed at by
checkpoints.json, which is itself replaced in one step. Killed at any moment, a run leaves what it pointed at before.
A folder that is named step-N is therefore whole, pointed at or not, until its disk says otherwise; the sums tell.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastgpt.config import (
    MODEL_CONFIGS,
    BigramConfig,
    ModelConfig,
    TrainConfig,
    TrainingError,
    UserError,
    field_types,
    told,
)
from fastgpt.distributed import ALONE, World, is_sharded, on_host, own_rows, world
from fastgpt.files import json_bytes, read_json, sha256_of, sync, write_atomically
from fastgpt.model import GPT, Bigram
from fastgpt.optim import AdamW
from fastgpt.tensor_files import Stored, find_tensors, is_finite, save_tensors, tensor_names
from fastgpt.tokenizer import Tokenizer, read_tokenizer

CHECKPOINTS = "checkpoints.json"
STATE = "state.json"
SUMS = "SHA256SUMS"

_NAME = re.compile(r"step-\d{8,18}")
_PASSING = ".new-"  # before a name: not whole yet, or no longer
_LARGEST: dict[type, float] = {int: 2**31 - 1, float: 2**127}
_SCALER: dict[str, type[int] | type[float]] = {  # GradScaler's state
    "scale": float,
    "growth_factor": float,
    "backoff_factor": float,
    "growth_interval": int,
    "_growth_tracker": int,
}


@dataclass
class RunState:
    """Where a run stands: what state.json holds."""

    step: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    elapsed_s: float = 0.0
    processes: int = 1
    scaler: dict[str, Any] = dataclasses.field(default_factory=dict)


def bare_model(config: ModelConfig, device: torch.device | str) -> GPT | Bigram:
    """The model with memory for its weights and nothing in it; on the meta device without, until ``to_empty``."""
    with torch.device(device):
        return Bigram(config, drawn=False) if isinstance(config, BigramConfig) else GPT(config, drawn=False)


@torch.no_grad()
def draw_weights(model: GPT | Bigram) -> None:
    """Give a model the weights that training starts from, the same ones on any number of processes.

    Each process draws all numbers and keeps its own; no more than one whole tensor is in memory at a time.
    """
    for name, param in model.named_parameters():
        whole = torch.empty(param.shape)
        model.draw(name, whole)
        own, first_row = own_rows(param)
        own.copy_(whole[first_row : first_row + len(own)])


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
            raise UserError(f"{path}: unknown setting {told(min(unknown))}")
    return config(**model), TrainConfig(**train), read_tokenizer(run / "tokenizer.json")


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment, in host memory: what a checkpoint is written from.

    Of a sharded model (``is_shared``) each process has its shards alone. ``copied`` is, on a GPU, the event after which
    the tensors are there; until then nobody may change the originals.
    """

    state: RunState
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    is_shared: bool
    copied: torch.cuda.Event | None

    @classmethod
    def take(cls, state: RunState, model: nn.Module, optimizer: AdamW) -> Snapshot:
        """Copy the run; from a GPU into pinned memory on a stream of its own, without waiting for it."""
        device, is_shared = next(model.parameters()).device, is_sharded(model)
        weights, training = _weights(model), _training_tensors(model, optimizer)
        state = copy.deepcopy(state)
        if device.type != "cuda":
            return cls(state, on_host(weights, Tensor.clone), on_host(training, Tensor.clone), is_shared, None)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            weights, training = on_host(weights, _pinned), on_host(training, _pinned)
            return cls(state, weights, training, is_shared, stream.record_event())


class CheckpointWriter:
    """Writes a run's checkpoints in a thread, one at a time, while training goes on; of shards, in one of each process.

    As a context manager it ends with the last checkpoint written. What keeps one from being written is raised by the
    next call, as a TrainingError with the reason; the checkpoint before stands then.

    Args:
        run: the run's folder.
        keep: how many of the last checkpoints stay, beside the best.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self._run, self._keep = run, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None
        self._step = 0  # of the one that is pending
        self._copied: torch.cuda.Event | None = None

    def save(self, state: RunState, model: nn.Module, optimizer: AdamW, best: bool) -> None:
        """Take a snapshot and have it written; waits for the checkpoint before, should that be under way still."""
        self.wait()
        if world().is_main or is_sharded(model):
            snapshot = Snapshot.take(state, model, optimizer)
            self._step, self._copied = state.step, snapshot.copied
            self._pending = self._thread.submit(write_checkpoint, self._run, snapshot, best, self._keep)

    def before_update(self) -> None:
        """Call it before weights or moments change: the GPU, not the host, then waits for the snapshot's copies."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def raise_if_failed(self) -> None:
        """Does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint under way, if there is one, is written."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"the checkpoint of step {self._step} could not be written ({error}), so the run was stopped; "
                f"{what_stands(self._run)}"
            ) from error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        self.wait()


def write_checkpoint(run: Path, snapshot: Snapshot, best: bool, keep: int) -> Path:
    """Write a checkpoint, point "last" (and "best") at it, and delete all but these and the ``keep`` last.

    All processes that share a snapshot call it.

    Returns:
        Its folder.
    Raises:
        TrainingError: a weight or a moment is NaN or infinite; such a checkpoint is not written.
        OSError, SafetensorError: it cannot be written; what was written of it is deleted.
    """
    if snapshot.copied is not None:
        snapshot.copied.synchronize()
    making = Making(run, snapshot, best, keep)
    try:
        if snapshot.is_shared:
            from fastgpt.joint_checkpoint import write_jointly  # what it imports takes a second

            write_jointly(making)
        else:
            making.check()
            making.finish(making.fill(making.tensors) if making.begin() else [])
    except Exception:
        if world().is_main:
            shutil.rmtree(making.made, ignore_errors=True)  # a disk that is full has better use for its room
        raise
    return making.folder


class Making:
    """A checkpoint that is being made: checked, begun, filled and finished.

    Of several processes that make it together, each checks and fills its own part, and the main one begins and
    finishes it for all. ``folder`` is the checkpoint's and ``made`` is that folder until it is whole.
    """

    def __init__(self, run: Path, snapshot: Snapshot, best: bool, keep: int) -> None:
        self.run, self.snapshot, self.best, self.keep = run, snapshot, best, keep
        self.tensors = {**snapshot.weights, **snapshot.training}
        self.folder = run / "checkpoints" / _name_of(snapshot.state.step)
        self.made = self.folder.with_name(_PASSING + self.folder.name)

    def check(self) -> None:
        """
        Raises:
            TrainingError: nobody could go on from it.
        """
        for name, tensor in self.tensors.items():
            if not is_finite(own_rows(tensor)[0]):
                raise TrainingError(
                    f"{name} became NaN or infinite by step {self.snapshot.state.step}, so the run was stopped; "
                    f"{what_stands(self.run)}"
                )

    def begin(self) -> bool:
        """Make its folder. False if it is there, whole and pointed at."""
        if self.folder.name in _pointers(self.run).values():
            return False
        for left in (self.folder, self.made):  # by a run that was killed: the first is whole, but is not pointed at
            if left.is_dir() and not left.is_symlink():
                _delete(left)
        self.made.mkdir(parents=True)
        return True

    def fill(
        self,
        tensors: Mapping[str, Tensor],
        offsets: Mapping[str, Sequence[int]] | None = None,
        part: int = 0,
        parts: int = 1,
    ) -> list[str]:
        """Write the files of one process, and wait until the disk has them.

        Args:
            tensors: what they are to hold, by name.
            offsets: of tensors that are rows of larger ones, see ``save_tensors``.
            part, parts: which process of how many.
        Returns:
            Their lines of SHA256SUMS.
        """
        model, training = _tensor_files(self.made, part, parts)
        weights = self.snapshot.weights
        save_tensors({name: t for name, t in tensors.items() if name in weights}, model, offsets)
        save_tensors({name: t for name, t in tensors.items() if name not in weights}, training, offsets)
        for path in (model, training):
            sync(path)
        return [_sum_of(path) for path in (model, training)]

    def finish(self, sums: list[str]) -> None:
        """Let it have its name, now that all files of tensors are there, and point at it; delete earlier ones.

        Args:
            sums: the lines of SHA256SUMS; none if the checkpoint was there before.
        """
        step = self.snapshot.state.step
        if sums:
            (self.made / STATE).write_bytes(json_bytes(dataclasses.asdict(self.snapshot.state)))
            (self.made / SUMS).write_text("".join([*sums, _sum_of(self.made / STATE)]))
            for path in (self.made / STATE, self.made / SUMS, self.made):
                sync(path)
            self.made.rename(self.folder)
            sync(self.folder.parent)
        pointers = _pointers(self.run)
        pointers["last"] = self.folder.name
        if self.best or "best" not in pointers:
            pointers["best"] = self.folder.name
        write_atomically(self.run / CHECKPOINTS, json_bytes(pointers))
        earlier = [other for other in checkpoint_names(self.run) if _step_of(other) <= step]
        _delete_but(self.folder.parent, {*pointers.values(), *earlier[-self.keep :]})


def go_back_to(run: Path, name: str) -> None:
    """Make a checkpoint the last one; later ones, which the run now abandons, go when it writes its next."""
    pointers = _pointers(run)
    best = pointers.get("best", name)
    kept = {"last": name, "best": best if _step_of(best) <= _step_of(name) else name}
    if kept != pointers:
        write_atomically(run / CHECKPOINTS, json_bytes(kept))


def what_stands(run: Path) -> str:
    """The end of a sentence on a run that was stopped."""
    last = _pointers(run).get("last")
    return f"{last} stands in {run}" if last else f"no checkpoint was written yet in {run}"


def _delete_but(folder: Path, kept: set[str]) -> None:
    """Delete the checkpoints in ``folder``, whole or not, that are not ``kept``; nothing else, and through no link."""
    for path in folder.iterdir():
        name = path.name.removeprefix(_PASSING)
        if path.name not in kept and _NAME.fullmatch(name) and path.exists() and not path.is_symlink():
            _delete(path)  # unless it went with the one of its name


def _delete(path: Path) -> None:
    """Delete a checkpoint, whole or not, under its passing name: half deleted, it must not look whole."""
    passing = path.with_name(_PASSING + path.name.removeprefix(_PASSING))
    if path != passing:
        shutil.rmtree(passing, ignore_errors=True)
        path.rename(passing)
    shutil.rmtree(passing)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters, a shared one once under its first name."""
    return {name: p.detach() for name, p in model.named_parameters()}


def _moments(model: nn.Module) -> dict[str, tuple[nn.Parameter, str]]:
    """{name in training.safetensors: (parameter, its name in AdamW's state)}"""
    return {
        f"{moment}.{name}": (param, moment)
        for name, param in model.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }


def _training_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """What training.safetensors holds. What is not spread over the processes, the main one alone gives."""
    tensors = {name: optimizer.state[param][moment] for name, (param, moment) in _moments(model).items()}
    if not world().is_main:
        return tensors
    tensors |= {"step": optimizer.param_groups[0]["step"], "rng.cpu": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, which PyTorch's allocator reuses from one checkpoint to the next."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def checkpoint_names(run: Path) -> list[str]:
    """A run's checkpoints, by step."""
    folder = run / "checkpoints"
    paths = list(folder.iterdir()) if folder.is_dir() else []
    names = [path.name for path in paths if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(names, key=_step_of)


def find_checkpoint(run: Path, which: str = "last") -> Path:
    """The folder of a checkpoint: "last", "best", or "step-N" by its name.

    Raises:
        UserError: the run has none, or not this one.
    """
    names = checkpoint_names(run)
    name = which
    if which in ("last", "best"):
        pointers = _pointers(run)
        if which not in pointers:
            raise UserError(f"{run}: this run has no checkpoint yet")
        name = pointers[which]
    elif re.fullmatch(r"step-\d{1,18}", which):
        name = _name_of(_step_of(which))
    if name not in names:
        raise UserError(f"{run}: there is no checkpoint {name}; there is {', '.join(names) or 'none'}")
    return run / "checkpoints" / name


def open_checkpoint(run: Path, which: str = "last") -> tuple[Path, RunState]:
    """The folder of a checkpoint that was held to its sums, and where the run stood.

    Raises:
        UserError: none there, or a damaged one; then another that is whole is named.
    """
    folder = find_checkpoint(run, which)
    try:
        state = _read_whole(folder, world())
        world().any(False)  # nobody takes for whole what another has found damaged
        return folder, state
    except UserError as error:
        others = (folder.with_name(name) for name in reversed(checkpoint_names(run)) if name != folder.name)
        whole = next((other.name for other in others if _is_whole(other)), None)
        offer = f"--checkpoint {whole} is whole" if whole else "no other checkpoint is whole"
        raise UserError(f"{error}; {offer}") from error


def load_model(run: Path, which: str = "best") -> tuple[GPT | Bigram, Tokenizer, TrainConfig, RunState]:
    """The model of a run's checkpoint, on the CPU and in evaluation mode, and what belongs to it.

    Raises:
        UserError: no run or checkpoint there, or a damaged one.
    """
    config, train, tokenizer = read_config(run)
    folder, state = open_checkpoint(run, which)
    return restore_model(config, folder).eval(), tokenizer, train, state


def restore_model(config: ModelConfig, folder: Path) -> GPT | Bigram:
    """A checkpoint's model, on the CPU.

    Raises:
        UserError: a damaged file, or tensors that are not the model's.
    """
    model = bare_model_of(config, folder, "cpu")
    load_weights(folder, model)
    return model


def bare_model_of(config: ModelConfig, folder: Path, device: torch.device | str) -> GPT | Bigram:
    """``bare_model``, not built before a checkpoint's files were seen to have the size of it.

    Raises:
        UserError: they have not.
    """
    layers, weights = _layers_and_weights(config)
    paths = _files_of(folder)[0]
    tensors, size = len(_names_in(paths)), sum(path.stat().st_size for path in paths)
    if layers > tensors or weights > size:
        raise UserError(
            f"{paths[0]}: the settings ask for {layers:,} layers and {weights:,} weights, but the checkpoint has "
            f"{tensors:,} tensors and {size:,} bytes"
        )
    return bare_model(config, device)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into ``model``; of one that is sharded, each process reads its own rows.

    Raises:
        UserError: a damaged file, or tensors that are not the model's.
    """
    _read(_files_of(folder)[0], dict(model.named_parameters()))


def stored_weights(config: ModelConfig, folder: Path) -> dict[str, Stored]:
    """The weights of a checkpoint, under GPT-2's names, none of them read.

    Raises:
        UserError: a damaged file, or tensors that are not the model's.
    """
    return find_tensors(_files_of(folder)[0], dict(bare_model_of(config, folder, "meta").named_parameters()))


def load_training(folder: Path, model: nn.Module, optimizer: AdamW) -> None:
    """Put AdamW's moments and the random generators back to where ``folder`` left them.

    Raises:
        UserError: a damaged file; nothing was changed then.
    """
    paths = _files_of(folder)[1]
    device = next(model.parameters()).device
    moments = _moments(model)
    tensors: dict[str, Tensor] = {
        name: torch.zeros_like(param.detach(), dtype=torch.float32) for name, (param, _) in moments.items()
    }
    tensors |= {"step": torch.zeros(()), "rng.cpu": torch.get_rng_state()}
    if device.type == "cuda" and "rng.cuda" in _names_in(paths):  # a run that moved to a GPU goes on from its seed
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    _read(paths, tensors)
    try:
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], device)
    except RuntimeError as error:  # each generator knows what its states look like
        raise UserError(f"{paths[0]}: damaged: not the state of a random generator: {error}") from error
    for group in optimizer.param_groups:
        group["step"] = tensors["step"].to(group["params"][0].device, copy=True)
    for name, (param, moment) in moments.items():
        optimizer.state[param][moment] = tensors[name]


def _read(paths: list[Path], tensors: Mapping[str, Tensor]) -> None:
    """Read ``tensors`` by name; of those that are spread over processes, this one's rows."""
    for name, stored in find_tensors(paths, tensors).items():
        stored.copy_to(*own_rows(tensors[name]))


def _names_in(paths: list[Path]) -> set[str]:
    return set().union(*map(tensor_names, paths))


def _tensor_files(folder: Path, part: int, parts: int) -> tuple[Path, Path]:
    """The files of process ``part`` of ``parts``: its weights, and the rest."""
    suffix = f"-{part + 1:05d}-of-{parts:05d}" if parts > 1 else ""
    return folder / f"model{suffix}.safetensors", folder / f"training{suffix}.safetensors"


def _files_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """A checkpoint's files, by its sums: those of weights, and those with the rest."""
    parts = max(1, sum("  model" in line for line in _wanted_sums(folder)))
    models, trainings = zip(*(_tensor_files(folder, part, parts) for part in range(parts)), strict=True)
    return list(models), list(trainings)


def _wanted_sums(folder: Path) -> list[str]:
    with (folder / SUMS).open(errors="replace") as file:
        return file.read(1 << 20).splitlines(keepends=True)


def _layers_and_weights(config: ModelConfig) -> tuple[int, int]:
    """Blocks, and the weights of all matrices, without a model's being built."""
    if isinstance(config, BigramConfig):
        return 0, config.vocab_size**2
    return config.n_layer, config.n_embd * (
        config.padded_vocab_size + config.block_size + 12 * config.n_layer * config.n_embd
    )


def _read_whole(folder: Path, readers: World = ALONE) -> RunState:
    """Hold a checkpoint to its sums; the processes of ``readers`` share the files out.

    Raises:
        UserError: a file that is missing, is no file, or is not the one that was written.
    """
    _require_file(folder / SUMS)
    models, trainings = _files_of(folder)
    paths = [*models, *trainings, folder / STATE]
    for path in paths:
        _require_file(path)
    wanted = _wanted_sums(folder)
    for path in paths[readers.rank :: readers.size]:
        if _sum_of(path) not in wanted:
            raise UserError(f"{path}: damaged: its sha256 is not the one in {SUMS}")
    if len(wanted) != len(paths):
        names = ", ".join(path.name for path in paths[:9])
        raise UserError(f"{folder / SUMS}: damaged: it must name {names} and no other")
    return _read_state(folder)


def _require_file(path: Path) -> None:
    if not path.is_file() or path.is_symlink():
        raise UserError(f"{path}: damaged: there is no such file")


def _is_whole(folder: Path) -> bool:
    try:
        _read_whole(folder)
    except UserError:
        return False
    return True


def _read_state(folder: Path) -> RunState:
    path = folder / "state.json"
    data = read_json(path)
    wanted = {f.name for f in dataclasses.fields(RunState)}
    if data.keys() != wanted:
        raise UserError(f"{path}: damaged: it must hold {', '.join(sorted(wanted))}")
    losses = [data[name] for name in ("train_loss", "val_loss", "best_val_loss") if data[name] is not None]
    if not (
        type(data["step"]) is int
        and _name_of(data["step"]) == folder.name
        and _is_number(data["processes"], int, 1)
        and _are_scaler_numbers(data["scaler"])
        and _is_number(data["elapsed_s"], float)
        and all(_is_number(loss, float, -_LARGEST[float]) for loss in losses)
    ):
        raise UserError(f"{path}: damaged: a value has the wrong type")
    return RunState(**data)


def _are_scaler_numbers(scaler: Any) -> bool:
    """GradScaler's state, or none of it."""
    return isinstance(scaler, dict) and (
        not scaler
        or (scaler.keys() == _SCALER.keys() and all(_is_number(scaler[name], kind) for name, kind in _SCALER.items()))
    )


def _is_number(value: Any, kind: type[int] | type[float], least: float = 0) -> bool:
    """Whether a tensor of int32, or of fp32, can hold ``value``, a number of JSON that is at least ``least``."""
    return type(value) in (int, kind) and least <= value <= _LARGEST[kind]


def _pointers(run: Path) -> dict[str, str]:
    path = run / CHECKPOINTS
    if not path.is_file():
        return {}
    pointers = read_json(path)
    for which, name in pointers.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(f"{path}: damaged: {which} must be the name of a checkpoint, got {told(name)}")
    return pointers


def _sum_of(path: Path) -> str:
    """The line of SHA256SUMS for a file as it is now."""
    return f"{sha256_of(path)}  {path.name}\n"


def _name_of(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))
