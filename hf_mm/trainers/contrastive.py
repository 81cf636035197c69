"""Training a dual encoder with the contrastive loss, on one process or many."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import logging

from ..losses.contrastive import at_least_float32, supervised_contrastive_loss
from .callbacks import ClampLogitScale, RunRecord, find_logit_scale
from .checkpointing import AtomicCheckpoints
from .optim import decay_parameter_names, refuse_half_precision, refuse_unsaved_parameters

logger = logging.get_logger(__name__)


@dataclass
class ContrastiveTrainingArguments(TrainingArguments):
    """TrainingArguments whose defaults suit a contrastive loss, and the weight of its second term."""

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
    overwrite: bool = field(default=False, metadata={"help": "Start anew in an output folder that holds another run."})

    def __post_init__(self):
        # Raw pictures are columns that no forward() names, and unequal batches have no common loss.
        self.remove_unused_columns = False
        self.dataloader_drop_last = True
        self.prediction_loss_only = True
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()


class ContrastiveTrainer(AtomicCheckpoints, Trainer):
    """A Trainer for `MMClipModel` and its relatives.

    What it adds to Trainer: batches drawn by a batch sampler of the dataset's own, the loss between pictures of one
    group, the loss of labels told in words, weight decay on matrices only, the clamp of the logit scale, losses and temperature in the log, whole
    checkpoints. Every rank takes part in training and evaluation steps, and the loss is over all of their rows.

    Args:
        processing_class: the processor; it is saved with every checkpoint, so that a checkpoint can prepare its inputs.
        train_batch_sampler: yields lists of `train_dataset` keys and has ``set_epoch``; without one, Trainer samples.
            A dataset with ``is_split_by_rank`` is a stream that gives every rank its own part.

    Raises:
        ValueError: trainable weights are in half precision, in which Adam's update underflows, or stand beside an
            adapter that does not save them.
    """

    def __init__(self, *args, processing_class=None, train_batch_sampler=None, **kwargs):
        super().__init__(*args, processing_class=processing_class, **kwargs)
        refuse_half_precision(self.model)
        refuse_unsaved_parameters(self.model)
        if isinstance(processing_class, PreTrainedTokenizerBase):
            logger.warning(
                "processing_class is a tokenizer: checkpoints will not be able to prepare pictures; "
                "pass the whole processor."
            )
        self.train_batch_sampler = train_batch_sampler
        self.record = RunRecord()
        self._sums: dict[str, torch.Tensor] = {}
        self._num_sums = 0
        self.add_callback(ClampLogitScale())
        self.add_callback(self.record)

    def get_decay_parameter_names(self, model) -> list[str]:
        return decay_parameter_names(model)

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        options = {
            "collate_fn": self.data_collator,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
        }
        if getattr(self.train_dataset, "is_split_by_rank", False):
            return DataLoader(self.train_dataset, batch_size=args.per_device_train_batch_size, **options)
        if self.train_batch_sampler is None:
            return super().get_train_dataloader()
        loader = DataLoader(self.train_dataset, batch_sampler=self.train_batch_sampler, **options)
        return self.accelerator.prepare(loader)

    def _run_epoch(self, *args, epoch: int, **kwargs):
        if self.train_batch_sampler is not None:  # a resumed epoch wraps it too deep for Trainer to reach
            self.train_batch_sampler.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        for key, reason in inputs.pop("skipped", []):
            self.record.skipped.setdefault(str(key), reason)
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

    def gather_skipped(self) -> dict[str, str]:
        """The rows that any rank skipped, with reasons. Every rank must call it."""
        of_ranks = gather_object([self.record.skipped])
        return {row: reason for skipped in of_ranks for row, reason in skipped.items()}

    def _record(self, **losses: torch.Tensor) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._num_sums += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: round(float(total) / self._num_sums, 4) for name, total in self._sums.items()}
            self._sums, self._num_sums = {}, 0
            if (logit_scale := find_logit_scale(self.model)) is not None:
                logs["temperature"] = round(math.exp(-logit_scale.item()), 5)
        super().log(logs, start_time)
