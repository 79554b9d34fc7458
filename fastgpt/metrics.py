"""metrics.jsonl, one JSON object a line, and the picture of it.

Each line has "step", "split" ("train" or "val"), "loss", "lr", "tokens_per_s", "elapsed_s" and "batches", the number of
batches that the loss is averaged over.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from fastgpt.config import UserError
from fastgpt.files import write_atomically


class Metrics:
    """The metrics of a run folder. A line of a step after ``step`` is dropped: the run goes on from there."""

    def __init__(self, run: Path, step: int) -> None:
        self._path = run / "metrics.jsonl"
        kept = [line for line in read_metrics(run) if line["step"] <= step] if self._path.exists() else []
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, **line: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without a last line that a kill cut short.

    Raises:
        UserError: no such file, or a line that is not a JSON object.
    """
    path = run / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    whole, _, _ = text.rpartition("\n")
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}: line {number} is damaged: {error}") from error
        if not (
            isinstance(lines[-1], dict)
            and isinstance(lines[-1].get("step"), int)
            and isinstance(lines[-1].get("loss"), (int, float))
            and lines[-1].get("split") in ("train", "val")
        ):
            raise UserError(f"{path}: line {number} is damaged: it must hold a step, a split and a loss")
    return lines


def plot_losses(run: Path) -> None:
    """Draw the run's losses into loss.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines = read_metrics(run)
    for split, style in (("train", {"color": "tab:blue", "alpha": 0.6}), ("val", {"color": "tab:red", "marker": "o"})):
        losses = {line["step"]: line["loss"] for line in lines if line["split"] == split}
        if losses:
            axes.plot(list(losses), list(losses.values()), label=split, markersize=4, linewidth=1.2, **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.resolve().name)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(run / "loss.png", picture.getvalue())
