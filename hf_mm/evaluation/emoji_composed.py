"""Composed retrieval on the bundled emoji: the same thing by another artist, the same person or hand in a skin tone.

A picture and a few words ask for one other picture. What the four ways to ask are is said in
`hf_mm.evaluation.composed.protocol`; beside them stand raw pixels, which read no words, and the true name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.emoji import STYLES, load_emoji
from ..data.image_text import in_style
from .composed.protocol import CHUNK, LAST, embed_queries, mean_rows, recalls
from .embeddings import embed_images, embed_texts
from .metrics import chance_recall_at_k, retrieval_ranks
from .pixels import embed_pixels
from .style_shift import NEW_STYLE

TRAINED_STYLES = tuple(style for style in STYLES if style != NEW_STYLE)
TONES = {"light": 1, "medium": 3, "dark": 5}
STYLE_PROMPT = in_style("*", "{style}")
TONE_PROMPT = "* : {tone} skin tone"
RECALLS = (1, 10, 50)


@dataclass(frozen=True)
class EmojiPictures:
    """Every bundled picture, skin tones included, through a frozen picture tower. n is their number.

    Attributes:
        columns: ``"split"``, ``"style"``, ``"hexcode"``, ``"base"``, ``"caption"`` and ``"skin_tone"``, ``(n,)`` each.
        looks: ``(n,)`` integers, equal for pictures that are equal to the byte.
        features: ``(n, D)`` in the joint space, not of unit length.
        pixels: ``(n, 768)``, see `embed_pixels`.
        normalize_size: whether the drawings were brought to one size.
    """

    columns: dict[str, np.ndarray]
    looks: torch.Tensor
    features: torch.Tensor
    pixels: torch.Tensor
    normalize_size: bool


@dataclass(frozen=True)
class Questions:
    """Which picture, changed to which domain, is which other picture. All are rows of `EmojiPictures`.

    Attributes:
        queries, targets: ``(q,)``.
        domains: ``(q,)``, the artist or the skin tone that is asked for.
        gallery: ``(g,)``, the pictures that are searched.
        domain_of: ``(g,)``, what each of them is.
    """

    queries: np.ndarray
    targets: np.ndarray
    domains: np.ndarray
    gallery: np.ndarray
    domain_of: np.ndarray


def embed_emoji(
    model: nn.Module, processor: Any, normalize_size: bool = True, batch_size: int = 256, progress: bool = True
) -> EmojiPictures:
    """Encodes every picture once, for any number of mapping networks over one tower.

    Args:
        model, processor, batch_size, progress: see `embed_images`.
        normalize_size: drawings of one size, see `hf_mm.data.emoji.normalize_size`; False for the originals.
    """
    emoji = load_emoji("all", skin_tones=True, normalize_size=normalize_size)
    images = list(emoji["image"])
    number: dict[bytes, int] = {}
    return EmojiPictures(
        columns={
            name: np.array(emoji[name][:]) for name in ("split", "style", "hexcode", "base", "caption", "skin_tone")
        },
        looks=torch.tensor([number.setdefault(image.tobytes(), len(number)) for image in images]),
        features=embed_images(model, processor, images, batch_size, progress, normalize=False),
        pixels=embed_pixels(images),
        normalize_size=normalize_size,
    )


def style_questions(pictures: EmojiPictures, split: str = "concept") -> Questions:
    """Each picture of a split in each other artist's style, where that artist drew it; skin tones are left out.

    The artists asked for are those that training sees. The target may be of another split: a ``"cell"`` picture is
    unseen and its targets were trained on, and one of ``"both"`` is by an artist whom training does not know.

    Raises:
        ValueError: the split has no picture that another artist drew.
    """
    column, core = pictures.columns, pictures.columns["skin_tone"] == 0
    row = {(column["hexcode"][i], column["style"][i]): i for i in np.flatnonzero(core)}
    asked = [
        (query, row[target], style)
        for style in TRAINED_STYLES
        for query in np.flatnonzero(core & (column["split"] == split))
        if column["style"][query] != style and (target := (column["hexcode"][query], style)) in row
    ]
    gallery = np.flatnonzero(core)
    return Questions(*_columns(asked, split), gallery, column["style"][gallery])


def tone_questions(pictures: EmojiPictures, split: str = "concept") -> Questions:
    """Each person or hand of a split in each skin tone, by the same artist. The gallery is every picture in every tone.

    Raises:
        ValueError: the split has no picture that comes in skin tones.
    """
    column = pictures.columns
    row = {
        key: i for i, key in enumerate(zip(*(column[name] for name in ("base", "style", "skin_tone")), strict=True))
    }
    asked = [
        (query, row[target], tone)
        for tone, number in TONES.items()
        for query in np.flatnonzero((column["skin_tone"] == 0) & (column["split"] == split))
        if (target := (column["base"][query], column["style"][query], number)) in row
    ]
    names = np.array(["none", "light", "", "medium", "", "dark"])
    return Questions(*_columns(asked, split), np.arange(len(column["split"])), names[column["skin_tone"]])


def evaluate_style_conversion(
    model: nn.Module,
    processor: Any,
    pictures: EmojiPictures | None = None,
    split: str = "concept",
    prompt: str = STYLE_PROMPT,
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, Any]:
    """Asks with a picture and an artist's name for that artist's drawing of the same thing (`style_questions`).

    Every method searches the same gallery, all base pictures of all artists but the query picture itself, and then
    that of the asked artist alone (``"filtered"``). A picture that is equal to the target to the byte is as right as the
    target; ties count against the model.

    Args:
        model, processor, batch_size, progress: see `embed_composed`.
        pictures: what `embed_emoji` made of them with this model's picture tower; by default it is called.
        split: of the query pictures.
        prompt: with the placeholder, and ``{style}`` where the artist's name goes.

    Returns:
        Ready for JSON. ``"results"`` (whole gallery) and ``"filtered"`` have for each artist, and for ``"mean"``, the
        mean over them, a row for each of

        - ``"composed"``, ``"image_only"``, ``"text_only"`` (the prompt without the placeholder and its "of") and
          ``"image_text"``;
        - ``"pixels"``: the picture alone as 16x16 pixels;
        - ``"name"``: the true name in the place of the placeholder. No baseline: it is told what the picture shows;
        - ``"chance"``: a random order;

        with the percentages ``r1``, ``r10`` and ``r50``. Counts: ``"queries"`` of each artist, ``"gallery"`` (the query
        picture included), ``"filtered_gallery"`` of each artist. And what was asked: ``"split"``, ``"prompt"``,
        ``"text_only_prompt"``, ``"normalize_size"``, ``"query_removed"``.

    Raises:
        ValueError: the prompt has no ``{style}`` or not one placeholder, or the split has nothing to ask.
    """
    pictures = pictures or embed_emoji(model, processor, batch_size=batch_size, progress=progress)
    questions, captions = style_questions(pictures, split), pictures.columns["caption"]
    names = [in_style(captions[row], style) for row, style in zip(questions.targets, questions.domains, strict=True)]
    asked = {"protocol": "emoji_style_conversion", "split": split, "prompt": prompt}
    return asked | _evaluate(model, processor, pictures, questions, prompt, "style", names, batch_size, progress)


def evaluate_attribute_edit(
    model: nn.Module,
    processor: Any,
    pictures: EmojiPictures | None = None,
    split: str = "concept",
    prompt: str = TONE_PROMPT,
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, Any]:
    """Asks with a picture of a person or hand and a skin tone for the same in that tone (`tone_questions`).

    As `evaluate_style_conversion`, with light, medium and dark in the place of artists, ``{tone}`` in the prompt, and a
    gallery of every picture in every tone. In the gallery that is filtered to the asked tone the picture alone is a
    strong answer, since little but the tone differs.
    """
    pictures = pictures or embed_emoji(model, processor, batch_size=batch_size, progress=progress)
    questions = tone_questions(pictures, split)
    names = pictures.columns["caption"][questions.targets].tolist()
    asked = {"protocol": "emoji_attribute_edit", "split": split, "prompt": prompt}
    return asked | _evaluate(model, processor, pictures, questions, prompt, "tone", names, batch_size, progress)


def words_alone(prompt: str, placeholder: str = "*") -> str:
    """A prompt without its placeholder and the "of" before it: what the words say without the picture."""
    words = re.sub(rf"(\bof\s+)?{re.escape(placeholder)}", " ", prompt)
    return " ".join(words.split()).strip(" ,:;")


def _columns(asked: list[tuple[int, int, str]], split: str) -> tuple[np.ndarray, ...]:
    if not asked:
        raise ValueError(f"split {split!r} has no picture to ask with: choose one of train, cell, val, concept, both.")
    return tuple(map(np.array, zip(*asked, strict=True)))


def _evaluate(
    model: nn.Module,
    processor: Any,
    pictures: EmojiPictures,
    questions: Questions,
    prompt: str,
    field: str,
    names: list[str],
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    if f"{{{field}}}" not in prompt:
        raise ValueError(f"the prompt {prompt!r} does not say which {field} is asked for: put {{{field}}} in it.")
    words = words_alone(prompt, processor.placeholder)
    asked = [[text.replace(f"{{{field}}}", domain) for domain in questions.domains] for text in (prompt, words)]
    features = pictures.features[questions.queries]
    embeddings = embed_queries(model, processor, features, *asked, batch_size, progress)
    embeddings["pixels"] = pictures.pixels[questions.queries]
    embeddings["name"] = embed_texts(model, processor, names, batch_size, progress)

    domains = list(dict.fromkeys(questions.domains.tolist()))
    whole, filtered = {}, {}
    for domain in domains:
        rows, own = np.flatnonzero(questions.domains == domain), questions.domain_of == domain
        whole[domain] = _recalls(pictures, questions, embeddings, rows, questions.gallery)
        filtered[domain] = _recalls(pictures, questions, embeddings, rows, questions.gallery[own])
    return {
        "text_only_prompt": words,
        "query_removed": True,
        "normalize_size": pictures.normalize_size,
        "queries": {domain: int((questions.domains == domain).sum()) for domain in domains},
        "gallery": len(questions.gallery),
        "filtered_gallery": {domain: int((questions.domain_of == domain).sum()) for domain in domains},
        "results": {**whole, "mean": mean_rows(whole.values())},
        "filtered": {**filtered, "mean": mean_rows(filtered.values())},
    }


def _recalls(
    pictures: EmojiPictures,
    questions: Questions,
    embeddings: dict[str, torch.Tensor],
    rows: np.ndarray,
    gallery: np.ndarray,
) -> dict[str, dict[str, float]]:
    """Recalls of each method for some of the questions in a gallery, and of a random order."""
    galleries = {"pixels": pictures.pixels[gallery]}
    cosine = nn.functional.normalize(pictures.features[gallery], dim=-1)
    looks, ranks, right, searched = pictures.looks, {name: [] for name in embeddings}, [], []
    for part in torch.from_numpy(rows).split(CHUNK):
        queries, targets = questions.queries[part], questions.targets[part]
        itself = torch.from_numpy(gallery[None] == queries[:, None])
        positives = (looks[gallery][None] == looks[targets][:, None]) & ~itself
        right.append(positives.sum(dim=1))
        searched.append((~itself).sum(dim=1))
        for name, query in embeddings.items():
            similarity = (query[part] @ galleries.get(name, cosine).T).masked_fill(itself, LAST)
            ranks[name].append(retrieval_ranks(similarity, positives))
    return {
        **{name: recalls(torch.cat(parts), RECALLS) for name, parts in ranks.items()},
        "chance": _chance(torch.cat(right), int(torch.cat(searched)[0])),
    }


def _chance(right: torch.Tensor, searched: int, ks: Iterable[int] = RECALLS) -> dict[str, float]:
    return {f"r{k}": chance_recall_at_k(right, searched, k) for k in ks}
