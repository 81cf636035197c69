"""Effective robustness: how much better a model bears a shift of the data than its accuracy without the shift foretells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def effective_robustness(
    reference_in: Sequence[float], reference_shift: Sequence[float], accuracy_in: float, accuracy_shift: float
) -> dict[str, float | int | bool]:
    """Accuracy under a shift, beyond what standard models of the same accuracy reach.

    A least-squares line ``logit(shift) = intercept + slope * logit(in)`` through the standard models foretells the
    accuracy under the shift; the model's effective robustness is its distance from that, in percentage points.

    Args:
        reference_in: accuracies of n standard models without the shift, n >= 3, in percent.
        reference_shift: their accuracies under the shift, in percent.
        accuracy_in, accuracy_shift: those of the model, in percent.

    Returns:
        ``slope``, ``intercept``, ``scatter`` (standard deviation of the standard models around their line, in points,
        n - 2 degrees of freedom), ``expected`` (what the line foretells, in percent), ``effective_robustness`` (in
        points) and ``extrapolated`` (the model's accuracy without the shift is beyond that of all standard models, so
        that the line is a guess).

    Raises:
        ValueError: there are fewer than three standard models, lengths differ, all of them have one accuracy without
            the shift, or an accuracy is not between 0 and 100: these two have no logit, see `clip_accuracy`.

    Source:
        Taori et al. 2020, section 3; Radford et al. 2021, section 3.3.
    """
    reference_in, reference_shift = (np.asarray(values, dtype=float) for values in (reference_in, reference_shift))
    if reference_in.ndim != 1 or reference_in.shape != reference_shift.shape:
        raise ValueError(
            f"accuracies of the standard models have shapes {reference_in.shape} and {reference_shift.shape}: "
            "pass two lists of one length."
        )
    if len(reference_in) < 3:
        raise ValueError(f"there are {len(reference_in)} standard models: a line with its scatter takes at least 3.")
    every = np.concatenate([reference_in, reference_shift, [accuracy_in, accuracy_shift]])
    if not ((every > 0) & (every < 100)).all():
        wrong = every[~((every > 0) & (every < 100))][0]
        raise ValueError(f"accuracy {wrong} has no logit: pass percentages between 0 and 100, see clip_accuracy.")
    if np.ptp(reference_in) == 0:
        raise ValueError(f"all standard models have accuracy {reference_in[0]} without the shift: no line fits them.")
    slope, intercept = np.polyfit(_logit(reference_in), _logit(reference_shift), 1)
    residuals = reference_shift - _from_logit(intercept + slope * _logit(reference_in))
    expected = float(_from_logit(intercept + slope * _logit(accuracy_in)))
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "scatter": float(np.sqrt(np.sum(residuals**2) / (len(residuals) - 2))),
        "expected": expected,
        "effective_robustness": float(accuracy_shift) - expected,
        "extrapolated": not bool(reference_in.min() <= accuracy_in <= reference_in.max()),
    }


def clip_accuracy(accuracy: float, images: int) -> float:
    """Keeps a percentage over `images` pictures half a picture away from 0 and 100, so that it has a logit."""
    half = 50 / images
    return float(min(max(accuracy, half), 100 - half))


def _logit(percent: np.ndarray | float) -> np.ndarray:
    return np.log(percent) - np.log(100 - np.asarray(percent))


def _from_logit(logit: np.ndarray | float) -> np.ndarray:
    return 100 / (1 + np.exp(-logit))
