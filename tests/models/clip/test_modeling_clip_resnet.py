"""CLIP's ResNet tower: sizes of pictures, running statistics, published sizes."""

import copy

import pytest
import torch
from contract.cases import RESNET, clip_with_resnet_config
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn

from hf_mm.models.clip.configuration_clip import MMClipConfig, MMClipResNetConfig
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.models.clip.modeling_clip_resnet import BatchNorm, Bottleneck, MMClipResNetModel
from hf_mm.models.clip.presets_clip import PRESETS

# (all, picture tower with the projection, text tower with the projection), of the published models
PARAMETERS = {
    "RN50": (102_007_137, 38_316_896, 63_690_240),
    "RN101": (119_688_033, 56_259_936, 63_428_096),
    "RN50x4": (178_300_601, 87_137_080, 91_163_520),
    "RN50x16": (290_979_217, 167_328_912, 123_650_304),
    "RN50x64": (623_258_305, 420_380_352, 202_877_952),
    "ViT-B-32": (151_277_313, 87_849_216, 63_428_096),
    "ViT-B-16": (149_620_737, 86_192_640, 63_428_096),
    "ViT-L-14": (427_616_513, 303_966_208, 123_650_304),
    "ViT-L-14-336": (427_944_193, 304_293_888, 123_650_304),
}
OPEN_CLIP_MILLIONS = {"ViT-H-14": 986.11, "ViT-g-14": 1366.68, "ViT-bigG-14": 2539.57}


def tower(**changes) -> MMClipResNetModel:
    model = MMClipResNetModel(MMClipResNetConfig(**{**RESNET, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def on_meta(name: str) -> MMClipModel:
    with torch.device("meta"):
        return MMClipModel(MMClipConfig.from_preset(name))


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_as_many_parameters(name):
    model = on_meta(name)
    picture, text = (model.vision_model, model.visual_projection), (model.text_model, model.text_projection)
    assert (count(model), count(*picture), count(*text)) == PARAMETERS[name]


@pytest.mark.parametrize("name", OPEN_CLIP_MILLIONS)
def test_larger_sizes_have_as_many_parameters_as_open_clip_says(name):
    assert count(on_meta(name)) / 1e6 == pytest.approx(OPEN_CLIP_MILLIONS[name], abs=5e-3)


def test_every_preset_is_counted_and_others_are_refused():
    assert set(PRESETS) == set(PARAMETERS) | set(OPEN_CLIP_MILLIONS)
    with pytest.raises(ValueError, match="'RN51'.*RN50.*ViT-B-32"):
        MMClipConfig.from_preset("RN51")
    assert MMClipConfig.from_preset("RN50", logit_scale_init_value=1.0).logit_scale_init_value == 1.0


@pytest.mark.parametrize(("height", "width"), [(96, 96), (64, 96), (128, 32)])
def test_pictures_of_another_size(height, width):
    """F17: refused by name without interpolation; with it, the table follows."""
    model, pixels = tower().double(), torch.randn(2, 3, height, width, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{height}x{width}.*64x64.*interpolate_pos_encoding"):
        model(pixels)
    outputs = model(pixels, interpolate_pos_encoding=True)
    assert outputs.last_hidden_state.shape == (2, 256, height // 32, width // 32)
    model.set_attn_implementation("eager")
    (attention,) = model(pixels, interpolate_pos_encoding=True, output_attentions=True).attentions
    assert attention.shape[-1] == height // 32 * (width // 32) + 1


def test_interpolation_changes_nothing_at_the_size_of_the_config():
    model, pixels = tower(), torch.randn(2, 3, 64, 64)
    assert torch.equal(model(pixels).pooler_output, model(pixels, interpolate_pos_encoding=True).pooler_output)


def test_a_position_table_that_is_constant_stays_so_on_any_grid():
    """A closed form: with one vector at every position the grid only counts its features."""
    model = tower().double()
    with torch.no_grad():
        model.attnpool.positional_embedding[1:] = model.attnpool.positional_embedding[1]
    wide = torch.randn(1, 3, 64, 32, dtype=torch.float64)
    positions = []
    model.attnpool.k_proj.register_forward_pre_hook(lambda module, args: positions.append(args[0]))
    features = model(wide, interpolate_pos_encoding=True).last_hidden_state.flatten(2).mT
    expected = model.attnpool.positional_embedding[1]
    torch.testing.assert_close(positions[0][:, 1:] - features, expected.expand(1, 2, -1))
    torch.testing.assert_close(positions[0][:, 0] - features.mean(1), model.attnpool.positional_embedding[:1])


@pytest.mark.parametrize("shape", [(2, 3, 80, 64), (2, 3, 64, 72)])
def test_a_side_that_is_no_multiple_of_32_is_refused(shape):
    with pytest.raises(ValueError, match=f"{shape[2]}x{shape[3]}.*32x32.*multiples"):
        tower()(torch.randn(shape), interpolate_pos_encoding=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths.*\[1, 1, 1\]"),
        ({"depths": (1, 0, 1, 1)}, r"depths.*\[1, 0, 1, 1\]"),
        ({"num_attention_heads": 7}, r"num_attention_heads \(7\)"),
        ({"num_attention_heads": -1}, r"num_attention_heads \(-1\)"),
        ({"image_size": 80}, "80.*32"),
        ({"width": 7}, "width \\(7\\) must be even"),
        ({"pos_embed_interpolation": "nearest"}, "pos_embed_interpolation.*nearest"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        MMClipResNetConfig(**{**RESNET, **changes})


@pytest.mark.parametrize("field", ["hidden_size", "patch_size", "num_hidden_layers"])
def test_what_follows_from_other_fields_cannot_be_given(field):
    with pytest.raises(ValueError, match=f"{field} follow from width and depths"):
        MMClipResNetConfig(**RESNET, **{field: 4})


def test_weights_of_another_width_are_refused(tmp_path, caplog):
    tower().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        MMClipResNetModel.from_pretrained(tmp_path, config=MMClipResNetConfig(**{**RESNET, "width": 10}))
    assert "conv1.weight" in caplog.text and "MISMATCH" in caplog.text


def test_the_joint_space_has_the_width_that_the_pool_projects_to():
    with pytest.raises(StrictDataclassClassValidationError, match="projects to 24.*projection_dim is 32"):
        MMClipConfig(vision_config={"model_type": "mm_clip_resnet", **RESNET}, projection_dim=32)
    assert (
        MMClipConfig(vision_config={"model_type": "mm_clip_resnet"}, projection_dim=32).vision_config.projection_dim
        == 32
    )


def test_statistics_are_the_running_means_of_the_batches():
    model, first, second = tower().train(), torch.randn(6, 3, 64, 64), torch.randn(6, 3, 64, 64)
    for pixels in (first, second):
        model(pixels)
    maps = [nn.functional.conv2d(pixels, model.conv1.weight, stride=2, padding=1) for pixels in (first, second)]
    means = [features.mean((0, 2, 3)) for features in maps]
    variances = [features.var((0, 2, 3)) for features in maps]
    torch.testing.assert_close(model.bn1.running_mean, 0.09 * means[0] + 0.1 * means[1])
    torch.testing.assert_close(model.bn1.running_var, 0.81 + 0.09 * variances[0] + 0.1 * variances[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_a_batch_once(reentrant):
    plain, pixels = tower().train(), torch.randn(4, 3, 64, 64)
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, checkpointed):
        model(pixels).pooler_output.square().sum().backward()
    expected = statistics(plain)
    assert all(torch.equal(buffer, expected[name]) for name, buffer in statistics(checkpointed).items())
    for ours, reference in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad)


def test_a_frozen_tower_keeps_its_statistics_and_does_not_see_the_batch():
    model, pixels = tower(), torch.randn(4, 3, 64, 64)
    alone = model.requires_grad_(False)(pixels).pooler_output
    before = statistics(model)
    trained = model.train()(pixels).pooler_output
    assert model.bn1.training
    assert torch.equal(trained, alone)
    assert all(torch.equal(buffer, before[name]) for name, buffer in statistics(model).items())


def test_one_stage_can_be_frozen():
    model = tower().train()
    model.layer1.requires_grad_(False)
    before = statistics(model)
    model(torch.randn(4, 3, 64, 64)).pooler_output.sum().backward()
    moved = {name for name, buffer in statistics(model).items() if not torch.equal(buffer, before[name])}
    assert not any(name.startswith("layer1.") for name in moved)
    assert len(moved) == 3 * sum(isinstance(module, BatchNorm) for module in model.modules()) - 3 * sum(
        isinstance(module, BatchNorm) for module in model.layer1.modules()
    )


def test_a_new_block_is_its_shortcut():
    torch.manual_seed(0)
    block = MMClipResNetModel(MMClipResNetConfig(**RESNET)).layer1[1].eval()
    assert isinstance(block, Bottleneck)
    features = torch.randn(2, 32, 16, 16)
    assert torch.equal(block(features), torch.relu(features))


def test_the_tower_opens_from_a_whole_models_folder(tmp_path):
    whole = MMClipModel(clip_with_resnet_config())
    whole.save_pretrained(tmp_path)
    alone, info = MMClipResNetModel.from_pretrained(
        tmp_path, config=whole.config.vision_config, output_loading_info=True
    )
    assert not any(info.values())
    weights = whole.vision_model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in alone.state_dict().items())


def test_another_pooling_of_the_tower_is_refused():
    with pytest.raises(StrictDataclassClassValidationError, match="vision_pooling must be 'pooler'"):
        MMClipConfig(**{**clip_with_resnet_config().to_dict(), "vision_pooling": "mean"})


def test_the_whole_model_has_no_projection_of_its_own_for_pictures():
    model = MMClipModel(clip_with_resnet_config()).eval()
    pixels = torch.randn(2, 3, 64, 64)
    features = model.get_image_features(pixels).pooler_output
    assert features.shape == (2, 24)
    assert torch.equal(features, model.vision_model(pixels).pooler_output)
    assert not any("visual_projection" in name for name in model.state_dict())
