"""Preprocessing of published CLIP checkpoints: read, refused, written back, and warned of where it differs."""

import numpy as np
import pytest
import torch
from contract.cases import pictures, tokenizer
from PIL import Image
from published_clips import our_model
from transformers import CLIPProcessor

from hf_mm.conversion import layouts
from hf_mm.conversion import pictures as pictures_of_configs
from hf_mm.models.clip import conversion_clip
from hf_mm.models.clip.conversion_clip import image_processor_from_transformers, save_as_transformers
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.open_clip_config import image_processor_from_open_clip, open_clip_preprocessing
from hf_mm.models.clip.processing_clip import MMClipProcessor


def test_preprocessing_of_open_clip():
    declared = {"mean": [0.5, 0.4, 0.3], "std": 0.5, "interpolation": "bilinear", "resize_mode": "shortest"}
    processor = image_processor_from_open_clip(declared, 32)
    assert list(processor.image_mean) == [0.5, 0.4, 0.3]
    assert list(processor.image_std) == [0.5] * 3
    assert processor.resample == Image.Resampling.BILINEAR
    assert processor([Image.new("RGB", (50, 40))], return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
    default = image_processor_from_open_clip({}, 32)
    reference = MMClipImageProcessorPil(size=32, convert_rgb_first=False)
    for picture in pictures(3):
        ours, theirs = (process(picture, return_tensors="pt").pixel_values for process in (default, reference))
        assert torch.equal(ours, theirs)


def test_squashing_to_a_rectangle():
    processor = image_processor_from_open_clip({"resize_mode": "squash"}, (16, 32))
    picture = pictures(1)[0]
    pixels = processor(picture, do_rescale=False, do_normalize=False).pixel_values[0]
    squashed = picture.resize((32, 16), Image.Resampling.BICUBIC)
    assert torch.equal(
        torch.tensor(pixels), torch.tensor(list(squashed.tobytes())).reshape(16, 32, 3).permute(2, 0, 1)
    )


@pytest.mark.parametrize(("mode", "size"), [("longest", 32), ("shortest", (16, 32))])
def test_other_ways_of_resizing_are_refused(mode, size):
    with pytest.raises(ValueError, match=mode):
        image_processor_from_open_clip({"resize_mode": mode}, size)


def test_preprocessing_of_transformers():
    old = {"size": 40, "crop_size": 32, "do_center_crop": True, "resample": 2, "image_mean": [0.1, 0.2, 0.3]}
    new = {**old, "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    nested = {"image_processor": {**new, "image_processor_type": "CLIPImageProcessor"}}
    expected = MMClipImageProcessorPil(size=40, crop_size=32, resample=2, image_mean=[0.1, 0.2, 0.3])
    for configs in (
        {"preprocessor_config.json": old},
        {"preprocessor_config.json": new},
        {"processor_config.json": nested},
    ):
        assert image_processor_from_transformers(configs, 224).to_dict() == expected.to_dict()
    assert image_processor_from_transformers({}, 336).to_dict() == MMClipImageProcessorPil(size=336).to_dict()


@pytest.mark.parametrize(
    "declared",
    [
        {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "resize_mode": "shortest"},
        {"mean": [0.1, 0.4, 0.3], "std": [0.2, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"},
    ],
)
def test_preprocessing_there_and_back(declared):
    assert open_clip_preprocessing(image_processor_from_open_clip(declared, 32), 32) == declared


def test_preprocessing_that_open_clip_has_not_is_refused():
    with pytest.raises(ValueError, match="open_clip cannot express"):
        open_clip_preprocessing(MMClipImageProcessorPil(size=36, crop_size=32), 32)


@pytest.fixture
def warned(caplog, monkeypatch):
    for logger in (conversion_clip.logger, layouts.logger, pictures_of_configs.logger):
        monkeypatch.setattr(logger, "propagate", True)
        monkeypatch.setattr(logger.parent, "propagate", True)
    return caplog


def test_conventions_that_only_show_elsewhere_are_warned_of(tmp_path, warned):
    model, _ = our_model()
    processor = MMClipProcessor(MMClipImageProcessorPil(size=32, convert_rgb_first=False), tokenizer())
    save_as_transformers(model, processor, tmp_path / "theirs")
    assert "'bicubic_antialias'" in warned.text
    assert "palette" in warned.text
    assert "centre crop" in warned.text


def test_the_two_crop_rules_differ_where_the_warning_says(tmp_path, warned):
    model, processor = our_model()
    theirs = CLIPProcessor.from_pretrained(save_as_transformers(model, processor, tmp_path / "theirs"))
    assert "odd number of rows or columns" in warned.text
    random = np.random.default_rng(0)
    for width, differs in ((35, True), (36, False)):
        picture = Image.fromarray(random.integers(0, 256, (32, width, 3), dtype=np.uint8))
        ours, reference = (p(images=[picture], return_tensors="pt")["pixel_values"] for p in (processor, theirs))
        assert ((ours - reference).abs().max() > 1) == differs
    warned.clear()
    uncropped = MMClipImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    save_as_transformers(model, MMClipProcessor(uncropped, tokenizer()), tmp_path / "other")
    assert "centre crop" not in warned.text
