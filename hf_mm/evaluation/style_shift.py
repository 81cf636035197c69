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
SUBGROUP_CELLS = ("cell", "style", "val", "val_style", "concept", "both")


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

    def cell(name: str, style: str | None = None) -> dict[str, Any]:
        split, gallery = CELLS[name]
        rows = np.flatnonzero((pictures.split == split) & ((pictures.style == style) | (style is None)))
        searched = {"train": pictures.training, "own": rows, "all": slice(None)}[gallery]
        return _retrieval(pictures, rows, _distinct(pictures.caption[searched]), pixels=gallery == "train")

    cells = {name: cell(name) for name in CELLS}
    cells["fit"]["is_result"] = False
    seen_new = {style: ("style", "both") if style == NEW_STYLE else ("cell", "concept") for style in STYLES}
    return {
        **cells,
        "styles": {
            style: {"seen": cell(seen, style), "new": cell(new, style)} for style, (seen, new) in seen_new.items()
        },
        "subgroup": {name: _subgroups(pictures, name) for name in SUBGROUP_CELLS},
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
    training: np.ndarray  # rows


def _embed(model: nn.Module, processor: Any, normalize_size: bool, batch_size: int, progress: bool) -> _Pictures:
    emoji = load_emoji("all", normalize_size=normalize_size)
    images = list(emoji["image"])
    split, style, caption, subgroup = (np.array(emoji[name][:]) for name in ("split", "style", "caption", "subgroup"))
    looks = [(artist, image.tobytes()) for artist, image in zip(style, images, strict=True)]
    texts = _distinct(caption)
    return _Pictures(
        split=split,
        style=style,
        caption=caption,
        subgroup=subgroup,
        right=shared_captions([[text] for text in caption], looks),
        images=embed_images(model, processor, images, batch_size, progress),
        pixels=embed_pixels(images),
        texts=dict(zip(texts, embed_texts(model, processor, texts, batch_size, progress), strict=True)),
        training=np.flatnonzero(split == "train"),
    )


def _distinct(texts: np.ndarray) -> list[str]:
    return list(dict.fromkeys(texts.tolist()))


def _retrieval(pictures: _Pictures, rows: np.ndarray, captions: list[str], pixels: bool) -> dict[str, Any]:
    similarity = pictures.images[rows] @ torch.stack([pictures.texts[text] for text in captions]).T
    positives = right_texts([pictures.right[row] for row in rows], captions)
    asked = torch.from_numpy(np.isin(captions, pictures.caption[rows]))
    i2t = retrieval_metrics(similarity, positives, "i2t")
    t2i = retrieval_metrics(similarity.T[asked], positives.T[asked], "t2i")
    by_pixels = retrieval_metrics(_pixel_scores(pictures, rows, captions), positives, "i2t") if pixels else {}
    return {
        "images": len(rows),
        "captions": len(captions),
        "i2t_r1": i2t["i2t_r1"],
        "i2t_r5": i2t["i2t_r5"],
        "i2t_r10": i2t["i2t_r10"],
        "mrr": i2t["i2t_mrr"],
        "t2i_r1": t2i["t2i_r1"],
        "t2i_r10": t2i["t2i_r10"],
        "chance_r1": i2t["chance_i2t_r1"],
        "chance_r10": i2t["chance_i2t_r10"],
        "chance_t2i_r1": t2i["chance_t2i_r1"],
        "chance_t2i_r10": t2i["chance_t2i_r10"],
        "pixels_r1": by_pixels.get("i2t_r1"),
        "pixels_r10": by_pixels.get("i2t_r10"),
    }


def _pixel_scores(pictures: _Pictures, rows: np.ndarray, captions: list[str]) -> torch.Tensor:
    """``(q, g)``: the highest cosine of pixels between each picture and the training pictures of each caption."""
    column = {text: index for index, text in enumerate(captions)}
    columns = torch.tensor([column[text] for text in pictures.caption[pictures.training]])
    cosines = pictures.pixels[rows] @ pictures.pixels[pictures.training].T
    lowest = torch.full((len(rows), len(captions)), -1.0)
    return lowest.scatter_reduce(1, columns.expand(len(rows), -1), cosines, "amax")


def _subgroups(pictures: _Pictures, split: str) -> dict[str, float]:
    """Subgroup of a picture: by the mean embedding of training captions, and by the nearest training picture."""
    rows, training = np.flatnonzero(pictures.split == split), pictures.training
    names, labels = np.unique(pictures.subgroup, return_inverse=True)
    label_of = dict(zip(pictures.caption[training], labels[training].tolist(), strict=True))
    texts = torch.stack([pictures.texts[text] for text in label_of])
    prototypes = class_means(texts, torch.tensor(list(label_of.values())), len(names))

    metrics = classification_metrics(pictures.images[rows] @ prototypes.T, torch.from_numpy(labels[rows]))
    nearest = training[nearest_pictures(pictures.pixels[rows], pictures.pixels[training])]
    hits = labels[nearest] == labels[rows]
    return {
        "images": len(rows),
        "classes": len(names),
        "accuracy": metrics["top1"],
        "top5": metrics["top5"],
        "balanced_accuracy": metrics["balanced_accuracy"],
        "chance": metrics["chance_top1"],
        "majority": metrics["majority"],
        "pixels_accuracy": 100 * accuracy(hits),
        "pixels_balanced_accuracy": 100 * balanced_accuracy(hits, labels[rows]),
    }
