"""Image processors of ViT: resize to (height, width), scale to -1..1."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, SizeDict
from transformers.processing_utils import ImagesKwargs

from ...image_utils import (
    RGBImageProcessorPil,
    RGBImageProcessorTorchvision,
    channels_first,
    picture_size,
    target_size,
)


class MMViTImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of the ViT image processors beyond those of transformers.

    Args:
        antialias: True (default) resizes as transformers does, with a low-pass filter on 8 bits; False as the authors'
            code does, plain bilinear on floats, which the original checkpoints were trained with.
    """

    antialias: bool | None


class _ViTRecipe:
    """Settings and resizing rule that both backends share."""

    valid_kwargs = MMViTImageProcessorKwargs
    resample = Image.Resampling.BILINEAR
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 224, "width": 224}
    antialias = True

    def _preprocess(
        self, images: Iterable[Any], antialias: bool, do_resize: bool, size: SizeDict, resample: int, **kwargs
    ) -> BatchFeature:
        if do_resize and not antialias:
            if resample != Image.Resampling.BILINEAR:
                raise ValueError("antialias=False is defined for bilinear resizing only: leave resample at 2.")
            images = [self._resize_without_antialias(image, size) for image in images]
            do_resize = False
        return super()._preprocess(images, do_resize=do_resize, size=size, resample=resample, **kwargs)


class MMViTImageProcessorPil(_ViTRecipe, RGBImageProcessorPil):
    """ViT's image processor on PIL, the default.

    Resizes to (height, width) whatever the shape, divides by 255, scales to -1..1. Takes PIL images, arrays,
    tensors, paths, bytes.

    Args:
        size: n, or `{"height": h, "width": w}`, or `{"shortest_edge": n}`.
        antialias: see `MMViTImageProcessorKwargs`.
        **kwargs: the other options of transformers' image processors.

    Source:
        Dosovitskiy et al. 2021 and the published code.
    """

    def _resize_without_antialias(self, image: Image.Image | np.ndarray, size: SizeDict) -> np.ndarray:
        pixels = torch.from_numpy(np.array(channels_first(image), dtype=np.float32))
        return _bilinear(pixels, size).numpy()


class MMViTImageProcessor(_ViTRecipe, RGBImageProcessorTorchvision):
    """ViT's image processor on torchvision, for batches on an accelerator; within two grey levels of the PIL one."""

    def _resize_without_antialias(self, image: torch.Tensor, size: SizeDict) -> torch.Tensor:
        return _bilinear(image.float(), size)


def _bilinear(pixels: torch.Tensor, size: SizeDict) -> torch.Tensor:
    width, height = target_size(*picture_size(pixels), size)
    return interpolate(pixels[None], (height, width), mode="bilinear", align_corners=False, antialias=False)[0]
