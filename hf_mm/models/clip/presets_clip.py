"""The published sizes of CLIP: OpenAI's nine, and three of open_clip's."""

import copy
from typing import Any


def _resnet(
    depths: tuple[int, ...], width: int, image_size: int, projection_dim: int, text_width: int
) -> dict[str, Any]:
    """A model with a ResNet tower, whose attention heads are 64 wide."""
    vision = {
        "model_type": "mm_clip_resnet",
        "depths": depths,
        "width": width,
        "num_attention_heads": 32 * width // 64,
        "image_size": image_size,
        "projection_dim": projection_dim,
    }
    return {
        "vision_config": vision,
        "text_config": _text(text_width, 12, projection_dim),
        "projection_dim": projection_dim,
    }


def _vit(
    width: int,
    layers: int,
    patch_size: int,
    image_size: int,
    projection_dim: int,
    text_width: int,
    text_layers: int = 12,
    head_width: int = 64,
    mlp_width: int | None = None,
    hidden_act: str = "quick_gelu",
) -> dict[str, Any]:
    """A model with a Vision Transformer tower."""
    vision = {
        "hidden_size": width,
        "intermediate_size": mlp_width or 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // head_width,
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_act": hidden_act,
        "projection_dim": projection_dim,
    }
    return {
        "vision_config": vision,
        "text_config": _text(text_width, text_layers, projection_dim, hidden_act),
        "projection_dim": projection_dim,
    }


def _text(width: int, layers: int, projection_dim: int, hidden_act: str = "quick_gelu") -> dict[str, Any]:
    """The text tower, whose heads are 64 wide."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "hidden_act": hidden_act,
        "projection_dim": projection_dim,
    }


PRESETS = {
    "RN50": _resnet((3, 4, 6, 3), 64, 224, 1024, 512),
    "RN101": _resnet((3, 4, 23, 3), 64, 224, 512, 512),
    "RN50x4": _resnet((4, 6, 10, 6), 80, 288, 640, 640),
    "RN50x16": _resnet((6, 8, 18, 8), 96, 384, 768, 768),
    "RN50x64": _resnet((3, 15, 36, 10), 128, 448, 1024, 1024),
    "ViT-B-32": _vit(768, 12, 32, 224, 512, 512),
    "ViT-B-16": _vit(768, 12, 16, 224, 512, 512),
    "ViT-L-14": _vit(1024, 24, 14, 224, 768, 768),
    "ViT-L-14-336": _vit(1024, 24, 14, 336, 768, 768),
    "ViT-H-14": _vit(1280, 32, 14, 224, 1024, 1024, 24, head_width=80, hidden_act="gelu"),
    "ViT-g-14": _vit(1408, 40, 14, 224, 1024, 1024, 24, head_width=88, mlp_width=6144, hidden_act="gelu"),
    "ViT-bigG-14": _vit(1664, 48, 14, 224, 1280, 1280, 32, head_width=104, mlp_width=8192, hidden_act="gelu"),
}


def preset(name: str) -> dict[str, Any]:
    """The fields of `MMClipConfig` for a published model. Raises ValueError for a name that is none of `PRESETS`."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}.")
    return copy.deepcopy(PRESETS[name])
