"""Files of tensors from anywhere: read whole, or refused in one sentence, in little memory."""

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
from fastgpt.tensor_files import read_tensors, tensor_names

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


def test_what_is_wanted_is_read_in_the_files_precision(path):
    assert tensor_names(path) == {"weight", "step", "more"}
    tensors = read_tensors(path, LIKE)
    assert tensors.keys() == LIKE.keys()
    assert tensors["weight"].dtype == torch.bfloat16
    assert tensors["step"] == 7


def test_a_change_does_not_reach_the_file(path):
    read_tensors(path, LIKE)["weight"].zero_()
    assert read_tensors(path, LIKE)["weight"].sum() == 6


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
        read_tensors(path, LIKE)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        tensor_names(tmp_path)


def test_shapes_are_looked_at_before_any_number_is_read(path):
    size = 1 << 32  # four gigabytes of zeros that lie nowhere
    write_raw(path, describe(weight=("F32", [size // 4], size), step=("I64", [], 8)), numbers=size + 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"weight must have shape \(3, 2\)"):
        read_tensors(path, LIKE)
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
