"""GPT-2's weights in and out: the same numbers here and in transformers, and every unusable file refused by name."""

import builtins
import json
import logging
import os
import pickle
import re
import resource
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from fastgpt import GPT, GPTConfig
from fastgpt.checkpoint import RunState, Snapshot, read_config, write_checkpoint, write_config
from fastgpt.config import BigramConfig, TrainConfig, UserError
from fastgpt.generate import generate
from fastgpt.model import Bigram
from fastgpt.optim import build_optimizer
from fastgpt.pretrained import LARGEST_PICKLE, export_hf, load_pretrained, tokenizer_of
from fastgpt.tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, read_tokenizer

SIZES = {
    "tiny": {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 11, "n_positions": 8},
    "wide": {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 257, "n_positions": 48},
    "deep": {"n_layer": 5, "n_head": 2, "n_embd": 32, "vocab_size": 100, "n_positions": 32},
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Larger than GPT-2's own, so that every weight, biases and norms among them, makes itself felt in the logits.
SPREAD = 0.3


def theirs(size: str = "wide", **settings) -> GPT2LMHeadModel:
    ids = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**{**SIZES[size], **NO_DROPOUT, **ids, **settings})).eval()
    return spread(model)


def spread(model):
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=SPREAD / param.shape[-1] ** 0.5)
    return model


def ours(**settings) -> GPT:
    shape = {"block_size": 16, "vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 32}
    return spread(GPT(GPTConfig(**{**shape, **settings})).eval())


def tokens(model, batch: int = 2) -> torch.Tensor:
    config = model.config
    length = config.block_size if isinstance(config, GPTConfig) else config.n_positions
    return torch.randint(config.vocab_size, (batch, length))


@torch.no_grad()
def assert_same_model(our_model: GPT, hf_model: GPT2LMHeadModel) -> None:
    """Logits to 1e-5, and the same greedy continuation."""
    idx = tokens(hf_model)
    a, b = our_model(idx)[0], hf_model(idx).logits
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    start, count = idx[:, :2], idx.shape[1] - 2
    greedy = torch.cat([start, *generate(our_model, start, count, temperature=0)], dim=1)
    wanted = hf_model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    assert torch.equal(greedy, wanted)


class TestHuggingFace:
    @pytest.mark.parametrize("size", SIZES)
    def test_their_models_open_here(self, tmp_path, size):
        model = theirs(size)
        model.save_pretrained(tmp_path)
        assert_same_model(GPT.from_pretrained(tmp_path), model)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"bias": False, "gelu": "none"},
            {"vocab_size": 50, "vocab_multiple": 64},
            {"tie_weights": False, "n_layer": 1},
            {"n_layer": 4, "n_head": 8, "n_embd": 64},
        ],
        ids=str,
    )
    def test_our_models_open_there(self, tmp_path, settings):
        model = ours(**settings)
        export_hf(model, None, tmp_path / "out")
        opened, report = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert opened.config.tie_word_embeddings == model.config.tie_weights
        assert_same_model(model, opened.eval())

    def test_there_and_back(self, tmp_path):
        model = ours(dropout=0.25)
        export_hf(model, None, tmp_path / "out")
        again = GPT.from_pretrained(tmp_path / "out")
        assert again.config == model.config
        assert again.lm_head.weight is again.transformer.wte.weight
        assert not again.training
        for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            assert torch.equal(a, b), name

    def test_one_step_of_fine_tuning_is_the_same(self, tmp_path):
        model = theirs("wide")
        model.save_pretrained(tmp_path)
        own = GPT.from_pretrained(tmp_path).train()
        optimizer = build_optimizer(own, TrainConfig(lr=1e-2, beta2=0.99))
        # The gradient of the keys' biases is 0 but for rounding: eps keeps Adam from going by the sign of that.
        for group in optimizer.param_groups:
            group["eps"] = 1e-3
        decay, none = ([p for p in model.parameters() if (p.dim() >= 2) == is_matrix] for is_matrix in (True, False))
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": none, "weight_decay": 0.0}]
        peer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-3)
        idx = tokens(model)
        loss = own(idx[:, :-1], idx[:, 1:])[1]
        wanted = model.train()(idx, labels=idx).loss
        assert torch.allclose(loss, wanted, rtol=1e-5)
        for of, step in ((loss, optimizer), (wanted, peer)):
            of.backward()
            step.step()
        export_hf(own, None, tmp_path / "after")
        after = GPT2LMHeadModel.from_pretrained(tmp_path / "after")
        for (name, a), (_, b) in zip(after.named_parameters(), model.named_parameters(), strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max(), name
        assert_same_model(own.eval(), model.eval())

    def test_names_without_prefix_beside_masks_and_in_half_precision(self, tmp_path):
        model = theirs("deep")
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        bare = {name.removeprefix("transformer."): tensor.bfloat16() for name, tensor in tensors.items()}
        bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool) for i in range(5)}
        bare |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(5)}
        save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
        again = GPT.from_pretrained(tmp_path)
        for name, param in again.named_parameters():
            assert param.dtype == torch.float32
            wanted = tensors[name].mT if param.dim() == 2 and ".h." in name else tensors[name]
            assert torch.equal(param, wanted.bfloat16().float()), name

    def test_sharded_weights(self, tmp_path):
        model = theirs("deep")
        model.save_pretrained(tmp_path, max_shard_size="40KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        assert_same_model(GPT.from_pretrained(tmp_path), model)

    def test_untied_weights(self, tmp_path):
        model = theirs("tiny", tie_word_embeddings=False)
        model.save_pretrained(tmp_path)
        own = GPT.from_pretrained(tmp_path)
        assert not own.config.tie_weights
        assert_same_model(own, model)

    def test_settings_over_the_files(self, tmp_path):
        model = theirs("wide", resid_pdrop=0.1, embd_pdrop=0.2, attn_pdrop=0.3)
        model.save_pretrained(tmp_path)
        with pytest.raises(
            UserError, match=r"resid_pdrop, embd_pdrop, attn_pdrop must be one number, got 0.1, 0.2, 0.3"
        ):
            GPT.from_pretrained(tmp_path)
        own = GPT.from_pretrained(tmp_path, dropout=0.5, block_size=9, attention="unfused")
        assert (own.config.dropout, own.config.block_size, own.config.attention) == (0.5, 9, "unfused")
        idx = tokens(model)[:, :9]
        with torch.no_grad():
            assert torch.allclose(own.eval()(idx)[0], model(idx).logits, rtol=1e-4, atol=1e-5)
        for settings, sentence in (
            ({"dropout": 0, "block_size": 49}, "block_size must be at most 48"),
            ({"dropout": 0, "n_layer": 3}, "n_layer must be 2, as the weights of .* have it, got 3"),
            ({"dropout": 0, "gelu": "none"}, "gelu must be tanh"),
            ({"dropout": 0, "droput": 1}, "there is no setting 'droput'"),
        ):
            with pytest.raises(UserError, match=sentence):
                GPT.from_pretrained(tmp_path, **settings)

    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("scale_attn_by_inverse_layer_idx", True),
            ("scale_attn_weights", False),
            ("add_cross_attention", True),
            ("n_inner", 100),
            ("layer_norm_epsilon", 1e-6),
            ("activation_function", "relu"),
            ("model_type", "llama"),
            ("n_head", 5),
            ("n_embd", "64"),
            ("n_layer", 10**30),
            ("n_layer", 3),
            ("n_embd", 64 << 10),
            ("vocab_size", True),
            ("attn_pdrop", 0.5),
            ("tie_word_embeddings", None),
        ],
    )
    def test_what_gpt_cannot_be_is_refused_by_name(self, tmp_path, setting, value):
        theirs("wide").save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, setting: value}))
        name = {"tie_word_embeddings": "tie_weights", "n_embd": "n_embd|wte"}.get(setting, setting)
        with pytest.raises(UserError, match=name) as refusal:
            GPT.from_pretrained(tmp_path)
        assert str(tmp_path) in str(refusal.value)
        assert "\n" not in str(refusal.value)

    def test_an_existing_folder_is_not_written_into(self, tmp_path):
        with pytest.raises(UserError, match="exists already"):
            export_hf(ours(), None, tmp_path)

    def test_a_name_without_network(self, tmp_path, monkeypatch, caplog):
        import huggingface_hub

        caplog.set_level("WARNING", "huggingface_hub")

        asked = []

        def snapshot_download(repository, **kwargs):
            asked.append(repository)
            logging.getLogger("huggingface_hub").warning("Retrying in 1s [Retry 1/5].")
            raise huggingface_hub.errors.LocalEntryNotFoundError("no\nnetwork")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        for name in ("gpt2-xl", "somebody/gpt2-like"):
            with pytest.raises(UserError, match=rf"{name}: neither here nor to be had .*\(no network\)"):
                GPT.from_pretrained(name)
        assert asked == ["openai-community/gpt2-xl", "somebody/gpt2-like"]
        assert not caplog.records  # retries are silent
        assert logging.getLogger("huggingface_hub").level == logging.WARNING  # as it was
        for name in ("gpt3", "../gpt2", str(tmp_path / "nowhere")):
            with pytest.raises(UserError, match="no such file or folder"):
                GPT.from_pretrained(name)

    def test_a_name_is_fetched(self, tmp_path, monkeypatch):
        import huggingface_hub

        model = theirs("tiny")
        model.save_pretrained(tmp_path)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, allow_patterns: str(tmp_path))
        assert_same_model(GPT.from_pretrained("gpt2"), model)


TEXT = "the cat and the hat, naïve and \U0001f600; the end of the thing\n" * 20


class TestTokenizer:
    @pytest.fixture
    def bpe(self):
        return BPETokenizer.trained_on([TEXT], 300)

    @pytest.fixture
    def gpt2(self, bpe, monkeypatch):
        """GPT-2's by tiktoken, with the vocabulary of ``bpe`` behind the bytes."""
        pieces = [bpe.to_bytes([i]) for i in range(bpe.vocab_size) if i != bpe.end_of_text]
        longer = [piece for piece in pieces if len(piece) > 1]
        ranks = {piece: i for i, piece in enumerate([bytes([byte]) for byte in range(256)] + longer)}
        pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        special = {"<|endoftext|>": len(ranks)}
        encoding = tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
        return GPT2Tokenizer()

    @pytest.mark.parametrize("kind", ["bpe", "gpt2"])
    def test_transformers_cuts_text_alike(self, tmp_path, request, kind):
        tokenizer = request.getfixturevalue(kind)
        assert export_hf(ours(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "hf")
        theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
        text = TEXT + "what it has not seen: \u4e2d 123's  \n\n x"
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text).tolist()
        assert max(ids) > 260  # of merges, too
        assert theirs.decode(ids) == text
        assert len(theirs) == tokenizer.vocab_size
        assert theirs.eos_token_id == GPT2Config.from_pretrained(tmp_path / "hf").eos_token_id == tokenizer.end_of_text
        again = tokenizer_of(tmp_path / "hf")
        assert again.encode(text).tolist() == ids
        assert again.end_of_text == tokenizer.end_of_text

    def test_others_stay_behind(self, tmp_path):
        assert not export_hf(ours(vocab_size=3), CharTokenizer("abc"), tmp_path / "hf")
        assert not list((tmp_path / "hf").glob("*token*"))
        assert tokenizer_of(tmp_path / "hf") is None

    def test_whose_it_is(self, tmp_path, gpt2):
        assert isinstance(tokenizer_of("gpt2"), GPT2Tokenizer)
        write_run(tmp_path / "run", ours(vocab_size=3))
        assert tokenizer_of(tmp_path / "run").characters == "abc"

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"model": {"type": "WordPiece"}}, None),
            ({"pre_tokenizer": None}, None),
            ({"normalizer": {"type": "NFC"}}, None),
            ({"model": {"type": "BPE", "vocab": 3, "merges": []}}, "must have a vocab and merges"),
            ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 7}, "merges": []}}, "ids must be the numbers from 0"),
            ({"added_tokens": [{"content": ["x"], "id": 0}]}, "damaged"),
            ({"added_tokens": []}, None),
            ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}}, None),
        ],
    )
    def test_other_ways_and_damage(self, tmp_path, bpe, change, sentence):
        export_hf(ours(vocab_size=bpe.vocab_size), bpe, tmp_path / "hf")
        path = tmp_path / "hf" / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        if sentence is None:
            expected = None if change != {"added_tokens": []} else bpe.to_json()
            found = tokenizer_of(tmp_path / "hf")
            assert (found and found.to_json()) == expected
        else:
            with pytest.raises(UserError, match=rf"tokenizer\.json: .*{sentence}"):
                tokenizer_of(tmp_path / "hf")

    def test_transformers_would_cut_text_in_another_way(self, tmp_path, bpe):
        export_hf(ours(vocab_size=bpe.vocab_size), bpe, tmp_path / "hf")
        path = tmp_path / "hf" / "tokenizer.json"
        whole = json.loads(path.read_text())
        token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        user = {**token, "id": bpe.vocab_size, "content": "<|user|>"}
        changes = [{"added_tokens": [*whole["added_tokens"], user]}]
        settings = {"ignore_merges": True, "dropout": 0.5, "end_of_word_suffix": "</w>"}
        changes += [{"model": {**whole["model"], name: value}} for name, value in settings.items()]
        for change in changes:
            path.write_text(json.dumps({**whole, **change}))
            assert tokenizer_of(tmp_path / "hf") is None, change


def replace_weights(folder: Path, **changed) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **changed}, path, metadata={"format": "pt"})


def index(folder: Path, file: object) -> None:
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    weight_map = dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: replace_weights(f, **{"transformer.wpe.weight": torch.zeros(9, 8)}), r"wpe.weight must have shape"),
        (
            lambda f: replace_weights(f, **{"transformer.h.0.mlp.c_fc.weight": torch.zeros(32, 8)}),
            "c_fc.weight must have",
        ),
        (
            lambda f: replace_weights(f, **{"transformer.ln_f.bias": torch.full((8,), torch.nan)}),
            "ln_f.bias holds a NaN",
        ),
        (lambda f: os.truncate(f / "model.safetensors", 2000), "model.safetensors: cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(print)), "not a safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes((10**12).to_bytes(8, "little")), "1,000,000,000,000 bytes"),
        (lambda f: (f / "model.safetensors").unlink(), "there are no weights in this folder"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda f: index(f, "../elsewhere.safetensors"), r"must name files beside it, got '../elsewhere.safetensors'"),
        (lambda f: index(f, "/etc/passwd"), "must name files beside it"),
        (lambda f: index(f, ["x"]), "must name files beside it"),
        (lambda f: index(f, "nowhere.safetensors"), "nowhere.safetensors: cannot be read: No such file"),
        (
            lambda f: (index(f, "x"), (f / "model.safetensors.index.json").write_text("{}")),
            "weight_map must be an object",
        ),
        (
            lambda f: (index(f, "x"), (f / "model.safetensors.index.json").write_text('{"weight_map": {}}')),
            "its weights lack|n_layer must be 0",
        ),
    ],
)
def test_a_damaged_or_hostile_folder_is_refused(tmp_path, spoil, sentence):
    export_hf(ours(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8), None, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(UserError, match=sentence) as refusal:
        GPT.from_pretrained(tmp_path / "model")
    assert "\n" not in str(refusal.value)


def nanogpt_checkpoint(model: GPT, prefix: str = "_orig_mod.") -> dict:
    """What nanoGPT's train.py saves of such a model; without flash attention, each block's mask lies beside it."""
    c = model.config
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    weights |= {f"{prefix}transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(c.n_layer)}
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    return {
        "model": weights,
        "optimizer": build_optimizer(model, TrainConfig()).state_dict(),
        "model_args": {name: getattr(c, name) for name in names},
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "learning_rate": 6e-4},
    }


def repeated(weights: dict, numbers: torch.Tensor) -> dict:
    """Tensors of the shapes of ``weights``, all of them made of ``numbers``: one repeated, or as many as each needs."""
    if len(numbers) == 1:
        return {name: numbers.expand(weight.shape) for name, weight in weights.items()}
    return {name: numbers[: weight.numel()].view(weight.shape) for name, weight in weights.items()}


class Bomb:
    """A pickle of it calls a function when it is read."""

    def __init__(self, called, *arguments):
        self.call = called, arguments

    def __reduce__(self):
        return self.call


class TestNanoGPT:
    @pytest.mark.parametrize("prefix", ["", "_orig_mod."])
    @pytest.mark.parametrize("bias", [True, False])
    def test_its_checkpoint_opens(self, tmp_path, prefix, bias):
        model = ours(bias=bias, gelu="none", dropout=0.1)
        torch.save(nanogpt_checkpoint(model, prefix), tmp_path / "ckpt.pt")
        for source in (tmp_path, tmp_path / "ckpt.pt"):
            again = GPT.from_pretrained(source)
            assert again.config == model.config
            idx = tokens(model)
            assert torch.equal(again(idx)[0], model(idx)[0])

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda c: c["model_args"].pop("n_head"), "damaged: model_args lacks n_head"),
            (lambda c: c["model_args"].update(n_layer=10**12), "n_layer must be at most"),
            (lambda c: c["model_args"].update(n_embd=2**20), "must have shape"),
            (
                lambda c: c["model_args"].update(n_layer=3),
                "n_layer must be 2, the blocks whose weights are there, got 3",
            ),
            (lambda c: c["model_args"].update(bias="no"), "bias must be true or false"),
            (lambda c: c.pop("model"), "it must hold model and model_args"),
            (lambda c: c["model"].pop("_orig_mod.transformer.ln_f.weight"), "it lacks transformer.ln_f.weight"),
            (lambda c: c["model"]["_orig_mod.transformer.wpe.weight"].fill_(torch.inf), "holds a NaN or an infinity"),
            (
                lambda c: c["model"].update({"_orig_mod.transformer.wpe.weight": torch.zeros(1).expand(2**40, 32)}),
                "wpe.weight must have shape",
            ),
            (
                lambda c: c.update(model=repeated(c["model"], torch.zeros(1))),
                "its tensors would take .* bytes, and the",
            ),
            (lambda c: c.update(model=repeated(c["model"], torch.zeros(1 << 12))), "its tensors would take .* bytes"),
            (lambda c: c.update(config=Bomb(print, "boom")), "its pickle would call __builtin__ print"),
            (lambda c: c.update(config=Bomb(os.mkdir, "boom")), "its pickle would call posix mkdir"),
            (lambda c: c.update(config=Bomb(bytearray, 1 << 40)), "its pickle would call __builtin__ bytearray"),
        ],
    )
    def test_what_is_wrong_in_it_is_named(self, tmp_path, monkeypatch, change, sentence):
        monkeypatch.chdir(tmp_path)
        checkpoint = nanogpt_checkpoint(ours(gelu="none"))
        change(checkpoint)
        torch.save(checkpoint, "ckpt.pt")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UserError, match=sentence) as refusal:
            GPT.from_pretrained("ckpt.pt")
        assert "\n" not in str(refusal.value)
        assert not Path("boom").exists()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 17  # KiB

    def test_other_files_are_refused(self, tmp_path):
        path = tmp_path / "ckpt.pt"
        torch.save(nanogpt_checkpoint(ours(gelu="none")), path)
        whole = path.read_bytes()
        cases = {
            "truncated": whole[:-1000],
            "a pickle": pickle.dumps(Bomb(builtins.print, "boom")),
            "empty": b"",
            "its index alone": whole[-1000:],
        }
        for content in cases.values():
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"ckpt\.pt: cannot be read"):
                load_pretrained(path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda info, content: setattr(info, "compress_type", zipfile.ZIP_DEFLATED),
            lambda info, content: content.extend(bytes(LARGEST_PICKLE)),
        ],
        ids=["packed", "long"],
    )
    def test_a_zip_that_takes_much_memory_is_refused(self, tmp_path, change):
        path, changed = tmp_path / "ckpt.pt", tmp_path / "changed.pt"
        torch.save(nanogpt_checkpoint(ours(gelu="none")), path)
        with zipfile.ZipFile(path) as whole, zipfile.ZipFile(changed, "w") as other:
            for info in whole.infolist():
                content = bytearray(whole.read(info))
                if info.filename.endswith("/data.pkl"):
                    change(info, content)
                other.writestr(info, bytes(content))
        with pytest.raises(UserError, match=r"changed\.pt: .*not a file of torch\.save: it has not the parts of one"):
            load_pretrained(changed)

    def test_an_encrypted_zip_is_refused(self, tmp_path):
        path = tmp_path / "ckpt.pt"
        torch.save(nanogpt_checkpoint(ours(gelu="none")), path)
        content = bytearray(path.read_bytes())
        for entry in re.finditer(b"PK\1\2", bytes(content)):  # of the archive's index; its flags lie 8 bytes on
            content[entry.start() + 8] |= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"ckpt\.pt: cannot be read: not a file of torch\.save: .* is encrypted"):
            load_pretrained(path)


def write_run(run: Path, model, tokenizer=None) -> Path:
    tokenizer = tokenizer or CharTokenizer("".join(map(chr, range(97, 97 + model.config.vocab_size))))
    write_config(run, model.config, TrainConfig(), tokenizer, {})
    optimizer = build_optimizer(model, TrainConfig())
    idx = tokens(model) if isinstance(model, GPT) else torch.zeros(1, 1, dtype=torch.int64)
    model(idx, idx)[1].backward()
    optimizer.step()
    write_checkpoint(run, Snapshot.take(RunState(step=1), model, optimizer), best=True, keep=1)
    return run


class TestCommand:
    @pytest.fixture
    def text(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("fastgpt.train.plot_losses", lambda *_: None)
        path = tmp_path / "text.txt"
        path.write_text("abcdefghij" * 100)
        return path

    def train(self, command, text, out, *arguments):
        quick = ["--max-iters=2", "--grad-accum=1", "--eval-iters=1", "--final-eval-iters=1", "--sample-tokens=0"]
        return command("train", f"--data={text}", f"--out={out}", *quick, *arguments)

    def test_export(self, tmp_path, command):
        model = ours(vocab_size=10)
        run = write_run(tmp_path / "run", model)
        code, out, _ = command("export", run, "--to=hf", f"--out={tmp_path / 'hf'}")
        assert code == 0
        assert "GPT2LMHeadModel.from_pretrained" in out
        assert "its tokenizer (char) has no like there" in out
        code, _, err = command("export", run, "--to=hf", f"--out={tmp_path / 'hf'}")
        assert (code, err.count("\n")) == (2, 1)
        assert "exists already" in err
        assert_same_model(model.eval(), GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval())
        bigram = write_run(tmp_path / "bigram", Bigram(BigramConfig(vocab_size=10)))
        code, _, err = command("export", bigram, "--to=hf", f"--out={tmp_path / 'x'}")
        assert code == 2
        assert "only a GPT can be exported" in err

    @pytest.mark.usefixtures("interruptible")
    @pytest.mark.parametrize(("signum", "wanted"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_leaves_nothing_half_done(self, tmp_path, command, text, monkeypatch, signum, wanted):
        run = write_run(tmp_path / "run", ours(vocab_size=10))
        there = sorted(tmp_path.iterdir())

        def interrupted(*_, **__):
            signal.raise_signal(signum)

        monkeypatch.setattr("fastgpt.pretrained.save_file", interrupted)
        monkeypatch.setattr("fastgpt.cli.text_loss", interrupted)
        monkeypatch.setattr("fastgpt.generate.sample", interrupted)
        for arguments in (
            ["export", run, "--to=hf", f"--out={tmp_path / 'hf'}"],
            ["eval", run, f"--data={text}", "--device=cpu"],
            ["sample", run, "--prompt=a", "--device=cpu"],
        ):
            code, _, err = command(*arguments)
            assert (code, err.count("\n")) == (wanted, 1)
            assert sorted(tmp_path.iterdir()) == there

    def test_fine_tuning_goes_on_from_every_source(self, tmp_path, command, text):
        model = ours(vocab_size=10, gelu="none", dropout=0.1)
        write_run(tmp_path / "run", model)
        export_hf(model, None, tmp_path / "hf")
        torch.save(nanogpt_checkpoint(model), tmp_path / "ckpt.pt")
        losses = {}
        named = [f"--tokenizer={tmp_path / 'run' / 'tokenizer.json'}"]
        for source, own in (("run", []), ("hf", named), ("ckpt.pt", named)):
            out = tmp_path / f"tuned-{source}"
            code, _, err = self.train(command, text, out, f"--init={tmp_path / source}", "--block-size=12", *own)
            assert code == 0, err
            config, settings, _ = read_config(out)
            assert (config.block_size, config.dropout, config.gelu, config.n_embd) == (12, 0.0, "none", 32)
            assert settings.lr == 3e-5  # of the preset for fine-tuning
            first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
            losses[source] = first["loss"]
        assert len(set(losses.values())) == 1
        assert abs(losses["run"] - 2.3) > 0.05  # not that of new weights
        code, _, err = command("train", "--resume", f"--out={out}", "--max-iters=3")
        assert code == 0, err

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--n-layer=7"], "n_layer must be 2, as the weights of"),
            (["--block-size=99"], "block_size must be at most 16"),
            (["--preset=bigram"], "--init needs the preset of a GPT, which bigram is not"),
        ],
    )
    def test_a_shape_that_the_weights_do_not_have(self, tmp_path, command, text, arguments, sentence):
        run = write_run(tmp_path / "run", ours(vocab_size=10))
        code, _, err = self.train(command, text, tmp_path / "out", f"--init={run}", *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert sentence in err
        assert not (tmp_path / "out").exists()

    def test_init_and_resume(self, tmp_path, command):
        run = write_run(tmp_path / "run", ours(vocab_size=10))
        code, _, err = command("train", "--resume", f"--out={run}", f"--init={run}")
        assert code == 2
        assert "leave out --init" in err

    @pytest.mark.parametrize("rows", [9, 11, 65, 100, 128])
    def test_tokens_that_the_weights_do_not_know(self, tmp_path, command, text, rows):
        export_hf(ours(vocab_size=rows), None, tmp_path / "hf")
        code, _, err = self.train(command, text, tmp_path / "out", f"--init={tmp_path / 'hf'}", "--tokenizer=char")
        assert code == 2
        assert "its tokenizer has 10 tokens, and the weights of" in err

    def test_rows_left_over_beside_its_own_tokenizer_are_taken(self, tmp_path, command, text):
        """Of a run with a larger --vocab-size, and of what it exported."""
        tokenizer = BPETokenizer.trained_on([text.read_text()], 260)
        run = write_run(tmp_path / "run", ours(vocab_size=300, block_size=8), tokenizer)
        export_hf(GPT.from_pretrained(run), tokenizer, tmp_path / "hf")
        own, other = run / "tokenizer.json", tmp_path / "other.json"
        other.write_text(json.dumps(BPETokenizer.trained_on(["zyx" * 9], 259).to_json()))
        for source in (run, tmp_path / "hf"):
            for named in ([], [f"--tokenizer={own}"]):
                out = tmp_path / f"{source.name}-{len(named)}"
                code, _, err = self.train(command, text, out, f"--init={source}", *named)
                assert code == 0, err
                assert read_config(out)[0].vocab_size == 300
            code, _, err = self.train(command, text, tmp_path / "no", f"--init={source}", f"--tokenizer={other}")
            assert code == 2
            assert "tokens, and the weights of" in err

    def test_a_vocabulary_that_was_padded_is_taken(self, tmp_path, command, text):
        export_hf(ours(vocab_size=64), None, tmp_path / "hf")
        code, _, err = self.train(command, text, tmp_path / "out", f"--init={tmp_path / 'hf'}", "--tokenizer=char")
        assert code == 0, err

    def test_weights_without_a_tokenizer_want_one_named(self, tmp_path, command, text):
        export_hf(ours(vocab_size=10), None, tmp_path / "hf")
        code, _, err = self.train(command, text, tmp_path / "out", f"--init={tmp_path / 'hf'}")
        assert (code, err.count("\n")) == (2, 1)
        assert "bring no tokenizer that can be used here: name it with --tokenizer" in err
        assert not (tmp_path / "out").exists()
        prepared = tmp_path / "prepared"
        code, _, err = command("prepare", f"--data={text}", "--tokenizer=char", f"--out={prepared}", "--processes=1")
        assert code == 0, err
        code, _, err = self.train(command, prepared, tmp_path / "out", f"--init={tmp_path / 'hf'}")
        assert code == 0, err

    def test_sample_and_eval_take_what_from_pretrained_takes(self, tmp_path, command, text):
        tokenizer = BPETokenizer.trained_on([text.read_text()], 260)
        model = ours(vocab_size=260, gelu="none")
        run = write_run(tmp_path / "run", model, tokenizer)
        export_hf(GPT.from_pretrained(run), tokenizer, tmp_path / "hf")
        torch.save(nanogpt_checkpoint(GPT.from_pretrained(run)), tmp_path / "ckpt.pt")
        named = f"--tokenizer={run / 'tokenizer.json'}"
        found = {}
        for source, more in (("run", []), ("hf", []), ("hf", [named]), ("ckpt.pt", [named])):
            arguments = [tmp_path / source, "--device=cpu", *more]
            code, sampled, err = command("sample", *arguments, "--prompt=abc", "--num-tokens=9", "--temperature=0")
            assert (code, err) == (0, "")
            code, measured, err = command("eval", *arguments, f"--data={text}", "--json")
            assert (code, err) == (0, "")
            measured = json.loads(measured)
            assert measured.pop("step") == (1 if source == "run" else None)
            found[source, len(more)] = sampled, measured
        assert all(result == found["run", 0] for result in found.values())
        assert found["run", 0][0].startswith("abc")
        code, out, err = command("eval", tmp_path / "hf", f"--data={text}", "--device=cpu")
        assert (code, err) == (0, "")
        assert f"{found['run', 0][1]['perplexity']:.3f}" in out

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (
                ["sample", "ckpt.pt"],
                "ckpt.pt bring no tokenizer that can be used here: name it with --tokenizer (gpt2; or",
            ),
            (
                ["eval", "hf", "--data=text.txt"],
                "hf bring no tokenizer that can be used here: name it with --tokenizer\n",
            ),
            (["sample", "ckpt.pt", "--tokenizer=char"], "--tokenizer must be gpt2, byte or a tokenizer.json here"),
            (
                ["sample", "ckpt.pt", "--tokenizer=byte"],
                "byte: its tokenizer has 256 tokens, and the weights of ckpt.pt",
            ),
            (["sample", "run", "--tokenizer=byte"], "run is a run, which has its own"),
            (["sample", "ckpt.pt", "--checkpoint=last"], "--checkpoint is for a run, which ckpt.pt is not"),
            (["eval", "ckpt.pt", "--tokenizer=run/tokenizer.json"], "ckpt.pt is no run with data of its own: name a"),
            (["sample", "gpt3"], "gpt3: there is no such file or folder, and no model that is known by this name"),
            (["sample", "cache"], "cache: there is no run in this folder"),
        ],
    )
    def test_what_sample_and_eval_cannot_take(self, tmp_path, monkeypatch, command, text, arguments, sentence):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "cache").mkdir()
        model = ours(vocab_size=10, gelu="none")
        write_run(tmp_path / "run", model)
        export_hf(model, None, tmp_path / "hf")
        torch.save(nanogpt_checkpoint(model), "ckpt.pt")
        code, _, err = command(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert sentence in err

    def test_nanogpts_characters_are_those_of_prepare(self, tmp_path, command, text):
        """Its prepare.py numbers them so: sorted(list(set(data)))."""
        code, _, err = command("prepare", f"--data={text}", "--tokenizer=char", f"--out={tmp_path / 'made'}")
        assert code == 0, err
        made = read_tokenizer(tmp_path / "made" / "tokenizer.json")
        assert made.encode(text.read_text()).tolist() == [
            sorted(set(text.read_text())).index(c) for c in text.read_text()
        ]

    def test_no_run_to_start_from(self, tmp_path, command, text):
        bigram = write_run(tmp_path / "bigram", Bigram(BigramConfig(vocab_size=10)))
        for source, sentence in ((bigram, "trained a Bigram"), (tmp_path / "cache", "there is no run in this folder")):
            source.mkdir(exist_ok=True)
            code, _, err = self.train(command, text, tmp_path / "out", f"--init={source}")
            assert code == 2
            assert sentence in err


def test_hub_files_are_links(tmp_path):
    """The Hub's cache is a folder of links to files that lie elsewhere."""
    model = ours()
    export_hf(model, None, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    idx = tokens(model)
    assert torch.equal(GPT.from_pretrained(tmp_path / "snapshot")(idx)[0], model(idx)[0])
    shutil.rmtree(tmp_path / "blobs")
    with pytest.raises(UserError, match="there is no run in this folder"):
        GPT.from_pretrained(tmp_path / "snapshot")
