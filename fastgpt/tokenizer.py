"""Text to tokens and back.

Every tokenizer is a table of the bytes that each token stands for, and a way to cut text into them; the bytes are
UTF-8's, and a token need not be whole characters.
"""

from __future__ import annotations

import base64
import codecs
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastgpt.config import UserError
from fastgpt.extras import require
from fastgpt.files import read_json

DEFAULT_SIZE = 4096  # of a vocabulary that is trained
LARGEST_SIZE = 1 << 24  # of it, as a model's vocab_size
TRAINING_CHARS = 1 << 24  # how much of a text a tokenizer is trained on
END_OF_TEXT = "<|endoftext|>"
_NAME = re.compile(r"(char|byte|gpt2)|(bpe|sentencepiece)(?::(\d{1,9}))?")  # of a --tokenizer


class Tokenizer(ABC):
    """What a run needs of its tokenizer; ``to_json`` is what RUN/tokenizer.json holds.

    Attributes:
        kind: the "type" in tokenizer.json.
        end_of_text: the token that ends a document, None where there is none. ``encode`` never makes it from text.
    """

    kind: ClassVar[str]
    end_of_text: int | None = None

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    @property
    def beginning(self) -> str:
        """What a text without a prompt starts from."""
        return "\n"

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Tokens of ``text``, int64; ``decode`` gives it back unchanged.

        Raises:
            UserError: a character that the vocabulary does not have.
        """

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``; one beyond the vocabulary, as a model of a larger vocab_size may draw, is U+FFFD's."""
        return b"".join(self._pieces[i] if i < len(self._pieces) else b"\xef\xbf\xbd" for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are no character are U+FFFD."""
        return self.to_bytes(ids).decode("utf-8", "replace")

    def decoder(self) -> Callable[..., str]:
        """A function of (ids, final=False) for tokens that come little by little: the characters whole by now."""
        whole = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda ids, final=False: whole.decode(self.to_bytes(ids), final)

    def to_json(self) -> dict[str, Any]:
        return {"type": self.kind}

    @staticmethod
    def from_json(data: Any) -> Tokenizer:
        """
        Raises:
            UserError: ``data`` is not what ``to_json`` writes, or a package is missing.
        """
        kind = data.get("type") if isinstance(data, dict) else None
        if not isinstance(kind, str) or kind not in _KINDS:
            raise UserError(f"a tokenizer must be an object whose type is {', '.join(_KINDS)}, got {str(kind)[:40]!r}")
        return _KINDS[kind]._from_json(data)

    @classmethod
    @abstractmethod
    def _from_json(cls, data: dict[str, Any]) -> Tokenizer:
        """``from_json`` of an object whose type is this class's kind."""


def make_tokenizer(name: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer of a ``--tokenizer``.

    Args:
        name: "char", "byte", "gpt2", "bpe" or "sentencepiece", the last two with ":SIZE" of the vocabulary behind them;
            or the path of a tokenizer.json.
        texts: what those that are trained (char, bpe, sentencepiece) are trained on.
    Raises:
        UserError: no such tokenizer, a package that is missing, or a text that it cannot be trained on.
    """
    if name.endswith(".json"):
        return read_tokenizer(Path(name).expanduser())
    parsed = _NAME.fullmatch(name)
    if parsed is None:
        raise UserError(
            f"tokenizer must be char, byte, gpt2, bpe[:SIZE], sentencepiece[:SIZE] or a tokenizer.json, got {name!r}"
        )
    simple, trained, _ = parsed.groups()
    if simple == "char":
        characters: set[str] = set()
        for text in texts():  # which may be a corpus: one of them in memory at a time
            characters.update(text)
        return CharTokenizer.trained_on("".join(characters))
    if simple is not None:
        return ByteTokenizer() if simple == "byte" else GPT2Tokenizer()
    kind = BPETokenizer if trained == "bpe" else SentencePieceTokenizer
    size = wanted_size(name)
    assert size is not None
    if size >= LARGEST_SIZE:
        raise UserError(f"{trained}:SIZE must be less than {LARGEST_SIZE:,}, got {size:,}")
    return kind.trained_on(_first(texts(), TRAINING_CHARS), size)


def wanted_size(name: str) -> int | None:
    """The vocabulary that a ``--tokenizer`` asks for, where it is one that is trained to a size."""
    parsed = _NAME.fullmatch(name)
    return int(parsed[3] or DEFAULT_SIZE) if parsed and parsed[2] else None


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Raises:
        UserError: as ``Tokenizer.from_json``, after the file's name.
    """
    data = read_json(path)
    try:
        return Tokenizer.from_json(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class CharTokenizer(Tokenizer):
    """One token per character: the ids are places in ``characters``, which is sorted by code point.

    Raises:
        UserError: ``characters`` is empty, or not sorted and unique.
    """

    kind = "char"

    def __init__(self, characters: str) -> None:
        if not characters or list(characters) != sorted(set(characters)):
            raise UserError("CharTokenizer: characters must be sorted, unique and at least one")
        super().__init__([character.encode("utf-8", "surrogatepass") for character in characters])
        self.characters = characters
        self._codes = _code_points(characters)

    @classmethod
    def trained_on(cls, text: str) -> CharTokenizer:
        """The tokenizer of the characters that occur in ``text``."""
        return cls("".join(sorted(set(text))))

    @property
    def beginning(self) -> str:
        return "\n" if "\n" in self.characters else self.characters[0]

    def encode(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        ids = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        unknown = self._codes[ids] != codes
        if unknown.any():
            missing = "".join(sorted(set(map(chr, codes[unknown].tolist()))))
            raise UserError(f"the vocabulary of {self.vocab_size} characters does not have {missing[:20]!r}")
        return ids.astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        return {"type": self.kind, "characters": self.characters}

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> CharTokenizer:
        if not isinstance(data.get("characters"), str):
            raise UserError('a tokenizer must be {"type": "char", "characters": "..."}')
        return cls(data["characters"])


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__([bytes([byte]) for byte in range(256)])

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> ByteTokenizer:
        return cls()


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte pairs (Radford et al., 2019), by tiktoken, which fetches the vocabulary on first use and keeps it.

    Raises:
        UserError: tiktoken is not installed, or the vocabulary is neither here nor to be fetched.
    """

    kind = "gpt2"

    def __init__(self) -> None:
        tiktoken = require("tiktoken", "data", "GPT-2's tokenizer")
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network; what came has another sha256
            raise UserError(
                "GPT-2's vocabulary cannot be fetched, and TIKTOKEN_CACHE_DIR names no folder that has it "
                f"({type(error).__name__}: {str(error)[:200]})"
            ) from error
        super().__init__([self._encoding.decode_single_token_bytes(i) for i in range(self._encoding.n_vocab)])
        self.end_of_text = self._encoding.eot_token

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode_ordinary(text), dtype=np.int64)

    def to_hf(self) -> str:
        """As ``BPETokenizer.to_hf``."""
        characters = {byte: character for character, byte in _byte_alphabet().items()}
        ranks = {piece: i for i, piece in enumerate(self._pieces) if i != self.end_of_text}
        halves = [_halves(piece, ranks) for piece in ranks if len(piece) > 1]

        def written(piece: bytes) -> str:
            return "".join(characters[byte] for byte in piece)

        merges = [f"{written(left)} {written(right)}" for left, right in halves]
        return BPETokenizer([written(piece) for piece in self._pieces], merges).to_hf()

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> GPT2Tokenizer:
        return cls()


class BPETokenizer(Tokenizer):
    """Byte pairs of one's own, cut and merged as GPT-2's are, by Hugging Face tokenizers.

    Args:
        tokens: by id, each byte written as the character that GPT-2 has for it; all bytes and END_OF_TEXT among them.
        merges: "left right", the first to be merged first, as in GPT-2's merges.txt.
    Raises:
        UserError: tokens or merges that are not so, or tokenizers is not installed.
    """

    kind = "bpe"

    def __init__(self, tokens: Sequence[str], merges: Sequence[str]) -> None:
        alphabet = _byte_alphabet()
        ids = {token: i for i, token in enumerate(tokens)}
        pairs = [tuple(merge.split(" ")) for merge in merges]
        if len(ids) < len(tokens) or not {*alphabet, END_OF_TEXT} <= ids.keys():
            raise UserError(f"a bpe's tokens must be different, and all bytes and {END_OF_TEXT} among them")
        if not all(alphabet.keys() >= set(token) and token for token in tokens):
            raise UserError("a bpe's tokens must be written in GPT-2's characters for bytes")
        if not all(len(pair) == 2 and {*pair, "".join(pair)} <= ids.keys() for pair in pairs):
            raise UserError("a bpe's merges must be two tokens each that make a third")
        super().__init__([bytes(alphabet[character] for character in token) for token in tokens])
        self.end_of_text = ids[END_OF_TEXT]
        self.tokens, self.merges = list(tokens), list(merges)
        hf = require("tokenizers", "data", "a tokenizer of type bpe")
        self._model = _byte_level(hf, hf.models.BPE(vocab=ids, merges=pairs))

    @classmethod
    def trained_on(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Of ``vocab_size`` tokens, or fewer where ``texts`` has no pairs left that occur twice."""
        hf = require("tokenizers", "data", "a tokenizer of type bpe")
        alphabet = sorted(_byte_alphabet())
        if vocab_size <= len(alphabet):
            raise UserError(f"bpe:SIZE must be at least {len(alphabet) + 1}, the bytes and one, got {vocab_size}")
        model = _byte_level(hf, hf.models.BPE())
        trainer = hf.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        vocabulary = model.get_vocab()
        merges = json.loads(model.to_str())["model"]["merges"]
        return cls(sorted(vocabulary, key=vocabulary.__getitem__), [" ".join(pair) for pair in merges])

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text).ids, dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        return {"type": self.kind, "tokens": self.tokens, "merges": self.merges}

    def to_hf(self) -> str:
        """What Hugging Face's tokenizer.json holds; END_OF_TEXT is a special token there, which is made from text."""
        hf = require("tokenizers", "data", "a tokenizer of type bpe")
        tokenizer = hf.Tokenizer.from_str(self._model.to_str())
        tokenizer.decoder = hf.decoders.ByteLevel()
        tokenizer.add_special_tokens([END_OF_TEXT])
        return tokenizer.to_str()

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> BPETokenizer:
        tokens, merges = (data.get(name) for name in ("tokens", "merges"))
        for texts in (tokens, merges):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UserError('a tokenizer must be {"type": "bpe", "tokens": ["..."], "merges": ["... ..."]}')
        return cls(tokens, merges)  # type: ignore[arg-type]


class SentencePieceTokenizer(Tokenizer):
    """A unigram model (Kudo, 2018) of one's own, by SentencePiece; what it has no piece for goes byte by byte.

    Args:
        model: the file that SentencePiece writes.
    Raises:
        UserError: a damaged model, one without a piece for each byte, or sentencepiece is not installed.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        spm = require("sentencepiece", "data", "a tokenizer of type sentencepiece")
        try:
            self._processor = processor = spm.SentencePieceProcessor()
            processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"this is no model of SentencePiece ({' '.join(str(error).split())[:200]})") from error
        ids = range(processor.vocab_size())
        bytes_ = {processor.id_to_piece(i): i for i in ids if processor.is_byte(i)}
        if len(bytes_) != 256:
            raise UserError("a model of SentencePiece must have a piece for each of the 256 bytes (byte_fallback)")
        super().__init__([self._bytes_of(i) for i in ids])
        self._space = [bytes_[f"<0x{byte:02X}>"] for byte in _SPACE.encode()]
        self.end_of_text = processor.eos_id() if processor.eos_id() >= 0 else None
        self._serialized = model

    @classmethod
    def trained_on(cls, texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
        """Of ``vocab_size`` tokens, or fewer where ``texts`` does not have as many worth it."""
        spm = require("sentencepiece", "data", "a tokenizer of type sentencepiece")
        model = io.BytesIO()
        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=_lines(texts),
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                # The text comes back as it was: nothing is normalised, added or left out.
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                unk_id=0,
                eos_id=1,
                bos_id=-1,
                pad_id=-1,
                eos_piece=END_OF_TEXT,
                num_threads=1,  # more would add up in another order each time
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            needed = re.search(r"required_chars\. \d+ vs (\d+)", reason)
            if needed:
                raise UserError(
                    f"sentencepiece:SIZE must be at least {needed[1]} for this text, the bytes, two of its own and the "
                    f"text's characters, got {vocab_size}"
                ) from error
            if "sentences_.empty()" in reason:
                raise UserError("sentencepiece cannot be trained on a text of empty lines alone") from error
            raise UserError(f"sentencepiece:{vocab_size} cannot be trained on this text ({reason[:200]})") from error
        return cls(model.getvalue())

    def encode(self, text: str) -> np.ndarray:
        # SentencePiece writes a space as U+2581; where the text itself has that character, it goes byte by byte.
        first, *others = (self._processor.encode(part) for part in text.split(_SPACE))
        for part in others:
            first += self._space + part
        return np.array(first, dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        return {"type": self.kind, "model": base64.b64encode(self._serialized).decode()}

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> SentencePieceTokenizer:
        try:
            return cls(base64.b64decode(data["model"], validate=True))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError('a tokenizer must be {"type": "sentencepiece", "model": "BASE64"}') from error

    def _bytes_of(self, token: int) -> bytes:
        piece = self._processor.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if self._processor.is_byte(token) else piece.replace(_SPACE, " ").encode()


_KINDS: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (CharTokenizer, ByteTokenizer, GPT2Tokenizer, BPETokenizer, SentencePieceTokenizer)
}
_SPACE = "\u2581"
_LINE = 1000  # characters; SentencePiece leaves out what has more than 4192 bytes


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _first(texts: Iterable[str], chars: int) -> Iterator[str]:
    """The texts up to ``chars`` characters in all."""
    for text in texts:
        yield text[:chars]
        chars -= len(text)
        if chars <= 0:
            return


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            yield from (line[start : start + _LINE] for start in range(0, len(line), _LINE))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: itself where it prints and is no space, else the next one from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in own)
    return {chr(byte): byte for byte in own} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _halves(piece: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two tokens that merging by ``ranks``, the lowest first, has made of ``piece`` before it makes it whole."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        first = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


def _byte_level(hf: Any, model: Any) -> Any:
    """A Hugging Face tokenizer of ``model`` that cuts text into words as GPT-2 does, and words into bytes."""
    tokenizer = hf.Tokenizer(model)
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer
