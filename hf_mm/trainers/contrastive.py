"""Training a dual encoder with the contrastive loss, on one process or many."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from ..losses.contrastive import at_least_float32, supervised_contrastive_loss
from .callbacks import ClampLogitScale, find_logit_scale
from .picture import PictureTrainer, PictureTrainingArguments


@dataclass
class ContrastiveTrainingArguments(PictureTrainingArguments):
    """Arguments of `PictureTrainer`, and the weights of the terms beside the contrastive loss."""

    view_loss_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the loss that pulls the pictures of one group together (0: none)."},
    )
    view_loss_temperature: float = field(
        default=0.1, metadata={"help": "Temperature of the loss between pictures of one group."}
    )
    label_loss_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the loss that sorts pictures by the texts of their labels (0: none)."},
    )


class ContrastiveTrainer(PictureTrainer):
    """A Trainer for `MMClipModel` and its relatives.

    What it adds to `PictureTrainer`: the loss between pictures of one group, the loss of labels told in words, the clamp
    of the logit scale, losses and temperature in the log. Every rank takes part in training and evaluation steps, and the
    loss is over all of their rows.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(ClampLogitScale())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = self.take_skipped(inputs)
        names = ("labels", "label_input_ids", "label_attention_mask")
        labels, ids, mask = (inputs.pop(name, None) for name in names)
        outputs = model(**inputs, gather_loss=True)
        loss, parts = outputs.loss, {}
        if self.args.label_loss_weight and model.training:
            if labels is None:
                raise ValueError("label_loss_weight needs labels in every batch: give the dataset label_of.")
            parts["label_loss"] = self._label_loss(model, outputs.image_embeds, labels, ids, mask)
            loss = loss + self.args.label_loss_weight * parts["label_loss"]
        if self.args.view_loss_weight and model.training:
            if "image_ids" not in inputs:
                raise ValueError("view_loss_weight needs image_ids in every batch, the group that each picture is of.")
            parts["view_loss"] = supervised_contrastive_loss(
                outputs.image_embeds, inputs["image_ids"], self.args.view_loss_temperature
            )
            loss = loss + self.args.view_loss_weight * parts["view_loss"]
        if parts:
            self._record(contrastive_loss=outputs.loss, **parts)
        return (loss, outputs) if return_outputs else loss

    def _label_loss(
        self, model, image_embeds: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Cross entropy of the pictures among the batch's labels, told in words, as zero-shot classification has it."""
        dual = self.accelerator.unwrap_model(model)
        texts = dual.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        texts = nn.functional.normalize(at_least_float32(texts), dim=-1)
        logits = dual.logit_scale.exp() * at_least_float32(image_embeds) @ texts.T
        return nn.functional.cross_entropy(logits, labels)

    def state_of_model(self) -> dict[str, float]:
        logit_scale = find_logit_scale(self.model)
        return {} if logit_scale is None else {"temperature": round(math.exp(-logit_scale.item()), 5)}
