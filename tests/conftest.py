"""What every test gets: the two tiers, a fixed seed, and memory that is NaN until someone writes to it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# `lessons` is not installed. Behind all else, so that fastgpt is the one that is.
sys.path.append(str(Path(__file__).parent.parent))

# Without a GPU, Triton's kernels are tested in its interpreter and the CUDA kernels in the emulator, on CPU tensors;
# Triton asks when it decorates a kernel.
INTERPRETING = not torch.cuda.is_available()
if INTERPRETING:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["FASTGPT_EMULATE"] = "1"

from fastgpt import dispatch  # noqa: E402 (Triton's environment comes first)
from fastgpt.benchmarks.errors import poisoned_memory  # noqa: E402
from fastgpt.dispatch import Entry  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked full, and only those")


def pytest_configure() -> None:
    # The tensors here are small. A second thread gains nothing on them, and where other work keeps the machine's cores
    # busy, waiting for it makes the tests ten times slower.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    full = config.getoption("--full")
    wanted = [item for item in items if (item.get_closest_marker("full") is not None) == full and can_run(item)]
    if len(wanted) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted


def pytest_runtest_setup(item: pytest.Item) -> None:
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    for value in params.values():
        if isinstance(value, str) and value in dispatch._absent:
            pytest.skip(dispatch._absent[value])


def preferred_on_cpu() -> str:
    """The backend that auto prefers on a CPU, where its ops run on it."""
    return next(row["backend"] for row in dispatch.explain() if row["op"] == "gelu")


def can_run(item: pytest.Item) -> bool:
    """False for bf16 in Triton's interpreter, which truncates where a GPU rounds."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return not (INTERPRETING and "triton" in params.values() and torch.bfloat16 in params.values())


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name dtypes and shapes in the tests' ids, where pytest would only number them."""
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    if isinstance(val, tuple) and all(type(size) is int for size in val):
        return "x".join(map(str, val)) or "scalar"
    return None


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch takes, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, also where the tests run in the background of a shell, which has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the `fastgpt` command in this process: exit code, stdout, stderr. A process of its own takes seconds."""
    from fastgpt import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fastgpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert isinstance(exit.value.code, int)
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def own_table(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Entry]]:
    """Copies of the table and of the list of absent backends, so that what a test does to them is undone."""
    table = {op: dict(entries) for op, entries in dispatch._table.items()}
    monkeypatch.setattr(dispatch, "_table", table)
    monkeypatch.setattr(dispatch, "_absent", dict(dispatch._absent))
    return table


@pytest.fixture
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield
