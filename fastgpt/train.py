"""The training loop."""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

import fastgpt
from fastgpt import dispatch, ops
from fastgpt.checkpoint import (
    CHECKPOINTS,
    RunState,
    build_model,
    find_checkpoint,
    load_training,
    load_weights,
    read_config,
    read_state,
    save_checkpoint,
    write_config,
)
from fastgpt.config import ModelConfig, TrainConfig, UserError
from fastgpt.data import NAMED_TEXTS, Batches, Dataset, load_dataset
from fastgpt.metrics import Metrics, plot_losses
from fastgpt.model import GPT
from fastgpt.optim import build_optimizer, gradients, learning_rate
from fastgpt.placement import DTYPES, device_name, pick_backend, pick_device, pick_dtype
from fastgpt.pretrained import tokenizer_of
from fastgpt.tokenizer import Tokenizer


class TrainingError(RuntimeError):
    """The run cannot go on: its loss is not a number."""


class Trainer:
    """A run: everything is checked and made ready here, ``run_until_done`` trains.

    Args:
        model_config: the model's shape; its vocabulary is the data's unless ``keep_vocab_size`` asks for a larger one.
        config: the run's settings.
        run: the folder that the run writes (see fastgpt.checkpoint and fastgpt.metrics).
        keep_vocab_size: take ``model_config.vocab_size`` as it is.
        resume: go on from the last checkpoint in ``run``.
        init: the weights to start from, those of ``config.init``; ``model_config`` is theirs.
        console: where lines and the progress bar go.
    Raises:
        UserError: settings, data or a folder that cannot be used; nothing has been written into ``run`` then.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        run: Path,
        *,
        keep_vocab_size: bool = False,
        resume: bool = False,
        init: GPT | None = None,
        console: Console | None = None,
    ) -> None:
        self.console = console or Console()
        if config.init and not resume and init is None:
            raise UserError(f"the settings name weights to start from ({config.init}), so Trainer needs them as init")
        if not resume and (run / CHECKPOINTS).exists():
            raise UserError(f"{run}: a run lies here already: continue it with --resume, or choose another --out")
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        self.backend = pick_backend(config.backend, self.device, self.dtype)
        tokenizer: Tokenizer | str = config.tokenizer
        if resume:
            tokenizer = read_config(run)[2]
        elif config.init and tokenizer == "auto":
            tokenizer = tokenizer_of(config.init) or "auto"
        self.dataset = load_dataset(config.data, model_config.block_size, tokenizer, notify=self._warn)
        found = self.dataset.name  # a path is kept as one that holds from any folder
        found = found if found in NAMED_TEXTS else str(Path(found).expanduser().resolve())
        self.config = config = replace(config, data=found)
        if init is not None:
            _require_vocabulary(init, self.dataset, config.init)
        elif not resume:
            model_config = _with_vocabulary(model_config, self.dataset, keep_vocab_size)

        torch.manual_seed(config.seed)
        self.model = build_model(model_config) if init is None else init.train()
        self.state = RunState()
        if resume:
            folder = find_checkpoint(run)
            self.state = read_state(folder)
            if self.state.step >= config.max_iters:
                raise UserError(f"{run}: this run is at step {self.state.step} already: --max-iters gives it more")
            load_weights(self.model, folder / "model.safetensors")
        self.model.to(self.device)
        self.optimizer = build_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if resume:
            load_training(folder, self.model, self.optimizer)
            if self.state.scaler:  # empty if the run was not in fp16 until now
                self.scaler.load_state_dict(self.state.scaler)
        self._forward: Any = torch.compile(self.model, fullgraph=True) if config.compile else self.model
        self._autocast = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

        block_size = model_config.block_size
        self._batches = Batches(self.dataset.train, config.batch_size, block_size, config.seed, "train", self.device)
        self._eval_batches = evaluation_batches(self.dataset, config, block_size, self.device)
        self._tokens_per_step = config.batch_size * config.grad_accum * block_size
        self._losses: list[Tensor] = []  # of the steps not logged yet, still on the device
        self._speeds: list[float] = []  # tokens per second of each stretch between two log lines
        self._stop = False

        run.mkdir(parents=True, exist_ok=True)
        self.run = run
        versions = {"fastgpt": fastgpt.__version__, "torch": torch.__version__}
        write_config(run, model_config, config, self.dataset.tokenizer, versions)
        self._metrics = Metrics(run, self.state.step if resume else -1)

    @property
    def tokens_per_s(self) -> float:
        """Training tokens per second, evaluations and checkpoints left out: the median over the log lines."""
        return statistics.median(self._speeds) if self._speeds else 0.0

    def describe(self) -> str:
        """One line: the model, where it runs, and on what data."""
        with self.backend:
            backends = {row["backend"] or "nothing" for row in dispatch.explain(self.device.type, self.dtype)}
        dtype = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        train, val, vocab = len(self.dataset.train), len(self.dataset.val), self.dataset.tokenizer.vocab_size
        return (
            f"{type(self.model).__name__} of {self.model.num_params():,} parameters on {device_name(self.device)}, "
            f"{dtype}, ops on {' and '.join(sorted(backends))}, data {self.dataset.name}: "
            f"{train:,} tokens to train on, {val:,} to validate, vocabulary {vocab}"
        )

    def run_until_done(self) -> bool:
        """Train up to ``max_iters``. False if SIGINT or SIGTERM ended it before, after a checkpoint.

        Raises:
            TrainingError: the loss became NaN or infinite; the checkpoint before stands.
        """
        config, state = self.config, self.state
        self._began = time.monotonic() - state.elapsed_s
        with self.backend, self._stop_on_signal(), _progress(self.console) as bar:
            task = bar.add_task("training", total=config.max_iters, completed=state.step, speed="", loss="")
            if state.step == 0:
                self._evaluate(config.eval_iters)
            self._start_clock()
            while state.step < config.max_iters and not self._stop:
                self._step()
                done = state.step == config.max_iters
                evaluating = done or state.step % config.eval_interval == 0
                if evaluating or state.step % config.log_interval == 0:
                    self._log(bar, task)
                if evaluating:
                    best = self._evaluate(config.final_eval_iters if done else config.eval_iters)
                    self._save(best)
                    self._start_clock()
                bar.update(task, completed=state.step)
            if 0 < state.step < config.max_iters:
                self._log(bar, task)
                self._save(best=False)
        return state.step == config.max_iters

    def _step(self) -> None:
        """One step of the optimizer."""
        config, step = self.config, self.state.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        total = torch.zeros((), device=self.device)
        for micro in range(config.grad_accum):
            x, y = self._batches[step * config.grad_accum + micro]
            with self._autocast:
                _, loss = self._forward(x, y)
            self.scaler.scale(loss / config.grad_accum).backward()
            total += loss.detach() / config.grad_accum
        if config.grad_clip > 0:
            self.scaler.unscale_(self.optimizer)
            ops.clip_grad_norm_(gradients(self.model), config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._losses.append(total)
        self.state.step += 1

    def _start_clock(self) -> None:
        self._clock = time.monotonic()

    def _log(self, bar: Progress, task: TaskID) -> None:
        """Read the losses since the last log line, and write their mean."""
        if not self._losses:
            return
        losses = torch.stack(self._losses).tolist()  # waits for the device: from here on the clock is right
        first = self.state.step - len(losses) + 1
        for step, loss in enumerate(losses, first):
            self._require_finite(loss, step)
        now = time.monotonic()
        self._speeds.append(len(losses) * self._tokens_per_step / max(now - self._clock, 1e-9))
        self._losses.clear()
        self._start_clock()
        self._write_metrics("train", statistics.fmean(losses), len(losses) * self.config.grad_accum)
        bar.update(task, speed=f"{self._speeds[-1]:,.0f} tokens/s", loss=f"loss {losses[-1]:.3f}")

    def _evaluate(self, batches: int) -> bool:
        """Average the loss over ``batches`` of each split. True if validation has never been better."""
        state = self.state
        state.train_loss = self._mean_loss("train", batches)
        state.val_loss = self._mean_loss("val", batches)
        best = state.best_val_loss is None or state.val_loss < state.best_val_loss
        if best and state.step > 0:  # before the first step there is nothing to keep
            state.best_val_loss = state.val_loss
        for split, loss in (("train", state.train_loss), ("val", state.val_loss)):
            self._write_metrics(split, loss, batches)
        plot_losses(self.run)
        speed = f", {self._speeds[-1]:,.0f} tokens/s" if self._speeds else ""
        self.console.print(f"step {state.step}: train {state.train_loss:.4f}, val {state.val_loss:.4f}{speed}")
        return best

    def _mean_loss(self, split: str, batches: int) -> float:
        loss = mean_loss(self._forward, self._eval_batches[split], batches, self._autocast)
        self._require_finite(loss, self.state.step)
        return loss

    def _require_finite(self, loss: float, step: int) -> None:
        if math.isfinite(loss):
            return
        kept = "the last checkpoint stands" if (self.run / CHECKPOINTS).exists() else "no checkpoint was written yet"
        raise TrainingError(
            f"the loss became {loss} at step {step}, so the run was stopped; {kept} in {self.run} "
            "(a lower --lr, a longer --warmup-iters or --dtype fp32 may help)"
        )

    def _write_metrics(self, split: str, loss: float, batches: int) -> None:
        self.state.elapsed_s = time.monotonic() - self._began
        self._metrics.write(
            step=self.state.step,
            split=split,
            loss=loss,
            lr=learning_rate(self.state.step, self.config),
            tokens_per_s=self._speeds[-1] if self._speeds else 0.0,
            elapsed_s=self.state.elapsed_s,
            batches=batches,
        )

    def _save(self, best: bool) -> None:
        self.state.scaler = self.scaler.state_dict()
        save_checkpoint(self.run, self.state, self.model, self.optimizer, best)

    @contextlib.contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks the loop to stop; a second one does what it does elsewhere."""
        before: dict[int, Any] = {}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def ask(number: int, frame: FrameType | None) -> None:
            self._stop = True
            self._warn("stopping after this step and saving (once more to stop at once)")
            restore()

        for signum in (signal.SIGINT, signal.SIGTERM):
            before[signum] = signal.signal(signum, ask)
        try:
            yield
        finally:
            restore()

    def _warn(self, message: str) -> None:
        self.console.print(message, style="yellow", markup=False, highlight=False)


def evaluation_batches(
    dataset: Dataset, config: TrainConfig, block_size: int, device: torch.device
) -> dict[str, Batches]:
    """The batches of "train" and "val" that a run, and later `fastgpt eval`, average the loss over."""
    return {
        split: Batches(tokens, config.batch_size, block_size, config.seed, f"evaluate {split}", device)
        for split, tokens in (("train", dataset.train), ("val", dataset.val))
    }


@torch.no_grad()
def mean_loss(model: Any, batches: Batches, count: int, autocast: torch.autocast) -> float:
    """The model's loss averaged over the first ``count`` batches, in evaluation mode and without gradients."""
    model.eval()
    losses = []
    for index in range(count):
        x, y = batches[index]
        with autocast:
            losses.append(model(x, y)[1])
    model.train()
    return torch.stack(losses).double().mean().item()


def _with_vocabulary(model_config: ModelConfig, dataset: Dataset, keep: bool) -> ModelConfig:
    needed = dataset.tokenizer.vocab_size
    if not keep:
        return replace(model_config, vocab_size=needed)
    if model_config.vocab_size < needed:
        raise UserError(f"vocab_size must be at least {needed}, {dataset.name}'s, got {model_config.vocab_size}")
    return model_config


def _require_vocabulary(weights: GPT, dataset: Dataset, source: str) -> None:
    """Other tokens than the weights know would be taken for theirs. nanoGPT pads a vocabulary to a multiple of 64."""
    tokens, rows = dataset.tokenizer.vocab_size, weights.config.vocab_size
    if not rows - 64 < tokens <= rows:
        raise UserError(f"{dataset.name}: its tokenizer has {tokens} tokens, and the weights of {source} know {rows}")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
    )
