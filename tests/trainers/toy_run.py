"""A short contrastive training run that kills itself with SIGKILL at a chosen point.

    python toy_run.py OUTPUT_DIR [KILL_AT]

KILL_AT: ``step:N`` (at the end of step N), ``open:NAME`` (when NAME is opened for writing inside a checkpoint),
``rename`` (just before a checkpoint gets its name), ``rotate`` (when an older checkpoint is about to be removed).
``final`` (just before the trained model gets its place, after the last checkpoint).
``full:N`` does not kill: from step N on no file may grow beyond 4 kB, as if the disk were full.
"""

import os
import resource
import signal
import sys

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.trainers.checkpointing import latest_checkpoint
from hf_mm.trainers.contrastive import ContrastiveTrainer, ContrastiveTrainingArguments

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_clip(attention_dropout: float = 0.0, vocab_size: int = 20) -> MMClipModel:
    torch.manual_seed(0)
    tower = {**TOWER, "attention_dropout": attention_dropout}
    end = vocab_size - 1
    text = {
        "vocab_size": vocab_size,
        "max_position_embeddings": 6,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    return MMClipModel(
        MMClipConfig(
            projection_dim=8,
            vision_config={**tower, "image_size": 16, "patch_size": 8},
            text_config={**tower, **text},
        )
    )


class Pairs(Dataset):
    """24 random pictures and texts."""

    def __init__(self, vocab_size: int = 20):
        self.vocab_size = vocab_size

    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, 18, (4,), generator=generator)
        return {
            "pixel_values": torch.randn(3, 16, 16, generator=generator),
            "input_ids": torch.cat([torch.tensor([self.vocab_size - 2]), ids, torch.tensor([self.vocab_size - 1])]),
            "image_ids": torch.tensor(index // 2),
        }


def toy_trainer(output_dir: str, **arguments) -> ContrastiveTrainer:
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "lr_scheduler_type": "constant",
        "save_steps": 2,
        "save_total_limit": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "view_loss_weight": 0.5,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return ContrastiveTrainer(
        model=tiny_clip(attention_dropout=0.2),
        args=ContrastiveTrainingArguments(output_dir=output_dir, **{**defaults, **arguments}),
        train_dataset=Pairs(),
    )


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


class AtStep(TrainerCallback):
    def __init__(self, step: int, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def arm(trainer: ContrastiveTrainer, kill_at: str):
    kind, _, detail = kill_at.partition(":")
    if kind in ("step", "full"):
        trainer.add_callback(AtStep(int(detail), kill_self if kind == "step" else fill_disk))
        return

    def watch(event, arguments):
        path = str(arguments[0]) if arguments else ""
        if (
            (kind == "open" and event == "open" and ".incomplete" in path and path.endswith(detail))
            or (kind == "final" and event == "os.rename" and path.endswith("model.safetensors"))
            or (kind == "rename" and event == "os.rename" and ".incomplete" in path)
            or (kind == "rotate" and event == "shutil.rmtree" and ".incomplete" not in path and "checkpoint-" in path)
        ):
            kill_self()

    sys.addaudithook(watch)


if __name__ == "__main__":
    output_dir, *kill_at = sys.argv[1:]
    trainer = toy_trainer(output_dir)
    if kill_at:
        arm(trainer, kill_at[0])
    trainer.train(resume_from_checkpoint=latest_checkpoint(output_dir))
    trainer.save_whole_model(output_dir)
