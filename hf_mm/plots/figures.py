"""Tensors and pictures to matplotlib figures, without pyplot and its global state."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
MATCHING_PLATEAU = np.log(3) - 2 / 3 * np.log(2)  # of one answer to everything where a third is right: 0.6365
LOGIT_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 50, 70, 80, 90, 95, 98, 99, 99.5)
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
    entries = _entries(log_history, main)
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
    frames = [[_hit_frame(hit) for hit in right] for right in hits]
    return _picture_rows(queries, results, frames)


@rc_context(STYLE)
def plot_neighbours(
    artists: Sequence[str],
    names: Sequence[str],
    drawings: Sequence[Image.Image],
    results: Sequence[Sequence[Image.Image]],
    hits: Sequence[Sequence[bool]],
) -> Figure:
    """Drawings by one artist, and the nearest drawing by each other artist, the right ones framed.

    Args:
        artists: that of the drawings, and then k others.
        names: of the n drawings.
        drawings: n pictures.
        results: n lists of k pictures, one by each other artist.
        hits: n lists of k, whether the picture is a right one.

    Returns:
        n rows of 1 + k pictures under a header, the name above each row.

    Raises:
        ValueError: there are no drawings, or lengths differ.
    """
    if not drawings or not len(names) == len(drawings) == len(results) == len(hits):
        raise ValueError(
            "give as many names, results and hits as drawings, at least one, "
            f"not {len(names)}, {len(results)}, {len(hits)}, {len(drawings)}."
        )
    rows = [[drawing, *found] for drawing, found in zip(drawings, results, strict=True)]
    frames = [[(INK, 1.6), *map(_hit_frame, right)] for right in hits]
    return _picture_rows(names, rows, frames, artists)


@rc_context(STYLE)
def plot_composed(
    queries: Sequence[Image.Image],
    sentences: Sequence[str],
    targets: Sequence[Image.Image],
    results: Mapping[str, Sequence[Sequence[Image.Image]]],
    hits: Mapping[str, Sequence[Sequence[bool]]],
) -> Figure:
    """Pictures with sentences, and the pictures that each way to ask finds for them, the right ones framed.

    Args:
        queries: n pictures.
        sentences: n texts.
        targets: n pictures that are asked for.
        results: for each way to ask, by its name, n lists of k pictures, best first.
        hits: likewise, whether the picture is a right one.

    Returns:
        For each query its sentence, and below it itself over its target beside a row of k pictures for each way.

    Raises:
        ValueError: there are no queries, or lengths differ.
    """
    lengths = {len(sentences), len(targets), *map(len, results.values()), *map(len, hits.values())}
    if not queries or lengths != {len(queries)} or results.keys() != hits.keys():
        raise ValueError(
            f"give as many sentences, targets, results and hits of each way to ask as queries ({len(queries)}, at least "
            f"one), not {', '.join(map(str, sorted(lengths)))}."
        )
    columns = len(next(iter(results.values()))[0])
    title, gap, large, label = 0.25, 0.05, 0.72, 0.62
    left = large + 0.14 + label
    side = (WIDTH - left - gap * (columns - 1) - 0.02) / columns
    block = title + len(results) * (side + gap) + 0.1
    figure = Figure(figsize=(WIDTH, block * len(queries)))
    height = figure.get_figheight()

    def place(picture: Image.Image, x: float, y: float, size: float, frame: tuple[str, float]) -> None:
        ax = figure.add_axes((x / WIDTH, y / height, size / WIDTH, size / height))
        _show(ax, picture)
        _frame(ax, *frame)

    for number, (query, sentence, target) in enumerate(zip(queries, sentences, targets, strict=True)):
        top = height - number * block - title
        figure.text(0.005, (top + 0.08) / height, _shorten(sentence, 60), fontsize=9, parse_math=False)
        place(query, 0.02, top - large, large, (INK, 1.6))
        place(target, 0.02, top - large - 0.26 - 0.6 * large, 0.6 * large, (GREEN, 0.8))
        figure.text(0.005, (top - large - 0.18) / height, "asked for", fontsize=7.5, color=GREY)
        for row, (name, found) in enumerate(results.items()):
            y = top - row * (side + gap) - side
            text = fill(name, 10)
            figure.text((large + 0.12) / WIDTH, (y + side / 2) / height, text, fontsize=7.5, va="center", color=GREY)
            for column, (picture, hit) in enumerate(zip(found[number], hits[name][number], strict=True)):
                place(picture, left + column * (side + gap), y, side, _hit_frame(hit))
    return figure


@rc_context(STYLE)
def plot_recalls(groups: Mapping[str, Mapping[str, float]], chance: Mapping[str, float], label: str) -> Figure:
    """Bars side by side for several ways to ask, group by group, with what chance reaches.

    Args:
        groups: by name, percentages by the name of a way to ask, the first one that of the model; the same names in all.
        chance: the percentage of chance by name of the group.
        label: of the axis.

    Returns:
        One panel.

    Raises:
        ValueError: there are no groups.
    """
    if not groups:
        raise ValueError("groups is empty: give one dict for each group of queries.")
    names = list(next(iter(groups.values())))
    colors = dict(zip(names, (BLUE, LIGHT_BLUE, "#c9d1d8", GREY, ORANGE), strict=False))
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    ax = figure.subplots()
    places, width = np.arange(len(groups)), 0.84 / len(names)
    for offset, name in enumerate(names):
        at = places + (offset - (len(names) - 1) / 2) * width
        bars = ax.bar(at, [row[name] for row in groups.values()], width * 0.92, color=colors[name], label=name)
        ax.bar_label(bars, fmt="%.0f", padding=1.5, fontsize=6.5)
    ax.hlines(
        [chance[name] for name in groups], places - 0.45, places + 0.45, colors=INK, linestyles="--", linewidth=1,
        label="chance",
    )  # fmt: skip
    ax.set_xticks(places, list(groups), color=INK, parse_math=False)
    ax.set_ylabel(label)
    ax.tick_params(length=0)
    ax.grid(axis="y")
    ax.set_axisbelow(True)
    ax.set_ylim(0, 1.08 * max(ax.get_ylim()[1] / 1.05, 1))
    figure.legend(loc="outside upper left", ncols=2, fontsize=7.5)
    return figure


@rc_context(STYLE)
def plot_words(
    images: Sequence[Image.Image],
    names: Sequence[str],
    words: Sequence[Sequence[str]],
    cosines: Sequence[Sequence[float]],
    hits: Sequence[Sequence[bool]],
) -> Figure:
    """Pictures, and the words of the vocabulary that are nearest to what each of them became.

    Args:
        images: n pictures.
        names: what each shows.
        words: n lists of k words, nearest first.
        cosines: n lists of k numbers, drawn as bars; the axis ends at the largest.
        hits: n lists of k, whether the word is one of the name.

    Returns:
        Two axes a picture: itself, and its name over its words.

    Raises:
        ValueError: there are no pictures, or lengths differ.
    """
    lengths = [len(values) for values in (names, words, cosines, hits)]
    if not images or set(lengths) != {len(images)}:
        raise ValueError(
            "give as many names, words, cosines and hits as images, at least one, "
            f"not {', '.join(map(str, lengths))}, {len(images)}."
        )
    figure = Figure(figsize=(WIDTH, 1.06 * len(images)))
    figure.subplots_adjust(0.002, 0.01, 0.998, 0.99, wspace=0.06, hspace=0.16)
    rows = figure.subplots(len(images), 2, squeeze=False, width_ratios=[1, 2.6])
    longest = max(max(row) for row in cosines)
    for (left, right), picture, name, found, bars, right_ones in zip(
        rows, images, names, words, cosines, hits, strict=True
    ):
        _show(left, picture)
        _frame(left, PALE, 0.8)
        places = np.arange(len(found)) + 1
        right.barh(
            places, np.maximum(bars, 0), height=0.84, color=[LIGHT_GREEN if hit else PALE for hit in right_ones]
        )
        right.text(0, 0, _shorten(name, 36), va="center", color=GREY, style="italic", parse_math=False)
        for place, word, cosine, hit in zip(places, found, bars, right_ones, strict=True):
            style = {"va": "center", "color": GREEN if hit else INK, "fontsize": 8}
            mark = "✓ " if hit else ""
            right.text(0.02 * longest, place, mark + _shorten(word, 24), parse_math=False, **style)
            right.text(longest, place, f"{cosine:.2f}".replace("-", "−"), ha="right", **style)
        right.set(xlim=(0, longest), ylim=(len(found) + 0.6, -0.6))
        right.axis("off")
    return figure


def _hit_frame(hit: bool) -> tuple[str, float]:
    return (GREEN, 2.6) if hit else (PALE, 0.8)


def _picture_rows(
    titles: Sequence[str],
    rows: Sequence[Sequence[Image.Image]],
    frames: Sequence[Sequence[tuple[str, float]]],
    header: Sequence[str] = (),
) -> Figure:
    """n rows of k framed pictures, a title above each row; frames are colours and widths, the header k texts."""
    columns, title, gap, edge, top = len(rows[0]), 0.24, 0.05, 0.02, 0.2 if header else 0
    side = (WIDTH - 2 * edge - gap * (columns - 1)) / columns
    lefts = [(edge + column * (side + gap)) / WIDTH for column in range(columns)]
    figure = Figure(figsize=(WIDTH, (side + title) * len(rows) + top + 0.02))
    height = figure.get_figheight()
    for left, text in zip(lefts, header, strict=False):
        figure.text(left, 1 - 0.14 / height, text, fontsize=8, color=GREY)
    for row, (text, pictures, styles) in enumerate(zip(titles, rows, frames, strict=True)):
        bottom = height - top - (row + 1) * (side + title)
        for left, picture, frame in zip(lefts, pictures, styles, strict=True):
            ax = figure.add_axes((left, bottom / height, side / WIDTH, side / height))
            _show(ax, picture)
            _frame(ax, *frame)
        figure.text(lefts[0], (bottom + side + 0.07) / height, _shorten(text, 60), fontsize=9, parse_math=False)
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


@rc_context(STYLE)
def plot_mistakes(
    images: Sequence[Image.Image],
    answers: Sequence[str],
    scores: Sequence[float],
    answer_images: Sequence[Image.Image],
    truths: Sequence[str],
    ranks: Sequence[int],
) -> Figure:
    """Pictures, the wrong name that each was given, and how far from it the right one is.

    Args:
        images: n pictures.
        answers: the name that comes first for each, a wrong one.
        scores: n numbers from 0 to 1, of the answers.
        answer_images: a picture of what each answer names.
        truths: the right names.
        ranks: of the right names, 1 is first.

    Returns:
        Three axes a picture: itself, the words, and the picture of the answer.

    Raises:
        ValueError: there are no pictures, or lengths differ.
    """
    lengths = [len(values) for values in (answers, scores, answer_images, truths, ranks)]
    if not images or set(lengths) != {len(images)}:
        raise ValueError(
            "give as many answers, scores, answer_images, truths and ranks as images, at least one, "
            f"not {', '.join(map(str, lengths))}, {len(images)}."
        )
    header = 0.2
    height = 0.9 * len(images) + header
    figure = Figure(figsize=(WIDTH, height))
    figure.subplots_adjust(0.005, 0.005, 0.995, 1 - header / height, wspace=0.06, hspace=0.1)
    rows = figure.subplots(len(images), 3, squeeze=False, width_ratios=[1, 2.6, 1])
    for ax, text in zip(rows[0], ("the picture", "what it says", "looks like"), strict=True):
        figure.text(ax.get_position().x0, 1 - 0.13 / height, text, fontsize=8, color=GREY)
    for (left, words, right), picture, answer, score, other, truth, rank in zip(
        rows, images, answers, scores, answer_images, truths, ranks, strict=True
    ):
        for ax, image in ((left, picture), (right, other)):
            _show(ax, image)
            _frame(ax, PALE, 0.8)
        style = {"transform": words.transAxes, "parse_math": False}
        words.text(0, 0.74, _shorten(answer, 26), va="bottom", color=ORANGE, weight="bold", **style)
        words.text(0, 0.68, f"{score:.0%} sure", va="top", fontsize=8, color=ORANGE, **style)
        words.text(0, 0.27, _shorten(f"is: {truth}", 31), va="bottom", **style)
        words.text(0, 0.21, f"guess number {rank:,}", va="top", fontsize=8, color=GREY, **style)
        words.axis("off")
    return figure


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
def plot_few_shot(row: dict[str, Any]) -> Figure:
    """Accuracy over the number of examples per class, beside pixels, zero-shot classification and chance.

    Where the probe's curve crosses that of a zero-shot classifier there is a mark with the number of examples.

    Args:
        row: of one column and split of `evaluate_emoji_probes`, in percent.

    Returns:
        One panel; its x axis is logarithmic. Small dots are single draws.
    """
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    ax = figure.subplots()
    shots = [point["shots"] for point in row["few_shot"]]
    for key, label, color in (("few_shot", "probe, features", BLUE), ("pixels_few_shot", "probe, pixels", ORANGE)):
        ax.plot(shots, [point["accuracy"] for point in row[key]], "o-", color=color, markersize=4, label=label)
        draws = [(point["shots"], accuracy) for point in row[key] for accuracy in point["accuracies"]]
        ax.scatter(*np.array(draws).T, s=5, color=color, alpha=0.4, linewidths=0)
    for key, label, style in (
        ("zero_shot", "zero-shot, names", {"color": INK}),
        ("zero_shot_name", "zero-shot, class name", {"color": INK, "linestyle": ":"}),
        ("chance", "chance", {"color": GREY, "linestyle": "--"}),
    ):
        ax.axhline(row[key], linewidth=1.2, label=label, **style)
    for key, needed in (("zero_shot", row["shots_to_match"]), ("zero_shot_name", row["shots_to_match_name"])):
        if needed is not None and needed > shots[0]:
            ax.plot(needed, row[key], "o", color="white", markeredgecolor=INK, markersize=6, zorder=3)
            ax.annotate(
                f"{needed:.1f}", (needed, row[key]), (-4, 6), textcoords="offset points", ha="right", weight="bold"
            )
    ax.set_xscale("log")
    ax.set_xticks(shots, shots)
    ax.set_xticks([], minor=True)
    ax.margins(y=0.12)
    ax.set(xlabel="emoji per class to learn from", ylabel="accuracy, %", ylim=(0, None))
    ax.grid(axis="y")
    ax.set_axisbelow(True)
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    return figure


@rc_context(STYLE)
def plot_robustness(row: dict[str, Any]) -> Figure:
    """Accuracies before and after a shift on logit axes: standard models, the line through them, and the model.

    Args:
        row: of one shift of `evaluate_emoji_robustness`, in percent.

    Returns:
        One panel. The model's distance from the line is drawn, and numbered in the legend; beyond all standard models the
        line is dotted.
    """
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    ax = figure.subplots()
    before, after = (_logit([point[side] for point in row["reference"]]) for side in ("in", "shift"))
    model, shift, expected = _logit([row["model"]["in"], row["model"]["shift"], row["expected"]])
    low, high = before.min(), before.max()

    def line(start: float, end: float, style: str, label: str | None = None) -> None:
        at = np.array([start, end])
        ax.plot(at, row["intercept"] + row["slope"] * at, style, color=BLUE, linewidth=1.6, label=label)

    ax.axline((0, 0), slope=1, color=GREY, linewidth=0.8, label="no loss")
    ax.scatter(before, after, s=14, color=LIGHT_BLUE, label="classifiers of pixels")
    line(low, high, "-", "their line")
    if row["extrapolated"]:
        line(low if model < low else high, model, ":")
    ax.plot([model, model], [expected, shift], color=ORANGE, linewidth=1.2)
    distance = f"{row['effective_robustness']:+.1f}".replace("-", "−")
    ax.plot(model, shift, "D", color=ORANGE, markersize=6, label=f"this model, {distance} points")
    every = np.concatenate([before, after, [model, shift, expected]])
    edges = every.min() - 0.3, every.max() + 0.3
    shown = [percent for percent in LOGIT_TICKS if edges[0] <= _logit(percent) <= edges[1]]
    ax.set_xticks(_logit(shown), shown)
    ax.set_yticks(_logit(shown), shown)
    ax.set(xlim=edges, ylim=edges, xlabel="artists it knows, % right", ylabel="new artist, % right")
    ax.grid()
    ax.set_axisbelow(True)
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    return figure


def _logit(percent: float | Sequence[float]) -> np.ndarray:
    share = np.asarray(percent) / 100
    return np.log(share / (1 - share))


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


@rc_context(STYLE)
def plot_answers(
    images: Sequence[Image.Image],
    truths: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    hits: Mapping[str, Sequence[bool]],
) -> Figure:
    """Pictures, and beside each what it shows and what several speakers say of it, the right ones marked.

    Args:
        images: n pictures.
        truths: what each shows.
        answers: n texts of each speaker, by its name.
        hits: likewise, whether the text is right.

    Returns:
        Two axes a picture: itself, and the truth over a line for each speaker.

    Raises:
        ValueError: there are no pictures, or lengths or names differ.
    """
    lengths = {len(truths), *map(len, answers.values()), *map(len, hits.values())}
    if not images or lengths != {len(images)} or answers.keys() != hits.keys():
        raise ValueError(
            f"give as many truths, answers and hits of each speaker as images ({len(images)}, at least one), not "
            f"{', '.join(map(str, sorted(lengths)))}."
        )
    figure = Figure(figsize=(WIDTH, 0.98 * len(images)))
    figure.subplots_adjust(0.002, 0.01, 0.998, 0.99, wspace=0.06, hspace=0.14)
    rows = figure.subplots(len(images), 2, squeeze=False, width_ratios=[1, 3])
    for number, ((left, right), picture, truth) in enumerate(zip(rows, images, truths, strict=True)):
        _show(left, picture)
        _frame(left, PALE, 0.8)
        right.text(0.02, 0, _shorten(truth, 36), va="center", weight="bold", parse_math=False)
        for place, (name, said) in enumerate(answers.items(), start=1):
            hit = hits[name][number]
            mark, color = ("✓ ", GREEN) if hit else ("", INK)
            right.text(0.02, place, name, va="center", fontsize=7.5, color=GREY, parse_math=False)
            right.text(
                0.27, place, mark + _shorten(said[number], 28), va="center", fontsize=8.5, color=color, parse_math=False
            )  # fmt: skip
        right.set(xlim=(0, 1), ylim=(len(answers) + 0.5, -0.5))
        right.axis("off")
    return figure


@rc_context(STYLE)
def plot_query_attention(names: Sequence[str], images: Sequence[Image.Image], maps: torch.Tensor) -> Figure:
    """Pictures, and beside each where every query looks, see `plot_attention`.

    Args:
        names: of the n pictures.
        images: n pictures.
        maps: ``(n, queries, rows, cols)``, not negative, stretched over the whole picture.

    Returns:
        n rows of 1 + queries pictures under a header, the name above each row.

    Raises:
        ValueError: there are no pictures, or not one name and maps for each.
    """
    if not images or maps.ndim != 4 or not len(names) == len(images) == len(maps):
        raise ValueError(
            "give a name and maps a picture as (n, queries, rows, cols), at least one, "
            f"not {len(names)} and {tuple(maps.shape)} for {len(images)}."
        )
    weights = maps.float().cpu().numpy()
    rows = [[image, *(_overlay(image, own) for own in each)] for image, each in zip(images, weights, strict=True)]
    header = ["picture", *(f"query {number}" for number in range(1, maps.shape[1] + 1))]
    return _picture_rows(names, rows, [[(PALE, 0.8)] * len(header)] * len(images), header)


@rc_context(STYLE)
def plot_stage1(
    log_history: Sequence[dict[str, Any]], batch_size: int | None = None, unigram_loss: float | None = None
) -> Figure:
    """The three losses of BLIP-2's first stage over steps, and what each is without looking.

    Args:
        log_history: a Trainer's; its entries with ``"loss_itc"``, ``"loss_itm"`` and ``"loss_itg"`` are drawn.
        batch_size: pairs of a step over all ranks. Where all are alike, the contrastive loss is its logarithm, whatever
            the label smoothing; None draws no line.
        unigram_loss: the generation loss of one guess at every word, in nats; None draws no line.

    Returns:
        Three panels over one axis of steps. The line of the matching loss is that of one answer to all of a right pair
        and two drawn ones, 0.6365.

    Raises:
        ValueError: no entry has one of the losses, or the batch size is not positive.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1.")
    panels = {
        "loss_itc": ("Contrastive (ITC)", None if batch_size is None else float(np.log(batch_size))),
        "loss_itm": ("Matching (ITM)", MATCHING_PLATEAU),
        "loss_itg": ("Generation (ITG)", unigram_loss),
    }
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    for ax, (name, (title, reference)) in zip(figure.subplots(3, sharex=True), panels.items(), strict=True):
        steps, values = _logged(log_history, name)
        ax.plot(steps, values, color=BLUE, linewidth=1.6)
        if reference is not None:
            ax.axhline(reference, color=GREY, linestyle="--", linewidth=1)
            ax.set_title(f"- -  without looking {reference:.2f}", loc="right", fontsize=7.5, color=GREY)
        ax.set(title=title, ylim=(0, None))
        ax.grid(axis="y")
    ax.set_xlabel("step")
    return figure


@rc_context(STYLE)
def plot_matching_accuracy(log_history: Sequence[dict[str, Any]]) -> Figure:
    """How often the matching head is right over steps, of right pairs and of either kind of hard negatives.

    Args:
        log_history: a Trainer's; its entries with ``"accuracy_itm_right_pair"``, ``"accuracy_itm_drawn_image"`` and
            ``"accuracy_itm_drawn_text"``, from 0 to 1, are drawn.

    Returns:
        One panel, in percent.

    Raises:
        ValueError: no entry has one of the accuracies.
    """
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    ax = figure.subplots()
    blocks = {"right_pair": (BLUE, "-"), "drawn_image": (ORANGE, "-"), "drawn_text": (INK, "--")}
    for name, (color, style) in blocks.items():
        steps, values = _logged(log_history, f"accuracy_itm_{name}")
        percent = 100 * np.array(values)
        ax.plot(steps, percent, color=color, linestyle=style, linewidth=1.4, label=name.replace("_", " "))
    ax.set(xlabel="step", ylabel="right, %", ylim=(0, 102))
    ax.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=3, fontsize=8)
    return figure


@rc_context(STYLE)
def plot_runs(log_histories: Mapping[str, Sequence[dict[str, Any]]]) -> Figure:
    """The loss of several runs over steps, in the same axes.

    Args:
        log_histories: a Trainer's of each run, by its name, at most three.

    Returns:
        One panel.

    Raises:
        ValueError: there are no runs or more than three, or one has no loss.
    """
    colors = (BLUE, ORANGE, INK)
    if not 0 < len(log_histories) <= len(colors):
        raise ValueError(f"there are {len(log_histories)} runs: give one to {len(colors)}.")
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    ax = figure.subplots()
    for (name, log_history), color in zip(log_histories.items(), colors, strict=False):
        ax.plot(*_logged(log_history, "loss"), color=color, linewidth=1.6, label=name)
    ax.set(title="Loss", xlabel="step", ylim=(0, None))
    ax.grid(axis="y")
    ax.legend()
    return figure


def _logged(log_history: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of what was logged under a name."""
    entries = _entries(log_history, name)
    return [entry["step"] for entry in entries], [entry[name] for entry in entries]


def _entries(log_history: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    entries = [entry for entry in log_history if name in entry]
    if not entries:
        raise ValueError(f"log_history has no entry with {name!r}: train with logging_steps no larger than max_steps.")
    return entries
