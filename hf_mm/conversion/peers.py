"""Converted weights against the library they were published for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from .layouts import first_line

DISTRIBUTIONS = {"open_clip": "open_clip_torch"}  # where the name to install is another
TOLERANCE = 1e-4
NOT_VERIFIED = "built with the heads and activation that were given, which this cannot verify"


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


@contextmanager
def built_by(name: str) -> Iterator[None]:
    """While a library builds its model of the checkpoint. Raises OSError where it cannot."""
    try:
        yield
    except Exception as error:  # each library raises its own
        raise OSError(
            f"The check needs {name}'s own model of the checkpoint, which it does not build ({first_line(error)}): leave "
            "--check out."
        ) from error


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max |difference| / max |theirs|; infinite where the shapes differ or a number is not finite, 0 for equal zeros."""
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    largest = theirs.double().abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float((ours.double() - theirs.double()).abs().max() / largest)


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
