"""`training/train_blip2.py` at a tiny size, from stage to stage: in this process and in forks of it."""

import json
import multiprocessing
import os
import signal
import socket
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
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_mm.hub.push import check_folder
from hf_mm.models.blip2.modeling_blip2 import MMBlip2ForConditionalGeneration
from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.models.clip.processing_clip import MMClipProcessor
from hf_mm.models.clip.tokenization_clip import MMClipTokenizer
from hf_mm.trainers.blip2 import Blip2Trainer, Blip2TrainingArguments

ROOT = Path(__file__).parents[2]
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
QFORMER = {
    "num_query_tokens": 2,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
COLOURS = ("red", "green", "blue", "white")
THINGS = ("square", "circle", "house", "tree")
WORDS = (
    *COLOURS,
    *THINGS,
    "a",
    "of",
    "photo",
    "what",
    "colour",
    ":",
    ".",
    "?",
    "Question",
    "Short",
    "Answer",
    "answer",
)
FORK = multiprocessing.get_context("fork")
sys.path.insert(0, str(ROOT / "training"))

import train_blip2  # noqa: E402


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("blip2")


@pytest.fixture(scope="module")
def clip(root) -> Path:
    torch.manual_seed(0)
    tokenizer = MMClipTokenizer.train_from_iterator(["a photo"] * 4, 520, model_max_length=12)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**TOWER, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    vision = {**TOWER, "image_size": 16, "patch_size": 8}
    model = MMClipModel(MMClipConfig(vision_config=vision, text_config=text, projection_dim=8))
    model.save_pretrained(root / "clip")
    MMClipProcessor(MMClipImageProcessorPil(size=16, crop_size=16), tokenizer).save_pretrained(root / "clip")
    return root / "clip"


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<s>", "</s>", "<pad>", "<unk>", *WORDS]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module")
def llama(root) -> Path:
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    config = LlamaConfig(**TOWER, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=2)
    LlamaForCausalLM(config).save_pretrained(root / "llama")
    tokenizer.save_pretrained(root / "llama")
    return root / "llama"


@pytest.fixture(scope="module")
def t5(root) -> Path:
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        eos_token_id=1,
        pad_token_id=2,
        decoder_start_token_id=2,
    )
    T5ForConditionalGeneration(config).save_pretrained(root / "t5")
    tokenizer.save_pretrained(root / "t5")
    return root / "t5"


@pytest.fixture(scope="module")
def pictures(root) -> Path:
    """Sixteen pictures with a caption, a question and answers each, and one that is cut short."""
    folder = root / "pictures"
    folder.mkdir()
    rows = []
    for number in range(16):
        pixels = np.random.default_rng(number).integers(40, 200, (24, 20 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        colour, thing = COLOURS[number % 4], THINGS[number // 4]
        rows.append(
            {
                "file_name": f"{number}.png",
                "caption": f"A {colour} {thing}.",
                "question": f"What colour, {thing}?",
                "answers": [colour] * 3,
            }
        )
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    rows.append({**rows[0], "file_name": "broken.jpg"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def recipe(root, clip, pictures) -> Path:
    sections = {
        "data": {"source": str(pictures), "caption_column": "caption", "validation_fraction": 0.3},
        "evaluation": {"rerank_candidates": 3, "num_beams": 1, "max_new_tokens": 4},
        "training": {
            "max_steps": 6,
            "save_steps": 2,
            "save_total_limit": 1,
            "logging_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "report_to": "none",
        },
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def train(recipe: Path, output_dir: Path, *arguments) -> Path:
    """In this process."""
    return train_blip2.train([str(recipe), "--output_dir", str(output_dir), *map(str, arguments)])


def new_stage1(clip: Path) -> list:
    config = json.dumps(QFORMER)
    return ["--stage", "stage1", "--vision_tower", clip, "--qformer_config", config, "--vocab_size", 120]


@pytest.fixture(scope="module")
def stage1(root, recipe, clip) -> Path:
    return train(recipe, root / "stage1", *new_stage1(clip))


@pytest.fixture(scope="module")
def words(root, recipe, stage1, llama) -> Path:
    before = ["--model_name_or_path", stage1, "--language_model", llama, "--bos_first", "true", "--end", "."]
    return train(recipe, root / "words", "--stage", "words", *before, "--prompt", ":")


@pytest.fixture(scope="module")
def stage2(root, recipe, words) -> Path:
    return train(recipe, root / "stage2", "--stage", "stage2", "--model_name_or_path", words)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def tensors_of(folder: Path, *prefixes: str) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes or "")}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one and one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


@pytest.fixture
def batches(monkeypatch) -> list[dict]:
    """The inputs of every training step."""
    seen = []
    training_step = Blip2Trainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        seen.append(dict(inputs))
        return training_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Blip2Trainer, "training_step", watched)
    return seen


def test_stage1_is_trained_evaluated_and_opened(stage1, clip, pictures):
    results = results_of(stage1)
    assert results["training"]["steps"] == 6
    assert ["broken.jpg" in name for name in results["data"]["skipped"]] == [True]
    held_out = results["metrics"]["retrieval"]["held_out"]
    assert {"i2t_r1", "t2i_r1", "itc_i2t_r1", "chance_i2t_r1"} <= held_out.keys() and held_out["reranked"] == 3
    log = [entry for entry in json.loads((stage1 / "log_history.json").read_text()) if "loss" in entry]
    parts = {"loss_itc", "loss_itm", "loss_itg", "accuracy_itm_drawn_text", "accuracy_itg_token", "temperature"}
    assert all(parts <= entry.keys() for entry in log) and len(log) == 3
    assert log[0]["loss"] == pytest.approx(
        sum(log[0][name] for name in ("loss_itc", "loss_itm", "loss_itg")), abs=1e-3
    )
    assert log[-1]["temperature"] != log[0]["temperature"]
    check_folder(stage1)
    assert "matching" in (stage1 / "README.md").read_text()

    model, processor = AutoModelForPreTraining.from_pretrained(stage1), AutoProcessor.from_pretrained(stage1)
    tower = {name.removeprefix("vision_model."): t for name, t in tensors_of(clip, "vision_model.").items()}
    assert_equal(tower, dict(model.vision_tower.state_dict()))
    ids = processor(text="A red square!")["input_ids"][0].tolist()
    words = processor.tokenizer.convert_ids_to_tokens(ids)
    assert words == ["[CLS]", "a", "red", "square", "[SEP]"]
    assert model.config.qformer_config.bos_token_id == processor.tokenizer.convert_tokens_to_ids("[DEC]")
    assert (stage1 / "checkpoint-6" / "processor_config.json").is_file()  # F07: a checkpoint prepares its own inputs
    assert AutoProcessor.from_pretrained(stage1 / "checkpoint-6")(text="a")["input_ids"].shape == (1, 3)


def test_words_are_learnt_where_stage2_begins(words, stage1, llama):
    """The warm-up moves the Q-Former and the projection, and neither the language model nor the tower."""
    assert results_of(words)["metrics"]["words"]["held_out"].keys() == {
        *("captions", "loss", "accuracy", "other_loss", "other_accuracy")
    }
    own = tensors_of(words)
    assert "logit_scale" not in own
    assert_equal(tensors_of(stage1, "vision_tower."), tensors_of(words, "vision_tower."))
    given = {f"language_model.{name}": tensor for name, tensor in load_file(llama / "model.safetensors").items()}
    assert_equal(given, tensors_of(words, "language_model."))
    before = tensors_of(stage1, "qformer.")
    assert not torch.equal(before["qformer.embeddings.query_tokens"], own["qformer.embeddings.query_tokens"])
    assert "logit_scale" in load_file(words / "checkpoint-6" / "model.safetensors")


def test_stage2_learns_captions_and_writes_them(stage2, words, pictures, batches, recipe, tmp_path):
    """Layout [start][slots][prompt][caption][end], of which the caption and its end are learnt."""
    metrics = results_of(stage2)["metrics"]
    assert {"nll", "gap", "win_rate"} <= metrics["picture_gap"]["held_out"].keys()
    captions = metrics["captions"]["held_out"]
    assert {"cider", "bleu4", "word_f1", "shuffled_word_f1", "constant_word_f1", "examples"} <= captions.keys()
    assert_equal(tensors_of(words, "language_model."), tensors_of(stage2, "language_model."))
    assert "caption" in (stage2 / "README.md").read_text()
    check_folder(stage2)

    model = AutoModelForImageTextToText.from_pretrained(stage2).eval()
    processor = AutoProcessor.from_pretrained(stage2)
    assert processor.prompt == ":" and processor.eos == "."
    ends = model.generation_config.eos_token_id
    assert processor.eos_token_id in (ends if isinstance(ends, list) else [ends])
    inputs = processor(images=str(pictures / "0.png"))
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert isinstance(processor.decode(ids[0], input_ids=inputs["input_ids"]), str)

    train(recipe, tmp_path / "run", "--stage", "stage2", "--model_name_or_path", words, "--max_steps", 1)
    (batch,) = batches
    word = processor.tokenizer.convert_tokens_to_ids
    slot = processor.image_token_id
    begin = [word("<s>"), slot, slot, word(":"), word("a")]
    assert (batch["input_ids"][:, :5] == torch.tensor(begin)).all()
    assert (batch["labels"][:, :4] == -100).all() and (batch["labels"][:, 4:] == batch["input_ids"][:, 4:]).all()
    assert (batch["labels"][:, -1] == word(".")).all()
    assert "vision_features" in batch and "pixel_values" not in batch


def train_until_killed(*arguments) -> None:
    """Between the checkpoint of the second step and that of the fourth."""
    training_step = Blip2Trainer.training_step

    def deadly(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self, *args, **kwargs)

    Blip2Trainer.training_step = deadly
    train(*arguments)


@pytest.mark.parametrize("stage", ["stage1", "words", "stage2", "captioning"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
    tmp_path, recipe, clip, stage1, llama, stage2, stage, batches
):
    """With the dropout of the Q-Former and the draw of hard negatives; of captioning with live pictures and the tower, whose
    blocks learn at rates of their own."""
    before = ["--stage", stage, "--model_name_or_path", stage2 if stage == "captioning" else stage1]
    arguments = {
        "stage1": new_stage1(clip),
        "words": [*before, "--language_model", llama],
        "stage2": [*before, "--language_model", llama],
        "captioning": [*before, "--cache_features", "false", "--freeze_vision", "false", "--brightness", 0.3]
        + ["--layer_decay", 0.5],
    }[stage]
    straight = train(recipe, tmp_path / "straight", *arguments)
    killed = FORK.Process(target=train_until_killed, args=(recipe, tmp_path / "run", *arguments))
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    assert (tmp_path / "run" / "checkpoint-2").is_dir() and not (tmp_path / "run" / "results.json").exists()
    batches.clear()
    assert_equal(tensors_of(train(recipe, tmp_path / "run", *arguments)), tensors_of(straight))
    assert len(batches) == 4
    metrics = [results_of(tmp_path / name)["metrics"] for name in ("run", "straight")]
    assert metrics[0] == metrics[1]


def train_on_one_rank(rank: int, port: int, folder: Path, *arguments) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        train(*arguments)
    except Exception:
        (folder / f"{rank}.error").write_text(traceback.format_exc())


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_two_processes_equal_one(tmp_path, recipe, clip, root, llama, stage):
    """The draw of hard negatives too, and captions of unequal length, all of whose tokens weigh alike.

    Plain gradient descent: Adam would blow up the rounding of gradients that are zero in exact arithmetic.
    """
    config = json.dumps({**QFORMER, "dropout": 0.0, "attention_dropout": 0.0})
    start = [*new_stage1(clip), "--qformer_config", config]
    if stage == "stage2":
        if not (root / "plain").is_dir():
            train(recipe, root / "plain", *start, "--max_steps", 1)
        start = ["--stage", "stage2", "--model_name_or_path", root / "plain", "--language_model", llama]
    plain = [*start, "--optim", "sgd", "--learning_rate", 0.05]
    one = train(recipe, tmp_path / "one", *plain)
    halves = (tmp_path, recipe, tmp_path / "two", *plain, "--per_device_train_batch_size", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [FORK.Process(target=train_on_one_rank, args=(rank, port, *halves)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert [path.read_text() for path in tmp_path.glob("*.error")] == []
    single, double = tensors_of(one), tensors_of(tmp_path / "two")
    for name, tensor in single.items():
        torch.testing.assert_close(
            double[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    before = tensors_of(root / "plain" if stage == "stage2" else clip)
    moved = "qformer.embeddings.query_tokens"
    assert moved not in before or not torch.equal(before[moved], single[moved])


def test_cached_features_and_live_pictures_train_alike(tmp_path, recipe, stage1, llama):
    """Views as they are, and the same words for each draw; the broken picture is held out of both."""
    arguments = ["--stage", "stage2", "--model_name_or_path", stage1, "--language_model", llama, "--max_steps", 3]
    arguments += ["--split", "train", "--source", recipe.parent / "whole.jsonl"]
    lines = (recipe.parent / "pictures" / "metadata.jsonl").read_text().splitlines()[:16]
    whole = [json.loads(line) for line in lines]
    rows = [{**row, "file_name": f"pictures/{row['file_name']}"} for row in whole]
    (recipe.parent / "whole.jsonl").write_text("\n".join(map(json.dumps, rows)))
    runs = [train(recipe, tmp_path / cached, *arguments, "--cache_features", cached) for cached in ("true", "false")]
    one, other = (tensors_of(run, "qformer.", "language_projection.", "vision_norm.") for run in runs)
    moved = [name for name in one if not name.endswith("k_proj.bias")]  # softmax takes it out: its gradient is noise
    for name in moved:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)


def test_one_held_out_picture_does_not_cost_the_run(tmp_path, recipe, stage1, llama, capsys):
    """It has no other to be shown: the model is kept with its card, and why nothing was evaluated is said."""
    arguments = ["--stage", "stage2", "--model_name_or_path", stage1, "--language_model", llama, "--max_steps", 1]
    trained = train(recipe, tmp_path / "run", *arguments, "--validation_fraction", 0.12, "--end", "")
    assert AutoProcessor.from_pretrained(trained).eos is None
    assert "Nothing is evaluated: 1 of 1 rows are of one group" in capsys.readouterr().out
    assert results_of(trained)["metrics"] == {"picture_gap": {}, "captions": {}} and (trained / "README.md").exists()


def test_an_unfrozen_tower_learns_at_decayed_rates(tmp_path, recipe, stage1, monkeypatch):
    """The groups of a run, after Trainer's schedule has set their rates: lr * decay ^ (L + 1 - l)."""
    rates = {}
    training_step = Blip2Trainer.training_step

    def watched(self, *args, **kwargs):
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            rates.update({names[id(parameter)]: group["lr"] for parameter in group["params"]})
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Blip2Trainer, "training_step", watched)
    arguments = ["--stage", "retrieval", "--model_name_or_path", stage1, "--freeze_vision", "false"]
    arguments += [
        "--cache_features",
        "false",
        "--layer_decay",
        0.5,
        "--max_steps",
        2,
        "--lr_scheduler_type",
        "constant",
    ]
    trained = train(recipe, tmp_path / "run", *arguments)
    rate_of = lambda part: {rate for name, rate in rates.items() if part in name}  # noqa: E731
    assert rate_of("vision_tower.embeddings.") == {1e-3 * 0.5**3}
    assert rate_of("vision_tower.encoder.layers.0.") == {1e-3 * 0.5**2}
    assert rate_of("vision_tower.encoder.layers.1.") == {1e-3 * 0.5}
    assert rate_of("qformer.") == {1e-3} and rate_of("temperature") == {1e-3}
    tower, before = (tensors_of(folder, "vision_tower.") for folder in (trained, stage1))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in tower.items())


def test_a_blind_run_never_sees(tmp_path, recipe, stage1, llama, batches):
    arguments = ["--stage", "stage2", "--model_name_or_path", stage1, "--language_model", llama, "--blind", "true"]
    blind = train(recipe, tmp_path / "blind", *arguments)
    assert all(not batch["vision_features"].any() for batch in batches) and len(batches) == 6
    gap = results_of(blind)["metrics"]["picture_gap"]["held_out"]
    assert gap["gap"] == 0 and gap["win_rate"] == 0


def test_answers_are_learnt_with_questions_in_the_qformer(tmp_path, recipe, stage1, stage2, batches):
    """Section 3.4: the question stands in the prompt, and enters the Q-Former through the text half of stage 1."""
    arguments = ["--stage", "vqa", "--model_name_or_path", stage2, "--question_text", stage1, "--end", "</s>"]
    arguments += ["--caption_column", "answers", "--length_penalty", -1, "--max_steps", 1]
    answered = train(recipe, tmp_path / "vqa", *arguments)
    result = results_of(answered)["metrics"]["answers"]["held_out"]
    assert {"accuracy", "majority", "shuffled_accuracy", "examples"} <= result.keys()
    (batch,) = batches
    processor = AutoProcessor.from_pretrained(answered)
    asked = processor.qformer_tokenizer.decode(batch["qformer_input_ids"][0], skip_special_tokens=True)
    assert asked.startswith("what colour ")
    labels = [row[row != -100].tolist() for row in batch["labels"]]
    end = processor.tokenizer.convert_tokens_to_ids("</s>")
    colours = processor.tokenizer.convert_tokens_to_ids(list(COLOURS))
    assert all(len(row) == 2 and row[0] in colours and row[1] == end for row in labels)
    before, after = (tensors_of(folder) for folder in (stage1, answered))
    moved = "qformer.layers.0.text_mlp.fc1.weight"
    torch.testing.assert_close(after[moved], before[moved], atol=2e-3, rtol=0)
    generation = json.loads((answered / "generation_config.json").read_text())
    assert generation["pad_token_id"] == processor.tokenizer.pad_token_id and generation["eos_token_id"] == end
    # Killed while it was evaluated, with the model and the folder of its second tokenizer in place, it goes on.
    (answered / "results.json").unlink()
    assert results_of(train(recipe, tmp_path / "vqa", *arguments))["metrics"]["answers"]["held_out"] == result


def test_questions_of_another_qformer_are_refused(stage1, stage2):
    model, _ = train_blip2.open_blip2(MMBlip2ForConditionalGeneration, stage2)
    model.config.qformer_config.intermediate_size += 8
    with pytest.raises(ValueError, match="the Q-Former of .* has intermediate_size = .*, that of the model"):
        train_blip2.read_questions(model, str(stage1))


def test_questions_enter_a_model_that_keeps_its_own_settings(tmp_path, stage1, stage2):
    """Of stage 1 come the words alone; at another size too the model is opened again."""
    model, processor = train_blip2.open_blip2(MMBlip2ForConditionalGeneration, stage2)
    model.config.image_token_id = processor.image_token_id = 60
    model.config.vision_norm_eps, model.config.vision_class_token = 1e-3, False
    model.config.qformer_config.update({"vocab_size": 99, "dropout": 0.3})
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path / "before")
    processor.save_pretrained(tmp_path / "before")
    args = train_blip2.ModelArguments(
        "vqa", str(tmp_path / "before"), question_text=str(stage1), image_size=32, freeze_vision=False
    )
    built, processor = train_blip2.build(args, None)
    built.save_pretrained(tmp_path / "after")
    again = MMBlip2ForConditionalGeneration.from_pretrained(tmp_path / "after")
    assert_equal(dict(built.state_dict()), dict(again.state_dict()))
    config, words = again.config, AutoModelForPreTraining.from_pretrained(stage1).config.qformer_config
    assert config.image_token_id == processor.image_token_id == 60
    assert (config.vision_norm_eps, config.vision_class_token) == (again.vision_norm.eps, False) == (1e-3, False)
    assert config.vision_config.image_size == 32 and config.base_models == model.config.base_models
    assert config.qformer_config.use_text and config.qformer_config.vocab_size == words.vocab_size
    assert config.qformer_config.dropout == 0.3 and again.generation_config.max_new_tokens == 3
    asked = processor(text="what colour?", num_images=1, mode="vqa")
    features = torch.randn(1, 16, 16)
    torch.testing.assert_close(
        again(**asked, vision_features=features).logits, built(**asked, vision_features=features).logits
    )


def test_an_encoder_decoder_learns_to_go_on_from_a_prefix(tmp_path, recipe, stage1, t5, batches):
    arguments = ["--stage", "stage2", "--model_name_or_path", stage1, "--language_model", t5, "--max_steps", 2]
    train(recipe, tmp_path / "t5", *arguments)
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "t5").tokenizer
    for batch in batches:
        prefixes = tokenizer.batch_decode(batch["input_ids"].clamp(min=2), skip_special_tokens=True)
        assert prefixes == ["a"] * 4  # of "a red square", one word of three
        suffixes = tokenizer.batch_decode(batch["labels"].clamp(min=2), skip_special_tokens=True)
        assert all(len(suffix.split()) == 2 and suffix.split()[0] in COLOURS for suffix in suffixes)


def test_a_run_at_another_size_resizes_the_tower_once(tmp_path, recipe, stage1, pictures, batches):
    arguments = ["--stage", "retrieval", "--model_name_or_path", stage1, "--image_size", 32, "--max_steps", 1]
    larger = train(recipe, tmp_path / "run", *arguments, "--cache_features", "false", "--freeze_vision", "false")
    assert batches[0]["pixel_values"].shape[-2:] == (32, 32)
    table = "vision_tower.embeddings.position_embedding.weight"
    before, after = tensors_of(stage1)[table], tensors_of(larger)[table]
    assert (before.shape, after.shape) == ((5, 16), (17, 16))
    model, processor = AutoModelForPreTraining.from_pretrained(larger), AutoProcessor.from_pretrained(larger)
    pixels = processor(images=str(pictures / "0.png"))["pixel_values"]
    assert model.vision_features(pixels).shape == (1, 17, 16)


def written(folder: Path, pictures: Path, changes: dict[int, dict], name: str = "train") -> Path:
    """A folder with a table of twelve of the pictures, some rows of which are changed."""
    lines = (pictures / "metadata.jsonl").read_text().splitlines()[:12]
    rows = [json.loads(line) for line in lines]
    rows = [
        {**row, "file_name": str(pictures / row["file_name"]), "image_id": f"{name} {number}"}
        for number, row in enumerate(rows)
    ]
    for number, change in changes.items():
        rows[number] |= change
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


STREAM = ["--streaming", "true", "--cache_features", "false"]


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        ("stage2", ["--cache_features", "true"]),
        ("stage2", ["--cache_features", "false"]),
        ("stage2", STREAM),
        ("words", STREAM),
    ],
    ids=["cached", "live", "stream", "stream of the word warm-up"],
)
def test_a_caption_without_a_word_is_left_out_and_told(tmp_path, recipe, stage1, llama, pictures, stage, how):
    changes = {5: {"caption": "... !"}, 6: {"caption": "an <image> tag"}, 7: {"caption": None}}
    source = written(tmp_path / "mine", pictures, changes)
    arguments = ["--stage", stage, "--model_name_or_path", stage1, "--language_model", llama, "--max_steps", 4]
    arguments += ["--source", source, "--validation_fraction", 0, "--logging_steps", 4, "--save_steps", 4, *how]
    data = results_of(train(recipe, tmp_path / "run", *arguments))["data"]
    assert data["skipped"] == {
        "train 5": "a caption of it has no word",
        "train 6": "a text of it holds <image>, which stands for a picture",
        "train 7": "it has no caption",
    }
    assert data["pictures"] == (0 if how is STREAM else 9)


def test_a_held_out_caption_without_a_word_does_not_cost_the_run(tmp_path, recipe, stage1, llama, pictures):
    source = written(tmp_path / "mine", pictures, {})
    written(source, pictures, {5: {"caption": "... !"}}, "validation")
    arguments = ["--stage", "stage2", "--model_name_or_path", stage1, "--language_model", llama, "--max_steps", 1]
    arguments += ["--source", source, "--validation_split", "validation"]
    results = results_of(train(recipe, tmp_path / "run", *arguments))
    assert results["data"]["skipped"] == {"validation 5": "a caption of it has no word"}
    assert len(results["metrics"]["captions"]["held_out"]["examples"]) == 11
    with pytest.raises(ValueError, match="^validation 5: a caption of it has no word$"):
        train(recipe, tmp_path / "strict", *arguments, "--strict", "true")


@pytest.mark.parametrize("how", [[], STREAM], ids=["cached", "stream"])
def test_a_row_without_a_question_or_an_answer_is_left_out_and_told(tmp_path, recipe, stage2, pictures, batches, how):
    """Not trained on as the text "None"."""
    changes = {
        2: {"question": "... !"},
        3: {"question": None},
        4: {"question": " "},
        6: {"answers": [None, " "]},
        7: {"answers": None},
    }
    reasons = {
        **dict.fromkeys((2, 3, 4), "its question has no word"),
        **dict.fromkeys((6, 7), "it has no caption"),
    }
    source = written(tmp_path / "mine", pictures, changes)
    written(source, pictures, changes, "validation")
    arguments = ["--stage", "vqa", "--model_name_or_path", stage2, "--caption_column", "answers"]
    arguments += ["--source", source, "--validation_split", "validation", "--max_steps", 3, *how]
    results = results_of(train(recipe, tmp_path / "run", *arguments))
    names = ("train", "validation")
    assert results["data"]["skipped"] == {f"{name} {row}": why for name in names for row, why in reasons.items()}
    examples = results["metrics"]["answers"]["held_out"]["examples"]
    assert len(examples) == 7 and all(example["question"].startswith("What colour") for example in examples)
    tokenizer = AutoProcessor.from_pretrained(stage2).tokenizer
    colour = tokenizer.convert_tokens_to_ids("colour")
    assert len(batches) == 3 and all((batch["input_ids"] == colour).any(dim=1).all() for batch in batches)


def test_a_missing_caption_does_not_cost_other_runs_the_picture(tmp_path, recipe, stage1, pictures):
    """Whose features they share."""
    arguments = ["--stage", "retrieval", "--model_name_or_path", stage1, "--validation_fraction", 0, "--max_steps", 1]
    arguments += ["--features_dir", tmp_path / "features"]
    for name, changes in (("some", {7: {"caption": None}}), ("all", {})):
        source = written(tmp_path / name, pictures, changes)
        data = results_of(train(recipe, tmp_path / f"run {name}", *arguments, "--source", source))["data"]
        assert data["skipped"] == ({"train 7": "it has no caption"} if changes else {})
        assert data["pictures"] == 12 - len(changes)


def test_captions_none_of_which_has_a_word_are_refused(tmp_path, recipe, stage1, llama, pictures):
    source = written(tmp_path / "mine", pictures, {row: {"caption": "..."} for row in range(12)})
    arguments = ["--stage", "words", "--model_name_or_path", stage1, "--language_model", llama, "--source", source]
    with pytest.raises(ValueError, match="None of the 12 rows can be trained on; the first: train 0: a caption of it"):
        train(recipe, tmp_path / "run", *arguments, "--validation_fraction", 0)


def test_a_question_is_missing_where_a_table_has_nothing():
    fault = train_blip2.text_fault
    assert fault("question", ["red"], {"question": float("nan")}) == "its question has no word"
    assert fault("question", ["..."], {"question": 7}) is None
    with pytest.raises(ValueError, match="no column 'question', only image: set question_column"):
        fault("question", ["red"], {"image": "a.png"})


@pytest.mark.parametrize("name", sorted(file.name for file in (ROOT / "training/recipes").glob("blip2_*.yaml")))
def test_recipes_say_what_can_be(name):
    flags = ["--use_cpu", "true", "--fp16", "false", "--bf16", "false"]
    parsed = train_blip2.parse_recipe(train_blip2.ARGUMENTS, [str(ROOT / "training/recipes" / name), *flags])
    model_args, data_args, _, feature_args, augment_args, _, args = parsed
    train_blip2.check(model_args, data_args, feature_args, augment_args, args)
    assert args.output_dir == f"outputs/{name.removesuffix('.yaml')}"
    assert (model_args.vision_tower is None) == (model_args.stage != "stage1")
    assert (data_args.source == "emoji") == ("emoji" in name or "smoke" in name)
    sizes = {"captioning": 364, "retrieval": 364, "vqa": 490}  # Li et al. 2023, tables 8 to 10
    assert model_args.image_size == sizes.get(model_args.stage)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--stage", "stage3"], "stage must be one of stage1, retrieval, .*, not 'stage3'"),
        (["--stage", "stage1"], "stage1 starts from something: set vision_tower or model_name_or_path"),
        (["--stage", "vqa"], "vqa starts from something: set model_name_or_path"),
        (["--vision_tower", "clip", "--blind", "true"], "stage1 compares pictures, .* leave it out"),
        (["--vision_tower", "clip", "--freeze_vision", "false"], "set cache_features to false"),
        (["--vision_tower", "clip", "--brightness", 0.2], "of 1 view, .* set views to 2 or more"),
        (["--vision_tower", "clip", "--streaming", "true"], "a stream has no end .* set cache_features to false"),
        (
            ["--vision_tower", "clip", "--streaming", "true", "--train_sampling_strategy", "group_by_length"],
            "a stream is read in its own order: leave train_sampling_strategy out",
        ),
        (["--vision_tower", "clip", "--layer_decay", 0], "layer_decay must be above 0"),
        (["--vision_tower", "clip", "--frozen_dtype", "int8"], "frozen_dtype must be float32"),
        (["--vision_tower", "clip", "--label_smoothing_factor", 0.1], "label_smoothing_factor is not followed"),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_anything_is_computed(tmp_path, recipe, arguments, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        train(recipe, tmp_path / "run", *arguments)
    assert "\n" not in str(refused.value)


def test_several_gpus_of_one_process_are_refused_before_anything_is_computed(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(Blip2TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="on 2 GPUs: start one for each with torchrun or accelerate launch"):
        train(recipe, tmp_path / "run", *new_stage1("clip"))


def test_a_stage1_needs_a_language_model_and_a_stage2_has_one(tmp_path, recipe, clip, stage1, stage2, llama):
    with pytest.raises(ValueError, match="is a mm_clip: stage2 goes on from a stage of BLIP-2, such as stage1"):
        train(recipe, tmp_path / "none", "--stage", "stage2", "--model_name_or_path", clip)
    with pytest.raises(ValueError, match="is a stage 1, which has no language model: set language_model"):
        train(recipe, tmp_path / "one", "--stage", "stage2", "--model_name_or_path", stage1)
    assert not (tmp_path / "one").exists()  # which the command put right may take
    arguments = ["--stage", "stage2", "--model_name_or_path", stage2, "--language_model", llama]
    with pytest.raises(ValueError, match="has a language model: leave language_model out"):
        train(recipe, tmp_path / "two", *arguments)
