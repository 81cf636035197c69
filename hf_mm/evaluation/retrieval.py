"""Finding the captions of a picture and the pictures of a caption."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .embeddings import embed_images, embed_texts
from .metrics import retrieval_metrics


def evaluate_retrieval(
    model: nn.Module,
    processor: Any,
    images: Sequence[Any],
    captions: Sequence[Sequence[str]],
    gallery: Sequence[str] | None = None,
    ids: Sequence[Hashable] | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, float]:
    """Retrieval in both directions on pictures with one or more captions each.

    A caption that several pictures have is one entry of the gallery and right for all of them.

    Args:
        model, processor, batch_size, progress: see `embed_images`.
        images: n pictures.
        captions: n lists of captions.
        gallery: texts to search among, at least all captions; by default these alone.
        ids: n ids of what the pictures show; pictures of one id share their captions. By default each is its own.

    Returns:
        Percentages ``i2t_r1``, ``i2t_r5``, ``i2t_r10``, ``i2t_mrr`` (picture to text), the same with ``t2i`` (caption
        to picture), each after ``chance_`` what a random order scores, and the counts ``images`` and ``captions``
        (the gallery). Ties count against the model, see `retrieval_ranks`.

    Raises:
        ValueError: lengths differ, a picture has no caption, or the gallery lacks a caption.
        TypeError: a picture's captions are one string.
    """
    _check(images, captions, gallery, ids)
    texts = list(dict.fromkeys(gallery if gallery is not None else (text for own in captions for text in own)))
    positives = right_texts(captions if ids is None else shared_captions(captions, ids), texts)
    image_embeds = embed_images(model, processor, images, batch_size, progress)
    text_embeds = embed_texts(model, processor, texts, batch_size, progress)
    similarity, asked = image_embeds @ text_embeds.T, positives.any(dim=0)
    return {
        "images": len(images),
        "captions": len(texts),
        **retrieval_metrics(similarity, positives, "i2t"),
        **retrieval_metrics(similarity.T[asked], positives.T[asked], "t2i"),
    }


def right_texts(right: Iterable[Iterable[str]], texts: Sequence[str]) -> torch.Tensor:
    """``(n, g)`` bool: text g is among the right ones of picture n; what is not in the gallery does not count."""
    column = {text: index for index, text in enumerate(texts)}
    rows = [[column[text] for text in own if text in column] for own in right]
    positives = torch.zeros(len(rows), len(texts), dtype=torch.bool)
    for row, columns in enumerate(rows):
        positives[row, columns] = True
    return positives


def shared_captions(captions: Sequence[Iterable[str]], ids: Sequence[Hashable]) -> list[set[str]]:
    """For each picture, the captions of all pictures with its id."""
    captions_of = defaultdict(set)
    for identity, own in zip(ids, captions, strict=True):
        captions_of[identity].update(own)
    return [captions_of[identity] for identity in ids]


def _check(images, captions, gallery, ids) -> None:
    if len(images) != len(captions):
        raise ValueError(f"there are {len(images)} images and {len(captions)} lists of captions: give one list each.")
    if ids is not None and len(ids) != len(images):
        raise ValueError(f"there are {len(images)} images and {len(ids)} ids: give one id each.")
    for index, own in enumerate(captions):
        if isinstance(own, str):
            raise TypeError(f"the captions of image {index} are one string: pass a list of strings.")
        if len(own) == 0:
            raise ValueError(f"image {index} has no caption: leave it out or give it one.")
    if gallery is not None and (lacking := {text for own in captions for text in own} - set(gallery)):
        raise ValueError(
            f"the gallery lacks {len(lacking)} captions of the images, such as {min(lacking)!r}: add them."
        )
