import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import is_torchvision_available

import hf_mm  # noqa: F401 - registers the processors
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessor, MMClipImageProcessorPil

RNG = np.random.default_rng(0)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def noise(width, height, channels=3):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def normalised(cropped):
    scaled = np.asarray(cropped).astype(np.float32) / np.float32(255)
    return ((scaled - MEAN) / STD).transpose(2, 0, 1)


def published_recipe(image, n):
    """The recipe of the original code, written out: resize, centre crop, RGB, to floats, normalise."""
    width, height = image.size
    short, long = sorted(image.size)
    if short != n:
        longest = int(n * long / short)
        image = image.resize((n, longest) if width <= height else (longest, n), Image.Resampling.BICUBIC)
    left = int(round((image.width - n) / 2.0))
    top = int(round((image.height - n) / 2.0))
    return normalised(image.crop((left, top, left + n, top + n)).convert("RGB"))


SIZES = [  # (long side after resizing - 224) mod 4 = 0, 1, 2, 3 at each group
    *[(228, 224), (225, 224), (226, 224), (227, 224), (231, 224)],
    *[(1024, 683), (500, 375), (640, 480), (640, 427), (100, 73), (90, 225), (33, 32), (1, 1), (3, 1), (224, 224)],
]


def test_the_sizes_cover_every_rounding_of_the_crop():
    longest = {int(224 * max(size) / min(size)) for size in SIZES}
    assert {(side - 224) % 4 for side in longest} == {0, 1, 2, 3}


@pytest.mark.parametrize("turned", [False, True], ids=["landscape", "portrait"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equal_to_the_published_recipe_to_the_last_bit(size, turned):
    image = Image.fromarray(noise(*(size[::-1] if turned else size)))
    values = MMClipImageProcessorPil()(image, return_tensors="pt").pixel_values
    assert values.dtype == torch.float32
    assert values.shape == (1, 3, 224, 224)
    np.testing.assert_array_equal(values[0].numpy(), published_recipe(image, 224))


@pytest.mark.parametrize("n", [7, 32, 64, 336])
def test_size_alone_sets_the_crop_too(n):
    image = Image.fromarray(noise(90, 61))
    expected = published_recipe(image, n)
    for processor in (
        MMClipImageProcessorPil(size=n),
        MMClipImageProcessorPil(size={"shortest_edge": n}),
        MMClipImageProcessorPil(size={"shortest_edge": n}, crop_size={"height": n, "width": n}),
    ):
        np.testing.assert_array_equal(processor(image).pixel_values[0], expected)
    np.testing.assert_array_equal(MMClipImageProcessorPil()(image, size=n).pixel_values[0], expected)


def test_differs_from_transformers_only_where_its_crop_is_off_by_one():
    theirs = CLIPImageProcessorPil()
    ours = MMClipImageProcessorPil()
    same = [Image.fromarray(noise(width, 224)) for width in (224, 225, 226, 228)]
    np.testing.assert_array_equal(
        ours(same, return_tensors="np").pixel_values, theirs(same, return_tensors="np").pixel_values
    )
    shifted = Image.fromarray(noise(227, 224))
    assert np.abs(ours(shifted).pixel_values[0] - theirs(shifted).pixel_values[0]).max() > 1


def test_palette_is_converted_before_resizing_unless_parity_is_asked_for():
    image = Image.fromarray(noise(90, 61)).quantize(16)
    first = MMClipImageProcessorPil(size=32)(image).pixel_values[0]
    last = MMClipImageProcessorPil(size=32, convert_rgb_first=False)(image).pixel_values[0]
    np.testing.assert_array_equal(first, published_recipe(image.convert("RGB"), 32))
    np.testing.assert_array_equal(last, published_recipe(image, 32))
    assert not np.array_equal(first, last)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK"])
def test_the_original_order_of_conversion_for_other_modes(mode):
    image = Image.fromarray(noise(90, 61, 4), "RGBA").convert(mode)
    last = MMClipImageProcessorPil(size=32, convert_rgb_first=False)(image).pixel_values[0]
    np.testing.assert_array_equal(last, published_recipe(image, 32))


def test_grey_arrays_equal_the_grey_image():
    """F02: every grey form equals the PIL image in mode L."""
    grey = noise(28, 28)[..., 0]
    processor = MMClipImageProcessorPil(size=16)
    expected = processor(Image.fromarray(grey)).pixel_values[0]
    np.testing.assert_array_equal(expected, published_recipe(Image.fromarray(grey), 16))
    forms = [grey, torch.from_numpy(grey), grey[..., None], grey[None]]
    for values in processor(forms).pixel_values:
        np.testing.assert_array_equal(values, expected)


def test_four_channel_arrays_equal_the_image_with_alpha():
    """F02: four channels equal the PIL image in mode RGBA."""
    rgba = noise(28, 28, 4)
    processor = MMClipImageProcessorPil(size=16)
    np.testing.assert_array_equal(processor(rgba).pixel_values, processor(Image.fromarray(rgba, "RGBA")).pixel_values)


def test_a_batch_equals_its_pictures_one_by_one():
    images = [noise(40, 30), Image.fromarray(noise(30, 40)), torch.from_numpy(noise(64, 9)).permute(2, 0, 1)]
    processor = MMClipImageProcessorPil(size=16)
    batch = processor(images, return_tensors="pt").pixel_values
    for values, image in zip(batch, images, strict=True):
        assert torch.equal(values, processor(image, return_tensors="pt").pixel_values[0])
    assert torch.equal(batch, processor([images[:1], images[1:]], return_tensors="pt").pixel_values)


@pytest.mark.parametrize("resize", [True, False])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_floats_within_one_equal_the_integers(resize, as_tensor):
    """F03: floats in 0..1 equal the integers, resized or not."""
    integers = noise(48, 40) if resize else noise(32, 32)
    floats = np.float32(integers) / 255
    floats = torch.from_numpy(floats).permute(2, 0, 1) if as_tensor else floats
    processor = MMClipImageProcessorPil(size=32, do_resize=resize, do_normalize=False)
    from_floats = processor(floats, do_rescale=False).pixel_values[0]
    np.testing.assert_allclose(from_floats, processor(integers).pixel_values[0], rtol=0, atol=1e-6)
    assert 0.9 < from_floats.max() <= 1


def test_floats_that_are_not_resized_keep_their_precision():
    """F03: floats in 0..1 are not brought to 0..255 on the way."""
    floats = RNG.random((3, 8, 8), dtype=np.float32)
    processor = MMClipImageProcessorPil(size=8, do_rescale=False, do_normalize=False)
    np.testing.assert_array_equal(processor(floats).pixel_values[0], floats)


def test_floats_up_to_255_are_rescaled():
    """F03: floats in 0..255 are divided once."""
    integers = noise(48, 40)
    processor = MMClipImageProcessorPil(size=32)
    np.testing.assert_array_equal(
        processor(integers.astype(np.float64)).pixel_values, processor(integers).pixel_values
    )


def test_floats_within_one_are_not_divided_by_255_again():
    """F03: a second division is refused, not black pictures given back."""
    with pytest.raises(ValueError, match="Image 1: .*do_rescale=False"):
        MMClipImageProcessorPil()([noise(9, 9), np.float32(noise(9, 9)) / 255])


def test_black_float_pictures_pass():
    """F03: a picture that is black is no second division."""
    values = MMClipImageProcessorPil(size=8, do_normalize=False)(np.zeros((9, 9, 3))).pixel_values
    assert not np.any(values)


@pytest.mark.parametrize("size", [(1, 131), (1, 1000), (130, 1), (7, 1001), (2, 777), (16, 3000)], ids=str)
def test_strips_equal_the_whole_recipe(size):
    image = Image.fromarray(noise(*size))
    values = MMClipImageProcessorPil(size=16)(image).pixel_values[0]
    expected = published_recipe(image, 16)
    if max(size) % min(size) == 0:
        np.testing.assert_array_equal(values, expected)
    else:  # the scale of the long side differs in the fourth digit
        np.testing.assert_allclose(values * STD[:, None, None], expected * STD[:, None, None], rtol=0, atol=2.01 / 255)
    array = MMClipImageProcessorPil(size=16)(np.asarray(image), input_data_format="channels_last").pixel_values[0]
    np.testing.assert_array_equal(array, values)


def test_a_very_long_strip_needs_little_memory():
    image = Image.fromarray(np.repeat(np.arange(201, dtype=np.uint8), 301)[None])
    values = MMClipImageProcessorPil(size=224, do_normalize=False)(image).pixel_values[0]
    np.testing.assert_array_equal(values, np.full((3, 224, 224), np.float32(100) / 255, np.float32))


def test_a_picture_smaller_than_the_crop_gets_black_margins():
    image = noise(5, 6)
    processor = MMClipImageProcessorPil(crop_size=9, do_resize=False, do_rescale=False, do_normalize=False)
    expected = np.zeros((9, 9, 3), np.float32)
    expected[1:7, 2:7] = image
    np.testing.assert_array_equal(processor(image).pixel_values[0], expected.transpose(2, 0, 1))


def test_a_rectangle_can_be_squashed_and_cropped_to():
    image = Image.fromarray(noise(50, 40))
    processor = MMClipImageProcessorPil(size={"height": 12, "width": 20}, do_center_crop=False)
    expected = normalised(image.resize((20, 12), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(processor(image).pixel_values[0], expected)


def test_pictures_of_several_sizes_stay_a_list_or_are_refused():
    images = [noise(5, 6), noise(7, 6)]
    processor = MMClipImageProcessorPil(do_resize=False, do_center_crop=False)
    assert [values.shape for values in processor(images).pixel_values] == [(3, 6, 5), (3, 6, 7)]
    with pytest.raises(ValueError, match="6x5, 6x7"):
        processor(images, return_tensors="pt")


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        ([noise(5, 5), None], ValueError, "Image 1: .*missing"),
        ([[noise(5, 5)], [noise(5, 5), "no/file.jpg"]], FileNotFoundError, "Image 1.1: .*no/file.jpg"),
        ([noise(5, 5), 3], TypeError, "Image 1: .*int"),
        ([noise(5, 5, 2)], ValueError, r"Image 0: .*\(5, 5, 2\)"),
        ([], ValueError, "empty"),
    ],
)
def test_the_bad_picture_of_a_batch_is_named(images, error, words):
    """F02, F04: a missing picture, or one of two channels, is named by its place."""
    with pytest.raises(error, match=words):
        MMClipImageProcessorPil()(images)


@pytest.mark.parametrize("options", [{"do_convert_rgb": False}, {"do_pad": True, "pad_size": 9}])
def test_options_that_do_nothing_here_are_refused(options):
    with pytest.raises(ValueError, match="leave do_convert_rgb and do_pad out"):
        MMClipImageProcessorPil()(noise(9, 9), **options)


def test_an_impossible_size_is_refused():
    with pytest.raises(ValueError, match="shortest_edge"):
        MMClipImageProcessorPil(size={"shortest_edge": 9, "longest_edge": 12})(noise(9, 9))


SETTINGS = {
    "size": {"shortest_edge": 40},
    "crop_size": {"height": 36, "width": 32},
    "resample": 2,
    "do_rescale": False,
    "rescale_factor": 0.5,
    "do_normalize": False,
    "image_mean": (0.1, 0.2, 0.3),
    "image_std": (0.4, 0.5, 0.6),
    "convert_rgb_first": False,
    "do_resize": False,
    "do_center_crop": False,
}


def test_every_setting_survives_saving(tmp_path):
    MMClipImageProcessorPil(**SETTINGS).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "MMClipImageProcessor"
    for reopened in (
        MMClipImageProcessorPil.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path, backend="pil"),
    ):
        assert type(reopened) is MMClipImageProcessorPil
        assert {name: getattr(reopened, name) for name in SETTINGS} == SETTINGS


def test_settings_of_transformers_clip_are_read():
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=32, image_mean=[0.1, 0.2, 0.3])
    ours = MMClipImageProcessorPil(**theirs.to_dict())
    image = noise(50, 60)
    np.testing.assert_array_equal(ours(image).pixel_values, theirs(image).pixel_values)


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
@pytest.mark.parametrize("size", [(100, 73), (227, 224), (20, 9), (1, 3000)], ids=str)
def test_the_torchvision_twin_is_within_two_grey_levels(size):
    image = Image.fromarray(noise(*size))
    options = {"size": 224, "do_normalize": False, "return_tensors": "pt"}
    twin, ours = MMClipImageProcessor()(image, **options), MMClipImageProcessorPil()(image, **options)
    levels = 255 * (twin.pixel_values - ours.pixel_values).abs()
    assert levels.max() < 2.01
    assert levels.mean() < 0.3


@pytest.mark.parametrize("size", [(37, 61), (90, 45), (32, 32), (20, 24)])
@pytest.mark.parametrize("settings", [{}, {"do_center_crop": False, "size": {"height": 24, "width": 30}}])
def test_fitting_and_then_normalising_levels_is_what_calling_does(size, settings):
    random = np.random.default_rng(3)
    picture = Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))
    processor = MMClipImageProcessorPil(**{"size": 32, **settings})
    levels = processor.fit(picture)
    assert levels.dtype == torch.uint8
    called = processor(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.normalize_levels(levels[None]), called)
    rescaled = processor.normalize_levels(levels[None].float() / 255)
    torch.testing.assert_close(rescaled, called, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
def test_normalising_levels_keeps_to_the_settings(settings):
    picture = Image.new("RGB", (40, 40), (10, 128, 250))
    processor = MMClipImageProcessorPil(size=32, **settings)
    called = processor(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.normalize_levels(processor.fit(picture)[None]), called)
