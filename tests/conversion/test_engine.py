"""Conversion as a whole: published layout, ours, and back; what does not fit is refused before anything is written."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_published import DROPPED, RULES, ToyConfig, ToyModel, expected_tensors, published_tensors
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_mm
from hf_mm.conversion.checkpoint import Checkpoint, Origin, merge, open_checkpoint
from hf_mm.conversion.engine import check_target, convert, export, stored_tensors, write_safetensors
from hf_mm.conversion.rules import ConversionError, drop, rename, split
from hf_mm.models.vit.configuration_vit import MMViTConfig
from hf_mm.models.vit.modeling_vit import MMViTForImageClassification, MMViTModel

ORIGINS = (Origin("someone/toy", "c0ffee", "ab" * 32), Origin("second.pt"))


def a_checkpoint(tensors) -> Checkpoint:
    return Checkpoint(tensors, {}, ORIGINS, None)


def a_conversion(tensors, rules=RULES, dtype=torch.float32, **fields):
    return convert(a_checkpoint(tensors), model_class=ToyModel, config=ToyConfig(**fields), rules=rules, dtype=dtype)


def assert_same_tensors(actual, expected):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


class Card:
    def save(self, path):
        Path(path).write_text("# A toy\n")


class Processor:
    def __init__(self, error: Exception | None = None):
        self.error = error

    def save_pretrained(self, folder):
        Path(folder, "processor_config.json").write_text("{}")
        if self.error:
            raise self.error


@pytest.mark.parametrize("tie", [True, False])
def test_build_puts_every_tensor_in_its_place(tie):
    config = ToyConfig(tie_word_embeddings=tie)
    published = published_tensors(config)
    expected = expected_tensors(published, config)
    rules = RULES
    if not tie:
        published["head"] = torch.randn(config.vocab_size, config.hidden_size)
        expected["lm_head.weight"] = published["head"]
        rules = [*RULES, rename("head", "lm_head.weight")]
    model = a_conversion(published, rules, tie_word_embeddings=tie).build()

    assert not model.training
    assert_same_tensors({name: tensor.detach() for name, tensor in stored_tensors(model).items()}, expected)
    assert (model.lm_head.weight is model.embeddings.weight) is tie
    assert torch.equal(model.frequencies, 0.5 ** torch.arange(config.hidden_size))
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_a_built_model_does_not_share_memory_with_its_source():
    published = published_tensors(ToyConfig())
    kept = {name: tensor.clone() for name, tensor in published.items()}
    model = a_conversion(published).build()
    with torch.no_grad():
        for tensor in [*model.parameters(), model.steps]:
            tensor.add_(1)
    assert_same_tensors(published, kept)


def test_export_gives_the_published_layout_back():
    published = published_tensors(ToyConfig())
    exported = export(a_conversion(published).build(), RULES)
    assert_same_tensors(exported, {name: tensor for name, tensor in published.items() if name not in DROPPED})
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in exported.values())


def test_a_random_model_survives_export_and_conversion():
    model = ToyModel(ToyConfig())
    again = convert(a_checkpoint(export(model, RULES)), model_class=ToyModel, config=model.config, rules=RULES).build()
    assert_same_tensors(again.state_dict(), model.state_dict())


def test_export_refuses_a_model_with_more_than_the_table():
    model = ToyModel(ToyConfig())
    model.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ConversionError, match="adapter.bias, adapter.weight"):
        export(model, RULES)


def test_saved_folder_opens_with_auto_model(tmp_path):
    config = ToyConfig()
    published = published_tensors(config)
    folder = a_conversion(published).save(
        tmp_path / "deep" / "model", processor=Processor(), card=Card(), progress=False
    )

    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "conversion.json",
        "model.safetensors",
        "processor_config.json",
    ]
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is ToyModel
    expected = expected_tensors(published, config)
    assert_same_tensors({name: tensor.detach() for name, tensor in stored_tensors(model).items()}, expected)
    assert_same_tensors(load_file(folder / "model.safetensors"), expected)
    built = a_conversion(published).build()
    ids = torch.arange(config.vocab_size)[None]
    assert torch.equal(model(ids), built(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_folder_is_what_save_pretrained_writes(tmp_path, dtype):
    conversion = a_conversion(published_tensors(ToyConfig()), dtype=dtype)
    conversion.save(tmp_path / "ours", progress=False)
    conversion.build().save_pretrained(tmp_path / "theirs")

    read = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert read[0] == read[1]
    assert read[0]["architectures"] == ["ToyModel"]
    assert read[0]["dtype"] == str(dtype).removeprefix("torch.")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")]
    assert_same_tensors(*files)
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_half_weights_are_cast_exactly(tmp_path):
    published = published_tensors(ToyConfig(), torch.float16)
    folder = a_conversion(published).save(tmp_path / "model", progress=False)
    expected = expected_tensors(published, ToyConfig())
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in expected.items()}
    assert_same_tensors(load_file(folder / "model.safetensors"), floats)


def test_sources_and_versions_are_recorded(tmp_path):
    folder = a_conversion(published_tensors(ToyConfig())).save(tmp_path / "model", progress=False)
    assert json.loads((folder / "conversion.json").read_text()) == {
        "sources": [
            {"name": "someone/toy", "revision": "c0ffee", "sha256": "ab" * 32},
            {"name": "second.pt", "revision": None, "sha256": None},
        ],
        "hf_mm": hf_mm.__version__,
        "transformers": transformers.__version__,
    }


def test_a_model_that_generates_keeps_its_generation_config(tmp_path):
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        eos_token_id=3,
    )
    original = LlamaForCausalLM(config).eval()
    tensors = {f"old.{name}": tensor for name, tensor in stored_tensors(original).items()}
    conversion = convert(
        a_checkpoint(tensors), model_class=LlamaForCausalLM, config=config, rules=[rename("old.{name*}", "{name*}")]
    )
    folder = conversion.save(tmp_path / "model", progress=False)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.generation_config.eos_token_id == 3
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = original(ids).logits
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(conversion.build()(ids).logits, expected)


def test_a_model_of_the_package_with_its_query_key_and_value_fused(tmp_path):
    config = MMViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    original = MMViTModel(config).eval()
    fused = split("{block*}.qkv.{p}", [f"{{block*}}.{part}_proj.{{p}}" for part in "qkv"])
    others = [name for name in stored_tensors(original) if not any(f".{part}_proj." in name for part in "qkv")]
    rules = [fused, *(rename(name, name) for name in others)]
    exported = export(original, rules)
    assert sum(".qkv." in name for name in exported) == 4
    conversion = convert(a_checkpoint(exported), model_class=MMViTModel, config=config, rules=rules)
    folder = conversion.save(tmp_path / "model", progress=False)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(pixels).last_hidden_state, original(pixels).last_hidden_state)


def as_modules(tensors) -> torch.nn.Module:
    """A module whose parameters and buffers have these names."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        if tensor.is_floating_point():
            module.register_parameter(last, torch.nn.Parameter(tensor))
        else:
            module.register_buffer(last, tensor)
    return root


def write_archive(tensors, path):
    module = as_modules(tensors)
    module.forward = lambda x: x
    torch.jit.save(torch.jit.trace(module, torch.ones(1), check_trace=False), str(path))


def write_training_checkpoint(tensors, path):
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"epoch": 1, "state_dict": wrapped, "optimizer": {"lr": 0.1}}, path)


FORMATS = {"safetensors": save_file, "training checkpoint": write_training_checkpoint, "archive": write_archive}


@pytest.mark.parametrize("form", FORMATS)
def test_from_a_file_to_a_model_and_back(tmp_path, form):
    config = ToyConfig()
    published = published_tensors(config)
    FORMATS[form](published, tmp_path / "published")
    checkpoint = open_checkpoint(tmp_path / "published")
    folder = convert(checkpoint, model_class=ToyModel, config=config, rules=RULES).save(
        tmp_path / "model", progress=False
    )
    kept = {name: tensor for name, tensor in published.items() if name not in DROPPED}
    assert_same_tensors(export(AutoModel.from_pretrained(folder), RULES), kept)


def test_a_trained_part_and_a_backbone_become_one_model(tmp_path):
    config = ToyConfig()
    published = published_tensors(config)
    trained = {name: tensor for name, tensor in published.items() if ".mixer." in name or name == "logit_scale"}
    backbone = {f"backbone.{name}": tensor for name, tensor in published.items() if name not in trained}
    save_file(backbone | {"head.weight": torch.ones(1)}, tmp_path / "backbone.safetensors")
    torch.save(trained, tmp_path / "trained.pt")
    parts = [
        open_checkpoint(tmp_path / "trained.pt"),
        open_checkpoint(tmp_path / "backbone.safetensors").select("backbone."),
    ]
    conversion = convert(merge(*parts), model_class=ToyModel, config=config, rules=RULES)
    folder = conversion.save(tmp_path / "model", progress=False)
    assert_same_tensors(load_file(folder / "model.safetensors"), expected_tensors(published, config))
    assert json.loads((folder / "conversion.json").read_text())["sources"] == [
        {"name": name, "revision": None, "sha256": hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}
        for name in ("trained.pt", "backbone.safetensors")
    ]


def test_convert_leaves_the_config_and_the_tensors_alone():
    config, published = ToyConfig(), published_tensors(ToyConfig(), torch.float16)
    before = config.to_dict()
    convert(a_checkpoint(published), model_class=ToyModel, config=config, rules=RULES).build()
    assert config.to_dict() == before
    assert published["proj"].dtype == torch.float16


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


MISFITS = {
    "missing": (lambda t: without(t, "proj"), RULES, "has nothing for the model's projection.weight"),
    "half of a rule": (lambda t: without(t, "blocks.1.mixer.odd"), RULES, "lacks blocks.1.mixer.odd"),
    "left over": (lambda t: t | {"visual.extra": torch.ones(1)}, RULES, "does not have visual.extra"),
    "another layer": (
        lambda t: t | {"blocks.2.out.bias": torch.ones(6)},
        RULES,
        "no place for, its layers.2.out_proj.bias",
    ),
    "read twice": (lambda t: t, [*RULES, *drop("proj")], "two rules read proj"),
    "set twice": (
        lambda t: t | {"again": torch.ones(6, 4)},
        [*RULES, rename("again", "projection.weight")],
        "gives two tensors for projection.weight",
    ),
    "wrong shape": (
        lambda t: t | {"proj": torch.ones(6, 5)},
        RULES,
        r"projection.weight would be \(5, 6\) where the model has \(4, 6\)",
    ),
    "not divisible": (
        lambda t: t | {"blocks.0.in_proj_bias": torch.ones(17)},
        RULES,
        r"layers.0.k_proj.bias would be \(6,\).*|layers.0.v_proj.bias would be \(5,\) where the model has \(6,\)",
    ),
    "too few to split": (
        lambda t: t | {"blocks.0.in_proj_bias": torch.ones(2)},
        RULES,
        r"blocks.0.in_proj_bias \(2,\) cannot become layers.0.k_proj.bias, layers.0.q_proj.bias",
    ),
    "not to be reshaped": (
        lambda t: t | {"logit_scale": torch.ones(2)},
        RULES,
        r"logit_scale \(2,\) cannot become logit_scale",
    ),
    "wrong kind": (
        lambda t: t | {"num_batches": torch.tensor(7.0)},
        RULES,
        r"steps would be \(\) where the model has \(\) int64",
    ),
    "wrong integers": (
        lambda t: t | {"num_batches": torch.tensor(7, dtype=torch.int32)},
        RULES,
        r"steps would be \(\) int32 where the model has \(\) int64",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_misfits_are_refused_with_their_names(misfit):
    change, rules, message = MISFITS[misfit]
    with pytest.raises(ConversionError, match=message) as caught:
        a_conversion(change(published_tensors(ToyConfig())), rules)
    assert str(caught.value).count("\n") == 0


def test_all_wrong_shapes_are_named_at_once():
    tensors = published_tensors(ToyConfig()) | {"proj": torch.ones(6, 5), "token_embedding": torch.ones(10, 6)}
    with pytest.raises(ConversionError, match="embeddings.weight.*projection.weight"):
        a_conversion(tensors)


def test_checks_read_no_numbers():
    """On meta tensors everything but the writing works."""
    tensors = {name: tensor.to("meta") for name, tensor in published_tensors(ToyConfig()).items()}
    a_conversion(tensors)


def test_a_folder_that_is_not_empty_is_refused_before_any_work(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    conversion = a_conversion(published_tensors(ToyConfig()))
    with pytest.raises(FileExistsError, match="not an empty folder"):
        conversion.save(tmp_path / "model", processor=Processor(AssertionError("work was done")))
    with pytest.raises(FileExistsError, match="not an empty folder"):
        conversion.save(tmp_path / "model" / "notes.txt")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "notes.txt"]
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "model").mkdir()
    a_conversion(published_tensors(ToyConfig())).save(tmp_path / "model", progress=False)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Vanishing(dict):
    """Weights that cannot be read any more once they have been checked."""

    def __init__(self, tensors, error):
        super().__init__(tensors)
        self.error, self.reads = error, 0

    def __getitem__(self, name):
        self.reads += 1
        if self.reads > len(self) + 5:
            raise self.error
        return super().__getitem__(name)


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt(), RuntimeError("odd")])
@pytest.mark.parametrize("where", ["processor", "weights"])
def test_whatever_fails_leaves_nothing_behind(tmp_path, error, where):
    published = published_tensors(ToyConfig())
    conversion = a_conversion(Vanishing(published, error) if where == "weights" else published)
    processor = Processor(error if where == "processor" else None)
    with pytest.raises(BaseException) as caught:
        conversion.save(tmp_path / "new" / "model", processor=processor, progress=False)
    if not isinstance(error, OSError):
        assert caught.value is error
    elif where == "processor":
        assert caught.type is OSError
        assert str(caught.value).endswith(
            "could not be written to {} ({}); nothing is left of it.".format(tmp_path / "new" / "model", error)
        )
    else:
        assert caught.type is ConversionError
        assert str(caught.value) == "second.pt, someone/toy could not be read any more (the disk is full)."
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_cannot_be_read_while_building_is_named():
    conversion = a_conversion(Vanishing(published_tensors(ToyConfig()), OSError(5, "Input/output error", "/a/b.pt")))
    with pytest.raises(
        ConversionError, match=r"^second.pt, someone/toy could not be read any more \(Input/output err"
    ):
        conversion.build()


@pytest.mark.parametrize("there", [".", "old", "old/new", "old/new/model"])
def test_a_folder_that_cannot_get_its_name_takes_its_new_parents_with_it(tmp_path, monkeypatch, there):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = {path for path in tmp_path.rglob("*") if path.name != "model"}

    def refuse(source, target):
        assert Path(target).parent.is_dir() and (Path(source) / "config.json").is_file()
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="could not be written to .*the disk is full"):
        a_conversion(published_tensors(ToyConfig())).save(tmp_path / "old" / "new" / "model", progress=False)
    assert set(tmp_path.rglob("*")) == before


def test_a_new_parent_that_another_uses_by_now_is_kept(tmp_path, monkeypatch):
    def refuse(source, target):
        (Path(target).parent / "other.txt").write_text("another's")
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="the disk is full"):
        a_conversion(published_tensors(ToyConfig())).save(tmp_path / "new" / "model", progress=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "other.txt"]


def test_a_target_is_checked_without_a_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = set(tmp_path.rglob("*"))
    for good in ("new", "new/deeper/model", "empty", "empty/model", "full/model", tmp_path / "new"):
        check_target(good)
    for bad in ("full", "full/file", tmp_path / "full"):
        with pytest.raises(FileExistsError, match=f"^{bad} exists and is not an empty folder: choose another.$"):
            check_target(bad)
    for bad in ("full/file/model", "full/file/deeper/model"):
        with pytest.raises(NotADirectoryError, match=f"^{bad} would lie below file, which is a file: choose another"):
            check_target(bad)
    assert set(tmp_path.rglob("*")) == before


def test_a_folder_below_a_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    conversion = a_conversion(published_tensors(ToyConfig()))
    with pytest.raises(NotADirectoryError, match="would lie below file"):
        conversion.save(tmp_path / "file" / "model", processor=Processor(AssertionError("work was done")))
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_progress_counts_the_bytes(tmp_path, capsys):
    conversion = a_conversion(published_tensors(ToyConfig()))
    conversion.save(tmp_path / "silent", progress=False)
    assert capsys.readouterr().err == ""
    conversion.save(tmp_path / "shown")
    shown = capsys.readouterr().err
    assert "Writing model.safetensors" in shown and "100%" in shown


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def test_safetensors_file_against_the_library(tmp_path):
    tensors = {f"{dtype}": torch.randn(3, 5).to(dtype) for dtype in DTYPES}
    tensors |= {f"{dtype}": torch.randint(0, 2, (7,)).to(dtype) for dtype in INTEGERS}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.ones(0, 4), "turned": torch.randn(4, 3).T}
    tensors |= {'of "two" \\ kinds': torch.ones(1), "π": torch.ones(2, dtype=torch.bool)}
    path = tmp_path / "file.safetensors"
    layout = {name: tensor.to("meta") for name, tensor in tensors.items()}
    write_safetensors(path, layout, reversed(tensors.items()), progress=False)

    assert_same_tensors(load_file(path), tensors)
    with safe_open(path, "pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == {  # noqa: SIM118 - a file handle
            name: list(tensor.shape) for name, tensor in tensors.items()
        }
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0
    header = json.loads(path.read_bytes()[8 : 8 + length])
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0, name


def test_tied_weights_are_stored_once_under_the_name_others_follow():
    model = ToyModel(ToyConfig())
    assert set(model.state_dict()) - set(stored_tensors(model)) == {"lm_head.weight"}
    model.layers[1] = model.layers[0]
    assert not any(name.startswith("layers.1.") for name in stored_tensors(model))


def test_a_classifier_keeps_its_labels(tmp_path):
    config = MMViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=4,
        patch_size=4,
        id2label={0: "cat", 1: "dog", 2: "eel"},
    )
    model = MMViTForImageClassification(config)
    folder = convert(
        a_checkpoint(dict(stored_tensors(model))),
        model_class=MMViTForImageClassification,
        config=config,
        rules=[rename("{name*}", "{name*}")],
    ).save(tmp_path / "model", progress=False)
    assert MMViTConfig.from_pretrained(folder).id2label == {0: "cat", 1: "dog", 2: "eel"}
