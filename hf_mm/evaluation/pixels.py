"""The baseline without a model: which training picture has the most similar pixels?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..image_utils import to_rgb

SIDE = 16


def embed_pixels(images: Iterable[Any]) -> torch.Tensor:
    """``(n, 768)``: pictures as 16x16 RGB pixels, the mean of each picture removed, of unit length (a flat one: zero)."""
    size = (SIDE, SIDE)
    small = [
        np.asarray(to_rgb(image).resize(size, Image.Resampling.BOX), dtype=np.float32).ravel() for image in images
    ]
    pixels = torch.from_numpy(np.stack(small))
    return nn.functional.normalize(pixels - pixels.mean(dim=1, keepdim=True), dim=-1)


def nearest_pictures(queries: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    """``(q,)``: the index of the training picture ``(t, D)`` with the highest cosine to each query ``(q, D)``."""
    return (queries @ training.T).argmax(dim=1)


def nearest_of_each(
    queries: torch.Tensor, training: torch.Tensor, groups: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """``(q, g)``: the highest cosine between each query ``(q, D)`` and the training pictures ``(t, D)`` of each group.

    Args:
        groups: ``(t,)``, the group of each training picture.
        num_groups: g; one without a training picture has -1.
    """
    lowest = torch.full((len(queries), num_groups), -1.0)
    return lowest.scatter_reduce(1, groups.expand(len(queries), -1), queries @ training.T, "amax")
