"""Converted weights against the library they were published for."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

DISTRIBUTIONS = {"open_clip": "open_clip_torch"}  # where the name to install is another
TOLERANCE = 1e-4


def import_peer(name: str) -> ModuleType:
    """Imports a library to compare with.

    Raises:
        OSError: it is not installed, or does not import; the sentence says how to install it.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken installation raises anything
        raise OSError(
            f"The check compares with {name}, which cannot be imported ({error}): "
            f"pip install {DISTRIBUTIONS.get(name, name)}, or leave --check out."
        ) from error


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max |difference| / max |theirs|; infinite where the shapes differ or a number is not finite."""
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def require_agreement(differences: dict[str, float], peer: str) -> str:
    """One sentence about how far ours is from the peer.

    Raises:
        ValueError: further than `TOLERANCE`.
    """
    found = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    if not all(difference <= TOLERANCE for difference in differences.values()):
        raise ValueError(
            f"The converted model disagrees with {peer} ({found} relative, {TOLERANCE:.0e} allowed): nothing is written."
        )
    return f"Largest relative difference from {peer}: {found}."
