"""Any `AutoModel` vision encoder as the frozen tower of a composite: which features it gives, and of what shape.

Functions, not a wrapping module: a composite holds ``self.vision_tower = AutoModel.from_config(...)``, and its state
dict keeps the names that the encoder has alone.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..nn.patches import to_pair


@dataclass(frozen=True)
class TowerLayout:
    """What `tower_tokens` gives for one picture.

    Attributes:
        width: D, of every token.
        grid: ``(rows, columns)`` of the tokens that stand for places of the picture, in reading order; None where the
            size of the pictures is not known, or the places form no grid.
        num_prefix_tokens: class, register and distillation tokens, which come before the grid.
        image_size: ``(height, width)`` of the pictures; None where neither config nor caller tells.
        num_tokens: N, prefix tokens included; None where `image_size` is.
    """

    width: int
    grid: tuple[int, int] | None
    num_prefix_tokens: int
    image_size: tuple[int, int] | None
    num_tokens: int | None


def tower_layout(
    config: PreTrainedConfig, layer: int = -1, image_size: int | tuple[int, int] | None = None
) -> TowerLayout:
    """The shape of a tower's features, from one pass through a tower without weights.

    Args:
        config: of a vision encoder that `AutoModel` opens, or of a model that contains one, such as ``clip``.
        layer: see `tower_tokens`.
        image_size: of the pictures, by default the config's. Convolutional configs have none: pass the image
            processor's.

    Raises:
        ValueError: `AutoModel` opens no such config, the encoder takes more than `pixel_values`, or has no such layer.
    """
    if type(config) not in MODEL_MAPPING and not getattr(config, "auto_map", None):
        raise ValueError(f"{config.model_type} is no encoder that AutoModel opens: give the config of one that is.")
    with torch.device("meta"):
        tower = vision_encoder(AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager")).eval()
    config = tower.config
    native = getattr(config, "image_size", None)
    size = image_size or native
    known = to_pair(size) if size else None
    height, width = known or (224, 224)  # any size tells the width
    pixels = torch.empty(2, getattr(config, "num_channels", 3), height, width, device="meta", dtype=tower.dtype)
    with torch.no_grad():
        state = _state(tower, pixels, layer, interpolate_pos_encoding=bool(native) and known != to_pair(native))
    grid, num_prefix_tokens = _places(state, config, (height, width))
    tokens = _as_tokens(state)
    if known is None:
        return TowerLayout(tokens.shape[2], None, num_prefix_tokens or 0, None, None)
    return TowerLayout(tokens.shape[2], grid, num_prefix_tokens or 0, known, tokens.shape[1])


def tower_tokens(
    tower: PreTrainedModel,
    pixel_values: torch.Tensor,
    layer: int = -1,
    class_token: bool = True,
    interpolate_pos_encoding: bool = False,
) -> torch.Tensor:
    """The features of one layer of a vision encoder, feature maps flattened to tokens in reading order.

    Args:
        tower: opened by `AutoModel`; its mode and whether gradients flow are the caller's.
        pixel_values: ``(B, C, H, W)``, normalised.
        layer: -1 is the encoder's `last_hidden_state`, after a final norm where it has one; any other is an index of
            its `hidden_states`, which transformers counts from the embeddings at 0 and takes before that norm. -2 is
            what LLaVA takes of CLIP.
        class_token: keep the prefix tokens (class, registers, distillation), where there are some.
        interpolate_pos_encoding: accept pictures of another size than the encoder's own; encoders without such an
            argument take any size they can without it.

    Returns:
        ``(B, N, D)``; see `tower_layout` for N and D.

    Raises:
        ValueError: the encoder takes more than `pixel_values`, gives no tokens for each picture, has no such layer, or
            its prefix tokens cannot be told from the others.
    """
    state = _state(tower, pixel_values, layer, interpolate_pos_encoding)
    tokens = _as_tokens(state)
    if class_token:
        return tokens
    _, num_prefix_tokens = _places(state, tower.config, pixel_values.shape[-2:])
    if num_prefix_tokens is None:
        raise ValueError(
            f"the {tokens.shape[1]} tokens of {tower.config.model_type} form no grid, so its class token cannot be told "
            "from the others: pass class_token=True."
        )
    return tokens[:, num_prefix_tokens:]


def vision_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """The vision part of a model: of ``clip`` or ``siglip`` its picture tower, of a classifier its trunk, of an encoder
    the encoder itself.

    Raises:
        ValueError: the model takes no pictures.
    """
    whole = hasattr(model.config, "vision_config")
    encoder = model.get_encoder(modality="image") if whole else _trunk(model)
    if encoder is model and whole or encoder.main_input_name != "pixel_values":
        raise ValueError(f"{type(model).__name__} has no vision encoder: give a model that takes pixel_values.")
    return encoder


def tower_image_processor(folder_or_id: str, **kwargs) -> Any:
    """The image processor that a vision encoder was saved with.

    Args:
        folder_or_id: folder or Hub id.
        **kwargs: of `AutoImageProcessor.from_pretrained`, such as `revision`.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoImageProcessor.from_pretrained(folder_or_id, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder_or_id} has no image processor (preprocessor_config.json): save the one that its pictures were "
            "prepared with there, by image_processor.save_pretrained."
        ) from error


def _trunk(model: PreTrainedModel) -> PreTrainedModel:
    """What `AutoModel` opens of a model with a head. (The base of some encoders, such as DINOv3, is a part of them.)"""
    return model.base_model if isinstance(model.base_model, MODEL_MAPPING.get(type(model.config), ())) else model


def _state(
    tower: PreTrainedModel, pixel_values: torch.Tensor, layer: int, interpolate_pos_encoding: bool
) -> torch.Tensor:
    """``(B, N, D)`` or ``(B, D, H, W)``: the features of a layer as the encoder gives them."""
    name, options = tower.config.model_type, {}
    adapted = hasattr(tower, "get_base_model")  # by PEFT, whose forward takes anything
    arguments = inspect.signature((tower.get_base_model() if adapted else tower).forward).parameters
    others = [
        argument.name
        for argument in arguments.values()
        if argument.default is argument.empty
        and argument.kind is argument.POSITIONAL_OR_KEYWORD
        and argument.name != "pixel_values"
    ]
    if others or "pixel_values" not in arguments:
        needed = ", ".join(others) or "no pixel_values"
        raise ValueError(f"{name} takes {needed}, but a tower must take pixel_values alone: give another encoder.")
    if interpolate_pos_encoding and "interpolate_pos_encoding" in arguments:
        options["interpolate_pos_encoding"] = True
    if layer != -1:
        # Of the encoders that can keep one hidden state and let go of the others, those without a number of layers
        # cannot count it from the end.
        counted = layer >= 0 or hasattr(tower.config, "num_hidden_layers")
        options["output_hidden_states"] = [layer] if counted else True
    outputs = tower(pixel_values=pixel_values, return_dict=True, **options)
    state = outputs.get("last_hidden_state") if layer == -1 else _hidden_state(outputs, layer, name)
    if "ids_restore" in outputs:
        raise ValueError(f"{name} hides and shuffles patches at random: open its weights as a plain encoder, vit.")
    if state is None or state.ndim not in (3, 4) or state.shape[0] != pixel_values.shape[0]:
        found = "none" if state is None else f"a tensor {tuple(state.shape)}"
        raise ValueError(
            f"{name} gives {found} for {pixel_values.shape[0]} pictures, where a tower must give tokens (B, N, D) or a "
            "map (B, D, H, W) for each: give another encoder."
        )
    if state.ndim == 4 and state.shape[1] != getattr(tower.config, "hidden_size", None) == state.shape[3]:
        return state.permute(0, 3, 1, 2)
    return state


def _hidden_state(outputs: ModelOutput, layer: int, name: str) -> torch.Tensor:
    states = outputs.get("hidden_states") or ()
    if not -len(states) <= layer < len(states):
        there = f"hidden states {-len(states)} to {len(states) - 1}" if states else "no hidden states"
        raise ValueError(f"{name} has {there}: layer {layer} is none of them, and -1 its last_hidden_state.")
    return states[layer]


def _as_tokens(state: torch.Tensor) -> torch.Tensor:
    return state.flatten(2).transpose(1, 2) if state.ndim == 4 else state


def _places(
    state: torch.Tensor, config: PreTrainedConfig, image_size: tuple[int, int]
) -> tuple[tuple[int, int] | None, int | None]:
    """The grid that a picture's tokens form, and how many come before it; (None, None) where that cannot be told.

    One token a patch means that all others are prefix tokens. Fewer tokens than patches, as of Swin, or a config
    without patches: the largest grid in the picture's proportions.
    """
    if state.ndim == 4:
        return tuple(state.shape[2:]), 0
    count = state.shape[1]
    if stride := getattr(config, "patch_stride", None) or getattr(config, "patch_size", None):
        rows, columns = (side // step for side, step in zip(image_size, to_pair(stride), strict=True))
        if rows * columns <= count:
            return (rows, columns), count - rows * columns
    height, width = image_size
    for number in range(count, 0, -1):
        rows, columns = round((number * height / width) ** 0.5), round((number * width / height) ** 0.5)
        if rows * columns == number:
            return (rows, columns), count - number
    return None, None
