"""The marks that kernels are held to: the least ratios to peers and shares of the ceiling, by device.

A ratio is of the parts' times added up, round by round; of several peers the one that takes least time counts, and of
our backends the one that does. A mark whose case, dtype or peers are not in a file has no verdict.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from fastgpt.benchmarks.cases import BACKWARD, BOTH, COMPILED, DROPOUT, EAGER, FLEX, FORWARD, FUSED, IN_A_ROW, STEP
from fastgpt.benchmarks.harness import print_table, ratios


@dataclasses.dataclass(frozen=True)
class Mark:
    """What is wanted of every case whose name begins with ``label`` and has all of ``sizes`` in it.

    Args:
        label: of the case.
        least: that the ratio may be, or the share of the ceiling where there are no ``peers``.
        peers: whose best counts.
        parts: whose times are added up.
        dtypes: of the cases; none means all.
        sizes: such as "T=256".
    """

    label: str
    least: float
    peers: tuple[str, ...] = (EAGER,)
    parts: tuple[str, ...] = (FORWARD, BACKWARD)
    dtypes: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()

    def matches(self, row: dict[str, Any]) -> bool:
        label, sizes, dtype = row["case"].rsplit(", ", 2)
        return (
            label == self.label
            and row["part"] in self.parts
            and (not self.dtypes or dtype in self.dtypes)
            and set(self.sizes) <= set(sizes.split())
        )


_HALF = ("bf16", "fp16")
_BEST_ATTENTION = ("SDPA cuDNN", "SDPA flash", FLEX)
_DROPPING = f", p={DROPOUT:g}"
_CALLS = f", {IN_A_ROW} calls in a row"

MARKS = {
    "cpu": (
        Mark("attention", 2.0, dtypes=("bf16",), sizes=("T=256",)),
        Mark("attention", 1.3, dtypes=("fp32",), sizes=("T=256",)),
        Mark("attention", 1.5, dtypes=("bf16",), sizes=("T=1024",)),
        Mark("attention", 1.1, dtypes=("fp32",), sizes=("T=1024",)),
        Mark("attention" + _DROPPING, 3.0, dtypes=("fp32",)),
        Mark("softmax", 1.0),
        Mark("softmax, scaled and causal", 1.5),
        Mark("layer_norm", 1.0),
        Mark("add_layer_norm" + _DROPPING, 2.0),
        Mark("gelu", 1.0),
        Mark("gelu, with bias", 1.5),
        Mark("gelu, tanh, with bias", 1.5),
        Mark("cross_entropy", 1.0, parts=(BOTH,)),
        Mark("adamw_", 1.0, peers=(FUSED,), parts=(STEP,)),
        # The time around a kernel: twice PyTorch's at most.
        *(Mark(op + _CALLS, 0.5, parts=(BOTH,)) for op in ("layer_norm", "gelu", "softmax")),
    ),
    "cuda": (
        Mark("attention", 1.15, _BEST_ATTENTION, (FORWARD,), _HALF, ("T=1024", "D=64")),
        Mark("attention", 1.0, ("SDPA cuDNN",), (BACKWARD,), _HALF, ("T=1024", "D=64")),
        Mark("attention", 1.25, _BEST_ATTENTION, (FORWARD, BACKWARD), _HALF, ("T=256",)),
        Mark("add_layer_norm", 0.95, (), (FORWARD,)),
        Mark("add_layer_norm", 0.85, (), (BACKWARD,)),
        Mark("add_layer_norm", 1.5, parts=(FORWARD,)),
        Mark("add_layer_norm", 2.5, parts=(BACKWARD,)),
        *(Mark("softmax", 0.93, (), (part,)) for part in (FORWARD, BACKWARD)),
        Mark("softmax", 1.8, (COMPILED,)),
        Mark("cross_entropy", 0.85, (), (BOTH,)),
        Mark("cross_entropy", 1.5, (COMPILED,), (BOTH,)),
        *(Mark("gelu, tanh, with bias", 0.95, (), (part,)) for part in (FORWARD, BACKWARD)),
        Mark("gelu, tanh, with bias", 1.0, (COMPILED,)),
        Mark("adamw_", 0.95, (), (STEP,)),
        Mark("adamw_", 1.0, (FUSED,), (STEP,)),
    ),
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a mark in a case; ``value`` is a ratio to ``peer``, or of the ceiling where that is ""."""

    case: str
    parts: str
    ours: str
    peer: str
    value: float
    least: float

    @property
    def reached(self) -> bool:
        return self.value >= self.least


def verdicts(data: dict[str, Any]) -> list[Verdict]:
    """Those of the rows of a result of kernels."""
    found = []
    for mark in MARKS["cpu" if data["machine"]["gpu"] is None else "cuda"]:
        rows = [row for row in data["results"] if mark.matches(row)]
        for case, of_case in itertools.groupby(rows, key=lambda row: row["case"]):
            parts = list(of_case)
            if len(parts) == len(mark.parts):
                found += _judge(mark, case, parts)
    return found


def _judge(mark: Mark, case: str, rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    kernels = [name for name in ("triton", "cpp", "cuda") if all(name in row["competitors"] for row in rows)]
    peers = [name for name in mark.peers if all(name in row["competitors"] for row in rows)]
    if not kernels or (mark.peers and not peers):
        return []

    def rounds(name: str) -> list[float]:
        return [sum(times) for times in zip(*(row["competitors"][name]["samples_ms"] for row in rows), strict=False)]

    def fastest(names: list[str]) -> str:
        return min(names, key=lambda name: statistics.median(rounds(name)))

    ours, peer = fastest(kernels), fastest(peers) if peers else ""
    if peer:
        value = ratios(rounds(ours), rounds(peer))["median"]
    else:
        value = sum(row["floor_ms"] for row in rows) / statistics.median(rounds(ours))
    return [Verdict(case, " + ".join(mark.parts), ours, peer, value, mark.least)]


def print_verdicts(found: Sequence[Verdict]) -> None:
    """Print the marks, and how many of them are reached."""
    rows = []
    for verdict in found:
        value, least = (f"{x:.2f}x" if verdict.peer else f"{x:.0%}" for x in (verdict.value, verdict.least))
        against = verdict.peer or "the ceiling"
        rows.append(
            (
                f"{verdict.case}, {verdict.parts}",
                verdict.ours,
                against,
                value,
                least,
                "" if verdict.reached else "falls short",
            )
        )
    print_table(("", "ours", "against", "is", "mark", ""), rows)
    print(f"{sum(verdict.reached for verdict in found)} of {len(found)} marks reached")
