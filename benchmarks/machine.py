"""How much of the machine other programs took while times were taken on its processors."""

from __future__ import annotations

import os
import time
from pathlib import Path

# A tenth of one core: above what an idle system does by itself, below what a median of rounds would notice.
QUIET_CORES = 0.1
SHORTEST_SECONDS = 0.2  # the kernel counts in ticks, of 10 ms mostly


class OtherWork:
    """Counts, while it is entered (more than once, if need be), the processor time that other programs take.

    That is what the kernel counts as busy on all cores, less what this process used. Unlike a load average it has none
    of our own threads in it, and nothing from before.
    """

    def __init__(self) -> None:
        self._wall_s = self._others_s = 0.0

    def __enter__(self) -> OtherWork:
        self._began = time.perf_counter(), _busy_seconds(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, own = self._began
        self._wall_s += time.perf_counter() - wall
        self._others_s += (_busy_seconds() - busy) - (time.process_time() - own)

    @property
    def cores(self) -> float | None:
        """Cores that others kept busy, on average; None where that cannot be told."""
        if self._wall_s < SHORTEST_SECONDS or not Path("/proc/stat").exists():
            return None
        return max(0.0, self._others_s / self._wall_s)

    @property
    def busy(self) -> bool:
        return self.cores is not None and self.cores > QUIET_CORES

    def __str__(self) -> str:
        if self.cores is None:
            return (
                "Whether other programs were running cannot be told: times were too short, or there is no /proc/stat."
            )
        used = f"other programs used {self.cores:.2f} of {os.cpu_count()} cores while times were taken"
        if self.busy:
            return f"The machine was busy: {used}, and these figures are not to be relied on."
        return f"The machine was quiet: {used}."


def _busy_seconds() -> float:
    """Processor time that all programs and the kernel have used on all cores; what a hypervisor took away counts."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except FileNotFoundError:
        return 0.0
    user, nice, system, _idle, _waiting, irq, softirq, stolen = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")
