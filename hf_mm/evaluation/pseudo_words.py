"""Does a picture's word still mean the picture?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn

from .embeddings import embed_composed, embed_images
from .metrics import retrieval_metrics


def evaluate_pseudo_words(
    model: nn.Module,
    processor: Any,
    images: Sequence[Any],
    prompt: str | Sequence[str],
    ids: Sequence[Hashable] | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, float]:
    """Finds each picture among all by the prompt in which it is a word: what Pic2Word's objective asks, on other pictures.

    Args:
        model, processor, batch_size, progress: see `embed_composed`.
        images: n pictures.
        prompt: a sentence with one placeholder, or one for each picture.
        ids: n ids of what the pictures show; each picture of an id is right for the others. By default each is its own.

    Returns:
        Percentages ``word_r1``, ``word_r5``, ``word_r10``, ``word_mrr``, each after ``chance_`` what a random order
        scores, and the count ``images``. Ties count against the model, see `retrieval_ranks`.
    """
    features = embed_images(model, processor, images, batch_size, progress, normalize=False)
    texts = [prompt] * len(images) if isinstance(prompt, str) else list(prompt)
    words = embed_composed(model, processor, None, texts, batch_size, progress, vision_features=features)
    numbers = {identity: number for number, identity in enumerate(dict.fromkeys(ids or ()))}
    labels = torch.tensor([numbers[identity] for identity in ids]) if ids is not None else torch.arange(len(images))
    similarity = words @ nn.functional.normalize(features, dim=-1).T
    return {
        "images": len(images),
        **retrieval_metrics(similarity, labels[:, None] == labels[None, :], "word"),
    }
