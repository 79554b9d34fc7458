"""The CUDA ladder of layer_norm: each rung is right, free of races, and as its header promises."""

from __future__ import annotations

import pytest
from cuda_ladder import SCHEDULES, check_waits, climbed, fault, needs_the_emulator, own_rungs, package_rungs

from lessons.kernels import cuda_rung
from lessons.kernels.rung import Rung

pytestmark = needs_the_emulator

ELEMENTS = 64 * 1024  # of the matrices at which rungs are counted
ROWS = 64


@pytest.fixture(autouse=True)
def without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it makes of a rung is test_lessons_kernels.py's."""
    monkeypatch.setattr(cuda_rung, "find_nvcc", lambda: None)


def test_every_rung_is_right_and_keeps_its_promises() -> None:
    counts = climbed(own_rungs("layer_norm"))
    # By hand: sectors of 8 floats. Three times x, once weight and bias, once y; mean and rstd of a row, a request each.
    naive, vectors, registers = (counts[stem] for stem in ("01_naive", "04_vector_loads", "05_row_in_registers"))
    assert naive["load sectors"] == 3 * ELEMENTS + 2 * ELEMENTS / 32
    assert naive["store sectors"] == ELEMENTS + 2 * ROWS / 8
    assert vectors["load sectors"] == 5 * ELEMENTS / 8
    assert vectors["load requests"] == 5 * ELEMENTS / 128
    assert registers["load sectors"] == 3 * ELEMENTS / 8
    assert registers["store sectors"] == ELEMENTS / 8 + 2 * ROWS
    # dy, x and weight once, mean and rstd of a row; eight lines of two sums.
    split = counts["09_bwd_split"]
    assert split["load sectors"] == 3 * ELEMENTS / 8 + 2 * ROWS + 8 * 2 * 1024 / 8
    assert split["store sectors"] == ELEMENTS / 8 + 8 * 2 * 1024 / 8 + 2 * 1024 / 8


@pytest.mark.full
def test_the_packages_kernels_keep_their_promises() -> None:
    climbed(package_rungs("layer_norm"))


@pytest.mark.full
@pytest.mark.parametrize("rung", own_rungs("layer_norm"), ids=lambda rung: rung.stem)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=" ".join)
def test_a_rung_is_right_in_every_schedule(rung: Rung, schedule: tuple[str, str]) -> None:
    assert fault(rung, *schedule) is None


@pytest.mark.full
def test_every_wait_is_missed() -> None:
    check_waits("layer_norm")
