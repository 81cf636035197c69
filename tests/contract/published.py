"""Checkpoints in the published layouts, key by key as the specifications list them: random numbers, true names and shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from hf_mm.models.clip.configuration_clip import MMClipConfig, MMClipResNetConfig, MMClipTextConfig
from hf_mm.models.eva_vit.configuration_eva_vit import EvaViTConfig
from hf_mm.models.pic2word.configuration_pic2word import Pic2WordMapperConfig
from hf_mm.models.vit.configuration_vit import MMViTConfig


class Drawn(dict):
    """Tensors of a checkpoint, drawn one by one; on the meta device only their shapes."""

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.device = device
        self.generator = None if device == "meta" else torch.Generator().manual_seed(0)

    def draw(self, name: str, *shape: int) -> None:
        if self.device == "meta":
            self[name] = torch.empty(shape, device="meta")
        else:
            self[name] = 0.1 * torch.randn(shape, generator=self.generator)

    def draw_norm(self, name: str, width: int) -> None:
        self.draw(f"{name}.weight", width)
        self.draw(f"{name}.bias", width)
        self[f"{name}.weight"] = self[f"{name}.weight"] + 1

    def draw_batch_norm(self, name: str, width: int) -> None:
        self.draw_norm(name, width)
        self.draw(f"{name}.running_mean", width)
        self.draw(f"{name}.running_var", width)
        self[f"{name}.running_var"] = self[f"{name}.running_var"].abs() + 0.5
        self[f"{name}.num_batches_tracked"] = torch.tensor(7, device=self.device)


def openai_state(config: MMClipConfig, device: str = "cpu", text_prefix: str = "") -> dict[str, torch.Tensor]:
    """The state dict of OpenAI's, or open_clip's, model of the config's sizes."""
    state = Drawn(device)
    vision, text = config.vision_config, config.text_config
    (_openai_resnet if isinstance(vision, MMClipResNetConfig) else openai_vit)(state, vision, config.projection_dim)
    width = text.hidden_size
    state.draw(f"{text_prefix}token_embedding.weight", text.vocab_size, width)
    state.draw(f"{text_prefix}positional_embedding", text.max_position_embeddings, width)
    _openai_blocks(state, f"{text_prefix}transformer", text)
    state.draw_norm(f"{text_prefix}ln_final", width)
    state.draw(f"{text_prefix}text_projection", width, config.projection_dim)
    state["logit_scale"] = torch.tensor(4.5, device=device)
    return dict(state)


def openai_vit(state: Drawn, vision: Any, projection_dim: int) -> None:
    width, patch, side = vision.hidden_size, vision.patch_size, vision.image_size // vision.patch_size
    state.draw("visual.class_embedding", width)
    state.draw("visual.positional_embedding", 1 + side**2, width)
    state.draw("visual.proj", width, projection_dim)
    state.draw("visual.conv1.weight", width, 3, patch, patch)
    state.draw_norm("visual.ln_pre", width)
    _openai_blocks(state, "visual.transformer", vision)
    state.draw_norm("visual.ln_post", width)


def _openai_blocks(state: Drawn, tower: str, config: Any) -> None:
    width, hidden = config.hidden_size, config.intermediate_size
    for number in range(config.num_hidden_layers):
        block = f"{tower}.resblocks.{number}"
        state.draw(f"{block}.attn.in_proj_weight", 3 * width, width)
        state.draw(f"{block}.attn.in_proj_bias", 3 * width)
        for name, rows, columns in (
            ("attn.out_proj", width, width),
            ("mlp.c_fc", hidden, width),
            ("mlp.c_proj", width, hidden),
        ):
            state.draw(f"{block}.{name}.weight", rows, columns)
            state.draw(f"{block}.{name}.bias", rows)
        state.draw_norm(f"{block}.ln_1", width)
        state.draw_norm(f"{block}.ln_2", width)


def _openai_resnet(state: Drawn, vision: MMClipResNetConfig, projection_dim: int) -> None:
    width = vision.width
    for number, channels in enumerate(((width // 2, 3), (width // 2, width // 2), (width, width // 2)), start=1):
        state.draw(f"visual.conv{number}.weight", *channels, 3, 3)
        state.draw_batch_norm(f"visual.bn{number}", channels[0])
    channels = width
    for stage, depth in enumerate(vision.depths, start=1):
        planes = width * 2 ** (stage - 1)
        for number in range(depth):
            block = f"visual.layer{stage}.{number}"
            state.draw(f"{block}.conv1.weight", planes, channels, 1, 1)
            state.draw(f"{block}.conv2.weight", planes, planes, 3, 3)
            state.draw(f"{block}.conv3.weight", 4 * planes, planes, 1, 1)
            for norm, norm_width in (("bn1", planes), ("bn2", planes), ("bn3", 4 * planes)):
                state.draw_batch_norm(f"{block}.{norm}", norm_width)
            if number == 0:
                state.draw(f"{block}.downsample.0.weight", 4 * planes, channels, 1, 1)
                state.draw_batch_norm(f"{block}.downsample.1", 4 * planes)
            channels = 4 * planes
    state.draw("visual.attnpool.positional_embedding", 1 + (vision.image_size // 32) ** 2, channels)
    for name, rows in (("q_proj", channels), ("k_proj", channels), ("v_proj", channels), ("c_proj", projection_dim)):
        state.draw(f"visual.attnpool.{name}.weight", rows, channels)
        state.draw(f"visual.attnpool.{name}.bias", rows)


def eva_state(
    config: EvaViTConfig, device: str = "cpu", prefix: str = "", blocks: int | None = None, head: bool = False
) -> dict[str, torch.Tensor]:
    """The state dict of LAVIS's EVA ViT of the config's sizes.

    Args:
        config: the sizes.
        device: ``"meta"`` for shapes alone.
        prefix: of all names.
        blocks: how many, where there are more than the config has.
        head: norm and head of the classifier that EVA-CLIP's tower was cut from.
    """
    state, width, hidden = Drawn(device), config.hidden_size, config.intermediate_size
    rows, columns = config.grid_size
    state.draw(f"{prefix}cls_token", 1, 1, width)
    state.draw(f"{prefix}pos_embed", 1, 1 + rows * columns, width)
    state.draw(f"{prefix}patch_embed.proj.weight", width, 3, config.patch_size, config.patch_size)
    state.draw(f"{prefix}patch_embed.proj.bias", width)
    for number in range(blocks or config.num_hidden_layers):
        block = f"{prefix}blocks.{number}"
        state.draw_norm(f"{block}.norm1", width)
        state.draw(f"{block}.attn.q_bias", width)
        state.draw(f"{block}.attn.v_bias", width)
        state.draw(f"{block}.attn.qkv.weight", 3 * width, width)
        for name, outputs, inputs in (
            ("attn.proj", width, width),
            ("mlp.fc1", hidden, width),
            ("mlp.fc2", width, hidden),
        ):
            state.draw(f"{block}.{name}.weight", outputs, inputs)
            state.draw(f"{block}.{name}.bias", outputs)
        state.draw_norm(f"{block}.norm2", width)
    if head:
        state.draw_norm(f"{prefix}norm", width)
        state.draw(f"{prefix}head.weight", 16, width)
        state.draw(f"{prefix}head.bias", 16)
    return dict(state)


def mapper_state(config: Pic2WordMapperConfig) -> dict[str, torch.Tensor]:
    """The state dict of the authors' mapping network of Pic2Word."""
    state, width = Drawn(), config.image_dim
    for number in range(config.num_hidden_layers):
        state.draw(f"layers.{number}.0.weight", config.hidden_dim, width)
        state.draw(f"layers.{number}.0.bias", config.hidden_dim)
        width = config.hidden_dim
    state.draw("fc_out.weight", config.word_dim, width)
    state.draw("fc_out.bias", config.word_dim)
    return dict(state)


def pic2word_content(
    clip: dict[str, torch.Tensor],
    mapper: dict[str, torch.Tensor],
    clip_prefix: str = "module.",
    mapper_prefix: str = "module.",
) -> dict[str, Any]:
    """What the authors' training of Pic2Word saves by ``torch.save``; on several cards names begin with ``module.``."""
    return {
        "epoch": 30,
        "name": "run",
        "state_dict": {f"{clip_prefix}{name}": tensor for name, tensor in clip.items()},
        "state_dict_img2text": {f"{mapper_prefix}{name}": tensor for name, tensor in mapper.items()},
        "optimizer": {
            "state": {0: {"step": torch.tensor(9.0), "exp_avg": torch.zeros(3)}},
            "param_groups": [{"lr": 1e-4, "params": [0]}],
        },
    }


def open_clip_json(config: MMClipConfig) -> dict[str, Any]:
    """The ``open_clip_config.json`` of a model of these sizes, as open_clip's own files are written."""
    vision, text = config.vision_config, config.text_config
    if isinstance(vision, MMClipResNetConfig):
        layers, width, heads = list(vision.depths), vision.width, vision.num_attention_heads
        vision_cfg = {"layers": layers, "width": width, "head_width": 32 * width // heads, "patch_size": None}
    else:
        layers, width = vision.num_hidden_layers, vision.hidden_size
        vision_cfg = {
            "layers": layers,
            "width": width,
            "head_width": width // vision.num_attention_heads,
            "patch_size": vision.patch_size,
            "mlp_ratio": vision.intermediate_size / width,
        }
    text_cfg = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": text.intermediate_size / text.hidden_size,
    }
    return {
        "model_cfg": {
            "embed_dim": config.projection_dim,
            "quick_gelu": text.hidden_act == "quick_gelu",
            "vision_cfg": {**vision_cfg, "image_size": vision.image_size},
            "text_cfg": text_cfg,
        },
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.3, 0.2], "interpolation": "bicubic"},
    }


def transformers_json(config: PreTrainedConfig, classifies: bool = False) -> dict[str, Any]:
    """The ``config.json`` of transformers' model of these sizes, field by field as its documentation lists them."""
    if isinstance(config, MMClipConfig):
        return {
            "model_type": "clip",
            "architectures": ["CLIPModel"],
            "projection_dim": config.projection_dim,
            "logit_scale_init_value": config.logit_scale_init_value,
            "text_config": transformers_json(config.text_config),
            "vision_config": transformers_json(config.vision_config),
        }
    sizes = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
    }
    if isinstance(config, MMClipTextConfig):
        return {
            **sizes,
            "model_type": "clip_text_model",
            "architectures": ["CLIPTextModel"],
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
            "projection_dim": config.projection_dim,
            "attention_dropout": config.attention_dropout,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
        }
    pictures = {"image_size": config.image_size, "patch_size": config.patch_size, "num_channels": config.num_channels}
    if isinstance(config, MMViTConfig):
        labels = {str(number): f"LABEL_{number}" for number in range(config.num_labels)}
        return {
            **sizes,
            **pictures,
            "model_type": "vit",
            "architectures": ["ViTForImageClassification" if classifies else "ViTModel"],
            "qkv_bias": config.qkv_bias,
            "hidden_dropout_prob": config.hidden_dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "id2label": labels,
            "label2id": {label: int(number) for number, label in labels.items()},
        }
    return {
        **sizes,
        **pictures,
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModel"],
        "projection_dim": config.projection_dim,
        "attention_dropout": config.attention_dropout,
    }


def flax_arrays(
    config: MMViTConfig, classes: int = 0, prefix: str = "", linen: bool = False, big_vision: bool = False
) -> dict[str, np.ndarray]:
    """What an ``.npz`` file of the authors' holds for a model of these sizes.

    Args:
        config: the sizes.
        classes: of the head; none with 0.
        prefix: of all names.
        linen: modules are counted by kind.
        big_vision: the position table is at the top.
    """
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}

    def draw(name: str, *shape: int, around: float = 0.0) -> None:
        arrays[prefix + name] = (around + 0.1 * random.standard_normal(shape)).astype(np.float32)

    def draw_norm(name: str) -> None:
        draw(f"{name}/scale", width, around=1.0)
        draw(f"{name}/bias", width)

    def draw_dense(name: str, inputs: Iterable[int], outputs: Iterable[int]) -> None:
        draw(f"{name}/kernel", *inputs, *outputs)
        draw(f"{name}/bias", *outputs)

    width, heads, patch = config.hidden_size, config.num_attention_heads, config.patch_size
    rows, columns = config.grid_size
    norm1, attention, norm2, mlp = (
        ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
        if linen
        else ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
    )
    if config.pooling == "cls":
        draw("cls", 1, 1, width)
    positions = "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"
    draw(positions, 1, (config.pooling == "cls") + rows * columns, width)
    draw_dense("embedding", (patch, patch, 3), (width,))
    for number in range(config.num_hidden_layers):
        block = f"Transformer/encoderblock_{number}"
        draw_norm(f"{block}/{norm1}")
        for part in ("query", "key", "value"):
            draw_dense(f"{block}/{attention}/{part}", (width,), (heads, width // heads))
        draw_dense(f"{block}/{attention}/out", (heads, width // heads), (width,))
        draw_norm(f"{block}/{norm2}")
        draw_dense(f"{block}/{mlp}/Dense_0", (width,), (config.intermediate_size,))
        draw_dense(f"{block}/{mlp}/Dense_1", (config.intermediate_size,), (width,))
    draw_norm("Transformer/encoder_norm")
    if config.pre_logits:
        draw_dense("pre_logits", (width,), (width,))
    if classes:
        draw_dense("head", (width,), (classes,))
    return arrays
