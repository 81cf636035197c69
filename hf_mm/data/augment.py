"""Augmentation of a whole batch of pictures at once, from numbers that each sample drew for itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

NUM_DRAWS = 8
LUMA = (0.299, 0.587, 0.114)
COARSE = 16  # pixels a side of the blurred copy that sharpness starts from


@dataclass
class AugmentArguments:
    """How far pictures are changed in training. Zeros change nothing."""

    zoom: float = field(default=0.0, metadata={"help": "Scale by a factor in [1 - zoom, 1 + zoom]."})
    shift: float = field(default=0.0, metadata={"help": "Move by up to this fraction of the side, both ways."})
    brightness: float = field(default=0.0, metadata={"help": "Multiply by a factor in [1 - b, 1 + b]."})
    contrast: float = field(default=0.0, metadata={"help": "Scale the distance to mid-grey by [1 - c, 1 + c]."})
    saturation: float = field(default=0.0, metadata={"help": "Scale the distance to grey by [1 - s, 1 + s]."})
    sharpness: float = field(default=0.0, metadata={"help": "Scale the distance to a blurred copy by [1 - s, 1 + s]."})
    flip: bool = field(default=False, metadata={"help": "Mirror half of the pictures whose row allows it."})
    fill: float = field(default=1.0, metadata={"help": "Grey level in [0, 1] of what moves into the frame."})

    def __post_init__(self):
        if not 0 <= self.zoom < 1:
            raise ValueError(f"zoom must lie in [0, 1), not {self.zoom}.")


class ImageAugmentation:
    """Zoom, shift, mirror, sharpness, brightness, contrast and saturation, as one resampling and a few products.

    Sharpness is what makes artists alike: between blurred and over-sharpened, outlines and shading say little, and
    colours and silhouettes remain.

    Args:
        strengths: see `AugmentArguments`.
    """

    def __init__(self, strengths: AugmentArguments):
        self.strengths = strengths

    def __call__(self, pixels: torch.Tensor, draws: torch.Tensor, may_flip: torch.Tensor) -> torch.Tensor:
        """Changes pictures.

        Args:
            pixels: ``(B, 3, H, W)`` uint8.
            draws: ``(B, NUM_DRAWS)`` in [0, 1), one row a sample; equal rows change pictures equally.
            may_flip: ``(B,)`` bool, where a mirrored picture still means the same.

        Returns:
            ``(B, 3, H, W)`` float32 in [0, 1].
        """
        s = self.strengths
        zoom, right, down, brightness, contrast, saturation, mirror, sharpness = (2 * draws - 1).unbind(dim=1)
        images = pixels.float() / 255
        if s.zoom or s.shift or s.flip:
            # grid_sample's frame is [-1, 1] wide: a shift by a fraction of the side is twice that there.
            scale = 1 / (1 + s.zoom * zoom)
            sign = torch.where((mirror < 0) & may_flip & s.flip, -1.0, 1.0)
            moves = torch.zeros(len(images), 2, 3)
            moves[:, 0, 0], moves[:, 1, 1] = scale * sign, scale
            moves[:, 0, 2], moves[:, 1, 2] = 2 * s.shift * right, 2 * s.shift * down
            grid = nn.functional.affine_grid(moves, list(images.shape), align_corners=False)
            images = s.fill - nn.functional.grid_sample(s.fill - images, grid, align_corners=False)
        if s.sharpness:
            coarse = nn.functional.interpolate(images, size=(COARSE, COARSE), mode="area")
            blurred = nn.functional.interpolate(coarse, size=images.shape[-2:], mode="bilinear", align_corners=False)
            images = blurred + (images - blurred) * _factor(s.sharpness, sharpness)
        if s.brightness:
            images = images * _factor(s.brightness, brightness)
        if s.contrast:
            images = (images - 0.5) * _factor(s.contrast, contrast) + 0.5
        if s.saturation:
            grey = sum(weight * plane for weight, plane in zip(LUMA, images.split(1, dim=1), strict=True))
            images = grey + (images - grey) * _factor(s.saturation, saturation)
        return images.clamp(0.0, 1.0)


def _factor(strength: float, draw: torch.Tensor) -> torch.Tensor:
    return (1 + strength * draw)[:, None, None, None]
