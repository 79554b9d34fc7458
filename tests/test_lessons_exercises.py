"""The exercises: each fails as it is given and says why, each solution passes, and doing nothing does not."""

import re
from pathlib import Path

import pytest

from fastgpt import emulator
from lessons.kernels import check
from lessons.kernels.climb import language
from lessons.kernels.command import main
from lessons.kernels.rung import read_rung

FOLDER = Path(check.__file__).parent / "exercises"
SOLUTIONS = FOLDER / "solutions"

# What check says of each as it is given: how every one of its faults begins.
FAULTS = {
    "01_race.cu": ["two threads access the same element of shared memory, and no barrier says who comes first:"],
    "02_uncoalesced.cu": [
        "missed: sectors per load request <= 4; it is 32 (",
        "missed: sectors per store request <= 4; it is 32 (",
    ],
    "03_bank_conflict.cu": ["missed: bank conflicts == 0; it is 253952 ("],
    "04_wrong_mask.py": [
        "wrong at B=1 H=2 T=256 D=64: o[0, 0, 64, 0] is ",
        "wrong at B=1 H=2 T=256 D=64: lse[0, 0, 64] is ",
    ],
    "05_overflow.py": ["wrong at M=5 N=1001, x made 200 times as large: y[0, 3] is nan and should be "],
    "06_precision.cu": ["wrong at M=64 N=1024: y[", "wrong at M=64 N=1024: rstd["],
}
NAMES = tuple(FAULTS)


@pytest.fixture(autouse=True)
def emulated() -> None:
    reason = emulator.missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Writes a file with some text replaced, to be checked; what is built of it goes with the test."""
    emulator.runtime()  # which lies in the cache that all tests share
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))

    def edit(source: Path, pattern: str, replacement: str) -> Path:
        text, count = re.subn(pattern, replacement, source.read_text(), flags=re.DOTALL)
        assert count == 1
        file = tmp_path / source.name
        file.write_text(text)
        return file

    return edit


def test_each_exercise_has_a_solution_and_a_line_in_the_readme():
    for folder in (FOLDER, SOLUTIONS):
        assert sorted(path.name for path in folder.glob("[0-9]*")) == sorted(NAMES)
    assert re.findall(r"^\| `(\w+\.\w+)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_fails_as_it_is_given(name):
    faults = check.check(FOLDER / name)
    assert [fault[: len(begin)] for fault, begin in zip(faults, FAULTS[name], strict=True)] == FAULTS[name]
    assert read_rung(FOLDER / name).header.parts["Hint"]


@pytest.mark.parametrize("name", NAMES)
def test_a_solution_reaches_the_same_goals(name):
    assert read_rung(SOLUTIONS / name).header.promises == read_rung(FOLDER / name).header.promises
    assert check.check(SOLUTIONS / name) == []


# A launch in CUDA, and in Triton.
LAUNCH = {".cu": r"  launch<[^;]*;\n", ".py": r"    _\w+_kernel\[[^\n]*\n"}


@pytest.mark.parametrize("name", ["03_bank_conflict.cu", "04_wrong_mask.py", "05_overflow.py"])
def test_doing_nothing_is_not_enough(name, edited):
    faults = check.check(edited(SOLUTIONS / name, LAUNCH[Path(name).suffix], ""))
    assert re.match(r"wrong at .*\] is nan and should be .*; what is never written stays NaN", faults[0])


@pytest.mark.full
@pytest.mark.parametrize("name", ["01_race.cu", "02_uncoalesced.cu", "06_precision.cu"])
def test_doing_nothing_is_not_enough_either(name, edited):
    test_doing_nothing_is_not_enough(name, edited)


UNSEEN = r"the kernels were seen to load and store (\d+) bytes, and this takes at least (\d+): "


def test_pytorch_may_not_do_the_work(edited):
    """What no kernel of the file does is not counted, and would reach any goal."""
    file = edited(SOLUTIONS / "05_overflow.py", LAUNCH[".py"], "    y = torch.softmax(x, -1)\n")
    (fault,) = check.check(file)
    assert re.match(UNSEEN, fault).groups() == ("0", str(2 * 4 * 16 * 1024))


@pytest.mark.full
def test_a_plain_access_is_not_enough(edited):
    file = edited(FOLDER / "02_uncoalesced.cu", r'#include "tasks.h"', '#include "tasks.h"\n#define ldg *')
    unseen, missed = check.check(file)
    assert re.match(UNSEEN, unseen)
    assert missed.startswith("missed: sectors per store request")


def test_a_right_kernel_that_does_too_much_misses_its_goal(edited):
    """One that does not skip what lies in the future: 4 x 4 blocks of 2 heads, 2 products each."""
    (fault,) = check.check(edited(SOLUTIONS / "04_wrong_mask.py", r"tl\.minimum\(first \+ BLOCK_M, T\)", "T"))
    assert fault.startswith("missed: dots <= 40; it is 64 (more products of tiles than the work takes")


def test_a_race_is_told_with_its_two_lines(capsys):
    path = FOLDER / "01_race.cu"
    lines = path.read_text().splitlines()
    write, read = (lines.index(line) + 1 for line in ("  sts(shared + thread, mine);", "  return lds(shared);"))
    assert main(["check", str(path)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{path}: not yet"
    assert out[2] == f"    one writes, 01_race.cu:{write}:  sts(shared + thread, mine);"
    assert out[3] == f"    another reads, 01_race.cu:{read}:  return lds(shared);"
    assert "would order them" in out[4]
    assert f"01_race.cu:{write}: race: sts writes shared memory that thread" in out[5]
    assert out[6].startswith("  Hint: the array has a second use.")


def test_the_command_says_pass(capsys):
    assert main(["check", str(SOLUTIONS / "05_overflow.py")]) == 0
    assert capsys.readouterr().out == f"{SOLUTIONS / '05_overflow.py'}: pass\n"


def test_what_is_no_exercise_is_refused(capsys, tmp_path):
    (tmp_path / "mine.py").write_text('"""Softmax, mine."""\n\n\ndef softmax(x):\n    return x.softmax(-1)\n')
    for files, sentence in (
        ([str(tmp_path / "mine.py")], "mine.py states no goal"),
        ([str(tmp_path / "none.cu")], "none.cu"),
        ([], "check takes the files of exercises"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["check", *files])
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_what_does_not_compile_or_run_is_told_in_its_own_words(tmp_path):
    (tmp_path / "broken.py").write_text(
        '"""Broken.\n\nGoal: loads == 0\n"""\n\n\ndef softmax(x):\n    return missing(x)\n'
    )
    assert check.check(tmp_path / "broken.py") == ["broken.py, line 8: NameError: name 'missing' is not defined"]


@pytest.mark.full
@pytest.mark.parametrize("folder", [FOLDER, SOLUTIONS])
@pytest.mark.parametrize("name", NAMES)
def test_a_gpus_compiler_takes_them(folder, name):
    rung = read_rung(folder / name)
    module = language(rung.language)
    if rung.language == "cuda" and module.find_nvcc() is None:
        pytest.skip("there is no nvcc")
    assert module.resources(rung)["registers"] > 0
