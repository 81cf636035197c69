"""What every image processor of the package shares: any picture a user would give becomes upright 8-bit RGB.

The rules:

- Orientation tags are applied; metadata that cannot be read is passed over with a warning.
- Transparency is dropped, not blended, as `convert("RGB")` of the reference CLIP recipe does.
- 16-bit pictures are scaled to 8 bits: `round(value / 257)`. The type decides for `I;16` and uint16; wider integers
  (`I`, int32, int64) count as 16-bit if a value exceeds 255.
- Float pictures (`F`, float arrays) within 0..1 count as 0..1, others as 0..255.
- Arrays are (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4. Where both ends could be the channels (3x3x3), the
  first is taken, as transformers does; pass `input_data_format` to choose.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, SizeDict, infer_channel_dimension_format, load_image
from transformers.utils import logging

logger = logging.get_logger(__name__)

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION_CARRIERS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


def to_rgb(image: Any) -> Image.Image:
    """Turns one picture into an upright RGB image.

    Args:
        image: a PIL image of any mode, a numpy or torch array, a path, a URL, the bytes of an image file, or a
            `{"bytes": ..., "path": ...}` dict as `datasets` stores them.

    Returns:
        The picture as PIL image of mode RGB; see the rules at the top of this module.

    Raises:
        FileNotFoundError: If the path names no file.
        ValueError: If the picture is missing, unreadable, or of the wrong shape or value range.
        TypeError: If this is not a picture at all.
    """
    picture = load_picture(image)
    return quantize(picture) if isinstance(picture, np.ndarray) else _as_rgb(picture)


def load_picture(image: Any, input_data_format: str | ChannelDimension | None = None) -> Image.Image | np.ndarray:
    """Opens one picture, upright, without losing what its type tells.

    Args:
        image: As for `to_rgb`.
        input_data_format: Where the channels of an array are; inferred from its shape by default.

    Returns:
        A PIL image with 8 bits per channel, or for float pictures a float32 array (3, H, W).
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if image is None:
        raise ValueError("The picture is missing (None): leave its row out or give a picture.")
    if _is_array(image):
        return _from_array(image, input_data_format)
    if isinstance(image, Image.Image):
        with _naming(getattr(image, "filename", "") or "a PIL image"):
            return _eight_bits(_upright(image))
    if isinstance(image, (bytes, bytearray)):
        with _naming("a picture in memory"), Image.open(BytesIO(image)) as opened:
            return _eight_bits(_upright(opened))
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
        with _naming(f"{image[:80]}"):
            return load_image(image)
    if isinstance(image, (str, Path)):
        with _naming(f"'{image}'"), Image.open(image) as opened:
            return _eight_bits(_upright(opened))
    raise TypeError(
        f"A {type(image).__name__} is not a picture: give a PIL image, an array, a path, or an image file's bytes."
    )


def flatten_images(images: Any) -> Iterator[tuple[str, Any]]:
    """Yields the pictures of any nesting one by one, each with the words that name it in an error.

    Args:
        images: One picture, a batch array (B, ...), or any (nested) iterable of pictures: list, tuple, column.
    """
    found = False
    for place, image in _leaves(images, ()):
        found = True
        yield f"Image {'.'.join(place)}" if place else "The image", image
    if not found:
        raise ValueError("The list of images is empty.")


def deal_out(
    images: Any, marks: list[int], one_text: bool, num_images: int | Sequence[int] | None, one_each: bool = False
) -> tuple[list[int], list | None]:
    """How many pictures each text is given, and all of them in reading order; none where only their number is known.

    Args:
        images: one picture, one for each text, for each text a list of pictures, or a flat list, which is dealt out by
            marks where it has as many pictures as they are.
        marks: how many places for pictures each text has.
        one_text: whether a single text was given: a flat list is then all its own.
        num_images: of each text or of all, in place of images.
        one_each: never deal out by marks what could be one picture for each text.

    Raises:
        ValueError: images and their number are given, or the texts and those that have pictures are not equally many.
    """
    flat = None
    if images is None:
        one_count = num_images is None or isinstance(num_images, int)
        counts = [num_images or 0] * len(marks) if one_count else list(num_images)
    elif num_images is not None:
        raise ValueError("num_images counts pictures whose features are given: leave it out where images are.")
    else:
        rows = list(images) if is_nest(images) else [images]
        if one_text and not (len(rows) == 1 and is_nest(rows[0])):
            rows = [rows]
        if any(map(is_nest, rows)):
            rows = [list(row) if is_nest(row) else [row] for row in rows]
            flat, counts = [image for row in rows for image in row], list(map(len, rows))
        else:
            by_marks = len(rows) == sum(marks) and not (one_each and len(rows) == len(marks))
            flat, counts = rows, list(marks) if by_marks else [1] * len(rows)
    if len(counts) != len(marks):
        raise ValueError(f"There are pictures for {len(counts)} texts, but {len(marks)} texts: give one each.")
    return counts, flat


def quantize(pixels: np.ndarray) -> Image.Image:
    """Rounds a float picture (3, H, W), within 0..1 or 0..255, to an 8-bit RGB image."""
    levels = np.rint(pixels * (255 / full_scale(pixels))).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))


def full_scale(pixels: np.ndarray) -> float:
    """The value of white in a float picture: 1 if nothing exceeds 1, else 255."""
    return 1.0 if pixels.max() <= 1 else 255.0


class AnyPictureMixin:
    """Lets an image processor take what `to_rgb` takes, one or many, opened one at a time."""

    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def fetch_images(self, images: Any) -> Any:
        """Leaves paths and URLs as they are: each is opened when its turn comes."""
        return images

    def _validate_preprocess_kwargs(self, do_convert_rgb: bool | None = None, do_pad: bool | None = None, **kwargs):
        if do_convert_rgb is False or do_pad:
            raise ValueError(
                f"{type(self).__name__} always gives RGB and never pads: leave do_convert_rgb and do_pad out."
            )
        super()._validate_preprocess_kwargs(**kwargs)

    def _prepare_image_like_inputs(self, images: Any, **kwargs) -> Iterator[Any]:
        for name, image in flatten_images(images):
            try:
                yield self.process_image(image, **kwargs)
            except (FileNotFoundError, ValueError, TypeError) as error:
                raise type(error)(f"{name}: {error}") from error

    def process_image(
        self,
        image: Any,
        do_rescale: bool = True,
        input_data_format: str | ChannelDimension | None = None,
        convert_rgb_first: bool = True,
        **kwargs,
    ) -> Image.Image | np.ndarray:
        """Opens one picture as 8-bit image (RGB if `convert_rgb_first`) or, if it is a float one, array (3, H, W)."""
        picture = load_picture(image, input_data_format)
        if isinstance(picture, Image.Image):
            return _as_rgb(picture) if convert_rgb_first else picture
        if do_rescale and 0 < picture.max() <= 1:
            raise ValueError("A float picture within 0..1 would be divided by 255 again: pass do_rescale=False.")
        return picture

    def center_crop(self, image: np.ndarray | torch.Tensor, size: SizeDict, **kwargs) -> np.ndarray | torch.Tensor:
        """Cuts the centre (..., height, width) out; a smaller picture gets black margins, odd pixels at the far end.

        The offset is `round((side - crop) / 2)` with Python's rounding to even, as torchvision has it, and with it the
        published recipes of CLIP, open_clip and timm; transformers' own rounds down.
        """
        margins = [max(size.height - image.shape[-2], 0), max(size.width - image.shape[-1], 0)]
        if any(margins):
            image = self._add_margins(image, *((margin // 2, margin - margin // 2) for margin in margins))
        top = round((image.shape[-2] - size.height) / 2)
        left = round((image.shape[-1] - size.width) / 2)
        return image[..., top : top + size.height, left : left + size.width]


class RGBImageProcessorTorchvision(AnyPictureMixin, TorchvisionBackend):
    """Base of the torchvision image processors: same inputs as the PIL ones, resized and normalised in batches."""

    def _prepare_image_like_inputs(self, images: Any, **kwargs) -> list[torch.Tensor]:
        return list(super()._prepare_image_like_inputs(images, **kwargs))

    def process_image(self, image: Any, device: torch.device | str | None = None, **kwargs) -> torch.Tensor:
        """Opens one picture as uint8 or float tensor (3, H, W)."""
        picture = super().process_image(image, **kwargs)
        return torch.from_numpy(np.array(channels_first(picture), order="C")).to(device)

    def _add_margins(self, image: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
        return torch.nn.functional.pad(image, (*columns, *rows))


class RGBImageProcessorPil(AnyPictureMixin, PilBackend):
    """Base of the PIL image processors.

    Resizing works on 8 bits. Float pictures keep their range (0..1 or 0..255) and, where nothing is resized, their
    precision; one within 0..1 is refused while `do_rescale` would divide it by 255 again.
    """

    def fit(self, image: Any) -> torch.Tensor:
        """Resizes and crops one picture by the processor's own settings: ``(3, n, n)`` uint8, not yet normalised.

        What calling the processor without rescaling and normalising gives, at a fifth of its cost beside resizing: for
        loaders that keep or change pictures at the model's size, and call `normalize_levels` on whole batches.
        """
        options = {name: getattr(self, name, None) for name in self._valid_kwargs_names}
        options |= {"do_rescale": False, "do_normalize": False, "return_tensors": None}
        pictures = self._prepare_image_like_inputs([image], **options)
        (pixels,) = self._preprocess(pictures, **options)["pixel_values"]
        return torch.from_numpy(pixels if pixels.dtype == np.uint8 else np.rint(pixels).astype(np.uint8))

    def normalize_levels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Rescales and normalises ``(B, 3, H, W)`` by the processor's own settings; floats count as rescaled already."""
        is_rescaled = pixels.is_floating_point() or not self.do_rescale
        pixels = pixels.float() if is_rescaled else pixels.float() / (1 / self.rescale_factor)
        if self.do_normalize:
            mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
            pixels = (pixels - mean) / std
        return pixels

    def resize(
        self, image: Image.Image | np.ndarray, size: SizeDict, resample: int | None = None, **kwargs
    ) -> Image.Image | np.ndarray:
        """Resizes one picture with PIL's antialiased filters; the longer side is truncated to whole pixels."""
        width, height = picture_size(image)
        target = target_size(width, height, size)
        if target == (width, height):
            return image
        if isinstance(image, Image.Image):
            return image.resize(target, resample)
        return channels_first(quantize(image).resize(target, resample)) * np.float32(full_scale(image) / 255)

    def _add_margins(self, image: np.ndarray, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        return np.pad(image, ((0, 0), rows, columns))

    def _preprocess(
        self,
        images: Iterable[Image.Image | np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: int,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        return_tensors: str | None,
        **kwargs,
    ) -> BatchFeature:
        pictures = []
        for image in images:
            pixels = channels_first(self.resize(image, size, resample) if do_resize else image)
            pictures.append(self.center_crop(pixels, crop_size) if do_center_crop else pixels)
        levels = not (do_rescale or do_normalize) and all(pixels.dtype == np.uint8 for pixels in pictures)
        dtype = np.uint8 if levels else np.float32
        pixel_values = _room_for(pictures, dtype, one_block=return_tensors is not None)
        for values, pixels in zip(pixel_values, pictures, strict=True):
            values[...] = pixels
            if do_rescale:
                values /= 1 / rescale_factor
            if do_normalize:
                values -= np.reshape(image_mean, (-1, 1, 1)).astype(np.float32)
                values /= np.reshape(image_std, (-1, 1, 1)).astype(np.float32)
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)


def target_size(width: int, height: int, size: SizeDict) -> tuple[int, int]:
    """The (width, height) that `size` asks for: both sides, or the shorter one with the longer one truncated."""
    if size.height and size.width:
        return size.width, size.height
    if not size.shortest_edge or size.longest_edge:
        raise ValueError(f"size must hold 'height' and 'width', or 'shortest_edge' alone; got {dict(size)}.")
    longest = int(size.shortest_edge * max(width, height) / min(width, height))
    return (size.shortest_edge, longest) if width <= height else (longest, size.shortest_edge)


def picture_size(picture: Image.Image | np.ndarray | torch.Tensor) -> tuple[int, int]:
    """The (width, height) of an image or an array (3, H, W)."""
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[2], picture.shape[1])


def channels_first(image: Image.Image | np.ndarray) -> np.ndarray:
    """Views one picture as array (3, H, W)."""
    return image if isinstance(image, np.ndarray) else np.asarray(_as_rgb(image)).transpose(2, 0, 1)


@contextmanager
def _naming(picture: str) -> Iterator[None]:
    """Turns whatever a decoder may raise into one sentence about the named picture."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"There is no image file at {picture}.") from error
    except Exception as error:
        raise ValueError(f"{picture} cannot be read as a picture: {error}".replace("\n", " ")) from error


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:
        logger.warning(f"The metadata of {getattr(image, 'filename', None) or 'a picture'} is unreadable: {error}")
        orientation = 1
    if orientation not in UPRIGHT:
        return image
    turned = image.transpose(UPRIGHT[orientation])
    turned.info = {key: value for key, value in turned.info.items() if key not in ORIENTATION_CARRIERS}
    return turned


def _eight_bits(image: Image.Image) -> Image.Image | np.ndarray:
    return _from_array(np.asarray(image)) if image.mode[0] in "IF" else image


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # spares a warning
    return image.convert("RGB")


def _room_for(pictures: list[np.ndarray], dtype: type, one_block: bool) -> np.ndarray | list[np.ndarray]:
    """Allocates arrays of the pictures' shapes, one block where they agree: then the batch is never copied."""
    shapes = {pixels.shape for pixels in pictures}
    if len(shapes) == 1:
        return np.empty((len(pictures), *shapes.pop()), dtype)
    if one_block:
        sizes = ", ".join(sorted(f"{height}x{width}" for _, height, width in shapes))
        raise ValueError(f"Pictures of sizes {sizes} do not make one tensor: resize them or pass return_tensors=None.")
    return [np.empty(pixels.shape, dtype) for pixels in pictures]


def _leaves(images: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if is_nest(images):
        for index, image in enumerate(images):
            yield from _leaves(image, (*place, str(index)))
    else:
        yield place, images


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "buif")


def is_nest(value: Any) -> bool:
    """Whether it holds pictures rather than being one: a list, a column, a batch array."""
    if _is_array(value):
        return value.ndim == 4
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, bytearray, Mapping, Image.Image))


def _from_array(array: np.ndarray | torch.Tensor, input_data_format: Any = None) -> Image.Image | np.ndarray:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    pixels = _rgb_planes(array, input_data_format)
    if pixels.dtype.kind == "f":
        low, high = pixels.min(), pixels.max()
        if not (low >= 0 and high <= 255):
            raise ValueError(f"A float picture must lie within 0..1 or 0..255, not {low:g}..{high:g}.")
        return pixels.astype(np.float32)
    return Image.fromarray(np.ascontiguousarray(_levels(pixels).transpose(1, 2, 0)))


def _rgb_planes(array: np.ndarray, input_data_format: Any) -> np.ndarray:
    """Brings an array of any accepted layout to (3, H, W)."""
    wrong_shape = (
        f"An array of shape {array.shape} is not a picture: give (H, W), (H, W, C) or (C, H, W), C = 1, 3 or 4."
    )
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(wrong_shape)
    if array.ndim == 2:
        planes = array[None]
    else:
        if input_data_format is None:
            try:
                input_data_format = infer_channel_dimension_format(array, num_channels=(1, 3, 4))
            except ValueError:
                raise ValueError(wrong_shape) from None
        planes = array if ChannelDimension(input_data_format) is ChannelDimension.FIRST else np.moveaxis(array, -1, 0)
    if len(planes) not in (1, 3, 4):
        raise ValueError(wrong_shape)
    return np.repeat(planes, 3, axis=0) if len(planes) == 1 else planes[:3]


def _levels(pixels: np.ndarray) -> np.ndarray:
    """Brings whole numbers to 8 bits."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels * np.uint8(255)
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 65535:
        raise ValueError(f"An integer picture must lie within 0..255 or 0..65535, not {low}..{high}.")
    if pixels.dtype.itemsize == 2 and pixels.dtype.kind == "u" or high > 255:
        pixels = (pixels.astype(np.uint32) + 128) // 257
    return pixels.astype(np.uint8)
