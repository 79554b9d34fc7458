"""Sampling from a model: tokens, and texts that stop where they are to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.config import UserError
from fastgpt.model import GPT, Bigram, KVCache
from fastgpt.tokenizer import Tokenizer


def check_sampling(temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float = 1.0) -> None:
    """
    Raises:
        UserError: a setting out of its range.
    """
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top-k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top-p must be in (0, 1], got {top_p}")
    if not 0 < repetition_penalty < float("inf"):
        raise UserError(f"repetition-penalty must be greater than 0 and finite, got {repetition_penalty}")


@torch.no_grad()
def generate(
    model: GPT | Bigram,
    idx: Tensor,
    num_tokens: int,
    *,
    lengths: Sequence[int] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue each sequence of ``idx`` by ``num_tokens`` tokens, one at a time.

    A GPT sees the last block_size tokens. Until a sequence is longer, keys and values are kept and each token is read
    once. From then on every token has another position at each step, and so other keys and values: the whole window is
    read for each new token, as it is without a cache. With and without it, logits differ by rounding alone.

    Args:
        model: in evaluation mode; one that ``torch.compile`` made generates uncompiled, for its shapes keep changing.
        idx: (B, T), int64, T at least 1.
        num_tokens: how many to draw.
        lengths: tokens of each sequence, from 1 to T, the rest of its row being padding of any kind; None is T.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw from the k most probable tokens.
        top_p: draw from the fewest tokens whose probabilities add up to p (Holtzman et al., 2020).
        repetition_penalty: divides the positive logits of tokens that a sequence has, and multiplies the negative ones;
            1 changes nothing (Keskar et al., 2019, section 4.1, by the sign of the logit).
        use_cache: keep keys and values; without, all tokens are read for each new one.
        generator: on ``idx``'s device; None is the default one.
    Yields:
        (B, 1), int64: the next token of each sequence.
    Raises:
        UserError: a setting out of its range, nothing to continue, or a model in training mode.
    """
    check_sampling(temperature, top_k, top_p, repetition_penalty)
    model = getattr(model, "_orig_mod", model)
    if model.training:
        raise UserError("generate: the model is in training mode, where it drops at random: call its eval() first")
    idx, ends = _prompts(idx, lengths)  # (B, T), (B,)
    block_size = model.config.block_size
    cache = None
    if use_cache and isinstance(model, GPT):
        cache = KVCache(min(idx.shape[1] + num_tokens - 1, block_size))
    seen = torch.zeros(idx.shape[0], model.config.vocab_size, dtype=torch.bool, device=idx.device)  # (B, V)
    unread = idx
    for _ in range(num_tokens):
        if idx.shape[1] > block_size:
            cache = None
        if cache is not None:
            logits, _ = model(unread, last_only=True, lengths=ends, cache=cache)
        else:
            window, ends_in_window = _window(idx, ends, block_size)
            logits, _ = model(window, last_only=True, lengths=ends_in_window)
        logits = logits[:, -1].float()  # (B, V)
        if repetition_penalty != 1:
            logits = _penalise(logits, seen.scatter_(1, unread, True), repetition_penalty)
        unread = sample(logits, temperature, top_k, top_p, generator)  # (B, 1)
        yield unread
        idx = torch.cat([idx, unread], dim=1)
        if ends is not None:
            idx.scatter_(1, ends[:, None], unread)
            ends = ends + 1


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token for each row of ``logits`` (B, V), as in ``generate``: (B, 1), int64."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # The largest logit is taken off first: divided by a small temperature, it would overflow.
    logits = logits - logits.amax(-1, keepdim=True)
    probs = ops.softmax((logits.double() / temperature).float())  # (B, V); fp32 does not hold 1e-300
    if top_p is not None and top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays while those before it have not reached p: the first one always does.
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
    return torch.multinomial(probs, 1, generator=generator)


def generate_texts(
    model: GPT | Bigram,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    num_tokens: int,
    device: torch.device,
    *,
    stop: Sequence[str] = (),
    **settings: Any,
) -> Iterator[list[str]]:
    """Continue each of ``prompts`` by ``num_tokens`` tokens, or up to the first of the ``stop`` strings.

    Args:
        stop: is looked for in what is new, whichever tokens it comes in, and is left out.
        settings: of ``generate``.
    Returns:
        After each token what is new of each text, "" where it has ended or might be about to.
    Raises:
        UserError: as ``generate``; a prompt or stop string that is empty or not UTF-8, a character that the vocabulary
            lacks.
    """
    _check_texts("stop string", stop)
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (B, T)
    tokens = generate(model, idx, num_tokens, lengths=[len(row) for row in rows], **settings)
    return _pieces(tokens, tokenizer, [_UntilStop(stop) for _ in prompts])


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """The tokens of a prompt, (T,), int64, T at least 1.

    Raises:
        UserError: it is empty or not UTF-8, or has a character that the vocabulary lacks.
    """
    _check_texts("prompt", [prompt])
    return torch.from_numpy(tokenizer.encode(prompt))


def _check_texts(what: str, texts: Sequence[str]) -> None:
    if not all(texts):
        raise UserError(f"a {what} must have at least one character")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # bytes of a command line that are no character
        raise UserError(f"a {what} must be UTF-8") from error


def _pieces(tokens: Iterator[Tensor], tokenizer: Tokenizer, texts: list[_UntilStop]) -> Iterator[list[str]]:
    decoders = [tokenizer.decoder() for _ in texts]
    for token in tokens:
        yield [text.feed(decode(ids)) for text, decode, ids in zip(texts, decoders, token.tolist(), strict=True)]
        if all(text.stopped for text in texts):
            return
    yield [text.feed(decode([], final=True)) + text.held for text, decode in zip(texts, decoders, strict=True)]


class _UntilStop:
    """Lets a text through piece by piece, up to the first of ``stops``; what may begin one is held until it is known.

    The first is the one whose last character comes first, so that it does not matter how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.stopped = False
        self.held = ""

    def feed(self, piece: str) -> str:
        """What may be shown, now that ``piece`` has come."""
        if self.stopped:
            return ""
        text, self.held = self.held + piece, ""
        places = [(text.find(stop), len(stop)) for stop in self.stops]
        found = [(start + length, start) for start, length in places if start >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        begun = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        shown = len(text) - max(begun, default=0)
        self.held = text[shown:]
        return text[:shown]


def _prompts(idx: Tensor, lengths: Sequence[int] | None) -> tuple[Tensor, Tensor | None]:
    """``idx`` without columns of padding alone, and its rows' ends, (B,), int64, or None where all are the same.

    What pads a row becomes its own first token, so that it is a token of the vocabulary and of the row.
    """
    if idx.dim() != 2 or idx.shape[1] == 0:
        raise UserError(f"generate: idx must have shape (B, T), T at least 1, got {tuple(idx.shape)}")
    B, T = idx.shape
    if lengths is None:
        return idx, None
    if len(lengths) != B or not all(1 <= length <= T for length in lengths):
        raise UserError(f"generate: lengths must be {B} numbers from 1 to {T}, got {list(lengths)}")
    idx = idx[:, : max(lengths, default=0)]
    if len(set(lengths)) <= 1:
        return idx, None
    ends = torch.tensor(lengths, device=idx.device)
    return torch.where(torch.arange(idx.shape[1], device=idx.device) < ends[:, None], idx, idx[:, :1]), ends


def _window(idx: Tensor, ends: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    """The last ``size`` tokens of each row, (B, at most size), and their ends."""
    if ends is None or idx.shape[1] <= size:
        return idx[:, -size:], ends
    first = (ends - size).clamp(min=0)  # (B,)
    columns = first[:, None] + torch.arange(size, device=idx.device)  # (B, size)
    return idx.gather(1, columns), ends - first


def _penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """``logits`` with those of ``seen`` tokens made smaller; both (B, V)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
