"""The report's pictures, drawn by matplotlib. Each is as wide as a phone, so that its letters are read there too."""

from __future__ import annotations

import dataclasses
import io
import operator
import statistics
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from fastgpt.benchmarks.compare import competitor_of, is_ours
from fastgpt.benchmarks.harness import matmul_rate
from fastgpt.benchmarks.units import milliseconds, percent, quantity, round_quantity, times
from fastgpt.dispatch import BACKENDS

WIDTH_IN = 4.4
DPI = 192
CSS_DPI = 96  # by definition of the unit px

# Colours that the colour-blind tell apart (Okabe and Ito, 2008). Peers are grey in bars: their names stand beside them.
COLOURS = {"cpp": "#0072b2", "cuda": "#009e73", "triton": "#d55e00", "torch": "#cc79a7", "reference": "#56b4e9"}
KERNEL_BACKENDS = ("cpp", "cuda", "triton")
PEER_COLOURS = ("#333333", "#8c6d1f", "#7f7f7f", "#a05195", "#3f7f5f", "#b0b0b0")
PEER = "#a3a9b1"
WRONG = "#b00020"
INK, FAINT = "#1b1f24", "#d5d9de"

_MOST_BARS = 34  # of one picture; an op of more gets several
_BAR_IN = 0.165
_MAGNIFIED = tuple(first * 10**power for power in range(1, 5) for first in (1, 2, 5))


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure: ``name`` for its file, ``alt`` for who cannot see it, ``png``, and its size in CSS pixels."""

    name: str
    alt: str
    png: bytes
    width: int
    height: int


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


def op_bars(op: str, rows: Sequence[dict[str, Any]]) -> list[Picture]:
    """Bars of one op: for each case and part its competitors, the fastest first, by the fraction of the ceiling that
    they reach, with their median times. Bars too short to be seen are drawn longer, by a factor that is named.
    """
    sheets: list[list[dict[str, Any]]] = [[]]
    for row in rows:
        if sheets[-1] and sum(map(_lines, (*sheets[-1], row))) > _MOST_BARS:
            sheets.append([])
        sheets[-1].append(row)
    return [
        _op_sheet(op, sheet, f" ({number} of {len(sheets)})" if len(sheets) > 1 else "", number)
        for number, sheet in enumerate(sheets, 1)
    ]


def _best_reach(row: dict[str, Any]) -> float:
    return max((one["of_ceiling"] for one in row["competitors"].values()), default=1.0)


def _magnified(row: dict[str, Any]) -> int:
    """How many times as long a row's bars are drawn: those of small calls, far below any ceiling, would not be seen."""
    best = _best_reach(row)
    if best >= 0.1:
        return 1
    return next((factor for factor in _MAGNIFIED if factor * best >= 0.35), _MAGNIFIED[-1])


def _lines(row: dict[str, Any]) -> int:
    return 2 + len(row["competitors"]) + len(_to_name(row))


def _to_name(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Who is named though not timed: who is wrong, and any of our backends. A peer that cannot run is in a list."""
    return [
        (name, reason) for name, reason in row["left_out"].items() if name in BACKENDS or reason.startswith("wrong")
    ]


def _op_sheet(op: str, rows: Sequence[dict[str, Any]], suffix: str, number: int) -> Picture:
    height = sum(map(_lines, rows)) * _BAR_IN + 0.75
    figure, (axes,) = _figure(height)
    y, ticks, labels = 0.0, [], []
    limit = max([1.0, *(_magnified(row) * _best_reach(row) for row in rows)])
    for row in rows:
        magnified = _magnified(row)
        what = f"{row['case'].removeprefix(f'{op}, ')}, {row['part']}"
        what += "" if magnified == 1 else f" (bars x {magnified})"
        heading = axes.annotate(
            what,
            (0.012, y + 0.2),
            xycoords=("figure fraction", "data"),
            fontsize=7.5 if len(what) < 60 else 6.8,
            fontweight="bold",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
        heading.set_in_layout(False)
        y += 1
        for name, one in sorted(row["competitors"].items(), key=lambda item: item[1]["median_ms"]):
            reached = magnified * one["of_ceiling"]
            axes.barh(y, reached, height=0.72, color=_bar_colour(name, one["ours"]))
            least, most = (magnified * row["floor_ms"] / one[f"{which}_ms"] for which in ("max", "min"))
            most = min(most, 1.12 * limit)
            axes.plot([least, most], [y, y], color=INK, linewidth=0.8, alpha=0.55)
            axes.text(max(reached, most) + 0.015 * limit, y, milliseconds(one["median_ms"]), fontsize=7, va="center")
            ticks.append(y)
            labels.append((name, INK if one["ours"] else "#5d656f", one["ours"]))
            y += 1
        for name, reason in _to_name(row):
            wrong = reason.startswith("wrong")
            colour = WRONG if wrong else "#5d656f"
            axes.text(
                0.01 * limit, y, "wrong: not timed" if wrong else "not timed", fontsize=7, color=colour, va="center"
            )
            ticks.append(y)
            labels.append((name, colour, False))
            y += 1
        y += 1
    axes.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.set(xlim=(0, 1.3 * limit), ylim=(y - 0.6, -0.7), xlabel="of what the machine's ceiling allows")
    axes.set_yticks(ticks, [label for label, _, _ in labels])
    for tick, (_, colour, bold) in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set(color=colour, fontweight="bold" if bold else "normal", fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title(f"{op}{suffix}", loc="left", fontsize=9.5, fontweight="bold")
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    alt = f"{op}{suffix}: " + "; ".join(_in_words(row) for row in rows)
    return _picture(figure, f"{op}-{number}", alt)


def _in_words(row: dict[str, Any]) -> str:
    if not row["competitors"]:
        return f"{row['case']}, {row['part']}: nobody timed"
    name, one = min(row["competitors"].items(), key=lambda item: item[1]["median_ms"])
    return (
        f"{row['case']}, {row['part']}: fastest {name}, {milliseconds(one['median_ms'])}, {percent(one['of_ceiling'])} "
        "of the ceiling"
    )


def ratio_bars(summary: Sequence[dict[str, Any]], title: str) -> Picture:
    """By op, how many times as fast as the best peer each of our backends is: bars of medians over the cases, with the
    least and the greatest.

    Args:
        summary: what ``summary.summarise`` gives, by op.
    """
    figure, (axes,) = _figure(_ratio_height(summary))
    _draw_ratios(axes, summary, title)
    words = "; ".join(f"{line['op']}, {line['backend']} {times(line['ratio']['median'])}" for line in summary)
    return _picture(figure, "ratios", f"Times as fast as the best peer. {words}")


def overview(panels: Sequence[tuple[str, Sequence[dict[str, Any]]]], source: str) -> bytes:
    """The README's figure, as a PNG: ``ratio_bars`` of several runs side by side, by title.

    Args:
        source: is kept in the file, as text by the name of "Source".
    """
    figure, grid = _figure(max(_ratio_height(summary) for _, summary in panels), len(panels))
    for axes, (title, summary) in zip(grid, panels, strict=True):
        _draw_ratios(axes, summary, textwrap.fill(title, 34))
    return _png(figure, source)


def _ratio_height(summary: Sequence[dict[str, Any]]) -> float:
    return 0.9 + 0.175 * (len(summary) + 0.5 * len({line["op"] for line in summary}))


def _draw_ratios(axes: Any, summary: Sequence[dict[str, Any]], title: str) -> None:
    y, ticks, labels = 0.0, [], []
    for op in dict.fromkeys(line["op"] for line in summary):
        for line in summary:
            if line["op"] != op:
                continue
            ratio = line["ratio"]
            axes.barh(y, ratio["median"] - 1, left=1, height=0.8, color=_bar_colour(line["backend"], True))
            axes.plot([ratio["min"], ratio["max"]], [y, y], color=INK, linewidth=0.8, alpha=0.6)
            axes.text(1.06 * max(ratio["max"], 1), y, times(ratio["median"]), fontsize=7, va="center")
            ticks.append(y)
            labels.append(f"{op}, {line['backend']}")
            y += 1
        y += 0.5
    least, most = min(line["ratio"]["min"] for line in summary), max(line["ratio"]["max"] for line in summary)
    limits = min(0.8, 0.9 * least), max(1.5, 1.3 * most)
    axes.set_xscale("log")
    axes.set(xlim=limits, ylim=(y - 0.8, -0.8), xlabel="times as fast as the best peer")
    _plain_log_ticks(axes.xaxis, "x", limits)
    axes.set_yticks(ticks, labels, fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color=INK, linewidth=0.9)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")


def bandwidth(rows: Sequence[dict[str, Any]], ceiling: dict[str, Any]) -> Picture | None:
    """Bytes a second against the bytes of the case, of what has no matrix product, under the ceiling of a copy."""
    points = _best_points([row for row in rows if not row["flops"]], "bytes", lambda row: row["bytes"])
    if not points:
        return None
    figure, (axes,) = _figure(3.3)
    _scatter(axes, points)
    top = ceiling["copy_bytes_per_s"]
    axes.axhline(top, color=INK, linewidth=1.1)
    axes.set(xscale="log", yscale="log", xlabel="bytes that must be moved", ylabel="bytes a second")
    _name_units(axes, "B", "B/s")
    title = f"Ops without matrix products: a copy's {quantity(top, 'B/s')}"
    _finish(axes, title)
    return _picture(figure, "bandwidth", f"{title}; bytes a second by the bytes that must be moved.")


def rooflines(rows: Sequence[dict[str, Any]], ceiling: dict[str, Any]) -> list[Picture]:
    """For each dtype: FLOPs a second against FLOPs a byte, of what has matrix products, under the roof of copy and
    matrix product."""
    pictures = []
    copy = ceiling["copy_bytes_per_s"]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        points = _best_points(
            [row for row in rows if row["flops"] and row["dtype"] == dtype],
            "flops",
            lambda row: row["flops"] / row["bytes"],
        )
        if not points:
            continue
        peak = matmul_rate(ceiling, dtype)
        figure, (axes,) = _figure(3.3)
        _scatter(axes, points)
        xs = [peak / copy, *(x for x, _, _ in points)]
        left, right = min(xs) / 3, max(xs) * 3
        axes.plot([left, peak / copy, right], [left * copy, peak, peak], color=INK, linewidth=1.1)
        axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="FLOPs a byte", ylabel="FLOPs a second")
        _name_units(axes, "", "FLOP/s")
        title = f"Roofline, {dtype}: {quantity(peak, 'FLOP/s')}, {quantity(copy, 'B/s')}"
        _finish(axes, title)
        pictures.append(_picture(figure, f"roofline-{dtype}", f"{title}; FLOPs a second by FLOPs a byte."))
    return pictures


Point = tuple[float, float, str]


def _best_points(rows: Sequence[dict[str, Any]], unit: str, x: Callable[[dict[str, Any]], float]) -> list[Point]:
    """A point for each of our backends, and one for the fastest peer, in each row."""
    points = []
    for row in rows:
        peers = [one for one in row["competitors"].values() if not one["ours"]]
        if peers:
            points.append((x(row), min(peers, key=lambda one: one["median_ms"])[f"{unit}_per_s"], "best peer"))
        points += [(x(row), one[f"{unit}_per_s"], name) for name, one in row["competitors"].items() if one["ours"]]
    return points


def _scatter(axes: Any, points: Sequence[Point]) -> None:
    for name in ("best peer", *BACKENDS):
        of_one = [(x, y) for x, y, whose in points if whose == name]
        if of_one:
            ours = name != "best peer"
            axes.scatter(
                *zip(*of_one, strict=True),
                s=20 if ours else 26,
                color=COLOURS[name] if ours else "none",
                edgecolor="white" if ours else "#5d656f",
                linewidth=0.5 if ours else 1.1,
                marker="o" if ours else "s",
                label=name,
                zorder=3 if ours else 2,
            )


# ---------------------------------------------------------------------------------------------------------------------
# Training and generation
# ---------------------------------------------------------------------------------------------------------------------


def scaling_lines(rows: Sequence[dict[str, Any]]) -> list[Picture]:
    """For each dtype: tokens a second and peak memory against parameters, each size at the setting it was run at most;
    where a size was run at several, tokens a second against sequence length and against batch."""
    pictures = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        ladder = [row for row in of_dtype if _setting(row) == usual_setting(of_dtype, row["model"]["name"])]
        if len({row["model"]["parameters"] for row in ladder}) > 1:
            pictures += [
                _lines_picture(
                    ladder,
                    lambda row: row["model"]["parameters"],
                    lambda row: row["tokens_per_s"]["median"],
                    ("", ""),
                    (f"training-{dtype}", f"Training, {dtype}", "parameters", "tokens a second"),
                ),
                _lines_picture(
                    ladder,
                    lambda row: row["model"]["parameters"],
                    lambda row: row["peak_memory_bytes"],
                    ("", "B"),
                    (f"memory-{dtype}", f"Peak memory of training, {dtype}", "parameters", "bytes"),
                ),
            ]
        for name in dict.fromkeys(row["model"]["name"] for row in of_dtype):
            of_model = [row for row in of_dtype if row["model"]["name"] == name]
            block_size, _ = usual = usual_setting(of_dtype, name)
            lengths = [row for row in of_model if row["block_size"] != block_size or _setting(row) == usual]
            batches = [row for row in of_model if row["block_size"] == block_size]
            for field, words, sweep in (("block_size", "sequence length", lengths), ("batch_size", "batch", batches)):
                if len({row[field] for row in sweep}) > 1:
                    pictures.append(
                        _lines_picture(
                            sweep,
                            operator.itemgetter(field),
                            lambda row: row["tokens_per_s"]["median"],
                            ("", ""),
                            (f"{field}-{name}-{dtype}", f"Training {name}, {dtype}", words, "tokens a second"),
                        )
                    )
    return pictures


def _setting(row: dict[str, Any]) -> tuple[int, int]:
    return row["block_size"], row["batch_size"]


def usual_setting(rows: Sequence[dict[str, Any]], model: str) -> tuple[int, int]:
    """The block and batch size of most of a model's rows; of two alike the one that came first."""
    return statistics.mode(_setting(row) for row in rows if row["model"]["name"] == model)


def step_split(rows: Sequence[dict[str, Any]]) -> Picture:
    """Where a step's time goes, of rows that trained the same model on the same batches."""
    figure, (axes,) = _figure(1.25 + 0.24 * len(rows))
    parts = ("forward", "backward", "optimizer", "data")
    colours = ("#0072b2", "#56b4e9", "#e69f00", "#a3a9b1")
    rows = sorted(rows, key=lambda row: row["step_ms"]["median"])
    for y, row in enumerate(rows):
        left = 0.0
        for part, colour in zip(parts, colours, strict=True):
            axes.barh(y, row["split_ms"][part], left=left, height=0.7, color=colour, label=part if y == 0 else None)
            left += row["split_ms"][part]
        axes.text(left * 1.01, y, f" {milliseconds(row['step_ms']['median'])}", fontsize=7, va="center")
    longest = max(sum(row["split_ms"].values()) for row in rows)
    axes.set(xlim=(0, 1.25 * longest), ylim=(len(rows) - 0.4, -0.6), xlabel="ms a step")
    axes.set_yticks(range(len(rows)), [f"{competitor_of(row)}, {row['dtype']}" for row in rows], fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower left", ncols=4, fontsize=7.5, frameon=False, handlelength=1, columnspacing=1.2)
    name = rows[0]["model"]["name"]
    axes.set_title(f"A step of {name}", loc="left", fontsize=9.5, fontweight="bold")
    words = "; ".join(f"{competitor_of(row)}, {row['dtype']}: {milliseconds(row['step_ms']['median'])}" for row in rows)
    return _picture(figure, f"step-{name}", f"Where a training step of {name} spends its time. {words}")


def generation_lines(rows: Sequence[dict[str, Any]]) -> list[Picture]:
    """For each model, dtype and context: tokens a second against the batch; and, where there are several contexts,
    against the context at the smallest batch."""
    pictures = []
    for name, dtype in dict.fromkeys((row["model"]["name"], row["dtype"]) for row in rows):
        of_one = [row for row in rows if row["model"]["name"] == name and row["dtype"] == dtype]
        for context in sorted({row["context"] for row in of_one}):
            pictures.append(
                _lines_picture(
                    [row for row in of_one if row["context"] == context],
                    lambda row: row["batch_size"],
                    lambda row: row["tokens_per_s"]["median"],
                    ("", ""),
                    (
                        f"generate-{name}-{dtype}-{context}",
                        f"Generation, {name}, {dtype}, after {context} tokens",
                        "batch",
                        "tokens a second",
                    ),
                )
            )
    return pictures


def _lines_picture(
    rows: Sequence[dict[str, Any]],
    x: Callable[[dict[str, Any]], float],
    y: Callable[[dict[str, Any]], float],
    units: tuple[str, str],
    words: tuple[str, str, str, str],
) -> Picture:
    """A line for each competitor, dashed where it is compiled or has no cache, on two logarithmic axes.

    Args:
        words: the file's name, the title, and what stands at the axes.
    """
    figure, (axes,) = _figure(3.4)
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(competitor_of(row), []).append(row)
    peers = iter(PEER_COLOURS * len(lines))
    colours: dict[str, str] = {}
    for name, of_one in lines.items():
        first = of_one[0]
        colour = colours.setdefault(
            first["competitor"], COLOURS[first["competitor"]] if is_ours(first) else next(peers)
        )
        of_one = sorted(of_one, key=x)
        axes.plot(
            [x(row) for row in of_one],
            [y(row) for row in of_one],
            color=colour,
            linestyle="-" if first.get("mode", "eager") == "eager" else "--",
            marker="o" if is_ours(first) else "s",
            markersize=4,
            linewidth=1.4,
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel=words[2], ylabel=words[3])
    _name_units(axes, *units)
    measured = sorted({x(row) for row in rows})
    if measured[-1] < 1e5:  # a length or a batch, whose values are round ones
        axes.set_xticks(measured, [f"{value:g}" for value in measured])
    _finish(axes, words[1])
    return _picture(
        figure, words[0], f"{words[1]}: {words[3]} against {words[2]}, a line for each of {', '.join(lines)}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Two runs
# ---------------------------------------------------------------------------------------------------------------------


def change_dots(pairs: Sequence[tuple[str, bool, float]], title: str) -> Picture:
    """A dot for each time of two runs, by op: how many times as long it takes in the second.

    Args:
        pairs: op, whether it is ours, the second run's time over the first's.
    """
    ops = list(dict.fromkeys(op for op, _, _ in pairs))
    figure, (axes,) = _figure(1.3 + 0.24 * len(ops))
    for ours, colour, offset, label in ((True, COLOURS["cpp"], -0.14, "ours"), (False, "#7f7f7f", 0.16, "peers")):
        of_one = [(ratio, ops.index(op) + offset) for op, whose, ratio in pairs if whose == ours]
        if of_one:
            axes.scatter(*zip(*of_one, strict=True), s=13, color=colour, alpha=0.65, linewidth=0, label=label)
    axes.set_xscale("log")
    ratios = [ratio for _, _, ratio in pairs]
    limits = min(0.8, 0.9 * min(ratios)), max(1.25, 1.1 * max(ratios))
    axes.set(xlim=limits, ylim=(len(ops) - 0.4, -0.6))
    axes.set_xlabel("times as long as in the first")
    _plain_log_ticks(axes.xaxis, "x", limits)
    axes.set_yticks(range(len(ops)), ops, fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color=INK, linewidth=0.9)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower left", ncols=2, fontsize=7.5, frameon=False)
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
    middle = statistics.median(ratios)
    return _picture(
        figure, "change", f"{title}: times of the second run over the first's, by op; median {times(middle)}."
    )


# ---------------------------------------------------------------------------------------------------------------------


def _figure(height: float, panels: int = 1) -> tuple[Any, Sequence[Any]]:
    """A figure ``height`` inches high, and the axes of its panels, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(panels * WIDTH_IN, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, panels, squeeze=False)[0]
    for axes in grid:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color("#8b949e")
        axes.tick_params(labelsize=7.5, color="#8b949e")
        axes.xaxis.label.set_fontsize(8)
        axes.yaxis.label.set_fontsize(8)
    return figure, grid


def _finish(axes: Any, title: str) -> None:
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
    axes.figure.legend(
        loc="outside lower left", ncols=3, fontsize=7.5, frameon=False, handlelength=1.8, columnspacing=1.2
    )


def _name_units(axes: Any, x: str, y: str) -> None:
    """Ticks as 10 GB/s, 1M; marks between them have no labels unless there would be fewer than two."""
    for axis, unit, values in ((axes.xaxis, x, axes.get_xlim()), (axes.yaxis, y, axes.get_ylim())):
        _plain_log_ticks(axis, unit, values)


def _plain_log_ticks(axis: Any, unit: str, limits: tuple[float, float]) -> None:
    """Label a logarithmic axis in plain figures: at powers of ten, or more closely where few of them are in sight."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

    reach = limits[1] / limits[0]
    subs = (1.0,) if reach > 300 else (1.0, 3.0) if reach > 30 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12) if reach > 4 else MaxNLocator(6))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(lambda value, _: f"{value:g}x" if unit == "x" else round_quantity(value, unit))


def _bar_colour(name: str, ours: bool) -> str:
    return COLOURS[name] if ours else PEER


def _picture(figure: Any, name: str, alt: str) -> Picture:
    width, height = (round(inches * CSS_DPI) for inches in figure.get_size_inches())
    return Picture(_file_name(name), alt, _png(figure), width, height)


def _png(figure: Any, source: str = "") -> bytes:
    from PIL import Image, PngImagePlugin  # matplotlib brings it

    drawn, content = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    about = PngImagePlugin.PngInfo()
    if source:
        about.add_text("Source", source)
    # A palette does for these few colours, in a third of the bytes.
    few = Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    few.save(content, "png", optimize=True, pnginfo=about)
    return content.getvalue()


def _file_name(name: str) -> str:
    kept = (letter if letter.isalnum() or letter in "-." else "-" for letter in name.lower())
    return "".join(kept).strip("-")
