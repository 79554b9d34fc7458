"""What a climb shows: a table, a line for each promise, what is wrong, and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastgpt.benchmarks.units import digits, percent, quantity
from lessons.kernels.climb import Outcome, language

WIDTH = 180  # of a table that is written to a file


def table(outcomes: Sequence[Outcome]) -> Table:
    """A column for each rung, and a line for each counter that is not zero everywhere, and for the times of a GPU."""
    result = Table(title=_title(outcomes), title_justify="left", pad_edge=False)
    result.add_column("", no_wrap=True)
    for outcome in outcomes:
        result.add_column(outcome.rung.stem, justify="right")
    result.add_row("result", *(Text("right", "green") if one.right else Text("wrong", "bold red") for one in outcomes))
    for name in _names(outcomes):
        values = [{**one.counts, **one.times}.get(name) for one in outcomes]
        result.add_row(name, *("" if value is None else _number(name, value) for value in values))
    result.add_row("promises kept", *(_promises(one) for one in outcomes))
    return result


def _promises(outcome: Outcome) -> str:
    """How many were kept; nothing where none could be judged."""
    if outcome.rung.header.promises and not outcome.promises:
        return ""
    return f"{sum(outcome.promises.values())} of {len(outcome.promises)}"


def _names(outcomes: Sequence[Outcome]) -> list[str]:
    all_values = [{**outcome.counts, **outcome.times} for outcome in outcomes]
    names = dict.fromkeys(name for values in all_values for name in values)
    return [name for name in names if any(values.get(name) for values in all_values)]


def _title(outcomes: Sequence[Outcome]) -> str:
    rung = outcomes[0].rung
    sizes = " ".join(f"{name}={n}" for name, n in language(rung.language).counted_sizes(rung.task).items())
    return f"{rung.task.name}, {rung.language}, counted at {sizes}"


def _number(name: str, value: float) -> str:
    if name.startswith("bytes "):
        return quantity(value, "B")
    if name == "of roofline":
        return percent(value)
    return f"{value:,.0f}" if value == int(value) else digits(value)


def details(outcome: Outcome) -> list[str]:
    """What is wrong with a rung, and each of its promises."""
    lines = []
    if outcome.error is not None:
        lines.append(f"wrong: {outcome.error}")
    lines += [f"wrong at {problem}: {wrong}" for problem, wrong in outcome.wrong]
    for promise, kept in outcome.promises.items():
        lines.append(
            f"{'kept' if kept else 'BROKEN'}: {promise} (it is {_number('', outcome.counts[promise.counter])})"
        )
    if outcome.uncounted is not None:
        lines.append(f"not counted: {outcome.uncounted}")
    if outcome.missing is not None:
        lines.append(outcome.missing)
    return lines


def report(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print the tables, one for each task, and then what there is to say of each rung."""
    for task in dict.fromkeys(outcome.rung.task.name for outcome in outcomes):
        console.print(table([outcome for outcome in outcomes if outcome.rung.task.name == task]))
    for outcome in outcomes:
        console.print(Text(f"{outcome.rung.stem}: {outcome.rung.header.title}", "bold"), soft_wrap=True)
        for line in details(outcome):
            console.print(Text(f"  {line}"), soft_wrap=True)
    console.print()


def console() -> Console:
    """The terminal, or a file with lines as long as a table needs."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=WIDTH)


def figure(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw the climb: for each task and language, bars of what falls from rung to rung, and of the time on a GPU.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.rung.task.name, outcome.rung.language), []).append(outcome)
    panels = [(members, name) for members in groups.values() for name in _shown(members)]
    columns = 3
    rows = max(1, -(-len(panels) // columns))
    sheet = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    axes = sheet.subplots(rows, columns, squeeze=False).flatten()
    for axis, (members, name) in zip(axes, panels, strict=False):
        heights = [{**outcome.counts, **outcome.times}.get(name, 0.0) for outcome in members]
        colours = ["#009e73" if outcome.right else "#b00020" for outcome in members]
        axis.bar(range(len(members)), heights, color=colours)
        axis.set_xticks(range(len(members)), [outcome.rung.stem for outcome in members], rotation=40, ha="right")
        axis.set_title(f"{members[0].rung.task.name}, {members[0].rung.language}: {name}", fontsize="medium")
        axis.tick_params(labelsize="small")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, dpi=150)


def _shown(members: Sequence[Outcome]) -> list[str]:
    """The counters of a ladder that the figure shows: those that are not zero everywhere."""
    names = (*language(members[0].rung.language).CLIMBED, "ms", "of roofline")
    return [name for name in names if any({**one.counts, **one.times}.get(name) for one in members)]
