import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_mm.image_utils import flatten_images, load_picture, to_rgb

RNG = np.random.default_rng(0)
RGBA = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
RGB = np.ascontiguousarray(RGBA[..., :3])
GREY = np.ascontiguousarray(RGBA[..., 0])
WIDE = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


def grey_to_rgb(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


def eight_bits(wide):
    return np.rint(wide.astype(np.float64) / 257).astype(np.uint8)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "CMYK", "YCbCr", "HSV", "P", "LA", "PA"])
def test_modes_of_pil_become_rgb_by_pils_own_conversion(mode):
    image = Image.fromarray(RGB).convert("P" if mode == "PA" else mode).convert(mode)
    np.testing.assert_array_equal(pixels(to_rgb(image)), np.asarray(image.convert("RGB")))


def test_transparency_is_dropped_not_blended():
    np.testing.assert_array_equal(pixels(to_rgb(Image.fromarray(RGBA, "RGBA"))), RGB)
    grey_alpha = Image.fromarray(np.ascontiguousarray(RGBA[..., :2]), "LA")
    np.testing.assert_array_equal(pixels(to_rgb(grey_alpha)), grey_to_rgb(GREY))


def test_palette_with_transparency_keeps_the_colours_of_the_palette(recwarn):
    palette = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
    indices = RNG.integers(0, 4, (5, 7), dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    reopened = Image.open(io.BytesIO(encoded(image, transparency=bytes([0, 128, 255, 0]))))
    assert reopened.mode == "P" and isinstance(reopened.info["transparency"], bytes)
    np.testing.assert_array_equal(pixels(to_rgb(reopened)), palette[indices])
    assert not list(recwarn)


@pytest.mark.parametrize(
    "wide",
    [
        WIDE,
        torch.from_numpy(WIDE.astype(np.int32)),
        Image.fromarray(WIDE),
        Image.fromarray(WIDE.astype(np.int32)),
        encoded(Image.fromarray(WIDE)),
        encoded(Image.fromarray(WIDE), "TIFF"),
    ],
    ids=["uint16", "int32 tensor", "I;16", "I", "png", "tiff"],
)
def test_sixteen_bits_are_scaled_to_eight(wide):
    np.testing.assert_array_equal(pixels(to_rgb(wide)), grey_to_rgb(eight_bits(WIDE)))


def test_every_sixteen_bit_level_rounds_to_the_nearest():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(pixels(to_rgb(levels))[..., 0], eight_bits(levels))


def test_wide_integers_without_large_values_are_eight_bit_pictures():
    np.testing.assert_array_equal(pixels(to_rgb(RGB.astype(np.int64))), RGB)
    np.testing.assert_array_equal(pixels(to_rgb(Image.fromarray(GREY.astype(np.int32)))), grey_to_rgb(GREY))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (GREY, grey_to_rgb(GREY)),
        (GREY[..., None], grey_to_rgb(GREY)),
        (GREY[None], grey_to_rgb(GREY)),
        (RGB, RGB),
        (RGB.transpose(2, 0, 1), RGB),
        (RGBA, RGB),
        (RGBA.transpose(2, 0, 1), RGB),
        (GREY > 127, grey_to_rgb(np.uint8(255) * (GREY > 127))),
    ],
    ids=["HW", "HW1", "1HW", "HW3", "3HW", "HW4", "4HW", "bool"],
)
def test_layouts_of_arrays(array, expected, as_tensor):
    """F02: a grey or four-channel array is read like the picture it stands for."""
    picture = torch.from_numpy(np.ascontiguousarray(array)) if as_tensor else array
    np.testing.assert_array_equal(pixels(to_rgb(picture)), expected)


def test_an_array_that_could_be_either_way_is_read_channels_first():
    cube = RNG.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels(to_rgb(cube)), cube.transpose(1, 2, 0))
    np.testing.assert_array_equal(np.asarray(load_picture(cube, "channels_last")), cube)
    with pytest.raises(ValueError, match=r"\(8, 8, 3\)"):
        load_picture(np.zeros((8, 8, 3), np.uint8), "channels_first")


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.float32])
def test_float_pictures_equal_the_integers_they_came_from(kind, scale):
    """F03: floats up to 1 and floats up to 255 are told apart."""
    floats = RGB.astype(np.float64) / scale
    floats = torch.from_numpy(floats).to(kind).requires_grad_() if kind is torch.float32 else floats.astype(kind)
    np.testing.assert_array_equal(pixels(to_rgb(floats)), RGB)


def test_bfloat16_tensors_and_float_images():
    levels = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.bfloat16)
    assert pixels(to_rgb(levels))[0, :, 0].tolist() == [0, 128, 255]
    np.testing.assert_array_equal(pixels(to_rgb(Image.fromarray(np.float32(GREY)))), grey_to_rgb(GREY))


UPRIGHT = {  # what the stored rows and columns become, by the definition of the tag
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


def tagged_file(picture, orientation, format, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(picture), format, exif=exif, **options)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_is_applied_once_from_every_source(orientation, format, tmp_path, caplog):
    """F01: the orientation tag is neither ignored nor applied twice."""
    data = tagged_file(RGB, orientation, format, **({"lossless": True} if format == "WEBP" else {}))
    path = tmp_path / "photo"
    path.write_bytes(data)
    expected = UPRIGHT[orientation](RGB)
    for source in (path, str(path), data, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}):
        np.testing.assert_array_equal(pixels(to_rgb(source)), expected)
    once = to_rgb(Image.open(path))
    np.testing.assert_array_equal(pixels(once), expected)
    np.testing.assert_array_equal(pixels(to_rgb(once)), expected)
    assert not caplog.text


def test_a_photograph_on_its_side_is_turned():
    """F01: a sideways JPEG is stood upright."""
    stored = np.zeros((40, 64, 3), np.uint8)
    stored[:, :32, 0] = 255
    turned = pixels(to_rgb(tagged_file(stored, 6, "JPEG")))
    assert turned.shape == (64, 40, 3)
    assert (turned[:32, :, 0] > 127).all()
    assert (turned[32:, :, 0] < 127).all()


def test_orientation_in_xmp_alone_is_applied_once():
    """F01: the tag counts also where only XMP holds it."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    once = to_rgb(encoded(Image.fromarray(RGB), "WEBP", xmp=xmp, lossless=True))
    np.testing.assert_array_equal(pixels(once), np.rot90(RGB, -1))
    np.testing.assert_array_equal(pixels(to_rgb(once)), np.rot90(RGB, -1))


def test_xmp_that_is_no_text_does_not_stop_the_picture():
    """F01: XMP that is not UTF-8 does not end a run."""
    png = encoded(Image.fromarray(RGB))
    body = b"iTXt" + b"XML:com.adobe.xmp\0\0\0\0\0" + b"\xff\xfe tiff:Orientation \xc3"
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    after_header = 8 + 25
    np.testing.assert_array_equal(pixels(to_rgb(png[:after_header] + chunk + png[after_header:])), RGB)


@pytest.mark.parametrize(
    "info",
    [
        {"exif": b"Exif\0\0not a tag list"},
        {"XML:com.adobe.xmp": b"\xff\xfe"},
        {"Raw profile type exif": "\nexif\n2\nzz"},
    ],
)
def test_broken_metadata_is_passed_over_with_a_warning(info, caplog):
    """F01: a broken metadata block costs a warning, not the picture."""
    image = Image.fromarray(RGB)
    image.info.update(info)
    np.testing.assert_array_equal(pixels(to_rgb(image)), RGB)
    assert "metadata" in caplog.text


def test_one_pixel_pictures():
    for shape in ((1, 1, 3), (9, 1, 3), (1, 9, 3)):
        array = RNG.integers(0, 256, shape, dtype=np.uint8)
        np.testing.assert_array_equal(pixels(to_rgb(encoded(Image.fromarray(array)))), array)


@pytest.mark.parametrize(
    ("picture", "error", "words"),
    [
        (None, ValueError, "missing"),
        ({"bytes": None, "path": None}, ValueError, "missing"),
        ("no/such/file.png", FileNotFoundError, "no/such/file.png"),
        (Path("no/such/file.png"), FileNotFoundError, "no/such/file.png"),
        (b"GIF89a but no more", ValueError, "in memory"),
        (3, TypeError, "int is not a picture"),
        (np.zeros((8, 8, 5), np.uint8), ValueError, r"\(8, 8, 5\)"),
        (np.zeros((2, 8, 8), np.uint8), ValueError, r"\(2, 8, 8\)"),
        (np.zeros(8, np.uint8), ValueError, r"\(8,\)"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, r"\(0, 8, 3\)"),
        (np.full((8, 8), -1), ValueError, "-1..-1"),
        (np.full((8, 8), 70000), ValueError, "70000"),
        (np.full((8, 8), 300.0), ValueError, "300..300"),
        (np.full((8, 8), -0.5), ValueError, "-0.5"),
        (np.full((8, 8), np.nan), ValueError, "nan"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_sentence(picture, error, words):
    """F02, F03: a wrong number of channels or range of values is named."""
    with pytest.raises(error, match=words) as raised:
        to_rgb(picture)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"no picture", encoded(Image.fromarray(RGB))[:-40]])
def test_unreadable_files_are_named(content, tmp_path):
    """F04: a file that cannot be read is named."""
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.png"):
        to_rgb(path)


def test_a_picture_opened_but_not_yet_read_is_named_too(tmp_path):
    """F04: also when it turns out late that a file is truncated."""
    path = tmp_path / "broken.png"
    path.write_bytes(encoded(Image.fromarray(RGB))[:-40])
    with pytest.raises(ValueError, match="broken.png"):
        to_rgb(Image.open(path))


def test_data_urls_are_read_or_refused():
    url = "data:image/png;base64," + base64.b64encode(encoded(Image.fromarray(RGB))).decode()
    np.testing.assert_array_equal(pixels(to_rgb(url)), RGB)
    with pytest.raises(ValueError, match="data:image/png;base64,AAAA cannot be read"):
        to_rgb("data:image/png;base64,AAAA")


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image file"):
        to_rgb(tmp_path)


@pytest.mark.parametrize(
    ("nest", "names"),
    [
        (GREY, ["The image"]),
        ([GREY], ["Image 0"]),
        ((GREY, RGB), ["Image 0", "Image 1"]),
        (iter([GREY, RGB]), ["Image 0", "Image 1"]),
        (np.stack([RGB, RGB]), ["Image 0", "Image 1"]),
        (torch.zeros(2, 3, 5, 7), ["Image 0", "Image 1"]),
        (np.array(["a.png", "b.png"]), ["Image 0", "Image 1"]),
        ([[GREY], [RGB, RGB], []], ["Image 0.0", "Image 1.0", "Image 1.1"]),
        ([[[GREY]], np.stack([RGB, RGB])], ["Image 0.0.0", "Image 1.0", "Image 1.1"]),
        ([{"bytes": b"x", "path": None}, "a.png", None], ["Image 0", "Image 1", "Image 2"]),
    ],
)
def test_any_nesting_is_flattened_in_order_and_named(nest, names):
    assert [name for name, _ in flatten_images(nest)] == names


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="empty"):
        list(flatten_images([]))
