import json
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor

import hf_mm  # noqa: F401 - registers the processor
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.processing_clip import MMClipProcessor
from hf_mm.models.clip.tokenization_clip import MMClipTokenizer

CORPUS = ["a photo of a cat", "a photo of a dog and a cat"] * 3
IMAGES = [Image.new("RGB", (30, 20), "red"), Image.new("L", (20, 30), 90), Image.new("RGBA", (9, 9), "blue")]


@pytest.fixture(scope="module")
def processor():
    tokenizer = MMClipTokenizer.train_from_iterator(CORPUS, 540, model_max_length=16)
    return MMClipProcessor(MMClipImageProcessorPil(size=16), tokenizer)


@pytest.mark.parametrize("text", ["a cat", ["a cat"], ["a cat", "a photo of a dog", "", "dög", "x"]])
@pytest.mark.parametrize("images", [IMAGES[0], IMAGES[:1], IMAGES])
def test_any_number_of_pictures_goes_with_any_number_of_texts(processor, images, text):
    batch = processor(images=images, text=text)
    rows = 1 if isinstance(text, str) else len(text)
    assert batch.pixel_values.shape == (len(images) if isinstance(images, list) else 1, 3, 16, 16)
    assert batch.input_ids.shape == batch.attention_mask.shape
    assert batch.input_ids.shape[0] == rows
    assert torch.equal(batch.pixel_values, processor.image_processor(images, return_tensors="pt").pixel_values)
    assert torch.equal(
        batch.input_ids, processor.tokenizer(text, padding=True, return_tensors="pt").input_ids.view(rows, -1)
    )


def test_one_kind_of_input_alone(processor):
    assert set(processor(images=IMAGES)) == {"pixel_values"}
    assert set(processor(text="a cat")) == {"input_ids", "attention_mask"}
    assert set(processor.model_input_names) == {"pixel_values", "input_ids", "attention_mask"}


def test_nothing_at_all_is_refused(processor):
    with pytest.raises(ValueError, match="images, text, or both"):
        processor()


def test_tensors_by_default_and_on_request(processor):
    assert all(isinstance(values, torch.Tensor) for values in processor(IMAGES, ["a", "a cat"]).values())
    arrays = processor(IMAGES, ["a", "a cat"], return_tensors="np")
    assert all(isinstance(values, np.ndarray) for values in arrays.values())
    assert arrays["input_ids"].tolist() == processor(IMAGES, ["a", "a cat"], return_tensors=None)["input_ids"]


def test_options_reach_the_parts(processor):
    batch = processor(IMAGES, ["a", "a cat"], size=8, padding="max_length", do_normalize=False)
    assert batch.pixel_values.shape == (3, 3, 8, 8)
    assert batch.pixel_values[0, 0].unique().tolist() == [1]
    assert batch.input_ids.shape == (2, 16)
    batch = processor(IMAGES, ["a cat"], images_kwargs={"size": 8}, text_kwargs={"max_length": 3, "truncation": True})
    assert batch.pixel_values.shape == (3, 3, 8, 8)
    assert batch.input_ids.shape == (1, 3)


def test_a_cast_leaves_whole_numbers_alone(processor):
    """F14: a cast reaches the pixels and no id."""
    batch = processor(IMAGES, ["a cat"] * 3)
    ids = batch.input_ids.clone()
    cast = batch.to(torch.bfloat16)
    assert cast.pixel_values.dtype == torch.bfloat16
    assert cast.input_ids.dtype == cast.attention_mask.dtype == torch.int64
    assert torch.equal(cast.input_ids, ids)


def test_long_texts_are_cut_by_default(processor, caplog):
    """F15: the end token stays last, and there is one warning."""
    logging.Logger.warning_once.cache_clear()
    batch = processor(text=["cat " * 200, "a cat"])
    assert batch.input_ids.shape == (2, 16)
    assert batch.input_ids[0, -1] == processor.tokenizer.eos_token_id
    processor(text="cat " * 200)
    assert caplog.text.count("were cut") == 1


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
@pytest.mark.parametrize("text", ["cat " * 20, ["a", "cat " * 20]])
def test_long_texts_are_refused_on_request(processor, text, return_tensors):
    """F15: without truncation both lengths are named."""
    with pytest.raises(ValueError, match="22 tokens exceeds the context of 16"):
        processor(text=text, truncation=False, return_tensors=return_tensors)
    assert len(processor(text="cat " * 14, truncation=False, padding=False, return_tensors=None)["input_ids"]) == 16


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_texts_and_pictures_are_named(processor, missing):
    """F04, F16: a missing text or picture is named by its row."""
    with pytest.raises(ValueError, match="Text 1 is"):
        processor(IMAGES[:2], ["a dog", missing])
    with pytest.raises((ValueError, TypeError), match="Image 1: "):
        processor([IMAGES[0], missing], ["a dog", "a cat"])


def test_empty_batches_are_refused(processor):
    """F16: an empty list is one sentence."""
    with pytest.raises(ValueError, match="list of texts is empty"):
        processor(IMAGES, [])
    with pytest.raises(ValueError, match="list of images is empty"):
        processor([], ["a"])


def test_left_padding_is_refused(processor):
    with pytest.raises(ValueError, match="on the right only"):
        processor(text=["a", "a cat"], padding_side="left")


def test_columns_of_a_dataset_and_files(processor, tmp_path):
    paths = []
    for index, image in enumerate(IMAGES):
        paths.append(str(tmp_path / f"{index}.png"))
        image.save(paths[-1])
    dataset = Dataset.from_dict({"image": paths, "caption": ["a", "a cat", "a dog"]})
    expected = processor(IMAGES, ["a", "a cat", "a dog"])
    batch = processor(images=dataset["image"], text=dataset["caption"])
    assert {name: values.tolist() for name, values in batch.items()} == {k: v.tolist() for k, v in expected.items()}


def test_every_setting_survives_saving(processor, tmp_path):
    options = {
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 12, "width": 18},
        "resample": 2,
        "image_mean": (0.1, 0.2, 0.3),
        "image_std": (0.4, 0.5, 0.6),
        "convert_rgb_first": False,
    }
    processor = MMClipProcessor(MMClipImageProcessorPil(**options), processor.tokenizer)
    processor(text=["a cat"], max_length=3)
    processor.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "processor_config.json").read_text())
    expected = processor(IMAGES, ["a cat", "a photo " * 50])
    for reopened in (
        MMClipProcessor.from_pretrained(tmp_path, backend="pil"),
        AutoProcessor.from_pretrained(tmp_path, backend="pil"),
    ):
        assert type(reopened) is MMClipProcessor
        assert {name: getattr(reopened.image_processor, name) for name in options} == options
        assert reopened.tokenizer.model_max_length == 16
        batch = reopened(IMAGES, ["a cat", "a photo " * 50])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_decoding(processor):
    ids = processor(text=["a cat", "a photo of a dog"]).input_ids
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a cat", "a photo of a dog"]
