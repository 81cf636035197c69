"""BLIP-2's processor for stage 1, and as a whole."""

import json
import pickle

import pytest
import torch
from small_processors import CHAT, QUERIES, A, B, C, same
from transformers import AutoImageProcessor, AutoProcessor

from hf_mm.models.blip2.processing_blip2 import MMBlip2Processor

# Stage 1


def test_stage_1_pictures_and_texts(stage_1, bert, image_processor):
    batch = stage_1(images=[A, B], text=["A photo of a CAT.", "dog!"])
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}
    words = [bert.convert_tokens_to_ids(word) for word in ["[CLS]", "a", "photo", "of", "a", "cat", "[SEP]"]]
    dog = [bert.convert_tokens_to_ids(word) for word in ["[CLS]", "dog", "[SEP]"]]
    assert batch.input_ids.tolist() == [words, dog + [bert.pad_token_id] * 4]
    assert batch.attention_mask.tolist() == [[1] * 7, [1] * 3 + [0] * 4]
    assert torch.equal(batch.pixel_values, image_processor([A, B], return_tensors="pt")["pixel_values"])
    assert set(stage_1(images=[[A], [B, C]])) == {"pixel_values"}
    assert set(stage_1(text="a dog")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 32),
        ({"mode": "contrastive"}, 32),
        ({"mode": "matching"}, 35),
        ({"max_length": 9}, 9),
        ({"max_length": 99}, 40),
    ],
)
def test_stage_1_lengths(stage_1, bert, options, length):
    """Section 3.1: 32 in training, 35 in the retrieval evaluation, never more than there are positions."""
    ids = stage_1(text="cat " * 45, **options).input_ids[0].tolist()
    assert ids == [bert.cls_token_id] + [bert.convert_tokens_to_ids("cat")] * (length - 2) + [bert.sep_token_id]


def test_stage_1_blank_captions_are_framed(stage_1, bert):
    batch = stage_1(text=["", "  ", "..."])
    assert batch.input_ids.tolist() == [[bert.cls_token_id, bert.sep_token_id]] * 3


def test_stage_1_beginnings_of_captions(stage_1, bert):
    """Start token and text, no end token, padded on the left."""
    batch = stage_1(text=["a photo", "a"], mode="generation")
    words = bert(["a photo"], add_special_tokens=False)["input_ids"][0]
    start, pad = bert.cls_token_id, bert.pad_token_id
    assert batch["input_ids"].tolist() == [[start, *words], [pad] * (len(words) - 1) + [start, words[0]]]
    assert batch["attention_mask"].tolist() == [[1] * (len(words) + 1), [0] * (len(words) - 1) + [1, 1]]


def test_stage_1_captions_are_read_up_to_their_end(stage_1, bert):
    """BERT's separator, for its tokenizers have no other."""
    batch = stage_1(text=["a photo"], mode="generation")
    said = bert("of a cat", add_special_tokens=False).input_ids
    whole = torch.cat([batch.input_ids, torch.tensor([[*said, bert.sep_token_id, *said]])], dim=1)
    assert bert.eos_token_id is None and stage_1.eos_token_id == bert.sep_token_id
    assert stage_1.batch_decode(whole, input_ids=batch.input_ids) == ["of a cat"]


def test_stage_1_wrong_calls(stage_1, image_processor, bert):
    with pytest.raises(ValueError, match="nothing to process"):
        stage_1()
    with pytest.raises(ValueError, match="Text 1 is None"):
        stage_1(text=["a dog", None])
    with pytest.raises(ValueError, match="empty"):
        stage_1(text=[])
    with pytest.raises(ValueError, match="contrastive, matching, generation, not 'caption'"):
        stage_1(text="a dog", mode="caption")
    with pytest.raises(ValueError, match="stage 2"):
        stage_1(images=A, text="a photo", suffix="a dog")
    with pytest.raises(ValueError, match="47 tokens exceeds the 40"):
        stage_1(text="cat " * 45, truncation=False)
    with pytest.raises(ValueError, match="leave qformer_tokenizer out"):
        MMBlip2Processor(image_processor, bert, bert)


def test_stage_1_text_as_it_stands(image_processor, bert):
    raw = MMBlip2Processor(image_processor, bert, clean_text=False)
    assert raw(text="a cat.").input_ids[0].tolist() == bert("a cat.")["input_ids"]


# Casts (F14)


def test_a_cast_touches_pixels_alone(image_processor, opt, bert):
    processor = MMBlip2Processor(image_processor, opt, bert, num_query_tokens=QUERIES)
    given = {"images": A, "text": "what is it", "suffix": "cat", "mode": "vqa"}
    before, after = processor(**given), processor(**given).to(torch.bfloat16)
    assert after.pixel_values.dtype == torch.bfloat16
    assert len(after) == 6
    for name in set(after) - {"pixel_values"}:
        assert after[name].dtype == torch.int64
        assert torch.equal(after[name], before[name])


# Files

SETTINGS = {
    "num_query_tokens": 5,
    "image_token": "<picture>",
    "image_token_id": -7,
    "is_encoder_decoder": True,
    "bos_first": True,
    "eos": "\n",
    "prompt": "a photo of",
    "question_template": "Q: {} A:",
    "max_text_length": 20,
    "clean_text": False,
}


@pytest.mark.parametrize("with_qformer", [False, True])
def test_save_and_load(tmp_path, image_processor, chat, bert, with_qformer):
    processor = MMBlip2Processor(image_processor, chat, bert if with_qformer else None, **SETTINGS)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "qformer_tokenizer").is_dir() == with_qformer
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MMBlip2Processor
    assert {name: getattr(loaded, name) for name in SETTINGS} == SETTINGS
    assert processor.qformer_tokenizer is (bert if with_qformer else None)
    assert loaded.tokenizer.get_vocab() == chat.get_vocab()
    assert loaded.image_processor.to_dict() == image_processor.to_dict()
    given = {"images": A, "text": "what is it", "suffix": "a cat", "mode": "vqa"}
    same(loaded(**given), processor(**given))
    assert ("qformer_input_ids" in loaded(**given)) == with_qformer
    assert loaded.apply_chat_template(CHAT) == processor.apply_chat_template(CHAT)
    same(pickle.loads(pickle.dumps(processor))(**given), processor(**given))
    loaded.save_pretrained(tmp_path / "again")
    files = [json.loads((folder / "processor_config.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert files[0] == files[1]


def test_save_and_load_stage_1(tmp_path, stage_1):
    stage_1.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.num_query_tokens is None
    same(loaded(images=A, text="a cat"), stage_1(images=A, text="a cat"))


def test_settings_may_be_changed_on_loading(tmp_path, opt_processor):
    opt_processor.save_pretrained(tmp_path)
    loaded = MMBlip2Processor.from_pretrained(tmp_path, prompt="a cat", num_query_tokens=7)
    assert (loaded.prompt, loaded.num_query_tokens, loaded.eos) == ("a cat", 7, "\n")


def test_a_template_of_its_own_survives_loading(tmp_path, image_processor, chat):
    template = "{% for item in messages[0]['content'] %}{{ '<image>' if item['type'] == 'image' else item['text'] }}{% endfor %}"
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES, chat_template=template)
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).apply_chat_template(CHAT[1:]) == "<image>what is it?"


def test_the_image_processor_loads_alone(tmp_path, opt_processor):
    opt_processor.save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).to_dict() == opt_processor.image_processor.to_dict()
