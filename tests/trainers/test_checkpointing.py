"""A run killed anywhere, and started again, ends with the weights of a run that was left alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_forked
from toy_run import toy_trainer
from transformers.trainer import TRAINER_STATE_NAME

from hf_mm.trainers.checkpointing import ASIDE, latest_checkpoint

SCRIPT = Path(__file__).with_name("toy_run.py")


def run(output_dir: Path, *kill_at: str) -> subprocess.CompletedProcess:
    # Measuring coverage would write files of its own to the full disk.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(output_dir), *kill_at], env=environment, capture_output=True, text=True
    )


def weights(output_dir: Path) -> bytes:
    return (output_dir / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> bytes:
    output_dir = tmp_path_factory.mktemp("undisturbed")
    done = run_forked(SCRIPT, output_dir)
    assert done.returncode == 0, done.stderr
    return weights(output_dir)


def test_killed_at_seven_points_in_turn(tmp_path, undisturbed):
    kill_points = ["step:3", "open:config.json", "open:trainer_state.json", "rename", "rotate", "step:7", "final"]
    for kill_at in kill_points:
        killed = run_forked(SCRIPT, tmp_path, kill_at)
        assert killed.returncode == -signal.SIGKILL, f"{kill_at}: {killed.stderr}"
        for checkpoint in tmp_path.glob("checkpoint-*"):
            assert (checkpoint / TRAINER_STATE_NAME).is_file(), f"{kill_at} left half of {checkpoint.name}"
    done = run_forked(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path) == undisturbed


def test_a_checkpoint_written_again_is_never_absent(tmp_path):
    """Saving a step that is there already keeps the earlier checkpoint until the new one has its name."""
    trainer = toy_trainer(str(tmp_path), max_steps=2)
    trainer.train()
    (tmp_path / "checkpoint-2" / "mark").touch()
    trainer._save_checkpoint(trainer.model, trial=None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert not (tmp_path / "checkpoint-2" / "mark").exists()


def test_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path, undisturbed):
    failed = run(tmp_path, "full:4")
    assert failed.returncode == 1
    last_line = failed.stderr.strip().splitlines()[-1]
    assert "checkpoint-4 could not be written" in last_line
    assert "checkpoint-2 is whole" in last_line
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-2"]
    done = run_forked(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path) == undisturbed


def test_latest_checkpoint_is_the_complete_one_with_the_most_steps(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for name in ("checkpoint-90", "checkpoint-100", f"{ASIDE}/checkpoint-200"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / TRAINER_STATE_NAME).write_text("{}")
    (tmp_path / "checkpoint-300").mkdir()
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
