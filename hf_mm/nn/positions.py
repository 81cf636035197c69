"""Learned position tables on a grid, and how published checkpoints resize them."""

from __future__ import annotations

import torch
from torch import nn

# What each ecosystem does to a table when the picture's grid changes; the three are not equivalent.
INTERPOLATIONS = {
    "bilinear_corners": {"mode": "bilinear", "align_corners": True},  # google-research/vision_transformer
    "bicubic": {"mode": "bicubic", "align_corners": False},  # transformers
    "bicubic_antialias": {"mode": "bicubic", "align_corners": False, "antialias": True},  # timm, open_clip
}


def resize_position_table(
    table: torch.Tensor,
    source_grid: tuple[int, int],
    target_grid: tuple[int, int],
    interpolation: str,
    num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """Resizes a learned position table to another grid of patches.

    Args:
        table: ``(num_prefix_tokens + rows * columns, D)``, patches in raster order.
        source_grid: ``(rows, columns)`` of the table.
        target_grid: ``(rows, columns)`` wanted.
        interpolation: a key of ``INTERPOLATIONS``.
        num_prefix_tokens: leading rows (a class token) that have no place on the grid and stay as they are.

    Returns:
        ``(num_prefix_tokens + target rows * target columns, D)``; `table` itself where the grids are equal.

    Raises:
        ValueError: the table does not have the rows that `source_grid` says, or the interpolation is unknown.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"unknown interpolation {interpolation!r}: choose one of {', '.join(INTERPOLATIONS)}.")
    expected = num_prefix_tokens + source_grid[0] * source_grid[1]
    if table.shape[0] != expected:
        raise ValueError(
            f"the position table has {table.shape[0]} rows, but a {source_grid[0]}x{source_grid[1]} grid "
            f"with {num_prefix_tokens} prefix tokens has {expected}."
        )
    if tuple(source_grid) == tuple(target_grid):
        return table
    prefix, patches = table[:num_prefix_tokens], table[num_prefix_tokens:]
    image = patches.T.reshape(1, -1, *source_grid).to(torch.promote_types(table.dtype, torch.float32))
    resized = nn.functional.interpolate(image, size=tuple(target_grid), **INTERPOLATIONS[interpolation])
    return torch.cat([prefix, resized.to(table.dtype).flatten(2)[0].T])
