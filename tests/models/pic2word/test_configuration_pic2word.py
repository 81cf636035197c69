"""Pic2Word's configurations: what they take from the CLIP below them, and what they refuse."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import (
    AltCLIPConfig,
    AutoConfig,
    BertConfig,
    ChineseCLIPConfig,
    CLIPConfig,
    CLIPTextConfig,
    SiglipConfig,
)

from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.pic2word.configuration_pic2word import Pic2WordConfig, Pic2WordMapperConfig

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 300, "bos_token_id": 298, "eos_token_id": 299, "pad_token_id": 299}
PICTURE = {**SMALL, "image_size": 32, "patch_size": 8}
TRANSFORMERS_TEXT = {"vocab_size": 300, "bos_token_id": 298, "eos_token_id": 299, "pad_token_id": 1}


def clip_config(**fields) -> MMClipConfig:
    return MMClipConfig(**{"vision_config": PICTURE, "text_config": TEXT, "projection_dim": 24, **fields})


def test_defaults_are_those_of_the_published_mapper():
    """Section 2.2 of Saito et al. over ViT-L/14: 768 -> 512 -> 512 -> 768, dropout 0.1, the word of id 265."""
    config = Pic2WordMapperConfig()
    assert (config.image_dim, config.hidden_dim, config.word_dim) == (768, 512, 768)
    assert (config.num_hidden_layers, config.dropout) == (2, 0.1)
    assert config.model_type == "pic2word_mapper"
    assert Pic2WordConfig(clip_config=clip_config()).placeholder_token_id == 265
    assert Pic2WordConfig.model_type == "pic2word"


@pytest.mark.parametrize(
    ("clip", "image_dim", "word_dim"),
    [
        (clip_config(), 24, 32),
        (clip_config(text_config=BertConfig(**{**SMALL, "hidden_size": 16}, vocab_size=300)), 24, 16),
        (
            CLIPConfig(
                text_config={**SMALL, **TRANSFORMERS_TEXT},
                vision_config={**PICTURE, "hidden_size": 40},
                projection_dim=20,
            ),
            20,
            32,
        ),
        (SiglipConfig(text_config={**SMALL, **TRANSFORMERS_TEXT}, vision_config=PICTURE), 32, 32),
        (
            ChineseCLIPConfig(text_config={**SMALL, "vocab_size": 300}, vision_config=PICTURE, projection_dim=28),
            28,
            32,
        ),
        (
            AltCLIPConfig(
                text_config={**SMALL, "vocab_size": 300, "project_dim": 44}, vision_config=PICTURE, projection_dim=28
            ),
            28,
            32,
        ),
    ],
    ids=["mm_clip", "mm_clip over bert", "clip", "siglip", "chinese_clip", "altclip"],
)
def test_the_mappers_outer_widths_are_those_of_any_clip(clip, image_dim, word_dim):
    for given in (clip, clip.to_dict()):
        config = Pic2WordConfig(clip_config=given, mapper_config={"hidden_dim": 7}, placeholder_token_id=5)
        assert type(config.clip_config) is type(clip)
        mapper = config.mapper_config
        assert (mapper.image_dim, mapper.hidden_dim, mapper.word_dim) == (image_dim, 7, word_dim)


def test_a_dict_without_type_is_our_clip():
    config = Pic2WordConfig(clip_config={"vision_config": PICTURE, "text_config": TEXT, "projection_dim": 24})
    assert type(config.clip_config) is MMClipConfig
    assert config.mapper_config.image_dim == 24


def test_everything_survives_a_round_trip(tmp_path):
    config = Pic2WordConfig(
        clip_config=clip_config(),
        mapper_config={"hidden_dim": 9, "num_hidden_layers": 3, "dropout": 0.25},
        placeholder_token_id=17,
    )
    config.save_pretrained(tmp_path)
    reopened = AutoConfig.from_pretrained(tmp_path)
    assert type(reopened) is Pic2WordConfig
    assert reopened.to_diff_dict() == config.to_diff_dict()
    assert reopened.mapper_config.num_hidden_layers == 3
    assert reopened.clip_config.text_config.eos_token_id == 299
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "pic2word"
    config.mapper_config.save_pretrained(tmp_path / "mapper")
    mapper = AutoConfig.from_pretrained(tmp_path / "mapper")
    assert type(mapper) is Pic2WordMapperConfig
    assert mapper.to_diff_dict() == config.mapper_config.to_diff_dict()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mapper_config": {"image_dim": 768}}, ["image_dim", "768", "24"]),
        ({"mapper_config": {"word_dim": 768}}, ["word_dim", "768", "32"]),
        ({"placeholder_token_id": 300}, ["placeholder_token_id", "300"]),
        ({"placeholder_token_id": -1}, ["placeholder_token_id", "-1"]),
        ({"mapper_config": Pic2WordMapperConfig()}, ["768", "24"]),
    ],
    ids=["another joint space", "another text width", "beyond the vocabulary", "negative", "of ViT-L/14"],
)
def test_a_mapper_of_another_clip_and_a_placeholder_beyond_the_vocabulary_are_one_sentence(fields, words):
    with pytest.raises(StrictDataclassClassValidationError) as refused:
        Pic2WordConfig(**{"clip_config": clip_config(), "placeholder_token_id": 5, **fields})
    sentence = str(refused.value.__cause__ or refused.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence.strip()


def test_the_last_id_of_the_vocabulary_but_the_end_is_a_placeholder():
    assert Pic2WordConfig(clip_config=clip_config(), placeholder_token_id=297).placeholder_token_id == 297


@pytest.mark.parametrize("token", [298, 299])
def test_a_token_that_every_text_holds_is_no_placeholder(token):
    """The text is pooled at its end token: a picture in its place would be pooled nowhere."""
    with pytest.raises(StrictDataclassClassValidationError, match="placeholder_token_id"):
        Pic2WordConfig(clip_config=clip_config(), placeholder_token_id=token)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"dropout": 1.5},
        {"dropout": -0.1},
        {"hidden_dim": 0},
        {"image_dim": 0},
        {"word_dim": 0},
    ],
    ids=lambda fields: "{} {}".format(*next(iter(fields.items()))),
)
def test_mappers_that_cannot_be_built_are_refused(fields):
    with pytest.raises((StrictDataclassClassValidationError, ValueError), match=next(iter(fields))):
        Pic2WordMapperConfig(**fields)


@pytest.mark.parametrize("field", ["image_dim", "dropout"])
def test_fields_of_the_wrong_type_are_refused(field):
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        Pic2WordMapperConfig(**{field: "768"})


@pytest.mark.parametrize("config", [CLIPTextConfig(), BertConfig()], ids=["text tower", "bert"])
def test_what_is_no_dual_encoder_is_refused(config):
    with pytest.raises(StrictDataclassClassValidationError, match=config.model_type):
        Pic2WordConfig(clip_config=config)
