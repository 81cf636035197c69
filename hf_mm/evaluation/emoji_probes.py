"""Probes on the emoji data: what frozen picture features are worth, beside raw pixels and zero-shot classification."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.emoji import load_emoji
from .embeddings import embed_texts, inference
from .pixels import SIDE, embed_pixels
from .probes import choose_strength, few_shot_curve, fit_few_shot, fit_probe, shots_to_match, tower_features
from .style_shift import EmojiPictures, classify_by_text, distinct, spoken_name

TESTED = ("cell", "style", "concept", "both")
SHOTS = (1, 2, 4, 8)
DRAWS = 3
MAX_ITER = 100


def evaluate_emoji_probes(
    model: nn.Module,
    processor: Any,
    normalize_size: bool = True,
    batch_size: int = 256,
    progress: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Linear and few-shot probes on the frozen picture tower, beside the same on pixels and beside zero-shot.

    Features are the picture tower's output before the joint projection (`tower_features`); the baseline are pictures as
    8x8 RGB pixels. The strength of the penalty is chosen on ``"val"``, whose concepts no test picture shows. The linear
    probe then sees all training and validation pictures, see `linear_probe`; a few-shot probe k concepts per class, in
    all their training pictures, see `few_shot_probe`.

    A fit stops after 100 steps, not 1000 as published, so that all takes a minute or two on one core. Where the
    strength is weak that acts as a penalty of its own; the strength is chosen under the same limit.

    Args:
        model: `MMClipModel`, or alike: with `vision_model` and `visual_projection`.
        processor: its processor.
        normalize_size: drawings of one size, see `hf_mm.data.emoji.normalize_size`; False for the originals.
        batch_size, progress: see `embed_images`.
        seed: of the few-shot draws.

    Returns:
        Ready for JSON: ``"normalize_size"``, ``"seed"``, and for ``"subgroup"`` (96 classes) and ``"group"`` (9):

        - for each of ``"cell"``, ``"style"``, ``"concept"`` and ``"both"``: the counts ``images`` and ``classes``;
          percentages ``accuracy``, ``top5``, ``balanced_accuracy`` of the linear probe, the same after ``pixels_``,
          ``chance`` and ``majority``; ``zero_shot`` and ``zero_shot_name``, accuracies of the model by the mean text of
          a class and by its bare name, see `evaluate_emoji`; ``few_shot`` and ``pixels_few_shot``, see
          `few_shot_curve`; and ``shots_to_match`` and ``shots_to_match_name``, how many concepts per class a probe
          needs for the zero-shot accuracies, None if more than 8;
        - ``"fits"``: for ``"features"`` and ``"pixels"`` the ``strength``, whether the linear probe ``converged``, the
          counts of `choose_strength`, and the strength and counts of the few-shot probes after ``few_shot_``.
    """
    emoji = load_emoji("all", normalize_size=normalize_size)
    images = list(emoji["image"])
    columns = {name: np.array(emoji[name][:]) for name in ("split", "style", "caption", "subgroup", "group")}
    features = tower_features(model, processor, images, batch_size, progress)
    classes = np.concatenate([columns["subgroup"], columns["group"]])
    texts = distinct(columns["caption"]) + [spoken_name(name) for name in distinct(classes)]
    pixels = embed_pixels(images)
    pictures = EmojiPictures(
        **columns,
        right=[],
        images=_project(model, features),
        pixels=pixels,
        texts=dict(zip(texts, embed_texts(model, processor, texts, batch_size, progress), strict=True)),
        training=np.flatnonzero(columns["split"] == "train"),
    )
    return {
        **{
            name: _probe(pictures, features.numpy(), _halve(pixels).numpy(), labels, seed)
            for name, labels in (("subgroup", pictures.subgroup), ("group", pictures.group))
        },
        "normalize_size": normalize_size,
        "seed": seed,
    }


def _project(model: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """What `embed_images` gives, from the tower's output."""
    with inference(model):
        projected = model.visual_projection(features.to(model.device, model.dtype))
    return nn.functional.normalize(projected.float(), dim=-1).cpu()


def _halve(pixels: torch.Tensor) -> torch.Tensor:
    """``(n, 192)``: pictures of `embed_pixels` as 8x8 RGB pixels, of mean square 1 over a picture (a flat one: zero)."""
    half = SIDE // 2
    blocks = pixels.view(-1, half, 2, half, 2, 3).mean(dim=(2, 4)).flatten(1)
    return nn.functional.normalize(blocks, dim=-1) * blocks.shape[1] ** 0.5


def _probe(
    pictures: EmojiPictures, features: np.ndarray, pixels: np.ndarray, labels: np.ndarray, seed: int
) -> dict[str, Any]:
    rows = {split: np.flatnonzero(pictures.split == split) for split in ("train", "val", *TESTED)}
    results = {split: _zero_shot(pictures, split, labels) for split in TESTED}
    fits = {}
    for name, inputs, prefix in (("features", features, ""), ("pixels", pixels, "pixels_")):
        train, val = ((inputs[rows[split]], labels[rows[split]]) for split in ("train", "val"))
        strength, search = choose_strength(*train, *val, MAX_ITER)
        probe = fit_probe(*map(np.concatenate, zip(train, val, strict=True)), strength, MAX_ITER)
        few, few_search = fit_few_shot(
            *train, SHOTS, DRAWS, seed, pictures.caption[rows["train"]], *val, max_iter=MAX_ITER
        )
        fits[name] = {
            "strength": strength,
            "converged": probe.converged,
            **search,
            **{f"few_shot_{key}": value for key, value in few_search.items()},
        }
        for split in TESTED:
            test = inputs[rows[split]], labels[rows[split]]
            metrics = probe.evaluate(*test)
            results[split] |= {
                **{f"{prefix}{key}": metrics[key] for key in ("accuracy", "top5", "balanced_accuracy")},
                f"{prefix}few_shot": few_shot_curve(few, *test),
            }
    for row in results.values():
        curve = {point["shots"]: point["accuracy"] for point in row["few_shot"]}
        row["shots_to_match"] = shots_to_match(curve, row["zero_shot"])
        row["shots_to_match_name"] = shots_to_match(curve, row["zero_shot_name"])
    return {**results, "fits": fits}


def _zero_shot(pictures: EmojiPictures, split: str, labels: np.ndarray) -> dict[str, Any]:
    metrics = classify_by_text(pictures, split, labels)
    return {
        **{key: metrics[key] for key in ("images", "classes", "chance", "majority")},
        "zero_shot": metrics["accuracy"],
        "zero_shot_name": metrics["name_accuracy"],
    }
