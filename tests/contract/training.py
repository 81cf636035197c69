"""Short runs of transformers' own Trainer on the tiny models, also as a script for several processes.

    torchrun --nproc_per_node 2 -m contract.training FOLDER

trains every case for two steps and leaves its weights and losses in FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from .cases import Case, cases_for, in_double

NUM_SAMPLES = 8


def with_loss(case: Case) -> bool:
    return case.loss


def samples_of(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    number = len(next(iter(batch.values())))
    return [{name: value[row] for name, value in batch.items()} for row in range(number)]


def trainer_for(case: Case, folder: Path, model=None, samples=None, **arguments) -> Trainer:
    """transformers' Trainer with plain SGD, so that the weights after a step tell the gradients."""
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": NUM_SAMPLES // 2,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **arguments,
    }
    return Trainer(
        model=model or case.build().double(),
        args=TrainingArguments(**options),
        train_dataset=samples or samples_of(in_double(case.batch(NUM_SAMPLES))),
    )


def run_of(case: Case, folder: Path, **arguments) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights after training, and the loss of every step."""
    trainer = trainer_for(case, folder, **arguments)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model.state_dict(), losses


if __name__ == "__main__":
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    for number, case in enumerate(cases_for(6, with_loss)):
        weights, losses = run_of(case, root / "run", per_device_train_batch_size=NUM_SAMPLES // 4)
        if torch.distributed.get_rank() == 0:
            torch.save((torch.distributed.get_world_size(), weights, losses), root / f"{number}.pt")
    torch.distributed.destroy_process_group()
