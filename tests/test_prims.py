"""Each primitive that CUDA kernels are written with, against plain code: on a GPU, or in the emulator without one."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from types import ModuleType

import cuda_kernels
import philox
import pytest
import torch
from conftest import INTERPRETING
from error_rule import DEVICE
from torch import Tensor

from fastgpt import emulator

HALVES = (torch.bfloat16, torch.float16)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
SCHEDULES = [("in_order", "eager", 0), ("reversed", "lazy", 0), ("random", "eager", 1), ("skewed", "lazy", 2)]
needs_hopper = pytest.mark.skipif(
    not INTERPRETING and not cuda_kernels.has_hopper(), reason="it needs a GPU of compute capability 9.0"
)
only_emulated = pytest.mark.skipif(not INTERPRETING, reason="the emulator counts")


@pytest.fixture(
    params=SCHEDULES if INTERPRETING else [None], autouse=True, ids=lambda s: "-".join(map(str, s or ["gpu"]))
)
def any_schedule(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param is None:
        yield
        return
    with emulator.schedule(*request.param):
        yield


def run(name: str, x: Tensor | None, out: Tensor, n: int = 0) -> Tensor:
    """``out``, on the CPU, once the kernel of that name in prims.cu has written it."""
    x = None if x is None else x.contiguous().to(DEVICE)
    out = out.to(DEVICE)
    cuda_kernels.load().prim(name, 0 if x is None else x.data_ptr(), out.data_ptr(), n)
    return out.cpu()


def ints(*shape: int) -> Tensor:
    return torch.full(shape, -7, dtype=torch.int32)


def floats(*shape: int) -> Tensor:
    return torch.full(shape, math.nan)


def bits(x: Tensor) -> Tensor:
    """16-bit numbers as what they are made of."""
    return x.view(torch.int16)


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_every_thread_knows_where_it_is(depth: int) -> None:
    block, grid = (4, 2, 8), (2, 3, depth)
    got = run("grid", None, ints(6 * depth * 64 + 1, 12), depth)
    wanted = []
    for z, y, x in itertools.product(*map(range, reversed(grid))):
        for tz, ty, tx in itertools.product(*map(range, reversed(block))):
            wanted.append([tx, ty, tz, x, y, z, *block, *grid])
    assert got[:-1].tolist() == wanted
    assert got[-1].tolist() == [-7] * 12


def test_lanes_and_warps() -> None:
    assert run("lanes", None, ints(96, 2)).tolist() == [[i % 32, i // 32] for i in range(96)]


@pytest.mark.parametrize("name", ["move_1", "move_2", "move_4", "move_8", "move_16"])
@pytest.mark.parametrize("through", ["", "shared_"])
def test_bytes_move(name: str, through: str) -> None:
    if through and name == "move_1":
        return  # shared memory is accessed two bytes at a time or more
    x = torch.randint(256, (1600,), dtype=torch.uint8)
    out = torch.zeros(1616, dtype=torch.uint8)
    got = run(name.replace("move_", f"move_{through}"), x, out, 1600)
    assert torch.equal(got[:1600], x)
    assert not got[1600:].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool) -> None:
    x = torch.randint(2**16, (4, 8, 8))  # matrix, row, column
    got = run("ldmatrix_x4_trans" if transposed else "ldmatrix_x4", x.to(torch.uint16), ints(32, 4)).view(torch.uint16)
    for lane, i in itertools.product(range(32), range(4)):
        for half in (0, 1):
            row, column = lane // 4, 2 * (lane % 4) + half
            if transposed:
                row, column = column, row
            assert got.view(32, 4, 2)[lane, i, half].item() == x[i, row, column].item()


def multiply(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    packed = torch.cat([bits(a).flatten(), bits(b).flatten(), c.flatten().view(torch.int16)])
    return run(f"mma_{NAMES[a.dtype]}", packed, floats(16, 8))


@pytest.mark.parametrize("dtype", HALVES)
def test_mma_multiplies(dtype: torch.dtype) -> None:
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    wanted = a.double() @ b.double() + c.double()
    # A tensor core may cut off the bits of a sum below those of its largest term.
    largest = (a.double().abs() @ b.double().abs() + c.double().abs()).amax()
    assert (multiply(a, b, c).double() - wanted).abs().amax() <= 2**-20 * largest


@pytest.mark.parametrize("dtype", HALVES)
def test_mma_of_small_whole_numbers_is_exact(dtype: torch.dtype) -> None:
    a, b = torch.randint(-8, 9, (16, 16)).to(dtype), torch.randint(-8, 9, (16, 8)).to(dtype)
    c = torch.randint(-99, 99, (16, 8)).float()
    assert torch.equal(multiply(a, b, c), a.float() @ b.float() + c)


@pytest.mark.parametrize("dtype", HALVES)
def test_mma_of_every_kind_of_number(dtype: torch.dtype) -> None:
    """Subnormal, largest, infinite elements and one that is not a number, on either side, times one."""
    info = torch.finfo(dtype)
    kinds = [info.tiny / 2, -info.tiny / 4, info.tiny, -info.tiny * (1 + info.eps), info.max, -info.max, math.inf]
    kinds += [-math.inf, math.nan, 0.0, -0.0, 1.0, 1.0 + info.eps, info.eps, -3.0, 0.1]
    for k, kind in enumerate(torch.tensor(kinds, dtype=dtype)):
        a, b, c = torch.zeros(16, 16, dtype=dtype), torch.zeros(16, 8, dtype=dtype), torch.zeros(16, 8)
        for left, right in ((kind, 1.0), (1.0, kind)):
            a[k, k], b[k] = left, right
            wanted = kind.float().expand(8)
            torch.testing.assert_close(multiply(a, b, c)[k], wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [0, 1, 33, 64])
def test_copies_arrive_and_the_rest_is_zero(n: int) -> None:
    x = torch.randn(64, 4)
    wanted = x.clone()
    wanted[n:] = 0.0
    assert torch.equal(run("copy", x, floats(64, 4), n), wanted)


def test_a_copy_that_is_not_valid_reads_nothing() -> None:
    assert not run("copy", None, floats(64, 4), 0).any()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 11])
def test_copies_in_groups(n: int) -> None:
    x = torch.randn(n, 128)
    assert torch.equal(run("copy_in_groups", x, floats(n, 128), n), x)


@pytest.mark.parametrize("n", [1, 5, 64])
def test_two_halves_of_a_block_wait_apart(n: int) -> None:
    x = torch.randint(1000, (2, 64), dtype=torch.int32)
    wanted = [x[half].roll(-n * (half + 1)) + n * (half + 1) for half in (0, 1)]
    assert torch.equal(run("halves", x, ints(2, 64), n), torch.stack(wanted))


@pytest.mark.parametrize("n", [0, 1, 7, 16, 31])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_shuffles(n: int, dtype: torch.dtype) -> None:
    x = torch.randint(1000, (32,)).to(dtype)
    got = run(f"shuffles_{'int' if dtype == torch.int32 else 'float'}", x, torch.zeros(5, 32, dtype=dtype), n)
    lanes = range(32)
    sources = [
        [(5 * lane + n) % 32 for lane in lanes],
        [lane ^ n for lane in lanes],
        [lane - n if lane >= n else lane for lane in lanes],
        [lane + n if lane + n < 32 else lane for lane in lanes],
    ]
    assert got[:4].tolist() == [[x[source].item() for source in row] for row in sources]
    assert got[4].tolist() == [x[lane ^ n % 16].item() if lane < 16 else 0 for lane in lanes]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", ["some", "none", "all", "lower", "last"])
def test_votes(apart: bool, kind: str) -> None:
    x = torch.randint(0, 2, (32,), dtype=torch.int32) * 5
    x = {
        "some": x,
        "none": x * 0,
        "all": x * 0 - 1,
        "lower": (torch.arange(32) < 16).int(),
        "last": (torch.arange(32) == 31).int(),
    }[kind]
    got = run("votes", x, ints(3, 32), int(apart)).tolist()
    for lane in range(32):
        group = range(lane // 16 * 16, lane // 16 * 16 + 16) if apart else range(32)
        voters = [i for i in group if x[i]]
        assert got[0][lane] & 0xFFFFFFFF == sum(1 << i for i in voters)
        assert got[1][lane] == bool(voters)
        assert got[2][lane] == (len(voters) == len(group))


def test_the_halves_of_a_warp_go_their_own_ways() -> None:
    x, n = torch.randint(6, (32,), dtype=torch.int32), 5
    low = sum(sum(1 << lane for lane in range(16) if x[lane] > i) for i in range(n))
    high = [sum(x[lane ^ (1 + i % 15)].item() for i in range(2 * n)) for lane in range(16, 32)]
    assert run("warp_in_two", x, ints(32), n).tolist() == [low] * 16 + high


def test_sums_and_maxima_of_a_warp() -> None:
    x = torch.randn(32)
    got = run("reductions", x, floats(2, 32))
    assert torch.equal(got, got[:, :1].expand(2, 32)), "every lane gets the same bits"
    torch.testing.assert_close(got[0, 0].double(), x.double().sum(), rtol=1e-6, atol=1e-6)
    assert got[1, 0] == x.max()


def test_a_warp_that_waits_exchanges() -> None:
    x = torch.randint(1000, (32,), dtype=torch.int32)
    assert torch.equal(run("exchange", x, ints(32), 50), x.roll(-50))


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_become_floats(dtype: torch.dtype) -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    torch.testing.assert_close(
        run(f"widen_{NAMES[dtype]}", x, floats(2**16), 2**16), x.float(), rtol=0, atol=0, equal_nan=True
    )


def some_floats(dtype: torch.dtype) -> Tensor:
    """Random ones of every size, what lies in the middle of two halves and beside it, and the ends."""
    random = torch.randint(-(2**31), 2**31, (20000,)).to(torch.int32).view(torch.float32)
    halves = torch.randint(2**16, (5000,)).to(torch.uint16).view(dtype).float()
    between = (halves + torch.randint(2**16, (5000,)).to(torch.uint16).view(dtype).float()) / 2
    cut = 13 if dtype == torch.float16 else 16
    middle = ((random.view(torch.int32) >> cut << cut) + (1 << (cut - 1))).view(torch.float32)
    beside = (middle.view(torch.int32) + torch.randint(-1, 2, middle.shape).int()).view(torch.float32)
    ends = torch.tensor([0.0, -0.0, math.inf, -math.inf, 65504.0, 65519.99, 65520.0, 3.3895e38, 3.4e38, 2**-24, 2**-25])
    found = torch.cat([random, halves, between, middle, beside, ends, -ends])
    return found[: found.numel() // 2 * 2]


@pytest.mark.parametrize("dtype", HALVES)
def test_floats_become_halves(dtype: torch.dtype) -> None:
    x = some_floats(dtype)
    wanted = x.to(dtype)
    number = ~x.isnan()
    single = run(f"narrow_{NAMES[dtype]}", x, torch.zeros_like(wanted), x.numel())
    assert torch.equal(bits(single)[number], bits(wanted)[number])
    assert single[~number].isnan().all()
    pairs = run(f"pack_{NAMES[dtype]}", x, torch.zeros_like(wanted), x.numel() // 2)
    assert torch.equal(bits(pairs)[number], bits(wanted)[number]), "the first of two is the lower half"
    assert pairs[~number].isnan().all()


def test_fast_exp2() -> None:
    x = torch.cat([torch.empty(20000).uniform_(-130, 130), torch.arange(-127.0, 130.0), torch.tensor([0.0, -0.0])])
    got = run("fast_exp2", x, floats(x.numel()), x.numel()).double()
    wanted = torch.exp2(x.double())
    normal = (wanted >= 2.0**-125) & (wanted < 2.0**127)
    assert ((got - wanted).abs() <= 2**-22 * wanted)[normal].all()
    assert (got[wanted < 2.0**-126 * (1 - 2**-22)] == 0).all()
    special = run("fast_exp2", torch.tensor([math.inf, -math.inf, 200.0, -200.0, math.nan]), floats(5), 5)
    torch.testing.assert_close(special, torch.tensor([math.inf, 0.0, math.inf, 0.0, math.nan]), equal_nan=True)


def test_intrinsics() -> None:
    x = torch.empty(5000).uniform_(0.01, 20)
    got = run("intrinsics", x, floats(5000, 4), 5000)
    wanted = torch.stack([x.double().exp(), x.double().log(), 1 / x.double(), x.double().rsqrt()], 1)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 0x1234_5678_9ABC_DEF0])
def test_random_words(seed: int) -> None:
    n = 40
    got = run("words", torch.tensor([seed]), ints(n, 2, 4), n).view(torch.uint32)
    key = philox.key_of(seed)
    for i in range(n):
        assert tuple(got[i, 0].tolist()) == philox.philox((i, 3, 0, 0), key)
        assert tuple(got[i, 1].tolist()) == philox.philox((i, i, 2, 0), key)


def run_sm90(name: str, x: Tensor, out: Tensor, n: int = 0) -> Tensor:
    """The same of prims_sm90.cu; ``out`` itself stays as it is."""
    x, out = x.contiguous().to(DEVICE), out.clone().to(DEVICE)
    cuda_kernels.load().prim_sm90(name, x.data_ptr(), out.data_ptr(), n)
    return out.cpu()


@needs_hopper
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 12])
def test_mbarriers_hand_a_ring_to_and_fro(n: int) -> None:
    x = torch.randint(1000, (n, 32), dtype=torch.int32)
    assert torch.equal(run_sm90("ring", x, ints(n, 32), n), x.roll(-1, 1)), "n phases of two barriers"


BOXES = [
    (0, 0, 0, 0),  # within
    (8, 5, 2, 1),
    (16, 0, 1, 1),
    (3, 7, 1, 0),  # no multiple of 16 bytes
    (32, 30, 0, 1),  # over the end of rows and columns
    (79, 39, 2, 1),
    (-5, -3, 1, 0),  # begins before
    (-63, -15, 2, 1),
    (80, 0, 0, 0),  # outside
    (-64, 0, 0, 0),
    (0, 40, 0, 0),
    (0, -256, 1, 0),
    (0, 0, 3, 0),
    (0, 0, -1, 0),
    (0, 0, 0, 2),
    (0, 0, 0, -1),
    (-(2**30), 2**30, 0, 0),
]


@needs_hopper
@pytest.mark.parametrize("rows", [1, 16, 256])
@pytest.mark.parametrize("at", BOXES, ids=str)
def test_boxes_of_a_tensor(at: tuple[int, ...], rows: int) -> None:
    x = torch.randint(-(2**15), 2**15, (2, 40, 3, 80)).to(torch.int16)
    begin = torch.tensor([*at, 0, 0, 0, 0], dtype=torch.int32)
    got = run_sm90(f"box_{rows}", torch.cat([begin.view(torch.int16), x.flatten()]), torch.ones(rows, 8, 8).short())
    tensor, wanted = x.transpose(1, 2), torch.zeros(rows, 64, dtype=torch.int16)
    if 0 <= at[3] < 2 and 0 <= at[2] < 3:
        plane = tensor[at[3], at[2]]
        r = [i for i in range(rows) if 0 <= at[1] + i < 40]
        c = [i for i in range(64) if 0 <= at[0] + i < 80]
        if r and c:
            box = plane[at[1] + r[0] : at[1] + r[-1] + 1, at[0] + c[0] : at[0] + c[-1] + 1]
            wanted[r[0] : r[-1] + 1, c[0] : c[-1] + 1] = box
    chunks = torch.arange(8) ^ torch.arange(rows)[:, None] % 8
    assert torch.equal(got.gather(1, chunks[:, :, None].expand(-1, -1, 8)).view(rows, 64), wanted)


def hold_to_exact(got: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    a, b, c = a.double(), b.double(), c.double()
    largest = (a.abs() @ b.abs() + c.abs()).amax()
    assert (got.double() - (a @ b + c)).abs().amax() <= 2**-20 * largest


@needs_hopper
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_wgmma_of_tiles(dtype: torch.dtype, add: bool) -> None:
    """Two warpgroups, each with 64 rows of a tile; 16 columns after the other, of two times 64."""
    a, b, c = torch.randn(128, 128).to(dtype), torch.randn(128, 128).to(dtype), torch.randn(128, 128)
    got = run_sm90(f"wgmma_m64n128k16_{NAMES[dtype]}", torch.stack([a, b]), c, int(add))
    hold_to_exact(got, a, b.T, c if add else torch.zeros_like(c))


@needs_hopper
@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize("dtype", HALVES)
def test_wgmma_of_registers(dtype: torch.dtype, n: int) -> None:
    """16 rows after the other, of columns in one or two times 64."""
    a, b, c = torch.randn(64, 64).to(dtype), torch.randn(64, n).to(dtype), torch.randn(64, n)
    got = run_sm90(f"wgmma_m64n{n}k16_registers_{NAMES[dtype]}", torch.cat([a.flatten(), b.flatten()]), c)
    hold_to_exact(got, a, b, c)


@needs_hopper
@pytest.mark.parametrize("dtype", HALVES)
def test_wgmma_of_small_whole_numbers_is_exact(dtype: torch.dtype) -> None:
    a, b = (torch.randint(-8, 9, (128, 128)).to(dtype) for _ in range(2))
    c = torch.randint(-99, 99, (128, 128)).float()
    got = run_sm90(f"wgmma_m64n128k16_{NAMES[dtype]}", torch.stack([a, b]), c, 1)
    assert torch.equal(got, a.float() @ b.float().T + c)
    a, b, c = a[:64, :64], b[:64], c[:64]
    got = run_sm90(f"wgmma_m64n128k16_registers_{NAMES[dtype]}", torch.cat([a.flatten(), b.flatten()]), c)
    assert torch.equal(got, a.float() @ b.float() + c)


@only_emulated
def test_products_and_copies_are_counted() -> None:
    module = emulator.load()
    module.reset_counters()
    run_sm90("wgmma_m64n128k16_bf16", torch.zeros(2, 128, 128, dtype=torch.bfloat16), floats(128, 128))
    run_sm90("wgmma_m64n64k16_registers_bf16", torch.zeros(2, 64, 64, dtype=torch.bfloat16), floats(64, 64))
    registers, tiles = module.counters().values()
    assert (tiles.mma, tiles.copies) == (8 * 8 * 16, 4), "by each of 8 warps: 8 times 16 of m16n8k16"
    assert (registers.mma, registers.copies) == (4 * 4 * 8, 1)


def conflicts(name: str, n: int) -> int:
    module = emulator.load()
    module.reset_counters()
    with emulator.schedule(count_banks=True):
        cuda_kernels.load().prim(name, 0, 0, n)
    (counters,) = module.counters().values()
    return counters.bank_conflicts


@only_emulated
@pytest.mark.parametrize(
    ("stride", "wanted"), [(0, 0), (1, 0), (2, 1), (3, 0), (4, 3), (8, 7), (16, 15), (31, 0), (32, 31), (33, 0)]
)
def test_conflicts_of_floats(stride: int, wanted: int) -> None:
    assert conflicts("lds_strided", stride) == wanted


@only_emulated
@pytest.mark.parametrize("chunk", range(8))
def test_conflicts_of_rows_of_128_bytes(chunk: int) -> None:
    """8 lanes at a time read 16 bytes each: all from the same banks, or each from its own."""
    assert conflicts("lds_rows", chunk) == 4 * 7
    assert conflicts("lds_rows_swizzled", chunk) == 0


@only_emulated
@pytest.mark.parametrize(("elements", "wanted"), [(8, 0), (16, 4 * 1), (32, 4 * 3), (64, 4 * 7), (72, 0), (40, 0)])
def test_conflicts_of_ldmatrix(elements: int, wanted: int) -> None:
    assert conflicts("ldmatrix_rows", elements) == wanted


def traffic(module: ModuleType) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Requests, sectors and bytes of what one kernel loaded, and of what it stored."""
    (counters,) = module.counters().values()
    loads, stores = ((t.requests, t.sectors, t.bytes) for t in (counters.loads, counters.stores))
    return loads, stores


@pytest.fixture
def counting_memory(any_schedule: None) -> Iterator[ModuleType]:
    """The emulator, which counts requests for memory in the test's schedule."""
    module = emulator.runtime()
    before = module.settings()
    settings = module.settings()
    settings.count_memory = True
    module.configure(settings)
    module.reset_counters()
    yield module
    module.configure(before)


NONE = (0, 0, 0)
MEMORY = torch.zeros(32 * 64)  # its begin is aligned to a sector, as every tensor's is


@only_emulated
@pytest.mark.parametrize("direction", ["ldg", "stg"])
@pytest.mark.parametrize(
    ("elements", "stride", "sectors"),
    [
        ("fp32", 0, 1),  # all the same word
        ("fp32", 1, 4),
        ("fp32", 2, 8),
        ("fp32", 3, 12),
        ("fp32", 8, 32),
        ("fp32", 32, 32),
        ("fp16", 1, 2),
        ("fp16", 2, 4),
        ("fp16", 16, 32),
        ("vectors", 1, 16),
        ("vectors", 2, 32),
        ("vectors", 0, 1),
    ],
)
def test_sectors_of_a_request(
    counting_memory: ModuleType, direction: str, elements: str, stride: int, sectors: int
) -> None:
    address = MEMORY.data_ptr()
    cuda_kernels.load().prim(f"{direction}_strided_{elements}", address, address, stride)
    wanted = (1, sectors, 32 * {"fp16": 2, "fp32": 4, "vectors": 16}[elements])
    assert traffic(counting_memory) == ((wanted, NONE) if direction == "ldg" else (NONE, wanted))


@only_emulated
@pytest.mark.parametrize(("first", "sectors"), [(0, 4), (1, 5), (7, 5), (8, 4)])
def test_sectors_of_a_request_that_is_not_aligned(counting_memory: ModuleType, first: int, sectors: int) -> None:
    cuda_kernels.load().prim("ldg_offset", MEMORY.data_ptr(), 0, first)
    assert traffic(counting_memory) == ((1, sectors, 128), NONE)


@only_emulated
@pytest.mark.parametrize(("lanes", "sectors"), [(1, 1), (8, 1), (9, 2), (31, 4), (32, 4)])
def test_sectors_of_part_of_a_warp(counting_memory: ModuleType, lanes: int, sectors: int) -> None:
    cuda_kernels.load().prim("ldg_of_some_lanes", MEMORY.data_ptr(), 0, lanes)
    assert traffic(counting_memory) == ((lanes, lanes * sectors, lanes * lanes * 4), NONE)


@only_emulated
def test_lanes_that_went_another_way_count_anew_where_the_warp_meets(counting_memory: ModuleType) -> None:
    cuda_kernels.load().prim("ldg_after_a_branch", MEMORY.data_ptr(), 0, 12)
    assert traffic(counting_memory) == ((2, 2 + 4, 4 * (12 + 32)), NONE)


@only_emulated
def test_a_load_and_a_store_in_one_line_are_two_requests(counting_memory: ModuleType) -> None:
    cuda_kernels.load().prim("ldg_and_stg", MEMORY.data_ptr(), MEMORY.data_ptr() + 256, 0)
    assert traffic(counting_memory) == ((1, 2, 64), (1, 2, 64))


@only_emulated
def test_sectors_of_asynchronous_copies(counting_memory: ModuleType) -> None:
    out = floats(256)
    cuda_kernels.load().prim("copy", MEMORY.data_ptr(), out.data_ptr(), 40)
    assert traffic(counting_memory) == ((2, 16 + 4, 40 * 16), (8, 8 * 4, 1024)), "a copy of zeros reads nothing"


@only_emulated
@pytest.mark.parametrize(
    ("at", "rows", "columns", "sectors"),
    [((0, 0, 0, 0), 16, 64, 4), ((8, 0, 0, 0), 16, 64, 5), ((40, 30, 0, 0), 10, 40, 3), ((0, 40, 0, 0), 0, 0, 0)],
)
def test_sectors_of_a_box(
    counting_memory: ModuleType, at: tuple[int, ...], rows: int, columns: int, sectors: int
) -> None:
    begin = torch.tensor([*at, 0, 0, 0, 0], dtype=torch.int32)
    x = torch.cat([begin.view(torch.int16), torch.zeros(2 * 40 * 3 * 80, dtype=torch.int16)])
    run_sm90("box_16", x, torch.ones(16, 8, 8).short())
    loads, _ = traffic(counting_memory)
    assert loads == (4 + 1, 4 + rows * sectors, 4 * 4 + rows * columns * 2), "four numbers are read, and the box"


@only_emulated
def test_memory_is_counted_only_where_that_is_asked_for() -> None:
    module = emulator.runtime()
    module.reset_counters()
    cuda_kernels.load().prim("ldg_and_stg", MEMORY.data_ptr(), MEMORY.data_ptr() + 256, 0)
    assert traffic(module) == (NONE, NONE)


@only_emulated
@pytest.mark.parametrize(("first", "beyond"), [(0, False), (31, False), (32, True), (64, True)])
def test_what_is_accessed_lies_within_the_bounds(first: int, beyond: bool) -> None:
    memory, other = MEMORY[:63], MEMORY[1024:]
    if not beyond:
        with emulator.bounds({"x": memory, "other": other}):
            cuda_kernels.load().prim("ldg_offset", memory.data_ptr(), 0, first)
        return
    with emulator.bounds({"x": memory, "other": other}), pytest.raises(RuntimeError) as error:
        cuda_kernels.load().prim("ldg_offset", memory.data_ptr(), 0, first)
    assert re.match(
        r"prims\.cu:\d+: ldg: 4 bytes out of the bounds of global memory \(at byte \d+ of x, which has 252\) \[kernel "
        r"ldg_offset, block",
        str(error.value),
    )
    cuda_kernels.load().prim("ldg_offset", memory.data_ptr(), 0, first)  # nobody says any more


@only_emulated
def test_copies_lie_within_the_bounds() -> None:
    out = floats(256)
    with emulator.bounds({"x": MEMORY[:160], "y": out}):
        cuda_kernels.load().prim("copy", MEMORY.data_ptr(), out.data_ptr(), 40)
        with pytest.raises(RuntimeError, match=r"cp_async_16: 16 bytes out of .* \(at byte 640 of x, which has 640\)"):
            cuda_kernels.load().prim("copy", MEMORY.data_ptr(), out.data_ptr(), 41)
