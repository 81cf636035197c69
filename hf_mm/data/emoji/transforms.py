"""Bringing drawings of different artists to one size."""

from __future__ import annotations

import numpy as np
from PIL import Image

BACKGROUND = 250


def normalize_size(image: Image.Image, size: int = 64, long_side: int = 60) -> Image.Image:
    """Crops a drawing to what is not white and centres it on white, its longer side `long_side` pixels.

    Artists leave different margins (OpenMoji draws 49 of 64 pixels wide, Twemoji 63), which is no part of a style.

    Args:
        image: a picture on white.
        size: side of the square result, in pixels.
        long_side: longer side of the drawing in it, in pixels.

    Returns:
        An RGB picture of `size` x `size`; a blank picture stays blank.
    """
    image = image.convert("RGB")
    canvas = Image.new("RGB", (size, size), "white")
    drawn = Image.fromarray((np.asarray(image) < BACKGROUND).any(axis=-1))
    if (box := drawn.getbbox()) is None:
        return canvas
    width, height = box[2] - box[0], box[3] - box[1]
    scale = long_side / max(width, height)
    fitted = (max(1, round(width * scale)), max(1, round(height * scale)))
    drawing = image.crop(box).resize(fitted, Image.Resampling.BICUBIC)
    canvas.paste(drawing, ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
    return canvas
