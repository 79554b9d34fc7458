"""Files of tensors from anywhere: read whole, or refused in one sentence, in little memory."""

import itertools
import json
import os
import resource
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastgpt.config import UserError
from fastgpt.files import read_json
from fastgpt.tensor_files import find_tensors, save_tensors, tensor_names

LIKE = {"weight": torch.zeros(3, 2), "step": torch.zeros((), dtype=torch.int64)}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3, 2, dtype=torch.bfloat16), "step": torch.tensor(7), "more": torch.ones(1)}, path)
    return path


def write_raw(path: Path, header: bytes, length: int | None = None, numbers: int = 0) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    os.truncate(path, path.stat().st_size + numbers)


def describe(**tensors: tuple[str, list[int], int]) -> bytes:
    """A header for (dtype, shape, bytes) of each tensor."""
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return json.dumps(header).encode()


def read(path: Path) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty_like(tensor) for name, tensor in LIKE.items()}
    for name, stored in find_tensors([path], LIKE).items():
        stored.copy_to(tensors[name])
    return tensors


def test_what_is_wanted_is_read_into_the_precision_that_is_wanted(path):
    assert tensor_names(path) == {"weight", "step", "more"}
    assert torch.equal(read(path)["weight"], torch.ones(3, 2))
    assert read(path)["step"] == 7


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file or directory"),
        (lambda path: path.write_bytes(b""), "header too small"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "cannot be read: "),
        (
            lambda path: path.write_bytes(b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."),
            "not a safetensors file",
        ),
        (lambda path: write_raw(path, b"{}", length=10**12), "its header would have 1,000,000,000,000 bytes"),
        (lambda path: write_raw(path, b"[]"), "invalid JSON"),
        (lambda path: write_raw(path, describe(weight=("F32", [1 << 38], 1 << 40)), numbers=1 << 40), "unable to mmap"),
        (
            lambda path: write_raw(path, describe(weight=("F6_E2M3", [4, 2], 6), step=("I64", [], 8)), numbers=14),
            "cannot be read: ",
        ),
        (
            lambda path: write_raw(path, describe(weight=("F8_E4M3", [3, 2], 6), step=("I64", [], 8)), numbers=14),
            "weight must be torch.float32, got torch.float8_e4m3fn",
        ),
        (lambda path: save_file({"weight": torch.ones(3, 2)}, path), "damaged: it lacks step"),
        (
            lambda path: save_file({"weight": torch.ones(2, 3), "step": torch.tensor(1)}, path),
            r"weight must have shape \(3, 2\), got \(2, 3\)",
        ),
        (
            lambda path: save_file({"weight": torch.ones(3, 2, dtype=torch.int32), "step": torch.tensor(1)}, path),
            "weight must be torch.float32, got torch.int32",
        ),
        (
            lambda path: save_file({"weight": torch.ones(3, 2), "step": torch.tensor(1.0)}, path),
            "step must be torch.int64, got torch.float32",
        ),
        *(
            (
                lambda path, bad=bad: save_file(
                    {"weight": torch.tensor([[0, 0], [0, bad], [0, 0]]), "step": torch.tensor(1)}, path
                ),
                "damaged: weight holds a NaN or an infinity",
            )
            for bad in (float("nan"), float("inf"), -float("inf"))
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(path, write, sentence):
    write(path)
    with pytest.raises(UserError, match=rf"model\.safetensors: .*{sentence}"):
        read(path)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        tensor_names(tmp_path)


def test_shapes_are_looked_at_before_any_number_is_read(path):
    size = 1 << 32  # four gigabytes of zeros that lie nowhere
    write_raw(path, describe(weight=("F32", [size // 4], size), step=("I64", [], 8)), numbers=size + 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"weight must have shape \(3, 2\)"):
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # KiB


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "cannot be read: "),
        (b"[" * 100_000, "cannot be read: "),
        (b"3", "damaged: it must hold one JSON object"),
        (b"\xff\xfe{", "cannot be read: "),
    ],
)
def test_json_is_one_object_or_refused(tmp_path, content, sentence):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_json(path)


def test_json_of_any_size_is_refused_in_little_memory(tmp_path):
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(UserError, match="it has more than 67,108,864 bytes"):
        read_json(path)


ROWS = torch.arange(14.0).view(7, 2)
ROWS_LIKE = {"weight": torch.zeros(7, 2), "step": torch.zeros(())}


class TestRowsInSeveralFiles:
    """A tensor of 7 rows and a number, in two files of 4 and 3 rows, and a third that has none."""

    def write(self, folder: Path, cuts: tuple[int, ...] = (0, 4, 7, 7)) -> list[Path]:
        paths = []
        for part, (start, stop) in enumerate(itertools.pairwise(cuts)):
            tensors = {"weight": ROWS[start:stop].clone(), **({"step": torch.tensor(3.0)} if part == 0 else {})}
            offsets = {"weight": (start, 0), "step": ()}
            paths.append(folder / f"model-{part}.safetensors")
            save_tensors(tensors, paths[-1], offsets)
        return paths

    @pytest.mark.parametrize(("first", "rows"), [(0, 7), (0, 2), (1, 3), (3, 2), (4, 3), (5, 1), (7, 0)])
    def test_any_rows_are_read(self, tmp_path, first, rows):
        stored = find_tensors(self.write(tmp_path), ROWS_LIKE)
        out = torch.full((rows, 2), -1.0, dtype=torch.float64)
        stored["weight"].copy_to(out, first)
        assert torch.equal(out, ROWS[first : first + rows].double())
        step = torch.zeros(())
        stored["step"].copy_to(step)
        assert step == 3

    def test_only_the_rows_that_are_read_are_looked_at(self, tmp_path):
        paths = self.write(tmp_path)
        save_tensors({"weight": torch.full((3, 2), float("nan"))}, paths[1], {"weight": (4, 0)})
        stored = find_tensors(paths, ROWS_LIKE)
        stored["weight"].copy_to(torch.zeros(4, 2))
        with pytest.raises(UserError, match="damaged: weight holds a NaN or an infinity"):
            stored["weight"].copy_to(torch.zeros(5, 2))

    def test_the_reader_of_pytorch_reads_them(self, tmp_path):
        from torch.distributed import checkpoint as dcp

        self.write(tmp_path)
        found = {name: torch.empty_like(tensor) for name, tensor in ROWS_LIKE.items()}
        with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
            dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
        assert torch.equal(found["weight"], ROWS)
        assert found["step"] == 3

    @pytest.mark.parametrize(
        ("cuts", "sentence"),
        [
            ((0, 4), r"weight must have shape \(7, 2\), got \(4, 2\)"),
            ((4, 7), "have row 0 of weight twice, or not at all"),
            ((0, 3, 3), r"weight must have shape \(7, 2\), got \(3, 2\)"),
        ],
    )
    def test_rows_that_are_missing(self, tmp_path, cuts, sentence):
        with pytest.raises(UserError, match=sentence):
            find_tensors(self.write(tmp_path, cuts), ROWS_LIKE)

    @pytest.mark.parametrize(
        ("tensors", "sharding", "sentence"),
        [
            ({"weight": (3, 2)}, {"weight": [3, 0]}, "have row 3 of weight twice, or not at all"),
            ({"weight": (3, 2)}, {"weight": [5, 0]}, "have row 4 of weight twice, or not at all"),
            ({"weight": (3, 3)}, {"weight": [4, 0]}, "the parts of weight are not of one tensor"),
            ({"weight": ()}, {"weight": []}, "the parts of weight are not of one tensor"),
            ({"weight": (3, 2), "step": ()}, {"weight": [4, 0], "step": []}, "the parts of step are not of one tensor"),
            ({"weight": (4, 2)}, {"weight": [4, 0]}, r"weight must have shape \(7, 2\), got \(8, 2\)"),
            ({"weight": (3, 2)}, {"weight": [4, 1]}, "does not say which rows of weight these are"),
            ({"weight": (3, 2)}, {"weight": [-4, 0]}, "does not say which rows of weight these are"),
            ({"weight": (3, 2)}, {"weight": [4.0, 0]}, "does not say which rows of weight these are"),
            ({"weight": (3, 2)}, {"weight": [True, 0]}, "does not say which rows of weight these are"),
            ({"weight": (3, 2)}, {"weight": [10**400, 0]}, "does not say which rows of weight these are"),
            ({"weight": (3, 2)}, {"weight": [4]}, "does not say which rows of weight these are"),
            ({"weight": (3, 2)}, {"weight": "40"}, "does not say which rows of weight these are"),
            ({"weight": (3, 2)}, {}, "does not say which rows these are"),
            ({"weight": (3, 2)}, "[" * 10**5, "does not say which rows these are"),
            ({"weight": (3, 2)}, "[]", "does not say which rows these are"),
            ({"weight": (3, 2)}, '{"weight": 3}', "does not say which rows these are"),
        ],
    )
    def test_what_does_not_fit_together(self, tmp_path, tensors, sharding, sentence):
        paths = self.write(tmp_path)
        if isinstance(sharding, dict):
            sharding = json.dumps({name: {"saved_offsets": offsets} for name, offsets in sharding.items()})
        made = {name: torch.ones(shape) for name, shape in tensors.items()}
        save_file(made, paths[1], {"DCP_SHARDING_INFO": sharding})
        with pytest.raises(UserError, match=sentence) as error:
            find_tensors(paths, ROWS_LIKE)
        assert len(str(error.value)) < 300

    def test_a_tensor_of_another_precision_in_one_of_them(self, tmp_path):
        paths = self.write(tmp_path)
        save_tensors({"weight": torch.ones(3, 2, dtype=torch.int32)}, paths[1], {"weight": (4, 0)})
        with pytest.raises(UserError, match="the parts of weight are not of one tensor"):
            find_tensors(paths, ROWS_LIKE)
