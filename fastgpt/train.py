"""The training loop."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

import fastgpt
from fastgpt import dispatch, distributed
from fastgpt.checkpoint import (
    CHECKPOINTS,
    CheckpointWriter,
    RunState,
    bare_model,
    bare_model_of,
    draw_weights,
    go_back_to,
    load_training,
    load_weights,
    open_checkpoint,
    read_config,
    what_stands,
    write_config,
)
from fastgpt.config import GPTConfig, ModelConfig, TrainConfig, TrainingError, UserError, field_types
from fastgpt.cuda_graph import Graphed
from fastgpt.data import NAMED_TEXTS, Batches, Dataset, load_dataset
from fastgpt.devices import peak_flops
from fastgpt.extras import require
from fastgpt.files import lock
from fastgpt.metrics import Metrics, metrics_until, plot_losses
from fastgpt.model import GPT
from fastgpt.optim import build_optimizer, gradients, learning_rate
from fastgpt.placement import DTYPES, device_name, fp32_products, peak_memory, pick_backend, pick_device, pick_dtype
from fastgpt.pretrained import Pretrained, no_tokenizer, require_vocabulary, tokenizer_of
from fastgpt.profiling import FIRST, LAST, traced
from fastgpt.shards import is_prepared
from fastgpt.tokenizer import Tokenizer

# Settings that change nothing in what a run computes, but what is written and said about it.
_ASIDE = {
    "eval_interval",
    "eval_iters",
    "final_eval_iters",
    "log_interval",
    "checkpoint_interval",
    "keep",
    "sample_tokens",
    "tensorboard",
    "profile",
}


# By folder, the locks of the runs that this process writes. They are the process's and not a trainer's: one that was
# made and never run keeps nobody in this process from making the next.
_locks: dict[Path, int] = {}


def _hold(run: Path) -> None:
    """Keep other processes from training in ``run``, until ``_let_go_after`` or this process ends.

    Raises:
        UserError: another process trains there.
    """
    if run.resolve() in _locks:
        return
    handle = lock(run)
    if handle is None:
        raise UserError(f"{run}: another fastgpt train is at work here: wait for its end, or choose another --out")
    _locks[run.resolve()] = handle


@contextlib.contextmanager
def _let_go_after(run: Path) -> Iterator[None]:
    try:
        yield
    finally:
        handle = _locks.pop(run.resolve(), None)
        if handle is not None:
            os.close(handle)


class Trainer:
    """A run: everything is checked and made ready here, ``run_until_done`` trains.

    Args:
        model_config: the model's shape; its vocabulary is the data's unless ``keep_vocab_size`` asks for a larger one.
        config: the run's settings.
        run: the folder that the run writes (see fastgpt.checkpoint and fastgpt.metrics).
        keep_vocab_size: take ``model_config.vocab_size`` as it is.
        resume: go on from a checkpoint in ``run``, or begin anew where it was killed before the first.
        checkpoint: which one: "last", "best" or "step-N".
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
        checkpoint: str = "last",
        init: Pretrained | None = None,
        console: Console | None = None,
    ) -> None:
        self.world = distributed.world()
        self.console = console or Console()
        if not resume and (run / CHECKPOINTS).exists():
            raise UserError(f"{run}: a run lies here already: continue it with --resume, or choose another --out")
        self._share = self.world.share(config.batch_size, config.grad_accum)
        self.device = pick_device(self.world.device(config.device))
        self.dtype = pick_dtype(config.dtype, self.device)
        self.backend = pick_backend(config.backend, self.device, self.dtype)
        if config.recompute and not isinstance(model_config, GPTConfig):
            raise UserError("recompute is for the blocks of a GPT, and this model has none")
        if config.tensorboard:
            require("tensorboard", "tensorboard", "--tensorboard")
        tokenizer: Tokenizer | str = config.tokenizer
        if resume:
            _, begun, tokenizer = read_config(run)
            if self.world.is_main:
                _hold(run)
        elif config.init and tokenizer == "auto":
            tokenizer = tokenizer_of(config.init) or tokenizer
            if tokenizer == "auto" and not is_prepared(Path(config.data).expanduser()):  # such a folder brings its own
                raise no_tokenizer(config.init)
        with self.world.local_first() as first:
            self.dataset = load_dataset(config.data, model_config.block_size, tokenizer, self._warn, verify=first)
        found = self.dataset.name  # a path is kept as one that holds from any folder
        found = found if found in NAMED_TEXTS else str(Path(found).expanduser().resolve())
        self.config = config = replace(config, data=found)
        if init is not None:
            require_vocabulary(init.config, self.dataset.tokenizer, config.init, self.dataset.name)
        elif not resume:
            model_config = _with_vocabulary(model_config, self.dataset, keep_vocab_size)

        torch.manual_seed(config.seed)
        folder, self.state = None, RunState(processes=self.world.size)
        if resume and ((run / CHECKPOINTS).exists() or checkpoint != "last"):
            folder, self.state = open_checkpoint(run, checkpoint)
            if self.state.step >= config.max_iters:
                raise UserError(f"{run}: this run is at step {self.state.step} already: --max-iters gives it more")
        elif resume and config.init:
            raise UserError(
                f"{run}: this run was killed before its first checkpoint: begin it anew, with --init {config.init}"
            )
        elif config.init and init is None:
            raise UserError(f"the settings name weights to start from ({config.init}), so Trainer needs them as init")
        is_shared = config.parallel == "fsdp" and self.world.size > 1
        place = torch.device("meta") if is_shared else self.device
        self.model = bare_model_of(model_config, folder, place) if folder else bare_model(model_config, place)
        left = config.max_iters - self.state.step
        if config.profile and left < LAST:
            raise UserError(
                f"profile traces steps {FIRST} to {LAST} of a start, and this one has only {left}: leave it out "
                "(--no-profile)"
            )
        if config.recompute and isinstance(self.model, GPT):
            self.model.recompute_blocks()
        if is_shared:
            self.world.shard(self.model, self.device)
            self.model.to_empty(device=self.device)
        if folder:
            load_weights(folder, self.model)
        elif init is not None:
            init.fill(self.model)
        else:
            draw_weights(self.model)
        self.optimizer = build_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if folder:
            load_training(folder, self.model, self.optimizer)
            if self.state.scaler:  # empty if the run was not in fp16 until now
                self.scaler.load_state_dict(self.state.scaler)
        self._forward: Any = distributed.compiled(self.model) if config.compile else self.model
        self._autocast = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

        block_size = model_config.block_size
        self._batches = Batches(self.dataset.train, config.batch_size, block_size, config.seed, "train", self.device)
        self._eval_batches = evaluation_batches(self.dataset, config, block_size, self.device)
        self._tokens_per_step = config.batch_size * config.grad_accum * block_size
        self._losses: list[Tensor] = []  # of the steps not logged yet, still on the device
        self._speeds: list[float] = []  # tokens per second of each stretch between two log lines
        self._stop = False

        self.run = run
        self._writer = CheckpointWriter(run, config.keep)
        self._metrics: Metrics | None = None
        if resume:
            self._say_what_changed(begun)
        self.state.processes = self.world.size
        self.world.any(False)  # nobody writes into a folder that another could not read
        if self.world.is_main:
            kept = metrics_until(run, self.state.step if folder else -1)
            run.mkdir(parents=True, exist_ok=True)
            _hold(run)
            if folder:
                go_back_to(run, folder.name)
            versions = {"fastgpt": fastgpt.__version__, "torch": torch.__version__}
            write_config(run, model_config, config, self.dataset.tokenizer, versions)
            self._metrics = Metrics(run, kept, tensorboard=config.tensorboard)
        self._train_on, self._gradients_on = self._as_graphs()
        if config.tf32 and (self.device.type != "cuda" or torch.cuda.get_device_capability(self.device) < (8, 0)):
            self._warn(f"tf32: {device_name(self.device)} makes no such products, so those of fp32 stay as they are")

    @property
    def tokens_per_s(self) -> float:
        """Training tokens per second, evaluations and checkpoints left out: the median over the log lines."""
        return statistics.median(self._speeds) if self._speeds else 0.0

    @property
    def mfu(self) -> float | None:
        """The model's FLOPs per second, in the last stretch, over the GPUs' peak; None where nobody states one."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        peak = peak_flops(gpu, self._dtype_name)
        if peak is None or not self._speeds or not isinstance(self.model, GPT):
            return None
        return self._speeds[-1] * self.model.flops_per_token() / (peak * self.world.size)

    @property
    def _dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def describe(self) -> str:
        """One line: the model, where it runs, and on what data."""
        with self.backend:
            backends = {row["backend"] or "nothing" for row in dispatch.explain(self.device.type, self.dtype)}
        train, val, vocab = len(self.dataset.train), len(self.dataset.val), self.dataset.tokenizer.vocab_size
        kind = "GPT" if isinstance(self.model, GPT) else "Bigram"  # FSDP gives the class another name
        return (
            f"{kind} of {self.model.num_params():,} parameters on {device_name(self.device)}, "
            f"{self._dtype_name}, ops on {' and '.join(sorted(backends))}, data {self.dataset.name}: "
            f"{train:,} tokens to train on, {val:,} to validate, vocabulary {vocab}"
        )

    def run_until_done(self) -> bool:
        """Train up to ``max_iters``. False if SIGINT or SIGTERM ended it before, after a checkpoint.

        Raises:
            TrainingError: the loss or a weight became NaN or infinite, or a checkpoint cannot be written; the one
                before stands.
        """
        config, state = self.config, self.state
        self._forward = self.world.replicate(self._forward, self.device)
        self._began = time.monotonic() - state.elapsed_s
        with (
            _let_go_after(self.run),
            self.backend,
            fp32_products(tf32=config.tf32),
            contextlib.closing(self._metrics) if self._metrics else contextlib.nullcontext(),
            self._stop_on_signal(),
            self._writer,
            _progress(self.console) as bar,
            self._profiling() as stepped,
        ):
            task = bar.add_task("training", total=config.max_iters, completed=state.step, speed="", loss="")
            if state.step == 0:
                self._evaluate(config.eval_iters)
            self._start_clock()
            ending = self.world.any(self._stop)
            while not ending:
                self._step()
                stepped()
                done = state.step == config.max_iters
                ending = self.world.any(done or self._stop)
                evaluating = done or state.step % config.eval_interval == 0
                saving = ending or state.step % (config.checkpoint_interval or config.eval_interval) == 0
                if evaluating or saving or state.step % config.log_interval == 0:
                    self._log(bar, task)
                best = evaluating and self._evaluate(config.final_eval_iters if done else config.eval_iters)
                if best or saving:
                    state.scaler = self.scaler.state_dict()
                    if self._metrics:
                        self._metrics.sync()
                    self._writer.save(state, self.model, self.optimizer, best)
                if evaluating or saving:
                    self._start_clock()
                self._writer.raise_if_failed()
                bar.update(task, completed=state.step)
        return state.step == config.max_iters

    def _step(self) -> None:
        """One step of the optimizer; its loss waits on the device for the next log line."""
        config, step = self.config, self.state.step
        self.world.seed(config.seed, step)
        batches = [self._batches[step * config.grad_accum + micro] for micro in self._share.micro_batches]
        x, y = (torch.stack([part[self._share.rows] for part in parts]) for parts in zip(*batches, strict=True))
        lr = torch.full((), learning_rate(step, config), dtype=torch.float32, device=self.device)
        if isinstance(self._train_on, Graphed):  # its replay runs none of _whole_step's Python
            self._writer.before_update()
        self._losses.append(self._train_on(x, y, lr))
        self.state.step += 1

    def _as_graphs(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """``_whole_step`` and ``_accumulate``, one of them as a CUDA graph where the run is to have one."""
        if not self.config.cuda_graph:
            return self._whole_step, self._accumulate
        if self.device.type != "cuda":
            self._warn(f"cuda_graph: there is no CUDA graph on {self.device}, so each step runs op by op")
            return self._whole_step, self._accumulate
        if self.world.size > 1:
            self._warn("cuda_graph: several processes have none, since each waits for the others: steps run op by op")
            return self._whole_step, self._accumulate
        if self.scaler.is_enabled():  # in fp16 the host asks, before the update, whether the gradients are finite
            return self._whole_step, Graphed(self._accumulate, self.device)
        return Graphed(self._whole_step, self.device), self._accumulate

    def _whole_step(self, x: Tensor, y: Tensor, lr: Tensor) -> Tensor:
        """One step of the optimizer as a function of tensors on the device: nothing in it comes from the host.

        Args:
            x, y: (micro batches, B, T), int64, tokens and the tokens that follow them: this process's share.
            lr: a scalar in fp32.
        Returns:
            The mean loss over the micro batches, a scalar in fp32.
        """
        loss = self._gradients_on(x, y)
        self._writer.before_update()
        self._update(lr)
        return loss

    def _accumulate(self, x: Tensor, y: Tensor) -> Tensor:
        """Forward and backward of each micro batch: gradients anew in the parameters, and the mean loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for index, (tokens, targets) in enumerate(zip(x, y, strict=True)):
            with distributed.gradient_sync(self._forward, wanted=index == len(x) - 1):
                with self._autocast:
                    _, loss = self._forward(tokens, targets)
                self.scaler.scale(loss / len(x)).backward()
            total += loss.detach() / len(x)
        return total

    def _update(self, lr: Tensor) -> None:
        """Clip the gradients and give them to the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.config.grad_clip > 0:
            self.scaler.unscale_(self.optimizer)
            distributed.clip_grad_norm_(gradients(self.model), self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _start_clock(self) -> None:
        self._clock = time.monotonic()

    def _log(self, bar: Progress, task: TaskID) -> None:
        """Read the losses since the last log line, and write their mean."""
        if not self._losses:
            return
        means = self.world.sum(torch.stack(self._losses)) / self.world.size
        losses = means.tolist()  # waits for the device: from here on the clock is right
        first = self.state.step - len(losses) + 1
        for step, loss in enumerate(losses, first):
            self._require_finite(loss, step)
        now = time.monotonic()
        self._speeds.append(len(losses) * self._tokens_per_step / max(now - self._clock, 1e-9))
        self._losses.clear()
        self._start_clock()
        batches = len(losses) * self.config.grad_accum
        self._write_metrics("train", statistics.fmean(losses), batches, evaluation=False)
        mfu = "" if self.mfu is None else f", MFU {self.mfu:.0%}"
        memory = f"{peak_memory(self.device) / 2**30:.2f} GiB"
        speed = f"{self._speeds[-1]:,.0f} tokens/s{mfu}, {memory}"
        bar.update(task, speed=speed, loss=f"loss {losses[-1]:.3f}")

    def _evaluate(self, batches: int) -> bool:
        """Average the loss over ``batches`` of each split. True if validation has never been better."""
        state = self.state
        state.train_loss = self._mean_loss("train", batches)
        state.val_loss = self._mean_loss("val", batches)
        best = state.best_val_loss is None or state.val_loss < state.best_val_loss
        if best and state.step > 0:  # before the first step there is nothing to keep
            state.best_val_loss = state.val_loss
        for split, loss in (("train", state.train_loss), ("val", state.val_loss)):
            self._write_metrics(split, loss, batches, evaluation=True)
        if self.world.is_main:
            plot_losses([self.run], self.run / "loss.png")
        speed = f", {self._speeds[-1]:,.0f} tokens/s" if self._speeds else ""
        self.console.print(f"step {state.step}: train {state.train_loss:.4f}, val {state.val_loss:.4f}{speed}")
        return best

    def _mean_loss(self, split: str, batches: int) -> float:
        loss = mean_loss(self._forward, self._eval_batches[split], batches, self._autocast, self.world)
        self._require_finite(loss, self.state.step)
        return loss

    def _require_finite(self, loss: float, step: int) -> None:
        if math.isfinite(loss):
            return
        self._writer.wait()  # one that is under way will stand
        self.world.any(False)  # no process speaks before the writing one is that far
        raise TrainingError(
            f"the loss became {loss} at step {step}, so the run was stopped; {what_stands(self.run)} "
            "(a lower --lr, a longer --warmup-iters or --dtype fp32 may help)"
        )

    def _write_metrics(self, split: str, loss: float, batches: int, *, evaluation: bool) -> None:
        self.state.elapsed_s = time.monotonic() - self._began
        if self._metrics is None:
            return
        self._metrics.write(
            step=self.state.step,
            split=split,
            evaluation=evaluation,
            loss=loss,
            lr=learning_rate(self.state.step, self.config),
            tokens=self.state.step * self._tokens_per_step,
            tokens_per_s=self._speeds[-1] if self._speeds else 0.0,
            mfu=self.mfu,
            peak_memory_bytes=peak_memory(self.device),
            elapsed_s=self.state.elapsed_s,
            batches=batches,
        )

    def _profiling(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        if not (self.config.profile and self.world.is_main):
            return contextlib.nullcontext(lambda: None)
        return traced(self.run / "trace.json", self.device, self._say)

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

    def _say_what_changed(self, begun: TrainConfig) -> None:
        """One line where the run goes on with other settings than it was ``begun`` with, unless they are _ASIDE."""
        before_and_now = [
            f"{name} {getattr(begun, name)!r} -> {getattr(self.config, name)!r}"
            for name in field_types(TrainConfig)
            if name not in _ASIDE and getattr(begun, name) != getattr(self.config, name)
        ]
        before, now = self.state.processes, self.world.size
        if before != now and getattr(self.model.config, "dropout", 0) > 0:  # each drops other elements
            before_and_now.append(f"processes {before} -> {now}")
        if before_and_now:
            self._warn(f"from step {self.state.step} on this is another run: {', '.join(before_and_now)}")

    def _say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False)

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
def mean_loss(
    model: Any, batches: Batches, count: int, autocast: torch.autocast, world: distributed.World = distributed.ALONE
) -> float:
    """The model's loss averaged over the first ``count`` batches, in evaluation mode and without gradients.

    The processes of ``world`` share the batches out, and the value is the same on any number of them. As sharded
    weights are gathered by all of them together, those with a batch less take one that is not counted.
    """
    model.eval()
    rounds = -(-count // world.size)
    losses = torch.zeros(rounds * world.size, device=batches.device)
    for index in range(world.rank, len(losses), world.size):
        x, y = batches[index]
        with autocast:
            losses[index] = model(x, y)[1]
    model.train()
    return world.sum(losses)[:count].double().mean().item()


def _with_vocabulary(model_config: ModelConfig, dataset: Dataset, keep: bool) -> ModelConfig:
    needed = dataset.tokenizer.vocab_size
    if not keep:
        return replace(model_config, vocab_size=needed)
    if model_config.vocab_size < needed:
        raise UserError(f"vocab_size must be at least {needed}, {dataset.name}'s, got {model_config.vocab_size}")
    return model_config


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
