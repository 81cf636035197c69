"""The commands of `training/` at a tiny size, run as a user runs them and in forks of this process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from forked import run_forked
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_mm.models.clip.tokenization_clip import MMClipTokenizer

ROOT = Path(__file__).parents[2]
TRAIN, EXPORT = ROOT / "training" / "train_clip.py", ROOT / "training" / "export_clip.py"
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
COLOURS = ["red", "green", "blue", "yellow", "black", "white", "purple", "orange"]


def recipe(folder: Path, **training) -> Path:
    sections = {
        "data": {"validation_fraction": 0.3},
        "model": {
            "projection_dim": 8,
            "vocab_size": 540,
            "vision_config": {**TOWER, "image_size": 16, "patch_size": 8},
            "text_config": {**TOWER, "max_position_embeddings": 12},
        },
        "augmentation": {"shift": 0.1, "brightness": 0.2},
        "training": {
            "max_steps": 6,
            "save_steps": 2,
            "save_total_limit": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "report_to": "none",
            **training,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Sixteen coloured pictures with captions, and one that is cut short."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = ["file_name,caption"]
    for number, colour in enumerate(COLOURS * 2):
        Image.new("RGB", (20 + number, 24), colour).save(folder / f"{number}.png")
        lines.append(f'{number}.png,"a {colour} picture, number {number}"')
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    lines.append("broken.jpg,a picture that cannot be read")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def run(script, *arguments, cache: Path, launcher=(sys.executable,)) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}
    command = [*launcher, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_own_pictures_are_trained_on_evaluated_and_opened(tmp_path, pictures):
    """F04 among others: a broken picture is skipped, counted and named."""
    output_dir = tmp_path / "run"
    arguments = [recipe(tmp_path), "--source", pictures, "--output_dir", output_dir]
    done = run("training/train_clip.py", *arguments, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "1 rows were skipped" in done.stdout and "broken.jpg" in done.stdout
    results = json.loads((output_dir / "results.json").read_text())
    assert results["training"]["steps"] == 6
    assert results["data"]["is_local"] == {"source": True}
    assert list(results["data"]["skipped"]) and "broken.jpg" in next(iter(results["data"]["skipped"]))
    held_out = results["metrics"]["held_out"]
    assert results["data"]["pictures"] + held_out["images"] in (16, 17)
    assert held_out["chance_i2t_r1"] == pytest.approx(100 / held_out["captions"])
    card = (output_dir / "README.md").read_text()
    assert "library_name: transformers" in card and str(held_out["images"]) in card

    assert not [file.name for file in output_dir.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl")]

    opened = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, hf_mm\n"
            "from transformers import pipeline\n"
            "classify = pipeline('zero-shot-image-classification', model=sys.argv[1])\n"
            "print(len(classify(sys.argv[2], candidate_labels=['red', 'green', 'blue'])))\n",
            str(output_dir),
            str(pictures / "0.png"),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert opened.stdout.strip() == "3", opened.stderr

    again = run_forked(TRAIN, *arguments)
    assert "holds a finished run of this recipe" in again.stdout
    other = run_forked(TRAIN, *arguments, "--learning_rate", "0.5")
    assert other.returncode == 1
    assert other.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "learning_rate = 0.001, now it is 0.5" in other.stderr


def test_a_finished_run_becomes_a_folder_for_the_hub(tmp_path, pictures):
    run_dir, folder = tmp_path / "run", tmp_path / "exported"
    unfinished = run_forked(EXPORT, run_dir, folder)
    assert unfinished.returncode == 1 and "no finished run" in unfinished.stderr and not folder.exists()
    run_forked(TRAIN, recipe(tmp_path), "--source", pictures, "--output_dir", run_dir)
    done = run("training/export_clip.py", run_dir, folder, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert {file.name for file in folder.iterdir()} == {
        *("README.md", "config.json", "model.safetensors"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    ours, theirs = load_file(run_dir / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert 'model="exported"' in (folder / "README.md").read_text()
    again = run_forked(EXPORT, run_dir, folder)
    assert again.returncode == 1 and "not empty" in again.stderr


def test_a_killed_run_resumes_with_workers_and_a_stream(tmp_path, pictures):
    """Killed between two steps; straight and resumed runs end with the same bytes, from rows and from a stream."""
    for mode, options in {"rows": ["--dataloader_num_workers", "2"], "stream": ["--streaming", "true"]}.items():
        arguments = [recipe(tmp_path), "--source", pictures, *options]
        straight = run_forked(TRAIN, *arguments, "--output_dir", tmp_path / f"{mode}-a")
        assert straight.returncode == 0, straight.stderr
        killer = tmp_path / "kill_at_step.py"
        killer.write_text(
            "import os, signal, sys\n"
            f"sys.path.insert(0, {str(ROOT / 'training')!r})\n"
            "from hf_mm.trainers.contrastive import ContrastiveTrainer\n"
            "step = ContrastiveTrainer.training_step\n"
            "def training_step(self, *args, **kwargs):\n"
            "    if self.state.global_step == 3:\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return step(self, *args, **kwargs)\n"
            "ContrastiveTrainer.training_step = training_step\n"
            "import train_clip\n"
            "train_clip.train(sys.argv[1:])\n"
        )
        resumed = [*arguments, "--output_dir", tmp_path / f"{mode}-b"]
        killed = run_forked(killer, *resumed)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert (tmp_path / f"{mode}-b" / "checkpoint-2").is_dir()
        done = run_forked(TRAIN, *resumed)
        assert done.returncode == 0, done.stderr
        a, b = ((tmp_path / f"{mode}-{x}" / "model.safetensors").read_bytes() for x in "ab")
        assert a == b, mode


def test_goes_on_from_a_clip_that_transformers_saved(tmp_path, pictures):
    words = [f"a {colour} picture, number {number}" for number, colour in enumerate(COLOURS)]
    tokenizer = MMClipTokenizer.train_from_iterator(words, 540, model_max_length=12)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**TOWER, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    vision = {**TOWER, "image_size": 32, "patch_size": 16}
    published = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    published.save_pretrained(tmp_path / "published")
    tokenizer.save_pretrained(tmp_path / "published")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "published")
    arguments = [recipe(tmp_path, max_steps=1, learning_rate=0.0), "--source", pictures]
    arguments += ["--model_name_or_path", tmp_path / "published", "--output_dir", tmp_path / "run"]
    done = run_forked(TRAIN, *arguments)
    assert done.returncode == 0, done.stderr
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("published", "run"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].flatten(), after[name].flatten()) for name in before)


def test_two_processes_equal_one(tmp_path, pictures):
    """The same rows in the same steps: two processes with half the batch end with the weights of one.

    Plain gradient descent: Adam would blow up the rounding of gradients that are zero in exact arithmetic.
    """
    arguments = [recipe(tmp_path, optim="sgd", learning_rate=0.1), "--source", pictures]
    one, two = tmp_path / "one", tmp_path / "two"
    done = run_forked(TRAIN, *arguments, "--output_dir", one)
    assert done.returncode == 0, done.stderr
    halves = ["--per_device_train_batch_size", "2", "--output_dir", two]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run("training/train_clip.py", *arguments, *halves, cache=tmp_path / "cache", launcher=launcher)
    assert done.returncode == 0, done.stderr
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    assert results[0]["metrics"]["held_out"] == pytest.approx(results[1]["metrics"]["held_out"])
    assert results[0]["data"] == results[1]["data"]
    assert [result["training"]["batch_size"] for result in results] == [4, 4]


def test_strict_stops_at_the_broken_row(tmp_path, pictures):
    """F04: in strict mode a broken picture ends the run and is named."""
    arguments = [recipe(tmp_path), "--source", pictures, "--output_dir", tmp_path / "run", "--strict", "true"]
    stopped = run_forked(TRAIN, *arguments)
    assert stopped.returncode == 1
    assert "broken.jpg" in stopped.stderr.partition("error: ")[2].splitlines()[0]
    assert "Traceback" not in stopped.stderr


def test_missing_source_is_one_sentence(tmp_path):
    stopped = run_forked(TRAIN, recipe(tmp_path), "--source", tmp_path / "nowhere", "--output_dir", tmp_path / "run")
    assert stopped.returncode == 1
    assert stopped.stderr.strip().splitlines()[-1] == f"error: {tmp_path / 'nowhere'} does not exist."
