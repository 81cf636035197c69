"""Retrieval in two steps: cosines rank everything, and the matching head re-ranks the best (BLIP-2, section 4.4)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .embeddings import embed_images, embed_texts, inference
from .metrics import BROKEN, retrieval_metrics
from .retrieval import right_texts, shared_captions

ABSENT = -100.0  # the score of what is not re-ranked
MATCH = 1  # the class of the matching head that says "they belong together"

# Rows of pictures (p,) and of texts (p,) to the matching head's logits (p, 2).
MatchLogits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def evaluate_image_text_matching(
    model: nn.Module,
    processor: Any,
    images: Sequence[Any] | None,
    captions: Sequence[Sequence[str]],
    k: int = 128,
    ids: Sequence[Hashable] | None = None,
    batch_size: int = 256,
    vision_features: torch.Tensor | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Retrieval in both directions, by cosine and re-ranked by the matching head.

    Args:
        model: such as `MMBlip2ForImageTextRetrieval`. It has `get_image_features`, whose pooled output is
            ``(B, queries, D)`` or ``(B, D)``, `get_text_features` with ``(B, D)``, and `get_matching_logits`; its
            device, dtype and mode are kept.
        processor: turns ``images=`` and ``text=`` into the inputs of these; texts with ``mode="matching"``.
        images: n pictures; None with `vision_features`.
        captions: n lists of captions; one that several pictures have is one entry of the gallery.
        k: candidates of a query that are re-ranked.
        ids: n ids of what the pictures show; pictures of one id share their captions.
        batch_size: pictures, texts or pairs per forward pass.
        vision_features: in place of pictures, ``(n, ...)``, what the vision tower gives for each.
        progress: show bars.

    Returns:
        Percentages as of `evaluate_retrieval` after re-ranking, those of the cosines alone after ``itc_``, and the
        counts ``images`` and ``captions``.

    Raises:
        ValueError: lengths differ, pictures and features are both given or neither, a picture has no caption, or k or
            the batch size is not positive.
        TypeError: a picture's captions are one string.
    """
    if (images is None) == (vision_features is None):
        raise ValueError("pass either images or vision_features.")
    _check(images if vision_features is None else vision_features, captions, ids)
    texts = list(dict.fromkeys(text for own in captions for text in own))
    positives = right_texts(captions if ids is None else shared_captions(captions, ids), texts)
    if vision_features is None:
        image_embeds = embed_images(model, processor, images, batch_size, progress)
    else:
        image_embeds = embed_features(model, vision_features, batch_size)
    text_embeds = embed_texts(model, partial(processor, mode="matching"), texts, batch_size, progress)
    cosines = best_query_cosines(image_embeds, text_embeds)

    match_logits = matching_head(model, processor, images, texts, vision_features)
    to_texts, to_images = rerank(cosines, match_logits, k, batch_size, progress)
    by_cosine = retrieval_metrics(cosines, positives, "i2t") | retrieval_metrics(cosines.T, positives.T, "t2i")
    return {
        "images": len(captions),
        "captions": len(texts),
        **retrieval_metrics(to_texts, positives, "i2t"),
        **retrieval_metrics(to_images, positives.T, "t2i"),
        **{f"itc_{name}": value for name, value in by_cosine.items() if not name.startswith("chance_")},
    }


def embed_features(model: nn.Module, vision_features: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """`embed_images` from what the vision tower gives for each picture, ``(n, ...)``."""
    with inference(model):
        parts = [
            model.get_image_features(vision_features=part.to(model.device, model.dtype)).pooler_output.float().cpu()
            for part in vision_features.split(batch_size)
        ]
    return nn.functional.normalize(torch.cat(parts), dim=-1)


def matching_head(
    model: nn.Module,
    processor: Any,
    images: Sequence[Any] | None,
    texts: Sequence[str],
    vision_features: torch.Tensor | None = None,
) -> MatchLogits:
    """What `rerank` asks: the matching head of a model on rows of pictures and texts.

    Each call prepares every picture and every text of it once.

    Args:
        model: has ``get_matching_logits(input_ids, attention_mask, pixel_values or vision_features, pairs)``.
        processor, images, vision_features: see `evaluate_image_text_matching`.
        texts: the gallery.
    """

    def match(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        pictures, picture_of = rows.unique(return_inverse=True)
        words, words_of = columns.unique(return_inverse=True)
        asked = [texts[column] for column in words.tolist()]
        inputs = dict(processor(text=asked, mode="matching", padding=True, truncation=True, return_tensors="pt"))
        if vision_features is None:
            pixels = processor(images=[images[row] for row in pictures.tolist()], return_tensors="pt")
            inputs["pixel_values"] = pixels["pixel_values"].to(model.dtype)
        else:
            inputs["vision_features"] = vision_features[pictures].to(model.dtype)
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        with inference(model):
            pairs = torch.stack([picture_of, words_of], dim=1).to(model.device)
            return model.get_matching_logits(**inputs, pairs=pairs)

    return match


def best_query_cosines(image_embeds: torch.Tensor, text_embeds: torch.Tensor, chunk: int = 256) -> torch.Tensor:
    """The cosine of each picture and text: of the picture's queries, the one that is nearest to the text.

    Args:
        image_embeds: ``(I, queries, D)``, or ``(I, D)`` with one to a picture.
        text_embeds: ``(T, D)``. Neither need be of unit length.
        chunk: pictures at a time: memory is chunk x queries x T.

    Returns:
        ``(I, T)``.
    """
    queries = image_embeds if image_embeds.ndim == 3 else image_embeds[:, None]
    texts = nn.functional.normalize(text_embeds, dim=-1).T
    rows = [(nn.functional.normalize(part, dim=-1) @ texts).amax(dim=1) for part in queries.split(chunk)]
    return torch.cat(rows)


def rerank(
    cosines: torch.Tensor, match_logits: MatchLogits, k: int = 128, batch_size: int = 256, progress: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores the k nearest of every query, both ways, by the matching head.

    The score of a pair is the logit of "match", with no softmax, plus its cosine; a pair outside the k nearest has
    -100. A pair that is near both ways is asked for once.

    Args:
        cosines: ``(I, T)``.
        match_logits: from rows of pictures ``(p,)``, ascending, and of texts ``(p,)`` to logits ``(p, 2)``, such as
            `matching_head`.
        k: candidates of each query; all, where there are fewer.
        batch_size: pairs at a time.
        progress: show a bar.

    Returns:
        Scores of texts for each picture ``(I, T)`` and of pictures for each text ``(T, I)``, float32 on the CPU.

    Raises:
        ValueError: k or the batch size is not positive, `cosines` is no matrix or not finite, or the logits are not
            ``(p, 2)``.

    Source:
        Li et al. 2023, section 4.4.
    """
    if k < 1:
        raise ValueError(f"k is {k}: re-rank at least 1 candidate.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1.")
    if cosines.ndim != 2:
        raise ValueError(f"cosines {tuple(cosines.shape)} must be (pictures, texts).")
    if not cosines.isfinite().all():
        raise ValueError(BROKEN)
    cosines = cosines.float().cpu()
    near_texts, near_images = nearest(cosines, k), nearest(cosines.T, k).T
    pairs = (near_texts | near_images).nonzero()
    scores = torch.full_like(cosines, ABSENT)
    with tqdm(total=len(pairs), unit=" pairs", disable=not progress) as bar:
        for part in pairs.split(batch_size):
            rows, columns = part.unbind(dim=1)
            logits = match_logits(rows, columns)
            if logits.shape != (len(part), 2):
                raise ValueError(
                    f"match_logits gave {tuple(logits.shape)} for {len(part)} pairs: it must be (pairs, 2)."
                )
            scores[rows, columns] = logits[:, MATCH].float().cpu() + cosines[rows, columns]
            bar.update(len(part))
    return scores.where(near_texts, ABSENT), scores.where(near_images, ABSENT).T


def nearest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """``(q, g)`` bool: the k best answers of each query, all where there are fewer."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def _check(images, captions, ids) -> None:
    if len(images) != len(captions):
        raise ValueError(f"there are {len(images)} images and {len(captions)} lists of captions: give one list each.")
    if ids is not None and len(ids) != len(images):
        raise ValueError(f"there are {len(images)} images and {len(ids)} ids: give one id each.")
    for index, own in enumerate(captions):
        if isinstance(own, str):
            raise TypeError(f"the captions of image {index} are one string: pass a list of strings.")
        if len(own) == 0:
            raise ValueError(f"image {index} has no caption: leave it out or give it one.")
