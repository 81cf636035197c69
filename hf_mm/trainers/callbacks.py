"""Callbacks that recipes add to a Trainer."""

from __future__ import annotations

import math
import time

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, ProgressCallback

MAX_LOGIT_SCALE = math.log(100.0)


def find_logit_scale(model: nn.Module) -> nn.Parameter | None:
    """The `logit_scale` of a dual encoder, however it is wrapped (DDP, PEFT); None where there is none."""
    return next((p for name, p in model.named_parameters() if name.rpartition(".")[2] == "logit_scale"), None)


class ClampLogitScale(TrainerCallback):
    """Keeps `logit_scale` in [0, ln 100] after each optimizer step (Radford et al. 2021, section 2.5).

    The parameter is clamped, not its use in the forward pass, so that its gradient survives at the bound.
    """

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        logit_scale = find_logit_scale(model)
        if logit_scale is not None and logit_scale.requires_grad:
            logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)


class LiveProgress(ProgressCallback):
    """Trainer's progress bar with the latest loss, temperature and learning rate beside it, in place of printed lines."""

    SHOWN = ("loss", "temperature", "learning_rate")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.set_postfix({name: f"{logs[name]:.3g}" for name in self.SHOWN if name in (logs or {})})


class RunRecord(TrainerCallback, ExportableState):
    """What a run has to tell beside its weights, kept in its checkpoints: its time, and the rows that it skipped.

    Attributes:
        skipped: row to reason.
    """

    def __init__(self):
        self.skipped: dict[str, str] = {}
        self._earlier_seconds = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Of training, over all processes that took part one after the other."""
        return self._earlier_seconds + (time.perf_counter() - self._started if self._started else 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        earlier = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.skipped = {**earlier.get("skipped", {}), **self.skipped}
        self._earlier_seconds, self._started = earlier.get("seconds", 0.0), time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self._earlier_seconds, self._started = self.seconds, None

    def state(self) -> dict:
        return {"args": {}, "attributes": {"seconds": self.seconds, "skipped": self.skipped}}
