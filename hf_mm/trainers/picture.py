"""What every trainer of pictures adds to Trainer, whatever the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import logging

from .callbacks import RunRecord
from .checkpointing import AtomicCheckpoints
from .optim import decay_parameter_names, refuse_half_precision, refuse_unsaved_parameters

logger = logging.get_logger(__name__)


@dataclass
class PictureTrainingArguments(TrainingArguments):
    """TrainingArguments whose defaults suit batches of pictures."""

    overwrite: bool = field(default=False, metadata={"help": "Start anew in an output folder that holds another run."})

    def __post_init__(self):
        # Raw pictures are columns that no forward() names, and unequal batches have no common loss.
        self.remove_unused_columns = False
        self.dataloader_drop_last = True
        self.prediction_loss_only = True
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()


class PictureTrainer(AtomicCheckpoints, Trainer):
    """A Trainer for models that read pictures.

    What it adds to Trainer: batches drawn by a batch sampler of the dataset's own, the rows that a dataset skipped, weight
    decay on matrices only, averages of parts of the loss in the log, whole checkpoints.

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
        self._counts: dict[str, torch.Tensor] = {}
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
        """See `transformers.Trainer.compute_loss`; `parts_of` what the model returned goes into the log."""
        loss, outputs = super().compute_loss(model, self.take_skipped(inputs), True, num_items_in_batch)
        if model.training and (parts := self.parts_of(outputs)):
            self._record(**parts)
        return (loss, outputs) if return_outputs else loss

    def take_skipped(self, inputs: dict) -> dict:
        """A batch without the rows that were skipped while it was read, which are recorded."""
        inputs = dict(inputs)
        for key, reason in inputs.pop("skipped", []):
            self.record.skipped.setdefault(str(key), reason)
        return inputs

    def parts_of(self, outputs) -> dict[str, torch.Tensor]:
        """What of a step's outputs is averaged in the log, by name; scalars."""
        return {}

    def gather_skipped(self) -> dict[str, str]:
        """The rows that any rank skipped, with reasons. Every rank must call it."""
        of_ranks = gather_object([self.record.skipped])
        return {row: reason for skipped in of_ranks for row, reason in skipped.items()}

    def _record(self, **parts: torch.Tensor) -> None:
        for name, value in parts.items():
            value = value.detach()
            self._sums[name] = self._sums.get(name, 0.0) + value.nan_to_num(
                nan=0.0, posinf=torch.inf, neginf=-torch.inf
            )
            self._counts[name] = self._counts.get(name, 0) + ~value.isnan()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `transformers.Trainer.log`; an average leaves out the steps that had nothing to measure, which is NaN."""
        if "loss" in logs:
            counts = {name: int(count) for name, count in self._counts.items()}
            averages = {name: float(self._sums[name]) / count if count else math.nan for name, count in counts.items()}
            logs |= {name: round(average, 4) for name, average in averages.items()}
            self._sums, self._counts = {}, {}
            logs |= self.state_of_model()
        super().log(logs, start_time)

    def state_of_model(self) -> dict[str, float]:
        """What is logged of the model itself, as the temperature."""
        return {}
