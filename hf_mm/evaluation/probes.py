"""What frozen features are worth: logistic regression on all labelled examples, and on a few of each class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from .embeddings import inference
from .metrics import majority_share, recall_at_k, retrieval_ranks

STEPS_PER_DECADE = 8
STRENGTHS = np.logspace(-6, 6, 12 * STEPS_PER_DECADE + 1)
"""Strengths of the L2 penalty: 1e-6 to 1e6 in 96 logarithmic steps.

The paper says "96 logarithmically spaced steps" at "8 steps per decade" (appendix A.3), which are 97 strengths with both
ends. It does not say what its λ multiplies. Here the probe minimises ``Σ cross-entropy + λ/2 · Σ weights²`` with a free
bias, so λ is 1/C of scikit-learn. The range is symmetric: with λ = C the same 97 classifiers would be compared.
"""
SHOTS = (1, 2, 4, 8, 16)


@dataclass
class Probe:
    """A linear classifier that `fit_probe` found.

    Attributes:
        classes: ``(C,)`` labels in sorted order.
        weight, bias: ``(C, D)`` and ``(C,)``.
        strength: λ of the penalty.
        converged: False if the optimiser stopped at its limit of steps; what it had then is here.
    """

    classes: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    strength: float
    converged: bool

    def scores(self, features: Any) -> np.ndarray:
        """``(n, C)``: the logits of features ``(n, D)``."""
        return _as_array(features) @ self.weight.T + self.bias

    def evaluate(self, features: Any, labels: Sequence[Hashable]) -> dict[str, float]:
        """Accuracies on labelled examples; ties count against the probe, see `retrieval_ranks`.

        Args:
            features: ``(n, D)``.
            labels: n labels out of `classes`.

        Returns:
            Percentages ``accuracy``, ``top5``, ``balanced_accuracy``, ``chance`` and ``majority`` (always the most
            frequent class among these labels), and the counts ``examples`` and ``classes``.

        Raises:
            ValueError: see `fit_probe`; a label is none of `classes`.
        """
        features, labels = _checked(features, labels, "test", self.classes)
        is_right = torch.from_numpy(labels[:, None] == self.classes)
        ranks = retrieval_ranks(torch.from_numpy(self.scores(features)), is_right)
        recalls = [recall_at_k(ranks[own], 1) for own in is_right.T if own.any()]
        return {
            "examples": len(labels),
            "classes": len(self.classes),
            "accuracy": recall_at_k(ranks, 1),
            "top5": recall_at_k(ranks, 5),
            "balanced_accuracy": float(np.mean(recalls)),
            "chance": 100 / len(self.classes),
            "majority": 100 * majority_share(labels),
        }


def tower_features(
    model: nn.Module, processor: Any, images: Sequence[Any], batch_size: int = 256, progress: bool = True
) -> torch.Tensor:
    """``(n, D)`` float32 on the CPU: the picture tower's output before the joint projection, not normalised.

    These are the features of the published linear probes of CLIP's ViTs.

    Args:
        model: has a `vision_model` with a `pooler_output`, such as `MMClipModel`.
        processor, images, batch_size, progress: see `embed_images`.

    Raises:
        ValueError: there are no pictures.

    Source:
        Radford et al. 2021, appendix A.3.
    """
    if len(images) == 0:
        raise ValueError("there is nothing to embed: pass at least one picture.")
    batches = []
    with inference(model), tqdm(total=len(images), unit=" pictures", disable=not progress) as bar:
        for start in range(0, len(images), batch_size):
            batch = [images[index] for index in range(start, min(start + batch_size, len(images)))]
            pixel_values = processor(images=batch, return_tensors="pt")["pixel_values"]
            outputs = model.vision_model(pixel_values=pixel_values.to(model.device, model.dtype))
            batches.append(outputs.pooler_output.float().cpu())
            bar.update(len(batch))
    return torch.cat(batches)


def search_strength(score: Callable[[float], float]) -> float:
    """The strength with the highest score, by the published search through `STRENGTHS`.

    It tries 1e-6, 1e-4, ..., 1e6, then halves the steps around the best one until they are an eighth of a decade: 15
    strengths at most. If the score has one peak, that is the best of all 97. Of equal scores the middle one wins, not the
    edge of a plateau.

    Args:
        score: the score of a strength, such as accuracy on a validation set.

    Raises:
        ValueError: a score is not finite.

    Source:
        Radford et al. 2021, appendix A.3. It does not say which of equal scores wins.
    """
    scores = {}

    def best_of(indices: Iterable[int]) -> int:
        for index in indices:
            if 0 <= index < len(STRENGTHS) and index not in scores:
                scores[index] = score(float(STRENGTHS[index]))
                if not math.isfinite(scores[index]):
                    raise ValueError(
                        f"the score of strength {STRENGTHS[index]:g} is {scores[index]}: it must be finite."
                    )
        highest = max(scores.values())
        equal = sorted(index for index in scores if scores[index] == highest)
        return equal[len(equal) // 2]

    step = 2 * STEPS_PER_DECADE
    best = best_of(range(0, len(STRENGTHS), step))
    while step > 1:
        step //= 2
        best = best_of((best - step, best + step))
    return float(STRENGTHS[best])


def fit_probe(features: Any, labels: Sequence[Hashable], strength: float, max_iter: int = 1000) -> Probe:
    """Logistic regression by L-BFGS from zero: the least ``Σ cross-entropy + strength/2 · Σ weights²``.

    Features are taken as they are, float64 in float64 and all else in float32. (They are centred on the way, which the
    free bias undoes: the same optimum in fewer steps.) Two classes share one weight vector, ±half of it each; the
    penalty is on that one.

    Args:
        features: ``(n, D)`` tensor or array.
        labels: n labels that sort: integers or strings.
        strength: λ, which is 1/C of scikit-learn.
        max_iter: limit of optimiser steps.

    Raises:
        ValueError: lengths differ, features are not a finite table, there are fewer than two classes, or the strength
            is not positive.

    Source:
        Radford et al. 2021, appendix A.3: scikit-learn's L-BFGS, at most 1000 steps.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    features, labels = _checked(features, labels, "training")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"all training labels are {labels[0]!r}: a probe needs two classes or more.")
    if not 0 < strength < math.inf:
        raise ValueError(f"strength is {strength}: it must be positive and finite.")
    mean = features.mean(axis=0, dtype=np.float64).astype(features.dtype)
    regression = LogisticRegression(C=1 / strength, max_iter=max_iter)
    # One thread: the products are small, and scikit-learn's threads and those of its BLAS wait for each other.
    with warnings.catch_warnings(record=True) as caught, threadpool_limits(1):
        warnings.simplefilter("always")
        regression.fit(features - mean, labels)
    converged = True
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            converged = False
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    weight, bias = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return Probe(regression.classes_, weight, bias - weight @ mean, float(strength), converged)


def choose_strength(
    train_features: Any,
    train_labels: Sequence[Hashable],
    val_features: Any,
    val_labels: Sequence[Hashable],
    max_iter: int = 1000,
) -> tuple[float, dict[str, int]]:
    """The strength whose probe of the training examples is right most often on the validation set.

    Args: see `linear_probe`.

    Returns:
        The strength, and the counts ``search_fits`` and ``search_unconverged`` (stopped at `max_iter`; expect that of
        weak penalties).

    Raises:
        ValueError: see `fit_probe`; a validation label is not among the training labels.
    """
    train_features, train_labels = _checked(train_features, train_labels, "training")
    val_features, val_labels = _checked(val_features, val_labels, "validation", train_labels)
    converged = []

    def score(strength: float) -> float:
        probe = fit_probe(train_features, train_labels, strength, max_iter)
        converged.append(probe.converged)
        return float(np.mean(probe.classes[probe.scores(val_features).argmax(axis=1)] == val_labels))

    strength = search_strength(score)
    return strength, {"search_fits": len(converged), "search_unconverged": converged.count(False)}


def linear_probe(
    train_features: Any,
    train_labels: Sequence[Hashable],
    test_features: Any,
    test_labels: Sequence[Hashable],
    val_features: Any = None,
    val_labels: Sequence[Hashable] | None = None,
    strength: float | None = None,
    max_iter: int = 1000,
) -> dict[str, Any]:
    """The linear probe of CLIP's paper: the strength by a validation set, then a fit on that and all training examples.

    Features should be raw, see `tower_features`. How to split is the caller's business (no object in both, if several
    examples show one); without a validation set the strength must be given.

    Args:
        train_features, test_features, val_features: ``(n, D)`` tensors or arrays.
        train_labels, test_labels, val_labels: integers or strings; all of them occur among the training labels.
        strength: λ of `fit_probe`, instead of a validation set.
        max_iter: limit of optimiser steps of each fit.

    Returns:
        Ready for JSON: that of `Probe.evaluate` on the test set, the ``strength``, whether the last fit ``converged``,
        the counts of `choose_strength` if it searched, and how many examples the last fit saw, ``train_examples``.

    Raises:
        ValueError: see `fit_probe`; a label is not among the training labels; both or neither of a validation set and
            a strength are given.

    Source:
        Radford et al. 2021, appendix A.3.
    """
    train_features, train_labels = _checked(train_features, train_labels, "training")
    test_features, test_labels = _checked(test_features, test_labels, "test", train_labels)
    _check_choice(val_features, val_labels, strength)
    search = {}
    if strength is None:
        val_features, val_labels = _checked(val_features, val_labels, "validation", train_labels)
        strength, search = choose_strength(train_features, train_labels, val_features, val_labels, max_iter)
        train_features = np.concatenate([train_features, val_features])
        train_labels = np.concatenate([train_labels, val_labels])
    probe = fit_probe(train_features, train_labels, strength, max_iter)
    return {
        **probe.evaluate(test_features, test_labels),
        "train_examples": len(train_labels),
        "strength": probe.strength,
        "converged": probe.converged,
        **search,
    }


def draw_shots(
    labels: Sequence[Hashable], shots: int, draw: int = 0, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> np.ndarray:
    """Rows of `shots` random examples of each class; a class with fewer gives all it has.

    The order of preference is a random permutation that depends on (seed, shots, draw) alone, not on the names of the
    classes. Draws are independent: the examples of 2 shots are not among those of 4.

    Args:
        labels: n labels.
        shots: examples per class; with `groups`, groups per class.
        draw, seed: non-negative integers.
        groups: n ids of what is drawn as a whole, such as an object that several pictures show.

    Returns:
        Row numbers in ascending order.

    Raises:
        ValueError: lengths differ, `shots` is not positive, or a group has examples of two classes.
    """
    labels = np.asarray(labels)
    groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
    if len(groups) != len(labels):
        raise ValueError(f"there are {len(labels)} labels and {len(groups)} groups: give one group each.")
    if shots < 1:
        raise ValueError(f"shots is {shots}: draw at least one example per class.")
    names, first, group = np.unique(groups, return_index=True, return_inverse=True)
    class_of = labels[first]
    if (mixed := class_of[group] != labels).any():
        raise ValueError(f"group {groups[mixed][0]!r} has examples of two classes: a group belongs to one.")
    order = np.random.default_rng((seed, shots, draw)).permutation(np.argsort(first))
    drawn = [order[class_of[order] == label][:shots] for label in np.unique(labels)]
    return np.flatnonzero(np.isin(group, np.concatenate(drawn)))


@dataclass
class FewShotFit:
    """A probe of a draw: `shots` examples or groups of each class, in all `examples` rows.

    `short_classes` counts the classes that have fewer than `shots` to give.
    """

    shots: int
    examples: int
    short_classes: int
    probe: Probe


def fit_few_shot(
    features: Any,
    labels: Sequence[Hashable],
    shots: Sequence[int] = SHOTS,
    draws: int = 3,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
    val_features: Any = None,
    val_labels: Sequence[Hashable] | None = None,
    strength: float | None = None,
    max_iter: int = 1000,
) -> tuple[list[FewShotFit], dict[str, Any]]:
    """Probes of `draws` draws for each number of shots; arguments and errors as of `few_shot_probe`.

    Returns:
        The fits, in the order of `shots`, and ``strength`` with the counts of `choose_strength` if it searched.
    """
    features, labels = _checked(features, labels, "training")
    _check_choice(val_features, val_labels, strength)
    if len(shots) == 0 or draws < 1:
        raise ValueError(f"there are {len(shots)} numbers of shots and {draws} draws: give at least one of each.")
    search = {}
    if strength is None:
        rows = draw_shots(labels, max(shots), 0, seed, groups)
        strength, search = choose_strength(features[rows], labels[rows], val_features, val_labels, max_iter)
    units = labels if groups is None else labels[np.unique(np.asarray(groups), return_index=True)[1]]
    sizes = np.unique(units, return_counts=True)[1]
    fits = []
    for k in shots:
        for draw in range(draws):
            rows = draw_shots(labels, k, draw, seed, groups)
            probe = fit_probe(features[rows], labels[rows], strength, max_iter)
            fits.append(FewShotFit(k, len(rows), int((sizes < k).sum()), probe))
    return fits, {"strength": float(strength), **search}


def few_shot_curve(
    fits: Sequence[FewShotFit], test_features: Any, test_labels: Sequence[Hashable]
) -> list[dict[str, Any]]:
    """How right the probes of `fit_few_shot` are on a test set, one row for each number of shots.

    Returns:
        Rows with ``shots``; percentages ``accuracy``, ``top5``, ``balanced_accuracy`` (means over draws) and
        ``accuracies`` (of each draw); ``examples``, the mean number of training examples per draw; ``short_classes``,
        classes that had fewer than ``shots`` to give; ``unconverged``, fits that stopped at the limit of steps.
    """
    rows = []
    for k in dict.fromkeys(fit.shots for fit in fits):
        own = [fit for fit in fits if fit.shots == k]
        metrics = [fit.probe.evaluate(test_features, test_labels) for fit in own]
        rows.append(
            {
                "shots": k,
                **{
                    name: float(np.mean([row[name] for row in metrics]))
                    for name in ("accuracy", "top5", "balanced_accuracy")
                },
                "accuracies": [row["accuracy"] for row in metrics],
                "examples": float(np.mean([fit.examples for fit in own])),
                "short_classes": own[0].short_classes,
                "unconverged": sum(not fit.probe.converged for fit in own),
            }
        )
    return rows


def few_shot_probe(
    train_features: Any,
    train_labels: Sequence[Hashable],
    test_features: Any,
    test_labels: Sequence[Hashable],
    shots: Sequence[int] = SHOTS,
    draws: int = 3,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
    val_features: Any = None,
    val_labels: Sequence[Hashable] | None = None,
    strength: float | None = None,
    max_iter: int = 1000,
) -> dict[str, Any]:
    """Linear probes of a few examples of each class.

    One strength serves all probes: searched with the validation set on the first draw of the most shots. It multiplies
    a sum of losses, so that more examples outweigh it by themselves. No probe is trained on the validation set, but
    that set may hold more labels than the draws: with a given `strength` the curve owes nothing to it. The paper does
    not say how it chose the strength of its few-shot probes.

    Args:
        train_features, train_labels, test_features, test_labels, val_features, val_labels, strength, max_iter: see
            `linear_probe`.
        shots: numbers of examples per class, or of groups per class.
        draws: random draws of each, see `draw_shots`.
        seed: of the draws.
        groups: of the training examples, see `draw_shots`.

    Returns:
        Ready for JSON: ``curve``, see `few_shot_curve`; the ``strength``; the counts of `choose_strength` if it
        searched; percentages ``chance`` and ``majority``, the counts ``examples`` (of the test set) and ``classes``.

    Raises:
        ValueError: see `linear_probe` and `draw_shots`; there are no shots or draws.

    Source:
        Radford et al. 2021, section 3.1.5 and figure 6.
    """
    _checked(test_features, test_labels, "test", train_labels)
    fits, search = fit_few_shot(
        train_features, train_labels, shots, draws, seed, groups, val_features, val_labels, strength, max_iter
    )
    metrics = fits[0].probe.evaluate(test_features, test_labels)
    return {
        "curve": few_shot_curve(fits, test_features, test_labels),
        **search,
        **{name: metrics[name] for name in ("chance", "majority", "examples", "classes")},
    }


def shots_to_match(accuracies: Mapping[int, float], target: float) -> float | None:
    """How many examples per class a probe needs for an accuracy, such as that of zero-shot classification.

    Between two measured numbers of examples the accuracy is taken to be linear in the logarithm of the number. Where a
    curve crosses the target twice, the first time counts.

    Args:
        accuracies: accuracy by number of examples per class.
        target: the accuracy to match.

    Returns:
        The number; the smallest measured one if that suffices (read "at most"); None if no measured one does.

    Raises:
        ValueError: there is no accuracy, or a number of examples is not positive.

    Source:
        Radford et al. 2021, figure 7.
    """
    if not accuracies or min(accuracies) <= 0:
        raise ValueError(f"accuracies are of {sorted(accuracies)} examples: give at least one, and positive numbers.")
    before = None
    for shots, accuracy in sorted(accuracies.items()):
        if accuracy >= target:
            if before is None:
                return float(shots)
            fewer, lower = before
            return float(fewer * (shots / fewer) ** ((target - lower) / (accuracy - lower)))
        before = shots, accuracy
    return None


def _as_array(features: Any) -> np.ndarray:
    if isinstance(features, torch.Tensor):
        features = features.detach().cpu()
        features = features if features.dtype == torch.float64 else features.float()
    features = np.asarray(features)
    return features if features.dtype == np.float64 else features.astype(np.float32, copy=False)


def _checked(
    features: Any, labels: Sequence[Hashable], name: str, known: Sequence[Hashable] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels as arrays, or one sentence on what is wrong with them."""
    features, labels = _as_array(features), np.asarray(labels)
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"{name} features {features.shape} and labels {labels.shape} must be (examples, dimensions) and (examples,),"
            " at least one."
        )
    if not np.isfinite(features).all():
        raise ValueError(f"the {name} features hold NaN or infinity: the model's outputs are broken.")
    if known is not None and len(unknown := np.setdiff1d(labels, np.asarray(known))):
        raise ValueError(f"{name} label {unknown[0]!r} is not among the training labels: leave its examples out.")
    return features, labels


def _check_choice(val_features: Any, val_labels: Any, strength: float | None) -> None:
    if (val_features is None) != (val_labels is None):
        raise ValueError("a validation set needs both val_features and val_labels.")
    if (val_features is None) == (strength is None):
        raise ValueError("pass either a validation set, by which the strength is chosen, or the strength.")
