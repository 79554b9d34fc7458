"""The marks of kernels and training steps: the least ratios to peers and shares of the ceiling, by device.

A ratio is of the parts' times added up, round by round; of several peers the one that takes least time counts, and of
our kernel backends the one that does. A mark whose case, dtype or peers are not in a file has no verdict.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from fastgpt.benchmarks.cases import BACKWARD, BOTH, COMPILED, DROPOUT, EAGER, FLEX, FORWARD, FUSED, IN_A_ROW, STEP
from fastgpt.benchmarks.harness import print_table, ratios
from fastgpt.benchmarks.models import NANOGPT, NANOGPT_CUDNN, PLAIN
from fastgpt.benchmarks.result import spread

OURS = ("triton", "cpp", "cuda")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a mark in a case; ``ratio``, {"median", "min", "max"}, is to ``peer``, or where that is "", of the
    ceiling."""

    mark: Mark | StepMark
    case: str
    ours: str
    peer: str
    ratio: dict[str, float]

    @property
    def met(self) -> bool:
        return self.ratio["median"] >= self.mark.least


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

    def verdicts(self, data: dict[str, Any]) -> list[Verdict]:
        rows = [row for row in data["results"] if self.matches(row)]
        by_case = [(case, list(of_case)) for case, of_case in itertools.groupby(rows, key=lambda row: row["case"])]
        found = (self._judge(case, parts) for case, parts in by_case if len(parts) == len(self.parts))
        return [verdict for verdict in found if verdict is not None]

    def _judge(self, case: str, rows: Sequence[dict[str, Any]]) -> Verdict | None:
        def rounds(names: Sequence[str]) -> dict[str, list[float]]:
            there = [name for name in names if all(name in row["competitors"] for row in rows)]
            times = {name: [row["competitors"][name]["samples_ms"] for row in rows] for name in there}
            return {name: [sum(parts) for parts in zip(*of_rows, strict=False)] for name, of_rows in times.items()}

        ours, peers = rounds(OURS), rounds(self.peers)
        if not ours or (self.peers and not peers):
            return None
        mine, case = _fastest(ours), f"{case}, {' + '.join(self.parts)}"
        if not peers:
            floor = sum(row["floor_ms"] for row in rows)
            return Verdict(self, case, mine, "", spread(floor / ms for ms in ours[mine]))
        peer = _fastest(peers)
        return Verdict(self, case, mine, peer, ratios(ours[mine], peers[peer]))


@dataclasses.dataclass(frozen=True)
class StepMark:
    """What is wanted of the training steps of a case.

    Args:
        least: that the ratio may be.
        peers: modes and dtypes of the peer, whose best counts: all of them must have been timed.
        dropout: of the run.
        model, block_size, batch_size: of the case.
        name: of the peer; for nanoGPT itself plain PyTorch stands in where there was no checkout.
    """

    least: float
    peers: tuple[tuple[str, str], ...]
    dropout: float = 0.0
    model: str = "shakespeare"
    block_size: int = 256
    batch_size: int = 12
    name: str = NANOGPT

    def verdicts(self, data: dict[str, Any]) -> list[Verdict]:
        wanted = (self.model, self.block_size, self.batch_size, self.dropout)
        rows = [
            row
            for row in data["results"]
            if (row["model"]["name"], row["block_size"], row["batch_size"], data["settings"]["dropout"]) == wanted
        ]
        stand_in = self.name == NANOGPT and all(row["competitor"] != NANOGPT for row in rows)
        name = PLAIN if stand_in else self.name
        times = {(row["competitor"], row["mode"], row["dtype"]): row["samples_ms"] for row in rows}
        ours = {", ".join(who): ms for who, ms in times.items() if who[0] in OURS}
        peers = {", ".join(who): ms for who, ms in times.items() if who[0] == name and who[1:] in self.peers}
        if not ours or len(peers) < len(self.peers):
            return []
        mine, peer = _fastest(ours), _fastest(peers)
        case = f"{self.model}, {self.batch_size} x {self.block_size} tokens, dropout {self.dropout:g}"
        return [Verdict(self, case, mine, peer, ratios(ours[mine], peers[peer]))]


def _fastest(times: dict[str, list[float]]) -> str:
    return min(times, key=lambda name: statistics.median(times[name]))


_HALF = ("bf16", "fp16")
_BEST_ATTENTION = ("SDPA cuDNN", "SDPA flash", FLEX)
_DROPPING = f", p={DROPOUT:g}"
_CALLS = f", {IN_A_ROW} calls in a row"
_COMPILED_BF16 = (("compile", "bf16"),)

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


STEP_MARKS = {
    "cpu": (
        StepMark(2.2, (("eager", "fp32"),)),
        StepMark(1.2, tuple(itertools.product(("eager", "compile"), ("fp32", "bf16")))),
        StepMark(2.5, (("eager", "fp32"),), dropout=0.2),
    ),
    "cuda": (
        StepMark(1.3, _COMPILED_BF16, model="gpt2", block_size=1024, batch_size=16),
        StepMark(1.15, _COMPILED_BF16, model="gpt2", block_size=1024, batch_size=16, name=NANOGPT_CUDNN),
    ),
}


def verdicts(data: dict[str, Any]) -> list[Verdict]:
    """Those of a result of kernels or scaling."""
    return [verdict for mark in marks_of(data) for verdict in mark.verdicts(data)]


def marks_of(data: dict[str, Any]) -> Sequence[Mark | StepMark]:
    """What a result of kernels or scaling is held to."""
    device = "cpu" if data["machine"]["gpu"] is None else "cuda"
    return MARKS[device] if data["kind"] == "kernels" else STEP_MARKS[device]


def print_verdicts(data: dict[str, Any]) -> None:
    """Print which marks a result of kernels or scaling meets, and how many it has no case of."""
    found, rows = verdicts(data), []
    for verdict in found:
        write = "{:.2f}x".format if verdict.peer else "{:.0%}".format
        median, least, most = (write(verdict.ratio[which]) for which in ("median", "min", "max"))
        against, met = verdict.peer or "the ceiling", "met" if verdict.met else "not met"
        rows.append(
            (verdict.case, verdict.ours, against, f"{median} ({least}, {most})", write(verdict.mark.least), met)
        )
    print_table(("", "ours", "against", "is (min, max)", "mark", ""), rows)
    unjudged = set(marks_of(data)) - {verdict.mark for verdict in found}
    print(f"{sum(verdict.met for verdict in found)} of {len(found)} met; without a case in this run: {len(unjudged)}")
