"""Weights from elsewhere, and the way out: GPT-2's in Hugging Face's layout, and nanoGPT's checkpoints.

Hugging Face's layout is a folder with config.json and model.safetensors, or several files that an index names. Its
tensors carry our names, with or without "transformer." before them; the weights of a block's four linear layers are
transposed (Conv1D), and masks that old files hold beside them are left alone. nanoGPT's is ckpt.pt, a zip of a pickle
and of numbers: the pickle is looked through before it is read, and may build tensors and plain values alone.
"""

from __future__ import annotations

import dataclasses
import pickletools
import re
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgpt.checkpoint import RunState, bare_model, load_model, open_checkpoint, read_config, stored_weights
from fastgpt.config import GPTConfig, TrainConfig, UserError, field_types, told
from fastgpt.distributed import own_rows
from fastgpt.extras import require
from fastgpt.files import json_bytes, new_folder, read_json
from fastgpt.model import GPT, Bigram
from fastgpt.tensor_files import Stored, check_tensors, find_tensors, tensor_names
from fastgpt.tokenizer import END_OF_TEXT, BPETokenizer, GPT2Tokenizer, Tokenizer, make_tokenizer

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FREE_SETTINGS = ("block_size", "dropout", "attention")  # the others are the weights' own
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
NANOGPT = "ckpt.pt"
LARGEST_SIZE = 1 << 24  # of each setting that is a size: beyond it, their products would overflow
LARGEST_PICKLE = 1 << 22  # bytes; a few hundred a tensor, whose numbers lie beside it

# config.json's activation_function for each ``GPTConfig.gelu``; the first is the one that we write.
_ACTIVATIONS = {"tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "none": ("gelu", "gelu_python")}
# What a GPT has no choice of: what config.json must have, which is also what its absence means.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "layer_norm_epsilon": 1e-5,
}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
_OTHER_MERGING = ("ignore_merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix")  # none is GPT-2's
_CALLS = ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")  # a pickle's ways to name a function
_HARMLESS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch [A-Za-z0-9]+Storage")


@dataclass(frozen=True)
class Pretrained:
    """Weights from elsewhere under our names, held to the shape of their model, and ``config`` for a model of them."""

    config: GPTConfig
    tensors: Mapping[str, Stored]

    def fill(self, model: nn.Module) -> None:
        """Read them into a GPT of ``config``; of one that is sharded, each process reads its own rows.

        Raises:
            UserError: a NaN or an infinity among them.
        """
        for name, param in model.named_parameters():
            self.tensors[name].copy_to(*own_rows(param.detach()))


def load_pretrained(source: str | Path, **settings: Any) -> GPT:
    """A GPT of weights from elsewhere.

    Args:
        source: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" or any OWNER/NAME of the Hugging Face Hub, fetched on
            first use; a folder in its layout; a run's folder; or nanoGPT's ckpt.pt, or the folder it lies in.
        settings: fields of ``GPTConfig``. ``block_size`` may be smaller (the positions beyond are cut off), ``dropout``
            and ``attention`` are free; of the others, none may differ from what the weights were made with.
    Returns:
        The model in fp32, on the CPU, in evaluation mode.
    Raises:
        UserError: nothing there, a file that is damaged or not what it seems, a model that GPT cannot represent, or a
            setting that these weights do not have.
    """
    found = find_pretrained(source, **settings)
    model = GPT(found.config, drawn=False)
    found.fill(model)
    return model.eval()


def find_pretrained(source: str | Path, **settings: Any) -> Pretrained:
    """What ``load_pretrained`` reads, not read yet: the arguments and errors are the same."""
    found = _find(source, "dropout" in settings)
    for name, value in settings.items():
        if name not in field_types(GPTConfig):
            raise UserError(f"there is no setting {name!r}: the settings are {', '.join(field_types(GPTConfig))}")
        own = getattr(found.config, name)
        if name not in FREE_SETTINGS and value != own:
            raise UserError(f"{name} must be {own}, as the weights of {source} have it, got {value}")
    config = dataclasses.replace(found.config, **settings)
    if config.block_size > found.config.block_size:
        raise UserError(
            f"block_size must be at most {found.config.block_size}, the positions that {source} knows, got "
            f"{config.block_size}"
        )
    return dataclasses.replace(found, config=config)


def tokenizer_of(source: str | Path) -> Tokenizer | None:
    """The tokenizer that belongs to the weights of ``source``.

    That is GPT-2's own for GPT-2 by name, a run's, or what tokenizer.json holds beside weights in Hugging Face's layout
    if it cuts text as GPT-2 does; else None.

    Raises:
        UserError: a damaged file, or GPT-2's vocabulary cannot be had.
    """
    if source in GPT2_NAMES and not Path(source).exists():
        return GPT2Tokenizer()
    path = Path(source).expanduser()
    kind = _kind(path)
    if kind == "run":
        return read_config(path)[2]
    folder = _download(str(source)) if kind == "name" else path
    return _read_hf_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None


def open_model(
    source: str, checkpoint: str | None = None, tokenizer: str | None = None
) -> tuple[GPT | Bigram, Tokenizer, TrainConfig | None, RunState | None]:
    """As ``load_model``, of whatever ``load_pretrained`` takes; what only a run has is None for the others.

    Args:
        source: as in ``load_pretrained``; a run may have trained a Bigram.
        checkpoint: of a run, "best" (which None is), "last" or "step-N".
        tokenizer: of other weights, "gpt2", "byte" or the path of a tokenizer.json; None is as in ``tokenizer_of``.
    Raises:
        UserError: as ``load_pretrained``; no tokenizer, one that is not the weights', or an argument that is not for
            this kind of source.
    """
    path = Path(source).expanduser()
    if _kind(path) == "run":
        if tokenizer is not None:
            raise UserError(f"--tokenizer is for weights that bring none, and {source} is a run, which has its own")
        return load_model(path, checkpoint or "best")
    if checkpoint is not None:
        raise UserError(f"--checkpoint is for a run, which {source} is not")
    if tokenizer is None:
        own = tokenizer_of(source)
    elif tokenizer in ("byte", "gpt2") or tokenizer.endswith(".json"):
        own = make_tokenizer(tokenizer, tuple)
    else:
        raise UserError(f"--tokenizer must be gpt2, byte or a tokenizer.json here, where no text is, got {tokenizer!r}")
    if own is None:
        raise no_tokenizer(source)
    model = load_pretrained(source, dropout=0.0)
    require_vocabulary(model.config, own, source, tokenizer or source)
    return model, own, None, None


def no_tokenizer(source: str) -> UserError:
    """The sentence for weights whose tokenizer ``tokenizer_of`` does not find."""
    hint = ""
    if _kind(Path(source).expanduser()) == "nanogpt":
        hint = (
            " (gpt2; or, for its meta.pkl is a pickle and is not opened, the tokenizer.json that fastgpt prepare "
            "--tokenizer char makes of the same text)"
        )
    return UserError(
        f"the weights of {source} bring no tokenizer that can be used here: name it with --tokenizer{hint}"
    )


def require_vocabulary(config: GPTConfig, tokenizer: Tokenizer, source: str, name: str) -> None:
    """Hold a tokenizer to the weights of ``source``, of ``config``, which would take other tokens for their own.

    Rows may be left over where they only pad: to a multiple of 64, as nanoGPT does, or where the tokenizer is the one
    that came with the weights.

    Raises:
        UserError: the vocabularies differ; the sentence begins with ``name``, whose tokenizer this is.
    """
    tokens, rows = tokenizer.vocab_size, config.vocab_size
    if rows in (tokens, -(-tokens // 64) * 64):
        return
    own = tokenizer_of(source) if rows > tokens else None
    if own is None or own.to_json() != tokenizer.to_json():
        raise UserError(f"{name}: its tokenizer has {tokens} tokens, and the weights of {source} know {rows}")


def export_hf(model: GPT, tokenizer: Tokenizer | None, out: Path) -> bool:
    """Write a folder that ``transformers.GPT2LMHeadModel.from_pretrained`` opens.

    The rows that pad the vocabulary are left out, as they are from logits; a bias that the model does not have is 0.

    Args:
        tokenizer: written for ``transformers.AutoTokenizer`` if it is GPT-2's or a BPE; the others have no like there.
        out: a folder that is not there yet.
    Returns:
        Whether the tokenizer was written.
    Raises:
        UserError: the folder is there.
    """
    if out.exists():
        raise UserError(f"{out}: exists already: choose another --out")
    c = model.config
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": c.vocab_size,
        "n_positions": c.block_size,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_inner": None,
        "activation_function": _ACTIVATIONS[c.gelu][0],
        **dict.fromkeys(_DROPOUTS, c.dropout),
        **_FIXED,
        "tie_word_embeddings": c.tie_weights,
        "bos_token_id": tokenizer and tokenizer.end_of_text,
        "eos_token_id": tokenizer and tokenizer.end_of_text,
        "dtype": "float32",
    }
    tensors = {}
    for name, param in model.named_parameters():
        weight = param.detach().float().cpu()
        if _CONV1D.search(name):
            weight = weight.mT
        elif name in ("transformer.wte.weight", "lm_head.weight"):
            weight = weight[: c.vocab_size]
        tensors[name] = weight.contiguous()
        if not c.bias and ".wte." not in name and ".wpe." not in name and name != "lm_head.weight":
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(weight.shape[-1])
    with new_folder(out) as made:
        (made / "config.json").write_bytes(json_bytes(config))
        save_file(tensors, made / WEIGHTS, metadata={"format": "pt"})
        if not isinstance(tokenizer, (BPETokenizer, GPT2Tokenizer)):
            return False
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c.block_size, **names}
        (made / "tokenizer_config.json").write_bytes(json_bytes(settings))
        (made / TOKENIZER).write_text(tokenizer.to_hf(), encoding="utf-8")
        return True


def gelu_of(activation: Any) -> str | None:
    """``GPTConfig.gelu`` of an activation_function of transformers; None where it is another function."""
    return next((gelu for gelu, names in _ACTIVATIONS.items() if activation in names), None)


def _find(source: str | Path, any_dropout: bool) -> Pretrained:
    path = Path(source).expanduser()
    kind = _kind(path)
    if kind in ("name", "hf"):
        return _read_hf(path if kind == "hf" else _download(str(source)), any_dropout)
    if kind == "nanogpt":
        return _read_nanogpt(path / NANOGPT if path.is_dir() else path)
    config, _, _ = read_config(path)
    if not isinstance(config, GPTConfig):
        raise UserError(f"{path}: the weights of a GPT are wanted, and this run trained a Bigram")
    return Pretrained(config, stored_weights(config, open_checkpoint(path, "best")[0]))


def _kind(path: Path) -> Literal["name", "hf", "nanogpt", "run"]:
    """What ``path`` is, by what lies there; whether that is whole is for its reader to say."""
    settings = path / "config.json"
    if settings.is_file():
        return "hf" if "model_type" in read_json(settings) else "run"
    if path.is_file() or (path / NANOGPT).is_file():
        return "nanogpt"
    return "run" if path.is_dir() else "name"


def _download(name: str) -> Path:
    """The folder of a model of the Hugging Face Hub."""
    repository = f"openai-community/{name}" if name in GPT2_NAMES else name
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise UserError(f"{name}: there is no such file or folder, and no model that is known by this name")
    hub = require(
        "huggingface_hub",
        "hf",
        f"{name}: there is no such file or folder, and to be a model of the Hugging Face Hub it",
    )
    wanted = ["config.json", TOKENIZER, WEIGHTS, INDEX, "model-*-of-*.safetensors"]
    verbosity = hub.logging.get_verbosity()
    hub.logging.set_verbosity_error()  # each of its retries would be a line
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # all of the Hub's own are one or the other
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: neither here nor to be had from the Hugging Face Hub ({reason})") from error
    finally:
        hub.logging.set_verbosity(verbosity)


def _read_hf(folder: Path, any_dropout: bool) -> Pretrained:
    config = _hf_config(folder / "config.json", any_dropout)
    files = _hf_files(folder)
    own = _parameters(folder, config, files)
    bare = "wte.weight" in files
    theirs = {name.removeprefix("transformer.") if bare else name: name for name in own}
    missing = theirs.keys() - files.keys()
    if missing:
        raise UserError(f"{folder}: damaged: its weights lack {min(missing)}")
    tensors: dict[str, Stored] = {}
    for file in {files[name] for name in theirs}:
        like = {name: _turned(ours, own[ours]) for name, ours in theirs.items() if files[name] == file}
        for name, found in find_tensors([folder / file], like).items():
            pieces = [(row, _turned(name, piece)) for row, piece in found.pieces]
            tensors[theirs[name]] = dataclasses.replace(found, pieces=pieces)
    return Pretrained(config, tensors)


def _turned(name: str, weight: Tensor) -> Tensor:
    """A weight in the other of the two layouts."""
    return weight.mT if _CONV1D.search(name) else weight


def _hf_files(folder: Path) -> dict[str, str]:
    """{name of a tensor: the file in ``folder`` that holds it}"""
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(tensor_names(folder / WEIGHTS), WEIGHTS)
    index = folder / INDEX
    if not index.is_file():
        raise UserError(f"{folder}: there are no weights in this folder (neither {WEIGHTS} nor {INDEX})")
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise UserError(f"{index}: damaged: weight_map must be an object")
    for file in files.values():
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            raise UserError(f"{index}: damaged: weight_map must name files beside it, got {str(file)[:100]!r}")
    return files


def _hf_config(path: Path, any_dropout: bool) -> GPTConfig:
    """The model's shape; one whose dropouts differ only where ``any_dropout`` says that they will not be used."""
    data = read_json(path)
    if data.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type must be 'gpt2', got {str(data.get('model_type'))[:100]!r}")
    activation = data.get("activation_function", "gelu_new")
    gelu = gelu_of(activation)
    if gelu is None:
        known = ", ".join(name for names in _ACTIVATIONS.values() for name in names)
        raise UserError(f"{path}: activation_function must be one of {known}, got {str(activation)[:100]!r}")
    dropout, *others = (data.get(name, 0.1) for name in _DROPOUTS)
    if not any_dropout and any(other != dropout for other in others):
        raise UserError(f"{path}: {', '.join(_DROPOUTS)} must be one number, got {dropout}, {others[0]}, {others[1]}")
    config = _config(
        path,
        vocab_size=data.get("vocab_size", 50257),
        block_size=data.get("n_positions", 1024),
        n_embd=data.get("n_embd", 768),
        n_layer=data.get("n_layer", 12),
        n_head=data.get("n_head", 12),
        dropout=0.0 if any_dropout else dropout,
        gelu=gelu,
        tie_weights=data.get("tie_word_embeddings", True),
    )
    for name, wanted in {**_FIXED, "n_inner": 4 * config.n_embd}.items():
        found = data.get(name)
        if found is not None and found != wanted:
            raise UserError(f"{path}: {name} must be {wanted}, got {str(found)[:100]}")
    return config


def _read_hf_tokenizer(path: Path) -> Tokenizer | None:
    """A tokenizer that has GPT-2's way with bytes and words; None where it has another."""
    data = read_json(path)
    model, words, added = (data.get(name) for name in ("model", "pre_tokenizer", "added_tokens"))
    if not isinstance(model, dict) or not isinstance(words, dict) or model.get("type") != "BPE":
        return None
    if words.get("type") != "ByteLevel" or words.get("add_prefix_space") or data.get("normalizer"):
        return None
    if not words.get("use_regex", True) or any(map(model.get, _OTHER_MERGING)):
        return None
    ids, merges = model.get("vocab"), model.get("merges")
    if not isinstance(ids, dict) or not isinstance(merges, list) or not isinstance(added, list):
        raise UserError(f"{path}: damaged: its model must have a vocab and merges, and the file added_tokens")
    ids = ids | {str(token.get("content")): token.get("id") for token in added if isinstance(token, dict)}
    if sorted(map(str, ids.values())) != sorted(map(str, range(len(ids)))):
        raise UserError(f"{path}: damaged: the tokens' ids must be the numbers from 0 on")
    if any(not isinstance(token, dict) or token.get("content") != END_OF_TEXT for token in added):
        return None  # text is looked through for such tokens before it is cut
    # Each merge is a list of two, or in older files their text.
    pairs = [" ".join(map(str, merge)) if isinstance(merge, list) else merge for merge in merges]
    try:
        return Tokenizer.from_json({"type": "bpe", "tokens": sorted(ids, key=ids.__getitem__), "merges": pairs})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _read_nanogpt(path: Path) -> Pretrained:
    """nanoGPT's model has exact GELU and ties its weights."""
    checkpoint = _unpickle(path)
    arguments, weights = (
        checkpoint.get(name) if isinstance(checkpoint, dict) else None for name in ("model_args", "model")
    )
    if not isinstance(arguments, dict) or not isinstance(weights, dict):
        raise UserError(f"{path}: not a checkpoint of nanoGPT: it must hold model and model_args")
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    missing = [name for name in names if name not in arguments]
    if missing:
        raise UserError(f"{path}: damaged: model_args lacks {missing[0]}")
    config = _config(path, gelu="none", **{name: arguments[name] for name in names})
    # torch.compile puts a prefix before the names.
    tensors = {str(name).removeprefix("_orig_mod."): t for name, t in weights.items() if isinstance(t, Tensor)}
    check_tensors(path, tensors, _parameters(path, config, tensors))
    return Pretrained(config, {name: Stored(path, name, [(0, tensor)]) for name, tensor in tensors.items()})


def _unpickle(path: Path) -> Any:
    """What ``torch.save`` wrote, if that is tensors and plain values.

    Nothing is executed, and nothing becomes larger than it lies there: the zip is not compressed, so the numbers are
    mapped, and the pickle names only what tensors are made of (PyTorch would let it have a bytearray of any size).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
            packed = any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist())
            if packed or len(pickles) != 1 or pickles[0].file_size > LARGEST_PICKLE:
                raise zipfile.BadZipFile("it has not the parts of one")
            calls = {
                str(argument) if opcode.name in ("GLOBAL", "INST") else opcode.name
                for opcode, argument, _ in pickletools.genops(archive.read(pickles[0]))
                if opcode.name in _CALLS
            }
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:  # RuntimeError: one that is encrypted
        raise UserError(f"{path}: cannot be read: not a file of torch.save: {error}") from error
    for called in sorted(calls):
        if not _HARMLESS.fullmatch(called):
            raise UserError(f"{path}: refused: its pickle would call {called[:100]}, and tensors need no such thing")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what damaged bytes raise has no common type
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from error


def _config(path: Path, **settings: Any) -> GPTConfig:
    """The settings that ``path`` has, checked.

    Raises:
        UserError: one that is out of its range, after the file's name.
    """
    for name, value in settings.items():
        if isinstance(value, int) and value > LARGEST_SIZE:
            raise UserError(f"{path}: {name} must be at most {LARGEST_SIZE}, got {told(value)}")
    try:
        return GPTConfig(**settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _parameters(path: Path, config: GPTConfig, names: Collection[str]) -> dict[str, Tensor]:
    """The parameters of a GPT of ``config``, without memory, after a look at how many blocks ``names`` are of."""
    blocks = {match[1] for name in names if (match := re.search(r"(?:^|\.)h\.(\d+)\.", name))}
    if len(blocks) != config.n_layer:
        raise UserError(
            f"{path}: n_layer must be {len(blocks)}, the blocks whose weights are there, got {config.n_layer}"
        )
    return dict(bare_model(config, "meta").named_parameters())
