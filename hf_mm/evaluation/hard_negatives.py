"""Names that are easily confused: can a model tell a woman from a man, or three o'clock from nine?"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..data.emoji import load_emoji
from ..data.emoji import normalize_size as fit_to_frame
from .embeddings import embed_images, embed_texts
from .metrics import retrieval_ranks
from .pixels import embed_pixels, nearest_of_each

PARTS = {  # name: splits of the pictures
    "train": ("train",),
    "unseen": ("cell", "val", "concept"),
    "style": ("style",),
    "both": ("val_style", "both"),
}
SUBGROUPS = {  # name: (subgroup, what its captions hold)
    "clock_faces": ("time", "o’clock|thirty"),
    "moon_phases": ("sky-weather", r"\bmoon\b"),
    "keycaps": ("keycap", ""),
    "zodiac": ("zodiac", ""),
    "hearts": ("heart", ""),
    "geometric": ("geometric", ""),
    "arrows": ("arrow", ""),
}
SETS = ("gender", *SUBGROUPS, "skin_tones")


def hard_negative_sets() -> dict[str, list[list[str]]]:
    """The captions that are hard to tell apart, read off the columns of the bundled emoji.

    Returns:
        For each name of `SETS` a list of galleries; the captions of one gallery are to be told apart.

        - ``"gender"``: 76 families of people with a man and a woman, most of them with a person ("cook", "man cook",
          "woman cook"). Larger families differ in more than gender and are left out.
        - ``"clock_faces"`` (24), ``"moon_phases"`` (13), ``"keycaps"`` (13), ``"zodiac"`` (13), ``"hearts"`` (25),
          ``"geometric"`` (34) and ``"arrows"`` (21): one gallery each.
        - ``"skin_tones"``: 330 people and hands, each without a tone and in light, medium and dark.
    """
    return _sets(load_emoji("all", skin_tones=True))


def _sets(emoji: Dataset) -> dict[str, list[list[str]]]:
    concepts = {row["hexcode"]: row for row in emoji.remove_columns("image").to_list()}
    families, tones, subgroups = defaultdict(list), defaultdict(list), defaultdict(list)
    for concept in concepts.values():
        tones[concept["base"]].append(concept["caption"])
        if concept["skin_tone"] == 0:
            subgroups[concept["subgroup"]].append(concept["caption"])
            if concept["group"] == "people-body":
                families[concept["family"]].append(concept)
    return {
        "gender": [
            [member["caption"] for member in family]
            for family in families.values()
            if len(family) <= 3 and {"male", "female"} <= {member["gender"] for member in family}
        ],
        **{
            name: [[caption for caption in subgroups[subgroup] if re.search(pattern, caption)]]
            for name, (subgroup, pattern) in SUBGROUPS.items()
        },
        "skin_tones": [captions for captions in tones.values() if len(captions) > 1],
    }


def evaluate_hard_negatives(
    model: nn.Module, processor: Any, normalize_size: bool = True, batch_size: int = 256, progress: bool = True
) -> dict[str, Any]:
    """Names each picture of `hard_negative_sets` among the captions of its own gallery.

    Ties count against the model. Pictures that one artist draws pixel for pixel alike under several captions of a
    gallery (OpenMoji's "cook" and "man cook") are not asked for. With `normalize_size`, sizes that a name tells ("large
    blue diamond") are gone from the picture.

    The pixel baseline scores a caption by the most similar training picture under it (`embed_pixels`). It is None where
    a picture is asked for whose caption has no training picture, and trivially 100 on ``"train"``.

    ``"skin_tones"`` gives the emoji and asks for its tone: none, light, medium or dark (the bundled data leave out two of
    the five). The part of a picture is that of its emoji. Training on ``load_emoji("train")``, as the
    recipes do, sees neither a toned picture nor its caption, so there ``"train"`` is memory of the drawing without a
    tone only. A model that ignores tones reaches chance.

    Args:
        model: `MMClipModel`, or alike.
        processor: its processor.
        normalize_size: drawings of one size, see `hf_mm.data.emoji.normalize_size`; False for the originals.
        batch_size, progress: see `embed_images`.

    Returns:
        Ready for JSON. For each name of `SETS`, the counts ``galleries`` and ``captions`` and a dict for each part:
        ``"train"`` (memory, not a result), ``"unseen"`` (the training artists, on known concepts left out for this
        artist and on new ones), ``"style"`` (known concepts by OpenMoji) and ``"both"`` (new concepts by OpenMoji); new
        ones are those of validation and test. It holds the count ``images`` and the percentages ``accuracy``,
        ``chance`` and ``pixels_accuracy``, which are None where there is nothing to ask. ``"normalize_size"`` is there
        too.
    """
    emoji = load_emoji("all", skin_tones=True)
    sets = _sets(emoji)
    texts = list(dict.fromkeys(text for galleries in sets.values() for gallery in galleries for text in gallery))
    emoji = emoji.select(np.flatnonzero(np.isin(emoji["caption"][:], texts)))
    pictures = _embed(model, processor, emoji, texts, normalize_size, batch_size, progress)

    results = {}
    for name, galleries in sets.items():
        named = [_name_pictures(pictures, gallery) for gallery in galleries]
        named = {key: np.concatenate([one[key] for one in named]) for key in named[0]}
        results[name] = {
            "galleries": len(galleries),
            "captions": sum(map(len, galleries)),
            **{part: _part(named, np.isin(named["split"], splits)) for part, splits in PARTS.items()},
        }
    return {**results, "normalize_size": normalize_size}


@dataclass
class _Pictures:
    """The pictures of all sets, row by row, with what the model and the pixels say of them."""

    split: np.ndarray
    caption: np.ndarray
    look: np.ndarray  # equal for identical pictures by one artist
    trained: np.ndarray
    images: torch.Tensor
    pixels: torch.Tensor
    texts: dict[str, torch.Tensor]


def _embed(
    model: nn.Module,
    processor: Any,
    emoji: Dataset,
    texts: list[str],
    normalize_size: bool,
    batch_size: int,
    progress: bool,
) -> _Pictures:
    images = [fit_to_frame(image) if normalize_size else image for image in emoji["image"]]
    split, style, caption, tone = (np.array(emoji[name][:]) for name in ("split", "style", "caption", "skin_tone"))
    return _Pictures(
        split=split,
        caption=caption,
        look=np.array([hash((artist, image.tobytes())) for artist, image in zip(style, images, strict=True)]),
        trained=(split == "train") & (tone == 0),
        images=embed_images(model, processor, images, batch_size, progress),
        pixels=embed_pixels(images),
        texts=dict(zip(texts, embed_texts(model, processor, texts, batch_size, progress), strict=True)),
    )


def _name_pictures(pictures: _Pictures, gallery: list[str]) -> dict[str, np.ndarray]:
    """The split of each picture asked for, whether model and pixels name it right (nan: they cannot), and chance."""
    rows_of = [np.flatnonzero(pictures.caption == caption) for caption in gallery]
    rows, right = np.concatenate(rows_of), np.repeat(np.arange(len(gallery)), [len(own) for own in rows_of])
    _, look, alike = np.unique(pictures.look[rows], return_inverse=True, return_counts=True)
    rows, right = rows[alike[look] == 1], torch.from_numpy(right[alike[look] == 1])
    is_right = nn.functional.one_hot(right, len(gallery)).bool()

    similarity = pictures.images[rows] @ torch.stack([pictures.texts[text] for text in gallery]).T
    training = [own[pictures.trained[own]] for own in rows_of]
    columns = torch.from_numpy(np.repeat(np.arange(len(gallery)), [len(own) for own in training]))
    nearest = nearest_of_each(pictures.pixels[rows], pictures.pixels[np.concatenate(training)], columns, len(gallery))
    can_answer = np.array([len(own) > 0 for own in training])[right]
    return {
        "split": pictures.split[rows],
        "hit": (retrieval_ranks(similarity, is_right) == 1).numpy(),
        "chance": np.full(len(rows), 1 / len(gallery)),
        "pixels": np.where(can_answer, (retrieval_ranks(nearest, is_right) == 1).numpy(), np.nan),
    }


def _part(named: dict[str, np.ndarray], asked: np.ndarray) -> dict[str, float | int | None]:
    def percent(values: np.ndarray) -> float | None:
        mean = 100 * float(values[asked].mean()) if asked.any() else np.nan
        return None if np.isnan(mean) else mean

    return {
        "images": int(asked.sum()),
        "accuracy": percent(named["hit"]),
        "chance": percent(named["chance"]),
        "pixels_accuracy": percent(named["pixels"]),
    }
