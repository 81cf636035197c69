"""Checkpoints that are complete or absent: written aside, then renamed."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

ASIDE = ".incomplete"


class CheckpointError(OSError):
    """A checkpoint could not be written; nothing of it is left and earlier ones are whole."""


def latest_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The complete checkpoint of a run with the most steps, or None."""
    complete = [path.parent for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


class AtomicCheckpoints:
    """Mixin for Trainer: a process killed in the middle of a save leaves the earlier checkpoints and nothing else."""

    _checkpoint_root: str | None = None

    def save_whole_model(self, output_dir: str | os.PathLike) -> None:
        """`Trainer.save_model` into a folder that may hold other files; each file of the model is whole or absent.

        Raises:
            CheckpointError: the disk is full, say; what stood there before is untouched.
        """
        output_dir = Path(output_dir)
        aside = output_dir / ASIDE
        with self._whole("the model", output_dir, aside):
            self.save_model(str(aside))
            if self.args.should_save:
                (aside / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, of no use to who opens the model
                _flush(aside)
                for file in list(aside.iterdir()):
                    if (output_dir / file.name).is_dir():
                        os.replace(output_dir / file.name, aside / f"earlier-{file.name}")
                    os.replace(file, output_dir / file.name)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if getattr(self.model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "an adapter put in by add_adapter cannot be resumed: wrap the model with peft.get_peft_model instead."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed from the last checkpoint of a run
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return self._checkpoint_root or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        run_dir = Path(self._get_output_dir(trial))
        aside, name = run_dir / ASIDE, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._whole(f"checkpoint {name}", run_dir, aside):
            with self._writing_to(aside):
                super()._save_checkpoint(model, trial)
            self._name_best_checkpoint(run_dir, aside / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _flush(aside / name)
                if (run_dir / name).exists():
                    os.replace(run_dir / name, aside / "earlier")
                os.replace(aside / name, run_dir / name)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    @contextmanager
    def _whole(self, what: str, run_dir: Path, aside: Path):
        """Clears the folder `aside` before and after; a failed write becomes one sentence."""
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            kept = latest_checkpoint(run_dir)
            raise CheckpointError(
                f"{what} could not be written to {run_dir} ({error}); "
                + (f"{kept} is whole: run the same command to resume." if kept else "there is no checkpoint yet.")
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _writing_to(self, folder: Path):
        self._checkpoint_root = str(folder)
        try:
            yield
        finally:
            self._checkpoint_root = None

    def _name_best_checkpoint(self, run_dir: Path, written: Path) -> None:
        """Points the saved state at where the best checkpoint will stand, not at where it was written."""
        if self.state.best_global_step and self.args.should_save:
            self.state.best_model_checkpoint = str(run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))


def _flush(folder: Path) -> None:
    """Has the system write the files of a folder to disk before the folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
