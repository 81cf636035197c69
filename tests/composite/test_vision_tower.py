"""Any vision encoder's features, held to what each encoder gives by itself."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_mm.composite.vision_tower import (
    TowerLayout,
    tower_image_processor,
    tower_layout,
    tower_tokens,
    vision_encoder,
)
from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.modeling_clip import MMClipModel

VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT |= {"image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [4, 6, 8, 10], "depths": [1, 1, 1, 1], "image_size": 64}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32, "patch_size": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}

# Fields, then the layouts of layers -1 and 0, as (width, grid, prefix tokens).
FAMILIES = {
    "mm_vit": (VIT, (16, (4, 4), 1), (16, (4, 4), 1)),
    "mm_clip_vision": (VIT, (16, (4, 4), 1), (16, (4, 4), 1)),
    "eva_vit": (VIT, (16, (4, 4), 1), (16, (4, 4), 1)),
    "mm_clip_resnet": (
        {"width": 8, "depths": [1, 1, 1, 1], "image_size": 64, "projection_dim": 16},
        (256, (2, 2), 0),
        (8, (16, 16), 0),
    ),
    "clip_vision_model": (VIT, (16, (4, 4), 1), (16, (4, 4), 1)),
    "siglip_vision_model": (VIT, (16, (4, 4), 0), (16, (4, 4), 0)),
    "vit": (VIT, (16, (4, 4), 1), (16, (4, 4), 1)),
    "beit": (VIT, (16, (4, 4), 1), (16, (4, 4), 1)),
    "deit": (VIT, (16, (4, 4), 2), (16, (4, 4), 2)),  # class and distillation
    "dinov2": (VIT, (16, (4, 4), 1), (16, (4, 4), 1)),
    "dinov2_with_registers": ({**VIT, "num_register_tokens": 3}, (16, (4, 4), 4), (16, (4, 4), 4)),
    "dinov3_vit": ({**VIT, "num_register_tokens": 2}, (16, (4, 4), 3), (16, (4, 4), 3)),
    "internvl_vision": ({**VIT, "image_size": [32, 32], "patch_size": [8, 8]}, (16, (4, 4), 1), (16, (4, 4), 1)),
    "swin": (SWIN, (16, (4, 4), 0), (8, (8, 8), 0)),
    "convnext": (STAGES, (10, (2, 2), 0), (4, (16, 16), 0)),
    "dinov3_convnext": (STAGES, (10, (2, 2), 1), (3, (64, 64), 0)),  # the pooled map comes before the map
    "resnet": (RESNET, (16, (4, 4), 0), (8, (8, 8), 0)),
    "hiera": (
        {
            "embed_dim": 8,
            "image_size": [32, 32],
            "depths": [1, 1, 1],
            "num_heads": [1, 2, 4],
            "query_stride": [2, 2],
            "num_query_pool": 2,
            "masked_unit_size": [4, 4],
        },
        (32, (2, 2), 0),
        (8, (8, 8), 0),
    ),
}


def tower_of(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(family, **FAMILIES[family][0])).eval()


def pictures(family: str, count: int = 2) -> torch.Tensor:
    side = {"mm_clip_resnet": 64, "convnext": 64, "dinov3_convnext": 64}.get(family, 32)
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def tokens_of(state: torch.Tensor) -> torch.Tensor:
    """``(B, D, H, W)`` to ``(B, H * W, D)``, place by place."""
    if state.ndim == 3:
        return state
    return torch.stack(
        [state[:, :, row, column] for row in range(state.shape[2]) for column in range(state.shape[3])], 1
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_layout(family):
    fields, *expected = FAMILIES[family]
    image_size = tuple(pictures(family).shape[2:])
    for layer, (width, grid, prefix) in zip((-1, 0), expected, strict=True):
        layout = tower_layout(AutoConfig.for_model(family, **fields), layer, image_size)
        assert layout == TowerLayout(width, grid, prefix, image_size, prefix + grid[0] * grid[1])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tokens_are_those_of_the_encoder(family):
    tower, pixels = tower_of(family), pictures(family)
    alone, recorded = tower(pixels), tower(pixels, output_hidden_states=True)
    states = [tokens_of(state) for state in recorded.hidden_states]
    last = tokens_of(alone.last_hidden_state)
    assert torch.equal(tower_tokens(tower, pixels), last)
    for layer in (*range(len(states)), *range(-len(states), -1)):
        assert torch.equal(tower_tokens(tower, pixels, layer), states[layer])

    for layer, state, (width, grid, prefix) in zip((-1, 0), (last, states[0]), FAMILIES[family][1:], strict=True):
        places = tower_tokens(tower, pixels, layer, class_token=False)
        assert places.shape == (2, grid[0] * grid[1], width)
        assert torch.equal(places, state[:, prefix:])


@pytest.mark.parametrize("family", ["mm_vit", "mm_clip_vision", "clip_vision_model", "deit", "dinov2_with_registers"])
@torch.no_grad()
def test_without_class_token_each_token_is_its_own_place(family):
    """Before the first block a change in one patch moves one token: that of its row and column."""
    tower, before = tower_of(family), pictures(family, 1)
    layout = tower_layout(tower.config, 0)
    tokens = tower_tokens(tower, before, 0, class_token=False)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        after = before.clone()
        after[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
        moved = (tower_tokens(tower, after, 0, class_token=False) != tokens).any(-1)[0].reshape(layout.grid)
        assert moved.nonzero().tolist() == [[row, column]]


@pytest.mark.parametrize("family", ["mm_clip_vision", "clip_vision_model", "vit", "dinov2", "convnext", "swin"])
@torch.no_grad()
def test_pictures_of_another_size(family):
    """48 rows and 64 columns; encoders without `interpolate_pos_encoding` take them as they are."""
    tower = tower_of(family)
    pixels = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(2))
    options = {"interpolate_pos_encoding": True} if family not in ("dinov2", "convnext") else {}
    expected = tokens_of(tower(pixels, **options).last_hidden_state)
    assert torch.equal(tower_tokens(tower, pixels, interpolate_pos_encoding=True), expected)
    layout = tower_layout(tower.config, image_size=(48, 64))
    assert (layout.num_tokens, layout.image_size) == (expected.shape[1], (48, 64))
    patch = {"swin": 8, "convnext": 32}.get(family, 8)
    assert layout.grid == (48 // patch, 64 // patch)


def test_the_last_layer_costs_no_hidden_states():
    tower, asked = tower_of("clip_vision_model"), []
    tower.register_forward_pre_hook(lambda module, args, options: asked.append(options), with_kwargs=True)
    tower_tokens(tower, pictures("vit"))
    assert "output_hidden_states" not in asked[0]
    assert "hidden_states" not in tower(pictures("vit"))


def test_another_layer_keeps_only_its_own():
    tower, asked = tower_of("clip_vision_model"), []
    tower.register_forward_hook(lambda module, args, outputs: asked.append(outputs.hidden_states))
    tower_tokens(tower, pictures("vit"), -2)
    assert [state is None for state in asked[0]] == [True, False, True]


def test_a_config_without_image_size_tells_the_width_alone():
    layout = tower_layout(AutoConfig.for_model("resnet", **RESNET))
    assert layout == TowerLayout(16, None, 0, None, None)


def test_the_layout_draws_no_random_numbers_and_leaves_the_config():
    config = AutoConfig.for_model("vit", **VIT)
    config._attn_implementation = "sdpa"
    before, state = config.to_dict(), torch.get_rng_state()
    tower_layout(config)
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_dict() == before and config._attn_implementation == "sdpa"


def test_gradients_flow_where_the_caller_wants_them():
    tower, pixels = tower_of("mm_clip_vision"), pictures("vit").requires_grad_()
    tower_tokens(tower, pixels, -2, class_token=False).sum().backward()
    assert pixels.grad.abs().sum() > 0


@torch.no_grad()
def test_a_tower_with_adapters_around_it():
    tower, pixels = tower_of("clip_vision_model"), pictures("vit")
    expected = [tower_tokens(tower, pixels, layer, class_token=False) for layer in (-1, -2)]
    adapted = get_peft_model(tower, LoraConfig(target_modules=["q_proj"], r=2)).eval()
    for layer, tokens in zip((-1, -2), expected, strict=True):
        assert torch.equal(tower_tokens(adapted, pixels, layer, class_token=False), tokens)


@torch.no_grad()
def test_compiled():
    tower, pixels = tower_of("mm_clip_vision"), pictures("vit")
    compiled = torch.compile(tower_tokens, fullgraph=True, backend="aot_eager")
    tokens = tower_tokens(tower, pixels, -2, class_token=False)
    torch.testing.assert_close(compiled(tower, pixels, -2, class_token=False), tokens, rtol=1e-5, atol=1e-6)


# The vision part of a model


TEXT = {key: VIT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
TEXT |= {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_the_vision_part_of_dual_encoders():
    for config_class, model_class in ((CLIPConfig, CLIPModel), (SiglipConfig, SiglipModel)):
        config = config_class(text_config=TEXT, vision_config=VIT)
        model = model_class(config)
        assert vision_encoder(model) is model.vision_model
        assert tower_layout(config) == tower_layout(config.vision_config)
    config = MMClipConfig(text_config=TEXT, vision_config={**VIT, "model_type": "dinov2"}, vision_pooling="mean")
    model = MMClipModel(config)
    assert vision_encoder(model) is model.vision_model
    assert tower_layout(config).num_prefix_tokens == 1


def test_the_trunk_of_a_classifier_and_an_encoder_itself():
    classifier = ViTForImageClassification(AutoConfig.for_model("vit", **VIT))
    assert vision_encoder(classifier) is classifier.vit
    for family in ("dinov3_vit", "dinov3_convnext", "clip_vision_model", "mm_vit"):
        tower = tower_of(family)
        assert vision_encoder(tower) is tower


def test_a_model_of_texts_has_no_vision_part():
    with pytest.raises(ValueError, match="BertModel has no vision encoder"):
        vision_encoder(BertModel(BertConfig(**{**TEXT, "num_hidden_layers": 1})))


def test_the_image_processor_of_a_folder(tmp_path):
    ViTImageProcessorPil(size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    processor = tower_image_processor(str(tmp_path))
    assert dict(processor.size) == {"height": 24, "width": 24} and list(processor.image_mean) == [0.1, 0.2, 0.3]


def test_a_folder_without_image_processor(tmp_path):
    AutoConfig.for_model("vit", **VIT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no image processor"):
        tower_image_processor(str(tmp_path))


# Wrong calls


def test_layers_that_are_not_there():
    tower, pixels = tower_of("vit"), pictures("vit")
    for layer in (3, -4):
        with pytest.raises(ValueError, match=f"hidden states -3 to 2: layer {layer} is none of them"):
            tower_tokens(tower, pixels, layer)
        with pytest.raises(ValueError, match=f"layer {layer} is none of them"):
            tower_layout(tower.config, layer)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("siglip2_vision_model", {**TEXT, "patch_size": 8}, "takes pixel_attention_mask, spatial_shapes"),
        ("vit_mae", VIT, "hides and shuffles patches at random"),
        ("pixtral", VIT, "gives a tensor \\(1, 32, 16\\) for 2 pictures"),
        ("bert", TEXT, "BertModel has no vision encoder"),
        ("blip_2_vision_model", VIT, "blip_2_vision_model is no encoder that AutoModel opens"),
    ],
)
def test_encoders_that_are_no_towers(family, fields, message):
    with pytest.raises(ValueError, match=message):
        tower_layout(AutoConfig.for_model(family, **fields))


@torch.no_grad()
def test_a_class_token_that_cannot_be_told(monkeypatch):
    """Places in no grid: keeping all tokens still works."""
    tower, pixels = tower_of("swin"), pictures("swin")
    outputs = tower(pixels)
    outputs.last_hidden_state = outputs.last_hidden_state[:, :0]
    monkeypatch.setattr(type(tower), "forward", lambda self, pixel_values, return_dict=True: outputs)
    assert tower_tokens(tower, pixels).shape[1] == 0
    with pytest.raises(ValueError, match="form no grid"):
        tower_tokens(tower, pixels, class_token=False)
