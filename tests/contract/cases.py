"""One tiny builder per model, and for each row of the contract that does not apply to it the reason in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_mm.models.clip.configuration_clip import (
    MMClipConfig,
    MMClipResNetConfig,
    MMClipTextConfig,
    MMClipVisionConfig,
)
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.modeling_clip import MMClipModel, MMClipTextModel, MMClipVisionModel
from hf_mm.models.clip.modeling_clip_resnet import MMClipResNetModel
from hf_mm.models.clip.processing_clip import MMClipProcessor
from hf_mm.models.clip.tokenization_clip import MMClipTokenizer
from hf_mm.models.vit.configuration_vit import MMViTConfig
from hf_mm.models.vit.image_processing_vit import MMViTImageProcessorPil
from hf_mm.models.vit.modeling_vit import MMViTForImageClassification, MMViTModel

from . import oracles

ROWS = {
    1: "parity",
    2: "load",
    3: "batching",
    4: "attention",
    5: "precision",
    6: "training",
    7: "adapters",
    8: "generation",
    9: "pipeline",
    10: "conversion",
    11: "hub",
    12: "bad input",
    13: "compile",
}
NO_GENERATION = {8: "it generates nothing"}

CAPTIONS = [
    "a red square",
    "two blue circles and a green line",
    "nothing",
    "a yellow triangle over a red square",
    "grey",
    "a circle",
    "three squares and a line",
    "black on white",
]
CONTEXT = 16
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**LAYERS, "hidden_size": 32, "intermediate_size": 64, "projection_dim": 24}
PICTURE = {**LAYERS, "hidden_size": 48, "intermediate_size": 96, "image_size": 32, "patch_size": 8}
RESNET = {"depths": (2, 1, 1, 1), "width": 8, "num_attention_heads": 4, "image_size": 64, "projection_dim": 24}
BATCH_STATISTICS = "BatchNorm takes its statistics from the batch of one step on one process"


@cache
def tokenizer() -> MMClipTokenizer:
    return MMClipTokenizer.train_from_iterator(CAPTIONS * 4, 640, model_max_length=CONTEXT)


def vocabulary() -> dict[str, int]:
    size, end = len(tokenizer()), tokenizer().eos_token_id
    assert end == size - 1
    return {
        "vocab_size": size,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def pictures(number: int) -> list[Image.Image]:
    """Noise of many sizes."""
    random = np.random.default_rng(7)
    sizes = [(40 + 3 * i, 36 + 5 * (i % 3)) for i in range(number)]
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@dataclass(frozen=True)
class BadCall:
    """What a user does wrong, and what the sentence that refuses it must match."""

    name: str
    call: Callable[[PreTrainedModel, dict[str, torch.Tensor]], Any]
    message: str


@dataclass(frozen=True)
class Case:
    """A tiny model of one type.

    Attributes:
        name: of the case, beginning with the model type.
        auto_class: opens its folder.
        config: of the tiny model.
        model_class: what `auto_class` must open it as.
        prepare: the processor, tokenizer or image processor; with settings that are nobody's default.
        oracle: an independent model with the same weights; keyword arguments change its config.
        other_activation: an activation that the oracle must not get away with.
        inputs: which of images and text `prepare` gets, and whether there are labels.
        tasks: the pipelines that open its folder.
        bad_calls: wrong calls with their sentences.
        reasons: row -> why it does not apply.
        exceptions: property within a row -> why it does not hold; a test shows that it does not.
    """

    name: str
    auto_class: type
    config: Callable[[], Any]
    model_class: type[PreTrainedModel]
    prepare: Callable[[], Any]
    oracle: Callable[..., oracles.Oracle]
    other_activation: str
    inputs: tuple[str, ...]
    tasks: tuple[str, ...]
    bad_calls: tuple[BadCall, ...]
    loss: bool = True
    reasons: dict[int, str] = field(default_factory=dict)
    exceptions: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def model_type(self) -> str:
        return self.config().model_type

    @cached_property
    def preparer(self):
        return self.prepare()

    def build(self) -> PreTrainedModel:
        """The tiny model in eval mode, every parameter and statistic moved off its initial value."""
        torch.manual_seed(0)
        model = self.model_class(self.config()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
                norm.running_mean.add_(0.1 * torch.randn_like(norm.running_mean))
                norm.running_var.mul_(1 + 0.3 * torch.rand_like(norm.running_var))
        return model

    def raw(self, number: int) -> dict[str, list]:
        """What a user has: pictures, texts or both."""
        return {"images": pictures(number), "text": (CAPTIONS * number)[:number]}

    def batch(self, number: int, **raw) -> dict[str, torch.Tensor]:
        """What `forward` takes for `number` samples."""
        raw = {name: value for name, value in {**self.raw(number), **raw}.items() if name in self.inputs}
        options = {"padding": True} if self.inputs == ("text",) else {}
        batch = dict(self.preparer(**raw, return_tensors="pt", **options))
        if "labels" in self.inputs:
            batch["labels"] = torch.arange(number) % self.config().num_labels
        return batch

    def read(self, outputs, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that are compared, zero where a text is padded."""
        names = ("loss", "logits", *oracles.COMPARED, *oracles.POOLED)
        read = {name: outputs[name] for name in dict.fromkeys(names) if outputs.get(name) is not None}
        if "last_hidden_state" in read and "attention_mask" in batch:
            read["last_hidden_state"] = read["last_hidden_state"] * batch["attention_mask"][..., None]
        return read


def cases_for(row: int, such_that: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    return [case for case in CASES if row not in case.reasons and such_that(case)]


def in_double(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def largest_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """max |difference| / max |reference|."""
    assert ours.shape == reference.shape, f"{tuple(ours.shape)} is not {tuple(reference.shape)}"
    assert torch.isfinite(ours).all()
    return ((ours - reference).abs().max() / reference.abs().max().clamp(min=1e-300)).item()


def has_transformer(case: Case) -> bool:
    """Whether all of its towers are Transformers of ours."""
    return "resnet" not in case.name


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of all towers: what gradient checkpointing computes again."""
    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))


def attentions(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold queries, keys and values."""
    return (module for module in model.modules() if hasattr(module, "q_proj"))


def changed(batch: dict[str, torch.Tensor], **changes) -> dict[str, torch.Tensor]:
    return {name: value for name, value in {**batch, **changes}.items() if value is not None}


def bad_pictures(side: int = 32) -> tuple[BadCall, ...]:
    """For a model of pictures that are `side` high."""

    def with_pixels(change):
        return lambda model, batch: model(**changed(batch, pixel_values=change(batch["pixel_values"])))

    return (
        BadCall("four channels", with_pixels(lambda pixels: torch.cat([pixels, pixels[:, :1]], 1)), r"3.*\(\d+, 4, "),
        BadCall("grey", with_pixels(lambda pixels: pixels[:, :1]), r"3.*\(\d+, 1, "),
        BadCall("channels last", with_pixels(lambda pixels: pixels.permute(0, 2, 3, 1)), r"3.*\(\d+, \d+, \d+, 3\)"),
        BadCall("no batch dimension", with_pixels(lambda pixels: pixels[0]), r"batch.*\(3, \d+, \d+\)"),
        BadCall(
            "another size",
            with_pixels(lambda pixels: torch.cat([pixels, pixels], 2)),
            rf"{2 * side}x\d\d.*{side}x\d\d.*interpolate_pos_encoding",
        ),
        BadCall(
            "patches do not tile",
            lambda model, batch: model(
                **changed(batch, pixel_values=batch["pixel_values"][..., :-3]), interpolate_pos_encoding=True
            ),
            rf"{side}x(29|45|61).*patches of",
        ),
    )


def bad_texts() -> tuple[BadCall, ...]:
    def call(change):
        return lambda model, batch: model(**changed(batch, **change(batch)))

    def padded_left(batch):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        columns = mask.argsort(dim=1, stable=True)
        return {"input_ids": ids.gather(1, columns), "attention_mask": mask.gather(1, columns)}

    def padded_left_without_mask(batch):
        return {**padded_left(batch), "attention_mask": None}

    def too_long(batch):
        ids = batch["input_ids"]
        ids = torch.cat([ids[:, :2], ids[:, 1:2].expand(-1, CONTEXT + 5 - 2)], 1)
        ids[:, -1] = batch["input_ids"].max()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def no_end(batch):
        ids = batch["input_ids"].clone()
        ids[1][ids[1] == ids.max()] = 5
        return {"input_ids": ids}

    def embedded(batch):
        return {"inputs_embeds": torch.zeros(*batch["input_ids"].shape, TEXT["hidden_size"])}

    def wrong_mask(change):
        return call(lambda batch: {"attention_mask": change(batch["attention_mask"])})

    return (
        BadCall("padding on the left", call(padded_left), "padding on the right"),
        BadCall("padding on the left, no mask", call(padded_left_without_mask), "padding on the right"),
        BadCall("ids beyond the context", call(too_long), rf"{CONTEXT + 5}.*{CONTEXT}"),
        BadCall("a row without end token", call(no_end), "row 1.*end token"),
        BadCall("ids and embeddings", call(embedded), "input_ids or inputs_embeds"),
        BadCall("mask too short", wrong_mask(lambda mask: mask[:, :-1]), "attention_mask.*shape"),
        BadCall("mask too long", wrong_mask(lambda mask: torch.cat([mask, mask], 1)), "attention_mask.*shape"),
        BadCall("mask of other rows", wrong_mask(lambda mask: mask[:-1]), "attention_mask.*shape"),
        BadCall("mask of one row", wrong_mask(lambda mask: mask[0]), "attention_mask.*shape"),
        BadCall("ids of one row", call(lambda batch: {"input_ids": batch["input_ids"][0]}), "input_ids.*shape"),
    )


def bad_pairs(side: int = 32) -> tuple[BadCall, ...]:
    def in_training(change):
        return lambda model, batch: model.train()(**changed(batch, **change(batch)))

    needs_both = "pixel_values and input_ids"
    return (
        *bad_pictures(side),
        *bad_texts(),
        BadCall("no pictures", lambda model, batch: model(**changed(batch, pixel_values=None)), needs_both),
        BadCall(
            "no texts", lambda model, batch: model(**changed(batch, input_ids=None, attention_mask=None)), needs_both
        ),
        BadCall(
            "fewer pictures than texts",
            in_training(lambda batch: {"pixel_values": batch["pixel_values"][:2]}),
            "2 pictures and 3 texts",
        ),
        BadCall("ids of other rows", in_training(lambda batch: {"image_ids": torch.arange(2)}), r"image_ids.*\(3,\)"),
        BadCall(
            "text ids of two dimensions",
            in_training(lambda batch: {"text_ids": torch.zeros(3, 1, dtype=torch.long)}),
            r"text_ids.*\(3,\)",
        ),
    )


NO_TEXT = BadCall("neither ids nor embeddings", lambda model, batch: model(), "input_ids or inputs_embeds")


def clip_config(**vision) -> MMClipConfig:
    return MMClipConfig(vision_config={**PICTURE, **vision}, text_config={**TEXT, **vocabulary()}, projection_dim=24)


def vit_image_processor(**size) -> MMViTImageProcessorPil:
    return MMViTImageProcessorPil(size=size, antialias=False, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])


def clip_with_resnet_config() -> MMClipConfig:
    text = {**TEXT, **vocabulary()}
    return MMClipConfig(vision_config={"model_type": "mm_clip_resnet", **RESNET}, text_config=text, projection_dim=24)


def clip_image_processor(side: int = 32) -> MMClipImageProcessorPil:
    return MMClipImageProcessorPil(size=side + 4, crop_size=side, image_mean=[0.4, 0.5, 0.6], convert_rgb_first=False)


CASES = [
    Case(
        name="mm_vit classifier",
        auto_class=AutoModelForImageClassification,
        config=partial(MMViTConfig, **PICTURE, num_labels=5),
        model_class=MMViTForImageClassification,
        prepare=partial(vit_image_processor, height=32, width=32),
        oracle=oracles.vit_classifier_oracle,
        other_activation="gelu",
        inputs=("images", "labels"),
        tasks=("image-classification", "image-feature-extraction"),
        bad_calls=bad_pictures(),
        reasons=NO_GENERATION,
    ),
    Case(
        name="mm_vit rectangular trunk",
        auto_class=AutoModel,
        config=partial(
            MMViTConfig,
            **{**PICTURE, "image_size": (32, 48), "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pre_logits": True},
        ),
        model_class=MMViTModel,
        prepare=partial(vit_image_processor, height=32, width=48),
        oracle=oracles.vit_trunk_oracle,
        other_activation="gelu_pytorch_tanh",
        inputs=("images",),
        tasks=("image-feature-extraction",),
        bad_calls=bad_pictures(),
        loss=False,
        reasons=NO_GENERATION,
    ),
    Case(
        name="mm_vit conv stem, mean pooling",
        auto_class=AutoModelForImageClassification,
        config=partial(MMViTConfig, **PICTURE, stem="conv", stem_num_groups=4, pooling="mean", num_labels=5),
        model_class=MMViTForImageClassification,
        prepare=partial(vit_image_processor, height=32, width=32),
        oracle=oracles.equations_oracle,
        other_activation="gelu",
        inputs=("images", "labels"),
        tasks=("image-classification", "image-feature-extraction"),
        bad_calls=bad_pictures(),
        reasons={**NO_GENERATION, 10: "no published layout has this stem"},
    ),
    Case(
        name="mm_clip_text",
        auto_class=AutoModel,
        config=lambda: MMClipTextConfig(**TEXT, **vocabulary()),
        model_class=MMClipTextModel,
        prepare=tokenizer,
        oracle=oracles.clip_text_oracle,
        other_activation="gelu",
        inputs=("text",),
        tasks=("feature-extraction",),
        bad_calls=(*bad_texts(), NO_TEXT),
        loss=False,
        reasons=NO_GENERATION,
    ),
    Case(
        name="mm_clip_vision",
        auto_class=AutoModel,
        config=partial(MMClipVisionConfig, **PICTURE, hidden_act="gelu"),
        model_class=MMClipVisionModel,
        prepare=clip_image_processor,
        oracle=oracles.clip_vision_oracle,
        other_activation="quick_gelu",
        inputs=("images",),
        tasks=("image-feature-extraction",),
        bad_calls=bad_pictures(),
        loss=False,
        reasons=NO_GENERATION,
    ),
    Case(
        name="mm_clip",
        auto_class=AutoModelForZeroShotImageClassification,
        config=clip_config,
        model_class=MMClipModel,
        prepare=lambda: MMClipProcessor(clip_image_processor(), tokenizer()),
        oracle=oracles.clip_oracle,
        other_activation="gelu",
        inputs=("images", "text"),
        tasks=("zero-shot-image-classification",),
        bad_calls=bad_pairs(),
        reasons=NO_GENERATION,
    ),
    Case(
        name="mm_clip with mm_vit",
        auto_class=AutoModel,
        config=partial(clip_config, model_type="mm_vit", hidden_act="gelu", layer_norm_eps=1e-5),
        model_class=MMClipModel,
        prepare=lambda: MMClipProcessor(clip_image_processor(), tokenizer()),
        oracle=oracles.clip_with_vit_oracle,
        other_activation="gelu_pytorch_tanh",
        inputs=("images", "text"),
        tasks=("zero-shot-image-classification",),
        bad_calls=bad_pairs(),
        reasons={**NO_GENERATION, 10: "no published layout has CLIP over this ViT"},
    ),
    Case(
        name="mm_clip_resnet",
        auto_class=AutoModel,
        config=partial(MMClipResNetConfig, **RESNET),
        model_class=MMClipResNetModel,
        prepare=partial(clip_image_processor, 64),
        oracle=oracles.resnet_oracle,
        other_activation="gelu",
        inputs=("images",),
        tasks=("image-feature-extraction",),
        bad_calls=bad_pictures(64),
        loss=False,
        reasons={**NO_GENERATION, 10: "it is published inside a whole CLIP only"},
    ),
    Case(
        name="mm_clip with mm_clip_resnet",
        auto_class=AutoModel,
        config=clip_with_resnet_config,
        model_class=MMClipModel,
        prepare=lambda: MMClipProcessor(clip_image_processor(64), tokenizer()),
        oracle=oracles.clip_with_resnet_oracle,
        other_activation="gelu",
        inputs=("images", "text"),
        tasks=("zero-shot-image-classification",),
        bad_calls=bad_pairs(64),
        reasons=NO_GENERATION,
        exceptions={"accumulation": BATCH_STATISTICS, "processes": BATCH_STATISTICS},
    ),
]
FOLDER = Path(__file__).parent
