"""Attention maps: how much each token of a text looks at each one before it, as numbers and as pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.config import UserError
from fastgpt.files import write_atomically
from fastgpt.generate import encode_prompt
from fastgpt.model import GPT, Bigram, CausalSelfAttention
from fastgpt.tokenizer import Tokenizer

LABELLED_TOKENS = 64  # a longer text is numbered, for its tokens would lie over each other
_OVERVIEW_CELL = 48  # pixels a side of one head's map among all, at most
_GAP = 3  # pixels between two of them


@torch.no_grad()
def attention_maps(model: GPT, idx: Tensor) -> Iterator[Tensor]:
    """The attention probabilities of each layer, made from the queries and keys that the model itself projects.

    The model runs as it is, its fused attention included, which never has these matrices; its projections are listened
    to, and the probabilities made of them afterwards, one layer at a time.

    Args:
        model: in evaluation mode, since dropout would change what later layers see.
        idx: (1, T), int64, T from 1 to ``block_size``.
    Yields:
        (H, T, T) in the model's dtype, a layer each: row i is what query i gives to each key. It adds up to 1, and is
        0 beyond key i.
    Raises:
        ValueError: idx of a wrong shape or dtype, or too long for the model.
    """
    projections: list[Tensor] = []  # of each layer, (1, T, 3C)
    hooks = [
        module.c_attn.register_forward_hook(lambda layer, args, output: projections.append(output))
        for module in model.modules()
        if isinstance(module, CausalSelfAttention)
    ]
    try:
        model(idx, last_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    for projection in projections:
        q, k, _ = projection[0].unflatten(-1, (3, model.config.n_head, -1)).permute(1, 2, 0, 3)  # three of (H, T, D)
        yield ops.softmax(q @ k.mT, scale=q.shape[-1] ** -0.5, is_causal=True)  # (H, T, T)


def draw_attention(
    model: GPT | Bigram,
    tokenizer: Tokenizer,
    prompt: str,
    out: Path,
    device: torch.device,
    *,
    layer: int | None = None,
    head: int | None = None,
) -> Iterator[Path]:
    """Write one PNG per layer and head, ``layer-LL-head-HH.png``, and ``all.png`` with all of them beside each other.

    Args:
        model: in evaluation mode, on ``device``.
        prompt: at most ``block_size`` tokens.
        out: the folder to write.
        layer, head: draw this one alone, counted from 0; None draws each. One map alone has no ``all.png``.
    Yields:
        The path of each picture, as soon as it is there.
    Raises:
        UserError: a model without attention, a layer or head that it does not have, a prompt that is empty, too long,
            not UTF-8 or has a character that the vocabulary lacks.
    """
    if not isinstance(model, GPT):
        raise UserError(f"only a GPT has attention to draw, and this run trained a {type(model).__name__}")
    layers = _chosen("layer", layer, model.config.n_layer)
    heads = _chosen("head", head, model.config.n_head)
    tokens = encode_prompt(tokenizer, prompt)
    if len(tokens) > model.config.block_size:
        raise UserError(
            f"the prompt has {len(tokens)} tokens, and this model reads at most {model.config.block_size} (block_size)"
        )
    labels = [_label(tokenizer.decode([token])) for token in tokens.tolist()]
    cells = []  # of the chosen layers, (chosen heads, at most _OVERVIEW_CELL, as many)
    for number, maps in enumerate(attention_maps(model, tokens[None].to(device))):
        if number not in layers:
            continue
        chosen = maps[heads.start : heads.stop].float().cpu()  # (chosen heads, T, T)
        for h, probabilities in zip(heads, chosen, strict=True):
            path = out / f"layer-{number:02d}-head-{h:02d}.png"
            _draw_map(path, probabilities, labels, f"layer {number}, head {h}")
            yield path
        # By the maximum, so that one key that all look at is still seen where several share a pixel.
        cells.append(F.adaptive_max_pool2d(_hide_future(chosen, -1.0), min(len(tokens), _OVERVIEW_CELL)))
    if len(layers) * len(heads) > 1:
        path = out / "all.png"
        _draw_overview(path, torch.stack(cells), layers, heads)
        yield path


def _chosen(what: str, index: int | None, count: int) -> range:
    if index is None:
        return range(count)
    if not 0 <= index < count:
        raise UserError(f"{what} must be from 0 to {count - 1}, the last of this model, got {index}")
    return range(index, index + 1)


def _label(text: str) -> str:
    """A token's text on one line: spaces to be seen, and what has no glyph in matplotlib's font by its code."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("monospace"))
    shown = text.replace(" ", "␣")
    return "".join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in shown)


def _hide_future(maps: Tensor, value: float) -> Tensor:
    """``maps`` (..., T, T) with ``value`` where a key comes after its query."""
    future = torch.ones(maps.shape[-2:], dtype=torch.bool).triu(1)
    return maps.masked_fill(future, value)


def _draw_map(path: Path, probabilities: Tensor, labels: Sequence[str], title: str) -> None:
    """One map, (T, T): the tokens at its sides where they fit, else their numbers."""
    T = len(labels)
    is_labelled = T <= LABELLED_TOKENS
    side = 3 + 0.14 * T if is_labelled else 8.0  # inches
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    image = _show(axes, _hide_future(probabilities, -1.0))
    axes.set(xlabel="key", ylabel="query", title=title)
    if is_labelled:
        font = {"fontsize": 7, "family": "monospace", "parse_math": False}
        axes.set_xticks(range(T), labels, rotation=90, **font)
        axes.set_yticks(range(T), labels, **font)
    figure.colorbar(image, ax=axes, shrink=0.7, label="probability")
    _save(figure, path)


def _draw_overview(path: Path, cells: Tensor, layers: range, heads: range) -> None:
    """All maps, (layers, heads, S, S), in one grid: a layer each row, a head each column."""
    size = cells.shape[-1]
    step = size + _GAP
    L, H = len(layers), len(heads)
    grid = F.pad(cells, (0, _GAP, 0, _GAP), value=-1.0).transpose(1, 2).reshape(L * step, H * step)
    figure = _figure(1.5 + H, 1.5 + L)
    axes = figure.subplots()
    image = _show(axes, grid[:-_GAP, :-_GAP])
    axes.set_xticks([i * step + size / 2 for i in range(H)], list(heads))
    axes.set_yticks([i * step + size / 2 for i in range(L)], list(layers))
    axes.set(xlabel="head", ylabel="layer")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.7, label="probability")
    _save(figure, path)


def _show(axes: Any, maps: Tensor) -> Any:
    """Probabilities as colours, the same in every picture; what is below 0 stays white.

    Colours go by the square root: most probabilities of a long text are near 0, and would be one darkness.
    """
    import matplotlib
    from matplotlib.colors import PowerNorm

    colours = matplotlib.colormaps["viridis"].with_extremes(bad="white")
    masked = maps.masked_fill(maps < 0, torch.nan).numpy()
    return axes.imshow(masked, cmap=colours, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    write_atomically(path, picture.getvalue())
