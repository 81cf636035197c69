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
from .metrics import accuracies, retrieval_metrics
from .pixels import embed_pixels, nearest_of_each, nearest_pictures
from .retrieval import right_texts, shared_captions
from .zero_shot import class_means, classification_metrics

NEW_STYLE = "openmoji"
RESULTS = {  # what the cells that count ask
    "cell": "known emoji, the artist's version held out",
    "style": "known emoji, new artist (OpenMoji)",
    "concept": "new emoji, known artists",
    "both": "new emoji, new artist",
}
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
CLASSIFIED = ("cell", "style", "val", "val_style", "concept", "both")


def evaluate_emoji(
    model: nn.Module, processor: Any, normalize_size: bool = True, batch_size: int = 256, progress: bool = True
) -> dict[str, Any]:
    """Every split of the emoji data (`load_emoji`) through a dual encoder, beside chance and raw pixels.

    A caption is also right for a picture if the same artist draws a pixel-identical picture under it ("cook" and "man
    cook"). Ties count against the model.

    The pixel baseline scores a caption by the most similar training picture under it (`embed_pixels`). Captions of new
    concepts have no training picture, so ``pixels_r1`` and its like are None wherever one is in the gallery; there, the
    class of the nearest training picture is the baseline, in ``"subgroup"`` and ``"group"``.

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
        - ``"subgroup"`` and ``"group"``: for each split, classification into 96 and 9 classes. A class is the mean
          embedding of its training captions; in what starts with ``name_``, the embedding of its bare name ("food
          fruit"). Subgroup names may occur in training texts, which makes that supervised for known concepts;
        - ``"temperature"`` and ``"normalize_size"``.
    """
    pictures = _embed(model, processor, normalize_size, batch_size, progress)

    def cell(name: str, style: str | None = None) -> dict[str, Any]:
        split, gallery = CELLS[name]
        rows = np.flatnonzero((pictures.split == split) & ((pictures.style == style) | (style is None)))
        searched = {"train": pictures.training, "own": rows, "all": slice(None)}[gallery]
        return _retrieval(pictures, rows, distinct(pictures.caption[searched]), pixels=gallery == "train")

    cells = {name: cell(name) for name in CELLS}
    cells["fit"]["is_result"] = False
    seen_new = {style: ("style", "both") if style == NEW_STYLE else ("cell", "concept") for style in STYLES}
    return {
        **cells,
        "styles": {
            style: {"seen": cell(seen, style), "new": cell(new, style)} for style, (seen, new) in seen_new.items()
        },
        **{
            name: {split: classify_by_text(pictures, split, labels) for split in CLASSIFIED}
            for name, labels in (("subgroup", pictures.subgroup), ("group", pictures.group))
        },
        "temperature": math.exp(-model.logit_scale.item()),
        "normalize_size": normalize_size,
    }


@dataclass
class EmojiPictures:
    """All pictures, row by row, with what the model and the pixels say of them."""

    split: np.ndarray
    style: np.ndarray
    caption: np.ndarray
    subgroup: np.ndarray
    group: np.ndarray
    right: list[set[str]]  # captions that are right for the picture
    images: torch.Tensor
    pixels: torch.Tensor
    texts: dict[str, torch.Tensor]
    training: np.ndarray  # rows


def _embed(model: nn.Module, processor: Any, normalize_size: bool, batch_size: int, progress: bool) -> EmojiPictures:
    emoji = load_emoji("all", normalize_size=normalize_size)
    images = list(emoji["image"])
    labels = {name: np.array(emoji[name][:]) for name in ("split", "style", "caption", "subgroup", "group")}
    looks = [(artist, image.tobytes()) for artist, image in zip(labels["style"], images, strict=True)]
    classes = np.concatenate([labels["subgroup"], labels["group"]])
    texts = distinct(labels["caption"]) + [spoken_name(name) for name in distinct(classes)]
    return EmojiPictures(
        **labels,
        right=shared_captions([[text] for text in labels["caption"]], looks),
        images=embed_images(model, processor, images, batch_size, progress),
        pixels=embed_pixels(images),
        texts=dict(zip(texts, embed_texts(model, processor, texts, batch_size, progress), strict=True)),
        training=np.flatnonzero(labels["split"] == "train"),
    )


def distinct(texts: np.ndarray) -> list[str]:
    return list(dict.fromkeys(texts.tolist()))


def spoken_name(class_name: str) -> str:
    return class_name.replace("-", " ")


def _retrieval(pictures: EmojiPictures, rows: np.ndarray, captions: list[str], pixels: bool) -> dict[str, Any]:
    similarity = pictures.images[rows] @ torch.stack([pictures.texts[text] for text in captions]).T
    positives = right_texts([pictures.right[row] for row in rows], captions)
    asked = torch.from_numpy(np.isin(captions, pictures.caption[rows]))
    i2t = retrieval_metrics(similarity, positives, "i2t")
    t2i = retrieval_metrics(similarity.T[asked], positives.T[asked], "t2i")
    pixels_i2t, pixels_t2i = {}, {}
    if pixels:
        column = {text: index for index, text in enumerate(captions)}
        columns = torch.tensor([column[text] for text in pictures.caption[pictures.training]])
        nearest = nearest_of_each(pictures.pixels[rows], pictures.pixels[pictures.training], columns, len(captions))
        pixels_i2t = retrieval_metrics(nearest, positives, "i2t")
        pixels_t2i = retrieval_metrics(nearest.T[asked], positives.T[asked], "t2i")
    row = {"images": len(rows), "captions": len(captions), "mrr": i2t["i2t_mrr"]}
    for k in (1, 5, 10):
        row |= {
            f"i2t_r{k}": i2t[f"i2t_r{k}"],
            f"chance_r{k}": i2t[f"chance_i2t_r{k}"],
            f"pixels_r{k}": pixels_i2t.get(f"i2t_r{k}"),
            f"t2i_r{k}": t2i[f"t2i_r{k}"],
            f"chance_t2i_r{k}": t2i[f"chance_t2i_r{k}"],
            f"pixels_t2i_r{k}": pixels_t2i.get(f"t2i_r{k}"),
        }
    return row


def classify_by_text(pictures: EmojiPictures, split: str, class_of: np.ndarray) -> dict[str, float]:
    """Class of a picture by the mean embedding of training captions, by the class's name, by the nearest pixels."""
    rows, training = np.flatnonzero(pictures.split == split), pictures.training
    names, labels = np.unique(class_of, return_inverse=True)
    label_of = dict(zip(pictures.caption[training], labels[training].tolist(), strict=True))
    texts = torch.stack([pictures.texts[text] for text in label_of])
    prototypes = class_means(texts, torch.tensor(list(label_of.values())), len(names))
    spoken = torch.stack([pictures.texts[spoken_name(name)] for name in names.tolist()])

    images, expected = pictures.images[rows], torch.from_numpy(labels[rows])
    by_prototype = classification_metrics(images @ prototypes.T, expected)
    by_name = classification_metrics(images @ spoken.T, expected)
    nearest = training[nearest_pictures(pictures.pixels[rows], pictures.pixels[training])]
    by_pixels = accuracies(labels[nearest], labels[rows])
    return {
        "images": len(rows),
        "classes": len(names),
        "accuracy": by_prototype["top1"],
        "top5": by_prototype["top5"],
        "balanced_accuracy": by_prototype["balanced_accuracy"],
        "name_accuracy": by_name["top1"],
        "name_balanced_accuracy": by_name["balanced_accuracy"],
        "chance": by_prototype["chance_top1"],
        "majority": by_prototype["majority"],
        "pixels_accuracy": by_pixels["accuracy"],
        "pixels_balanced_accuracy": by_pixels["balanced_accuracy"],
    }
