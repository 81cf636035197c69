"""The trained part alone: saved without the frozen one, opened over the right one and over no other."""

import copy
import json
import os

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from hf_mm.composite import modeling_composite
from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.models.pic2word.modeling_pic2word import Pic2WordModel

STAR = 5
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURE = {**SMALL, "image_size": 16, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 49}
IDS = torch.tensor([[48, 1, STAR, 49]] * 2)
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def clip(seed: int = 0, **fields) -> MMClipModel:
    torch.manual_seed(seed)
    return MMClipModel(
        MMClipConfig(**{"vision_config": PICTURE, "text_config": TEXT, "projection_dim": 24, **fields})
    ).eval()


@pytest.fixture
def base(tmp_path):
    """A folder in a folder, whose path looks like a Hub id."""
    clip().save_pretrained(tmp_path / "model" / "folder")
    return tmp_path / "model" / "folder"


def pic2word(base) -> Pic2WordModel:
    torch.manual_seed(1)
    return Pic2WordModel.from_clip_pretrained(str(base), placeholder_token_id=STAR, hidden_dim=20)


def same(one, other) -> bool:
    return torch.equal(one(IDS, PIXELS).composed_embeds, other(IDS, PIXELS).composed_embeds)


def test_only_what_trains_is_saved_and_it_opens_the_same(base, tmp_path):
    model = pic2word(base)
    model.save_trained_part(tmp_path / "part")
    assert {path.name for path in (tmp_path / "part").iterdir()} == {
        "config.json",
        "base_models.json",
        "trained_part.safetensors",
    }
    saved = load_file(tmp_path / "part" / "trained_part.safetensors")
    assert saved.keys() == {f"mapper.{name}" for name in model.mapper.state_dict()}
    reopened = Pic2WordModel.from_trained_part(str(tmp_path / "part"))
    assert same(reopened, model)
    assert all(torch.equal(tensor, reopened.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not reopened.training
    assert {name for name, p in reopened.named_parameters() if p.requires_grad} == set(saved)
    reopened.save_trained_part(tmp_path / "again")
    assert load_file(tmp_path / "again" / "trained_part.safetensors").keys() == saved.keys()


def test_what_it_stands_on_is_named(base, tmp_path):
    pic2word(base).save_trained_part(tmp_path / "part")
    (entry,) = json.loads((tmp_path / "part" / "base_models.json").read_text()).items()
    assert entry[0] == "clip"
    assert entry[1]["name"] == str(base)
    assert entry[1]["revision"] is None and entry[1]["dtype"] == "float32"


def test_a_relative_folder_that_looks_like_a_hub_id(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Pic2WordModel.from_clip_pretrained("model/folder", placeholder_token_id=STAR, hidden_dim=20)
    model.save_trained_part("part")
    assert same(Pic2WordModel.from_trained_part("part"), model)


def test_the_base_given_as_a_folder_or_a_model(base, tmp_path):
    model = pic2word(base)
    model.save_trained_part(tmp_path / "part")
    moved = base.rename(tmp_path / "moved")
    given = MMClipModel.from_pretrained(moved)
    for part in (str(moved), given, moved):
        reopened = Pic2WordModel.from_trained_part(str(tmp_path / "part"), clip=part)
        assert same(reopened, model)
    assert reopened.clip is not given
    assert Pic2WordModel.from_trained_part(tmp_path / "part", clip=given).clip is given


def test_a_base_that_is_gone_is_asked_for(base, tmp_path):
    pic2word(base).save_trained_part(tmp_path / "part")
    base.rename(tmp_path / "moved")
    with pytest.raises((ValueError, OSError), match="clip="):
        Pic2WordModel.from_trained_part(str(tmp_path / "part"))


def test_a_base_that_was_never_saved_is_asked_for(tmp_path):
    model = Pic2WordModel.from_clip_pretrained(clip(), placeholder_token_id=STAR, hidden_dim=20)
    model.save_trained_part(tmp_path / "part")
    with pytest.raises(ValueError, match="clip="):
        Pic2WordModel.from_trained_part(str(tmp_path / "part"))
    assert same(Pic2WordModel.from_trained_part(str(tmp_path / "part"), clip=clip()), model)


@pytest.mark.parametrize("kind", ["model", "folder", "changed in place"])
def test_another_base_is_refused_in_one_sentence(kind, base, tmp_path):
    pic2word(base).save_trained_part(tmp_path / "part")
    other = clip(seed=7)
    given = {"clip": other}
    if kind == "folder":
        other.save_pretrained(tmp_path / "other")
        given = {"clip": str(tmp_path / "other")}
    elif kind == "changed in place":
        other.save_pretrained(base)
        given = {}
    with pytest.raises(ValueError, match="clip=") as refused:
        Pic2WordModel.from_trained_part(str(tmp_path / "part"), **given)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_the_base_in_another_dtype_is_told_from_another_base(base, tmp_path):
    model = pic2word(base)
    model.save_trained_part(tmp_path / "part")
    half = MMClipModel.from_pretrained(base, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError,
        match=r"its clip in float32, but the model given is in bfloat16: open that with dtype=torch\.float32",
    ):
        Pic2WordModel.from_trained_part(str(tmp_path / "part"), clip=half)
    right = MMClipModel.from_pretrained(base, dtype=torch.float32)
    assert same(Pic2WordModel.from_trained_part(str(tmp_path / "part"), clip=right), model)


def test_one_bit_of_a_buffer_or_weight_makes_another_base(base, tmp_path):
    pic2word(base).save_trained_part(tmp_path / "part")
    other = MMClipModel.from_pretrained(base)
    with torch.no_grad():
        other.logit_scale.copy_(torch.nextafter(other.logit_scale, torch.tensor([9.0])))
    with pytest.raises(ValueError, match="clip"):
        Pic2WordModel.from_trained_part(str(tmp_path / "part"), clip=other)


def test_a_part_that_the_model_has_not_is_refused(base, tmp_path):
    pic2word(base).save_trained_part(tmp_path / "part")
    with pytest.raises((TypeError, ValueError), match="klip"):
        Pic2WordModel.from_trained_part(str(tmp_path / "part"), klip=str(base))


@pytest.mark.parametrize("missing", ["config.json", "base_models.json", "trained_part.safetensors"])
def test_a_missing_file_is_named(missing, base, tmp_path):
    pic2word(base).save_trained_part(tmp_path / "part")
    (tmp_path / "part" / missing).unlink()
    with pytest.raises(OSError, match=missing.replace(".", r"\.")):
        Pic2WordModel.from_trained_part(str(tmp_path / "part"))


def test_a_file_cut_short_is_named(base, tmp_path):
    pic2word(base).save_trained_part(tmp_path / "part")
    file = tmp_path / "part" / "trained_part.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises((OSError, ValueError), match="part"):
        Pic2WordModel.from_trained_part(str(tmp_path / "part"))


@pytest.mark.parametrize("change", ["shape", "missing", "extra"])
def test_weights_of_another_model_are_refused(change, base, tmp_path):
    pic2word(base).save_trained_part(tmp_path / "part")
    file = tmp_path / "part" / "trained_part.safetensors"
    weights = load_file(file)
    if change == "shape":
        weights["mapper.fc_out.bias"] = torch.zeros(7)
    elif change == "missing":
        del weights["mapper.fc_out.bias"]
    else:
        weights["mapper.extra"] = torch.zeros(1)
    save_file(weights, file)
    with pytest.raises(ValueError, match="mapper.(fc_out.bias|extra)") as refused:
        Pic2WordModel.from_trained_part(str(tmp_path / "part"))
    assert "\n" not in str(refused.value)


def test_a_frozen_part_that_trains_is_refused_and_nothing_is_written(base, tmp_path):
    model = pic2word(base)
    model.clip.visual_projection.requires_grad_(True)
    with pytest.raises(ValueError, match="clip.*save_pretrained"):
        model.save_trained_part(tmp_path / "part")
    assert not (tmp_path / "part").exists()
    model.clip.requires_grad_(False)
    model.save_trained_part(tmp_path / "part")


@pytest.mark.parametrize("trained", [True, False], ids=["that train", "that do not"])
def test_adapters_are_refused(trained, base, tmp_path):
    model = pic2word(base)
    inject_adapter_in_model(LoraConfig(target_modules=r".*q_proj", init_lora_weights=False), model.clip)
    model.clip.requires_grad_(trained)
    with pytest.raises(ValueError, match="clip"):
        model.save_trained_part(tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_a_given_clip_keeps_every_weight(base):
    """Nothing of it begins anew, adapters and layers of a user's own included."""
    dual = MMClipModel.from_pretrained(base)
    dual.load_state_dict({k: v + 0.01 for k, v in dual.state_dict().items()}, assign=True)
    dual.visual_projection = torch.nn.Linear(32, 24, bias=False)
    inject_adapter_in_model(LoraConfig(target_modules=r".*q_proj", init_lora_weights=False), dual)
    before = copy.deepcopy(dual.state_dict())
    model = Pic2WordModel.from_clip_pretrained(dual, placeholder_token_id=STAR, hidden_dim=20)
    after = model.clip.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("failing", ["save_file", "replace"])
def test_a_failed_save_leaves_what_was_there(failing, base, tmp_path, monkeypatch):
    model = pic2word(base)
    folder = tmp_path / "part"
    model.save_trained_part(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        model.mapper.fc_out.bias += 1

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    target = (modeling_composite, "save_file") if failing == "save_file" else (os, "replace")
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(OSError, match="no space"):
            model.save_trained_part(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    model.save_trained_part(folder)
    assert same(Pic2WordModel.from_trained_part(str(folder)), model)


def test_a_folder_that_is_a_file_is_refused(base, tmp_path):
    (tmp_path / "part").write_text("mine")
    with pytest.raises(OSError):
        pic2word(base).save_trained_part(tmp_path / "part")
    assert (tmp_path / "part").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"part", "model"}


def test_each_part_has_the_dtype_that_it_was_saved_with(base, tmp_path):
    half = MMClipModel.from_pretrained(base, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    model = Pic2WordModel.from_clip_pretrained(half, placeholder_token_id=STAR, hidden_dim=20)
    model.mapper.float()
    model.save_trained_part(tmp_path / "part")
    reopened = Pic2WordModel.from_trained_part(str(tmp_path / "part"), clip=str(base))
    assert {p.dtype for p in reopened.clip.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reopened.mapper.parameters()} == {torch.float32}
    assert same(reopened, model)
    double = Pic2WordModel.from_trained_part(str(tmp_path / "part"), clip=str(base), dtype=torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
