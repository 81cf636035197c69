import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hf_mm.models.vit.configuration_vit import MMViTConfig

TINY = {"hidden_size": 48, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}


def test_defaults_are_the_authors_base_16():
    config = MMViTConfig()
    assert (config.hidden_act, config.layer_norm_eps) == ("gelu_pytorch_tanh", 1e-6)
    assert config.pos_embed_interpolation == "bilinear_corners"
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.intermediate_size, config.image_size, config.patch_size) == (3072, 224, 16)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "grid"),
    [(32, 8, (4, 4)), ((32, 48), 8, (4, 6)), ([32, 48], [16, 8], (2, 6)), (224, 14, (16, 16))],
)
def test_grid_of_any_shape(image_size, patch_size, grid):
    config = MMViTConfig(**{**TINY, "image_size": image_size, "patch_size": patch_size})
    assert config.grid_size == grid


def test_what_is_saved_is_read_again(tmp_path):
    config = MMViTConfig(
        **{**TINY, "image_size": (32, 48)},
        stem="conv",
        stem_norm="layer",
        stem_channels=(6, 10, 14),
        pooling="mean",
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        drop_path_rate=0.1,
        num_labels=3,
    )
    config.save_pretrained(tmp_path)
    opened = AutoConfig.from_pretrained(tmp_path)
    assert type(opened) is MMViTConfig
    assert opened.to_json_string() == config.to_json_string()
    assert opened.grid_size == (4, 6)


@pytest.mark.parametrize(
    ("width", "patch", "channels"), [(768, 16, [96, 192, 384, 768]), (64, 8, [16, 32, 64]), (64, 2, [64])]
)
def test_channels_of_the_stem_double_up_to_the_width(width, patch, channels):
    config = MMViTConfig(hidden_size=width, num_attention_heads=4, patch_size=patch, stem="conv")
    assert list(config.stem_channels) == channels


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of cls, mean, not 'max'"),
        ({"stem": "resnet"}, "stem must be one of patch, conv, not 'resnet'"),
        ({"stem_norm": "batch"}, "stem_norm must be one of group, layer, not 'batch'"),
        ({"pos_embed_interpolation": "bilinear"}, "pos_embed_interpolation must be one of bilinear_corners, bicubic"),
        ({"stem": "conv", "stem_channels": [16, 48]}, "2 stride-2 convolutions.*4x4.*patch_size is 8"),
        ({"stem": "conv", "patch_size": 12, "image_size": 36}, "3 stride-2.*8x8.*patch_size is 12"),
        ({"stem": "conv", "patch_size": (8, 16)}, r"3 stride-2.*8x8.*patch_size is \(8, 16\)"),
        ({"stem": "conv", "stem_channels": [10, 20, 48]}, r"stem_channels \[10, 20, 48\].*stem_num_groups \(8\)"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"drop_path_rate": -0.1}, "drop_path_rate"),
        ({"num_attention_heads": 5}, r"hidden_size \(48\).*num_attention_heads \(5\)"),
        ({"image_size": (32, 36)}, r"image_size \(\(32, 36\)\).*patch_size \(8\)"),
        ({"image_size": "224"}, "image_size"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps"),
    ],
)
def test_what_no_model_can_be_built_from_is_refused(wrong, message):
    with pytest.raises(StrictDataclassError, match=message):
        MMViTConfig(**{**TINY, **wrong})


def test_a_wrong_assignment_is_refused_before_saving(tmp_path):
    config = MMViTConfig(**TINY)
    config.num_attention_heads = 5
    with pytest.raises(StrictDataclassError, match="hidden_size"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
