"""Retrieval ranks with honest ties, what chance would score, and accuracies as `evaluate` metrics."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import ArrayLike

TIE = 1e-6  # cosines in float32 are not exact below this
BROKEN = "similarity holds NaN or infinity: the model's embeddings are broken."


def retrieval_ranks(similarity: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Rank of the best right answer to each query, 1 for the first place.

    Ties count against the model: every wrong answer that scores within 1e-6 of the best right one is ranked before it.
    So a model that gives all answers one score ranks last, and results do not hang on rounding.

    Args:
        similarity: ``(q, g)``, scores of g answers to q queries, of the size of cosines.
        positives: ``(q, g)`` bool, the right answers, one or more to a query.

    Returns:
        ``(q,)`` integers.

    Raises:
        ValueError: shapes differ, a score is not finite, or a query has no right answer.
    """
    if similarity.shape != positives.shape or similarity.ndim != 2:
        raise ValueError(
            f"similarity {tuple(similarity.shape)} and positives {tuple(positives.shape)} must both be (queries, gallery)."
        )
    if not similarity.isfinite().all():
        raise ValueError(BROKEN)
    if not positives.any(dim=1).all():
        query = int(positives.any(dim=1).int().argmin())
        raise ValueError(f"query {query} has no right answer in the gallery: add one or leave the query out.")
    best = similarity.masked_fill(~positives, -torch.inf).amax(dim=1, keepdim=True)
    return 1 + ((similarity >= best - TIE) & ~positives).sum(dim=1)


def label_ranks(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`retrieval_ranks` where each query has one right answer.

    Args:
        scores: ``(q, g)``, of the size of cosines.
        labels: ``(q,)``, the right answer's column.

    Returns:
        ``(q,)`` integers.

    Raises:
        ValueError: a score is not finite.
    """
    if not scores.isfinite().all():
        raise ValueError(BROKEN)
    return (scores >= scores.gather(1, labels[:, None]) - TIE).sum(dim=1)


def recall_at_k(ranks: torch.Tensor, k: int) -> float:
    """Percentage of queries with a right answer among the first k."""
    return 100 * (ranks <= k).double().mean().item()


def mean_reciprocal_rank(ranks: torch.Tensor) -> float:
    """Mean of 1 / rank, in percent."""
    return 100 * (1 / ranks.double()).mean().item()


def chance_recall_at_k(num_positives: torch.Tensor, gallery: int, k: int) -> float:
    """Recall at k of a random order, in percent: 1 - C(g - m, k) / C(g, k), averaged over queries.

    Args:
        num_positives: ``(q,)``, right answers m of each query.
        gallery: number of answers g.
        k: length of the list.
    """
    counts, queries = np.unique(num_positives, return_counts=True)
    recalls = [1 - _misses(m, gallery)[min(k, gallery)] for m in counts]
    return 100 * float(np.average(recalls, weights=queries))


def chance_reciprocal_rank(num_positives: torch.Tensor, gallery: int) -> float:
    """Mean reciprocal rank of a random order, in percent; arguments as of `chance_recall_at_k`."""
    counts, queries = np.unique(num_positives, return_counts=True)
    places = np.arange(1, gallery + 1)
    means = [np.sum(-np.diff(_misses(m, gallery)) / places) for m in counts]
    return 100 * float(np.average(means, weights=queries))


def _misses(num_positives: int, gallery: int) -> np.ndarray:
    """``(g + 1,)``: the probability that the first k of a random order hold no right answer, for k = 0 .. g."""
    drawn = np.arange(gallery)
    left_wrong = np.clip(gallery - num_positives - drawn, 0, None)
    return np.concatenate([[1.0], np.cumprod(left_wrong / (gallery - drawn))])


def retrieval_metrics(similarity: torch.Tensor, positives: torch.Tensor, prefix: str) -> dict[str, float]:
    """R@1, R@5, R@10 and mean reciprocal rank beside what chance scores, for queries in rows.

    Args:
        similarity: ``(q, g)`` cosines.
        positives: ``(q, g)`` bool.
        prefix: of the keys, such as ``"i2t"``.

    Returns:
        Percentages: ``{prefix}_r1``, ``_r5``, ``_r10``, ``_mrr`` and the same after ``chance_``.
    """
    ranks = retrieval_ranks(similarity, positives)
    counts, gallery = positives.sum(dim=1), positives.shape[1]
    recalls = {f"{prefix}_r{k}": recall_at_k(ranks, k) for k in (1, 5, 10)}
    chances = {f"chance_{prefix}_r{k}": chance_recall_at_k(counts, gallery, k) for k in (1, 5, 10)}
    return {
        **recalls,
        f"{prefix}_mrr": mean_reciprocal_rank(ranks),
        **chances,
        f"chance_{prefix}_mrr": chance_reciprocal_rank(counts, gallery),
    }


def majority_share(labels: np.ndarray) -> float:
    """Accuracy of always giving the most frequent label, 0 to 1."""
    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))


class _ClassificationMetric(evaluate.Metric):
    """A metric that keeps its data in memory: nothing is downloaded and nothing stays on disk."""

    def __init__(self, **kwargs):
        with TemporaryDirectory() as folder:  # evaluate makes its cache folder even when it keeps data in memory
            super().__init__(keep_in_memory=True, cache_dir=folder, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="Args: predictions and references, integer class ids.",
            features=datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")}),
        )


class Accuracy(_ClassificationMetric):
    """Share of right predictions, 0 to 1: ``Accuracy().compute(predictions=..., references=...)["accuracy"]``."""

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, references)}


class BalancedAccuracy(_ClassificationMetric):
    """Recall of each class among the references, averaged, 0 to 1; its key is ``"balanced_accuracy"``."""

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"balanced_accuracy": balanced_accuracy(predictions, references)}


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Share of right predictions, 0 to 1."""
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def balanced_accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Recall of each class among the references, averaged, 0 to 1."""
    _, classes = np.unique(references, return_inverse=True)
    hits = np.bincount(classes, np.asarray(predictions) == np.asarray(references))
    return float(np.mean(hits / np.bincount(classes)))


def accuracies(predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """``accuracy`` and ``balanced_accuracy`` of class ids, in percent."""
    return {
        "accuracy": 100 * accuracy(predictions, references),
        "balanced_accuracy": 100 * balanced_accuracy(predictions, references),
    }
