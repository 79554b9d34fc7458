"""Every tokenizer gives back the text that it was given, and reads of a file no more than it wrote."""

import base64
import importlib.util
import io
import json
import weakref

import numpy as np
import pytest
import sentencepiece
import tiktoken

from fastgpt import tokenizer as tokenizers
from fastgpt.config import UserError
from fastgpt.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    make_tokenizer,
    read_tokenizer,
)

TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n" * 20
ODD = (
    "  two  spaces\t\ttabs\r\n\n\nhéllo wörld \U0001f600\U0001f468\u200d\U0001f469 \u2581a\u2581\u2581 \x00 e\u0301 "
    "<|endoftext|> </s>"
)


@pytest.fixture
def small_gpt2(monkeypatch):
    """tiktoken's GPT-2, with a vocabulary of the bytes, three merges and the end of text."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    encoding = tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 259})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)


@pytest.fixture(scope="module")
def trained():
    """The two that are trained, on TEXT."""
    return {
        "bpe": BPETokenizer.trained_on([TEXT], 300),
        "sentencepiece": SentencePieceTokenizer.trained_on([TEXT], 300),
    }


@pytest.fixture(params=["char", "byte", "gpt2", "bpe", "sentencepiece"])
def any_tokenizer(request, small_gpt2, trained):
    simple = {"char": lambda: CharTokenizer.trained_on(TEXT + ODD), "byte": ByteTokenizer, "gpt2": GPT2Tokenizer}
    return trained[request.param] if request.param in trained else simple[request.param]()


def test_the_text_comes_back_through_its_json_too(any_tokenizer):
    again = Tokenizer.from_json(json.loads(json.dumps(any_tokenizer.to_json())))
    assert type(again) is type(any_tokenizer)
    assert (again.vocab_size, again.end_of_text) == (any_tokenizer.vocab_size, any_tokenizer.end_of_text)
    for text in (TEXT, ODD, "", "\u2581", any_tokenizer.beginning):
        ids = any_tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert any_tokenizer.decode(ids) == text
        assert again.encode(text).tolist() == ids.tolist()
        assert len(any_tokenizer.to_bytes(ids)) == len(text.encode())


def test_a_decoder_gives_whole_characters_as_soon_as_they_are_whole(any_tokenizer):
    decode, shown = any_tokenizer.decoder(), ""
    for i, token in enumerate(ids := any_tokenizer.encode(ODD).tolist()):
        shown += decode([token])
        assert ODD.startswith(shown)
        assert len(ODD[len(shown) :].encode()) - len(any_tokenizer.to_bytes(ids[i + 1 :])) <= 3
    assert shown + decode([], final=True) == ODD


def test_a_character_that_never_ends_is_a_replacement_character():
    decode = ByteTokenizer().decoder()
    assert decode([0xE2, 0x82]) == ""
    assert decode([], final=True) == "\ufffd"
    assert decode([ord("a"), 256]) == "a\ufffd"


def test_end_of_text_is_a_token_of_its_own_that_no_text_makes(any_tokenizer):
    end = any_tokenizer.end_of_text
    if any_tokenizer.kind in ("char", "byte"):
        assert end is None
    else:
        assert end not in any_tokenizer.encode("a<|endoftext|>b").tolist()
        assert any_tokenizer.decode([end]) == "<|endoftext|>"


def test_trained_ones_have_the_size_that_was_asked_for_and_need_fewer_tokens(trained):
    for tokenizer in trained.values():
        assert 260 < tokenizer.vocab_size <= 300
        assert len(tokenizer.encode(TEXT)) < len(TEXT) / 1.4
    assert trained["bpe"].to_json() == BPETokenizer.trained_on([TEXT], 300).to_json()
    assert trained["sentencepiece"].to_json() == SentencePieceTokenizer.trained_on([TEXT], 300).to_json()


def test_bpe_merges_bytes_as_gpt2_does(small_gpt2):
    alphabet = [chr(c) for c in range(0x100, 0x144)] + [
        chr(c) for c in range(33, 256) if not 127 <= c <= 160 and c != 173
    ]
    bpe = BPETokenizer(["<|endoftext|>", *alphabet, "th", "the", "\u0120the"], ["t h", "th e", "\u0120 the"])
    for text in (TEXT, ODD):
        pieces = [[tokenizer.to_bytes([i]) for i in tokenizer.encode(text)] for tokenizer in (bpe, GPT2Tokenizer())]
        assert pieces[0] == pieces[1]


def test_names(tmp_path, small_gpt2, monkeypatch):
    monkeypatch.setattr(tokenizers, "TRAINING_CHARS", 500)
    seen = []

    def texts():
        for _ in range(100):
            seen.append(1)
            yield TEXT[:100]

    assert make_tokenizer("char", texts).characters == "".join(sorted(set(TEXT[:100])))
    assert len(seen) == 100
    seen.clear()
    assert make_tokenizer("bpe:270", texts).vocab_size <= 270
    assert len(seen) == 5  # a tokenizer is trained on the beginning of a long text
    assert isinstance(make_tokenizer("byte", texts), ByteTokenizer)
    assert isinstance(make_tokenizer("gpt2", texts), GPT2Tokenizer)
    (tmp_path / "tokenizer.json").write_text('{"type": "char", "characters": "abc"}')
    assert make_tokenizer(str(tmp_path / "tokenizer.json"), texts).vocab_size == 3


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("word", r"tokenizer must be char, byte, gpt2, bpe\[:SIZE\], .* got 'word'"),
        ("bpe:many", "tokenizer must be char"),
        ("char:5", "tokenizer must be char"),
        ("bpe:256", "bpe:SIZE must be at least 257"),
        (
            "sentencepiece:10",
            r"sentencepiece:SIZE must be at least \d{3} for this text, the bytes, two of its own and the .* got 10",
        ),
        ("sentencepiece:16777216", r"sentencepiece:SIZE must be less than 16,777,216"),
        ("missing.json", r"missing\.json: cannot be read"),
    ],
)
def test_wrong_names_are_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence):
        make_tokenizer(name, lambda: [TEXT])


def test_gpt2_without_its_vocabulary_is_one_sentence(monkeypatch):
    def get_encoding(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(UserError, match=r"GPT-2's vocabulary cannot be fetched.*TIKTOKEN_CACHE_DIR.*no route to host"):
        Tokenizer.from_json({"type": "gpt2"})


def test_a_missing_package_is_one_sentence(trained, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for tokenizer, package in (("gpt2", "tiktoken"), ("bpe", "tokenizers"), ("sentencepiece", "sentencepiece")):
        data = trained[tokenizer].to_json() if tokenizer in trained else {"type": "gpt2"}
        with pytest.raises(UserError, match=rf"needs the package {package}: pip install 'fastgpt\[data\]'"):
            Tokenizer.from_json(data)


def without(items, *unwanted):
    return [item for item in items if item not in unwanted]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda bpe: {"tokens": bpe["tokens"][1:]}, "all bytes"),
        (lambda bpe: {"tokens": without(bpe["tokens"], "A")}, "all bytes"),
        (lambda bpe: {"tokens": [*bpe["tokens"], "A"]}, "must be different"),
        (lambda bpe: {"tokens": [*bpe["tokens"], "two words"]}, "GPT-2's characters"),
        (lambda bpe: {"tokens": [*bpe["tokens"], ""]}, "GPT-2's characters"),
        (lambda bpe: {"merges": ["A"]}, "two tokens each that make a third"),
        (lambda bpe: {"merges": ["A B C"]}, "two tokens each that make a third"),
        (lambda bpe: {"merges": ["A \u4e00"]}, "two tokens each that make a third"),
        (lambda bpe: {"merges": [["A", "B"]]}, '"merges"'),
        (lambda bpe: {"tokens": {"A": 0}}, '"tokens"'),
        (lambda bpe: {"merges": None}, '"merges"'),
    ],
)
def test_a_damaged_bpe_is_one_sentence(trained, damage, sentence):
    bpe = trained["bpe"].to_json()
    with pytest.raises(UserError, match=sentence):
        Tokenizer.from_json({**bpe, **damage(bpe)})


def test_a_damaged_sentencepiece_is_one_sentence(trained):
    model = base64.b64decode(trained["sentencepiece"].to_json()["model"])
    rng = np.random.default_rng(0)
    for damaged in (b"", b"\x00", b"gASVJAAAAAAAAACMBXBvc2l4", model[:1000], model[:-3], rng.bytes(2000)):
        with pytest.raises(UserError, match="SentencePiece"):
            Tokenizer.from_json({"type": "sentencepiece", "model": base64.b64encode(damaged).decode()})
    for wrong in (None, 3, "no base64!", ["a"]):
        with pytest.raises(UserError, match="BASE64"):
            Tokenizer.from_json({"type": "sentencepiece", "model": wrong})


def test_a_sentencepiece_that_cannot_say_every_byte_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="a piece for each of the 256 bytes"):
        SentencePieceTokenizer(model.getvalue())


@pytest.mark.parametrize("content", ["[]", "{}", '{"type": "pickle"}', '{"type": ["char"]}', "{", '{"type": "char"}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: "):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_characters_are_counted_with_one_text_in_memory_at_a_time():
    class Text(str):
        """One whose end can be seen."""

    alive: weakref.WeakSet[Text] = weakref.WeakSet()

    def texts():
        for i in range(50):
            assert len(alive) <= 2  # the one before, and the one that is made
            text = Text(f"{i}")
            alive.add(text)
            yield text

    assert tokenizers.make_tokenizer("char", texts).characters == "0123456789"
