"""The README's Python and commands run as they stand, on tiny models in place of the real ones."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from hub.server import HubServer
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_mm.cli import main
from hf_mm.conversion.engine import export
from hf_mm.models.blip2.initialization_blip2 import learn_wordpiece
from hf_mm.models.blip2.modeling_blip2 import MMBlip2ForConditionalGeneration, MMBlip2ForPreTraining
from hf_mm.models.blip2.processing_blip2 import MMBlip2Processor
from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.conversion_clip import open_clip_config, open_clip_rules
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.models.clip.processing_clip import MMClipProcessor
from hf_mm.models.clip.tokenization_clip import MMClipTokenizer
from hf_mm.models.pic2word.modeling_pic2word import Pic2WordModel
from hf_mm.models.pic2word.processing_pic2word import Pic2WordProcessor

MODEL = "checkpoints/mm-clip-emoji"
LANGUAGE_MODEL = "outputs/smollm2-135m-instruct"
COMPOSED = "outputs/demo-pic2word"
STAGE1, SEEING = "outputs/demo-blip2-stage1", "outputs/demo-blip2"
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
LINES = list(map(shlex.split, re.findall(r"^hf-mm .*", README, flags=re.MULTILINE)))
COMMANDS = {words[1]: words[1:] for words in reversed(LINES)}  # the first of each kind
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the README speaks of: a trained model, a picture, pictures with captions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = MMClipTokenizer.train_from_iterator(["red apple", "green apple"], 540, model_max_length=12)
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = MMClipConfig(
        projection_dim=8,
        vision_config={**TOWER, "image_size": 16, "patch_size": 8},
        text_config={**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 12, **ids},
    )
    MMClipModel(config).save_pretrained(MODEL)
    processor = MMClipProcessor(MMClipImageProcessorPil(size=16), tokenizer)
    processor.save_pretrained(MODEL)
    Pic2WordModel.from_clip_pretrained(MODEL).save_pretrained(COMPOSED)
    Pic2WordProcessor(processor.image_processor, tokenizer).save_pretrained(COMPOSED)
    speak(LANGUAGE_MODEL)
    see(processor.image_processor)
    publish("published")
    assert main(["published" if word == "RN50" else word for word in COMMANDS["convert"]]) == 0
    Image.new("RGB", (24, 20), "red").save("picture.png")
    pictures = tmp_path / "my_pictures"
    pictures.mkdir()
    for number, colour in enumerate(["red", "green", "blue", "white"] * 2):
        Image.new("RGB", (20, 20), colour).save(pictures / f"{number}.png")
    rows = [f"{number}.png,picture {number}" for number in range(8)]
    (pictures / "metadata.csv").write_text("\n".join(["file_name,caption", *rows]))
    return tmp_path


def speak(folder: str) -> None:
    """A tiny language model with a tokenizer of words."""
    words = {word: number for number, word in enumerate(["<s>", "</s>", "a", "red", "square", "picture", "of"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = Whitespace()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape, **ids)).save_pretrained(folder)


def see(image_processor) -> None:
    """Both stages of BLIP-2 on the tiny tower and the tiny language model, untrained."""
    tokenizer = learn_wordpiece(["a face", "a cat", "a car"] * 2, 60)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "bos")}
    shape = {"num_query_tokens": 2, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = {**shape, "intermediate_size": 32, "max_position_embeddings": 40, "vocab_size": len(tokenizer), **ids}
    stage1 = MMBlip2ForPreTraining.from_vision_pretrained(MODEL, joint_dim=8, qformer_config=fields)
    stage1.save_pretrained(STAGE1)
    MMBlip2Processor(image_processor, tokenizer).save_pretrained(STAGE1)
    model = MMBlip2ForConditionalGeneration.from_stage1(stage1, LANGUAGE_MODEL)
    model.save_pretrained(SEEING)
    words = AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    MMBlip2Processor(image_processor, words, num_query_tokens=2).save_pretrained(SEEING)


def publish(folder: str) -> None:
    """A CLIP with a ResNet tower as open_clip publishes it."""
    vision = {"model_type": "mm_clip_resnet", "depths": (1, 1, 1, 1), "width": 8, "num_attention_heads": 4}
    vision |= {"image_size": 32, "projection_dim": 8}
    text = {**TOWER, "hidden_size": 16, "intermediate_size": 64, "hidden_act": "gelu"}
    config = MMClipConfig(vision_config=vision, text_config=text, projection_dim=8)
    Path(folder).mkdir()
    save_file(export(MMClipModel(config), open_clip_rules(resnet=True)), f"{folder}/open_clip_model.safetensors")
    declared = {"model_cfg": open_clip_config(config), "preprocess_cfg": {}}
    Path(folder, "open_clip_config.json").write_text(json.dumps(declared))


def run_block(number: int) -> dict:
    names = {}
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), names)
    return names


def test_what_was_tuned_is_pushed(workplace, monkeypatch):
    """The last of the ladder's commands, after its last block."""
    run_block(next(number for number, block in enumerate(BLOCKS) if "get_peft_model" in block))
    _, folder, repo_id = COMMANDS["push"]
    with HubServer() as server:
        server.attach(monkeypatch)
        assert main(COMMANDS["card"]) == 0
        assert main(COMMANDS["push"]) == 0
        files = server.state(repo_id)["main"][1]
    assert {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json", "README.md"} <= set(files)
    assert "modeling_clip_resnet.py" in files
    card = files["README.md"].decode()
    assert repo_id in card and "RN50" in card and "license: mit" in card
    assert files["model.safetensors"] == Path(folder, "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(workplace, capsys, number):
    names = run_block(number)
    if "trainer" in names:
        assert names["trainer"].state.global_step == 1
    else:
        assert re.search(r"score|tensor|\['", capsys.readouterr().out)


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_every_command_is_one(words, capsys):
    """Its sub-commands and options exist: what follows is what --help knows."""
    names = [word for word in words[1:3] if re.fullmatch("[a-z0-9-]+", word)]
    with pytest.raises(SystemExit) as stopped:
        main([*names[: 1 if words[1] in ("push", "card") else 2], "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert all(option in told for option in words if option.startswith("--"))


def test_figures_come_from_the_results_file():
    sys.path.insert(0, str(ROOT / "training"))
    from summarize_runs import markdown

    summary = json.loads((ROOT / "training/results/clip_emoji.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert markdown(summary) in readme
    threads = [machine["threads"] for machine in summary["machines"]]
    for seed, number in zip(summary["seeds"], threads, strict=True):
        assert f"seed {seed} on {number} thread" in " ".join(readme.split())
    assert f"{summary['steps']:,} steps" in readme


def test_speed_comes_from_the_results_files():
    from benchmarks.summary import table

    assert table() in (ROOT / "README.md").read_text()


def test_commands_exist():
    for script in re.findall(
        r"(?:python|launch) (training/\S+\.py) (training/\S+\.yaml)?", (ROOT / "README.md").read_text()
    ):
        for path in filter(None, script):
            assert (ROOT / path).is_file(), path
