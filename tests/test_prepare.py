"""fastgpt prepare: the same bytes from any number of processes and after any interruption, and damage by its name."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt import data, shards
from fastgpt.config import UserError
from fastgpt.data import Batches, load_dataset, load_tokens, prepare
from fastgpt.shards import Piece, Shards, read_header, read_shards, write_shards
from fastgpt.tokenizer import BPETokenizer, ByteTokenizer

TEXT = "To be, or not to be: that is the question. \u2713\n" * 30


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """60 documents as a data set of the hub would have them, one in 10 for validation."""
    rows = [{"text": f"Document {i}.\n" + TEXT[: 7 * i], "id": i} for i in range(60)]
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setitem(data.CORPORA, "openwebtext", (str(tmp_path / "hub"), None))
    monkeypatch.setattr(data, "VAL_EVERY", 10)
    return [row["text"] for row in rows]


def pieces():
    for i in range(40):
        yield Piece("val" if i % 10 == 0 else "train", f"{i}: {TEXT[: 13 * i]}", i % 3 != 1)


def write(folder, of=pieces, processes=1, name="byte", report=lambda shard: None, **changes):
    """Into shards of 1000 characters, by a tokenizer that ends documents."""
    arguments = {
        "data": "some text",
        "tokenizer_name": name,
        "tokenizer": lambda: BPETokenizer.trained_on([TEXT], 280),
        "shard_chars": 1000,
        **changes,
    }
    return write_shards(folder, of(), processes=processes, report=report, **arguments)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_bytes_are_the_same_from_several_processes(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two", processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    header, tokenizer, splits = read_shards(tmp_path / "one")
    assert len(header.shards) > 5
    assert sum(shard.documents for shard in header.shards) == sum(piece.ends for piece in pieces())
    for split, tokens in splits.items():
        of_split = [piece for piece in pieces() if piece.split == split]
        wanted = "".join(piece.text + "<|endoftext|>" * piece.ends for piece in of_split)
        assert tokenizer.decode(tokens[np.arange(len(tokens))]) == wanted
        counted = [shard for shard in header.shards if shard.file.startswith(split)]
        assert sum(shard.tokens for shard in counted) == len(tokens)
        assert sum(shard.text_bytes for shard in counted) == sum(len(piece.text.encode()) for piece in of_split)


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 4])
def test_cut_short_it_goes_on_and_ends_with_the_same_bytes(tmp_path, after):
    write(tmp_path / "whole")
    seen = []

    def stop(shard):
        seen.append(shard)
        if len(seen) > after:
            raise Stop

    with pytest.raises(Stop):
        write(tmp_path / "cut", report=stop)
    with pytest.raises(UserError, match="not prepared to its end"):
        read_shards(tmp_path / "cut")
    (tmp_path / "cut" / ".new-train-00009.bin-77").write_bytes(b"of a kill")
    kept = {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in contents(tmp_path / "cut")}
    write(tmp_path / "cut", tokenizer=None)  # which is not made again
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    for shard in seen[:after]:
        assert (tmp_path / "cut" / shard.file).stat().st_mtime_ns == kept[shard.file]


def test_a_damaged_shard_is_named_and_made_again(tmp_path):
    write(tmp_path / "x")
    good = contents(tmp_path / "x")
    path = tmp_path / "x" / "train-00002.bin"
    for damage in (bytes([good[path.name][0] ^ 1]) + good[path.name][1:], good[path.name][:-2], b"", None):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(UserError, match=r"train-00002\.bin: damaged: .* the same fastgpt prepare mend it"):
            read_shards(tmp_path / "x")
        if damage is not None and len(damage) == len(good[path.name]):
            load_dataset(str(tmp_path / "x"), 8, verify=False)  # another process has done so
        write(tmp_path / "x")
        assert contents(tmp_path / "x") == good


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda h: h.update(version=1), "its version must be 2, got 1"),
        (lambda h: h.update(complete="yes"), "damaged: a header must hold"),
        (lambda h: h.update(extra=1), "damaged: a header must hold"),
        (lambda h: h.pop("data"), "damaged: a header must hold"),
        (lambda h: h.update(shards={}), "damaged: shards must be a list"),
        (lambda h: h.update(dtype="object"), "damaged: dtype must be uint16 or uint32, got 'object'"),
        (lambda h: h.update(dtype="uint32"), "damaged: 280 tokens do not go by uint32"),
        (lambda h: h.update(dtype=["uint16"]), "damaged: a header must hold"),
        (lambda h: h["shards"].append(3), "damaged: a shard must hold"),
        (lambda h: h["shards"][0].update(file="../../secret"), "a shard's file must be train-N.bin or val-N.bin"),
        (lambda h: h["shards"][0].update(tokens=-1), "counts less than nothing"),
        (lambda h: h["shards"][0].update(tokens=10**15), "not 1,000,000,000,000,000 tokens"),
        (lambda h: h["shards"][0].update(tokens=1.5), "damaged: a shard must hold"),
        (lambda h: h.update(vocab_size=281), "damaged: vocab_size must be the tokenizer's 280, got 281"),
        (lambda h: h.update(tokenizer_sha256="0"), "not the tokenizer that the folder was prepared with"),
    ],
)
def test_a_damaged_header_is_one_sentence(tmp_path, change, sentence):
    write(tmp_path / "x")
    header = json.loads((tmp_path / "x" / "header.json").read_text())
    change(header)
    (tmp_path / "x" / "header.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match=sentence):
        read_shards(tmp_path / "x")


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path):
    write(tmp_path / "x")
    tokens = np.fromfile(tmp_path / "x" / "val-00000.bin", "<u2")
    tokens[3] = 280
    tokens.tofile(tmp_path / "x" / "val-00000.bin")
    header = json.loads((tmp_path / "x" / "header.json").read_text())
    shard = next(shard for shard in header["shards"] if shard["file"] == "val-00000.bin")
    shard["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    (tmp_path / "x" / "header.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match=r"val-00000\.bin: damaged: it holds token 280, and the tokenizer has 280"):
        read_shards(tmp_path / "x")


def test_another_folder_text_or_tokenizer_is_refused(tmp_path):
    write(tmp_path / "x")
    good = contents(tmp_path / "x")
    with pytest.raises(
        UserError, match=r"holds some text by tokenizer byte in shards of 1,000 .* not some text by char"
    ):
        write(tmp_path / "x", name="char")
    with pytest.raises(UserError, match="the text of some text is not the one"):
        write(tmp_path / "x", lambda: (piece._replace(text=piece.text.replace("q", "k")) for piece in pieces()))
    with pytest.raises(UserError, match="shorter than it was"):
        write(tmp_path / "x", lambda: (piece for piece in pieces() if piece.split == "train"))
    assert contents(tmp_path / "x") == good
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    (tmp_path / "run" / ".new-config.json-3").touch()
    with pytest.raises(UserError, match=r"run: holds config\.json and no prepared data"):
        write(tmp_path / "run")
    assert sorted(contents(tmp_path / "run")) == [".new-config.json-3", "config.json"]


def test_a_named_tokenizer_that_has_changed_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    named = tmp_path / "mine.json"

    def prepared(**characters):
        named.write_text(json.dumps({"type": "char", "characters": "".join(sorted({*TEXT, *characters}))}))
        return prepare(str(tmp_path / "text.txt"), str(named), tmp_path / "x")

    assert prepared().complete
    assert prepared().complete
    good = contents(tmp_path / "x")
    with pytest.raises(UserError, match=r"x: .*mine\.json is not the tokenizer that it was: choose another folder"):
        prepared(z=True)
    assert contents(tmp_path / "x") == good


def test_a_corpus_of_the_hub(tmp_path, corpus):
    prepare("openwebtext", "bpe:300", tmp_path / "out")
    dataset = load_dataset(str(tmp_path / "out"), block_size=8)
    assert dataset.train.dtype == np.uint16
    for split, tokens in (("train", dataset.train), ("val", dataset.val)):
        wanted = [text for i, text in enumerate(corpus) if (i % 10 == 0) == (split == "val")]
        assert dataset.tokenizer.decode(tokens) == "".join(text + "<|endoftext|>" for text in wanted)
    with pytest.raises(UserError, match="openwebtext is prepared first: fastgpt prepare --data openwebtext"):
        load_dataset("openwebtext", 8)
    with pytest.raises(UserError, match="prepared with tokenizer bpe:300, not gpt2"):
        load_dataset(str(tmp_path / "out"), 8, "gpt2")
    with pytest.raises(UserError, match="prepared with tokenizer bpe:300, which is not the run's"):
        load_dataset(str(tmp_path / "out"), 8, ByteTokenizer())
    assert load_dataset(str(tmp_path / "out"), 8, dataset.tokenizer).val[3] == dataset.val[3]


def test_a_corpus_that_cannot_be_had_is_one_sentence(tmp_path, corpus, monkeypatch):
    monkeypatch.setitem(data.CORPORA, "openwebtext", (str(tmp_path / "nowhere"), None))
    with pytest.raises(UserError, match=r"openwebtext cannot be streamed from the Hugging Face hub \(\w+Error: "):
        prepare("openwebtext", "byte", tmp_path / "out")
    assert not (tmp_path / "out" / "header.json").exists() or not read_header(tmp_path / "out").complete


class Broken(Exception):
    """As httpx's and aiohttp's, no OSError."""


@pytest.mark.parametrize(
    "error", [Broken("peer closed\nconnection"), TimeoutError("timed out"), ValueError("bad file")]
)
def test_a_stream_that_breaks_off_says_so_and_the_same_command_goes_on(tmp_path, monkeypatch, error):
    import datasets

    monkeypatch.setattr(data, "SHARD_CHARS", 1000)
    rows = [{"text": f"Document {i}.\n" + TEXT[: 7 * i]} for i in range(60)]

    def breaks_off(*_, **__):
        yield from rows[:40]
        raise error

    monkeypatch.setattr(datasets, "load_dataset", breaks_off)
    with pytest.raises(
        UserError, match=r"openwebtext: .* broke off after 40 documents .*: the same command goes on"
    ) as e:
        prepare("openwebtext", "byte", tmp_path / "cut")
    assert "\n" not in str(e.value)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("train-*")}
    assert len(before) > 3
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    prepare("openwebtext", "byte", tmp_path / "cut")
    prepare("openwebtext", "byte", tmp_path / "whole")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert all((tmp_path / "cut" / name).stat().st_mtime_ns == time_ for name, time_ in before.items())


def test_a_second_prepare_in_the_same_folder_is_refused(tmp_path):
    def second(shard):
        before = contents(tmp_path / "x")
        with pytest.raises(UserError, match="x: another fastgpt prepare is at work here: wait for its end"):
            write(tmp_path / "x")
        assert contents(tmp_path / "x") == before
        refused.append(shard)

    refused = []
    write(tmp_path / "x", report=second)
    assert len(refused) > 5
    write(tmp_path / "whole")
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")
    write(tmp_path / "x")  # held no longer


def test_a_folder_that_nothing_came_of_does_not_stay(tmp_path):
    def none():
        raise UserError("no tokenizer")

    with pytest.raises(UserError, match="no tokenizer"):
        write(tmp_path / "x", tokenizer=none)
    assert not (tmp_path / "x").exists()


def test_a_folder_of_texts_is_split_by_bytes_with_an_end_after_each_document(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE_CHARS", 100)
    (tmp_path / "texts").mkdir()
    documents = [f"{i}\u2713 {TEXT[:i]}" for i in (500, 30, 700)]
    for i, text in enumerate(documents):
        (tmp_path / "texts" / f"{i}.txt").write_text(text, encoding="utf-8")
    dataset = load_dataset(str(tmp_path / "texts"), 8, "bpe:300")
    train, val = (dataset.tokenizer.decode(tokens) for tokens in (dataset.train, dataset.val))
    assert train[-13:] == val[-13:] == "<|endoftext|>"
    assert train.removesuffix("<|endoftext|>") + val == "".join(text + "<|endoftext|>" for text in documents)
    assert len(val.encode()) - 13 == pytest.approx(0.1 * len("".join(documents).encode()), abs=4)
    again = load_dataset(str(tmp_path / "texts"), 8, dataset.tokenizer)  # as a resumed run does
    assert again.train.filename == dataset.train.filename


def test_shards_are_read_as_one_array():
    tokens = np.arange(100, dtype=np.uint16)
    shards = Shards([tokens[:1], tokens[1:40], tokens[40:41], tokens[41:]])
    assert len(shards) == 100
    batches = [Batches(of, 64, 9, 0, "train", torch.device("cpu"))[0] for of in (tokens, shards)]
    assert torch.equal(batches[0][0], batches[1][0])
    assert torch.equal(batches[0][1], batches[1][1])


def test_the_command_prepares_trains_samples_and_evaluates(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    code, out, err = command("prepare", "--data=text.txt", "--tokenizer=bpe:280", "--out=made", "--processes=1")
    assert (code, err) == (0, "")
    assert "val: " in out
    assert "vocabulary: 280 tokens\n" in out
    assert "fastgpt train --data made" in out
    code, out, err = command("prepare", "--data=text.txt", "--tokenizer=bpe:9999", "--out=small", "--processes=1")
    size = read_header(Path("small")).vocab_size
    assert (code, err) == (0, "")
    assert f"vocabulary: {size:,} tokens (the text has no more for 9,999)" in out
    assert f"tokens of {len(TEXT.encode()) / 1000:.1f} kB" in out
    assert size == read_shards(Path("small"))[1].vocab_size < 9999
    tiny = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=8", "--batch-size=4", "--eval-iters=1"]
    short = [*tiny, "--max-iters=3", "--final-eval-iters=1", "--sample-tokens=5", "--device=cpu"]
    code, out, err = command("train", "--data=made", "--out=run", *short)
    assert (code, err) == (0, "")
    assert "vocabulary 280" in out
    code, out, err = command("sample", "run", "--prompt=To \u2713", "--num-tokens=20", "--device=cpu")
    assert (code, err) == (0, "")
    assert out.startswith("To \u2713")
    found = {}
    for name in ("made", "text.txt"):
        code, out, err = command("eval", "run", f"--data={name}", "--stride=3", "--json", "--device=cpu")
        assert (code, err) == (0, "")
        found[name] = json.loads(out)
    assert found["text.txt"]["tokens"] == len(load_tokens("text.txt", load_dataset("made", 8).tokenizer).tokens) - 1
    assert found["made"]["tokens"] == len(load_dataset("made", 8).val) - 1
    assert 4 < found["text.txt"]["loss"] < 6
    assert found["text.txt"]["perplexity"] == pytest.approx(np.exp(found["text.txt"]["loss"]))
    code, out, err = command("eval", "run", "--data=text.txt", "--device=cpu")
    assert code == 0
    assert "bits per byte" in out
    for arguments, sentence in (
        (["eval", "run", "--stride=3"], "--stride is for --data"),
        (["eval", "run", "--data=text.txt", "--eval-iters=3"], "--eval-iters is for the run's own data"),
        (["eval", "run", "--data=text.txt", "--stride=9"], "stride must be from 1 to the model's block_size 8, got 9"),
        (
            ["train", "--resume", "--out=run", "--tokenizer=byte"],
            "--tokenizer cannot change when a run is resumed: it is bpe",
        ),
        (["train", "--data=made", "--tokenizer=char"], "made: prepared with tokenizer bpe:280, not char"),
        (["prepare", "--data=text.txt", "--out=run"], "run: holds checkpoints and no prepared data"),
        (["prepare", "--data=nothing.txt", "--out=new"], "nothing.txt: cannot be read"),
        (["prepare", "--data=text.txt", "--out=new", "--tokenizer=word"], "tokenizer must be char"),
    ):
        code, out, err = command(*arguments)
        assert code == 2
        assert err.count("\n") == 1
        assert sentence in err


SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("signum", "wanted", "word"), SIGNALS)
def test_a_signal_ends_the_command_in_one_line_and_it_goes_on(tmp_path, command, monkeypatch, signum, wanted, word):
    (tmp_path / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    monkeypatch.setattr(data, "PIECE_CHARS", 2000)
    arguments = ["prepare", f"--data={tmp_path / 'text.txt'}", "--tokenizer=byte", "--processes=1"]
    assert command(*arguments, f"--out={tmp_path / 'whole'}")[0] == 0
    tokenize, left = shards._tokenize, [3]

    def interrupted(*job):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signum)
        return tokenize(*job)

    monkeypatch.setattr(shards, "_tokenize", interrupted)
    code, _, err = command(*arguments, f"--out={tmp_path / 'cut'}")
    assert (code, err) == (wanted, f"fastgpt: {word}\n")
    assert len(list((tmp_path / "cut").glob("train-*"))) == 2
    assert command(*arguments, f"--out={tmp_path / 'cut'}")[0] == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.full
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(tmp_path):
    script = (
        "import sys\nsys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\nimport test_prepare\n"
        "if __name__ == '__main__':\n    test_prepare.write(Path(sys.argv[2]), processes=2)\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, str(tmp_path / "script.py"), str(Path(__file__).parent)]
    began = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    took = time.monotonic() - began
    rng = np.random.default_rng(seed := time.time_ns())
    kills = 0
    for delay in sorted(rng.uniform(0.3 * took, took, size=8)):
        process = subprocess.Popen([*command, str(tmp_path / "cut")], stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    subprocess.run([*command, str(tmp_path / "cut")], check=True)
    assert kills > 0, seed
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole"), seed
