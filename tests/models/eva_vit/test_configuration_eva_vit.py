import pytest
from huggingface_hub.errors import StrictDataclassError

from hf_mm.models.eva_vit.configuration_eva_vit import EvaViTConfig

TINY = {"hidden_size": 48, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}


def test_defaults_are_the_published_g_14_without_its_last_block():
    config = EvaViTConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1408, 39, 16)
    assert (config.intermediate_size, config.image_size, config.patch_size) == (6144, 224, 14)
    assert config.intermediate_size == int(1408 * 4.3637)
    assert (config.hidden_act, config.layer_norm_eps) == ("gelu", 1e-6)


def test_what_is_saved_is_read_again(tmp_path):
    config = EvaViTConfig(**{**TINY, "image_size": (32, 48)}, drop_path_rate=0.1, initializer_range=0.03)
    config.save_pretrained(tmp_path)
    opened = EvaViTConfig.from_pretrained(tmp_path)
    assert opened.to_json_string() == config.to_json_string()
    assert opened.grid_size == (4, 6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_attention_heads": 5}, r"hidden_size \(48\).*num_attention_heads \(5\)"),
        ({"image_size": (32, 36)}, r"image_size \(\(32, 36\)\).*patch_size \(8\)"),
        ({"hidden_act": "erf"}, "hidden_act 'erf'"),
        ({"attention_dropout": 1.0}, "attention_dropout.*below 1, not 1.0"),
        ({"drop_path_rate": -0.1}, "drop_path_rate.*not -0.1"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps"),
    ],
    ids=str,
)
def test_what_no_model_can_be_built_from_is_refused(wrong, message):
    with pytest.raises(StrictDataclassError, match=message):
        EvaViTConfig(**{**TINY, **wrong})
