"""How a picture becomes tokens: one patch convolution, or a stem of several small ones."""

from __future__ import annotations

import torch
from torch import nn


def to_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """``n`` or ``(height, width)`` to ``(height, width)``."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position of ``(B, C, H, W)``."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvStem(nn.Module):
    """3x3 stride-2 convolutions, each with norm and GELU, then a 1x1 projection (Xiao et al. 2021, section 4).

    The norms treat every sample alone (GroupNorm or LayerNorm): BatchNorm would tie a picture to its batch.

    Args:
        num_channels: of the picture.
        hidden_size: of the tokens.
        stem_channels: output channels of the stride-2 convolutions; ``k`` of them reduce by ``2**k``.
        norm: ``"group"`` or ``"layer"``.
        num_groups: of GroupNorm.
        eps: of the norms.
    """

    def __init__(
        self, num_channels: int, hidden_size: int, stem_channels: list[int], norm: str, num_groups: int, eps: float
    ):
        super().__init__()
        layers, width = [], num_channels
        for channels in stem_channels:
            layers.append(nn.Conv2d(width, channels, kernel_size=3, stride=2, padding=1, bias=False))
            layers.append(
                nn.GroupNorm(num_groups, channels, eps=eps) if norm == "group" else ChannelLayerNorm(channels, eps=eps)
            )
            layers.append(nn.GELU())
            width = channels
        self.layers = nn.Sequential(*layers)
        self.projection = nn.Conv2d(width, hidden_size, kernel_size=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` to ``(B, D, H / 2**k, W / 2**k)``."""
        return self.projection(self.layers(pixel_values))


def patch_grid(
    pixel_values: torch.Tensor,
    num_channels: int,
    image_size: tuple[int, int],
    patch_size: tuple[int, int],
    interpolate_pos_encoding: bool,
) -> tuple[int, int]:
    """The ``(rows, columns)`` of patches of a batch of pictures, after checking that the tower can take them.

    Raises:
        ValueError: not ``(B, C, H, W)``, another number of channels, a size that the position table was not made for
            (without `interpolate_pos_encoding`), or one that patches do not tile.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"pixel_values must be (batch, {num_channels}, height, width), but its shape is "
            f"{tuple(pixel_values.shape)}."
        )
    height, width = pixel_values.shape[-2:]
    if not interpolate_pos_encoding and (height, width) != image_size:
        raise ValueError(
            f"pictures are {height}x{width} but the model was built for {image_size[0]}x{image_size[1]}: "
            "resize them, or pass interpolate_pos_encoding=True."
        )
    if height % patch_size[0] or width % patch_size[1]:
        raise ValueError(
            f"a picture of {height}x{width} cannot be cut into patches of {patch_size[0]}x{patch_size[1]}: "
            "both sides must be multiples of the patch."
        )
    return height // patch_size[0], width // patch_size[1]
