"""Some steps of a run as a trace for chrome://tracing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

FIRST, LAST = 7, 9  # by then kernels are compiled, and a step has become a CUDA graph where it is to
STEPS = LAST - FIRST + 1
ROWS = 8


@contextlib.contextmanager
def traced(path: Path, device: torch.device, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """A function to call after each step; after step ``LAST`` the trace is in ``path``.

    Args:
        path: a JSON file to write, for chrome://tracing or https://ui.perfetto.dev.
        device: where the steps run; what a GPU does is traced beside what the CPU does.
        say: gets a line on where the trace is, and one for each of the ``ROWS`` ops (a GPU's kernels) that took most.
    """
    on_gpu = device.type == "cuda"

    def finish(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(path))
        say(f"steps {FIRST} to {LAST} are traced in {path}: open it in chrome://tracing. Most time went to")
        where = DeviceType.CUDA if on_gpu else DeviceType.CPU
        events = [e for e in profile.key_averages() if e.device_type == where and not e.is_user_annotation]
        times = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count) for e in events}
        total = sum(time for time, _ in times.values())
        for key, (time, calls) in sorted(times.items(), key=lambda item: item[1], reverse=True)[:ROWS]:
            say(f"{time / total:7.1%}  {time / STEPS / 1e3:9.3f} ms  {calls / STEPS:6.1f} calls a step  {key[:60]}")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    schedule = torch.profiler.schedule(skip_first=FIRST - 2, wait=0, warmup=1, active=STEPS, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=finish) as profile:
        yield profile.step
