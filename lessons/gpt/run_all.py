"""Climb the ladder: run the rungs, and make one table and one figure of what they reached.

    python -m lessons.gpt.run_all [RUNG...] [--steps N] [--seed N] [--out DIR] [--docs]

A rung that is run again replaces its line. With ``--docs`` the table and the figure also go into docs/learn.md, and
what they are made of into results.json beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastgpt.benchmarks.result import describe_machine, describe_versions
from fastgpt.files import json_bytes, read_json, write_atomically
from lessons.gpt.shared import FOLDER, path_of

RESULTS = FOLDER / "results.json"
DOC = FOLDER.parents[1] / "docs" / "learn.md"
FIGURE = DOC.with_name("ladder.png")
_BLOCK = re.compile(r"(?<=<!-- climbed -->\n).*?(?=<!-- end of climbed -->)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m lessons.gpt.run_all", description=__doc__.partition("\n")[0])
    parser.add_argument("rungs", nargs="*", type=int, metavar="RUNG", help="1 to 10 (default: all)")
    parser.add_argument("--steps", help="of training, for every rung (default: what the published losses took)")
    parser.add_argument("--seed", help="of weights and batches")
    parser.add_argument("--out", type=Path, default=Path("runs", "lessons"), help="default: %(default)s")
    parser.add_argument("--docs", action="store_true", help="also put table and figure into docs/learn.md")
    args = parser.parse_args(argv)
    for number in args.rungs:
        if not 1 <= number <= 10:
            parser.error(f"the rungs are 1 to 10, got {number}")
    settings = [f"--{name}={value}" for name in ("steps", "seed", "out") if (value := getattr(args, name)) is not None]
    for number in args.rungs or range(1, 11):
        print(f"\n--- rung {number} ---", flush=True)
        code = subprocess.run([sys.executable, str(path_of(number)), *settings]).returncode
        if code:
            sys.exit(code)  # the rung has said why

    data = collect(args.out)
    write_atomically(args.out / "results.json", json_bytes(data))
    write_atomically(args.out / "table.md", table(data).encode())
    write_atomically(args.out / "ladder.png", figure(data))
    print(f"\n{table(data)}\nin {args.out}: results.json, table.md, ladder.png")
    if args.docs:
        publish(data)


def collect(folder: Path) -> dict[str, Any]:
    """The results that rungs left in ``folder``, lowest first, with the machine and the versions."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("rung-*.json"))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine, versions = describe_machine(device), describe_versions()
    return {
        "machine": machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores",
        "torch": versions["torch"],
        "results": results,
    }


def table(data: dict[str, Any]) -> str:
    """Markdown: a line for each rung, its loss beside the published one."""
    lines = ["| rung | | loss | published | difference | steps | CPU seconds |", "|---|---|---|---|---|---|---|"]
    for result in data["results"]:
        published, difference = "", ""
        if result["published"] is not None:
            published = f"{result['published']:.2f}"
            difference = f"{result['loss'] - result['published']:+.3f}"
        lines.append(
            f"| {result['number']} | {result['title']} | {result['loss']:.3f} | {published} | {difference} | "
            f"{result['steps']} | {result['seconds']:.0f} |"
        )
    seeds = ", ".join(str(seed) for seed in sorted({result["seed"] for result in data["results"]}))
    return "\n".join(lines) + f"\n\n{data['machine']}; torch {data['torch']}; seed {seeds}.\n"


def figure(data: dict[str, Any]) -> bytes:
    """A PNG: the losses on Tiny Shakespeare by rung, and the published ones. It carries the ``digest`` of ``data``."""
    from matplotlib.figure import Figure

    shown = [result for result in data["results"] if result["of"] == "validation split"]
    published = [result for result in shown if result["published"] is not None]
    drawing = Figure(figsize=(7, 4), layout="constrained")
    axes = drawing.subplots()
    axes.plot([r["number"] for r in shown], [r["loss"] for r in shown], "o-", color="#0072b2", label="this ladder")
    axes.plot(
        [r["number"] for r in published],
        [r["published"] for r in published],
        "x",
        color="#d55e00",
        markersize=9,
        label="published",
    )
    for result in shown:
        where = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(f"{result['loss']:.2f}", (result["number"], result["loss"]), **where)
    axes.set_xticks(
        range(1, 10), [_named(shown, number) for number in range(1, 10)], rotation=30, ha="right", fontsize=8
    )
    axes.set_ylabel("validation loss (nats per character)")
    axes.margins(y=0.1)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    content = io.BytesIO()
    drawing.savefig(content, format="png", dpi=110, metadata={"Source": digest(data)})
    return content.getvalue()


def _named(results: Sequence[dict[str, Any]], number: int) -> str:
    title = next((result["title"] for result in results if result["number"] == number), "")
    return f"{number} {title.partition(',')[0]}"


def digest(data: dict[str, Any]) -> str:
    """Of what the table and the figure show."""
    return hashlib.sha256(json_bytes(data)).hexdigest()


def publish(data: dict[str, Any]) -> None:
    """Put the table and the figure into docs/learn.md, and ``data`` into results.json."""
    write_atomically(RESULTS, json_bytes(data))
    write_atomically(FIGURE, figure(data))
    block = f"\n![Loss by rung, beside the published ones](ladder.png)\n\n{table(data)}\n"
    write_atomically(DOC, _BLOCK.sub(lambda _: block, DOC.read_text(encoding="utf-8")).encode())


def published() -> tuple[dict[str, Any], str]:
    """What ``publish`` was given last, and what docs/learn.md has of it."""
    found = _BLOCK.search(DOC.read_text(encoding="utf-8"))
    assert found is not None, f"{DOC} lacks its marks"
    return read_json(RESULTS), found[0]


if __name__ == "__main__":
    main()
