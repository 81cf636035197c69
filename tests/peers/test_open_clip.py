"""CLIP with a Vision Transformer tower against open_clip."""

import re

import pytest

pytest.importorskip("open_clip")

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, resize_pos_embed

from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.modeling_clip import MMClipModel

from .parity import BOUNDS, gradient_errors, output_errors, perturbed, share_weights, third, whole, worst

CONTEXT, VOCABULARY = 16, 64
START, END = VOCABULARY - 2, VOCABULARY - 1
LENGTHS = (7, 3, 10, 5)  # of the texts, start and end token included
EVERY_DTYPE = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])


def our_model(activation: str, dtype: torch.dtype, **vision) -> MMClipModel:
    common = {"num_hidden_layers": 2, "hidden_act": activation}
    picture = {
        "hidden_size": 48,
        "intermediate_size": 192,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2}
    ids = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    config = MMClipConfig(
        vision_config={**common, **picture, **vision},
        text_config={**common, **text, **ids, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT},
        projection_dim=24,
    )
    return perturbed(MMClipModel(config), dtype)


def their_model(activation: str, image_size: int | tuple[int, int] = 32) -> CLIP:
    return CLIP(
        embed_dim=24,
        vision_cfg=CLIPVisionCfg(layers=2, width=48, head_width=16, patch_size=8, image_size=image_size),
        text_cfg=CLIPTextCfg(context_length=CONTEXT, vocab_size=VOCABULARY, width=32, heads=2, layers=2),
        quick_gelu=activation == "quick_gelu",
    )


NAMES = {
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "logit_scale": "logit_scale",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "fc1": "c_fc",
    "fc2": "c_proj",
}


def find(name: str):
    """Our name of a parameter to that of open_clip and the part of it."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    if fused := re.search(r"\.([qkv])_proj\.", name):
        return name.replace(fused[0], ".in_proj_"), third(fused[1])
    if name in ("visual.proj", "text_projection"):
        return name, torch.t
    return name, (lambda scalar: scalar.reshape(1)) if name == "logit_scale" else whole


def batch(dtype: torch.dtype, height: int = 32, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures, and ids that are zero after the end token up to the context, as open_clip's tokenizer gives them."""
    ids = torch.zeros(len(LENGTHS), CONTEXT, dtype=torch.long)
    for row, length in zip(ids, LENGTHS, strict=True):
        row[:length] = torch.tensor([START, *torch.randint(1, START, (length - 2,)), END])
    return torch.randn(len(LENGTHS), 3, height, width, dtype=dtype), ids


def our_outputs(model: MMClipModel, pixels: torch.Tensor, ids: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    outputs = model(input_ids=ids, pixel_values=pixels, **options)
    return {
        "image features": outputs.vision_model_output.pooler_output,
        "text features": outputs.text_model_output.pooler_output,
        "unit image features": outputs.image_embeds,
        "unit text features": outputs.text_embeds,
        "logits per image": outputs.logits_per_image,
        "logits per text": outputs.logits_per_text,
        "loss": outputs.loss,
    }


def their_outputs(peer: CLIP, pixels: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    images, texts, scale = peer(pixels, ids)
    logits_per_image, logits_per_text = peer.get_logits(pixels, ids)
    return {
        "image features": peer.encode_image(pixels),
        "text features": peer.encode_text(ids),
        "unit image features": images,
        "unit text features": texts,
        "logits per image": logits_per_image,
        "logits per text": logits_per_text,
        "loss": ClipLoss()(images, texts, scale),
    }


def compare(activation: str, dtype: torch.dtype, their_activation: str) -> tuple[dict, dict]:
    model = our_model(activation, dtype)
    peer = share_weights(model, their_model(their_activation), find)
    pixels, ids = batch(dtype)
    ours, theirs = our_outputs(model, pixels, ids), their_outputs(peer, pixels, ids)
    return output_errors(ours, theirs), gradient_errors(model, ours["loss"], peer, theirs["loss"], find)


def test_as_many_parameters():
    count = sum(parameter.numel() for parameter in our_model("gelu", torch.float32).parameters())
    assert count == sum(parameter.numel() for parameter in their_model("gelu").parameters()) == 96_769


@EVERY_DTYPE
@EVERY_ACTIVATION
def test_features_logits_loss_and_gradients(activation, dtype):
    outputs, gradients = compare(activation, dtype, activation)
    assert worst(outputs) <= (BOUNDS[dtype], "")
    assert worst(gradients) <= (BOUNDS[dtype], "")


@EVERY_DTYPE
@EVERY_ACTIVATION
def test_another_activation_is_noticed(activation, dtype):
    for errors in compare(activation, dtype, "gelu" if activation == "quick_gelu" else "quick_gelu"):
        assert worst(errors) > (BOUNDS[dtype], "")


@EVERY_DTYPE
def test_short_texts_are_as_good_as_texts_padded_to_the_context(dtype):
    """open_clip always runs its whole context; ours may be given less of it, padded with anything."""
    model = our_model("quick_gelu", dtype)
    peer = share_weights(model, their_model("quick_gelu"), find)
    pixels, ids = batch(dtype)
    short = ids[:, : max(LENGTHS) + 1].masked_fill(ids[:, : max(LENGTHS) + 1] == 0, END)
    ours, theirs = our_outputs(model, pixels, short), their_outputs(peer, pixels, ids)
    assert worst(output_errors(ours, theirs)) <= (BOUNDS[dtype], "")
    errors = gradient_errors(model, ours["loss"], peer, theirs["loss"], find)
    assert worst(errors) <= (BOUNDS[dtype], "")
    row = model.get_text_features(input_ids=ids[:1, : LENGTHS[0]]).pooler_output
    assert worst(output_errors({"row": row}, {"row": theirs["text features"][:1]})) <= (BOUNDS[dtype], "")


def on_pictures_of(size: tuple[int, int], dtype: torch.dtype, **vision) -> tuple[dict, dict]:
    """Ours resizes its position table at the call, open_clip when a checkpoint is loaded into a model of another size."""
    model = our_model("gelu", dtype, **vision)
    state = share_weights(model, their_model("gelu"), find).state_dict()
    peer = their_model("gelu", size).to(dtype).eval()
    resize_pos_embed(state, peer)
    peer.load_state_dict(state)
    pixels, ids = batch(dtype, *size)
    return our_outputs(model, pixels, ids, interpolate_pos_encoding=True), their_outputs(peer, pixels, ids)


@EVERY_DTYPE
@pytest.mark.parametrize("size", [(64, 64), (16, 16), (24, 56), (40, 32)], ids=str)
def test_pictures_of_another_size(size, dtype):
    assert worst(output_errors(*on_pictures_of(size, dtype))) <= (BOUNDS[dtype], "")


@pytest.mark.parametrize("size", [(64, 64), (16, 16)], ids=str)
def test_another_interpolation_is_noticed(size):
    errors = output_errors(*on_pictures_of(size, torch.float32, pos_embed_interpolation="bicubic"))
    assert errors["image features"] > 1e-3
