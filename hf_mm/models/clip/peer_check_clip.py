"""A converted CLIP against the library that its checkpoint was published for, on the same random pictures and texts."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import CLIPModel, CLIPTextModel, CLIPVisionModel, PreTrainedModel

from ...conversion.checkpoint import Checkpoint
from ...conversion.peers import NOT_VERIFIED, built_by, import_peer, largest_difference
from ...nn.patches import to_pair
from .conversion_clip import is_transformers_layout
from .modeling_clip import MMClipModel, MMClipTextModel
from .open_clip_config import open_clip_config
from .openai_files import published_name

BATCH = 4


def peer_of(checkpoint: Checkpoint) -> str:
    """The library that opens the checkpoint itself, and what a comparison with it leaves open.

    Raises:
        OSError: it is not installed.
    """
    name = "transformers" if is_transformers_layout(checkpoint) else "open_clip"
    import_peer(name)
    declared = "open_clip_config.json" in checkpoint.configs or published_name(checkpoint)
    return name if name == "transformers" or declared else f"{name}, {NOT_VERIFIED}"


@torch.no_grad()
def compare_with_peer(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, float]:
    """max |difference| / max |theirs| of the embeddings of pictures and texts, the peer built from the checkpoint itself.

    Args:
        checkpoint: the published weights.
        model: ours, converted from them.
    """
    theirs = _encoders(checkpoint, model)
    if isinstance(model, MMClipModel):
        inputs = {"image": _pictures(model.config.vision_config), "text": _texts(model.config.text_config)}
        ours = {
            "image": model.get_image_features(inputs["image"]).pooler_output,
            "text": model.get_text_features(inputs["text"]).pooler_output,
        }
    else:
        kind = "text" if isinstance(model, MMClipTextModel) else "image"
        inputs = {kind: (_texts if kind == "text" else _pictures)(model.config)}
        ours = {kind: model(inputs[kind]).pooler_output}
    return {
        f"{kind} embeddings": largest_difference(ours[kind], theirs[kind](batch)) for kind, batch in inputs.items()
    }


def _encoders(checkpoint: Checkpoint, model: PreTrainedModel) -> dict:
    """Functions from a batch of pictures or texts to the peer's embeddings."""
    if not is_transformers_layout(checkpoint):
        with built_by("open_clip"):
            peer = _open_clip_model(checkpoint, model)
        return {"image": peer.encode_image, "text": peer.encode_text}
    if not isinstance(model, MMClipModel):
        peer_class = CLIPTextModel if isinstance(model, MMClipTextModel) else CLIPVisionModel
        peer = peer_class.from_pretrained(checkpoint.folder, dtype=torch.float32)
        return dict.fromkeys(("image", "text"), lambda batch: peer(batch).pooler_output)
    peer = CLIPModel.from_pretrained(checkpoint.folder, dtype=torch.float32)
    return {
        "image": lambda batch: peer.get_image_features(batch).pooler_output,
        "text": lambda batch: peer.get_text_features(batch).pooler_output,
    }


def _open_clip_model(checkpoint: Checkpoint, model: MMClipModel) -> nn.Module:
    """open_clip's model: built from what the checkpoint, or open_clip itself, declares where either does."""
    open_clip = import_peer("open_clip")
    declared, published = checkpoint.configs.get("open_clip_config.json"), published_name(checkpoint)
    if declared is not None:
        model_cfg = copy.deepcopy(declared.get("model_cfg", declared))
    elif published is not None:
        name = published.replace("/", "-").replace("@336px", "-336")
        model_cfg = {**open_clip.get_model_config(name), "quick_gelu": True}
    else:
        model_cfg = open_clip_config(model.config)
    model_cfg.pop("custom_text", None)
    custom_text = any(name.startswith("text.") for name in checkpoint.tensors)
    peer = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**model_cfg)
    state = {name: checkpoint.tensors[name] for name in peer.state_dict()}
    state["logit_scale"] = state["logit_scale"].reshape(peer.logit_scale.shape)
    peer.load_state_dict(state)  # copies into float32
    return peer.eval()


def _pictures(config) -> torch.Tensor:
    height, width = to_pair(config.image_size)
    return torch.randn(BATCH, config.num_channels, height, width, generator=torch.Generator().manual_seed(0))


def _texts(config) -> torch.Tensor:
    """Texts ``(B, T)`` of any ids but the end token, then that, which also pads to the context: open_clip runs all of it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((BATCH, config.max_position_embeddings), config.eos_token_id)
    for row in ids:
        length = int(torch.randint(1, len(row) - 1, (1,), generator=generator))
        drawn = torch.randint(0, config.vocab_size - 1, (length,), generator=generator)
        row[:length] = drawn + (drawn >= config.eos_token_id)
    return ids
