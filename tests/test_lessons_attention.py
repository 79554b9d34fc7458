"""The CUDA ladder of attention: each rung is right, free of races, and as its header promises."""

from __future__ import annotations

import pytest
from cuda_ladder import SCHEDULES, check_waits, climbed, fault, needs_the_emulator, own_rungs, package_rungs

from lessons.kernels import cuda_rung
from lessons.kernels.rung import Rung

pytestmark = needs_the_emulator


@pytest.fixture(autouse=True)
def without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it makes of a rung is test_lessons_kernels.py's."""
    monkeypatch.setattr(cuda_rung, "find_nvcc", lambda: None)


def test_every_rung_is_right_and_keeps_its_promises() -> None:
    counts = climbed(own_rungs("attention"))
    # By hand, for two heads of 128 rows of 64 columns. Tiles of 16 x 32 scores, of which a head has 8 x 4, are 16 mma,
    # and as many for the values; on and below the diagonal lie 20 of the 32.
    assert counts["07_double_buffer"]["mma"] == 2 * 32 * 32
    assert counts["08_causal"]["mma"] == 2 * 20 * 32
    # Chunks of 16 bytes: q once, k and v for both blocks of queries, or for one of them half.
    assert counts["07_double_buffer"]["async copies"] == 2 * 8 * (128 + 2 * 2 * 128)
    assert counts["08_causal"]["async copies"] == 2 * 8 * (128 + 2 * (64 + 128))
    # Eight lanes have their 16 bytes of k in the same four banks, for each warp and key tile, and each four columns.
    turns = 2 * (4 * 4) * 4 * (64 // 4) * 4
    assert counts["02_tiled"]["bank conflicts"] == 7 * turns
    # Both (T, T) matrices out, and the three gradients.
    assert counts["10_bwd_naive"]["store sectors"] == 2 * (2 * 128 * 128 * 4 + 3 * 128 * 64 * 2) / 32


@pytest.mark.full
def test_the_packages_kernels_keep_their_promises() -> None:
    climbed(package_rungs("attention"))


@pytest.mark.full
@pytest.mark.parametrize("rung", own_rungs("attention"), ids=lambda rung: rung.stem)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=" ".join)
def test_a_rung_is_right_in_every_schedule(rung: Rung, schedule: tuple[str, str]) -> None:
    assert fault(rung, *schedule) is None


@pytest.mark.full
def test_every_wait_is_missed() -> None:
    check_waits("attention")
