"""What a checkpoint's writing promises: on disk before it has a name, one sentence on failure, every rank waited for."""

import json
import multiprocessing
import os
import socket
import time
import traceback

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from safetensors import SafetensorError
from torch.utils.data import IterableDataset
from toy_run import Pairs, tiny_clip, toy_trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from hf_mm.trainers.checkpointing import ASIDE, CheckpointError, latest_checkpoint
from hf_mm.trainers.contrastive import ContrastiveTrainer, ContrastiveTrainingArguments


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def saved_state(folder, step: int) -> dict:
    return json.loads((folder / f"checkpoint-{step}" / TRAINER_STATE_NAME).read_text())


@pytest.fixture
def unsynced(monkeypatch):
    """(what was renamed, its files that fsync had not seen by then) of every rename out of the folder aside."""
    synced, renames = set(), []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_replace(source, target):
        if ASIDE in str(source):
            paths = [os.path.join(base, name) for base, _, files in os.walk(source) for name in files] or [source]
            renames.append((str(target), [path for path in paths if os.stat(path).st_ino not in synced]))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    return renames


def test_everything_is_on_disk_before_it_has_a_name(tmp_path, unsynced):
    trainer = toy_trainer(str(tmp_path), max_steps=3, save_steps=1)
    trainer.train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert [os.path.basename(target) for target, _ in unsynced] == [f"checkpoint-{step}" for step in (1, 2, 3)]
    trainer.save_whole_model(tmp_path)
    assert {os.path.basename(target) for target, _ in unsynced[3:]} == {"config.json", "model.safetensors"}
    assert all(not missed for _, missed in unsynced)


def test_the_model_joins_a_folder_that_holds_other_files(tmp_path):
    trainer = toy_trainer(str(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "config.json").write_text("of an earlier model")
    (tmp_path / ASIDE).mkdir()
    (tmp_path / ASIDE / "half.bin").touch()
    trainer.save_whole_model(tmp_path)
    assert names(tmp_path) == ["config.json", "model.safetensors", "notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    opened = type(trainer.model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), trainer.model.parameters(), strict=True))


def test_a_trainer_may_save_its_model_in_its_own_way(tmp_path, monkeypatch):
    """And leave TrainingArguments out."""
    trainer = toy_trainer(str(tmp_path))
    monkeypatch.setattr(trainer, "save_model", trainer.model.save_pretrained)
    trainer.save_whole_model(tmp_path)
    assert "model.safetensors" in names(tmp_path)
    assert TRAINING_ARGS_NAME not in names(tmp_path)


FAILURES = [
    OSError(28, "No space left on device"),
    RuntimeError("unexpected pos 64 vs 0"),
    SafetensorError("Error while serializing: I/O error"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_failed_write_is_one_sentence_that_says_what_is_left(tmp_path, monkeypatch, failure):
    trainer = toy_trainer(str(tmp_path), max_steps=1, save_steps=1)

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(trainer, "save_model", fail)
    with pytest.raises(CheckpointError) as error:
        trainer.train()
    assert str(error.value) == (
        f"checkpoint checkpoint-1 could not be written to {tmp_path} ({failure}); there is no checkpoint yet."
    )
    assert error.value.__cause__ is failure
    monkeypatch.undo()
    trainer._save_checkpoint(trainer.model, trial=None)
    monkeypatch.setattr(trainer, "save_model", fail)
    with pytest.raises(CheckpointError) as error:
        trainer.save_whole_model(tmp_path)
    assert str(error.value) == (
        f"the model could not be written to {tmp_path} ({failure}); "
        f"{tmp_path / 'checkpoint-1'} is whole: run the same command to resume."
    )
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_failure_that_is_no_failed_write_stays_what_it_is(tmp_path, monkeypatch):
    trainer = toy_trainer(str(tmp_path), max_steps=1, save_steps=1)
    monkeypatch.setattr(trainer, "_save_scaler", lambda folder: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        trainer.train()
    assert names(tmp_path) == [], "half a checkpoint"
    monkeypatch.undo()
    trainer.train()
    assert names(tmp_path) == ["checkpoint-1"]


def trainer_with_evaluation(folder, **options) -> ContrastiveTrainer:
    arguments = {"max_steps": 3, "save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "learning_rate": 1e-2}
    arguments |= {"per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return ContrastiveTrainer(
        model=tiny_clip(),
        args=ContrastiveTrainingArguments(output_dir=str(folder), **arguments, **options),
        train_dataset=Pairs(),
        eval_dataset=Pairs(),
    )


def test_the_best_checkpoint_is_named_where_it_stands(tmp_path):
    """The first step is the best one (its loss the highest), and rotation keeps it."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_with_evaluation(tmp_path, save_total_limit=2, **best)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] == max(losses)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    for step in (1, 3):
        assert saved_state(tmp_path, step)["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")


def test_without_a_best_checkpoint_none_is_named(tmp_path):
    trainer = toy_trainer(str(tmp_path), max_steps=2)
    trainer.train()
    assert trainer.state.best_model_checkpoint is None
    assert saved_state(tmp_path, 2)["best_model_checkpoint"] is None


def test_a_run_with_an_adapter_that_cannot_be_resumed_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18")  # it asks for one to come

    def trainer():
        made = toy_trainer(str(tmp_path), max_steps=1, save_steps=1)
        made.model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
        return made

    trainer().train()
    with pytest.raises(ValueError, match="wrap the model with peft.get_peft_model"):
        trainer().train(resume_from_checkpoint=latest_checkpoint(tmp_path))


class Held(torch.nn.Module):
    """A model that is no PreTrainedModel."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    def forward(self, **inputs):
        return self.clip(**inputs)


def test_a_module_that_knows_no_adapters_resumes(tmp_path):
    def trainer(max_steps):
        made = toy_trainer(str(tmp_path), max_steps=max_steps, save_steps=1)
        return ContrastiveTrainer(model=Held(tiny_clip()), args=made.args, train_dataset=Pairs())

    first = trainer(max_steps=2)
    first.train()
    second = trainer(max_steps=2)
    second.train(resume_from_checkpoint=latest_checkpoint(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


class Steps(IterableDataset):
    """An endless stream of pairs."""

    def __iter__(self):
        pairs = Pairs()
        while True:
            yield from (pairs[index] for index in range(len(pairs)))


@pytest.mark.parametrize("max_steps", [5, 4], ids=["at its end", "beyond its end"])
@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_a_run_resumed_at_or_beyond_its_end_ends(tmp_path, stream, max_steps):
    """Even where the data have no end, and so no last epoch."""
    arguments = {"save_steps": 1, "view_loss_weight": 0.0}
    first = toy_trainer(str(tmp_path), max_steps=5, **arguments)
    first.train()
    second = toy_trainer(str(tmp_path), max_steps=max_steps, **arguments)
    epochs = []
    if stream:
        second.train_dataset = Steps()
    begin = second.callback_handler.on_epoch_begin

    def count(*args):
        epochs.append(1)
        assert len(epochs) < 4, "goes on for ever"
        return begin(*args)

    second.callback_handler.on_epoch_begin = count
    second.train(resume_from_checkpoint=latest_checkpoint(tmp_path))
    assert second.state.global_step == 5
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def train_on_one_rank(rank: int, port: int, folder):
    """Two steps; the second rank is late for every checkpoint."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = toy_trainer(str(folder / "run"), max_steps=2, save_steps=1, per_device_train_batch_size=4)
        save = trainer._save_rng_state
        trainer._save_rng_state = lambda output_dir: (time.sleep(0.5 * rank), save(output_dir))
        trainer.train()
        trainer.save_whole_model(folder / "run")
    except Exception:
        (folder / f"{rank}.error").write_text(traceback.format_exc())


def test_a_late_rank_is_waited_for(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=train_on_one_rank, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert [path.read_text() for path in tmp_path.glob("*.error")] == []
    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2", "config.json", "model.safetensors"]
    for step in (1, 2):
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(names(tmp_path / "run" / f"checkpoint-{step}"))
