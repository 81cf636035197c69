"""The report of a CLIP trained on the bundled emoji: what it finds, how well, and where it looks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from ..data.emoji import STYLES, load_emoji
from ..evaluation.embeddings import embed_images, embed_texts, inference
from ..evaluation.formatting import format_percent
from ..evaluation.retrieval import right_texts, shared_captions
from .figures import (
    plot_attention,
    plot_captions,
    plot_losses,
    plot_retrieval,
    plot_style_shift,
    plot_temperature,
    token_attention,
)
from .report import Picture, Section, Table, write_report

CELLS = {  # split: what its pictures are
    "cell": "known emoji by known artists",
    "style": "known emoji by the new artist",
    "concept": "new emoji by known artists",
    "both": "new emoji by the new artist",
}
VALIDATION = {"val": "validation emoji by known artists"}
MEMORY = {"fit": "training pictures"}
ARTISTS = {"noto": "Noto", "twemoji": "Twemoji", "fluent": "Fluent", "openmoji": "OpenMoji, new"}
FORMS = {"size_normalized": "drawings brought to one size", "original": "drawings as published"}
ATTRIBUTION = """
Noto Emoji, Copyright Google Inc., Apache License 2.0, https://github.com/googlefonts/noto-emoji.

Twemoji graphics, Copyright Twitter, Inc. and other contributors, CC BY 4.0
https://creativecommons.org/licenses/by/4.0/, https://github.com/jdecked/twemoji.

Fluent Emoji, Copyright (c) Microsoft Corporation, MIT, https://github.com/microsoft/fluentui-emoji.

All emojis designed by OpenMoji (https://openmoji.org/) - the open-source emoji and icon project. License: CC BY-SA 4.0
https://creativecommons.org/licenses/by-sa/4.0/.

Changed in all: rasterised to 64x64 pixels on white, drawings brought to one size. Names, tags and groups from Unicode
CLDR by way of Emojibase, MIT, Copyright (c) 2017-2019 Miles Johnson.
"""


def clip_report(
    model: PreTrainedModel,
    processor: Any,
    metrics: dict[str, dict[str, Any]],
    log_history: list[dict[str, Any]],
    path: str | Path,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Writes the report of a CLIP that was trained on the bundled emoji, as one page with everything inside it.

    Args:
        model: `MMClipModel`.
        processor: its processor.
        metrics: what `evaluate_emoji` returned, under ``"size_normalized"`` and ``"original"``.
        log_history: of the Trainer.
        path: of the HTML file.
        seed: of the choice of captions and pictures to show.
        progress: show a bar.

    Returns:
        The path.

    Raises:
        ValueError: `metrics` lacks one of the two forms, or no entry of `log_history` has a loss.
    """
    if lacking := [form for form in FORMS if not metrics.get(form)]:
        raise ValueError(
            f"metrics has no {lacking[0]!r}: pass evaluate_emoji's result for both sizes of the drawings."
        )
    shown = _embed(model, processor, progress)
    rng = Random(seed)
    examples = {split: rng.sample(np.flatnonzero(shown.split == split).tolist(), 4) for split in CELLS}
    sections = [
        _found_pictures(shown, rng),
        _found_captions(shown, examples),
        _results(metrics),
        _style_shift(metrics),
        _kinds(metrics["size_normalized"]),
        _attention(model, processor, shown, [row for rows in examples.values() for row in rows[:3]]),
        _training(log_history),
        Section("About the pictures", ATTRIBUTION),
    ]
    return write_report(path, "What a small CLIP learned from emoji", _lead(model, log_history, metrics), sections)


@dataclass
class _Shown:
    """The pictures that training never saw, and all names, with what the model says of them."""

    images: list[Image.Image]
    split: np.ndarray
    names: list[str]
    right: torch.Tensor  # (pictures, names): the name of this picture, or of an identical one
    cosines: torch.Tensor  # (pictures, names)
    probabilities: torch.Tensor  # (pictures, names), over the names


def _embed(model: PreTrainedModel, processor: Any, progress: bool) -> _Shown:
    emoji = load_emoji("all", normalize_size=True)
    names = sorted(set(emoji["caption"]))
    unseen = emoji.select(np.flatnonzero(np.isin(emoji["split"][:], list(CELLS))))
    images = list(unseen["image"])
    looks = [(style, image.tobytes()) for style, image in zip(unseen["style"], images, strict=True)]
    right = shared_captions([[name] for name in unseen["caption"]], looks)
    cosines = (
        embed_images(model, processor, images, progress=progress)
        @ embed_texts(model, processor, names, progress=progress).T
    )
    return _Shown(
        images=images,
        split=np.array(unseen["split"][:]),
        names=names,
        right=right_texts(right, names),
        cosines=cosines,
        probabilities=(cosines * model.logit_scale.detach().float().cpu().exp()).softmax(dim=-1),
    )


def _lead(model: PreTrainedModel, log_history: list[dict], metrics: dict) -> str:
    steps = max(entry["step"] for entry in log_history)
    cell, style = (metrics["size_normalized"][split] for split in ("cell", "style"))
    return (
        f"A model of {model.num_parameters() / 1e6:.1f} million parameters read the names of emoji beside drawings by "
        f"three artists, for {steps:,} steps. Every picture shown on this page, and every result, is of pictures that it "
        "never saw in training.\n\n"
        f"It puts the right one of {cell['captions']:,} names among its first ten for {cell['i2t_r10']:.0f} % of new "
        f"drawings by the artists it knows, and for {style['i2t_r10']:.0f} % of those by an artist it never saw; "
        f"chance is {cell['chance_r10']:.1f} %."
    )


def _found_pictures(shown: _Shown, rng: Random, columns: int = 6) -> Section:
    def found(splits: tuple[str, ...], count: int, alt: str, caption: str) -> Picture:
        rows = np.isin(shown.split, splits)
        known = np.flatnonzero(shown.right[torch.from_numpy(rows)].any(dim=0).numpy())
        chosen = sorted(rng.sample(known.tolist(), count))
        best = [shown.cosines[:, name].topk(columns).indices.tolist() for name in chosen]
        return Picture(
            plot_retrieval(
                [shown.names[name] for name in chosen],
                [[shown.images[row] for row in rows] for rows in best],
                [[bool(shown.right[row, name]) for row in rows] for name, rows in zip(chosen, best, strict=True)],
            ),
            alt,
            caption,
        )

    return Section(
        "Pictures found for names",
        f"Each name was searched for among the {len(shown.images):,} pictures that training never saw; the "
        f"{columns} nearest are shown. A green frame is a right one. The names were drawn at random.",
        [
            found(
                ("cell", "style"),
                6,
                "Six names of known emoji, the nearest pictures beside each",
                "Known emoji: the name was in the training texts, the pictures are new. Most have one right picture, "
                "by the new artist.",
            ),
            found(
                ("concept", "both"),
                6,
                "Six names of emoji that training never saw, the nearest pictures beside each",
                "New emoji: neither the name nor any picture of them was trained on. Each has up to four right "
                "pictures. What is found here is found by words that the name shares with others.",
            ),
        ],
    )


def _found_captions(shown: _Shown, examples: dict[str, list[int]], count: int = 4) -> Section:
    def found(rows: list[int], description: str) -> Picture:
        best = shown.probabilities[rows].topk(count, dim=-1)
        return Picture(
            plot_captions(
                [shown.images[row] for row in rows],
                [[shown.names[name] for name in names] for names in best.indices.tolist()],
                [{shown.names[name] for name in shown.right[row].nonzero().flatten().tolist()} for row in rows],
                best.values.tolist(),
            ),
            f"Four pictures ({description}) and the {count} likeliest names of each",
            f"{_capital(description)}.",
        )

    return Section(
        "Names found for pictures",
        f"The {count} likeliest of all {len(shown.names):,} names, with the model's own probabilities. Green is right; "
        "where none is, the right name stands below. The pictures were drawn at random.",
        [found(rows, CELLS[split]) for split, rows in examples.items()],
    )


def _results(metrics: dict[str, dict]) -> Section:
    normalized, original = (metrics[form] for form in FORMS)

    def rows(descriptions: dict[str, str], *keys: str) -> list[list[str]]:
        return [
            [
                f"{_capital(words)}\n{normalized[split]['images']:,} pictures, {normalized[split]['captions']:,} names",
                *(_both_forms(normalized[split][key], original[split][key]) for key in keys),
            ]
            for split, words in descriptions.items()
        ]

    results = CELLS | VALIDATION
    naming = ["%", "R@1", "R@5", "R@10", "chance\nR@1", "chance\nR@10", "pixels\nR@1", "pixels\nR@10"]
    naming_keys = ("i2t_r1", "i2t_r5", "i2t_r10", "chance_r1", "chance_r10", "pixels_r1", "pixels_r10")
    finding = ["%", "R@1", "R@10", "chance\nR@1", "chance\nR@10"]
    finding_keys = ("t2i_r1", "t2i_r10", "chance_t2i_r1", "chance_t2i_r10")
    return Section(
        "How well it names pictures",
        "A picture counts as named within k (R@k) if its name is among the first k. Ties count against the model. Known "
        "emoji are sought among the names of all training emoji, new ones among their own names. OpenMoji is the artist "
        "that training never saw.\n\n"
        "The baseline has no model: it gives the name of the training picture whose 16x16 pixels are most alike. It "
        "keeps every training picture at hand and compares drawings with drawings, never with words, which makes it "
        "strong for known emoji. It cannot name new ones (–): for these see the kinds of things below.",
        [
            Picture(
                plot_style_shift([_bars(description, metrics[form][split]) for split, description in CELLS.items()]),
                f"Bars: R@1 and R@10 of four kinds of pictures, with chance and the pixel baseline, {words}",
                f"{_capital(words)}.",
            )
            for form, words in FORMS.items()
        ],
        [
            Table(
                naming,
                rows(results, *naming_keys),
                "Naming pictures. Large: drawings brought to one size. Small: drawings as published.",
            ),
            Table(
                finding,
                rows(results, *finding_keys),
                "The other way: finding the pictures of a name among those of its row.",
            ),
            Table(naming, rows(MEMORY, *naming_keys), "Memory, not a result: the pictures that it was trained on."),
        ],
    )


def _style_shift(metrics: dict[str, dict]) -> Section:
    normalized, original = (metrics[form]["styles"] for form in FORMS)
    columns = [
        *(("seen", key) for key in ("i2t_r1", "i2t_r10", "chance_r10", "pixels_r10")),
        *(("new", key) for key in ("i2t_r1", "i2t_r10", "chance_r10")),
    ]
    rows = [
        [
            f"{ARTISTS[style]}\n{normalized[style]['seen']['images']:,} known, {normalized[style]['new']['images']:,} new",
            *(_both_forms(normalized[style][kind][key], original[style][kind][key]) for kind, key in columns),
        ]
        for style in STYLES
    ]
    return Section(
        "The shift of style",
        "The same for each artist. Three were trained on; OpenMoji, with its black outlines and flat colours, was not.",
        [
            Picture(
                plot_style_shift([_bars(ARTISTS[style], normalized[style][kind]) for style in STYLES]),
                f"Bars: R@1 and R@10 of {words} for each of four artists, with chance",
                f"{_capital(words)}, drawings of one size.",
            )
            for kind, words in (("seen", "known emoji"), ("new", "new emoji"))
        ],
        [
            Table(
                [
                    "%",
                    *("R@1\nknown", "R@10\nknown", "chance\nR@10\nknown", "pixels\nR@10\nknown"),
                    *("R@1\nnew", "R@10\nnew", "chance\nR@10\nnew"),
                ],
                rows,
                "Large: drawings brought to one size. Small: drawings as published.",
            )
        ],
    )


def _kinds(metrics: dict[str, Any]) -> Section:
    header = ["accuracy", "top\u00a05", "balanced", "by\u00a0name", "chance", "majority", "pixels"]
    keys = ("accuracy", "top5", "balanced_accuracy", "name_accuracy", "chance", "majority", "pixels_accuracy")
    return Section(
        "What kind of thing it is",
        "Each picture is sorted into classes such as food-fruit. A class is the mean embedding of the names of its "
        "training emoji; by name, it is only its own name. Balanced accuracy counts every class the same; majority is "
        "always the most frequent class. Here the pixel baseline has an answer for new emoji too: the class of the "
        "training picture whose pixels are most alike.",
        tables=[
            Table(
                [f"% of {table['both']['classes']} classes", *header],
                [
                    [
                        f"{_capital(description)}\n{table[split]['images']:,} pictures",
                        *(format_percent(table[split][key]) for key in keys),
                    ]
                    for split, description in CELLS.items()
                ],
                f"{_capital(name)}s of emoji, drawings of one size.",
            )
            for name, table in (("subgroup", metrics["subgroup"]), ("group", metrics["group"]))
        ],
    )


def _bars(name: str, row: dict[str, Any]) -> dict[str, Any]:
    numbers = {"r1": row["i2t_r1"], "r10": row["i2t_r10"]}
    return {"name": name, **numbers, "chance_r10": row["chance_r10"], "pixels_r10": row["pixels_r10"]}


def _attention(model: PreTrainedModel, processor: Any, shown: _Shown, rows: list[int]) -> Section:
    images = [shown.images[row] for row in rows]
    maps = attention_maps(model, processor, images)
    return Section(
        "Where it looks",
        "How much of the last layer's attention each patch gets, over all heads. The picture tower sees "
        f"{maps.shape[1]}x{maps.shape[2]} patches. Darker orange is more attention, relative to the most in the picture.",
        [
            Picture(
                plot_attention(images[part], maps[part]),
                f"{len(images[part])} pictures, and beside each a map of the attention over it",
            )
            for part in (slice(0, len(images) // 2), slice(len(images) // 2, None))
        ],
    )


def attention_maps(model: PreTrainedModel, processor: Any, images: list[Image.Image]) -> torch.Tensor:
    """``(n, rows, cols)``: how much of the last layer's attention each patch of a picture gets, see `token_attention`.

    Args:
        model: has a ViT as `vision_model`, such as `MMClipModel`; its attention kernel is changed and put back.
        processor: its processor.
        images: n pictures.
    """
    tower = model.vision_model
    kernel = tower.config._attn_implementation
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    tower.set_attn_implementation("eager")
    try:
        with inference(model):
            attentions = tower(pixel_values, output_attentions=True).attentions
    finally:
        tower.set_attn_implementation(kernel)
    grid = tower.config.grid_size
    return token_attention(attentions, attentions[-1].shape[-1] - grid[0] * grid[1], grid)


def _training(log_history: list[dict[str, Any]]) -> Section:
    return Section(
        "Training",
        "The contrastive loss asks which text of the batch belongs to a picture, and which picture to a text; the view "
        "loss which other picture shows the same emoji. The temperature is learnt.",
        [
            Picture(plot_losses(log_history), "The loss and its parts over the steps of training"),
            Picture(plot_temperature(log_history), "The temperature over the steps of training"),
        ],
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _both_forms(value: float | None, original: float | None) -> str:
    return f"{format_percent(value)}\n{format_percent(original)}"
