"""The emulator finds what kernels do wrong, says where, and finds nothing where nothing is wrong."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cuda_kernels
import pytest
import torch
from conftest import INTERPRETING

from fastgpt import emulator

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="with a GPU, kernels run there")

SOURCE = cuda_kernels.FOLDER / "faults.cu"
UNINITIALISED = (
    "lds reads uninitialised shared memory (or another thread has yet to write it, and no barrier lies between)"
)

# What the emulator says, in order, and of which thread of block (1, 1, 0). A block has (32, 2, 1) threads, or more in y
# where they are a warpgroup. {here} is where the error is, at the line that says FAULT and not OTHER but for those
# AT_OTHER.
FAULTS = {
    "barrier_in_two_places": (
        "divergent barrier: __syncthreads is reached here, while thread 0 waits at {there}",
        "(0, 1, 0)",
    ),
    "barrier_and_warp": (
        "deadlock: no thread of the block can go on; threads 0 to 15 wait in __syncthreads at {here}; threads 16 to 31 "
        "wait in __syncwarp at {there}; threads 32 to 47 wait in __syncthreads at {here}; threads 48 to 63 wait in "
        "__syncwarp at {there}",
        "(0, 0, 0)",
    ),
    "named_barrier_of_too_many": (
        "deadlock: no thread of the block can go on; threads 0 to 31 wait in bar_sync at {here}; threads 32 to 63 have "
        "left",
        "(0, 0, 0)",
    ),
    "named_barrier_with_two_counts": ("bar_sync: thread 0 waits here for 64 threads, this one for 32", "(0, 1, 0)"),
    "named_barrier_of_part_of_a_warp": (
        "deadlock: no thread of the block can go on; threads 0 to 15 wait in bar_sync at {here}; threads 16 to 31 wait "
        "in __syncthreads at {there}; threads 32 to 47 wait in bar_sync at {here}; threads 48 to 63 wait in "
        "__syncthreads at {there}",
        "(0, 0, 0)",
    ),
    "named_barrier_of_no_whole_warp": ("bar_sync: 48 threads are not whole warps of a block of 64", "(0, 0, 0)"),
    "named_barrier_beyond_15": ("bar_sync: there is no barrier 16, only 1 to 15", "(0, 0, 0)"),
    "warp_in_two_operations": (
        "mismatched operations of a warp: __shfl_down_sync with mask ffffffff here, while lanes 0000007f are in "
        "__shfl_xor_sync with mask ffffffff at {there}",
        "(7, 0, 0)",
    ),
    "warp_in_two_places": (
        "mismatched operations of a warp: __syncwarp with mask ffffffff here, while lanes 0000ffff are in __syncwarp "
        "with mask ffffffff at {there}",
        "(16, 0, 0)",
    ),
    "warp_with_two_masks": (
        "mismatched operations of a warp: __ballot_sync with mask ffff0000 here, while lanes 0000ffff are in "
        "__ballot_sync with mask ffffffff at {here}",
        "(16, 0, 0)",
    ),
    "lane_outside_its_mask": ("__syncwarp: lane 3 is not in its own mask fffffff7", "(3, 0, 0)"),
    "warp_waits_for_who_left": ("__ballot_sync waits for lanes 40000000, which have left the kernel", "(0, 0, 0)"),
    "shared_beyond_its_end": (
        "sts: 4 bytes out of the bounds of the block's shared memory (at byte 256 of an array of 256)",
        "(31, 1, 0)",
    ),
    "shared_before_its_begin": (
        "lds: 4 bytes out of the bounds of the block's shared memory (at byte -4 of an array of 256)",
        "(0, 0, 0)",
    ),
    "dynamic_shared_beyond_its_end": (
        "sts: 4 bytes out of the bounds of the block's shared memory (at byte 256 of an array of 256)",
        "(31, 1, 0)",
    ),
    "dynamic_shared_of_no_size": (
        "sts: 4 bytes out of the bounds of the block's shared memory (the launch asked for no dynamic shared memory)",
        "(0, 0, 0)",
    ),
    "lds_misaligned": ("lds: 16 bytes at an address that is not a multiple of 16", "(31, 1, 0)"),
    "sts_misaligned": ("sts: 4 bytes at an address that is not a multiple of 4", "(0, 0, 0)"),
    "ldg_misaligned": ("ldg: 16 bytes at an address that is not a multiple of 16", "(0, 0, 0)"),
    "stg_misaligned": ("stg: 8 bytes at an address that is not a multiple of 8", "(0, 0, 0)"),
    "ldg_of_null": ("ldg: the address is null", "(0, 0, 0)"),
    "stg_to_null": ("stg: the address is null", "(0, 0, 0)"),
    "ldmatrix_misaligned": ("ldmatrix_x4: 16 bytes at an address that is not a multiple of 16", "(31, 1, 0)"),
    "copy_to_misaligned": ("cp_async_16: 16 bytes at an address that is not a multiple of 16", "(0, 0, 0)"),
    "copy_from_misaligned": ("cp_async_16: 16 bytes at an address that is not a multiple of 16", "(0, 0, 0)"),
    "copy_from_null": ("cp_async_16: the address is null", "(0, 0, 0)"),
    "uninitialised_read": (UNINITIALISED, "(5, 1, 0)"),
    "half_initialised_read": (UNINITIALISED, "(0, 0, 0)"),
    "read_after_write": (UNINITIALISED, "(0, 0, 0)"),
    "write_after_read": (
        "race: sts writes shared memory that thread 63 read at {there}, and no barrier lies between",
        "(31, 0, 0)",
    ),
    "write_after_write": (
        "race: sts writes shared memory that thread 0 wrote at {there}, and no barrier lies between",
        "(0, 1, 0)",
    ),
    "read_after_write_in_a_warp": (
        "race: lds reads shared memory that thread 30 wrote at {there}, and no barrier lies between",
        "(31, 0, 0)",
    ),
    "read_across_named_barriers": (UNINITIALISED, "(31, 0, 0)"),
    "copy_not_waited_for": (
        "lds: the asynchronous copy that thread 15 started at {there} has not been waited for",
        "(31, 1, 0)",
    ),
    "copy_of_another_without_barrier": (UNINITIALISED, "(0, 0, 0)"),
    "copy_never_committed": (
        "lds: the asynchronous copy that thread 0 started at {there} has not been waited for",
        "(0, 0, 0)",
    ),
    "copy_of_the_next_group": (
        "lds: the asynchronous copy that thread 0 started at {there} has not been waited for",
        "(0, 0, 0)",
    ),
    "copy_into_what_is_being_read": (
        "race: lds reads shared memory that thread 63 wrote at {there}, and no barrier lies between",
        "(31, 0, 0)",
    ),
    "copy_into_what_is_in_flight": (
        "cp_async_16: the asynchronous copy that thread 0 started at {there} has not been waited for",
        "(0, 0, 0)",
    ),
    "copy_beyond_the_end": (
        "cp_async_16: the thread leaves the kernel, and this asynchronous copy has not been waited for",
        "(0, 0, 0)",
    ),
    "mbarrier_of_nobody": ("mbar_arrive: no thread has initialised this mbarrier", "(31, 1, 0)"),
    "mbarrier_too_new": (
        "race: mbar_arrive reads shared memory that thread 0 wrote at {there}, and no barrier lies between",
        "(1, 0, 0)",
    ),
    "mbarrier_made_twice": ("mbar_init: thread 0 has made this mbarrier at {there} already", "(0, 0, 0)"),
    "mbarrier_of_no_arrivals": ("mbar_init: a phase has 1 to 1048575 arrivals, not 0", "(0, 0, 0)"),
    "parity_of_two": ("mbar_wait: a parity is 0 or 1, not 2", "(31, 1, 0)"),
    "mbarrier_not_waited_for": (
        "race: lds reads shared memory that thread 63 wrote at {there}, and no barrier lies between",
        "(0, 0, 0)",
    ),
    "lane_arrives_for_its_warp": (
        "race: lds reads shared memory that thread 0 wrote at {there}, and no barrier lies between",
        "(0, 1, 0)",
    ),
    "box_not_waited_for": ("lds: the copy of tma_load at {there} has not been waited for", "(30, 1, 0)"),
    "lane_waits_for_its_warp": ("lds: the copy of tma_load at {there} has not been waited for", "(31, 0, 0)"),
    "box_never_waited_for": ("tma_load: the block ends, and nobody has waited for this copy", "(0, 0, 0)"),
    "one_arrival_too_many": (
        "mbar_arrive_expect: this phase of the mbarrier has had all its arrivals (1)",
        "(1, 0, 0)",
    ),
    "arrival_never_comes": (
        "deadlock: no thread of the block can go on; threads 0 to 63 wait in mbar_wait at {here} for 1 arrival and "
        "1024 bytes",
        "(0, 0, 0)",
    ),
    "too_many_bytes_announced": (
        "deadlock: no thread of the block can go on; threads 0 to 63 wait in mbar_wait at {here} for 512 bytes",
        "(0, 0, 0)",
    ),
    "too_few_bytes_announced": (
        "deadlock: no thread of the block can go on; threads 0 to 63 wait in mbar_wait at {here} for the announcement "
        "of 128 bytes",
        "(0, 0, 0)",
    ),
    "no_bytes_announced": (
        "deadlock: no thread of the block can go on; threads 0 to 63 wait in mbar_wait at {here} for the announcement "
        "of 1024 bytes",
        "(0, 0, 0)",
    ),
    "mbarrier_not_fenced": (
        "tma_load: no mbar_fence_init of thread 0 has followed its mbar_init at {there}",
        "(0, 0, 0)",
    ),
    "box_to_misaligned": (
        "tma_load: its destination is no multiple of 1024 bytes from the begin of shared memory",
        "(0, 0, 0)",
    ),
    "box_to_less_aligned_memory": (
        "tma_load: the kernel's DYNAMIC_SHARED is aligned to 128 bytes, and TMA needs DYNAMIC_SHARED_ALIGNED to 1024",
        "(0, 0, 0)",
    ),
    "box_to_an_array": ("tma_load: this is not in the dynamic shared memory", "(0, 0, 0)"),
    "box_beyond_the_end": (
        "tma_load: a box of 1024 bytes at byte 24576 of the 24576 of the dynamic shared memory",
        "(0, 0, 0)",
    ),
    "slot_not_waited_for": ("tma_load: the copy of tma_load at {here} has not been waited for", "(0, 0, 0)"),
    "slot_released_for_a_warp": (
        "race: tma_load writes shared memory that thread 33 read at {there}, and no barrier lies between",
        "(0, 0, 0)",
    ),
    "product_without_fence": (
        "wgmma_m64n128k16: no wgmma_fence lies between the kernel's begin or a wgmma_wait and this",
        "(31, 0, 0)",
    ),
    "product_never_waited_for": (
        "wgmma_m64n128k16: the warp leaves the kernel, and this product has not been waited for",
        "(31, 0, 0)",
    ),
    "product_never_committed": (
        "wgmma_m64n128k16: the warp leaves the kernel, and this product has not been waited for",
        "(31, 0, 0)",
    ),
    "released_without_wgmma_wait": (
        "race: tma_load writes shared memory that thread 0 read at {there}, and no barrier lies between",
        "(0, 4, 0)",
    ),
    "released_before_wgmma_wait": (
        "race: tma_load writes shared memory that thread 0 read at {there}, and no barrier lies between",
        "(0, 4, 0)",
    ),
    "operand_overwritten": (
        "race: wgmma_m64n128k16 reads shared memory until wgmma_wait, and thread 0's write at {there} comes before",
        "(31, 0, 0)",
    ),
    "operand_not_waited_for": (
        "wgmma_m64n128k16: the copy of tma_load at {there} has not been waited for",
        "(30, 0, 0)",
    ),
    "descriptors_of_two_kinds": ("wgmma_m64n128k16: lanes 0 and 5 have different descriptors", "(30, 0, 0)"),
    "some_lanes_add": ("wgmma_m64n128k16: of lanes 0 and 16 only one adds", "(30, 0, 0)"),
    "warps_with_different_products": (
        "wgmma_m64n128k16: warp 0, of the same warpgroup, has started another product in this one's place, at {here}",
        "(30, 2, 0)",
    ),
    "warp_without_product": (
        "wgmma: warp 0 of the warpgroup has started this product, and warp 3 leaves without",
        "(0, 0, 0)",
    ),
    "product_of_a_fifth_warp": (
        "wgmma_m64n128k16: warp 4 is not of four that are a warpgroup, in a block of 160 threads",
        "(30, 4, 0)",
    ),
    "product_of_no_tile": (
        "wgmma_m64n128k16: 0000004000000040 does not describe a matrix swizzled by 128 bytes",
        "(30, 0, 0)",
    ),
    "product_beyond_the_end": (
        "wgmma_m64n128k16: a descriptor leads to byte 24576 of 24576 of the dynamic shared memory",
        "(30, 0, 0)",
    ),
    "address_of_an_array": ("shared_address: this is not in the dynamic shared memory", "(0, 0, 0)"),
    "shared_arrays_of_49_kib": (
        "SHARED: 50176 bytes of shared memory are more than a block can have in arrays (49152)",
        "(0, 0, 0)",
    ),
}
AT_OTHER = ("write_after_write", "copy_into_what_is_being_read")
LAUNCHES = {
    "too_much_shared_memory": "232449 bytes of shared memory are more than a block can have (232448)",
    "block_of_no_threads": "a block of (32, 0, 1) threads is not possible",
    "block_of_too_many_threads": "a block of (32, 33, 1) threads is not possible",
    "block_too_deep": "a block of (1, 1, 65) threads is not possible",
    "grid_too_high": "a grid of (1, 65536, 1) blocks is not possible",
}
MAPS = {
    "map_of_misaligned_data": "data that is aligned to 16 bytes",
    "map_of_no_size": "sizes of 1 to 2^32",
    "map_of_odd_stride": "strides that are multiples of 16 bytes",
    "map_of_large_stride": "strides below 2^40 bytes",
    "map_of_high_box": "boxes of 1 to 256 rows",
}
NO_FAULTS = ("barrier_after_some_left",)
UNSEEN = (
    "race_between_blocks",
    "race_between_threads",
    "race_past_an_mbarrier",
    "race_with_a_box",
    "global_beyond_its_end",
)

SCHEDULES = list(itertools.product(emulator.ORDERS, emulator.COPIES, (0, 1, 2)))


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return cuda_kernels.load()


def run(kernels: ModuleType, name: str, planted: bool) -> list[float]:
    data = torch.zeros(1024)
    kernels.fault(name, planted, data.data_ptr())
    return data.tolist()


def said_of(kernels: ModuleType, name: str) -> str:
    with pytest.raises(RuntimeError) as caught:
        run(kernels, name, True)
    return str(caught.value)


def place(marker: str, name: str) -> str:
    lines = SOURCE.read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if line.endswith(f"// {marker} {name}")]
    return f"faults.cu:{found[0]}" if found else "nowhere"


def test_every_fault_has_its_sentence(kernels: ModuleType) -> None:
    assert sorted(kernels.fault_names()) == sorted([*FAULTS, *LAUNCHES, *MAPS, *NO_FAULTS, *UNSEEN])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_in_order(kernels: ModuleType, name: str) -> None:
    sentence, thread = FAULTS[name]
    here, there = place("FAULT", name), place("OTHER", name)
    if name in AT_OTHER:
        here, there = there, here
    wanted = (
        f"{here}: {sentence.format(here=here, there=there)} [kernel {name}, block (1, 1, 0), thread {thread}; order "
        "in_order, copies eager, seed 0]"
    )
    assert said_of(kernels, name) == wanted


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_in_every_schedule(kernels: ModuleType, name: str) -> None:
    lines = {place("FAULT", name), place("OTHER", name)}
    for order, copies, seed in SCHEDULES:
        with emulator.schedule(order, copies, seed):
            said = said_of(kernels, name)
        where = rf"\[kernel {name}, block \(1, 1, 0\), thread \(\d+, [0-4], 0\); "
        assert re.search(rf"{where}order {order}, copies {copies}, seed {seed}\]$", said), said
        assert said.split(": ")[0] in lines


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_that_no_gpu_takes_is_refused(kernels: ModuleType, name: str) -> None:
    assert said_of(kernels, name) == f"{place('FAULT', name)}: {LAUNCHES[name]} [kernel nothing]"


@pytest.mark.parametrize("name", MAPS)
def test_a_tensor_map_that_no_gpu_takes_is_refused(kernels: ModuleType, name: str) -> None:
    assert said_of(kernels, name) == f"fastgpt: a tensor map needs {MAPS[name]}"


def test_without_its_fault_no_kernel_is_accused(kernels: ModuleType) -> None:
    for order, copies, seed in SCHEDULES:
        with emulator.schedule(order, copies, seed):
            for name in kernels.fault_names():
                run(kernels, name, False)
            for name in NO_FAULTS:
                run(kernels, name, True)


@pytest.fixture
def one_worker() -> Iterator[None]:
    """One thread of the processor, so that blocks, too, run one after the other."""
    module = emulator.load()
    before, settings = module.settings(), module.settings()
    settings.workers = 1
    module.configure(settings)
    yield
    module.configure(before)


@pytest.mark.usefixtures("one_worker")
@pytest.mark.parametrize("name", ["race_between_blocks", "race_between_threads"])
def test_a_race_on_global_memory_changes_with_the_schedule(kernels: ModuleType, name: str) -> None:
    def results(planted: bool) -> list[list[float]]:
        found = []
        for order in emulator.ORDERS:
            with emulator.schedule(order, seed=3):
                found.append(run(kernels, name, planted))
        return found

    right = results(False)
    assert all(result == right[0] for result in right)
    assert any(result != right[0] for result in results(True)[1:])


def test_a_seed_gives_the_same_error_again(kernels: ModuleType) -> None:
    def errors() -> list[str]:
        found = []
        for seed in range(10):
            with emulator.schedule("random", seed=seed):
                found.append(said_of(kernels, "read_after_write"))
        return found

    first = errors()
    assert errors() == errors() == first
    assert len({error.split(";")[0] for error in first}) > 1, "another seed, another thread"


def test_after_an_error_all_is_as_before(kernels: ModuleType) -> None:
    right = run(kernels, "uninitialised_read", False)
    for name in FAULTS:
        said_of(kernels, name)
        assert run(kernels, "uninitialised_read", False) == right


def test_a_wait_that_is_switched_off_is_a_fault(kernels: ModuleType) -> None:
    """What the mutants of the kernels' tests rely on."""
    module = emulator.load()
    waits = {
        "read_after_write": "__syncthreads",
        "copy_not_waited_for": "cp_async_wait",
        "box_not_waited_for": "mbar_wait",
        "product_never_waited_for": "wgmma_wait",
    }
    for name, wait in waits.items():
        run(kernels, name, False)
        line = int(place("OTHER", name).split(":")[1])
        ours = [w for w in module.waits() if w.file == "faults.cu" and w.name == wait and 0 < w.line - line < 4]
        assert len(ours) == 1
        module.switch_off("faults.cu", ours[0].line)
        try:
            with pytest.raises(RuntimeError, match=r"uninitialised|has not been waited for"):
                run(kernels, name, False)
        finally:
            module.switch_all_on()
        run(kernels, name, False)
    with pytest.raises(RuntimeError, match=r"^no wait at faults.cu:1 has been reached$"):
        module.switch_off("faults.cu", 1)


def test_the_counters_name_the_kernels(kernels: ModuleType) -> None:
    module = emulator.load()
    module.reset_counters()
    run(kernels, "read_after_write", False)
    run(kernels, "read_after_write", False)
    counters = module.counters()
    assert list(counters) == ["read_after_write"]
    found = counters["read_after_write"]
    assert (found.launches, found.blocks, found.barriers, found.shared_accesses) == (2, 8, 8, 8 * 64 * 2)


@pytest.mark.skipif("-fsanitize=address" not in os.environ.get("FASTGPT_EMULATE_CFLAGS", ""), reason="needs ASan")
def test_what_asan_says_of_global_memory_beyond_its_end() -> None:
    """`make sanitize-cuda` runs this. The report ends the process, which therefore is another one."""
    code = "import torch, cuda_kernels; x = torch.zeros(1024); cuda_kernels.load().fault({!r}, True, x.data_ptr())"
    command = [sys.executable, "-c", code.format("global_beyond_its_end")]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr
    assert place("FAULT", "global_beyond_its_end") in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"order": "backwards"},
            "the emulator's order must be one of in_order, reversed, random, skewed, got 'backwards'",
        ),
        ({"copies": "late"}, "the emulator's copies must be one of eager, lazy, got 'late'"),
        ({"seed": -1}, "the emulator's seed must be in [0, 2^64), got -1"),
        ({"seed": 2**64}, "the emulator's seed must be in [0, 2^64), got 18446744073709551616"),
    ],
)
def test_a_wrong_schedule_is_an_error(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"), emulator.schedule(**arguments):  # type: ignore
        pass


def test_the_environment_names_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "FASTGPT_EMULATE_ORDER", "skewed")
    monkeypatch.setitem(os.environ, "FASTGPT_EMULATE_COPIES", "lazy")
    monkeypatch.setitem(os.environ, "FASTGPT_EMULATE_SEED", "7")
    assert emulator._schedule_from_environment() == {"order": "skewed", "copies": "lazy", "seed": 7}


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("ORDER", "fast", "FASTGPT_EMULATE_ORDER must be one of in_order, reversed, random, skewed, got 'fast'"),
        ("COPIES", "none", "FASTGPT_EMULATE_COPIES must be one of eager, lazy, got 'none'"),
        ("SEED", "-1", "FASTGPT_EMULATE_SEED must be a number in [0, 2^64), got '-1'"),
        ("SEED", "x", "FASTGPT_EMULATE_SEED must be a number in [0, 2^64), got 'x'"),
        ("CFLAGS", "'-O0", """FASTGPT_EMULATE_CFLAGS must be words for a shell, got "'-O0" (No closing quotation)"""),
        ("", "yes", "FASTGPT_EMULATE must be one of 0, 1, got 'yes'"),
    ],
)
def test_a_wrong_variable_is_why_it_cannot_be_built(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str
) -> None:
    monkeypatch.setitem(os.environ, f"FASTGPT_EMULATE_{variable}".removesuffix("_"), value)
    assert emulator.missing() == sentence
