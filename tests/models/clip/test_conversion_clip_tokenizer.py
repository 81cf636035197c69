"""Tokenizers of published CLIP checkpoints: which one is taken, asked for or refused."""

import hashlib
import json
from dataclasses import replace

import pytest
from contract.cases import CONTEXT, tokenizer
from contract.published import open_clip_json, openai_state
from published_clips import published_folder, tiny_config
from safetensors.torch import save_file

from hf_mm.conversion.checkpoint import Checkpoint, Origin, open_checkpoint
from hf_mm.models.clip.conversion_clip import VOCABULARY, published_tokenizer, read_clip


def test_the_published_vocabulary_is_the_published_file():
    sha256 = hashlib.sha256(VOCABULARY.read_bytes()).hexdigest()
    assert sha256 == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    published = published_tokenizer()
    assert len(published) == 49408
    assert published("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert published("*, *").input_ids == [49406, 41895, 265, 49407]


@pytest.mark.parametrize("files", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_the_vocabulary_beside_the_weights_is_taken(tmp_path, files):
    published_folder(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    if files != ["tokenizer.json"]:
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    _, processor = read_clip(tmp_path)
    text = "A yellow triangle over a red square, 12 times"
    assert processor.tokenizer(text).input_ids == tokenizer()(text).input_ids
    assert processor.tokenizer.model_max_length == CONTEXT


def test_an_unknown_vocabulary_is_asked_for(tmp_path):
    published_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=rf"{len(tokenizer())}.*49408.*--tokenizer"):
        read_clip(tmp_path)
    with pytest.raises(ValueError, match="holds no CLIP vocabulary"):
        read_clip(tmp_path, tokenizer=tmp_path)
    published_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"49408 ids.*49407.*{len(tokenizer())}.*--tokenizer"):
        read_clip(tmp_path, tokenizer=tmp_path / "other")


def test_a_tokenizer_of_another_library_is_not_taken_for_the_published_one():
    config = tiny_config()
    config.text_config.vocab_size, config.text_config.eos_token_id = 49408, 49407
    declared = open_clip_json(config)
    declared["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "google/mt5-base"
    checkpoint = Checkpoint(openai_state(config, "meta"), {"open_clip_config.json": declared}, (Origin("x"),))
    with pytest.raises(ValueError, match="--tokenizer"):
        read_clip(checkpoint)


@pytest.mark.parametrize(
    ("field", "value"), [("hf_tokenizer_name", "google/mt5-base"), ("tokenizer_kwargs", {"clean": "canonicalize"})]
)
def test_another_declared_tokenizer_is_asked_for_though_one_lies_beside(whole_folder, field, value):
    checkpoint = open_checkpoint(whole_folder)
    checkpoint.configs["open_clip_config.json"]["model_cfg"]["text_cfg"][field] = value
    with pytest.raises(ValueError, match=rf"text_cfg\.{field} = .*--tokenizer"):
        read_clip(checkpoint)
    assert read_clip(checkpoint, tokenizer=whole_folder)[1].tokenizer.get_vocab() == tokenizer().get_vocab()


def test_a_tokenizer_that_a_repository_declares_as_its_own_lies_beside(whole_folder):
    checkpoint = open_checkpoint(whole_folder)
    text_cfg = checkpoint.configs["open_clip_config.json"]["model_cfg"]["text_cfg"]
    for origin in (whole_folder.name, "someone/clip"):
        text_cfg["hf_tokenizer_name"] = origin
        processor = read_clip(replace(checkpoint, origins=(Origin(origin),)))[1]
        assert processor.tokenizer.get_vocab() == tokenizer().get_vocab()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"version": "1.0"}',
        '{"model": "x"}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}}}',
        '{"model": {"type": "BPE", "vocab": 3, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}',
        "[" * 100_000,
    ],
    ids=range(9),
)
def test_a_damaged_tokenizer_is_one_sentence(tmp_path, content):
    save_file(openai_state(tiny_config()), tmp_path / "file.safetensors")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]*tokenizer[^\n]*$"):
        read_clip(tmp_path / "file.safetensors", activation="gelu", tokenizer=tmp_path / "tokenizer")
