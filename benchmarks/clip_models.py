"""One CLIP in three libraries, with equal weights: hf_mm, transformers, open_clip."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from open_clip import ClipLoss
from open_clip.model import CLIP as OpenClip
from torch import nn
from transformers import AutoModel, CLIPConfig
from transformers.utils import logging

from hf_mm.models.clip.configuration_clip import MMClipConfig, from_transformers_config
from hf_mm.models.clip.modeling_clip import MMClipModel

logging.disable_progress_bar()
LIBRARIES = ("hf_mm", "transformers", "open_clip")
DOCUMENTED_CONTEXT = 77  # of the texts that open_clip's tokenizer makes
# (ours and transformers' on disk, open_clip's), in the order in which they apply.
RENAMES = (
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)


@dataclass(frozen=True)
class Size:
    """The shape of a CLIP whose blocks have MLPs four times as wide as their tokens."""

    name: str
    batch_size: int
    image_size: int
    patch_size: int
    vision: tuple[int, int, int]  # width, layers, heads
    text: tuple[int, int, int]
    num_tokens: int
    vocab_size: int
    projection_dim: int
    context: int

    def transformers_config(self) -> CLIPConfig:
        end = self.vocab_size - 1
        towers = []
        for width, layers, heads in (self.vision, self.text):
            towers.append(
                {
                    "hidden_size": width,
                    "intermediate_size": 4 * width,
                    "num_hidden_layers": layers,
                    "num_attention_heads": heads,
                    "hidden_act": "quick_gelu",
                    "projection_dim": self.projection_dim,
                }
            )
        vision, text = towers
        vision |= {"image_size": self.image_size, "patch_size": self.patch_size}
        text |= {"vocab_size": self.vocab_size, "max_position_embeddings": self.context}
        text |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
        return CLIPConfig(vision_config=vision, text_config=text, projection_dim=self.projection_dim)

    def train_flops(self, num_tokens: int) -> float:
        """FLOPs (two a multiply-add) of one step of the full model at `batch_size`, without recomputing or skipping.

        A block multiplies 12 D² (projections and MLP) + 2 T D (attention) numbers a token. The backward pass costs
        twice the forward pass, except that of the patches, whose inputs need no gradient.
        """
        patches = (self.image_size // self.patch_size) ** 2
        forward = self.projection_dim * (self.vision[0] + self.text[0] + self.batch_size)
        for (width, layers, _), tokens in ((self.vision, patches + 1), (self.text, num_tokens)):
            forward += layers * tokens * (12 * width**2 + 2 * tokens * width)
        embed = patches * 3 * self.patch_size**2 * self.vision[0]
        return 2.0 * self.batch_size * (3 * forward + 2 * embed)


TINY = Size("tiny", 128, 64, 16, (128, 4, 4), (128, 2, 4), 16, 1500, 128, context=16)
B32 = Size("ViT-B/32", 16, 224, 32, (768, 12, 12), (512, 12, 8), 20, 49408, 512, context=20)


def quick(size: Size) -> Size:
    """A smaller relative, for checks that a script works."""
    return replace(size, batch_size=4, vision=(64, 1, 2), text=(32, 1, 2), projection_dim=32)


def build(name: str, size: Size) -> nn.Module:
    """The model of one library, with random weights of its own."""
    if name != "open_clip":
        config = size.transformers_config()
        if name == "hf_mm":
            config = MMClipConfig.from_dict(from_transformers_config(config.to_dict()))
        return AutoModel.from_config(config, attn_implementation="sdpa")
    width, layers, heads = size.vision
    vision = {"layers": layers, "width": width, "head_width": width // heads}
    vision |= {"patch_size": size.patch_size, "image_size": size.image_size}
    width, layers, heads = size.text
    text = {"context_length": size.context, "vocab_size": size.vocab_size, "width": width}
    return OpenClip(size.projection_dim, vision, {**text, "heads": heads, "layers": layers}, quick_gelu=True)


def build_all(size: Size, device: str = "cpu", open_clip_context: int | None = None) -> dict[str, nn.Module]:
    """The three with the weights of transformers' model; open_clip's may have a longer context."""
    theirs = build("transformers", size)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = MMClipModel.from_pretrained(folder, attn_implementation="sdpa")
    for parameter in ours.parameters():  # off the file's pages, into memory like the peers'
        parameter.data = parameter.data.clone()
    third = build("open_clip", replace(size, context=open_clip_context or size.context))
    state = to_open_clip(theirs.state_dict())
    longer = third.positional_embedding.detach().clone()
    longer[: size.context] = state["positional_embedding"]
    third.load_state_dict({**state, "positional_embedding": longer})
    models = {"hf_mm": ours, "transformers": theirs, "open_clip": third}
    return {name: model.to(device) for name, model in models.items()}


def to_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames a state dict; queries, keys and values become one matrix, projections are transposed."""
    state = dict(state)
    renamed = {
        "visual.proj": state.pop("visual_projection.weight").T,
        "text_projection": state.pop("text_projection.weight").T,
    }
    for name in list(state):
        if ".q_proj." in name:
            parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            state[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    for name, tensor in state.items():
        for old, new in RENAMES:
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def loss_functions(models: dict[str, nn.Module]) -> dict[str, Callable[..., torch.Tensor]]:
    """Name to a function of (pixel_values, input_ids, attention_mask or None) that returns the contrastive loss."""
    clip_loss = ClipLoss()

    def of_output(name: str) -> Callable[..., torch.Tensor]:
        def loss(pixels, ids, mask=None):
            return models[name](pixel_values=pixels, input_ids=ids, attention_mask=mask, return_loss=True).loss

        return loss

    def of_open_clip(pixels, ids, mask=None):
        return clip_loss(*models["open_clip"](pixels, ids))

    functions = {"hf_mm": of_output("hf_mm"), "transformers": of_output("transformers"), "open_clip": of_open_clip}
    return {name: functions[name] for name in models}


def random_ids(size: Size, device: str = "cpu") -> torch.Tensor:
    """Texts ``(B, T)`` that all have T tokens, so that nothing can be left out."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size.vocab_size - 2, (size.batch_size, size.num_tokens), generator=generator)
    ids[:, 0], ids[:, -1] = size.vocab_size - 2, size.vocab_size - 1
    return ids.to(device)


def random_batch(size: Size, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures ``(B, 3, n, n)`` and `random_ids`."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(size.batch_size, 3, size.image_size, size.image_size, generator=generator)
    return pixels.to(device), random_ids(size, device)
