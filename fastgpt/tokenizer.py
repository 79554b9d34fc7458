"""Text to tokens and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fastgpt.config import UserError


class CharTokenizer:
    """One token per character: the ids are places in ``characters``, which is sorted by code point.

    Raises:
        UserError: ``characters`` is empty, or not sorted and unique.
    """

    def __init__(self, characters: str) -> None:
        if not characters or list(characters) != sorted(set(characters)):
            raise UserError("CharTokenizer: characters must be sorted, unique and at least one")
        self.characters = characters
        self._codes = _code_points(characters)

    @classmethod
    def trained_on(cls, text: str) -> CharTokenizer:
        """The tokenizer of the characters that occur in ``text``."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Tokens of ``text``: one int64 per character.

        Raises:
            UserError: a character that the vocabulary does not have.
        """
        codes = _code_points(text)
        ids = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        unknown = self._codes[ids] != codes
        if unknown.any():
            missing = "".join(sorted(set(map(chr, codes[unknown].tolist()))))
            raise UserError(f"the vocabulary of {self.vocab_size} characters does not have {missing[:20]!r}")
        return ids.astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; one beyond the vocabulary, as a model of a larger vocab_size may draw, is U+FFFD."""
        return "".join(self.characters[i] if i < len(self.characters) else "\ufffd" for i in ids)

    def to_json(self) -> dict[str, Any]:
        return {"type": "char", "characters": self.characters}

    @classmethod
    def from_json(cls, data: Any) -> CharTokenizer:
        """
        Raises:
            UserError: ``data`` is not what ``to_json`` writes.
        """
        if not isinstance(data, dict) or data.get("type") != "char" or not isinstance(data.get("characters"), str):
            raise UserError('a tokenizer must be {"type": "char", "characters": "..."}')
        return cls(data["characters"])


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
