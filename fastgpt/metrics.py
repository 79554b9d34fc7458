"""metrics.jsonl, one JSON object a line, and what is made of it: pictures, and TensorBoard's files.

Each line has
    step                steps of the optimizer so far
    split, loss         "train" or "val", and its loss, in nats per token
    evaluation          false: the mean over the steps since the line before; true: over an evaluation's batches
    batches             the number of batches that the loss is averaged over
    lr                  the learning rate of the next step
    tokens              tokens trained on so far, as many a step as now
    tokens_per_s        of training, evaluations and checkpoints left out; 0 before the first step
    mfu                 FLOPs of the model (GPT.flops_per_token) per second over the GPU's stated peak in this dtype
                        (fastgpt.devices); null where nobody states one, as for a CPU
    peak_memory_bytes   the most so far: of tensors on a GPU, or of the whole process on a CPU
    elapsed_s           seconds of training, evaluating and saving, over all starts of the run
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from fastgpt.config import UserError
from fastgpt.files import sync, write_atomically

Axis = Literal["step", "tokens", "time"]
_AXES = {"step": ("step", "step"), "tokens": ("tokens", "tokens"), "time": ("elapsed_s", "time (s)")}  # key, label
_PICTURES = ("png", "svg", "pdf")


class Metrics:
    """The metrics of a run folder, which begin with ``kept``: see ``metrics_until``.

    With ``tensorboard`` they also go into RUN/tensorboard, which takes TensorBoard's package.
    """

    def __init__(self, run: Path, kept: Sequence[dict[str, Any]] = (), *, tensorboard: bool = False) -> None:
        self._path = run / "metrics.jsonl"
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(run / "tensorboard", purge_step=kept[-1]["step"] + 1 if kept else 0)

    def write(self, **line: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._writer is None:
            return
        if line["evaluation"]:
            self._writer.add_scalar(f"evaluation/{line['split']}", line["loss"], line["step"])
            self._writer.flush()
            return
        for name in ("loss", "lr", "tokens_per_s", "mfu", "peak_memory_bytes"):
            if line[name] is not None:
                self._writer.add_scalar(f"training/{name}", line[name], line["step"])

    def sync(self) -> None:
        """Wait until the disk has every line: a checkpoint shall not be there without those before it."""
        sync(self._path)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without a last line that a kill cut short.

    Raises:
        UserError: no such file, or a line that is not a JSON object with a step, a split and a loss.
    """
    return list(_read_lines(run))


def metrics_until(run: Path, step: int) -> list[dict[str, Any]]:
    """The lines up to ``step``, from which the run goes on; none where there is no file, or ``step`` is -1.

    Raises:
        UserError: as ``read_metrics``; but what is damaged after a line of ``step`` is dropped with what follows it.
    """
    kept: list[dict[str, Any]] = []
    if step < 0 or not (run / "metrics.jsonl").exists():
        return kept
    try:
        for line in _read_lines(run):
            if line["step"] > step:
                break
            kept.append(line)
    except UserError:
        if not kept or kept[-1]["step"] < step:
            raise
    return kept


def _read_lines(run: Path) -> Iterator[dict[str, Any]]:
    path = run / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    whole, _, _ = text.rpartition("\n")
    for number, content in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(content)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is damaged: {error}") from error
        if not (
            isinstance(line, dict)
            and isinstance(line.get("step"), int)
            and isinstance(line.get("loss"), (int, float))
            and line.get("split") in ("train", "val")
        ):
            raise UserError(f"{path}: line {number} is damaged: it must hold a step, a split and a loss")
        yield line


def plot_losses(runs: Sequence[Path], out: Path, x: Axis = "step") -> None:
    """Draw the losses of runs, one colour a run, training thin and validation with dots.

    Args:
        runs: run folders.
        out: the picture: .png, .svg or .pdf.
        x: what the losses are drawn over: steps, tokens or seconds.
    Raises:
        UserError: another kind of picture, a run without metrics, or with lines that lack what is drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = out.suffix.removeprefix(".")
    if kind not in _PICTURES:
        raise UserError(f"{out}: the picture must be a .{', .'.join(_PICTURES[:-1])} or .{_PICTURES[-1]} file")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    key, label = _AXES[x]
    for number, run in enumerate(runs):
        name = "" if len(runs) == 1 else f"{_shortest_name(run, runs)}, "
        of_train, of_val = ("tab:blue", "tab:red") if len(runs) == 1 else (f"C{number % 10}",) * 2
        styles: dict[str, dict[str, Any]] = {
            "train": {"color": of_train, "alpha": 0.6},
            "val": {"color": of_val, "marker": "o", "markersize": 4},
        }
        for split, style in styles.items():
            losses = {line[key]: line["loss"] for line in _lines_to_draw(run, split, key)}
            if losses:
                axes.plot(list(losses), list(losses.values()), label=name + split, linewidth=1.2, **style)
    title = runs[0].resolve().name if len(runs) == 1 else ""
    axes.set(xlabel=label, ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=120)
    write_atomically(out, picture.getvalue())


def _lines_to_draw(run: Path, split: str, key: str) -> list[dict[str, Any]]:
    """The lines of a split; of training those of its steps: an evaluation is without dropout, and would be a dent."""
    lines = [line for line in read_metrics(run) if line["split"] == split]
    lines = [line for line in lines if split == "val" or not line.get("evaluation")]
    for line in lines:
        if not isinstance(line.get(key), (int, float)):
            raise UserError(f"{run / 'metrics.jsonl'}: the line of step {line['step']} has no {key}")
    return lines


def _shortest_name(run: Path, runs: Sequence[Path]) -> str:
    """The folder's name, or the path where another run's folder is called so too."""
    name = run.resolve().name
    return str(run) if [other.resolve().name for other in runs].count(name) > 1 else name
