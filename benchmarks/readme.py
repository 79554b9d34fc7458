"""The README's measured tables and its figure, written from result files: nothing there is typed by hand.

    python -m fastgpt.benchmarks.readme [RESULT.json...]

puts them between two marks of README.md, of which the first names the files; without files, those that it names. They
lie in benchmarks/results, where `tests/test_readme.py` finds them and holds the README to them. The figure carries the
digest of the files that it was drawn from.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgpt.benchmarks import figures, result
from fastgpt.benchmarks.compare import competitor_of, is_ours
from fastgpt.benchmarks.figures import KERNEL_BACKENDS
from fastgpt.benchmarks.summary import device_of, summarise
from fastgpt.benchmarks.units import digits, percent, quantity, times
from fastgpt.config import UserError
from fastgpt.files import write_atomically

README = result.REPOSITORY / "README.md"
RESULTS = Path("benchmarks", "results")
FIGURE = Path("docs", "benchmarks.png")

_BLOCK = re.compile(r"<!-- measured:(?P<names>[^>]*)-->\n(?P<text>.*?)<!-- end of measured -->", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt.benchmarks.readme",
        description="Write the README's measured tables and figure from result files.",
    )
    parser.add_argument("results", nargs="*", metavar="RESULT.json", help="default: those that the README names")
    args = parser.parse_args(argv)
    if not README.exists():
        parser.error(f"this needs a checkout of fastgpt: there is no {README}")
    try:
        names = [Path(path).name for path in args.results] or named_files(README.read_text(encoding="utf-8"))
        if not names:
            raise UserError("the README names no result files yet, so name some")
        for path in args.results:
            if Path(path).resolve().parent != result.REPOSITORY / RESULTS:
                raise UserError(f"{path} does not lie in {RESULTS}, where the README's tests look for it")
        write(README, names)
    except UserError as error:
        parser.error(str(error))


def write(readme: Path, names: Sequence[str]) -> None:
    """Put the tables of these files, by name in benchmarks/results beside it, into ``readme``, and draw its figure.

    Raises:
        UserError: a file cannot be read, or is of a kind that has no table; ``readme`` has no marks.
    """
    old = readme.read_text(encoding="utf-8")
    named_files(old)
    files = load_all(readme, names)
    block = f"<!-- measured: {' '.join(names)} -->\n{text_of(files, names)}<!-- end of measured -->"
    picture = figure_of(files)
    if picture is not None:
        write_atomically(readme.parent / FIGURE, picture)
    write_atomically(readme, _BLOCK.sub(lambda _: block, old).encode())


def load_all(readme: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The contents of these files in benchmarks/results beside ``readme``."""
    return [result.load(readme.parent / RESULTS / name) for name in names]


def named_files(text: str) -> list[str]:
    """The files that a README's tables are of.

    Raises:
        UserError: it has no marks.
    """
    return _match(text)["names"].split()


def written(text: str) -> str:
    """What a README has between the marks."""
    return _match(text)["text"]


def _match(text: str) -> re.Match[str]:
    found = _BLOCK.search(text)
    if found is None:
        raise UserError("the README lacks the marks <!-- measured: --> and <!-- end of measured -->")
    return found


def digest(files: Sequence[dict[str, Any]]) -> str:
    """Of what the figure shows; the same files give the same."""
    kernels = [data["results"] for data in files if data["kind"] == "kernels"]
    return hashlib.sha256(repr(kernels).encode()).hexdigest()


def figure_of(files: Sequence[dict[str, Any]]) -> bytes | None:
    """The README's figure, a PNG: our kernels beside the best peer, a panel for each machine. None without any."""
    panels = [
        (device_of(data), [line for line in summarise(data["results"], ("op",)) if line["backend"] in KERNEL_BACKENDS])
        for data in files
        if data["kind"] == "kernels"
    ]
    panels = [(title, summary) for title, summary in panels if summary]
    return figures.overview(panels, digest(files)) if panels else None


def text_of(files: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """What stands between the marks, with a blank line at either end."""
    parts = []
    if any(data["kind"] == "kernels" for data in files):
        parts.append(f"![Our kernels beside the best peer]({FIGURE.as_posix()})")
    for data, name in zip(files, names, strict=True):
        if data["kind"] not in _TABLES:
            raise UserError(f"{name}: a file of kind {data['kind']!r} has no table in the README")
        parts += [_origin(data, name), *_TABLES[data["kind"]](data)]
    return "\n" + "\n\n".join(parts) + "\n\n"


def _origin(data: dict[str, Any], name: str) -> str:
    """The machine that the next table was measured on."""
    machine, versions = data["machine"], data["versions"]
    words = [device_of(data)]
    if machine["gpu"] is None:
        words.append(f"{machine['threads']} threads")
    else:
        words.append(f"driver {machine['driver'] or 'unknown'}")
    words += [f"{package} {versions[package]}" for package in ("torch", "triton", "cuda") if versions[package]]
    commit = (data["commit"] or "unknown").partition("-")[0][:9]
    doubt = "" if data["valid"] else " **This run is not valid.**"
    return (
        f"{', '.join(words)}; commit {commit}, {data['date'][:10]} ([samples]({(RESULTS / name).as_posix()})).{doubt}"
    )


def _kernels_tables(data: dict[str, Any]) -> list[str]:
    """The fastest of our kernels, by op and dtype, beside the best peer."""
    rows = data["results"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for line in summarise(rows, ("op", "dtype")):
        of_op = cells.setdefault(line["op"], {})
        if line["backend"] in KERNEL_BACKENDS and line["dtype"] not in of_op:  # the fastest comes first
            ratio = line["ratio"]
            of_op[line["dtype"]] = (
                f"{line['backend']} {times(ratio['median'])} ({times(ratio['min'])} to {times(ratio['max'])}), "
                f"{percent(line['of_ceiling']['median'])}"
            )
    peers = sorted({name for row in rows for name, one in row["competitors"].items() if not one["ours"]})
    said = (
        f"Times as fast as the best of {', '.join(peers)}: the median over the shapes of --size "
        f"{data['settings']['size']}, forward and backward apart (least to greatest); then the part that it reaches of "
        "the measured ceiling."
    )
    table = _table(("op", *dtypes), [(op, *(of_op.get(dtype, "") for dtype in dtypes)) for op, of_op in cells.items()])
    return [said, table]


def _scaling_tables(data: dict[str, Any]) -> list[str]:
    """The fastest of ours and of the peers, by model and dtype, each at the setting it was measured at most."""
    rows = []
    for name, dtype in dict.fromkeys((row["model"]["name"], row["dtype"]) for row in data["results"]):
        of_model = [row for row in data["results"] if row["model"]["name"] == name and row["dtype"] == dtype]
        block_size, batch_size = figures.usual_setting(of_model, name)
        at_usual = [row for row in of_model if (row["block_size"], row["batch_size"]) == (block_size, batch_size)]
        ours, peer = _fastest(at_usual)
        if ours is not None:
            rows.append(
                (
                    f"{name}, {quantity(ours['model']['parameters'], '')}, {batch_size} x {block_size}, {dtype}",
                    f"{ours['tokens_per_s']['median']:,.0f} ({competitor_of(ours)})",
                    "" if peer is None else f"{peer['tokens_per_s']['median']:,.0f} ({competitor_of(peer)})",
                    _ratio(ours, peer),
                    quantity(ours["peak_memory_bytes"], "B"),
                    percent(ours["mfu"]["of_measured"]),
                )
            )
    headings = ("training", "tokens/s", "best peer", "ratio", "peak memory", "of the measured matmul")
    return [_table(headings, rows)]


def _generate_tables(data: dict[str, Any]) -> list[str]:
    """The fastest of ours and of the peers, by model, dtype, batch and context."""
    rows = []
    fields = ("batch_size", "context", "new_tokens", "dtype")
    for key in dict.fromkeys((row["model"]["name"], *(row[field] for field in fields)) for row in data["results"]):
        alike = [row for row in data["results"] if (row["model"]["name"], *(row[field] for field in fields)) == key]
        ours, peer = _fastest(alike)
        if ours is not None:
            name, batch, context, new_tokens, dtype = key
            rows.append(
                (
                    f"{name}, batch {batch}, {new_tokens} tokens after {context}, {dtype}",
                    f"{ours['tokens_per_s']['median']:,.0f} ({competitor_of(ours)})",
                    "" if peer is None else f"{peer['tokens_per_s']['median']:,.0f} ({competitor_of(peer)})",
                    _ratio(ours, peer),
                    f"{digits(ours['first_token_ms'])} ms",
                )
            )
    return [_table(("generation", "tokens/s", "best peer", "ratio", "first token"), rows)]


_TABLES = {"kernels": _kernels_tables, "scaling": _scaling_tables, "generate": _generate_tables}


def _fastest(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Of ours, and of the peers."""
    ordered = sorted(rows, key=lambda row: -row["tokens_per_s"]["median"])
    ours = next((row for row in ordered if is_ours(row)), None)
    return ours, next((row for row in ordered if not is_ours(row)), None)


def _ratio(ours: dict[str, Any], peer: dict[str, Any] | None) -> str:
    if peer is None:
        return ""
    ratio = ours.get("ratios", {}).get(competitor_of(peer))
    if ratio is None:  # none was taken within a round
        return times(ours["tokens_per_s"]["median"] / peer["tokens_per_s"]["median"])
    return f"{times(ratio['median'])} ({times(ratio['min'])} to {times(ratio['max'])})"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
