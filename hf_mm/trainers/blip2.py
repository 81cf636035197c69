"""Training BLIP-2: the losses of both stages in the log, a rate of learning for each block of an unfrozen tower, and the
word warm-up between the stages."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..composite.language_model import embed_tokens
from ..data.image_text import stable_id
from ..losses.words import word_loss
from ..models.blip2.modeling_blip2 import MMBlip2ForConditionalGeneration
from ..models.blip2.modeling_blip2_stage1 import ACCURACIES, MMBlip2ForImageTextRetrieval
from .picture import PictureTrainer, PictureTrainingArguments

PARTS = ("loss_itc", "loss_itm", "loss_itg", "accuracy")
WORD_LOGIT_SCALE = math.log(30)


@dataclass
class Blip2TrainingArguments(PictureTrainingArguments):
    """Arguments of `PictureTrainer`, and how the learning rate falls off in an unfrozen tower."""

    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "Each block of an unfrozen vision tower learns at this times the rate of the block above it; the "
            "patches at the rate below the first block. 1 for the same rate everywhere."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, not {self.layer_decay}.")
        if self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor is not followed by the losses of BLIP-2: set it to 0 (stage 1 smooths by "
                "label_smoothing of its config)."
            )


def refuse_data_parallel(args: TrainingArguments) -> None:
    """Raises ValueError where one process has several GPUs, over which Trainer would copy the model in every step."""
    if args.n_gpu > 1:
        raise ValueError(
            f"one process cannot train this model on {args.n_gpu} GPUs: start one for each with torchrun or accelerate "
            "launch, or show it a single GPU by CUDA_VISIBLE_DEVICES."
        )


class Blip2Trainer(PictureTrainer):
    """A Trainer for all models of BLIP-2.

    What it adds to `PictureTrainer`: the parts of the loss, the accuracies and the temperature in the log, hard negatives
    that are a function of seed and step alone, and ``layer_decay`` (Li et al. 2023, appendix; the released code writes it down and does not apply it).

    Raises:
        ValueError: see `PictureTrainer`; or one process has several GPUs.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        refuse_data_parallel(self.args)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """See `PictureTrainer.compute_loss`. Hard negatives are drawn alike on one process and on many, step by step.
        The one row of features that a blind collator gives is that of all texts."""
        if getattr(self.data_collator, "blind", False):
            texts = inputs.get("input_ids", inputs.get("word_targets"))
            inputs = {**inputs, "vision_features": inputs["vision_features"].expand(len(texts), -1, -1)}
        whole = self.accelerator.unwrap_model(model)
        whole = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        if model.training and isinstance(whole, MMBlip2ForImageTextRetrieval):
            draw = torch.Generator().manual_seed(stable_id(f"{self.args.seed}/{self.state.global_step}"))
            inputs = {**inputs, "generator": draw}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def parts_of(self, outputs: ModelOutput) -> dict[str, torch.Tensor]:
        parts = {name: outputs[name] for name in PARTS if outputs.get(name) is not None}
        if outputs.get("accuracies") is not None:
            names = [f"accuracy_{name}" for name in ACCURACIES]
            parts |= zip(names, outputs["accuracies"].unbind(), strict=True)
        return parts

    def state_of_model(self) -> dict[str, float]:
        temperature = getattr(self.model, "temperature", None)
        return {} if temperature is None else {"temperature": round(temperature.item(), 5)}

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.layer_decay < 1:
            factors = layer_decay_factors(self.model.vision_tower, self.args.layer_decay)
            optimizer.param_groups[:] = split_by_rate(optimizer.param_groups, factors)
        return optimizer


def layer_decay_factors(tower: PreTrainedModel, decay: float) -> dict[nn.Parameter, float]:
    """By what the learning rate of each parameter of a vision tower is multiplied.

    Block l of L, counted from 1, has decay^(L + 1 - l); what comes before the blocks is block 0, what comes after them
    has 1.

    Raises:
        ValueError: the tower is no single stack of blocks.
    """
    number = getattr(tower.config, "num_hidden_layers", None)
    stacks = [(name, module) for name, module in tower.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = [(name, stack) for name, stack in stacks if len(stack) == number]
    if len(stacks) != 1:
        raise ValueError(
            f"{tower.config.model_type} is no single stack of blocks, so that none has a place in it: set layer_decay to 1."
        )
    name, stack = stacks[0]
    own = {id(parameter) for parameter in stack.parameters()}
    factors, before = {}, True
    for parameter_name, parameter in tower.named_parameters():
        if id(parameter) in own:
            before = False
            block = int(parameter_name.removeprefix(f"{name}.").partition(".")[0]) + 1
            factors[parameter] = decay ** (number + 1 - block)
        else:
            factors[parameter] = decay ** (number + 1) if before else 1.0
    return factors


def split_by_rate(groups: list[dict], factors: dict[nn.Parameter, float]) -> list[dict]:
    """The groups of a new optimizer, divided so that all parameters of one have the same factor on the learning rate; the
    highest comes first, which is the one that Trainer logs."""
    divided = []
    for group in groups:
        by_factor = defaultdict(list)
        for parameter in group["params"]:
            by_factor[factors.get(parameter, 1.0)].append(parameter)
        for factor, parameters in sorted(by_factor.items(), key=lambda item: -item[0]):
            divided.append({**group, "params": parameters, "lr": group["lr"] * factor})
    return divided


@dataclass
class WordWarmupOutput(ModelOutput):
    """What the warm-up gives.

    Args:
        loss: see `word_loss`.
        accuracy: the share of tokens whose word scores best.
    """

    loss: torch.Tensor | None = None
    accuracy: torch.Tensor | None = None


class WordWarmup(MMBlip2ForConditionalGeneration):
    """A model of stage 2 whose soft tokens learn the words of captions before the language model runs, see `word_loss`.

    Its checkpoints have one weight beyond those of the model, the logarithm of the logits' scale, `logit_scale`.
    """

    accepts_loss_kwargs = False

    def __init__(self, config, vision_tower=None, language_model=None):
        super().__init__(config, vision_tower, language_model)
        self.logit_scale = nn.Parameter(torch.tensor(WORD_LOGIT_SCALE))
        self.register_buffer("words", None, persistent=False)

    @classmethod
    def of(cls, model: MMBlip2ForConditionalGeneration, word_ids: torch.Tensor) -> WordWarmup:
        """The warm-up of a model, which shares its parts.

        Args:
            model: of stage 2.
            word_ids: ``(V,)``, the tokens that captions use; targets are numbers in it.
        """
        warmup = cls(model.config, model.vision_tower, model.language_model)
        warmup.vision_norm, warmup.qformer = model.vision_norm, model.qformer
        warmup.language_projection = model.language_projection
        warmup.generation_config = model.generation_config
        with torch.no_grad():
            warmup.words = embed_tokens(model.language_model, word_ids[None])[0].float()
        return warmup

    def warmed_up(self) -> MMBlip2ForConditionalGeneration:
        """The model again, which shares its parts with the warm-up."""
        model = MMBlip2ForConditionalGeneration(self.config, self.vision_tower, self.language_model)
        model.vision_norm, model.qformer = self.vision_norm, self.qformer
        model.language_projection = self.language_projection
        model.generation_config = self.generation_config
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self and hasattr(self, "logit_scale"):
            init.constant_(self.logit_scale, WORD_LOGIT_SCALE)

    def forward(
        self,
        word_targets: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
    ) -> WordWarmupOutput:
        """Scores the words of captions.

        Args:
            word_targets: ``(B, Nq)``, see `word_loss`.
            pixel_values, vision_features: of B pictures.
        """
        soft_tokens = self.get_image_features(pixel_values, vision_features, return_dict=True).pooler_output
        loss, accuracy = word_loss(soft_tokens, self.words, word_targets, self.logit_scale.exp())
        return WordWarmupOutput(loss=loss, accuracy=accuracy)
