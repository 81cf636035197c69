"""CLIP with a ResNet tower against open_clip, in evaluation and in training."""

import pytest

pytest.importorskip("open_clip")

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn

from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.modeling_clip import MMClipModel

from . import test_open_clip as transformer
from .parity import BOUNDS, gradient_errors, output_errors, perturbed, share_weights, whole, worst

WIDTH, DEPTHS = 16, (2, 1, 1, 1)
EVERY_DTYPE = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
EVERY_MODE = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])


def our_model(dtype: torch.dtype, image_size: int | tuple[int, int] = 64) -> MMClipModel:
    text = transformer.our_model("quick_gelu", dtype).config.text_config
    vision = {
        "model_type": "mm_clip_resnet",
        "depths": DEPTHS,
        "width": WIDTH,
        "num_attention_heads": 16,
        "image_size": image_size,
        "projection_dim": 24,
    }
    model = perturbed(MMClipModel(MMClipConfig(vision_config=vision, text_config=text, projection_dim=24)), dtype)
    with torch.no_grad():
        for norm in norms(model):
            norm.running_mean.add_(0.1 * torch.randn_like(norm.running_mean))
            norm.running_var.mul_(1 + 0.3 * torch.rand_like(norm.running_var))
    return model


def their_model() -> CLIP:
    return CLIP(
        embed_dim=24,
        vision_cfg=CLIPVisionCfg(layers=DEPTHS, width=WIDTH, head_width=32, image_size=64),
        text_cfg=CLIPTextCfg(
            context_length=transformer.CONTEXT, vocab_size=transformer.VOCABULARY, width=32, heads=2, layers=2
        ),
        quick_gelu=True,
    )


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def find(name: str):
    if name.startswith("vision_model."):
        return name.replace("vision_model", "visual"), whole
    return transformer.find(name)


def pair(dtype: torch.dtype, training: bool) -> tuple[MMClipModel, CLIP]:
    model = our_model(dtype)
    peer = share_weights(model, their_model(), find)
    statistics = {name.replace("vision_model", "visual"): value for name, value in model.named_buffers()}
    peer.load_state_dict({**peer.state_dict(), **statistics})
    return model.train(training), peer.train(training)


def test_as_many_parameters():
    ours = sum(parameter.numel() for parameter in our_model(torch.float32).parameters())
    assert ours == sum(parameter.numel() for parameter in their_model().parameters())


@EVERY_DTYPE
@EVERY_MODE
def test_features_logits_loss_gradients_and_statistics(dtype, training):
    model, peer = pair(dtype, training)
    pixels, ids = transformer.batch(dtype, 64, 64)
    outputs = model(input_ids=ids, pixel_values=pixels)
    images, texts, scale = peer(pixels, ids)
    ours = {"images": outputs.image_embeds, "texts": outputs.text_embeds, "loss": outputs.loss}
    theirs = {"images": images, "texts": texts, "loss": ClipLoss()(images, texts, scale)}
    assert worst(output_errors(ours, theirs)) <= (BOUNDS[dtype], "")
    # Sums over a picture in float32 round where both libraries add in different orders.
    errors = gradient_errors(model, ours["loss"], peer, theirs["loss"], find)
    assert worst(errors) <= (BOUNDS[dtype], "")
    buffers = dict(peer.named_buffers())
    statistics = {name: value for name, value in model.named_buffers() if "running" in name}
    expected = {name: buffers[name.replace("vision_model", "visual")] for name in statistics}
    assert worst(output_errors(statistics, expected)) <= (BOUNDS[dtype], "")


@EVERY_DTYPE
def test_the_feature_map_is_theirs(dtype):
    model, peer = pair(dtype, training=False)
    pixels, _ = transformer.batch(dtype, 64, 64)
    maps = []
    peer.visual.layer4.register_forward_hook(lambda module, args, output: maps.append(output))
    expected = {"pooled": peer.visual(pixels), "map": maps[0]}
    outputs = model.vision_model(pixels)
    ours = {"pooled": outputs.pooler_output, "map": outputs.last_hidden_state}
    assert worst(output_errors(ours, expected)) <= (BOUNDS[dtype], "")


def test_another_activation_is_noticed():
    """The pictures' tower has ReLU whatever the text has; GELU in its place is far off."""
    model, peer = pair(torch.float64, training=False)
    for module in peer.visual.modules():
        for name in ("act1", "act2", "act3"):
            if hasattr(module, name):
                setattr(module, name, nn.GELU())
    pixels, _ = transformer.batch(torch.float64, 64, 64)
    assert worst(output_errors({"": model.vision_model(pixels).pooler_output}, {"": peer.visual(pixels)}))[0] > 1e-3
