"""The crop rule by brute force over small sizes, and what is cut from strips before they are resized."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import SizeDict

from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil, _crop_follows_size, _middle_of_strip

SIDES = range(1, 7)


def kept(side: int, crop: int) -> list[int | None]:
    """Which places of one axis the crop shows, None for black: the lower half of the margin first, halves to even."""
    missing = max(crop - side, 0)
    places = [None] * (missing // 2) + list(range(side)) + [None] * (missing - missing // 2)
    half, odd = divmod(len(places) - crop, 2)
    first = half + half % 2 if odd else half
    return places[first : first + crop]


def test_crop_shows_the_same_places_as_the_rule_says():
    processor = MMClipImageProcessorPil()
    for height, width, crop_height, crop_width in itertools.product(SIDES, repeat=4):
        image = np.arange(1, 1 + 2 * height * width).reshape(2, height, width)
        cropped = processor.center_crop(image, SizeDict(height=crop_height, width=crop_width))
        rows, columns = kept(height, crop_height), kept(width, crop_width)
        expected = [
            [[0 if None in (row, column) else plane[row, column] for column in columns] for row in rows]
            for plane in image
        ]
        np.testing.assert_array_equal(cropped, expected, err_msg=f"{height}x{width} to {crop_height}x{crop_width}")


@pytest.mark.parametrize("side", range(1, 5))
def test_margins_of_any_width_leave_the_picture_in_the_middle(side):
    processor = MMClipImageProcessorPil()
    image = np.arange(1, 1 + side).reshape(1, 1, side)
    for crop in range(1, 40):
        for turned in (image, image.swapaxes(1, 2)):
            size = SizeDict(height=crop, width=1) if turned.shape[1] > 1 else SizeDict(height=1, width=crop)
            cropped = processor.center_crop(turned, size).ravel()
            assert cropped.tolist() == [0 if place is None else place + 1 for place in kept(side, crop)]


@pytest.mark.parametrize("side", [224 + extra for extra in range(9)])
def test_crop_rounds_halves_to_even_as_the_reference_does(side):
    image = np.arange(224 * side).reshape(1, 224, side)
    cropped = MMClipImageProcessorPil().center_crop(image, SizeDict(height=224, width=224))
    left = int(round((side - 224) / 2.0))
    np.testing.assert_array_equal(cropped, image[..., left : left + 224])


LENGTHS = [(short, long) for short in (1, 2, 3) for long in range(98 * short, 112 * short)]
LENGTHS += [(1, 997), (1, 998), (1, 999), (1, 1000), (2, 2001), (5, 4444), (7, 700), (7, 708), (40, 40)]


def strip(short: int, long: int, form: str, upright: bool):
    """A strip whose every place along the long side has its own value, as one of the forms that the processor opens."""
    values = np.arange(long).repeat(short).reshape(long, short) if upright else np.arange(long)[None].repeat(short, 0)
    if form == "picture":
        return Image.fromarray(values.astype(np.int32), "I")
    array = np.stack([values, values + 1])
    return torch.from_numpy(array) if form == "tensor" else array


def along(cut, upright: bool) -> np.ndarray:
    """The places that are left of a strip, and with how many rows across."""
    values = np.asarray(cut) if isinstance(cut, Image.Image) else np.asarray(cut)[0]
    values = values.T if not upright else values
    assert (values == values[:, :1]).all()
    return values


@pytest.mark.parametrize("upright", [False, True], ids=["lying", "upright"])
@pytest.mark.parametrize("form", ["picture", "array", "tensor"])
def test_strips_lose_as_much_at_both_ends(form, upright):
    for short, long in LENGTHS:
        left = along(_middle_of_strip(strip(short, long, form, upright)), upright)
        assert left.shape[1] == short
        first, last = int(left[0, 0]), int(left[-1, 0])
        assert last == long - 1 - first, "the middle is still the middle"
        np.testing.assert_array_equal(left[:, 0], np.arange(first, last + 1))
        if long // short <= 100:
            assert first == 0, f"{short}x{long} loses nothing"
        else:
            assert first % (2 * short) == 0 and first > 0, "a multiple of twice the width goes"
            assert 97 <= len(left) // short <= 100, "what is left is about 100 times as long as wide"


def test_nothing_is_copied_where_nothing_is_cut():
    for form in ("picture", "array", "tensor"):
        image = strip(2, 200, form, upright=True)
        assert _middle_of_strip(image) is image


@pytest.mark.parametrize("size", [7, {"shortest_edge": 7}, SizeDict(shortest_edge=7)], ids=str)
def test_a_size_of_its_own_sets_the_crop(size):
    assert _crop_follows_size({"size": size})["crop_size"] == 7
    assert _crop_follows_size({"size": size, "crop_size": 5})["crop_size"] == 5


@pytest.mark.parametrize("options", [{}, {"size": None}, {"size": {"height": 4, "width": 5}}], ids=str)
def test_no_size_or_a_rectangle_leaves_the_crop_alone(options):
    assert _crop_follows_size(options) == options
