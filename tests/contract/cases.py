"""One tiny builder per model, and for each row of the contract that does not apply to it the reason in words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoModelForZeroShotImageClassification,
    BertTokenizer,
    CLIPConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config, MMBlip2QFormerConfig
from hf_mm.models.blip2.modeling_blip2 import (
    MMBlip2ForConditionalGeneration,
    MMBlip2ForImageTextRetrieval,
    MMBlip2ForPreTraining,
    MMBlip2Model,
)
from hf_mm.models.blip2.modeling_qformer import MMBlip2QFormerModel
from hf_mm.models.blip2.processing_blip2 import MMBlip2Processor
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
from hf_mm.models.eva_vit.configuration_eva_vit import EvaViTConfig
from hf_mm.models.eva_vit.modeling_eva_vit import EvaViTModel
from hf_mm.models.pic2word.configuration_pic2word import Pic2WordConfig, Pic2WordMapperConfig
from hf_mm.models.pic2word.modeling_pic2word import Pic2WordMapper, Pic2WordModel
from hf_mm.models.pic2word.processing_pic2word import Pic2WordProcessor
from hf_mm.models.vit.configuration_vit import MMViTConfig
from hf_mm.models.vit.image_processing_vit import MMViTImageProcessorPil
from hf_mm.models.vit.modeling_vit import MMViTForImageClassification, MMViTModel

from . import oracles, oracles_blip2

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
COMPOSED = [
    "a photo of *",
    "two blue *, and a green line",
    "*",
    "a yellow triangle over a red *",
    "grey *.",
    "a circle (*)",
    "three squares and a * line",
    "black * on white",
]
CONTEXT = 16
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
JOINT = 24
TEXT = {**LAYERS, "hidden_size": 32, "intermediate_size": 64, "projection_dim": JOINT}
PICTURE = {**LAYERS, "hidden_size": 48, "intermediate_size": 96, "image_size": 32, "patch_size": 8}
RESNET = {"depths": (2, 1, 1, 1), "width": 8, "num_attention_heads": 4, "image_size": 64, "projection_dim": JOINT}
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
        prepare: the processor, tokenizer or image processor, with settings that are nobody's default; or a function that
            makes a batch of inputs that need no preparing.
        oracle: an independent model with the same weights; keyword arguments change its config.
        other_activation: an activation that the oracle must not get away with.
        inputs: what `prepare` gets, and whether there are labels.
        tasks: the pipelines that open its folder.
        bad_calls: wrong calls with their sentences.
        texts: eight, with a placeholder for a picture where the model takes one.
        suffixes: eight, what a language model shall say after the texts.
        connector: the part between frozen ones that trains.
        adapted: name of a frozen part -> pattern of the modules in it that take adapters.
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
    texts: list[str] = field(default_factory=lambda: CAPTIONS)
    suffixes: list[str] = field(default_factory=list)
    connector: str = ""
    adapted: dict[str, str] = field(default_factory=dict)
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

    @property
    def pipeline_tag(self) -> str | None:
        """What its card tells the Hub, which has no tag for composed retrieval."""
        tags = {"composed-image-retrieval": "image-feature-extraction"}
        return tags.get(self.tasks[0], self.tasks[0]) if self.tasks else None

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        """The parts that do not train."""
        return tuple(getattr(self.model_class, "frozen_parts", ()))

    @property
    def has_processor(self) -> bool:
        """Whether what prepares its inputs is saved beside the model."""
        return hasattr(self.preparer, "save_pretrained")

    def takes(self, name: str) -> bool:
        """Whether `forward` has an argument of this name."""
        return name in inspect.signature(self.model_class.forward).parameters

    @property
    def speaks(self) -> bool:
        """Whether it has a language model that learns and says words."""
        return "suffix" in self.inputs

    @property
    def compares(self) -> bool:
        """Whether its loss compares the samples of a batch."""
        return self.loss and not self.speaks and "labels" not in self.inputs

    def drawing_alike(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model; where its loss draws at random, each call draws by the same seed."""
        if self.takes("generator"):
            model.register_forward_pre_hook(draw_alike, with_kwargs=True)
        return model

    def build(self, config=None, seeded: bool = True) -> PreTrainedModel:
        """The tiny model in eval mode, every parameter and statistic moved off its initial value.

        Where the loss draws, it does so by one seed, unless `seeded` is False.
        """
        torch.manual_seed(0)
        model = self.model_class(config or self.config()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
                norm.running_mean.add_(0.1 * torch.randn_like(norm.running_mean))
                norm.running_var.mul_(1 + 0.3 * torch.rand_like(norm.running_var))
        return self.drawing_alike(model) if seeded else model

    def raw(self, number: int) -> dict[str, list]:
        """What a user has: pictures, texts or both; or embeddings of pictures."""
        embeds = torch.randn(number, JOINT, generator=torch.Generator().manual_seed(7))
        return {
            "images": pictures(number),
            "text": (self.texts * number)[:number],
            "suffix": (self.suffixes * number)[:number],
            "image_embeds": list(embeds),
        }

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
        names = ("loss", "logits", *oracles.COMPARED, *oracles.COMPOSED, *oracles.POOLED, *oracles.BLIP2)
        read = {name: outputs[name] for name in dict.fromkeys(names) if outputs.get(name) is not None}
        for name, kept in self.places(batch).items():
            if name in read:
                read[name] = read[name] * kept[..., None]
        return read

    def places(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Which places of the outputs over places of a text, ``(B, T)``, are not padding."""
        if "attention_mask" not in batch:
            return {}
        if self.speaks:
            decodes = self.config().is_encoder_decoder
            return {"logits": (batch["labels"] != -100) if decodes else batch["attention_mask"]}
        over_text = "text_hidden_state" if self.takes("encoder_hidden_states") else "last_hidden_state"
        return {over_text: batch["attention_mask"]}


def cases_for(row: int, such_that: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    return [case for case in CASES if row not in case.reasons and such_that(case)]


def draw_alike(model: nn.Module, args: tuple, inputs: dict) -> tuple[tuple, dict]:
    return args, {"generator": oracles_blip2.draws(), **inputs}


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


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train: of a model without frozen parts, all."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of all towers."""
    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))


def first_layer(block: nn.Module) -> nn.Module:
    """Of a block, what computes first."""
    return next(module for module in block.modules() if not list(module.children()) and list(module.parameters()))


def recomputed(model: nn.Module) -> list[nn.Module]:
    """What gradient checkpointing computes again: all blocks but those of a tower that runs without gradients."""
    upstream = {id(block) for tower in frozen_towers(model) for block in blocks(tower)}
    return [block for block in blocks(model) if id(block) not in upstream]


def frozen_towers(model: nn.Module) -> list[nn.Module]:
    """The picture towers inside frozen parts, but one with adapters."""
    parts = {name: model.get_submodule(name) for name in getattr(model, "frozen_parts", ())}
    towers = [part if name == "vision_tower" else getattr(part, "vision_model", None) for name, part in parts.items()]
    return [tower for tower in towers if tower is not None and not trained(tower)]


def logit_scale(model: nn.Module) -> torch.Tensor:
    """The factor itself, of the model or of what is frozen in it."""
    if hasattr(model, "temperature"):
        return 1 / model.temperature.detach().float()
    (parameter,) = (value for name, value in model.named_parameters() if name.endswith("logit_scale"))
    return parameter.detach().float().exp()


def all_configs(config) -> list:
    """Of the model and of all that it is made of."""
    inner = [getattr(config, name) for name in config.sub_configs]
    return [config, *(one for own in inner if own is not None for one in all_configs(own))]


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


def bad_placeholders() -> tuple[BadCall, ...]:
    """For a model in whose texts each placeholder takes a picture."""

    def call(change):
        return lambda model, batch: model(**changed(batch, **change(batch)))

    def written(text: str) -> dict[str, torch.Tensor]:
        """By the tokenizer alone, which glues and cuts; as the model's own mask."""
        texts = tokenizer()([COMPOSED[0], text, COMPOSED[2]], padding=True, return_tensors="pt")
        return {**texts, "placeholder_mask": None}

    def wrong_mask(change):
        return call(lambda batch: {"placeholder_mask": change(batch["placeholder_mask"])})

    def doubled(mask):
        return mask | mask.roll(1, 1)

    def fewer_pictures(batch):
        return {"pixel_values": batch["pixel_values"][:2], "return_loss": False}

    return (
        BadCall("no placeholder", call(lambda batch: written("a red square")), "row 1.*no placeholder.*265"),
        BadCall("glued to a comma", call(lambda batch: written("a *, in red")), "row 1.*no placeholder.*processor"),
        BadCall("cut off", call(lambda batch: written("a circle " * CONTEXT + "*")), "row 1.*no placeholder"),
        BadCall("two for one picture", call(lambda batch: written("a * on a *")), r"4 placeholders.*\[1, 2, 1\].*3 "),
        BadCall("more placeholders than pictures", call(fewer_pictures), "3 placeholders.*2 pictures"),
        BadCall("a mask with two a row", wrong_mask(doubled), r"6 placeholders.*3 pictures"),
        BadCall("a mask without any", wrong_mask(torch.zeros_like), "row 0.*no placeholder"),
        BadCall("placeholders of other rows", wrong_mask(lambda mask: mask[:2]), r"placeholder_mask.*shape.*\(2, "),
        BadCall("placeholders too short", wrong_mask(lambda mask: mask[:, :-1]), "placeholder_mask.*shape"),
    )


def bad_feature_inputs() -> tuple[BadCall, ...]:
    """For a model that takes features in place of pictures."""

    def with_features(*shape, **changes):
        return lambda model, batch: model(**changed(batch, vision_features=torch.ones(shape), **changes))

    return (
        BadCall("pictures and features", with_features(3, JOINT), "either pixel_values or vision_features"),
        BadCall(
            "neither pictures nor features",
            lambda model, batch: model(**changed(batch, pixel_values=None)),
            "either pixel_values or vision_features",
        ),
        BadCall(
            "features of another CLIP",
            with_features(3, JOINT + 1, pixel_values=None),
            rf"{JOINT}\).*\(3, {JOINT + 1}\)",
        ),
        BadCall("features of tokens", with_features(3, 5, JOINT, pixel_values=None), rf"{JOINT}\).*\(3, 5, {JOINT}\)"),
    )


def bad_compositions(side: int = 32) -> tuple[BadCall, ...]:
    def in_training(change):
        return lambda model, batch: model.train()(**changed(batch, **change(batch)))

    def too_long(model, batch):
        ids = torch.full((3, CONTEXT + 5), 5)
        ids[:, 1], ids[:, -1] = model.config.placeholder_token_id, batch["input_ids"].max()
        return model(input_ids=ids, pixel_values=batch["pixel_values"])

    texts = tuple(bad for bad in bad_texts() if bad.name not in ("ids and embeddings", "ids beyond the context"))
    return (
        *bad_pictures(side),
        *texts,
        *bad_placeholders(),
        *bad_feature_inputs(),
        BadCall("ids beyond the context", too_long, rf"{CONTEXT + 5}.*{CONTEXT}"),
        BadCall("no texts", lambda model, batch: model(**changed(batch, input_ids=None)), "input_ids.*placeholder"),
        BadCall(
            "fewer pictures than texts",
            in_training(lambda batch: {"pixel_values": batch["pixel_values"][:2]}),
            "2 pictures and 3 texts",
        ),
        BadCall("ids of other rows", in_training(lambda batch: {"image_ids": torch.arange(2)}), r"image_ids.*\(3,\)"),
    )


def bad_embeddings() -> tuple[BadCall, ...]:
    """For the mapping network alone."""

    def call(*shape):
        return lambda model, batch: model(torch.ones(shape))

    return (
        BadCall("of another width", call(3, JOINT + 1), rf"{JOINT}\).*\(3, {JOINT + 1}\)"),
        BadCall("one picture", call(JOINT), rf"{JOINT}\).*\({JOINT},\)"),
        BadCall("tokens", call(3, 5, JOINT), rf"{JOINT}\).*\(3, 5, {JOINT}\)"),
    )


NO_TEXT = BadCall("neither ids nor embeddings", lambda model, batch: model(), "input_ids or inputs_embeds")


def clip_config(**vision) -> MMClipConfig:
    return MMClipConfig(
        vision_config={**PICTURE, **vision}, text_config={**TEXT, **vocabulary()}, projection_dim=JOINT
    )


def vit_image_processor(**size) -> MMViTImageProcessorPil:
    return MMViTImageProcessorPil(size=size, antialias=False, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])


def clip_with_resnet_config() -> MMClipConfig:
    text = {**TEXT, **vocabulary()}
    return MMClipConfig(
        vision_config={"model_type": "mm_clip_resnet", **RESNET}, text_config=text, projection_dim=JOINT
    )


def clip_image_processor(side: int = 32) -> MMClipImageProcessorPil:
    return MMClipImageProcessorPil(size=side + 4, crop_size=side, image_mean=[0.4, 0.5, 0.6], convert_rgb_first=False)


def squashing_image_processor(height: int, width: int) -> MMClipImageProcessorPil:
    return MMClipImageProcessorPil(
        size={"height": height, "width": width}, do_center_crop=False, image_std=[0.2, 0.3, 0.4]
    )


UNDROPPED = {"attention_dropout": 0.3}  # in a frozen part, where it must never act


def pic2word_config(clip: PreTrainedConfig) -> Pic2WordConfig:
    """Without dropout in the mapping network, so that two runs of training can be compared."""
    return Pic2WordConfig(clip_config=clip, mapper_config={"hidden_dim": 40, "dropout": 0.0})


def frozen_clip_config(**vision) -> MMClipConfig:
    config = clip_config(**UNDROPPED, **vision)
    config.text_config.attention_dropout = UNDROPPED["attention_dropout"]
    return config


def transformers_clip_config() -> CLIPConfig:
    text = {**TEXT, **UNDROPPED, **vocabulary()}
    return CLIPConfig(vision_config={**PICTURE, **UNDROPPED}, text_config=text, projection_dim=JOINT)


def pic2word_processor(side: int = 32) -> Pic2WordProcessor:
    return Pic2WordProcessor(clip_image_processor(side), tokenizer())


def embeddings(image_embeds: list[torch.Tensor], **kwargs) -> dict[str, torch.Tensor]:
    return {"image_embeds": torch.stack(image_embeds)}


BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]"]
LM_WORDS = ["<pad>", "<s>", "</s>", "<unk>"]
QUERIES = 3
QFORMER = {
    **LAYERS,
    "num_query_tokens": QUERIES,
    "hidden_size": 40,
    "intermediate_size": 56,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "layer_norm_eps": 1e-6,
}
ANSWERS = ["it is red", "two", "a line over a circle", "nothing", "grey", "a red square", "three", "black on white"]
PROMPTS = ["a photo of", "what is it", "a", "<image> a drawing of a", "grey", "a", "what", "black on"]


def words_of(texts: list[str]) -> list[str]:
    return sorted({word for text in texts for word in text.split()})


@cache
def bert_tokenizer() -> BertTokenizer:
    words = [*BERT_WORDS, *words_of(CAPTIONS)]
    vocab = {word: number for number, word in enumerate(words)}
    return BertTokenizer(vocab=vocab, bos_token="[DEC]", model_max_length=CONTEXT)


@cache
def lm_tokenizer(is_encoder_decoder: bool = False) -> PreTrainedTokenizerFast:
    """Words between white space, after a start token or before an end token."""
    words = [*LM_WORDS, *words_of([*CAPTIONS, *ANSWERS, *PROMPTS, "drawing photo of what is it :"])]
    whole = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    whole.pre_tokenizer = Whitespace()
    whole.post_processor = TemplateProcessing(
        single="$A </s>" if is_encoder_decoder else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), LM_WORDS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=whole, model_max_length=64, **names)


def qformer_words() -> dict[str, int]:
    names = ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id")
    ids = bert_tokenizer().convert_tokens_to_ids(["[PAD]", "[CLS]", "[SEP]", "[DEC]"])
    return {
        "vocab_size": len(bert_tokenizer()),
        "max_position_embeddings": CONTEXT,
        **dict(zip(names, ids, strict=True)),
    }


def blip2_config(text_config=None, **fields) -> MMBlip2Config:
    """Over CLIP's tower, whose dropout must never act; with text in the Q-Former where there is no language model."""
    tower = {"model_type": "mm_clip_vision", **PICTURE, **UNDROPPED, "hidden_act": "gelu"}
    words = {"use_text": False} if text_config else qformer_words()
    defaults = {"vision_config": tower, "qformer_config": {**QFORMER, **words}, "text_config": text_config}
    return MMBlip2Config(**{**defaults, "joint_dim": JOINT, "itc_temperature": 0.2, **fields})


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        **LAYERS,
        **UNDROPPED,
        hidden_size=32,
        intermediate_size=48,
        num_key_value_heads=1,
        vocab_size=len(lm_tokenizer()),
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def t5_config() -> T5Config:
    return T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.3,
        feed_forward_proj="gated-gelu",
        vocab_size=len(lm_tokenizer(True)),
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )


def blip2_t5_config() -> MMBlip2Config:
    return blip2_config(t5_config(), vision_config={"model_type": "eva_vit", **PICTURE, **UNDROPPED})


def blip2_text_processor() -> MMBlip2Processor:
    return MMBlip2Processor(clip_image_processor(), bert_tokenizer(), max_text_length=12)


def blip2_lm_processor(is_encoder_decoder: bool = False) -> MMBlip2Processor:
    return MMBlip2Processor(
        clip_image_processor(),
        lm_tokenizer(is_encoder_decoder),
        num_query_tokens=QUERIES,
        is_encoder_decoder=is_encoder_decoder,
        max_text_length=14,
        clean_text=False,
    )


def picture_features(**kwargs) -> dict[str, torch.Tensor]:
    """Of a picture tower, with texts."""
    texts = bert_tokenizer()(kwargs["text"], padding=True, return_tensors="pt", return_token_type_ids=False)
    mixture = torch.randn(JOINT, 5 * PICTURE["hidden_size"], generator=torch.Generator().manual_seed(7))
    features = torch.stack([embeds @ mixture / JOINT**0.5 for embeds in kwargs["image_embeds"]])
    return {"encoder_hidden_states": features.unflatten(1, (5, -1)), **texts}


def calling(change) -> Callable[[PreTrainedModel, dict[str, torch.Tensor]], Any]:
    return lambda model, batch: model(**changed(batch, **change(batch)))


def bad_masks() -> tuple[BadCall, ...]:
    def wrong(change):
        return calling(lambda batch: {"attention_mask": change(batch["attention_mask"])})

    return (
        BadCall("mask too short", wrong(lambda mask: mask[:, :-1]), "attention_mask.*shape"),
        BadCall("mask too long", wrong(lambda mask: torch.cat([mask, mask], 1)), "attention_mask.*shape"),
        BadCall("mask of other rows", wrong(lambda mask: mask[:-1]), "attention_mask.*shape"),
        BadCall("ids of one row", calling(lambda batch: {"input_ids": batch["input_ids"][0]}), r"input_ids.*\(\d+,\)"),
    )


def bad_qformer_texts() -> tuple[BadCall, ...]:
    size = len(bert_tokenizer())

    def too_long(batch):
        ids = torch.full((3, CONTEXT + 5), 6)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return (
        *bad_masks(),
        BadCall("text beyond the positions", calling(too_long), rf"{CONTEXT + 5}.*{CONTEXT}.*truncation"),
        BadCall(
            "an id beyond the vocabulary", calling(lambda batch: {"input_ids": batch["input_ids"] + size}), rf"{size}"
        ),
    )


def bad_qformer_pictures() -> tuple[BadCall, ...]:
    width = PICTURE["hidden_size"]

    def features(*shape):
        return calling(lambda batch: {"encoder_hidden_states": torch.ones(shape)})

    return (
        BadCall("features of another tower", features(3, 5, width + 1), rf"{width}\).*\(3, 5, {width + 1}\)"),
        BadCall("features of one picture", features(5, width), rf"{width}\).*\(5, {width}\)"),
        BadCall("pooled features", features(3, width), rf"{width}\).*\(3, {width}\)"),
        BadCall("fewer pictures than texts", features(2, 5, width), "2 pictures.*3 texts"),
        BadCall("neither pictures nor texts", lambda model, batch: model(), "encoder_hidden_states.*input_ids"),
    )


def bad_tower_features() -> tuple[BadCall, ...]:
    """For a model that takes features of every place of its tower in place of pictures."""
    width = PICTURE["hidden_size"]

    def features(*shape, pixel_values=None):
        return calling(lambda batch: {"vision_features": torch.ones(shape), "pixel_values": pixel_values})

    return (
        BadCall(
            "pictures and features", features(3, 17, width, pixel_values=torch.ones(3, 3, 32, 32)), "either pixel"
        ),
        BadCall("neither pictures nor features", calling(lambda batch: {"pixel_values": None}), "pixel_values"),
        BadCall("features of another tower", features(3, 17, width + 1), rf"{width}\).*\(3, 17, {width + 1}\)"),
        BadCall("pooled features", features(3, width), rf"{width}\).*\(3, {width}\)"),
    )


def bad_blip2_pairs() -> tuple[BadCall, ...]:
    def in_training(change):
        return lambda model, batch: model.train()(**changed(batch, **change(batch)))

    def without_texts(batch):
        return {"input_ids": None, "attention_mask": None}

    return (
        *bad_pictures(),
        *bad_tower_features(),
        *bad_qformer_texts(),
        BadCall("no texts", calling(without_texts), "input_ids"),
        BadCall(
            "fewer pictures than texts",
            in_training(lambda batch: {"pixel_values": batch["pixel_values"][:2]}),
            "2 pictures and 3 texts",
        ),
        BadCall("ids of other rows", in_training(lambda batch: {"image_ids": torch.arange(2)}), r"image_ids.*\(3,\)"),
        BadCall(
            "words that are none",
            lambda model, batch: blip2_text_processor()(images=pictures(1), text=[7]),
            "text",
        ),
    )


def bad_slots(is_encoder_decoder: bool = False) -> tuple[BadCall, ...]:
    """For a model in whose texts pictures stand."""
    size = len(lm_tokenizer())

    def one_slot_less(batch):
        ids = batch["input_ids"].clone()
        row, column = (ids == -200).nonzero()[0].tolist()
        ids[row, column] = 5
        return {"input_ids": ids}

    def without_slots(batch):
        return {"input_ids": batch["input_ids"].clamp(min=4)}

    def prepared(**inputs):
        return lambda model, batch: blip2_lm_processor(is_encoder_decoder)(images=pictures(1), **inputs)

    return (
        *bad_pictures(),
        *bad_tower_features()[:1],
        *bad_tower_features()[2:],
        *bad_masks(),
        BadCall("one slot less", calling(one_slot_less), rf"\[2, 3, 3\].*3 pictures need {QUERIES} each.*processor"),
        BadCall("no slot", calling(without_slots), r"\[0, 0, 0\].*3 pictures.*processor"),
        BadCall("slots without pictures", calling(lambda batch: {"pixel_values": None}), r"\[3, 3, 3\].*0 pictures"),
        BadCall(
            "fewer pictures than slots",
            calling(lambda batch: {"pixel_values": batch["pixel_values"][:2]}),
            "2 pictures",
        ),
        BadCall("no texts", calling(lambda batch: {"input_ids": None}), "input_ids.*processor"),
        BadCall(
            "an id beyond the vocabulary",
            calling(lambda batch: {"input_ids": batch["input_ids"].where(batch["input_ids"] < 4, size)}),
            rf"id {size}.*vocabulary, which has {size}",
        ),
        BadCall(
            "a question to a Q-Former without text",
            calling(lambda batch: {"qformer_input_ids": torch.ones(3, 4, dtype=torch.long)}),
            "use_text is False",
        ),
        BadCall("nothing to go on from", lambda model, batch: model.generate(), "input_ids, pixel_values"),
        BadCall(
            "generating with a slot less",
            lambda model, batch: model.generate(
                **{"pixel_values": batch["pixel_values"], **one_slot_less(batch)}, max_new_tokens=2
            ),
            "3 pictures",
        ),
        BadCall("more marks than pictures", prepared(text="<image> over <image>"), "2 image tokens.*1 picture"),
        BadCall("an empty caption", prepared(text="a photo of", suffix=" "), "empty"),
        BadCall("an empty question", prepared(text="", mode="vqa"), "empty"),
    )


def bad_llama_calls() -> tuple[BadCall, ...]:
    def unlike(batch):
        return {"labels": batch["labels"][:, :-1]}

    def padded_right(model, batch):
        inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
        return model.generate(**inputs, max_new_tokens=2)

    return (
        BadCall("labels too short", calling(unlike), "labels.*shape"),
        BadCall("generating after padding on the right", padded_right, "padd.*left"),
    )


def bad_t5_calls() -> tuple[BadCall, ...]:
    return (BadCall("nothing to say", calling(lambda batch: {"labels": None}), "labels or decoder_input_ids"),)


IN_CLIP = {
    towers: rf".*\.{tower}\..*\.(q_proj|v_proj)"
    for towers, tower in (("pictures", "vision_model"), ("texts", "text_model"))
}
IN_TOWER = r".*vision_tower\..*\.(q_proj|v_proj)"

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
    Case(
        name="eva_vit",
        auto_class=AutoModel,
        config=partial(EvaViTConfig, **PICTURE),
        model_class=EvaViTModel,
        prepare=partial(squashing_image_processor, 32, 32),
        oracle=oracles.eva_vit_oracle,
        other_activation="gelu_pytorch_tanh",
        inputs=("images",),
        tasks=("image-feature-extraction",),
        bad_calls=bad_pictures(),
        loss=False,
        reasons=NO_GENERATION,
    ),
    Case(
        name="pic2word_mapper",
        auto_class=AutoModel,
        config=partial(Pic2WordMapperConfig, image_dim=JOINT, hidden_dim=40, word_dim=32, num_hidden_layers=3),
        model_class=Pic2WordMapper,
        prepare=lambda: embeddings,
        oracle=oracles.mapper_oracle,
        other_activation="gelu",
        inputs=("image_embeds",),
        tasks=(),
        bad_calls=bad_embeddings(),
        loss=False,
        reasons={
            **NO_GENERATION,
            4: "it has no attention",
            6: "it has no loss of its own: pic2word trains it",
            7: "it trains whole, inside pic2word, whose adapters keep it",
            9: "no pipeline takes embeddings",
            11: "it is pushed inside pic2word",
        },
    ),
    Case(
        name="pic2word",
        auto_class=AutoModel,
        config=lambda: pic2word_config(frozen_clip_config()),
        model_class=Pic2WordModel,
        prepare=pic2word_processor,
        oracle=oracles.pic2word_oracle,
        connector="mapper",
        adapted=IN_CLIP,
        other_activation="gelu",
        inputs=("images", "text"),
        tasks=("composed-image-retrieval",),
        bad_calls=bad_compositions(),
        texts=COMPOSED,
        reasons=NO_GENERATION,
    ),
    Case(
        name="pic2word with mm_clip_resnet",
        auto_class=AutoModel,
        config=lambda: pic2word_config(clip_with_resnet_config()),
        model_class=Pic2WordModel,
        prepare=partial(pic2word_processor, 64),
        oracle=oracles.pic2word_with_resnet_oracle,
        connector="mapper",
        adapted=IN_CLIP,
        other_activation="gelu",
        inputs=("images", "text"),
        tasks=("composed-image-retrieval",),
        bad_calls=bad_compositions(64),
        texts=COMPOSED,
        reasons={
            **NO_GENERATION,
            10: "what is published has a ViT",
            13: "mm_clip_resnet and pic2word compile all that it is made of",
        },
    ),
    Case(
        name="pic2word with clip",
        auto_class=AutoModel,
        config=lambda: pic2word_config(transformers_clip_config()),
        model_class=Pic2WordModel,
        prepare=pic2word_processor,
        oracle=oracles.pic2word_oracle,
        connector="mapper",
        adapted=IN_CLIP,
        other_activation="gelu",
        inputs=("images", "text"),
        tasks=("composed-image-retrieval",),
        bad_calls=(*bad_placeholders(), *bad_feature_inputs()),
        texts=COMPOSED,
        reasons={
            **NO_GENERATION,
            10: "what is published becomes pic2word over mm_clip",
            13: "its text tower takes ids alone, and torch compiles no function that puts a hook in place",
        },
    ),
    Case(
        name="mm_blip2_qformer",
        auto_class=AutoModel,
        config=lambda: MMBlip2QFormerConfig(**QFORMER, **qformer_words(), encoder_hidden_size=PICTURE["hidden_size"]),
        model_class=MMBlip2QFormerModel,
        prepare=lambda: picture_features,
        oracle=oracles_blip2.qformer_oracle,
        other_activation="gelu_pytorch_tanh",
        inputs=("image_embeds", "text"),
        tasks=(),
        bad_calls=(*bad_qformer_texts(), *bad_qformer_pictures()),
        loss=False,
        reasons={
            **NO_GENERATION,
            6: "it has no loss of its own: mm_blip2 trains it",
            7: "it trains whole, inside mm_blip2, whose adapters keep it",
            9: "no pipeline takes features of a picture tower",
            10: "it is published inside a whole BLIP-2 only",
            11: "it is pushed inside mm_blip2",
        },
    ),
    Case(
        name="mm_blip2",
        auto_class=AutoModel,
        config=partial(blip2_config, qformer_config={**QFORMER, "use_text": False}, vision_feature_layer=-2),
        model_class=MMBlip2Model,
        prepare=blip2_text_processor,
        oracle=oracles_blip2.blip2_oracle,
        other_activation="gelu_pytorch_tanh",
        inputs=("images",),
        tasks=("image-feature-extraction",),
        bad_calls=(*bad_pictures(), *bad_tower_features()),
        connector="qformer",
        adapted={"pictures": IN_TOWER},
        loss=False,
        reasons={
            **NO_GENERATION,
            6: "it has no loss of its own: the classes with heads train it",
            7: "it has no loss of its own: the classes with heads are adapted",
            10: "it is published inside a whole BLIP-2 only",
        },
    ),
    Case(
        name="mm_blip2 retrieval",
        auto_class=AutoModelForZeroShotImageClassification,
        config=blip2_config,
        model_class=MMBlip2ForImageTextRetrieval,
        prepare=blip2_text_processor,
        oracle=oracles_blip2.stage1_oracle,
        other_activation="gelu_pytorch_tanh",
        inputs=("images", "text"),
        tasks=("zero-shot-image-classification",),
        bad_calls=bad_blip2_pairs(),
        connector="qformer",
        adapted={"pictures": IN_TOWER},
        reasons={
            **NO_GENERATION,
            13: "its graph is a part of stage 1's, which is compiled and exported",
        },
    ),
    Case(
        name="mm_blip2 stage 1",
        auto_class=AutoModelForPreTraining,
        config=blip2_config,
        model_class=MMBlip2ForPreTraining,
        prepare=blip2_text_processor,
        oracle=oracles_blip2.stage1_oracle,
        other_activation="gelu_pytorch_tanh",
        inputs=("images", "text"),
        tasks=("image-feature-extraction",),
        bad_calls=bad_blip2_pairs(),
        connector="qformer",
        adapted={"pictures": IN_TOWER},
        reasons={8: "MMBlip2ForQFormerCaptioning speaks in its stead"},
    ),
    Case(
        name="mm_blip2 with llama",
        auto_class=AutoModelForImageTextToText,
        config=lambda: blip2_config(llama_config()),
        model_class=MMBlip2ForConditionalGeneration,
        prepare=blip2_lm_processor,
        oracle=oracles_blip2.stage2_oracle,
        other_activation="gelu_pytorch_tanh",
        inputs=("images", "text", "suffix"),
        tasks=("image-text-to-text",),
        bad_calls=(*bad_slots(), *bad_llama_calls()),
        texts=PROMPTS,
        suffixes=ANSWERS,
        connector="qformer",
        adapted={"pictures": IN_TOWER, "words": r".*language_model\..*\.(q_proj|v_proj)"},
    ),
    Case(
        name="mm_blip2 with t5",
        auto_class=AutoModelForImageTextToText,
        config=blip2_t5_config,
        model_class=MMBlip2ForConditionalGeneration,
        prepare=partial(blip2_lm_processor, True),
        oracle=oracles_blip2.stage2_oracle,
        other_activation="gelu_pytorch_tanh",
        inputs=("images", "text", "suffix"),
        tasks=("image-text-to-text",),
        bad_calls=(*bad_slots(True), *bad_t5_calls()),
        texts=PROMPTS,
        suffixes=ANSWERS,
        connector="qformer",
        adapted={"pictures": IN_TOWER, "words": r".*language_model\..*\.(q|v)"},
    ),
]
FOLDER = Path(__file__).parent
