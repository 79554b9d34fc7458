"""What a file of kernels comes to: our backends beside the best peer, by op and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastgpt.benchmarks.result import spread
from fastgpt.dispatch import BACKENDS


def device_of(data: dict[str, Any]) -> str:
    """What a file's times were taken on: the GPU, or the CPU where it has none."""
    return data["machine"]["gpu"] or data["machine"]["cpu"]


def best_peer(row: dict[str, Any]) -> str | None:
    """The peer of a row with the least median time; None where none was timed."""
    peers = {name: one["median_ms"] for name, one in row["competitors"].items() if not one["ours"]}
    return min(peers, key=peers.__getitem__) if peers else None


def summarise(rows: Sequence[dict[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """Our backends in rows of kernels, in the order of the rows, and of each the fastest first.

    Args:
        by: the rows' fields to tell apart: ("op", "dtype"), ("op",) or none.
    Returns:
        For each of their values, and each backend that was timed beside a peer, a dict of those fields, "backend",
        "cases" (how many rows) and, over these, median, least and greatest of "ratio" (the best peer's time over ours)
        and "of_ceiling".
    """
    found: list[dict[str, Any]] = []
    for values in dict.fromkeys(tuple(row[field] for field in by) for row in rows):
        of_these = []
        for backend in BACKENDS:
            timed = [
                (row["ratios"][backend][peer]["median"], row["competitors"][backend]["of_ceiling"])
                for row in rows
                if tuple(row[field] for field in by) == values
                and backend in row["competitors"]
                and (peer := best_peer(row)) is not None
            ]
            if timed:
                ratios, reached = zip(*timed, strict=True)
                of_these.append(
                    {
                        **dict(zip(by, values, strict=True)),
                        "backend": backend,
                        "cases": len(timed),
                        "ratio": spread(ratios),
                        "of_ceiling": spread(reached),
                    }
                )
        found += sorted(of_these, key=lambda line: -line["ratio"]["median"])
    return found
