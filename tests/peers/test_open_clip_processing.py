"""CLIP's image processor against open_clip's transform: equal to the last bit."""

from io import BytesIO

import pytest

pytest.importorskip("open_clip")

import numpy as np
import torch
from open_clip.transform import image_transform
from PIL import Image, ImageOps

from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil

SIDE = 224
RNG = np.random.default_rng(0)


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def theirs(picture: Image.Image, side: int = SIDE, **options) -> np.ndarray:
    """open_clip's transform for evaluation: it resizes, crops and then converts to RGB."""
    options = {"is_train": False, "resize_mode": "shortest", "interpolation": "bicubic", **options}
    return image_transform(side, **options)(picture).numpy()


def ours(picture, side: int = SIDE, **options) -> np.ndarray:
    values = MMClipImageProcessorPil(size=side, **options)(picture, return_tensors="pt").pixel_values
    assert values.dtype == torch.float32
    return values[0].numpy()


SHRUNK = [(228, 224), (225, 224), (226, 224), (227, 224), (231, 224), (1024, 683), (500, 375), (640, 427), (769, 511)]
ENLARGED = [(100, 73), (33, 32), (50, 49), (41, 40), (21, 5), (3, 1), (1, 1)]


@pytest.mark.parametrize("sizes", [SHRUNK, ENLARGED], ids=["shrunk", "enlarged"])
def test_the_sizes_cover_every_rounding_of_the_crop(sizes):
    longest = {int(SIDE * max(size) / min(size)) for size in sizes}
    assert {(side - SIDE) % 4 for side in longest} == {0, 1, 2, 3}


@pytest.mark.parametrize("turned", [False, True], ids=["landscape", "portrait"])
@pytest.mark.parametrize("size", [*SHRUNK, *ENLARGED, (224, 224)], ids=str)
def test_rgb_pictures(size, turned):
    picture = Image.fromarray(noise(*(size[::-1] if turned else size)))
    np.testing.assert_array_equal(ours(picture), theirs(picture))


@pytest.mark.parametrize("side", [7, 64, 336])
def test_other_sides(side):
    picture = Image.fromarray(noise(90, 61))
    np.testing.assert_array_equal(ours(picture, side), theirs(picture, side))


def picture_of(mode: str) -> Image.Image:
    picture = Image.fromarray(noise(301, 200, 4), "RGBA")
    return picture.convert("RGB").quantize(16) if mode == "P" else picture.convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "CMYK"])
def test_every_mode_in_their_order_of_conversion(mode):
    picture = picture_of(mode)
    np.testing.assert_array_equal(ours(picture, convert_rgb_first=False), theirs(picture))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_order_of_conversion_does_not_matter_without_palette_and_transparency(mode):
    np.testing.assert_array_equal(ours(picture := picture_of(mode)), theirs(picture))


def test_nor_with_an_opaque_alpha_channel():
    picture = Image.fromarray(noise(301, 200))
    picture.putalpha(255)
    np.testing.assert_array_equal(ours(picture), theirs(picture))


@pytest.mark.parametrize("mode", ["1", "LA", "RGBA", "P"])
def test_our_default_converts_first(mode):
    """By default a palette or varying transparency is resolved before resizing: what theirs makes of an RGB picture."""
    picture = picture_of(mode)
    np.testing.assert_array_equal(ours(picture), theirs(picture.convert("RGB")))
    assert np.abs(ours(picture) - theirs(picture)).max() > 0.1


FILES = [("PNG", "RGB"), ("PNG", "L"), ("PNG", "LA"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB"), ("JPEG", "L")]


@pytest.mark.parametrize(("kind", "mode"), FILES, ids="-".join)
def test_files(kind, mode, tmp_path):
    path = tmp_path / f"picture.{kind.lower()}"
    picture_of(mode).save(path, kind)
    expected = theirs(Image.open(path))
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        np.testing.assert_array_equal(ours(source, convert_rgb_first=False), expected)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_orientation_tags_are_applied_where_theirs_passes_them_over(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(90, 61)).save(file := BytesIO(), "PNG", exif=exif)
    picture = Image.open(file)
    np.testing.assert_array_equal(ours(picture, 64), theirs(ImageOps.exif_transpose(picture), 64))
    assert not np.array_equal(ours(picture, 64), theirs(picture, 64))


def test_16_bits_are_scaled_to_8_where_theirs_cuts_them_off():
    levels = RNG.integers(0, 2**16, (61, 90), dtype=np.uint16)
    picture, scaled = Image.fromarray(levels), Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    np.testing.assert_array_equal(ours(picture, 64), theirs(scaled, 64))
    assert not np.array_equal(ours(picture, 64), theirs(picture, 64))


def test_squashed_pictures():
    picture = Image.fromarray(noise(90, 61))
    squashed = ours(picture, {"height": 64, "width": 64}, do_center_crop=False)
    np.testing.assert_array_equal(squashed, theirs(picture, 64, resize_mode="squash"))


def test_other_means_and_deviations():
    statistics = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    options = {f"image_{name}": value for name, value in statistics.items()}
    picture = Image.fromarray(noise(90, 61))
    np.testing.assert_array_equal(ours(picture, 64, **options), theirs(picture, 64, **statistics))
