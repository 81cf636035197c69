"""A converted ViT against the library that its checkpoint was published for, or the nearest one, on random pictures."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, ViTForImageClassification, ViTModel

from ...conversion.checkpoint import Checkpoint
from ...conversion.peers import NOT_VERIFIED, built_by, import_peer, largest_difference
from ...nn.patches import to_pair
from .conversion_vit import timm_arguments, vit_layout
from .modeling_vit import MMViTForImageClassification

BATCH = 4


def peer_of(checkpoint: Checkpoint) -> str:
    """The library to compare with, and what that leaves open: timm, which reads the authors' files too, or transformers.

    Raises:
        OSError: it is not installed.
    """
    layout = vit_layout(checkpoint.tensors)
    name = "transformers" if layout == "transformers" else "timm"
    import_peer(name)
    return f"{name}, {NOT_VERIFIED}" if layout == "timm" and not _names_architecture(checkpoint) else name


@torch.no_grad()
def compare_with_peer(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, float]:
    """max |difference| / max |theirs| of the tokens after the final norm, and of the logits where both have them.

    Args:
        checkpoint: the published weights.
        model: ours, converted from them.
    """
    config, classifies = model.config, isinstance(model, MMViTForImageClassification)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(BATCH, config.num_channels, *to_pair(config.image_size), generator=generator)
    ours = {"tokens": (model.vit if classifies else model)(pixels).last_hidden_state}
    if classifies and not (config.pre_logits and vit_layout(checkpoint.tensors) == "authors"):
        ours["logits"] = model(pixels).logits  # timm has no pre_logits
    theirs = _outputs(checkpoint, model, pixels)
    return {name: largest_difference(output, theirs[name]) for name, output in ours.items()}


def _outputs(checkpoint: Checkpoint, model: PreTrainedModel, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    if vit_layout(checkpoint.tensors) != "transformers":
        with built_by("timm"):
            peer = _timm_model(checkpoint, model)
        return {"tokens": peer.forward_features(pixels), "logits": peer(pixels)}
    if not isinstance(model, MMViTForImageClassification):
        peer = ViTModel.from_pretrained(
            checkpoint.folder, dtype=torch.float32, add_pooling_layer=model.config.pre_logits
        )
        return {"tokens": peer(pixels).last_hidden_state}
    peer = ViTForImageClassification.from_pretrained(checkpoint.folder, dtype=torch.float32)
    return {"tokens": peer.vit(pixels).last_hidden_state, "logits": peer(pixels).logits}


def _names_architecture(checkpoint: Checkpoint) -> bool:
    return checkpoint.folder is not None and "architecture" in checkpoint.configs.get("config.json", {})


def _timm_model(checkpoint: Checkpoint, model: PreTrainedModel) -> nn.Module:
    """timm's model in float32: as its own config declares it where there is one, else of our config's sizes."""
    timm = import_peer("timm")
    if vit_layout(checkpoint.tensors) == "timm":
        if _names_architecture(checkpoint):
            peer = timm.create_model(f"local-dir:{checkpoint.folder}", pretrained=False)
        else:
            peer = timm.models.VisionTransformer(**_timm_arguments(model))
        peer.load_state_dict(dict(checkpoint.tensors))
        return peer.eval()
    arrays = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in checkpoint.tensors.items()
    }
    heads = next(array.shape[1] for name, array in arrays.items() if name.endswith("/query/kernel"))
    peer = timm.models.VisionTransformer(**_timm_arguments(model) | {"num_heads": heads, "act_layer": "gelu_tanh"})
    with tempfile.TemporaryDirectory() as folder:  # timm reads the authors' files, and no tensors of theirs
        path = Path(folder) / "weights.npz"
        np.savez(path, **arrays)
        peer.load_pretrained(str(path))
    return peer.eval()


def _timm_arguments(model: PreTrainedModel) -> dict[str, Any]:
    config = copy.deepcopy(model.config)
    config.pre_logits = False
    classes = config.num_labels if isinstance(model, MMViTForImageClassification) else 0
    return {**timm_arguments(config), "num_classes": classes}
