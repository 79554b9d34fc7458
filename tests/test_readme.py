"""The README's measured tables and figure are those of the result files that it names."""

import json

import bench_samples as samples
import pytest
from PIL import Image

from fastgpt.benchmarks import readme
from fastgpt.config import UserError

EMPTY = "# Title\n\n<!-- measured: -->\n<!-- end of measured -->\n\nThe rest.\n"


@pytest.fixture
def repository(tmp_path):
    (tmp_path / readme.RESULTS).mkdir(parents=True)
    (tmp_path / "README.md").write_text(EMPTY)
    gpu = samples.kernels(2, machine=samples.machine(gpu="Some GPU 9"))
    for row in gpu["results"]:
        for of in (row["competitors"], row["ratios"]):
            of["cuda"] = of.pop("cpp")
    for name, data in {"cpu": samples.kernels(1), "gpu": gpu, "training": samples.scaling()}.items():
        samples.save(tmp_path / readme.RESULTS / f"{name}.json", data)
    samples.save(tmp_path / readme.RESULTS / "generation.json", samples.generate())
    return tmp_path


ALL = ["cpu.json", "gpu.json", "training.json", "generation.json"]


def differences(path):
    """Where a README is not what its files make of it."""
    text = path.read_text(encoding="utf-8")
    names = readme.named_files(text)
    found = []
    if readme.written(text) != (readme.text_of(readme.load_all(path, names), names) if names else ""):
        found.append("tables")
    files = readme.load_all(path, names)
    if any(data["kind"] == "kernels" for data in files):
        with Image.open(path.parent / readme.FIGURE) as picture:
            if picture.info["Source"] != readme.digest(files):
                found.append("figure")
    return found


def test_the_readme_is_what_its_files_make_of_it():
    assert differences(readme.README) == []


def test_what_is_written_matches_and_says_where_it_was_measured(repository):
    path = repository / "README.md"
    readme.write(path, ALL)
    assert differences(path) == []
    text = path.read_text()
    assert text.startswith("# Title\n\n<!-- measured: cpu.json gpu.json training.json generation.json -->\n\n![")
    assert text.endswith("<!-- end of measured -->\n\nThe rest.\n")
    assert "\nSome CPU 7000, 2 threads, torch 2.13.0, triton 3.6.0; commit 012345678, 2026-01-02 ([samples](" in text
    assert "\nSome GPU 9, driver 580.1, torch 2.13.0" in text
    for begin in ("| attention | cpp ", "| attention | cuda ", "| tiny, 800k, 8 x 256, bf16 | ", "| small, batch 1, "):
        assert f"\n{begin}" in text
    assert readme.text_of(readme.load_all(path, ALL), readme.named_files(text)) == readme.written(text)


def test_a_number_that_was_changed_by_hand_is_found(repository):
    path = repository / "README.md"
    readme.write(path, ALL)
    text = path.read_text()
    number = text.index("x (")
    path.write_text(text[: number - 1] + str((int(text[number - 1]) + 1) % 10) + text[number:])
    assert differences(path) == ["tables"]


def test_a_file_that_was_measured_anew_is_found(repository):
    path = repository / "README.md"
    readme.write(path, ALL)
    samples.save(
        repository / readme.RESULTS / "gpu.json", samples.kernels(3, machine=samples.machine(gpu="Some GPU 9"))
    )
    assert differences(path) == ["tables", "figure"]


def test_a_table_without_a_file_is_found(repository):
    path = repository / "README.md"
    path.write_text(EMPTY.replace("<!-- end", "| attention | 9.9x |\n<!-- end"))
    assert differences(path) == ["tables"]


def test_a_run_that_is_not_valid_is_called_so(repository):
    samples.save(repository / readme.RESULTS / "cpu.json", samples.kernels(valid=False))
    readme.write(repository / "README.md", ["cpu.json"])
    assert "**This run is not valid.**" in (repository / "README.md").read_text()


def test_what_cannot_be_written_is_refused_and_leaves_the_readme_alone(repository):
    path = repository / "README.md"
    samples.save(repository / readme.RESULTS / "test.json", samples.about("test"))
    for names, sentence in ((["none.json"], "cannot be read"), (["test.json"], "has no table in the README")):
        with pytest.raises(UserError, match=sentence):
            readme.write(path, names)
        assert path.read_text() == EMPTY
    path.write_text("# Title\n")
    with pytest.raises(UserError, match="lacks the marks"):
        readme.write(path, ALL)


def test_the_command_refuses_a_file_from_elsewhere(tmp_path, capsys):
    path = samples.save(tmp_path / "k.json", samples.kernels())
    with pytest.raises(SystemExit) as exit:
        readme.main([str(path)])
    assert exit.value.code == 2
    assert "does not lie in benchmarks/results" in capsys.readouterr().err


def test_the_digest_is_of_what_is_drawn():
    data = samples.kernels()
    again = json.loads(json.dumps(data))
    assert readme.digest([data]) == readme.digest([again])
    again["results"][0]["competitors"]["cpp"]["median_ms"] *= 1.001
    assert readme.digest([data]) != readme.digest([again])
