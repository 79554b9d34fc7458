"""The page that shows result files: one HTML file with everything in it, and its pictures as PNG files beside it.

`fastgpt bench report RESULT.json... --out FILE`. The frame, its style and its script are `page.html`. Nothing is loaded
from anywhere; without JavaScript only sorting and filtering are lost.
"""

from __future__ import annotations

import base64
import dataclasses
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from fastgpt.benchmarks import figures, result
from fastgpt.benchmarks.compare import (
    Timing,
    compare,
    competitor_of,
    is_ours,
    other_machine,
    task_of,
    timings,
)
from fastgpt.benchmarks.figures import Picture
from fastgpt.benchmarks.machine import QUIET_CORES
from fastgpt.benchmarks.summary import best_peer, device_of, summarise
from fastgpt.benchmarks.units import digits, percent, quantity, times
from fastgpt.config import UserError
from fastgpt.files import write_atomically

_PAGE = Path(__file__).with_name("page.html")
_TITLE = "fastgpt benchmarks"

_KINDS = {
    "kernels": "Kernels",
    "scaling": "Training",
    "generate": "Generation",
    "test": "Tests",
    "sanitize": "Sanitizer",
}

_HOW_TO_READ = (
    "Times are medians over rounds in which all competitors take turns; ratios are taken within a round, and above 1 "
    "ours is faster. The ceiling is what a plain copy, or a large matrix product, reached on the same machine in the "
    "same run. Nothing is timed whose results were not found right before."
)


class Run(NamedTuple):
    """A result file: its content, and what tells it from the page's others of its kind."""

    data: dict[str, Any]
    label: str


class Cell(NamedTuple):
    """Of a table: what is read, and the number by which it is sorted, None for text."""

    text: str
    value: float | None = None


def write_report(paths: Sequence[Path], out: Path) -> list[Path]:
    """Write the page of these result files to ``out``, and its pictures into a folder beside it.

    Pictures of the page that was there before, and of no other, are removed where this one has none of their name.

    Returns:
        What was written, the page first.
    Raises:
        UserError: a file is not a result file, or is given twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a result file is named twice")
    page, pictures = render([result.load(path) for path in paths])
    folder = out.with_name(f"{out.stem}_figures")
    files = {folder / f"{picture.name}.png": picture.png for picture in pictures}
    former = [folder / f"{name}.png" for name in _pictures_of(out)]
    for path, png in files.items():
        write_atomically(path, png)
    write_atomically(out, page.encode())
    for path in former:
        if path not in files:
            path.unlink(missing_ok=True)
    return [out, *files]


def _pictures_of(page: Path) -> list[str]:
    """The names of the pictures in a page of ours; none where there is no such page."""
    text = page.read_text(encoding="utf-8", errors="replace") if page.exists() else ""
    return re.findall(r'<figure id="([\w.-]+)">', text) if f"<title>{_TITLE}</title>" in text else []


def render(files: Sequence[dict[str, Any]]) -> tuple[str, list[Picture]]:
    """The page's HTML and its pictures, of result files' contents."""
    runs = label_runs(files)
    page = _Page()
    page.section("Runs", '<div class="runs">' + "".join(map(_run_card, runs)) + "</div>")
    for kind, show in _SECTIONS.items():
        of_kind = [run for run in runs if run.data["kind"] == kind]
        for other in of_kind[1:]:
            page.section(f"{_KINDS[kind]}, side by side", _side_by_side(page, of_kind[0], other))
        for run in of_kind:
            title = f"{_KINDS[kind]}: {run.label}" if len(of_kind) > 1 else _KINDS[kind]
            page.section(title, show(page, run.data))
    return page.html(), page.pictures


def label_runs(files: Sequence[dict[str, Any]]) -> list[Run]:
    """Name each file by its machine; where files of one kind share that, by the commit too, or also by the date."""
    steps: tuple[Callable[[dict[str, Any]], tuple[str, ...]], ...] = (
        lambda data: (device_of(data),),
        lambda data: (device_of(data), _commit(data)),
        lambda data: (device_of(data), _commit(data), _date(data)),
    )
    runs = []
    for data in files:
        others = [other for other in files if other["kind"] == data["kind"] and other is not data]
        words = next((of(data) for of in steps if of(data) not in map(of, others)), steps[-1](data))
        runs.append(Run(data, ", ".join(words)))
    return runs


class _Page:
    """Sections as they are added; pictures get names of their own."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []
        self._sections: list[tuple[str, str]] = []
        self._tables = 0

    def section(self, title: str, content: str) -> None:
        self._sections.append((title, content))

    def figures(self, pictures: Iterable[Picture | None]) -> str:
        """The pictures in columns; each keeps its alternative text, and its letters at every width."""
        return '<div class="figures">' + "".join(self._figure(p) for p in pictures if p is not None) + "</div>"

    def _figure(self, picture: Picture) -> str:
        names = {other.name for other in self.pictures}
        numbered = (picture.name, *(f"{picture.name}-{number}" for number in range(2, len(names) + 3)))
        picture = dataclasses.replace(picture, name=next(name for name in numbered if name not in names))
        self.pictures.append(picture)
        data = base64.b64encode(picture.png).decode()
        return (
            f'<figure id="{escape(picture.name)}"><img alt="{escape(picture.alt)}" width="{picture.width}" '
            f'height="{picture.height}" src="data:image/png;base64,{data}"></figure>'
        )

    def table(
        self,
        headings: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        *,
        ours: Callable[[int], bool] = lambda index: False,
        filter: bool = False,
    ) -> str:
        """A table that sorts by a click on a heading.

        Args:
            ours: says by a row's index whether it is to be marked as ours.
            filter: put a field above it that hides rows without the words that are typed.
        """
        self._tables += 1
        name = f"table-{self._tables}"
        numbers = {i for i in range(len(headings)) if any(row[i].value is not None for row in rows)}
        kinds = {
            i: "number" if i in numbers else "task" if headings[i] == "task" else None for i in range(len(headings))
        }
        head = "".join(
            f'<th scope="col"{_class(kinds[i])}><button type="button">{escape(heading)}</button></th>'
            for i, heading in enumerate(headings)
        )
        body = "".join(
            f"<tr{_class('ours' if ours(index) else None)}>"
            + "".join(
                f"<td{_class(kinds[i])}"
                + ("" if cell.value is None else f' data-value="{cell.value:.6g}"')
                + f">{escape(cell.text)}</td>"
                for i, cell in enumerate(row)
            )
            + "</tr>\n"
            for index, row in enumerate(rows)
        )
        field = (
            f'<div class="filter"><label>Show rows with <input type="search" data-table="{name}" '
            f'placeholder="e.g. cpp bf16"></label> <output></output></div>'
            if filter
            else ""
        )
        return (
            f'{field}<div class="scroll" tabindex="0"><table class="sortable" id="{name}">'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
        )

    def html(self) -> str:
        links = "".join(f'<a href="#section-{i}">{escape(title)}</a>' for i, (title, _) in enumerate(self._sections))
        body = "".join(
            f'<section><h2 id="section-{i}">{escape(title)}</h2>\n{content}</section>\n'
            for i, (title, content) in enumerate(self._sections)
        )
        template = string.Template(_PAGE.read_text(encoding="utf-8"))
        return template.substitute(title=_TITLE, body=f"<p>{_HOW_TO_READ}</p><nav>{links}</nav>\n{body}")


# ---------------------------------------------------------------------------------------------------------------------
# What each section holds
# ---------------------------------------------------------------------------------------------------------------------


def _run_card(run: Run) -> str:
    """What a run's figures depend on, what was not there, and whether the run is to be relied on."""
    data = run.data
    machine, versions = data["machine"], data["versions"]
    lines = {
        "CPU": f"{machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB",
        "OS": machine["os"],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None),
        "commit": data["commit"] or "unknown",
        "date": _date(data),
        "settings": _settings(data["settings"]),
    }
    if machine["gpu"]:
        memory = f", {machine['gpu_memory_bytes'] / 2**30:.0f} GiB" if machine["gpu_memory_bytes"] else ""
        lines = {"GPU": f"{machine['gpu']}{memory}, driver {machine['driver'] or 'unknown'}", **lines}
    if data["ceilings"]["before"]:
        lines["ceilings"] = _ceilings(data["ceilings"])
    if data.get("others_cores") is not None:
        busy = ", too much to rely on the times" if data["others_cores"] > QUIET_CORES else ""
        lines["other programs"] = f"took {data['others_cores']:.2f} of {machine['cores']} cores meanwhile{busy}"
    if data["kind"] == "test":
        counts = (f"{sum(row[name] for row in data['results'])} {name}" for name in ("passed", "failed", "skipped"))
        lines["tests"] = ", ".join(counts)
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in lines.items())
    state = '<span class="good">valid</span>' if data["valid"] else '<span class="bad">not valid</span>'
    whole = "" if data["complete"] else ', <span class="bad">not complete</span>'
    return (
        f'<article class="run"><h3>{escape(_KINDS[data["kind"]])}: {escape(run.label)}</h3>\n<p>{state}{whole}</p>'
        + _reasons("Problems", [("", problem) for problem in data["problems"]])
        + f"<dl>{terms}</dl>"
        + _reasons("Not timed", list(data["absent"].items()))
        + "</article>\n"
    )


def _settings(settings: dict[str, Any]) -> str:
    """In words; what is empty was not asked for."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    words = (
        f"{name} {', '.join(map(str, values))}" for name, values in lists.items() if values not in ([], [None], [""])
    )
    return "; ".join(words) or "none"


def _ceilings(ceilings: dict[str, Any]) -> str:
    before, after = ceilings["before"], ceilings["after"]

    def one(name: str, unit: str, value: Callable[[dict[str, Any]], float]) -> str:
        drift = f" ({value(after) / value(before) - 1:+.1%} after)" if after else ""
        return f"{name} {quantity(value(before), unit)}{drift}"

    def rate_of(dtype: str) -> Callable[[dict[str, Any]], float]:
        return lambda measured: measured["matmul_flops_per_s"][dtype]

    products = [one(f"{dtype} product", "FLOP/s", rate_of(dtype)) for dtype in before["matmul_flops_per_s"]]
    return ", ".join([one("copy", "B/s", lambda measured: measured["copy_bytes_per_s"]), *products])


def _kernels(page: _Page, data: dict[str, Any]) -> str:
    rows, ceiling = data["results"], data["ceilings"]["before"]
    content = "".join(f"<p>{escape(sentence)}</p>" for sentence in _in_short(data))
    summary = summarise(rows, ("op", "dtype"))
    if summary:
        content += "<h3>By op</h3>" + page.table(
            ("op", "dtype", "backend", "beside the best peer", "least", "most", "of ceiling", "rows"),
            [
                (
                    Cell(line["op"]),
                    Cell(line["dtype"]),
                    Cell(line["backend"]),
                    *(Cell(times(line["ratio"][which]), line["ratio"][which]) for which in ("median", "min", "max")),
                    Cell(percent(line["of_ceiling"]["median"]), line["of_ceiling"]["median"]),
                    Cell(str(line["cases"]), line["cases"]),
                )
                for line in summary
            ],
        )
    left_out = Counter((row["op"], name, why) for row in rows for name, why in row["left_out"].items())
    in_order = sorted(left_out, key=lambda who: not who[2].startswith("wrong"))
    content += _reasons(
        "Left out of the timing",
        [(f"{op}, {name} ({_plural(left_out[op, name, why], 'row')})", why) for op, name, why in in_order],
    )
    pictures: list[Picture | None] = []
    if summary:
        pictures.append(figures.ratio_bars(summarise(rows, ("op",)), "Our backends beside the best peer"))
    if ceiling:
        pictures += [figures.bandwidth(rows, ceiling), *figures.rooflines(rows, ceiling)]
    for op in dict.fromkeys(row["op"] for row in rows):
        pictures += figures.op_bars(op, [row for row in rows if row["op"] == op])
    content += "<h3>Figures</h3>" + page.figures(pictures)
    lines = [(row, name, one) for row in rows for name, one in row["competitors"].items()]
    return (
        content
        + "<h3>All times</h3>"
        + page.table(
            ("competitor", "task", "ms", "least", "most", "rate", "of ceiling", "beside the best peer", "error"),
            [_kernels_line(row, name, one) for row, name, one in lines],
            ours=lambda index: lines[index][2]["ours"],
            filter=True,
        )
    )


def _in_short(data: dict[str, Any]) -> list[str]:
    """A sentence for each of our backends."""
    rows = data["results"]
    sentences = []
    for line in summarise(rows, ()):
        faster = sum(
            row["ratios"][line["backend"]][best_peer(row)]["median"] > 1
            for row in rows
            if best_peer(row) in row["ratios"].get(line["backend"], {})
        )
        sentences.append(
            f"{line['backend']}: faster than every peer in {faster} of {line['cases']} rows; in the median "
            f"{times(line['ratio']['median'])} as fast as the best of them ({times(line['ratio']['min'])} to "
            f"{times(line['ratio']['max'])}), at {percent(line['of_ceiling']['median'])} of the ceiling."
        )
    return sentences


def _kernels_line(row: dict[str, Any], name: str, one: dict[str, Any]) -> tuple[Cell, ...]:
    peer = best_peer(row)
    ratio = row["ratios"].get(name, {}).get(peer, {}).get("median")
    unit, rate = ("FLOP/s", one["flops_per_s"]) if row["flops"] else ("B/s", one["bytes_per_s"])
    return (
        Cell(name),
        Cell(task_of("kernels", row)),
        *(Cell(digits(one[f"{which}_ms"]), one[f"{which}_ms"]) for which in ("median", "min", "max")),
        Cell(quantity(rate, unit), rate),
        Cell(percent(one["of_ceiling"]), one["of_ceiling"]),
        Cell("") if ratio is None else Cell(times(ratio), ratio),
        Cell(f"{one['relative_error']:.1e}", one["relative_error"]),
    )


def _scaling(page: _Page, data: dict[str, Any]) -> str:
    rows = data["results"]
    pictures = figures.scaling_lines(rows)
    if rows:
        largest = max(rows, key=lambda row: row["model"]["parameters"])["model"]["name"]
        usual = figures.usual_setting(rows, largest)
        of_largest = [row for row in rows if row["model"]["name"] == largest]
        pictures.append(
            figures.step_split([row for row in of_largest if (row["block_size"], row["batch_size"]) == usual])
        )
    headings = (
        "competitor", "task", "parameters", "tokens/s", "beside the best peer", "ms a step", "least", "most", "forward",
        "backward", "optimizer", "data", "peak memory", "FLOPs a token", "MFU of peak", "MFU of measured",
    )  # fmt: skip
    return (
        _left_out(data)
        + page.figures(pictures)
        + _growth(page, data.get("summary", {}).get("growth", []))
        + page.table(
            headings, [_scaling_line(row) for row in rows], ours=lambda index: is_ours(rows[index]), filter=True
        )
    )


def _left_out(data: dict[str, Any]) -> str:
    """Who of a run of whole models has no row, and why."""
    cases = data.get("summary", {}).get("left_out", {})
    reasons = [(f"{case}, {name}", reason) for case, of_case in cases.items() for name, reason in of_case.items()]
    return _reasons("Left out of the timing", reasons)


def _growth(page: _Page, growth: Sequence[dict[str, Any]]) -> str:
    """The exponents: by which power of what is varied the times and the memory grow."""
    if not growth:
        return ""
    rows = [
        (
            Cell(line["sweep"].replace("_", " ")),
            Cell(competitor_of(line)),
            Cell(line["dtype"]),
            *(Cell(f"{line[name]:.2f}", line[name]) for name in ("ms_per_token", "peak_memory_bytes")),
            Cell(str(line["points"]), line["points"]),
        )
        for line in growth
    ]
    headings = ("as this grows", "competitor", "dtype", "time a token", "peak memory", "points")
    return "<h3>Exponents of growth</h3>" + page.table(headings, rows)


def _scaling_line(row: dict[str, Any]) -> tuple[Cell, ...]:
    mfu = row["mfu"]["of_peak"]
    ratio = min((one["median"] for one in row["ratios"].values()), default=None)  # to the best peer it is the least
    return (
        Cell(competitor_of(row)),
        Cell(task_of("scaling", row)),
        Cell(quantity(row["model"]["parameters"], ""), row["model"]["parameters"]),
        Cell(f"{row['tokens_per_s']['median']:,.0f}", row["tokens_per_s"]["median"]),
        Cell("") if ratio is None else Cell(times(ratio), ratio),
        *(Cell(digits(row["step_ms"][which]), row["step_ms"][which]) for which in ("median", "min", "max")),
        *(
            Cell(digits(row["split_ms"][part]), row["split_ms"][part])
            for part in ("forward", "backward", "optimizer", "data")
        ),
        Cell(quantity(row["peak_memory_bytes"], "B"), row["peak_memory_bytes"]),
        Cell(quantity(row["flops_per_token"], ""), row["flops_per_token"]),
        Cell("") if mfu is None else Cell(percent(mfu), mfu),
        Cell(percent(row["mfu"]["of_measured"]), row["mfu"]["of_measured"]),
    )


def _generate(page: _Page, data: dict[str, Any]) -> str:
    rows = data["results"]
    content = _left_out(data) + page.figures(figures.generation_lines(rows))
    return content + page.table(
        ("competitor", "task", "tokens/s", "least", "most", "first token, ms"),
        [
            (
                Cell(competitor_of(row)),
                Cell(task_of("generate", row)),
                *(
                    Cell(f"{row['tokens_per_s'][which]:,.0f}", row["tokens_per_s"][which])
                    for which in ("median", "min", "max")
                ),
                Cell(digits(row["first_token_ms"]), row["first_token_ms"]),
            )
            for row in rows
        ],
        ours=lambda index: is_ours(rows[index]),
        filter=True,
    )


_SECTIONS = {"kernels": _kernels, "scaling": _scaling, "generate": _generate}


def _side_by_side(page: _Page, first: Run, second: Run) -> str:
    """The times that both runs have; of one machine, what `fastgpt bench compare` makes of them, too."""
    before, after = timings(first.data), timings(second.data)
    pairs = [
        (one, after[task][name])
        for task, of_task in before.items()
        for name, one in of_task.items()
        if name in after.get(task, {})
    ]
    content = f"<p>First: {escape(first.label)}. Second: {escape(second.label)}.</p>"
    if not pairs:
        return content + "<p>They have no time of the same thing.</p>"
    verdicts: dict[tuple[str, str], str] = {}
    if other_machine(first.data, second.data) is None:
        comparison = compare(first.data, second.data)
        verdicts = {(change.task, change.competitor): change.verdict for change in comparison.changes if change.ours}
        content += "".join(f"<p>{escape(sentence)}</p>" for sentence in comparison.sentences())
        for title, changes in (("Slower", comparison.regressions), ("Faster", comparison.improvements)):
            content += _reasons(title, [(f"{one.task}, {one.competitor}", one.in_words()) for one in changes])
    else:
        content += "<p>These are two machines: what differs is the machine as much as the code.</p>"
    content += page.figures([figures.change_dots([_dot(*pair) for pair in pairs], "Second run beside the first")])
    return content + page.table(
        ("competitor", "task", "first, ms", "second, ms", "second / first", "verdict"),
        [
            (
                Cell(old.competitor),
                Cell(old.task),
                Cell(digits(old.median_ms), old.median_ms),
                Cell(digits(new.median_ms), new.median_ms),
                Cell(times(new.median_ms / old.median_ms), new.median_ms / old.median_ms),
                Cell(verdicts.get((old.task, old.competitor), "")),
            )
            for old, new in pairs
        ],
        ours=lambda index: pairs[index][0].ours,
        filter=True,
    )


def _dot(old: Timing, new: Timing) -> tuple[str, bool, float]:
    return old.task.partition(",")[0], old.ours, new.median_ms / old.median_ms


def _reasons(title: str, reasons: Sequence[tuple[str, str]]) -> str:
    """A list of who and why; long ones are folded."""
    if not reasons:
        return ""
    items = "".join(
        f"<li>{f'<b>{escape(name)}</b>: ' if name else ''}{escape(reason)}</li>" for name, reason in reasons
    )
    opened = " open" if len(reasons) <= 8 else ""
    return f"<details{opened}><summary>{escape(title)} ({len(reasons)})</summary><ul>{items}</ul></details>"


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _class(name: str | None) -> str:
    return "" if name is None else f' class="{name}"'


def _commit(data: dict[str, Any]) -> str:
    commit, dash, dirty = (data["commit"] or "commit unknown").partition("-")
    return commit if " " in commit else commit[:9] + dash + dirty


def _date(data: dict[str, Any]) -> str:
    return data["date"].removesuffix("+00:00").replace("T", " ") + " UTC"
