import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from hf_mm.models.clip.configuration_clip import MMClipConfig, MMClipTextConfig, MMClipVisionConfig
from hf_mm.models.vit.configuration_vit import MMViTConfig

TOWER = {"hidden_size": 32, "num_attention_heads": 2}


def common(ours, theirs) -> set[str]:
    """The fields that both kinds of config have, type and bookkeeping aside."""
    bookkeeping = {"model_type", "transformers_version", "architectures", "text_config", "vision_config"}
    return set(ours.to_dict()) & set(theirs.to_dict()) - bookkeeping


def assert_equal_fields(ours, theirs, *but):
    for name in common(ours, theirs) - set(but):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_defaults_are_base_32_as_transformers_has_it():
    config = MMClipConfig()
    assert_equal_fields(config.text_config, CLIPTextConfig(), "pad_token_id")
    assert_equal_fields(config.vision_config, CLIPVisionConfig())
    assert config.projection_dim == CLIPConfig().projection_dim
    assert config.logit_scale_init_value == pytest.approx(2.659260036932778, abs=1e-15)


def test_towers_given_as_dicts_or_configs():
    from_dicts = MMClipConfig(vision_config={**TOWER, "patch_size": 16}, text_config={**TOWER, "vocab_size": 49409})
    from_configs = MMClipConfig(
        vision_config=MMClipVisionConfig(**TOWER, patch_size=16),
        text_config=MMClipTextConfig(**TOWER, vocab_size=49409),
    )
    assert from_dicts.to_json_string() == from_configs.to_json_string()
    assert type(from_dicts.vision_config) is MMClipVisionConfig
    vit = MMClipConfig(vision_config={**TOWER, "model_type": "mm_vit"})
    assert type(vit.vision_config) is MMViTConfig


def test_what_is_saved_is_read_again(tmp_path):
    vision = {**TOWER, "model_type": "mm_vit", "image_size": (32, 48), "patch_size": 8, "stem": "conv"}
    config = MMClipConfig(vision_config=vision, text_config={**TOWER, "hidden_act": "gelu"}, projection_dim=7)
    config.save_pretrained(tmp_path)
    opened = AutoConfig.from_pretrained(tmp_path)
    assert type(opened) is MMClipConfig
    assert opened.to_json_string() == config.to_json_string()
    assert type(MMClipTextConfig.from_pretrained(tmp_path)) is MMClipTextConfig
    assert MMClipTextConfig.from_pretrained(tmp_path).hidden_act == "gelu"


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LEGACY = {
    "whole": {
        "text_config": {**TINY, "vocab_size": 70, "eos_token_id": 69, "bos_token_id": 68, "pad_token_id": 1},
        "vision_config": {**TINY, "image_size": 32, "patch_size": 8},
        "projection_dim": 24,
        "logit_scale_init_value": 2.6592,
    },
    "repeated, null": {
        "text_config": {**TINY, "hidden_act": "gelu"},
        "text_config_dict": None,
        "vision_config": dict(TINY),
        "vision_config_dict": None,
    },
    "repeated, partly": {
        "text_config": {**TINY, "projection_dim": 24},
        "text_config_dict": {**TINY, "projection_dim": 24},
        "vision_config": {**TINY, "patch_size": 16},
        "vision_config_dict": {**TINY, "patch_size": 16},
    },
    "repeated, otherwise": {
        "text_config": {**TINY, "hidden_size": 64, "hidden_act": "gelu"},
        "text_config_dict": TINY,
        "vision_config": {**TINY, "patch_size": 32},
        "vision_config_dict": {**TINY, "patch_size": 16},
    },
    "repeated alone": {"text_config_dict": TINY, "vision_config_dict": {**TINY, "patch_size": 16}},
    "no towers": {"projection_dim": 512},
}


@pytest.mark.parametrize("fields", LEGACY.values(), ids=LEGACY)
def test_a_config_of_transformers_is_read_as_transformers_reads_it(fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **fields}))
    theirs = CLIPConfig.from_pretrained(tmp_path)
    ours = MMClipConfig.from_pretrained(tmp_path)
    assert_equal_fields(ours, theirs, "logit_scale_init_value")
    assert ours.logit_scale_init_value == pytest.approx(theirs.logit_scale_init_value, abs=1e-4)
    assert_equal_fields(ours.text_config, theirs.text_config, "pad_token_id")
    assert_equal_fields(ours.vision_config, theirs.vision_config)
    assert ours.vision_config.pos_embed_interpolation == "bicubic"
    assert_equal_fields(MMClipTextConfig.from_pretrained(tmp_path), theirs.text_config, "pad_token_id")
    assert_equal_fields(MMClipVisionConfig.from_pretrained(tmp_path), theirs.vision_config)


def test_the_old_end_token_two_means_the_largest_id(tmp_path):
    text = {**TINY, "vocab_size": 70, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": text}))
    assert MMClipConfig.from_pretrained(tmp_path).text_config.eos_token_id == 69
    assert MMClipTextConfig.from_pretrained(tmp_path).eos_token_id == 69
    own = MMClipTextConfig(**text)
    own.save_pretrained(tmp_path / "own")
    assert MMClipTextConfig.from_pretrained(tmp_path / "own").eos_token_id == 2


@pytest.mark.parametrize(
    ("theirs", "ours"), [(CLIPTextConfig, MMClipTextConfig), (CLIPVisionConfig, MMClipVisionConfig)]
)
def test_a_tower_of_transformers_saved_alone(theirs, ours, tmp_path):
    config = theirs(**TINY)
    config.save_pretrained(tmp_path)
    opened = ours.from_pretrained(tmp_path)
    assert type(opened) is ours
    assert opened.model_type == ours.model_type
    assert_equal_fields(opened, config)


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (MMClipTextConfig, {"eos_token_id": 49408}, r"eos_token_id \(49408\).*49408"),
        (MMClipTextConfig, {"eos_token_id": -1}, r"eos_token_id \(-1\)"),
        (MMClipTextConfig, {"num_attention_heads": 7}, r"hidden_size \(512\).*num_attention_heads \(7\)"),
        (MMClipTextConfig, {"hidden_act": "quickgelu"}, "hidden_act.*quickgelu"),
        (MMClipVisionConfig, {"image_size": 225}, r"image_size \(225\).*patch_size \(32\)"),
        (MMClipVisionConfig, {"num_attention_heads": 7}, r"hidden_size \(768\).*num_attention_heads \(7\)"),
        (MMClipVisionConfig, {"pos_embed_interpolation": "bicubic_corners"}, "pos_embed_interpolation must be one of"),
        (MMClipConfig, {"projection_dim": "512"}, "projection_dim"),
        (MMClipConfig, {"vision_config": {"patch_size": 31}}, r"patch_size \(31\)"),
    ],
)
def test_what_no_model_can_be_built_from_is_refused(config, wrong, message):
    with pytest.raises(StrictDataclassError, match=message):
        config(**wrong)
