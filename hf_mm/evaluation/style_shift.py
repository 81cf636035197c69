"""The emoji benchmark: known and new concepts, in known artists' styles and in a new one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.emoji import STYLES, load_emoji
from .embeddings import embed_images, embed_texts
from .metrics import accuracy, balanced_accuracy, retrieval_metrics
from .pixels import embed_pixels, nearest_pictures
from .retrieval import right_texts, shared_captions
from .zero_shot import class_means, classification_metrics

NEW_STYLE = "openmoji"
CELLS = {  # name: (split of the pictures, gallery of captions)
    "cell": ("cell", "train"),
    "style": ("style", "train"),
    "val": ("val", "own"),
    "val_style": ("val_style", "own"),
    "concept": ("concept", "own"),
    "both": ("both", "own"),
    "concept_all": ("concept", "all"),
    "fit": ("train", "train"),
}


def evaluate_emoji(
    model: nn.Module, processor: Any, normalize_size: bool = True, batch_size: int = 256, progress: bool = True
) -> dict[str, Any]:
    """Every split of the emoji data (`load_emoji`) through a dual encoder, beside chance and raw pixels.

    A caption is also right for a picture if the same artist draws a pixel-identical picture under it ("cook" and "man
    cook"). Ties count against the model.

    The pixel baseline scores a caption by the most similar training picture under it (`embed_pixels`). Captions of new
    concepts have no training picture, so ``pixels_r1`` and ``pixels_r10`` are None wherever one is in the gallery;
    there, the subgroup of the nearest training picture is the baseline, in ``"subgroup"``.

    Args:
        model: `MMClipModel`, or alike.
        processor: its processor.
        normalize_size: drawings of one size, see `hf_mm.data.emoji.normalize_size`; False for the originals.
        batch_size, progress: see `embed_images`.

    Returns:
        Ready for JSON. Percentages, and the counts ``images`` and ``captions`` (the gallery):

        - a dict of retrieval metrics for each of ``"cell"``, ``"style"`` (gallery: captions of training concepts),
          ``"val"``, ``"val_style"``, ``"concept"``, ``"both"`` (captions of their own), ``"concept_all"`` (``"concept"``
          among all captions) and ``"fit"`` (training pictures: memory, not a result; ``is_result`` is False);
        - ``"styles"``: the same for each artist, as ``{"seen": ..., "new": ...}`` concepts;
        - ``"subgroup"``: for each split, 96 classes, a class being the mean embedding of its training captions;
        - ``"temperature"`` and ``"normalize_size"``.
    """
    pictures = _embed(model, processor, normalize_size, batch_size, progress)
    train_captions = list(dict.fromkeys(pictures.caption[pictures.split == "train"]))
    all_captions = list(dict.fromkeys(pictures.caption))

    def cell(name: str, style: str | None = None) -> dict[str, Any]:
        split, gallery = CELLS[name]
        rows = np.flatnonzero((pictures.split == split) & ((pictures.style == style) | (style is None)))
        own = list(dict.fromkeys(pictures.caption[rows]))
        captions = {"train": train_captions, "all": all_captions, "own": own}[gallery]
        return _retrieval(pictures, rows, captions)

    seen_new = {style: ("style", "both") if style == NEW_STYLE else ("cell", "concept") for style in STYLES}
    return {
        **{name: cell(name) for name in CELLS},
        "fit": {**cell("fit"), "is_result": False},
        "styles": {
            style: {"seen": cell(seen, style), "new": cell(new, style)} for style, (seen, new) in seen_new.items()
        },
        "subgroup": _subgroups(pictures, train_captions),
        "temperature": math.exp(-model.logit_scale.item()),
        "normalize_size": normalize_size,
    }


@dataclass
class _Pictures:
    """All pictures, row by row, with what the model and the pixels say of them."""

    split: np.ndarray
    style: np.ndarray
    caption: np.ndarray
    subgroup: np.ndarray
    right: list[set[str]]  # captions that are right for the picture
    images: torch.Tensor
    pixels: torch.Tensor
    texts: dict[str, torch.Tensor]


def _embed(model: nn.Module, processor: Any, normalize_size: bool, batch_size: int, progress: bool) -> _Pictures:
    emoji = load_emoji("all", normalize_size=normalize_size)
    images = list(emoji["image"])
    split, style, caption, subgroup = (np.array(emoji[name][:]) for name in ("split", "style", "caption", "subgroup"))
    captions = sorted(set(caption))
    looks = [(artist, image.tobytes()) for artist, image in zip(style, images, strict=True)]
    return _Pictures(
        split=split,
        style=style,
        caption=caption,
        subgroup=subgroup,
        right=shared_captions([[text] for text in caption], looks),
        images=embed_images(model, processor, images, batch_size, progress),
        pixels=embed_pixels(images),
        texts=dict(zip(captions, embed_texts(model, processor, captions, batch_size, progress), strict=True)),
    )


def _retrieval(pictures: _Pictures, rows: np.ndarray, captions: list[str]) -> dict[str, Any]:
    texts = torch.stack([pictures.texts[text] for text in captions])
    similarity = pictures.images[rows] @ texts.T
    positives = right_texts([pictures.right[row] for row in rows], captions)
    own = set(pictures.caption[rows])
    asked = torch.tensor([text in own for text in captions])
    i2t = retrieval_metrics(similarity, positives, "i2t")
    t2i = retrieval_metrics(similarity.T[asked], positives.T[asked], "t2i")
    pixels = _pixel_retrieval(pictures, rows, captions, positives)
    return {
        "images": len(rows),
        "captions": len(captions),
        **{key: i2t[key] for key in ("i2t_r1", "i2t_r5", "i2t_r10")},
        "mrr": i2t["i2t_mrr"],
        "t2i_r1": t2i["t2i_r1"],
        "t2i_r10": t2i["t2i_r10"],
        "chance_r1": i2t["chance_i2t_r1"],
        "chance_r10": i2t["chance_i2t_r10"],
        "chance_t2i_r1": t2i["chance_t2i_r1"],
        "chance_t2i_r10": t2i["chance_t2i_r10"],
        "pixels_r1": pixels and pixels["i2t_r1"],
        "pixels_r10": pixels and pixels["i2t_r10"],
    }


def _pixel_retrieval(
    pictures: _Pictures, rows: np.ndarray, captions: list[str], positives: torch.Tensor
) -> dict[str, float] | None:
    """The pixel baseline, where every caption has a training picture."""
    training = np.flatnonzero(pictures.split == "train")
    column = {text: index for index, text in enumerate(captions)}
    columns = [column.get(text, -1) for text in pictures.caption[training]]
    if set(columns) - {-1} != set(range(len(captions))):
        return None
    training, columns = training[np.array(columns) >= 0], torch.tensor([index for index in columns if index >= 0])
    cosines = pictures.pixels[rows] @ pictures.pixels[training].T
    best = torch.full((len(rows), len(captions)), -1.0)
    best.scatter_reduce_(1, columns.expand(len(rows), -1), cosines, "amax")
    return retrieval_metrics(best, positives, "i2t")


def _subgroups(pictures: _Pictures, train_captions: list[str]) -> dict[str, dict[str, float]]:
    """Subgroup of a picture by the nearest class of training captions, and by the nearest training picture."""
    names, labels = np.unique(pictures.subgroup, return_inverse=True)
    of_caption = dict(zip(pictures.caption, labels.tolist(), strict=True))
    prototypes = class_means(
        torch.stack([pictures.texts[text] for text in train_captions]),
        torch.tensor([of_caption[text] for text in train_captions]),
        len(names),
    )
    training = np.flatnonzero(pictures.split == "train")
    table = {}
    for split in ("cell", "style", "val", "val_style", "concept", "both"):
        rows = np.flatnonzero(pictures.split == split)
        metrics = classification_metrics(pictures.images[rows] @ prototypes.T, torch.from_numpy(labels[rows]))
        nearest = training[nearest_pictures(pictures.pixels[rows], pictures.pixels[training])]
        hits = labels[nearest] == labels[rows]
        table[split] = {
            "images": len(rows),
            "accuracy": metrics["top1"],
            "top5": metrics["top5"],
            "balanced_accuracy": metrics["balanced_accuracy"],
            "chance": metrics["chance_top1"],
            "majority": metrics["majority"],
            "pixels_accuracy": 100 * accuracy(hits),
            "pixels_balanced_accuracy": 100 * balanced_accuracy(hits, labels[rows]),
        }
    return table
