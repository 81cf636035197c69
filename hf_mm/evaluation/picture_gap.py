"""Does a captioner look? What a caption costs under its own picture and under somebody else's.

A falling loss proves nothing: a model that never sees a picture learns how captions read. These figures do not move
without sight: the gap is 0, the win rate no more than 50, and every ranking at chance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch

from .metrics import BROKEN, label_ranks, recall_at_k

# Rows of pictures (n,) and a caption for each to (n,) mean nats per token of the caption.
CaptionNLL = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


def other_rows(count: int, seed: int = 0, groups: Sequence[Hashable] | None = None) -> torch.Tensor:
    """Gives each row another row, each row once, and never one of its own group.

    Args:
        count: number of rows n.
        seed: of the draw.
        groups: n labels; rows of one label show the same thing, such as one concept by several artists. By default each
            row is its own group.

    Returns:
        ``(n,)`` int64: row i gets row ``other[i]``. The same for the same arguments.

    Raises:
        ValueError: the labels are not as many as the rows, or one group has more than half of the rows.
    """
    groups = range(count) if groups is None else groups
    if len(groups) != count:
        raise ValueError(f"there are {count} rows and {len(groups)} groups: give each row its own.")
    sizes = Counter(groups)
    largest = max(sizes.values(), default=0)
    if 2 * largest > count:
        raise ValueError(
            f"{largest} of {count} rows are of one group: at most half may be, or some row gets a picture of its own."
        )
    draw = np.random.default_rng(seed)
    place = dict(zip(sizes, draw.permutation(len(sizes)), strict=True))
    rows = sorted(draw.permutation(count).tolist(), key=lambda row: place[groups[row]])
    # Groups are blocks now, none longer than the shift: it carries every row out of its own block.
    other = torch.empty(count, dtype=torch.long)
    other[rows] = torch.tensor(rows, dtype=torch.long).roll(-largest)
    return other


def evaluate_picture_gap(
    nll: CaptionNLL, captions: Sequence[str], seed: int = 0, groups: Sequence[Hashable] | None = None
) -> dict[str, float]:
    """`picture_gap` of captions under their own pictures and under those that `other_rows` deals out.

    Args:
        nll: from rows of pictures ``(n,)`` and a caption for each to the mean nats per token of each caption ``(n,)``.
        captions: n captions, one for each picture.
        seed, groups: see `other_rows`.
    """
    own = nll(torch.arange(len(captions)), captions)
    return picture_gap(own, nll(other_rows(len(captions), seed, groups), captions))


def picture_gap(own: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """What captions cost under their own pictures and under others, in nats per token.

    Args:
        own, other: ``(n,)``, the mean negative log-likelihood per token of the same n captions.

    Returns:
        ``nll``, ``nll_other`` and ``gap`` (other minus own; 0 is blind), in nats; ``win_rate``, the percentage of
        captions that cost less under their own picture (50 is chance; a tie is no win); each with a standard error,
        ``{key}_se``, over the captions, those of the gap and the win rate paired; and the count ``captions``. The
        errors are NaN for one caption.

    Raises:
        ValueError: the shapes differ, there are no captions, or a value is not finite.
    """
    if own.shape != other.shape or own.ndim != 1 or len(own) == 0:
        raise ValueError(
            f"own {tuple(own.shape)} and other {tuple(other.shape)} must both be (captions,), at least one."
        )
    own, other = own.double(), other.double()
    if not (own.isfinite().all() and other.isfinite().all()):
        raise ValueError("a log-likelihood is NaN or infinite: the model is broken, or a caption has no token.")
    wins = 100 * (own < other).double()
    measured = {"nll": own, "nll_other": other, "gap": other - own, "win_rate": wins}
    result: dict[str, float] = {"captions": len(own)}
    for name, values in measured.items():
        result |= {name: values.mean().item(), f"{name}_se": standard_error(values)}
    return result


def rank_captions(scores: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """How often the right caption of a picture scores best among candidates, beside chance.

    The score may be minus the mean nats per token, or, which does not favour captions that are likely under any
    picture, the log-likelihood less that under a blank picture. Ties count against the model, see `label_ranks`.

    Args:
        scores: ``(n, candidates)``, higher is better; minus infinity where a picture has fewer candidates than others.
        right: ``(n,)``, the column of the right one.

    Returns:
        Percentages ``top1`` and ``top5``, each with its standard error ``{key}_se`` and what a random order scores,
        ``chance_{key}``; and the counts ``pictures`` and ``candidates`` (the mean over pictures).

    Raises:
        ValueError: shapes do not fit, a right one is no column or has minus infinity, or a score is NaN or infinity.
    """
    if scores.ndim != 2 or right.shape != scores.shape[:1] or scores.numel() == 0:
        raise ValueError(
            f"scores {tuple(scores.shape)} must be (pictures, candidates) and right {tuple(right.shape)} (pictures,)."
        )
    if not (int(right.min()) >= 0 and int(right.max()) < scores.shape[1]):
        raise ValueError(
            f"right runs from {right.min()} to {right.max()}, but there are {scores.shape[1]} candidates."
        )
    scores = scores.double()
    absent = scores == -torch.inf
    if absent.gather(1, right[:, None]).any():
        raise ValueError("the right caption of a picture has the score minus infinity: it must be a candidate.")
    if not scores[~absent].isfinite().all():
        raise ValueError(
            BROKEN.replace("similarity holds", "scores hold").replace("embeddings are", "likelihoods are")
        )
    ranks = label_ranks(scores.masked_fill(absent, torch.finfo(scores.dtype).min), right)
    candidates = (~absent).sum(dim=1).double()
    result: dict[str, float] = {"pictures": len(scores), "candidates": candidates.mean().item()}
    for k in (1, 5):
        result |= {
            f"top{k}": recall_at_k(ranks, k),
            f"top{k}_se": standard_error(100 * (ranks <= k).double()),
            f"chance_top{k}": 100 * (k / candidates).clamp(max=1).mean().item(),
        }
    return result


def standard_error(values: torch.Tensor) -> float:
    """Of the mean of ``(n,)`` independent values: their sample standard deviation over the root of n; NaN for one."""
    return values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
