"""Tensors and pictures to matplotlib figures, without pyplot and its global state."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb as color_to_rgb
from matplotlib.figure import Figure
from PIL import Image

INK, GREY, PALE = "#1f2933", "#6b7785", "#e4e8ec"
BLUE, LIGHT_BLUE, ORANGE = "#2f6690", "#a8c4d9", "#c2571a"
GREEN, LIGHT_GREEN = "#237a3b", "#cfe8d5"
WIDTH = 3.8  # inches, of every figure: readable on a telephone, two abreast on a desk
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": PALE,
    "legend.frameon": False,
}


def plot_losses(log_history: Sequence[dict[str, Any]]) -> Figure:
    """The loss over steps, and the parts it is the sum of.

    Args:
        log_history: a Trainer's; of its entries those with ``"loss"`` are drawn, with ``"contrastive_loss"`` and
            ``"view_loss"`` where they have them.

    Returns:
        One panel.

    Raises:
        ValueError: no entry has a loss.
    """
    return _plot_curves(log_history, {"loss": INK, "contrastive_loss": BLUE, "view_loss": ORANGE})


def plot_temperature(log_history: Sequence[dict[str, Any]]) -> Figure:
    """The temperature of the contrastive loss over steps.

    Args:
        log_history: a Trainer's; its entries with ``"temperature"`` are drawn.

    Returns:
        One panel.

    Raises:
        ValueError: no entry has a temperature.
    """
    return _plot_curves(log_history, {"temperature": BLUE})


@rc_context(STYLE)
def _plot_curves(log_history: Sequence[dict[str, Any]], colors: dict[str, str]) -> Figure:
    main = next(iter(colors))
    entries = [entry for entry in log_history if main in entry]
    if not entries:
        raise ValueError(f"log_history has no entry with a {main}: train with logging_steps no larger than max_steps.")
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    ax = figure.subplots()
    for name, color in colors.items():
        drawn = [entry for entry in entries if name in entry]
        steps, values = [entry["step"] for entry in drawn], [entry[name] for entry in drawn]
        if drawn:
            ax.plot(steps, values, color=color, linewidth=1.6, label=name.replace("_", " "))
    ax.set(title=main.capitalize(), xlabel="step", ylim=(0, None))
    ax.grid(axis="y")
    if len(ax.lines) > 1:
        ax.legend()
    return figure


@rc_context(STYLE)
def plot_retrieval(
    queries: Sequence[str], results: Sequence[Sequence[Image.Image]], hits: Sequence[Sequence[bool]]
) -> Figure:
    """The pictures found for captions, best first, the right ones framed.

    Args:
        queries: n captions.
        results: n lists of k pictures.
        hits: n lists of k, whether the picture is a right one.

    Returns:
        n rows of k pictures, the caption above each row.

    Raises:
        ValueError: there are no queries, or lengths differ.
    """
    if not queries or not len(queries) == len(results) == len(hits):
        raise ValueError(
            f"give as many results and hits as queries, at least one, not {len(results)}, {len(hits)}, {len(queries)}."
        )
    columns, title, gap = len(results[0]), 0.24, 0.05
    side = (WIDTH - gap * (columns - 1)) / columns
    figure = Figure(figsize=(WIDTH, (side + title) * len(queries) + 0.02))
    height = figure.get_figheight()
    for row, (query, pictures, right) in enumerate(zip(queries, results, hits, strict=True)):
        bottom = height - (row + 1) * (side + title)
        for column, (picture, hit) in enumerate(zip(pictures, right, strict=True)):
            left = column * (side + gap)
            ax = figure.add_axes((left / WIDTH, bottom / height, side / WIDTH, side / height))
            _show(ax, picture)
            _frame(ax, GREEN if hit else PALE, 2.6 if hit else 0.8)
        baseline = (bottom + side + 0.07) / height
        figure.text(0, baseline, _shorten(query, 60), fontsize=9, parse_math=False)
    return figure


@rc_context(STYLE)
def plot_captions(
    images: Sequence[Image.Image],
    captions: Sequence[Sequence[str]],
    truths: Sequence[Collection[str]],
    scores: Sequence[Sequence[float]],
) -> Figure:
    """The captions found for pictures, best first, the right ones marked; where none is, the right one below.

    Args:
        images: n pictures.
        captions: n lists of k captions.
        truths: n collections of right captions.
        scores: n lists of k numbers from 0 to 1, drawn as bars.

    Returns:
        Two axes a picture: itself and its captions.

    Raises:
        ValueError: there are no pictures, or lengths differ.
        TypeError: the truths of a picture are one string.
    """
    if not images or not len(images) == len(captions) == len(truths) == len(scores):
        raise ValueError(
            "give as many captions, truths and scores as images, at least one, "
            f"not {len(captions)}, {len(truths)}, {len(scores)}, {len(images)}."
        )
    for index, right in enumerate(truths):
        if isinstance(right, str):
            raise TypeError(f"the truths of image {index} are one string: pass a list of strings.")
    figure = Figure(figsize=(WIDTH, 0.98 * len(images)))
    figure.subplots_adjust(0.002, 0.01, 0.998, 0.99, wspace=0.06, hspace=0.14)
    rows = figure.subplots(len(images), 2, squeeze=False, width_ratios=[1, 3])
    for (left, right), picture, found, truth, bars in zip(rows, images, captions, truths, scores, strict=True):
        _show(left, picture)
        _frame(left, PALE, 0.8)
        _list_captions(right, found, truth, bars)
    return figure


def _list_captions(ax: Axes, captions: Sequence[str], truths: Collection[str], scores: Sequence[float]) -> None:
    hits = [caption in truths for caption in captions]
    places = range(len(captions))
    ax.barh(places, scores, height=0.84, color=[LIGHT_GREEN if hit else PALE for hit in hits])
    for place, caption, score, hit in zip(places, captions, scores, hits, strict=True):
        style = {"va": "center", "color": GREEN if hit else INK, "weight": "bold" if hit else "normal"}
        mark = "✓ " if hit else ""
        ax.text(0.02, place, mark + _shorten(caption, 32), fontsize=8.5, parse_math=False, **style)
        ax.text(1, place, f"{score:.0%}", ha="right", fontsize=8.5, **style)
    if not any(hits):
        ax.text(
            0.02, len(captions), _shorten(f"is: {min(truths, default='')}", 40), va="center", fontsize=8.5,
            style="italic", color=GREY, parse_math=False,
        )  # fmt: skip
    ax.set(xlim=(0, 1), ylim=(len(captions) + 0.5, -0.5))
    ax.axis("off")


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


@rc_context(STYLE)
def plot_style_shift(rows: Sequence[dict[str, Any]]) -> Figure:
    """R@1 and R@10 side by side for each style or cell, with what chance and raw pixels reach at R@10.

    Args:
        rows: dicts with ``"name"``, ``"r1"``, ``"r10"``, ``"chance_r10"`` and ``"pixels_r10"`` (None: no mark), in
            percent.

    Returns:
        One panel, two bars a row.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("rows is empty: give one dict for each style.")
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    ax = figure.subplots()
    places, width = np.arange(len(rows)), 0.34
    for offset, key, label, color in ((-0.5, "r1", "R@1", LIGHT_BLUE), (0.5, "r10", "R@10", BLUE)):
        bars = ax.bar(places + offset * width, [row[key] for row in rows], width * 0.94, color=color, label=label)
        ax.bar_label(bars, fmt="%.0f", padding=2, fontsize=7.5)
    for key, label, color, style in (
        ("chance_r10", "chance, R@10", GREY, "--"),
        ("pixels_r10", "nearest pixels, R@10", ORANGE, "-"),
    ):
        marks = [(place, row[key]) for place, row in zip(places, rows, strict=True) if row[key] is not None]
        if marks:
            at, values = np.array(marks).T
            ax.hlines(values, at, at + width, colors=color, linestyles=style, linewidth=2, label=label)
    ax.set_xticks(places, [fill(row["name"], 13) for row in rows], color=INK, fontsize=7.5, parse_math=False)
    ax.set_ylabel("found, % of pictures")
    ax.tick_params(length=0)
    ax.grid(axis="y")
    ax.set_axisbelow(True)
    ax.set_ylim(0, 105)
    ax.set_yticks(range(0, 101, 20))
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    return figure


@rc_context(STYLE)
def plot_attention(images: Sequence[Image.Image], maps: torch.Tensor) -> Figure:
    """Pictures, and beside each where the attention goes: the colour is as strong as the map, 0 is no colour.

    Args:
        images: n pictures.
        maps: ``(n, rows, cols)``, not negative, stretched over the whole picture; see `token_attention`.

    Returns:
        Two axes a picture: itself and the overlay.

    Raises:
        ValueError: there are no pictures, or not one map for each.
    """
    if not images or maps.ndim != 3 or len(images) != len(maps):
        raise ValueError(f"give one map a picture as (n, rows, cols), not {tuple(maps.shape)} for {len(images)}.")
    lines = -(-len(images) // 2)
    figure = Figure(figsize=(WIDTH, lines * (WIDTH / 4 + 0.06)))
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.995, hspace=0.08)
    outer = figure.add_gridspec(lines, 2, wspace=0.08)
    for index, (image, weights) in enumerate(zip(images, maps.float().cpu().numpy(), strict=True)):
        pair = outer[divmod(index, 2)].subgridspec(1, 2, wspace=0.04)
        for ax, picture in zip(pair.subplots(), (image, _overlay(image, weights)), strict=True):
            _show(ax, picture)
            _frame(ax, PALE, 0.8)
    return figure


def _overlay(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """The picture in grey under a colour whose opacity is the map, upsampled, relative to its maximum."""
    stretched = np.asarray(Image.fromarray(weights).resize(image.size, Image.Resampling.BICUBIC))
    opacity = 0.85 * np.clip(stretched / weights.max(), 0, 1)[..., None]
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] * 0.6 + 255 * 0.4
    mixed = (1 - opacity) * grey + opacity * 255 * np.array(color_to_rgb(ORANGE))
    return Image.fromarray(mixed.round().astype(np.uint8))


def _show(ax: Axes, picture: Image.Image) -> None:
    ax.imshow(picture.convert("RGB"), interpolation="lanczos")
    ax.set(xticks=[], yticks=[])


def _frame(ax: Axes, color: str, width: float) -> None:
    for spine in ax.spines.values():
        spine.set(visible=True, color=color, linewidth=width)


def token_attention(attentions: Sequence[torch.Tensor], num_prefix_tokens: int, grid: tuple[int, int]) -> torch.Tensor:
    """How much of the last layer's attention each patch gets, as a mean over heads.

    With a class token it is that token's attention; without one (mean pooling), the mean over all queries.

    Args:
        attentions: of the layers, ``(B, H, T, T)``, rows are queries, T is prefix tokens and then patches.
        num_prefix_tokens: tokens before the patches, the class token first; 0 with mean pooling.
        grid: rows and columns of patches.

    Returns:
        ``(B, rows, cols)``, each map of sum 1.

    Raises:
        ValueError: the tokens are not prefix and grid.
    """
    weights = attentions[-1].mean(dim=1)
    rows, columns = grid
    if weights.shape[-1] != num_prefix_tokens + rows * columns:
        raise ValueError(
            f"{weights.shape[-1]} tokens are not {num_prefix_tokens} prefix tokens and a grid of {rows}x{columns}."
        )
    over_tokens = weights[:, 0] if num_prefix_tokens else weights.mean(dim=1)
    over_patches = over_tokens[:, num_prefix_tokens:]
    return (over_patches / over_patches.sum(dim=-1, keepdim=True)).unflatten(-1, (rows, columns))
