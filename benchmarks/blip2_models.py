"""BLIP-2 at the sizes of its benchmarks, and transformers' BLIP-2 with the same weights around the same language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModel,
    Blip2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config
from hf_mm.models.blip2.conversion_blip2_export import export_transformers
from hf_mm.models.blip2.modeling_blip2 import MMBlip2ForConditionalGeneration
from hf_mm.models.blip2.modeling_blip2_stage1 import MMBlip2ForPreTraining
from hf_mm.models.eva_vit.configuration_eva_vit import EvaViTConfig
from training.smollm2 import open_smollm2

logging.disable_progress_bar()
SMOLLM2 = "SmolLM2-135M"
EPS = 1e-6  # of the tower's norms and of the norm after it, which in transformers are one number
QFORMER_VOCABULARY = 30523  # BERT's words and [DEC]
JOINT_DIM = 256
PROMPT, CAPTION = 4, 12  # tokens of a text that the language model reads; captions have half as many to all of them
QFORMER_TEXT = 16  # tokens of the longest text that the Q-Former reads; the shortest has half as many
IGNORED = -100
SLOT = MMBlip2Config.image_token_id
TINY_LLAMA = LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    initializer_range=0.2,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Size:
    """The shape of a BLIP-2 whose blocks have MLPs four times as wide as their tokens."""

    name: str
    batch_size: int
    image_size: int
    patch_size: int
    tower: tuple[int, int, int]  # width, layers, heads
    qformer: tuple[int, int, int]
    num_queries: int
    language_model: str = SMOLLM2
    qformer_vocabulary: int = QFORMER_VOCABULARY

    @property
    def title(self) -> str:
        return f"{self.name}, batch {self.batch_size}, {self.num_queries} queries"

    @property
    def text_config(self) -> LlamaConfig:
        """Of the language model."""
        return TINY_LLAMA if self.language_model != SMOLLM2 else AutoConfig.from_pretrained(open_smollm2())


B16 = Size("ViT-B/16, Q-Former 12x768", 8, 224, 16, (768, 12, 12), (768, 12, 12), 32)
B16_SMALL = replace(B16, name="ViT-B/16, Q-Former 4x384", batch_size=16, qformer=(384, 4, 6))
DEMO = Size("the demo's size", 16, 64, 16, (128, 2, 4), (128, 4, 2), 4)


def quick(size: Size) -> Size:
    """A smaller relative before a tiny language model, for checks that a script works."""
    tiny = {"image_size": 32, "tower": (32, 2, 2), "qformer": (32, 2, 2), "num_queries": 4, "qformer_vocabulary": 64}
    return replace(size, batch_size=4, language_model="a tiny Llama", **tiny)


def language_model(size: Size) -> LlamaForCausalLM:
    """The language model in float32, which `make language-model` has fetched, or a tiny one of a quick check.

    Raises:
        OSError: it has not been fetched.
    """
    if size.language_model != SMOLLM2:
        return LlamaForCausalLM(TINY_LLAMA)
    return LlamaForCausalLM.from_pretrained(open_smollm2(), dtype=torch.float32)


def tower(size: Size) -> PreTrainedModel:
    """A picture tower with random weights."""
    width, layers, heads = size.tower
    config = EvaViTConfig(
        **blocks(width, layers, heads), image_size=size.image_size, patch_size=size.patch_size, layer_norm_eps=EPS
    )
    return AutoModel.from_config(config, attn_implementation="sdpa")


def blocks(width: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


def build_stage1(size: Size) -> MMBlip2ForPreTraining:
    """Stage 1 without dropout, in training mode."""
    vocabulary = {"vocab_size": size.qformer_vocabulary, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 3}
    model = MMBlip2ForPreTraining.from_vision_pretrained(
        tower(size),
        qformer_config={**qformer_fields(size), **vocabulary},
        joint_dim=JOINT_DIM,
        vision_norm_eps=EPS,
    )
    return model.train()


def build_stage2(size: Size) -> MMBlip2ForConditionalGeneration:
    """Stage 2 without dropout, in training mode; tower and language model are frozen."""
    model = MMBlip2ForConditionalGeneration.from_vision_language_pretrained(
        tower(size), language_model(size), qformer_config=qformer_fields(size), vision_norm_eps=EPS
    )
    return model.train()


def qformer_fields(size: Size) -> dict[str, int | float]:
    return {
        **blocks(*size.qformer),
        "num_query_tokens": size.num_queries,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }


def peer_of(ours: MMBlip2ForConditionalGeneration) -> Blip2ForConditionalGeneration:
    """transformers' BLIP-2 with our weights, in training mode, the same parts frozen.

    The language model is the same module; other weights share their memory where both have them in one piece. The last
    word of the vocabulary stands for a picture.
    """
    config, state = export_transformers(ours, peer_slot(ours.config.text_config))
    with torch.device("meta"):
        theirs = Blip2ForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    theirs.language_model = ours.language_model
    own = {name: tensor for name, tensor in state.items() if not name.startswith("language_model.")}
    theirs.load_state_dict(own, strict=False, assign=True)
    assert not any(tensor.is_meta for tensor in theirs.state_dict().values()), "transformers' model lacks weights"
    theirs.train()
    for frozen in (theirs.vision_model, theirs.language_model):
        frozen.requires_grad_(False).eval()
    theirs.vision_model.post_layernorm.requires_grad_(True)
    return theirs


def peer_slot(text_config: LlamaConfig) -> int:
    """The word that stands for a picture in transformers' model."""
    return text_config.vocab_size - 1


def peer_ids(text_config: LlamaConfig, input_ids: torch.Tensor) -> torch.Tensor:
    """`input_ids` of ours with transformers' word for a picture."""
    return input_ids.masked_fill(input_ids == SLOT, peer_slot(text_config))


def random_pixels(size: Size, device: str = "cpu") -> torch.Tensor:
    """``(B, 3, n, n)``."""
    shape = (size.batch_size, 3, size.image_size, size.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)


def stage1_texts(size: Size, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Texts ``(B, T)`` of different lengths, padded on the right, begun by ``[CLS]`` and ended by ``[SEP]``."""
    words, mask = _words(size.batch_size, QFORMER_TEXT, low=4, high=size.qformer_vocabulary)
    words[:, 0] = 1
    words[torch.arange(size.batch_size), mask.sum(dim=1) - 1] = 2
    return {"input_ids": words.masked_fill(mask == 0, 0).to(device), "attention_mask": mask.to(device)}


def stage2_texts(size: Size, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Slots of one picture, a prompt, and captions of different lengths, padded on the right: ids, mask and labels
    ``(B, Nq + 4 + 12)``; the captions alone have labels."""
    prompt, text_config = prompts(size), size.text_config
    words, mask = _words(size.batch_size, CAPTION, low=3, high=peer_slot(text_config))
    ids = torch.cat([prompt["input_ids"], words.masked_fill(mask == 0, text_config.pad_token_id)], dim=1)
    mask = torch.cat([prompt["attention_mask"], mask], dim=1)
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :-CAPTION] = IGNORED
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def prompts(size: Size, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Slots of one picture and a prompt, the same for all: ids and mask ``(B, Nq + 4)``."""
    slots = torch.full((size.batch_size, size.num_queries), SLOT)
    words = torch.randint(3, peer_slot(size.text_config), (1, PROMPT), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([slots, words.expand(size.batch_size, -1)], dim=1).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _words(count: int, longest: int, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and their mask, ``(count, longest)``: rows of half to all of the tokens."""
    words = torch.randint(low, high, (count, longest), generator=torch.Generator().manual_seed(3))
    lengths = torch.linspace(longest // 2, longest, count).round().long()
    return words, (torch.arange(longest) < lengths[:, None]).long()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW over what is not frozen."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05, fused=True)


def make_step(optimizer: torch.optim.Optimizer, loss_of: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """A function that trains one step."""

    def step() -> None:
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def count_pass(loss_of: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """The loss of one forward and backward pass, and its FLOPs, two a multiply-add; gradients are left behind."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = loss_of()
        loss.backward()
    return loss.item(), float(counter.get_total_flops())
