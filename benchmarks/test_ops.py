"""The cases of `fastgpt bench kernels` for pytest-benchmark, which compares the runs of two commits:

    pytest benchmarks --benchmark-autosave             # on the old commit, and on the new one
    pytest benchmarks --benchmark-compare=0001 --benchmark-compare-fail=median:20%

`-k` chooses: `-k 'softmax and cpp and forward'`. Sizes are the small ones, in fp32 on a CPU and bf16 on a GPU; our
backends and PyTorch's eager op are timed, once their results have passed. Inputs stay in the caches, which is where
this differs from `fastgpt bench kernels`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgpt.benchmarks import cases
from fastgpt.benchmarks.harness import WARMUP_ROUNDS, Contestant
from fastgpt.benchmarks.kernels import reason_not_to_time
from fastgpt.dispatch import BACKENDS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 15
CASES = cases.cases("small", DEVICE.type, ["bf16" if DEVICE.type == "cuda" else "fp32"])


@pytest.fixture(
    scope="module", params=[(case, part) for case in CASES for part in case.work], ids=lambda p: f"{p[0].name}, {p[1]}"
)
def timed(request: pytest.FixtureRequest) -> tuple[cases.Case, str, cases.Problem]:
    """A case, one of its parts, and its inputs, made once for all who compete in it."""
    case, part = request.param
    torch.manual_seed(0)
    return case, part, case.build(DEVICE)


@pytest.mark.parametrize("name", [*BACKENDS, cases.EAGER])
def test_op(benchmark: Any, timed: tuple[cases.Case, str, cases.Problem], name: str) -> None:
    case, part, problem = timed
    reason = reason_not_to_time(case.op, name, DEVICE, cases.DTYPES[case.dtype]) if name in BACKENDS else None
    if reason is not None:
        pytest.skip(reason)
    benchmark.extra_info["relative_error"] = problem.check(name)
    contestant = problem.contestant(name, part)
    benchmark.group = f"{case.name}, {part}"
    benchmark.pedantic(
        _call,
        setup=lambda: ((contestant, contestant.prepare()), {}),
        rounds=ROUNDS,
        warmup_rounds=WARMUP_ROUNDS,
    )


def _call(contestant: Contestant, state: Any) -> None:
    for _ in range(contestant.in_a_row):
        contestant.call(state)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
