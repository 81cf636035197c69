import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import is_torchvision_available

import hf_mm  # noqa: F401 - registers the processors
from hf_mm.models.vit.image_processing_vit import MMViTImageProcessor, MMViTImageProcessorPil

RNG = np.random.default_rng(0)


def noise(width, height):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


SIZES = [(100, 73), (31, 90), (224, 224), (20, 9), (1, 1), (300, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("target", [{"height": 32, "width": 48}, {"height": 224, "width": 224}], ids=str)
def test_antialiased_resizing_equals_transformers_to_the_last_bit(size, target):
    image = Image.fromarray(noise(*size))
    ours = MMViTImageProcessorPil(size=target)(image, return_tensors="np").pixel_values
    theirs = ViTImageProcessorPil(size=target)(image, return_tensors="np").pixel_values
    assert ours.shape == (1, 3, target["height"], target["width"])
    np.testing.assert_array_equal(ours, theirs)


def bilinear_weights(source, target):
    """Rows of the matrix that resizes one axis by bilinear interpolation between pixel centres, without low-pass."""
    centres = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(source)))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resizing_without_antialias_is_bilinear_on_floats(size):
    pixels = noise(*size)
    processor = MMViTImageProcessorPil(size={"height": 32, "width": 48}, antialias=False)
    rows, columns = bilinear_weights(size[1], 32), bilinear_weights(size[0], 48)
    expected = np.einsum("ih,hwc,jw->cij", rows, pixels, columns) / 127.5 - 1
    values = processor(Image.fromarray(pixels)).pixel_values[0]
    np.testing.assert_allclose(values, expected, rtol=0, atol=5e-5)  # float32 coordinates up to 300


def test_resizing_without_antialias_by_hand():
    row = np.array([[0, 100, 20, 60]], np.uint8)
    processor = MMViTImageProcessorPil(size={"height": 1, "width": 2}, antialias=False, do_normalize=False)
    np.testing.assert_allclose(processor(row).pixel_values[0, 0], [[50 / 255, 40 / 255]], rtol=1e-6)
    processor = MMViTImageProcessorPil(size={"height": 1, "width": 1}, antialias=False, do_normalize=False)
    np.testing.assert_allclose(processor(row).pixel_values[0, 0], [[60 / 255]], rtol=1e-6)


def test_antialias_can_be_chosen_per_call():
    pixels = noise(100, 73)
    processor = MMViTImageProcessorPil(size=32)
    np.testing.assert_array_equal(
        processor(pixels, antialias=False).pixel_values,
        MMViTImageProcessorPil(size=32, antialias=False)(pixels).pixel_values,
    )
    assert np.abs(processor(pixels).pixel_values - processor(pixels, antialias=False).pixel_values).max() > 0.1


@pytest.mark.parametrize("antialias", [True, False])
def test_black_and_white_become_minus_one_and_one(antialias):
    images = [Image.new("RGB", (40, 30), colour) for colour in ("black", "white")]
    values = MMViTImageProcessorPil(size=16, antialias=antialias)(images).pixel_values
    np.testing.assert_array_equal(values[0], np.full((3, 16, 16), -1, np.float32))
    np.testing.assert_array_equal(values[1], np.full((3, 16, 16), 1, np.float32))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("resize", [True, False])
def test_floats_within_one_equal_the_integers(antialias, resize):
    """F03: floats in 0..1 equal the integers, resized or not."""
    integers = noise(48, 40) if resize else noise(32, 32)
    processor = MMViTImageProcessorPil(size=32, antialias=antialias, do_resize=resize)
    np.testing.assert_allclose(
        processor(np.float32(integers) / 255, do_rescale=False).pixel_values,
        processor(integers).pixel_values,
        rtol=0,
        atol=1e-6,
    )


def test_floats_within_one_are_not_divided_by_255_again():
    """F03: a second division is refused, not black pictures given back."""
    with pytest.raises(ValueError, match="Image 1: .*do_rescale=False"):
        MMViTImageProcessorPil()([noise(9, 9), np.float32(noise(9, 9)) / 255])


@pytest.mark.parametrize("antialias", [True, False])
def test_arrays_equal_the_image_they_stand_for(antialias):
    """F02: every grey form equals the PIL image in mode L, and four channels the one in mode RGBA."""
    grey, rgba = noise(28, 28)[..., 0], RNG.integers(0, 256, (28, 28, 4), dtype=np.uint8)
    processor = MMViTImageProcessorPil(size=16, antialias=antialias)
    expected = processor(Image.fromarray(grey).convert("RGB")).pixel_values[0]
    for values in processor([grey, torch.from_numpy(grey), grey[..., None], grey[None]]).pixel_values:
        np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(processor(rgba).pixel_values, processor(Image.fromarray(rgba[..., :3])).pixel_values)


def test_a_cast_reaches_the_pixels():
    """F14: what a model in half precision is fed can be cast where it is made."""
    batch = MMViTImageProcessorPil(size=16)(noise(20, 20), return_tensors="pt")
    pixels = batch.pixel_values
    assert torch.equal(batch.to(torch.bfloat16).pixel_values, pixels.to(torch.bfloat16))


@pytest.mark.parametrize("antialias", [True, False])
def test_a_batch_equals_its_pictures_one_by_one(antialias):
    images = [noise(40, 30)[..., 0], Image.fromarray(noise(30, 40)), torch.from_numpy(noise(64, 9))]
    processor = MMViTImageProcessorPil(size=16, antialias=antialias)
    batch = processor(images, return_tensors="pt").pixel_values
    for values, image in zip(batch, images, strict=True):
        assert torch.equal(values, processor(image, return_tensors="pt").pixel_values[0])


def test_only_bilinear_goes_without_antialias():
    with pytest.raises(ValueError, match="bilinear"):
        MMViTImageProcessorPil(antialias=False, resample=Image.Resampling.BICUBIC)(noise(9, 9))


SETTINGS = {
    "size": {"height": 40, "width": 20},
    "resample": 3,
    "do_rescale": False,
    "rescale_factor": 0.5,
    "do_normalize": False,
    "image_mean": (0.1, 0.2, 0.3),
    "image_std": (0.4, 0.5, 0.6),
    "antialias": False,
    "do_resize": False,
}


def test_every_setting_survives_saving(tmp_path):
    MMViTImageProcessorPil(**SETTINGS).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "MMViTImageProcessor"
    for reopened in (
        MMViTImageProcessorPil.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path, backend="pil"),
    ):
        assert type(reopened) is MMViTImageProcessorPil
        assert {name: getattr(reopened, name) for name in SETTINGS} == SETTINGS


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_torchvision_twin_is_within_two_grey_levels(size, antialias):
    image = Image.fromarray(noise(*size))
    options = {"size": 48, "do_normalize": False, "antialias": antialias, "return_tensors": "pt"}
    twin, ours = MMViTImageProcessor()(image, **options), MMViTImageProcessorPil()(image, **options)
    levels = 255 * (twin.pixel_values - ours.pixel_values).abs()
    assert levels.max() < 2.01
    assert levels.mean() < 0.3
