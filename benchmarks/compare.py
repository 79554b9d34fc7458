"""What became slower or faster from one result file to another; `fastgpt bench compare` prints it.

Two runs of the same code differ: the machine's clock, its other programs and the samples' own noise change. So a time
is called slower only if it is so by two measures, each of which takes the machine's part out:

- the time over the drift of the run, which is by how much all peers together have changed (their median), and
- the time as a multiple of its row's peers in the same round (of their geometric mean, where there are several).

By each measure the median must have grown by the threshold at least, and the quartiles must lie apart: three quarters
of the new samples are above three quarters of the old ones. Where there are no peers, or where they are other code than
they were (another PyTorch), the time alone decides.

A kernel that was timed and is now refused as wrong counts as slower. Peers themselves are never reported: what they did
says how the machine has changed.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from fastgpt.benchmarks.units import milliseconds, times
from fastgpt.config import UserError
from fastgpt.dispatch import BACKENDS

THRESHOLD = 0.1
FEWEST_SAMPLES = 5  # quartiles of fewer say nothing
SLOWER, FASTER, ALIKE, UNKNOWN, REFUSED = "slower", "faster", "alike", "too few samples", "no longer timed"

# What makes two machines of two files; a new driver or more memory is worth a note.
_MACHINE = ("cpu", "cores", "threads", "gpu")

# Whose version, if it changed, makes peers other code than they were.
_PEER_VERSIONS = ("torch", "triton", "cuda", "flash_attn", "liger_kernel", "nanogpt")


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one competitor took for one task: ``samples_ms``, one a round."""

    task: str
    competitor: str
    ours: bool
    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)


@dataclasses.dataclass(frozen=True)
class Change:
    """A competitor's time for a task in two runs.

    Args:
        slowdown: new median over old; None where it is no longer timed.
        beside_peers: the same of its times as multiples of its peers'; None where there are none to compare with.
        verdict: SLOWER, FASTER, ALIKE, UNKNOWN or REFUSED.
        reason: why it is refused.
    """

    task: str
    competitor: str
    ours: bool
    old_ms: float
    new_ms: float | None
    slowdown: float | None
    beside_peers: float | None
    verdict: str
    reason: str = ""

    def in_words(self) -> str:
        if self.new_ms is None or self.slowdown is None:
            return f"{milliseconds(self.old_ms)}, now not timed: {self.reason}"
        beside = "" if self.beside_peers is None else f", {times(self.beside_peers)} beside its peers"
        return f"{milliseconds(self.old_ms)}, now {milliseconds(self.new_ms)}: {times(self.slowdown)}{beside}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """``changes``, one for each competitor and task that both files have; ``only_old`` and ``only_new``: tasks that one
    of them lacks; ``notes``: sentences on what else differs."""

    changes: list[Change]
    only_old: list[str]
    only_new: list[str]
    notes: list[str]
    threshold: float

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.ours and change.verdict in (SLOWER, REFUSED)]

    @property
    def improvements(self) -> list[Change]:
        return [change for change in self.changes if change.ours and change.verdict == FASTER]

    def sentences(self) -> list[str]:
        """What it comes to."""
        ours = [change for change in self.changes if change.ours]
        few = sum(change.verdict == UNKNOWN for change in ours)
        beside = [change.beside_peers for change in ours if change.beside_peers is not None]
        alike = sum(max(change, 1 / change) <= 1 + self.threshold for change in beside)
        return [
            f"Of {len(ours)} times of ours, {len(self.regressions)} became slower and {len(self.improvements)} faster, "
            f"by {self.threshold:.0%} or more and beyond the spread of the samples.",
            *([f"Beside their peers {alike} of {len(beside)} agree within {self.threshold:.0%}."] if beside else []),
            *([f"{few} of them have fewer than {FEWEST_SAMPLES} samples, too few to tell."] if few else []),
            *(f"{len(tasks)} rows are in the {age} file only." for age, tasks in self._alone() if tasks),
            *self.notes,
        ]

    def _alone(self) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
        return ("old", self.only_old), ("new", self.only_new)


def timings(data: dict[str, Any]) -> dict[str, dict[str, Timing]]:
    """The timings of a result file's content, by task and competitor."""
    found: dict[str, dict[str, Timing]] = {}
    for row in data["results"]:
        for one in _timings_of(data["kind"], row):
            found.setdefault(one.task, {})[one.competitor] = one
    return found


def _timings_of(kind: str, row: dict[str, Any]) -> list[Timing]:
    if kind == "kernels":
        task = task_of(kind, row)
        return [Timing(task, name, one["ours"], tuple(one["samples_ms"])) for name, one in row["competitors"].items()]
    if kind in ("scaling", "generate"):
        return [Timing(task_of(kind, row), competitor_of(row), is_ours(row), tuple(row["samples_ms"]))]
    raise UserError(f"a file of kind {kind!r} has no times to compare; kernels, scaling and generate have")


def task_of(kind: str, row: dict[str, Any]) -> str:
    """What a row's competitors all did, in the same words in every file."""
    if kind == "kernels":
        return f"{row['case']}, {row['part']}"
    if kind == "scaling":
        return f"{row['model']['name']}, batch {row['batch_size']} x {row['block_size']} tokens, {row['dtype']}"
    return (
        f"{row['model']['name']}, batch {row['batch_size']}, {row['new_tokens']} tokens after {row['context']}, "
        f"{row['dtype']}"
    )


def competitor_of(row: dict[str, Any]) -> str:
    """The competitor of a row of scaling or generate, with its mode where it has one."""
    return f"{row['competitor']}, {row['mode']}" if "mode" in row else row["competitor"]


def is_ours(row: dict[str, Any]) -> bool:
    """Whether a row of scaling or generate is of one of our backends."""
    return row["competitor"] in BACKENDS


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float = THRESHOLD) -> Comparison:
    """Compare two result files' contents.

    Args:
        threshold: by how much, as a part of the old, a time must have changed at least.
    Raises:
        UserError: they are not of one kind, or of a kind that has no times, or not of one machine, or have no time of
            the same thing.
    """
    if old["kind"] != new["kind"]:
        raise UserError(f"a {old['kind']} file and a {new['kind']} file have nothing to compare")
    field = other_machine(old, new)
    if field is not None:
        raise UserError(
            f"these are two machines ({field}: {old['machine'][field]}, {new['machine'][field]}), so that nothing "
            "follows for the code; `fastgpt bench report` shows them side by side"
        )
    before, after = timings(old), timings(new)
    refused = {task_of(new["kind"], row): _left_out(row) for row in new["results"]}
    updated = [name for name in _PEER_VERSIONS if old["versions"][name] != new["versions"][name]]
    drift = None if updated else _drift(before, after)
    changes = [
        _change(of_task[name], before[task], after[task], refused.get(task, {}), threshold, drift)
        for task, of_task in before.items()
        if task in after
        for name in of_task
        if name in after[task] or name in refused.get(task, {})
    ]
    if not changes:
        raise UserError("the two files have no time of the same thing")
    return Comparison(
        changes,
        [task for task in before if task not in after],
        [task for task in after if task not in before],
        _notes(old, new, updated, drift),
        threshold,
    )


def _left_out(row: dict[str, Any]) -> dict[str, str]:
    """By ``Timing.competitor``: training's have the dtype in their names, since all dtypes take turns together."""
    return {name.removesuffix(f", {row['dtype']}"): reason for name, reason in row.get("left_out", {}).items()}


def other_machine(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first thing by which two files' machines differ; None where they are one."""
    return next((field for field in _MACHINE if old["machine"][field] != new["machine"][field]), None)


def _change(
    old: Timing,
    old_row: dict[str, Timing],
    new_row: dict[str, Timing],
    refused: dict[str, str],
    threshold: float,
    drift: float | None,
) -> Change:
    if old.competitor not in new_row:
        reason = refused[old.competitor]
        return Change(old.task, old.competitor, old.ours, old.median_ms, None, None, None, REFUSED, reason)
    new = new_row[old.competitor]
    pairs = [(old.samples_ms, tuple(ms / (drift or 1.0) for ms in new.samples_ms))]
    peers = [name for name, one in old_row.items() if not one.ours and name != old.competitor and name in new_row]
    if peers and drift is not None:
        pairs.append((beside(old, [old_row[name] for name in peers]), beside(new, [new_row[name] for name in peers])))
    beside_peers = [statistics.median(after) / statistics.median(before) for before, after in pairs[1:]]
    if min(len(values) for pair in pairs for values in pair) < FEWEST_SAMPLES:
        verdict = UNKNOWN
    elif all(_grown(before, after, threshold) for before, after in pairs):
        verdict = SLOWER
    elif all(_grown(after, before, threshold) for before, after in pairs):
        verdict = FASTER
    else:
        verdict = ALIKE
    return Change(
        old.task,
        old.competitor,
        old.ours,
        old.median_ms,
        new.median_ms,
        new.median_ms / old.median_ms,
        beside_peers[0] if beside_peers else None,
        verdict,
    )


def _drift(before: dict[str, dict[str, Timing]], after: dict[str, dict[str, Timing]]) -> float | None:
    """By how much the peers' times have changed, in the median; None where there are none in both."""
    changes = [
        after[task][name].median_ms / one.median_ms
        for task, of_task in before.items()
        for name, one in of_task.items()
        if not one.ours and name in after.get(task, {})
    ]
    return statistics.median(changes) if changes else None


def beside(one: Timing, peers: Sequence[Timing]) -> tuple[float, ...]:
    """By round: the time as a multiple of the geometric mean of the peers'. Rounds that a peer lacks do not count."""
    rounds = zip(one.samples_ms, *(peer.samples_ms for peer in peers), strict=False)
    return tuple(mine / math.exp(statistics.fmean(map(math.log, theirs))) for mine, *theirs in rounds)


def _grown(before: Sequence[float], after: Sequence[float], threshold: float) -> bool:
    """The median by the threshold, and beyond the spread: the quartiles lie apart."""
    if statistics.median(after) < (1 + threshold) * statistics.median(before):
        return False
    return _quartiles(after)[0] > _quartiles(before)[2]


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def _notes(old: dict[str, Any], new: dict[str, Any], updated: list[str], drift: float | None) -> list[str]:
    notes = [f"The {age} run is not valid: {'; '.join(data['problems']) or 'it did not come to its end'}."
             for age, data in (("old", old), ("new", new)) if not data["valid"]]  # fmt: skip
    for name in updated:
        was, now = (data["versions"][name] or "absent" for data in (old, new))
        notes.append(f"{name} was {was} and is {now}: peers are other code, and times alone are compared.")
    if old["settings"] != new["settings"]:
        notes.append("The settings of the two runs differ.")
    for field in ("driver", "os"):
        if old["machine"][field] != new["machine"][field]:
            notes.append(f"The machine's {field} was {old['machine'][field]} and is {new['machine'][field]}.")
    for name in new["absent"].keys() - old["absent"].keys():
        notes.append(f"{name} is absent from the new run: {new['absent'][name]}")
    if drift is not None:
        notes.append(f"The drift of the run: all peers together took {drift:.2f}x of their old time.")
    return notes
