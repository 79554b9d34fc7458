"""The lecture's ladder: every rung runs, what it claims holds, and what is written about it is what it gave."""

import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgpt.config import UserError
from fastgpt.data import load_text

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path += [str(CHECKOUT), str(CHECKOUT / "lessons" / "gpt")]

import shared  # noqa: E402 (lies beside the rungs, as a script finds it)
from shared import Options, Result, rung  # noqa: E402

from lessons.gpt import make_notebook, run_all  # noqa: E402

RUNGS = range(1, 11)


@pytest.fixture(scope="module")
def shakespeare():
    """Where Tiny Shakespeare cannot be had, there is nothing to compare."""
    missing = []
    if load_text("shakespeare", missing.append)[0] != "shakespeare":
        pytest.skip(missing[0])


@pytest.fixture
def text():
    return rung(1).Text("to be, or not to be: that is the question\n" * 30)


def small_model(number, vocab_size):
    """The model of a rung, as its script builds it."""
    C, sequence = rung(3).C, torch.nn.Sequential
    bodies = {
        3: lambda: rung(3).MeanOfPast(),
        4: lambda: rung(4).Head(C),
        5: lambda: rung(5).MultiHead(4),
        6: lambda: sequence(rung(5).MultiHead(4), rung(6).FeedForward(C)),
        7: lambda: sequence(*[rung(7).Block(*rung(7).sublayers()) for _ in range(3)]),
        8: lambda: sequence(
            *[rung(8).NormBlock(lambda: torch.nn.LayerNorm(C), *rung(7).sublayers()) for _ in range(3)]
        ),
    }
    return rung(3).LanguageModel(vocab_size, bodies[number]())


@pytest.mark.parametrize("number", RUNGS)
def test_each_rung_runs_and_leaves_its_result(number, shakespeare, tmp_path, capsys):
    main, steps = rung(number).main, 2 if number == 9 else 30
    result = shared.run(main, Options(steps, 3, tmp_path))
    assert json.loads((tmp_path / f"rung-{number:02}.json").read_text()) == dataclasses.asdict(result)
    printed = capsys.readouterr().out
    assert printed.endswith(f"\n{result.sample}\n\n{result.line()}\n")
    assert result.sample
    assert (result.number, result.steps, result.seed) == (number, steps, 3)
    untrained = {1: math.log(65) + 1e-4, 2: 4.8}.get(number, 4.4)  # a bigram's logits begin with a variance of 1
    assert 0 < result.loss < untrained
    assert (result.published is None) == (number in (1, 3, 10))


def test_every_position_of_a_batch_is_an_example(text):
    x, y = text.batch("train", batch_size=5, block_size=7)
    assert x.shape == y.shape == (5, 7)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert text.decode(text.encode("question")) == "question"
    whole = torch.cat([text.splits["train"], text.splits["val"]])
    assert text.decode(whole.tolist()) == "to be, or not to be: that is the question\n" * 30
    starts = {text.decode(row.tolist()) for row in text.batch("val", 4000, len(text.splits["val"]) - 1)[1]}
    assert starts == {text.decode(text.splits["val"][1:].tolist())}  # the last character is reached, and none beyond


def test_the_loss_is_of_the_whole_validation_split(text):
    model = rung(2).Bigram(text.vocab_size)
    tokens = text.splits["val"]
    count = (len(tokens) - 1) // 8 * 8
    logits = model(tokens[None, :count])[0]
    expected = rung(2).cross_entropy_by_hand(logits, tokens[1 : count + 1])
    assert rung(2).validation_loss(model, text) == pytest.approx(expected.item(), rel=1e-5)


def test_training_lowers_the_loss(text):
    model = small_model(8, text.vocab_size)
    before = rung(2).validation_loss(model, text)
    rung(2).train(model, text, 60, lr=1e-2)
    assert rung(2).validation_loss(model, text) < before / 2
    written = rung(2).generate(model, text, 40)
    assert len(written) == 40
    assert set(written) <= set(text.chars)


@pytest.mark.parametrize("number", range(3, 9))
def test_no_model_sees_the_future(number, text):
    model = small_model(number, text.vocab_size).eval()
    x = torch.randint(text.vocab_size, (2, 8))
    changed = x.clone()
    changed[:, 5] = (x[:, 5] + 1) % text.vocab_size
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert ((before - after)[:, 5:].abs().amax((0, 2)) > 1e-6).all()  # and each sees its past


def test_scaling_keeps_variance_and_the_mask_stands_between_product_and_softmax(capsys):
    rung(4).show_scaling(64)
    rung(4).show_masking(rung(4).Head(rung(3).C))
    plain, scaled, before, between, after = capsys.readouterr().out.splitlines()
    assert "variance 6" in plain
    assert "variance 1.0" in scaled
    assert float(plain.split()[-1]) > 2 * float(scaled.split()[-1])
    assert "its future 0.00" not in before
    assert between.endswith("its future 0.00, and its weights sum to 1.00")
    assert not after.endswith("sum to 1.00")


def test_residual_connections_carry_the_gradient_down(text):
    without, with_them = (
        rung(7).gradient_norms(block, text, n_layer=6) for block in (rung(7).BlockWithoutResidual, rung(7).Block)
    )
    assert without[0] < 1e-3 * without[-1]
    assert with_them[0] > 0.3 * with_them[-1]


def test_batch_norm_shows_its_faults_and_layer_norm_has_none(text, capsys):
    for name, norm in (("batch", rung(8).BatchNorm), ("layer", torch.nn.LayerNorm)):
        model = rung(3).LanguageModel(text.vocab_size, norm(rung(3).C))
        rung(2).train(model, text, 5, lr=1e-2)
        capsys.readouterr()
        rung(8).show_faults(name, model, text)
        numbers = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out))
        least, most, moved, in_training, in_use = numbers
        assert (most > least, moved > 1e-3, in_training != in_use) == (name == "batch",) * 3


def test_the_plain_model_is_fastgpts_with_every_weight_copied(text):
    config = rung(9).GPTConfig(16, text.vocab_size, 2, 4, 32, dropout=0.2, bias=False, gelu="none")
    gpt = rung(9).GPT(config)
    rung(9).copy_and_compare(gpt, text)
    weights = rung(9).plain_weights(gpt)
    assert {p.data_ptr() for p in gpt.parameters()} == {p.data_ptr() for p in weights.values()}
    other = rung(9).GPT(dataclasses.replace(config, gelu="tanh"))
    other.transformer.h[0].mlp.c_fc.weight.data *= 50  # where the two GELUs differ
    with pytest.raises(AssertionError):
        rung(9).copy_and_compare(other, text)


def test_strings_backwards_and_the_three_masks():
    ten = rung(10)
    source, lengths, written, targets = ten.batch(50)
    for s, n, w, t in zip(source.tolist(), lengths.tolist(), written.tolist(), targets.tolist(), strict=True):
        assert t == [*s[:n][::-1], ten.END, *[ten.IGNORED] * (8 - n)]
        assert w[: n + 1] == [ten.START, *s[:n][::-1]]
    assert ten.mask(2, 2, True) == "  x .\n  x x"
    assert ten.mask(2, 3, False) == "  x x x\n  x x x"
    model = ten.EncoderDecoder()
    padded = source.clone()
    padded[torch.arange(8) >= lengths[:, None]] = 7
    torch.testing.assert_close(model(source, lengths, written), model(padded, lengths, written))


def test_what_is_wrong_is_said_in_a_sentence(monkeypatch, tmp_path, capsys):
    a_file = tmp_path / "file"
    a_file.touch()
    for arguments, sentence in (
        (["--steps=-1"], "--steps: must be a whole number of at least 0 and less than 2^31, got '-1'"),
        (["--seed", "x"], "--seed: must be a whole number"),
        (["--out", str(a_file)], "file: File exists"),
    ):
        with pytest.raises(SystemExit) as exit:
            shared.climb(rung(1).main, 0, argv=arguments)
        assert exit.value.code == 2
        assert sentence in capsys.readouterr().err

    def offline(data, notify):
        notify("Tiny Shakespeare cannot be had (no network); training on Python's standard library instead")
        return "stdlib", ""

    monkeypatch.setattr(shared, "load_text", offline)
    with pytest.raises(UserError, match=r"cannot be had \(no network\)$"):
        shared.tiny_shakespeare()
    with pytest.raises(SystemExit) as exit:
        shared.climb(rung(1).main, 0, argv=[])
    assert exit.value.code == 2
    with pytest.raises(SystemExit) as exit:
        run_all.main(["11"])
    assert exit.value.code == 2


def test_run_all_runs_scripts_and_makes_table_and_figure(shakespeare, tmp_path):
    command = [sys.executable, "-m", "lessons.gpt.run_all", "1", "--out", str(tmp_path)]
    printed = subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout
    table = (tmp_path / "table.md").read_text()
    assert "\n| 1 | guessing evenly | 4.174 |  |  | 0 | 0 |\n" in table
    assert table in printed
    data = json.loads((tmp_path / "results.json").read_text())
    assert table == run_all.table(data)
    with Image.open(tmp_path / "ladder.png") as picture:
        assert picture.info["Source"] == run_all.digest(data)


def test_the_table_has_the_difference_to_the_published_loss():
    result = Result(2, "the bigram", 2.504, 2.49, "sample", seconds=3.2, steps=7, seed=5)
    data = {"machine": "Some CPU", "torch": "2.13.0", "results": [dataclasses.asdict(result)]}
    assert "| 2 | the bigram | 2.504 | 2.49 | +0.014 | 7 | 3 |" in run_all.table(data)
    assert run_all.table(data).endswith("\n\nSome CPU; torch 2.13.0; seed 5.\n")
    assert Image.open(io.BytesIO(run_all.figure(data))).size[0] > 300


def test_the_docs_have_what_run_all_measured():
    data, written = run_all.published()
    assert run_all.table(data) in written
    with Image.open(run_all.FIGURE) as picture:
        assert picture.info["Source"] == run_all.digest(data)
    compared = [result for result in data["results"] if result["published"] and result["number"] < 9]
    assert [result["number"] for result in compared] == [2, 4, 5, 6, 7, 8]
    for result in compared:
        assert abs(result["loss"] - result["published"]) < 0.03


def test_the_notebook_is_what_the_scripts_make_of_it():
    assert json.loads(make_notebook.NOTEBOOK.read_text()) == make_notebook.notebook()


@pytest.mark.full
def test_the_notebook_runs(shakespeare, tmp_path):
    import nbclient
    import nbformat  # which nbclient brings

    notebook = nbformat.read(make_notebook.NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = {cell.id: cell for cell in notebook.cells}
    cells["set-up"].source += f'\nOUT = Path({str(tmp_path)!r})\nARGUMENTS = ["--out", str(OUT), "--steps", "2"]'
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(CHECKOUT)}})
    client.execute()
    assert len(list(tmp_path.glob("rung-*.json"))) == 10
    shown = "".join(str(output) for output in cells["climbed"].outputs)
    assert "| 8 | layer norm |" in shown


@pytest.mark.full
@pytest.mark.parametrize("number", [2, 4, 5, 6, 7, 8])
def test_the_published_losses_are_reached(number, shakespeare):
    result = shared.run(rung(number).main, Options(3000 if number == 2 else 5000))
    assert abs(result.loss - result.published) < 0.03


@pytest.mark.full
def test_the_scaled_up_model_and_the_reverser_learn(shakespeare):
    assert shared.run(rung(10).main, Options(400)).loss < 0.05
    on_gpu = torch.cuda.is_available()
    threads = len(os.sched_getaffinity(0))  # conftest.py leaves one
    result = shared.run(rung(9).main, Options(5000 if on_gpu else 2000), threads)
    assert abs(result.loss - result.published) < (0.03 if on_gpu else 0.06)
