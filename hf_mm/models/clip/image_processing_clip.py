"""Image processors of CLIP: shorter side to n, centre crop, normalise, as the published weights expect."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, SizeDict
from transformers.processing_utils import ImagesKwargs

from ...image_utils import RGBImageProcessorPil, RGBImageProcessorTorchvision, picture_size


class MMClipImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of the CLIP image processors beyond those of transformers.

    Args:
        convert_rgb_first: convert to RGB before resizing (default); False converts after it as the original code does,
            which differs for palette pictures (resized by nearest neighbour) and for varying transparency.
    """

    convert_rgb_first: bool | None


class _ClipRecipe:
    """Settings and crop rule that both backends share."""

    valid_kwargs = MMClipImageProcessorKwargs
    resample = Image.Resampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_center_crop = True
    convert_rgb_first = True

    def __init__(self, **kwargs):
        super().__init__(**_crop_follows_size(kwargs))

    def preprocess(self, images: Any, *args, **kwargs):
        return super().preprocess(images, *args, **_crop_follows_size(kwargs))

    def process_image(
        self, image: Any, do_resize: bool = False, size: SizeDict | None = None, do_center_crop: bool = False, **kwargs
    ) -> Image.Image | np.ndarray | torch.Tensor:
        """Opens one picture; of a strip that is to be resized and cropped, only the middle."""
        picture = super().process_image(image, **kwargs)
        return _middle_of_strip(picture) if do_resize and do_center_crop and size.shortest_edge else picture


class MMClipImageProcessorPil(_ClipRecipe, RGBImageProcessorPil):
    """CLIP's image processor on PIL: the reference recipe to the last bit, and the default.

    Resizes the shorter side to n (PIL bicubic, antialiased; longer side truncated), cuts the n x n centre, divides by
    255, subtracts the mean and divides by the standard deviation. Takes PIL images, arrays, tensors, paths, bytes.

    Args:
        size: n, or `{"shortest_edge": n}`, or `{"height": h, "width": w}` to squash.
        crop_size: n, or `{"height": h, "width": w}`; follows `size` where only that is given.
        convert_rgb_first: see `MMClipImageProcessorKwargs`.
        **kwargs: the other options of transformers' image processors.

    Source:
        Radford et al. 2021, section 2.5 and the published code.
    """


class MMClipImageProcessor(_ClipRecipe, RGBImageProcessorTorchvision):
    """CLIP's image processor on torchvision, for batches on an accelerator; within two grey levels of the PIL one."""


def _middle_of_strip(picture: Image.Image | np.ndarray | torch.Tensor) -> Image.Image | np.ndarray | torch.Tensor:
    """Cuts a strip more than 100 times as long as wide to about that, before resizing makes it huge.

    The crop never sees the ends. What goes is a multiple of twice the width at both, so that the crop falls on the
    same pixels.
    """
    width, height = picture_size(picture)
    short = min(width, height)
    cut = 2 * short * max((max(width, height) // short - 97) // 4, 0)
    left, top = (cut, 0) if width > height else (0, cut)
    if not cut:
        return picture
    if isinstance(picture, Image.Image):
        return picture.crop((left, top, width - left, height - top))
    return picture[:, top : height - top, left : width - left]


def _crop_follows_size(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Crops to n where only `size` = n is given."""
    size = kwargs.get("size")
    shortest = size.get("shortest_edge") if isinstance(size, (dict, SizeDict)) else size
    return {"crop_size": shortest, **kwargs} if isinstance(shortest, int) else kwargs
