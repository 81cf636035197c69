"""Effective robustness on the emoji: does a new artist cost a zero-shot model less than classifiers of pixels?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.emoji import load_emoji
from .embeddings import embed_images
from .metrics import retrieval_ranks
from .pixels import SIDE, embed_pixels
from .robustness import clip_accuracy, effective_robustness
from .zero_shot import build_classifier

SHIFTS = {  # name: (split by the training artists, split by the new one)
    "known_concepts": ("cell", "style"),
    "new_concepts": ("concept", "both"),
}
SIDES = (4, 8, 16)
FRACTIONS = (0.1, 0.3, 1.0)


def evaluate_emoji_robustness(
    model: nn.Module,
    processor: Any,
    normalize_size: bool = True,
    batch_size: int = 256,
    progress: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Zero-shot accuracy under a new artist's style, beyond what supervised classifiers of pixels foretell.

    The task is the subgroup of a picture (96 classes), known to the model by the mean embedding of its training captions,
    as in `evaluate_emoji`. The standard models are 36 classifiers of 4x4, 8x8 and 16x16 pixels (logistic regression,
    nearest class mean, one and 15 nearest neighbors), trained on the training pictures of a tenth, three tenths and all
    of the concepts. OpenMoji is new to all of them.

    An accuracy of 0 or 100 counts as half a picture away from it, see `clip_accuracy`. The pictures are few: on 165 of
    them, an accuracy of 20 has a standard error of 3 points.

    Args:
        model: `MMClipModel`, or alike.
        processor: its processor.
        normalize_size: drawings of one size, see `hf_mm.data.emoji.normalize_size`; False for the originals.
        batch_size, progress: see `embed_images`.
        seed: draws the training concepts of the standard models.

    Returns:
        Ready for JSON. For ``"known_concepts"`` (split cell to split style) and ``"new_concepts"`` (concept to both):
        the counts ``images`` and ``images_shift``, ``reference`` (a list of ``name``, ``in``, ``shift``), ``model``
        (``in`` and ``shift``), in percent, and the results of `effective_robustness`. ``"seed"`` and
        ``"normalize_size"`` are there too.
    """
    emoji = load_emoji("all", normalize_size=normalize_size)
    images = list(emoji["image"])
    split, concept, caption = (np.array(emoji[name][:]) for name in ("split", "hexcode", "caption"))
    names, labels = np.unique(emoji["subgroup"][:], return_inverse=True)
    training = np.flatnonzero(split == "train")
    asked = np.flatnonzero(np.isin(split, [part for pair in SHIFTS.values() for part in pair]))

    pixels = embed_pixels(images)
    hits = {
        name: predicted == labels[asked]
        for name, predicted in _classify_pixels(
            pixels[training], labels[training], concept[training], pixels[asked], seed
        )
    }
    label_of = dict(zip(caption[training].tolist(), labels[training].tolist(), strict=True))
    texts = [[text for text, label in label_of.items() if label == own] for own in range(len(names))]
    classifier = build_classifier(model, processor, texts, batch_size, progress)
    scores = embed_images(model, processor, [images[row] for row in asked], batch_size, progress) @ classifier.T
    is_right = nn.functional.one_hot(torch.from_numpy(labels[asked]), len(names)).bool()
    zero_shot = (retrieval_ranks(scores, is_right) == 1).numpy()

    return {
        **{name: _compare(split[asked], parts, hits, zero_shot) for name, parts in SHIFTS.items()},
        "seed": seed,
        "normalize_size": normalize_size,
    }


def _compare(
    split: np.ndarray, parts: tuple[str, str], hits: dict[str, np.ndarray], zero_shot: np.ndarray
) -> dict[str, Any]:
    """`effective_robustness` of a zero-shot model beside classifiers; hits ``(n,)`` bool at pictures of splits ``(n,)``."""

    def accuracy(hit: np.ndarray) -> dict[str, float]:
        shares = [hit[split == part] for part in parts]
        before, after = (clip_accuracy(100 * float(share.mean()), len(share)) for share in shares)
        return {"in": before, "shift": after}

    reference = [{"name": name, **accuracy(hit)} for name, hit in hits.items()]
    model = accuracy(zero_shot)
    before, after = ([point[side] for point in reference] for side in ("in", "shift"))
    return {
        "images": int((split == parts[0]).sum()),
        "images_shift": int((split == parts[1]).sum()),
        "reference": reference,
        "model": model,
        **effective_robustness(before, after, model["in"], model["shift"]),
    }


def _classify_pixels(
    training: torch.Tensor, labels: np.ndarray, concept: np.ndarray, asked: torch.Tensor, seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and predicted labels ``(q,)`` of every standard model, from `embed_pixels` of training and asked pictures."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
    from threadpoolctl import threadpool_limits

    drawn = np.random.default_rng(seed).permutation(np.unique(concept))
    for side in SIDES:
        shrunk, queries = _shrink(training, side), _shrink(asked, side)
        for fraction in FRACTIONS:
            rows = np.isin(concept, drawn[: round(fraction * len(drawn))])
            for name, classifier in {
                # Reference points, not results: a looser stop than scikit-learn's 1e-4 costs them little.
                "logistic regression": LogisticRegression(C=10, tol=1e-3, max_iter=1000),
                "nearest class mean": NearestCentroid(),
                "nearest neighbor": KNeighborsClassifier(1),
                "15 nearest neighbors": KNeighborsClassifier(15),
            }.items():
                with threadpool_limits(1):
                    classifier.fit(shrunk[rows], labels[rows])
                yield f"{name}, {side}x{side} pixels, {fraction:.0%} of the concepts", classifier.predict(queries)


def _shrink(pixels: torch.Tensor, side: int) -> np.ndarray:
    """``(n, side * side * 3)``, of unit length, from `embed_pixels`."""
    squares = pixels.view(len(pixels), SIDE, SIDE, 3).permute(0, 3, 1, 2)
    shrunk = nn.functional.adaptive_avg_pool2d(squares, side).flatten(1)
    return nn.functional.normalize(shrunk, dim=-1).numpy()
