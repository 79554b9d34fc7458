"""Generation: what is drawn, that a cache changes nothing but the time, and where texts stop."""

import random
import statistics
import time

import pytest
import torch

from fastgpt import GPT, Bigram, GPTConfig, use_backend
from fastgpt.config import PRESETS, BigramConfig, UserError
from fastgpt.generate import _UntilStop as UntilStop
from fastgpt.generate import generate, generate_texts, sample
from fastgpt.model import KVCache
from fastgpt.tokenizer import CharTokenizer

FULL = pytest.mark.full
BACKENDS = ["reference", "torch", "cpp", *(pytest.param(name, marks=FULL) for name in ("auto", "triton", "cuda"))]


def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=13, n_layer=1, n_head=2, n_embd=16, vocab_multiple=8)).eval()


def drawn(seed=0, count=20, prompt=(1, 2), **settings):
    generator = torch.Generator().manual_seed(seed)
    idx = torch.tensor([prompt])
    return [int(t) for t in generate(model(), idx, count, generator=generator, **settings)]


def test_one_token_at_a_time_beyond_block_size():
    tokens = drawn(count=30)
    assert len(tokens) == 30
    assert all(0 <= t < 13 for t in tokens)


def test_a_seed_repeats_and_another_does_not():
    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)


def test_temperature_zero_is_the_most_probable_token():
    m = model()
    idx = torch.tensor([[3, 4]])
    (first,) = generate(m, idx, 1, temperature=0)
    assert first.item() == m(idx)[0][0, -1].argmax().item()
    assert drawn(seed=1, temperature=0) == drawn(seed=2, temperature=0)
    assert drawn(seed=1, top_k=1) == drawn(seed=2, temperature=0)


def test_tokens_depend_on_the_last_block_size_tokens_alone():
    long = tuple(range(12))
    assert drawn(temperature=0, prompt=long) == drawn(temperature=0, prompt=long[-8:])


@pytest.mark.parametrize(
    ("prompt", "use_cache", "wanted"),
    [(5, True, [5, 1, 1, 1, 8, 8]), (5, False, [5, 6, 7, 8, 8, 8]), (8, True, [8, 8]), (11, True, [8, 8])],
)
def test_a_token_is_read_once_until_the_window_slides(prompt, use_cache, wanted):
    m, lengths = model(), []
    m.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    list(generate(m, torch.zeros(1, prompt, dtype=torch.long), len(wanted), use_cache=use_cache))
    assert lengths == wanted


def sharp_model(**options):
    """A model whose probabilities differ by more than rounding does, and whose tokens do not repeat themselves."""
    torch.manual_seed(2)
    sizes = {"block_size": 16, "vocab_size": 13, "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_multiple": 8}
    m = GPT(GPTConfig(**sizes | {"tie_weights": False} | options))
    for p in m.parameters():
        torch.nn.init.normal_(p, mean=0.1, std=0.5)
    return m.eval()


def all_tokens(m, idx, count, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([*generate(m, idx, count, generator=generator, **settings)], dim=1)


PROMPTS = [[3], [1, 2, 12, 0, 7], [5, 6, 7, 8, 9, 10, 11, 12, 0]]
LENGTHS = [len(prompt) for prompt in PROMPTS]


def padded(padding=-1):
    return torch.tensor([prompt + [padding] * (max(LENGTHS) - len(prompt)) for prompt in PROMPTS])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"attention": "unfused", "bias": False, "gelu": "none"}])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_k": 9, "top_p": 0.95, "repetition_penalty": 1.1}])
def test_the_cache_changes_no_token(backend, options, settings):
    m, idx = sharp_model(**options), torch.tensor([[1, 2, 3], [4, 5, 6]])
    count = 17 if backend in ("triton", "cuda") else 30  # either goes beyond block_size
    with use_backend(backend):
        cached = all_tokens(m, idx, count, **settings)
        uncached = all_tokens(m, idx, count, use_cache=False, **settings)
    assert cached.tolist() == uncached.tolist()
    assert len(set(cached[0].tolist())) > 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("options", [{}, {"attention": "unfused"}])
def test_prompts_of_different_length_go_on_as_each_alone(backend, use_cache, options, poisoned):
    m, settings = sharp_model(**options), {"temperature": 0, "repetition_penalty": 1.3}
    count = 9 if backend in ("triton", "cuda") else 24  # the longest, and then all, go beyond block_size
    with use_backend(backend):
        got = all_tokens(m, padded(), count, lengths=LENGTHS, use_cache=use_cache, **settings)
        for prompt, tokens in zip(PROMPTS, got.tolist(), strict=True):
            assert tokens == all_tokens(m, torch.tensor([prompt]), count, use_cache=False, **settings)[0].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_may_be_anything(use_cache):
    m = sharp_model()
    draws = [
        all_tokens(m, padded(padding), 10, lengths=LENGTHS, use_cache=use_cache, repetition_penalty=2.0).tolist()
        for padding in (-1, 4, 99)
    ]
    assert draws[0] == draws[1] == draws[2]
    wider = torch.nn.functional.pad(padded(), (0, 40))
    assert all_tokens(m, wider, 10, lengths=LENGTHS, use_cache=use_cache, repetition_penalty=2.0).tolist() == draws[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [None, [2, 7]])
def test_a_cache_gives_the_logits_of_reading_all(dtype, lengths):
    m, idx = sharp_model(), torch.randint(13, (2, 16))
    cache = KVCache(16)
    ends = torch.tensor(lengths or [7, 7])
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        whole, _ = m(idx)
        read, _ = m(idx[:, :7], last_only=True, lengths=ends if lengths else None, cache=cache)
        for step in range(9):
            rows = torch.arange(2)
            at = ends + step - 1
            tolerance = {} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
            torch.testing.assert_close(read[:, 0], whole[rows, at], **tolerance)
            token = idx[rows, at + 1][:, None]
            read, _ = m(token, last_only=True, lengths=at + 2 if lengths else None, cache=cache)
    assert {memory.dtype for memory in cache._memory.values()} == {dtype}


def test_what_a_cache_cannot_take_is_refused_in_a_sentence():
    m, idx = model(), torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="KVCache: 5 tokens do not fit into its capacity of 4"):
        m(idx, cache=KVCache(4))
    cache = KVCache(20)
    m(idx, cache=cache)
    with pytest.raises(ValueError, match="KVCache: after the first read it takes one token at a time, got 2"):
        m(idx[:, :2], cache=cache)
    with pytest.raises(ValueError, match="GPT: idx must have at most block_size 8 columns, got 5 after the 5 in the "):
        m(idx, cache=cache)
    with pytest.raises(
        ValueError, match=r"GPT: lengths must be int64 of shape \(2,\), got torch.int32 of shape \(2,\)"
    ):
        m(idx, lengths=torch.tensor([1, 2], dtype=torch.int32))


@pytest.mark.full
@pytest.mark.parametrize(("prompt", "block_size"), [(1, 256), (256, 512)])
def test_a_cache_makes_generation_many_times_as_fast(prompt, block_size):
    """256 tokens of the 10.65M model at batch 1, up to the end of its block_size."""
    m = GPT(GPTConfig(**{**vars(PRESETS["shakespeare"].model), "vocab_size": 65, "block_size": block_size})).eval()
    assert m.num_params(positions=False) == 10_646_784
    idx = torch.randint(65, (1, prompt))

    def seconds(use_cache):
        start = time.perf_counter()
        all_tokens(m, idx, 256, use_cache=use_cache)
        return time.perf_counter() - start

    cached = statistics.median(seconds(True) for _ in range(3))
    uncached = seconds(False)
    assert uncached >= 8 * cached, f"{256 / cached:.0f} tokens/s with the cache, {256 / uncached:.0f} without"


@pytest.mark.parametrize("shape", [(1, 0), (3,)])
def test_nothing_to_continue_is_refused(shape):
    with pytest.raises(UserError, match="generate: idx must have shape"):
        next(generate(model(), torch.zeros(shape, dtype=torch.long), 1))


def frequencies(logits, **settings):
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    rows = torch.tensor(logits).expand(20_000, -1)
    ids = sample(rows, **settings, generator=torch.Generator().manual_seed(0))
    return torch.bincount(ids.flatten(), minlength=len(logits)) / len(rows)


LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.6849, 0.2466, 0.0616, 0.0068]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 100}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.5263, 0.3158, 0.1579, 0]),
        ({"top_p": 1e-6}, [1, 0, 0, 0]),
        ({"temperature": 1e-30}, [1, 0, 0, 0]),
        ({"temperature": 1e-300}, [1, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_the_settings_say(settings, wanted):
    got = frequencies(LOGITS, **settings)
    torch.testing.assert_close(got, torch.tensor(wanted).float(), atol=0.015, rtol=0)
    assert ((got > 0) == (torch.tensor(wanted) > 0)).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"top_k": 0}, "top-k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top-p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top-p must be in \(0, 1\], got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition-penalty must be greater than 0 and finite, got 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition-penalty must be greater than 0 and finite, got inf"),
        ({"lengths": [3]}, r"generate: lengths must be 1 numbers from 1 to 2, got \[3\]"),
        ({"lengths": [0]}, r"generate: lengths must be 1 numbers from 1 to 2, got \[0\]"),
        ({"lengths": [1, 1]}, r"generate: lengths must be 1 numbers from 1 to 2, got \[1, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        drawn(**settings)


def test_a_bigram_generates_too():
    tokens = list(generate(Bigram(BigramConfig(vocab_size=5)).eval(), torch.tensor([[1], [2]]), 7))
    assert [t.shape for t in tokens] == [(2, 1)] * 7


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_bigram_takes_prompts_of_different_length(use_cache):
    torch.manual_seed(0)
    m = Bigram(BigramConfig(vocab_size=13)).eval()
    got = all_tokens(m, padded(), 12, lengths=LENGTHS, temperature=0, use_cache=use_cache)
    for prompt, tokens in zip(PROMPTS, got.tolist(), strict=True):
        assert tokens == all_tokens(m, torch.tensor([prompt]), 12, temperature=0)[0].tolist()


class Fixed(torch.nn.Module):
    """A model whose logits are always the same."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)
        self.config = BigramConfig(vocab_size=len(logits))
        self.eval()

    def forward(self, idx, **_):
        return self.logits.expand(len(idx), 1, -1), None


def test_a_repetition_penalty_weighs_what_a_sequence_has():
    """Logits above zero are divided by it, those below are multiplied, and each token once."""
    draws = all_tokens(
        Fixed([4.0, 3.0, 1.4, -1.0]), torch.tensor([[2, 2], [0, 1]]), 3, temperature=0, repetition_penalty=2
    )
    assert draws.tolist() == [[0, 1, 0], [0, 0, 0]]
    draws = all_tokens(
        Fixed([4.0, 3.0, 1.4, -1.0]),
        torch.tensor([[2, 0], [0, 1]]),
        3,
        lengths=[1, 2],
        temperature=0,
        repetition_penalty=2,
    )
    assert draws.tolist() == [[0, 1, 0], [0, 0, 0]]  # what pads a row is not its own
    draws = all_tokens(Fixed([-1.0, -1.5, -9.0]), torch.tensor([[0]]), 3, temperature=0, repetition_penalty=2)
    assert draws.tolist() == [[1, 0, 0]]


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(UserError, match="the model is in training mode"):
        next(generate(model().train(), torch.tensor([[1]]), 1))


def test_a_compiled_model_generates_the_same():
    m, idx = sharp_model(), torch.tensor([[1, 2, 3]])
    assert torch.equal(all_tokens(torch.compile(m), idx, 20), all_tokens(m, idx, 20))


def stopped_at(text, stops):
    """Up to the stop string that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def test_a_text_stops_at_the_same_place_however_it_is_cut():
    rng = random.Random(0)
    stopped = 0
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=12))
        stops = ["".join(rng.choices("abc", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        until, shown, rest = UntilStop(stops), "", text
        while rest:
            size = rng.randint(0, 4)
            shown, rest = shown + until.feed(rest[:size]), rest[size:]
            assert stopped_at(text, stops).startswith(shown)
        assert shown + until.held == stopped_at(text, stops)
        assert until.stopped == (stopped_at(text, stops) != text)
        stopped += until.stopped
    assert 500 < stopped < 1500


def test_of_two_stop_strings_the_one_that_ends_first_counts():
    assert UntilStop(["aba", "b"]).feed("aba") == "a"
    assert UntilStop(["b", "ab"]).feed("aba") == ""


class Words(CharTokenizer):
    """Tokens of several characters each; the prompts are digits."""

    WORDS = ("to", " b", "e ", "or", " not")

    def encode(self, text):
        return torch.tensor([int(digit) for digit in text]).numpy()

    def to_bytes(self, ids):
        return "".join(self.WORDS[i] for i in ids).encode()


class Counting(Fixed):
    """Follows each token by the next number."""

    def __init__(self):
        super().__init__([0.0] * 5)
        self.reads = 0

    def forward(self, idx, lengths=None, **_):
        self.reads += 1
        last = idx[:, -1] if lengths is None else idx.gather(1, lengths[:, None] - 1)[:, 0]
        return torch.nn.functional.one_hot((last + 1) % 5, 5)[:, None].float(), None


def continued(prompts, count, **settings):
    m = Counting()
    pieces = [*generate_texts(m, Words("ab"), prompts, count, torch.device("cpu"), temperature=0, **settings)]
    return ["".join(text) for text in zip(*pieces, strict=True)], m.reads, pieces


def test_a_stop_string_may_lie_across_tokens():
    assert continued(["4"], 4) == (["to be or"], 4, [["to"], [" b"], ["e "], ["or"], [""]])
    texts, reads, pieces = continued(["4"], 100, stop=["be or", "never"])
    assert (texts, reads) == (["to "], 4)
    assert pieces == [["to"], [" "], [""], [""]]  # "b" and "be " might have been the beginning
    assert continued(["4"], 2, stop=["be"])[0] == ["to b"]  # what was held comes in the end


def test_texts_of_a_batch_stop_each_by_itself():
    texts, reads, _ = continued(["4", "012", "3"], 100, stop=["e o"])
    assert texts == ["to b", "or notto b", " notto b"]
    assert reads == 6
    texts, reads, _ = continued(["01", "1"], 3, stop=["or"])
    assert (texts, reads) == (["e ", "e "], 2)


@pytest.mark.parametrize(
    ("prompts", "settings", "sentence"),
    [
        (["4", ""], {}, "a prompt must have at least one character"),
        (["4"], {"stop": ["x", ""]}, "a stop string must have at least one character"),
        (["4", "4\udcff"], {}, "a prompt must be UTF-8"),
        (["4"], {"stop": ["x", "\udcff"]}, "a stop string must be UTF-8"),
    ],
)
def test_texts_that_are_none_are_refused_at_once(prompts, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        generate_texts(Counting(), Words("ab"), prompts, 1, torch.device("cpu"), **settings)
