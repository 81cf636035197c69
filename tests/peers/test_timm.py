"""ViT, and the picture tower of CLIP, against timm."""

import re
from functools import partial

import pytest

pytest.importorskip("timm")

import torch
from timm.layers import QuickGELU, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from hf_mm.models.clip.configuration_clip import MMClipVisionConfig
from hf_mm.models.clip.modeling_clip import MMClipVisionModel
from hf_mm.models.vit.configuration_vit import MMViTConfig
from hf_mm.models.vit.modeling_vit import MMViTForImageClassification
from hf_mm.nn.positions import resize_position_table

from .parity import BOUNDS, gradient_errors, output_errors, perturbed, share_weights, third, whole, worst

LABELS = torch.tensor([0, 3, 6, 3])
SQUARE, WIDE = (32, 32), (32, 48)
WIDTH = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
EVERY_DTYPE = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
EVERY_SIZE = pytest.mark.parametrize("size", [SQUARE, WIDE], ids=str)
ACTIVATIONS = {"gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"), "gelu": nn.GELU, "quick_gelu": QuickGELU}


def our_model(dtype: torch.dtype, size: tuple[int, int] = SQUARE, **options) -> MMViTForImageClassification:
    config = MMViTConfig(
        **WIDTH, image_size=size, patch_size=8, num_labels=7, pos_embed_interpolation="bicubic_antialias", **options
    )
    return perturbed(MMViTForImageClassification(config), dtype)


def their_model(activation: str = "gelu", size: tuple[int, int] = SQUARE, **options) -> VisionTransformer:
    width = {"embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 2}
    options = {"num_classes": 7, **options}
    return VisionTransformer(img_size=size, patch_size=8, act_layer=ACTIVATIONS[activation], **width, **options)


# Mean pooling: timm's default puts the last norm after the mean (fc_norm), as MAE does; ours, as the authors', before.
POOLINGS = {
    "cls": {},
    "mean": {"global_pool": "avg", "class_token": False, "fc_norm": False},
}
EVERY_POOLING = pytest.mark.parametrize("pooling", POOLINGS)

NAMES = {
    "vit.": "",
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "encoder.layers": "blocks",
    "self_attn.out_proj": "attn.proj",
    "self_attn": "attn",
    "layer_norm": "norm",
    "layernorm": "norm",
    "classifier": "head",
}


def find(name: str):
    """Our name of a ViT parameter to that of timm and the part of it."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    if fused := re.search(r"[qkv]_proj", name):
        return name.replace(fused[0], "qkv"), third(fused[0][0])
    return name, whole


def our_outputs(model: MMViTForImageClassification, pixels: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    outputs = model(pixels, labels=LABELS, **options)
    trunk = model.vit(pixels, **options)
    return {
        "tokens": trunk.last_hidden_state,
        "pooled": trunk.pooler_output,
        "logits": outputs.logits,
        "loss": outputs.loss,
    }


def their_outputs(peer: VisionTransformer, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = peer.forward_features(pixels)
    logits = peer(pixels)
    return {
        "tokens": tokens,
        "pooled": peer.forward_head(tokens, pre_logits=True),
        "logits": logits,
        "loss": nn.functional.cross_entropy(logits, LABELS),
    }


def compare(pooling: str, dtype: torch.dtype, size: tuple[int, int], activation: str, theirs: str):
    model = our_model(dtype, size, hidden_act=activation, pooling=pooling)
    peer = share_weights(model, their_model(theirs, size, **POOLINGS[pooling]), find)
    pixels = torch.randn(len(LABELS), 3, *size, dtype=dtype)
    ours, reference = our_outputs(model, pixels), their_outputs(peer, pixels)
    return output_errors(ours, reference), gradient_errors(model, ours["loss"], peer, reference["loss"], find)


@EVERY_DTYPE
@EVERY_SIZE
@EVERY_POOLING
@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu"])
def test_features_logits_loss_and_gradients(pooling, activation, size, dtype):
    outputs, gradients = compare(pooling, dtype, size, activation, activation)
    assert worst(outputs) <= (BOUNDS[dtype], "")
    assert worst(gradients) <= (BOUNDS[dtype], "")


@EVERY_DTYPE
@EVERY_POOLING
@pytest.mark.parametrize(("ours", "theirs"), [("gelu_pytorch_tanh", "gelu"), ("gelu", "gelu_pytorch_tanh")])
def test_another_activation_is_noticed(pooling, ours, theirs, dtype):
    for errors in compare(pooling, dtype, SQUARE, ours, theirs):
        assert worst(errors) > (BOUNDS[dtype], "")


def test_their_default_mean_pooling_norms_after_the_mean():
    """The same weights under timm's `fc_norm` give other logits: such checkpoints need a model that pools first."""
    model = our_model(torch.float64, pooling="mean", hidden_act="gelu")
    peer = their_model("gelu", global_pool="avg", class_token=False)
    share_weights(model, peer, lambda name: find(name.replace("vit.layernorm", "fc_norm")))
    pixels = torch.randn(len(LABELS), 3, *SQUARE, dtype=torch.float64)
    pooled = model.vit.encoder(model.vit.embeddings(pixels)).mean(dim=1)
    logits = {"logits": model.classifier(model.vit.layernorm(pooled))}
    theirs = {"logits": peer(pixels)}
    assert worst(output_errors(logits, theirs)) <= (1e-9, "")
    assert output_errors({"logits": model(pixels).logits}, theirs)["logits"] > 1e-2


GRIDS = [
    ((4, 4), (8, 8)),
    ((4, 4), (2, 2)),
    ((14, 14), (24, 24)),
    ((4, 6), (7, 3)),
    ((4, 6), (6, 4)),
    ((5, 5), (5, 5)),
]


@pytest.mark.parametrize(("source", "target"), GRIDS, ids=str)
@pytest.mark.parametrize("prefix", [0, 1])
def test_resized_position_tables(source, target, prefix):
    table = torch.randn(prefix + source[0] * source[1], 6)
    theirs = {"table": resample_abs_pos_embed(table[None], list(target), list(source), num_prefix_tokens=prefix)[0]}
    ours = {"table": resize_position_table(table, source, target, "bicubic_antialias", prefix)}
    assert worst(output_errors(ours, theirs)) <= (1e-5, "")
    if source != target:
        for name in ("bicubic", "bilinear_corners"):
            wrong = {"table": resize_position_table(table, source, target, name, prefix)}
            assert output_errors(wrong, theirs)["table"] > 1e-2


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (24, 56)], ids=str)
@EVERY_POOLING
def test_pictures_of_another_size(pooling, size):
    """In float32 alone: timm resizes the table in it whatever the dtype of the model."""
    model = our_model(torch.float32, WIDE, pooling=pooling)
    peer = their_model("gelu_pytorch_tanh", WIDE, dynamic_img_size=True, **POOLINGS[pooling])
    share_weights(model, peer, find)
    pixels = torch.randn(len(LABELS), 3, *size)
    ours, theirs = our_outputs(model, pixels, interpolate_pos_encoding=True), their_outputs(peer, pixels)
    assert worst(output_errors(ours, theirs)) <= (1e-5, "")
    errors = gradient_errors(model, ours["loss"], peer, theirs["loss"], find)
    assert worst(errors) <= (1e-5, "")


CLIP_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "pre_layrnorm": "norm_pre",
    "post_layernorm": "norm",
}


def find_in_clip(name: str):
    """Our name of a parameter of CLIP's picture tower to that of timm and the part of it."""
    for ours, theirs in CLIP_NAMES.items():
        name = name.replace(ours, theirs)
    if name in ("cls_token", "pos_embed"):
        return name, (lambda tensor: tensor[0, 0]) if name == "cls_token" else (lambda tensor: tensor[0])
    return find(name)


@EVERY_DTYPE
@EVERY_SIZE
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_picture_tower_of_clip(activation, size, dtype):
    """timm's `pre_norm=True` is CLIP's tower: a norm before the blocks, no bias of the patches, eps 1e-5."""
    model = MMClipVisionModel(MMClipVisionConfig(**WIDTH, image_size=size, patch_size=8, hidden_act=activation))
    perturbed(model, dtype)
    norm = partial(nn.LayerNorm, eps=1e-5)
    peer = their_model(activation, size, num_classes=0, pre_norm=True, norm_layer=norm)
    share_weights(model, peer, find_in_clip)
    pixels, direction = torch.randn(4, 3, *size, dtype=dtype), torch.randn(4, 48, dtype=dtype)
    ours, theirs = {"pooled": model(pixels).pooler_output}, {"pooled": peer(pixels)}
    assert worst(output_errors(ours, theirs)) <= (BOUNDS[dtype], "")
    losses = [(outputs["pooled"] * direction).mean() for outputs in (ours, theirs)]
    assert worst(gradient_errors(model, losses[0], peer, losses[1], find_in_clip)) <= (BOUNDS[dtype], "")
