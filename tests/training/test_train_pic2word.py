"""`training/train_pic2word.py` at a tiny size: once as a user runs it, and then in this process and in forks of it."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel, pipeline

from hf_mm.hub.push import check_folder, files_to_push
from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.models.clip.processing_clip import MMClipProcessor
from hf_mm.models.clip.tokenization_clip import MMClipTokenizer
from hf_mm.models.pic2word.modeling_pic2word import Pic2WordModel
from hf_mm.trainers.contrastive import ContrastiveTrainer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training/train_pic2word.py"
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
FORK = multiprocessing.get_context("fork")
sys.path.insert(0, str(ROOT / "training"))

import train_pic2word  # noqa: E402


def save_clip(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    tokenizer = MMClipTokenizer.train_from_iterator(["a photo of *, red"] * 4, 520, model_max_length=12)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**TOWER, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    vision = {**TOWER, "image_size": 16, "patch_size": 8}
    MMClipModel(MMClipConfig(vision_config=vision, text_config=text, projection_dim=8)).save_pretrained(folder)
    MMClipProcessor(MMClipImageProcessorPil(size=16, crop_size=16), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("base") / "clip")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Sixteen pictures without a word, and one that is cut short."""
    folder = tmp_path_factory.mktemp("mine") / "pictures"
    folder.mkdir()
    for number in range(16):
        pixels = np.random.default_rng(number).integers(40, 200, (24, 20 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    return folder


@pytest.fixture
def recipe(tmp_path, clip, pictures) -> Path:
    sections = {
        "data": {"source": str(pictures), "validation_fraction": 0.3},
        "model": {"model_name_or_path": str(clip), "hidden_dim": 12, "num_hidden_layers": 1},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 6,
            "save_steps": 2,
            "save_total_limit": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "report_to": "none",
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def train(recipe: Path, output_dir: Path, *arguments) -> Path:
    """In this process."""
    return train_pic2word.train([str(recipe), "--output_dir", str(output_dir), *map(str, arguments)])


def mapper_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("mapper.")}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one and one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many pictures CLIP embedded for the store, call by call."""
    calls = []
    vision_features = Pic2WordModel.vision_features

    def counted(self, pixel_values):
        calls.append(len(pixel_values))
        return vision_features(self, pixel_values)

    monkeypatch.setattr(Pic2WordModel, "vision_features", counted)
    return calls


@pytest.fixture
def batches(monkeypatch) -> list[dict]:
    """The inputs of every training step."""
    seen = []
    training_step = ContrastiveTrainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        seen.append(dict(inputs))
        return training_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ContrastiveTrainer, "training_step", watched)
    return seen


def test_own_pictures_are_trained_on_evaluated_and_opened(tmp_path, recipe, clip, pictures, capsys):
    """F04 among others: pictures without captions; a broken one is skipped, counted and named."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 rows were skipped" in done.stdout and "broken.jpg" in done.stdout
    output_dir = tmp_path / "run"
    results = json.loads((output_dir / "results.json").read_text())
    assert results["training"]["steps"] == 6
    assert results["training"]["parameters"] == sum(tensor.numel() for tensor in mapper_of(output_dir).values())
    assert results["data"]["is_local"] == {"source": True, "model_name_or_path": True}
    assert ["broken.jpg" in name for name in results["data"]["skipped"]] == [True]
    held_out = results["metrics"]["held_out"]
    assert results["data"]["pictures"] + held_out["images"] in (16, 17)
    card = (output_dir / "README.md").read_text()
    assert "library_name: transformers" in card and str(tmp_path) not in card
    assert not [file.name for file in output_dir.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    check_folder(output_dir)
    assert (output_dir / "features").is_dir() and not any("features" in name for name in files_to_push(output_dir))

    model, processor = AutoModel.from_pretrained(output_dir), AutoProcessor.from_pretrained(output_dir)
    before = load_file(clip / "model.safetensors")
    assert_equal(before, {name: tensor for name, tensor in model.clip.state_dict().items() if name in before})
    inputs = processor(images=str(pictures / "0.png"), text="a photo of *, red")
    assert model.get_composed_features(**inputs).pooler_output.shape == (1, 8)
    search = pipeline("composed-image-retrieval", model=str(output_dir))
    search.index_pictures([str(pictures / f"{number}.png") for number in range(8)], progress=False)
    assert len(search(str(pictures / "0.png"), "a photo of *, blue", top_k=3)) == 3

    train(recipe, output_dir)
    assert "holds a finished run of this recipe" in capsys.readouterr().out
    with pytest.raises(ValueError, match="prompt = 'a photo of \\*', now it is '\\* again'"):
        train(recipe, output_dir, "--prompt", "* again")


def train_until_killed(*arguments) -> None:
    """Between the checkpoint of the second step and that of the fourth."""
    training_step = ContrastiveTrainer.training_step

    def deadly(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self, *args, **kwargs)

    ContrastiveTrainer.training_step = deadly
    train(*arguments)


@pytest.mark.parametrize("cached", ["true", "false"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path, recipe, cached, encoded, batches):
    straight = train(recipe, tmp_path / "straight", "--cache_features", cached)
    killed = FORK.Process(target=train_until_killed, args=(recipe, tmp_path / "run", "--cache_features", cached))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert not (tmp_path / "run" / "results.json").exists()
    encoded.clear()
    batches.clear()
    assert_equal(mapper_of(train(recipe, tmp_path / "run", "--cache_features", cached)), mapper_of(straight))
    assert len(batches) == 4 and encoded == []


def test_features_are_computed_once_for_all_runs_of_a_clip(tmp_path, recipe, encoded):
    shared = ["--features_dir", tmp_path / "features"]
    first = train(recipe, tmp_path / "first", *shared)
    assert sum(encoded) > 0
    encoded.clear()
    second = train(recipe, tmp_path / "second", "--seed", 7, *shared)
    assert encoded == []
    assert not torch.equal(mapper_of(first)["mapper.fc_out.weight"], mapper_of(second)["mapper.fc_out.weight"])
    other = save_clip(tmp_path / "other", seed=1)
    train(recipe, tmp_path / "second", "--model_name_or_path", other, "--overwrite", "true", *shared)
    assert sum(encoded) > 0
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_each_epoch_sees_the_next_view(tmp_path, recipe, encoded, batches):
    """Augmented embeddings of two views: the third epoch sees those of the first again."""
    view = ["--views", 2, "--brightness", 0.5, "--max_steps", 9, "--validation_fraction", 0]
    train(recipe, tmp_path / "run", *view)
    assert sum(encoded) == 2 * 16 + 1  # and one picture that tells how large they are
    rows = [dict(zip(b["image_ids"].tolist(), b["vision_features"], strict=True)) for b in batches]
    epochs = [{group: row for batch in rows[i : i + 4] for group, row in batch.items()} for i in (0, 4)]
    assert epochs[0].keys() == epochs[1].keys() and len(epochs[0]) == 16
    assert not any(torch.equal(epochs[0][group], epochs[1][group]) for group in epochs[0])
    assert all(torch.equal(row, epochs[0][group]) for group, row in rows[8].items())


def test_cached_and_computed_alike_keep_drawings_of_one_thing_apart(tmp_path, recipe, pictures, batches):
    """The group of a picture is the same either way, and pictures of one group stand together where views are asked."""
    table = tmp_path / "kinds.csv"
    lines = ["file_name,kind", *(f"{pictures}/{number}.png,kind {number % 8}" for number in range(16))]
    table.write_text("\n".join(lines))
    grouped = ["--source", table, "--group_column", "kind", "--views_per_group", 2, "--validation_fraction", 0]
    steps = {}
    for cached in ("true", "false"):
        train(recipe, tmp_path / cached, *grouped, "--cache_features", cached, "--max_steps", 3)
        steps[cached] = [batch["image_ids"].tolist() for batch in batches]
        assert ("vision_features" in batches[0]) == (cached == "true")
        batches.clear()
    assert steps["true"] == steps["false"]
    assert all(len(set(ids)) == 2 and ids[0] == ids[1] and ids[2] == ids[3] for ids in steps["true"])
    assert_close(mapper_of(tmp_path / "true"), mapper_of(tmp_path / "false"))
    table.write_text("\n".join([*lines[:3], f"{pictures}/broken.jpg,kind 0", *lines[3:]]))
    train(recipe, tmp_path / "broken", *grouped, "--max_steps", 3)
    assert all(ids[0] == ids[1] and ids[2] == ids[3] for ids in (batch["image_ids"].tolist() for batch in batches))


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one and one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, other[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def train_on_one_rank(rank: int, port: int, folder: Path, *arguments) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        train(*arguments)
    except Exception:
        (folder / f"{rank}.error").write_text(traceback.format_exc())


def test_two_processes_equal_one(tmp_path, recipe):
    """Plain gradient descent: Adam would blow up the rounding of gradients that are zero in exact arithmetic."""
    plain = ["--optim", "sgd", "--learning_rate", 0.1, "--dropout", 0.0]
    one = train(recipe, tmp_path / "one", *plain)
    halves = (tmp_path, recipe, tmp_path / "two", *plain, "--per_device_train_batch_size", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [FORK.Process(target=train_on_one_rank, args=(rank, port, *halves)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert [path.read_text() for path in tmp_path.glob("*.error")] == []
    assert_close(mapper_of(one), mapper_of(tmp_path / "two"))
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[0]["metrics"]["held_out"] == pytest.approx(results[1]["metrics"]["held_out"])
    assert results[0]["data"] == results[1]["data"]


def test_that_not_all_held_out_pictures_are_evaluated_on_is_said(tmp_path, recipe, monkeypatch, capsys):
    monkeypatch.setattr(train_pic2word, "MAX_HELD_OUT", 2)
    train(recipe, tmp_path / "run", "--max_steps", 1)
    assert re.search(r"Evaluating on the first 2 of \d held-out pictures", capsys.readouterr().out)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metrics"]["held_out"]["images"] == 2


def test_strict_stops_at_the_broken_picture(tmp_path, recipe):
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        train(recipe, tmp_path / "run", "--strict", "true", "--validation_fraction", 0)
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--brightness", 0.2], "of 1 view, .* set views to 2 or more"),
        (["--streaming", "true"], "a stream has no end .* set cache_features to false"),
        (["--views", 0], "views must be at least 1, not 0"),
        (["--prompt", "a photo"], "0 placeholders for 1 pictures"),
        (["--source", "nowhere/at/all"], "nowhere/at/all does not exist"),
        (["--placeholder", "two words"], "must be one token"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_anything_is_computed(tmp_path, recipe, encoded, arguments, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        train(recipe, tmp_path / "run", *arguments)
    assert "\n" not in str(refused.value)
    assert encoded == []


def test_a_base_that_is_no_dual_encoder_is_refused(tmp_path, recipe):
    BertModel(BertConfig(**TOWER, vocab_size=50)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a BertModel, which is no dual encoder") as refused:
        train(recipe, tmp_path / "run", "--model_name_or_path", tmp_path / "bert")
    assert "\n" not in str(refused.value)
