"""Published CLIP checkpoints: what is read from them, what is asked for, what is refused, and the way back."""

import copy
import hashlib
import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract.cases import CONTEXT, clip_config, pictures, tokenizer
from contract.published import open_clip_json, openai_state
from published_clips import essentials, our_model, published_folder, read_with_tokenizer, tiny_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModel,
)

from hf_mm.cli import main
from hf_mm.conversion import peers
from hf_mm.conversion.checkpoint import Checkpoint, Origin, open_checkpoint
from hf_mm.conversion.layouts import mlp_ratio
from hf_mm.conversion.rules import ConversionError
from hf_mm.hub import convert
from hf_mm.hub.push import check_folder
from hf_mm.models.clip import conversion_clip, peer_check_clip
from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.conversion_clip import (
    VARIANTS,
    export_transformers,
    read_clip,
    save_as_open_clip,
    save_as_transformers,
    transformers_config,
)
from hf_mm.models.clip.modeling_clip import MMClipTextModel, MMClipVisionModel
from hf_mm.models.clip.open_clip_config import config_from_open_clip, config_from_open_clip_shapes, open_clip_config
from hf_mm.models.clip.openai_files import OPENAI_MODELS
from hf_mm.models.clip.presets_clip import PRESETS, preset

# Sizes

TOTALS = {  # parameters and keys of the published state dicts
    "RN50": (102_007_137, 489),
    "RN101": (119_688_033, 795),
    "RN50x4": (178_300_601, 669),
    "RN50x16": (290_979_217, 921),
    "RN50x64": (623_258_305, 1353),
    "ViT-B-32": (151_277_313, 302),
    "ViT-B-16": (149_620_737, 302),
    "ViT-L-14": (427_616_513, 446),
    "ViT-L-14-336": (427_944_193, 446),
}


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_tell_the_sizes_of_every_published_model(name):
    config = MMClipConfig.from_preset(name)
    state = openai_state(config, device="meta")
    if name in TOTALS:
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        parameters = sum(tensor.numel() for key, tensor in state.items() if not key.endswith(statistics))
        assert (parameters, len(state)) == TOTALS[name]
    activation = config.text_config.hidden_act
    assert essentials(config_from_open_clip_shapes(state, activation)) == essentials(config)


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32", "ViT-H-14"])
def test_the_names_are_those_of_the_model(name):
    config = MMClipConfig.from_preset(name)
    state = openai_state(config, device="meta")
    checkpoint = Checkpoint(state, {}, (Origin("meta"),))
    conversion, processor = read_clip(checkpoint, activation="gelu")
    assert {name for step in conversion.steps for name in step.sources} == state.keys()
    assert processor.image_processor.crop_size["height"] == config.vision_config.image_size
    assert processor.tokenizer.model_max_length == 77


def test_a_width_that_no_published_model_has_is_asked_about():
    config = tiny_config()
    config.text_config.hidden_size = 48
    with pytest.raises(ConversionError, match="heads"):
        config_from_open_clip_shapes(openai_state(config, device="meta"), "gelu")


@pytest.mark.parametrize(
    "key", ["visual.conv1.weight", "text_projection", "visual.positional_embedding", "ln_final.weight"]
)
def test_a_key_that_the_sizes_need_is_named(key):
    state = openai_state(tiny_config(), device="meta")
    del state[key]
    with pytest.raises(ConversionError, match=re.escape(key)):
        config_from_open_clip_shapes(state, "gelu")


def test_a_preset_is_the_caller_s_own():
    preset("RN50")["vision_config"]["width"] = 1
    preset("RN50")["text_config"].clear()
    assert MMClipConfig.from_preset("RN50").vision_config.width == 64
    assert preset("RN50")["text_config"]["hidden_size"] == 512


# What a config declares


@pytest.mark.parametrize("resnet", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_declared_sizes(resnet, activation):
    config = tiny_config(resnet, activation)
    assert essentials(config_from_open_clip(open_clip_json(config)["model_cfg"])) == essentials(config)


def test_declared_heads_widths_and_numerics():
    config = config_from_open_clip(
        {
            "embed_dim": 20,
            "init_logit_scale": 2.0,
            "vision_cfg": {
                "layers": 1,
                "width": 40,
                "head_width": 10,
                "patch_size": 8,
                "image_size": [16, 32],
                "mlp_ratio": 4.3637,
                "act_kwargs": {"approximate": "tanh"},
            },
            "text_cfg": {"layers": 1, "width": 24, "heads": 6, "vocab_size": 99, "norm_kwargs": {"eps": 1e-6}},
        }
    )
    vision, text = config.vision_config, config.text_config
    assert (vision.num_attention_heads, vision.intermediate_size) == (4, 174)
    assert (vision.hidden_act, vision.layer_norm_eps, list(vision.image_size)) == ("gelu_pytorch_tanh", 1e-5, [16, 32])
    assert (text.num_attention_heads, text.hidden_act, text.layer_norm_eps) == (6, "gelu", 1e-6)
    assert (text.eos_token_id, text.bos_token_id, text.max_position_embeddings) == (98, 97, 77)
    assert (config.projection_dim, config.logit_scale_init_value) == (20, 2.0)


FOREIGN = {
    "vision_cfg": {
        "attentional_pool": True,
        "timm_model_name": "vit_base_patch16_siglip_224",
        "ls_init_value": 1e-4,
        "no_ln_pre": True,
        "pool_type": "avg",
        "final_ln_after_pool": True,
        "pos_embed_type": "sin_cos_2d",
        "qk_norm": True,
        "of_the_future": 1,
    },
    "text_cfg": {
        "hf_model_name": "roberta-base",
        "no_causal_mask": True,
        "embed_cls": True,
        "pool_type": "last",
        "proj_bias": True,
        "proj_type": "none",
        "scale_fc": True,
    },
    "model_cfg": {"multimodal_cfg": {"width": 8}, "init_logit_bias": -10},
}


@pytest.mark.parametrize(("group", "field"), [(group, field) for group, fields in FOREIGN.items() for field in fields])
def test_a_field_that_describes_another_model_is_named(group, field):
    declared = open_clip_json(tiny_config())["model_cfg"]
    (declared if group == "model_cfg" else declared[group])[field] = FOREIGN[group][field]
    with pytest.raises(ValueError, match=rf"{group}\.{field} = "):
        config_from_open_clip(declared)


def test_fields_that_say_nothing_are_passed_over():
    declared = open_clip_json(tiny_config())["model_cfg"]
    declared |= {"custom_text": True, "init_logit_bias": None}
    declared["vision_cfg"] |= {"patch_dropout": 0.5, "pool_type": "tok", "attn_pooler_heads": 8}
    declared["text_cfg"] |= {"pad_id": 0, "eos_id": 2, "output_tokens": True}
    assert essentials(config_from_open_clip(declared)) == essentials(tiny_config())


@pytest.mark.parametrize("numerics", [{"act_kwargs": {"approximate": "tanh"}}, {"norm_kwargs": {"bias": False}}])
def test_numerics_without_equivalent_are_named(numerics):
    declared = open_clip_json(tiny_config(activation="quick_gelu"))["model_cfg"]
    declared["text_cfg"] |= numerics
    with pytest.raises(ValueError, match=next(iter(numerics))):
        config_from_open_clip(declared)


def fields_of(declared: dict, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all fields, the groups too."""
    paths = [
        [(*path, name), *(fields_of(value, (*path, name)) if isinstance(value, dict) else [])]
        for name, value in declared.items()
    ]
    return [found for group in paths for found in group]


def damaged(folder: Path, file: str, field: tuple[str, ...], *value):
    """The folder as a checkpoint with a field of a JSON file removed, or with another value."""
    checkpoint = open_checkpoint(folder)
    configs = copy.deepcopy(checkpoint.configs)
    group = configs[file]
    for name in field[:-1]:
        group = group[name]
    group.pop(field[-1])
    if value:
        (group[field[-1]],) = value
    return replace(checkpoint, configs=configs)


FIELDS = fields_of(open_clip_json(tiny_config()))


@pytest.mark.parametrize("field", FIELDS, ids=".".join)
def test_a_missing_field_has_open_clip_s_default_or_is_one_sentence(whole_folder, field):
    without = damaged(whole_folder, "open_clip_config.json", field)
    needed = {
        "embed_dim",
        "vision_cfg",
        "text_cfg",
        "layers",
        "width",
        "vocab_size",
        "context_length",
        "image_size",
        "patch_size",
    }
    if field[-1] in needed or field == ("model_cfg",):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            read_clip(without)
    else:
        read_clip(without)


@pytest.mark.parametrize(
    ("field", "value"),
    # 0 is a mean too, and stands for a name that is left open.
    [(field, value) for field in FIELDS for value in ("x", 0) if value or field[:1] == ("model_cfg",)],
    ids=str,
)
def test_a_mistyped_field_is_one_sentence(whole_folder, field, value):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_clip(damaged(whole_folder, "open_clip_config.json", field, value))


# Files


@pytest.mark.parametrize("text_prefix", ["", "text."])
@pytest.mark.parametrize("resnet", [False, True])
def test_a_training_checkpoint_of_half_precision_is_unwrapped(tmp_path, resnet, text_prefix):
    config = tiny_config(resnet)
    state = openai_state(config, text_prefix=text_prefix)
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    wrapped = {"epoch": 3, "name": "run", "state_dict": {f"module.{name}": half[name] for name in half}}
    torch.save({**wrapped, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "epoch_3.pt")
    conversion, _ = read_with_tokenizer(tmp_path, tmp_path / "epoch_3.pt", activation="gelu")
    model = conversion.build()
    assert essentials(model.config) == essentials(config)
    assert model.dtype == torch.float32
    assert torch.equal(model.text_projection.weight, half[f"{text_prefix}text_projection"].float().T)
    assert torch.equal(model.logit_scale, half["logit_scale"].float().reshape(1))
    third = half[f"{text_prefix}transformer.resblocks.1.attn.in_proj_weight"][64:128].float()
    assert torch.equal(model.text_model.encoder.layers[1].self_attn.k_proj.weight, third)
    if resnet:
        assert model.vision_model.layer2[0].bn3.num_batches_tracked == 7


def test_a_scale_of_one_element_and_buffers_that_are_no_weights(tmp_path):
    state = openai_state(tiny_config())
    state["logit_scale"] = state["logit_scale"].reshape(1)
    state["attn_mask"] = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)
    save_file(state, tmp_path / "file.safetensors")
    conversion, _ = read_with_tokenizer(tmp_path, tmp_path / "file.safetensors", activation="gelu")
    assert torch.equal(conversion.build().logit_scale, state["logit_scale"])


class Archive(nn.Module):
    """A module with the names and values of a state dict, to be traced."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in state.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_buffer(leaf, tensor)

    def forward(self, number: torch.Tensor) -> torch.Tensor:
        return number + self.logit_scale


def traced(path, state):
    torch.jit.trace(Archive(state), torch.zeros(())).save(path)
    return path


@pytest.mark.parametrize("resnet", [False, True])
def test_openai_s_archives_mean_quick_gelu(tmp_path, resnet):
    config = tiny_config(resnet, "quick_gelu")
    state = openai_state(config)
    half = {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in state.items()}
    sizes = {"input_resolution": 32, "context_length": CONTEXT, "vocab_size": config.text_config.vocab_size}
    path = traced(tmp_path / "RN50.pt", {**half, **{name: torch.tensor(size) for name, size in sizes.items()}})
    conversion, processor = read_with_tokenizer(tmp_path, path)
    assert essentials(conversion.empty.config) == essentials(config)
    assert torch.equal(conversion.build().text_projection.weight, half["text_projection"].float().T)
    assert not processor.image_processor.convert_rgb_first


def test_another_archive_or_file_is_asked_for_its_activation(tmp_path):
    state = openai_state(tiny_config())
    save_file(state, tmp_path / "file.safetensors")
    for path in (traced(tmp_path / "RN50.pt", state), tmp_path / "file.safetensors"):
        with pytest.raises(ValueError, match="--activation quick_gelu .* --activation gelu"):
            read_with_tokenizer(tmp_path, path)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_preset_tells_heads_but_not_the_activation(tmp_path, activation, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", clip_config().to_dict())
    save_file(openai_state(clip_config()), tmp_path / "file.safetensors")
    with pytest.raises(ConversionError, match="heads"):
        read_with_tokenizer(tmp_path, tmp_path / "file.safetensors", activation=activation)
    with pytest.raises(ValueError, match="--activation"):
        read_with_tokenizer(tmp_path, tmp_path / "file.safetensors", preset="tiny")
    conversion, _ = read_with_tokenizer(tmp_path, tmp_path / "file.safetensors", preset="tiny", activation=activation)
    config = conversion.empty.config
    assert config.vision_config.num_attention_heads == config.text_config.num_attention_heads == 2
    assert config.vision_config.hidden_act == config.text_config.hidden_act == activation


def test_openai_s_archives_have_no_other_activation(tmp_path, monkeypatch):
    state = openai_state(tiny_config(activation="quick_gelu"))
    archive = traced(tmp_path / "a.pt", state | {"input_resolution": torch.tensor(32)})
    assert read_with_tokenizer(tmp_path, archive, activation="quick_gelu")
    save_file(state, tmp_path / "published.safetensors")
    sha256 = hashlib.sha256((tmp_path / "published.safetensors").read_bytes()).hexdigest()
    monkeypatch.setitem(OPENAI_MODELS, "RN101", (sha256, "RN101.pt"))
    for source in (archive, tmp_path / "published.safetensors"):
        with pytest.raises(ValueError, match="declares hidden_act = 'quick_gelu': leave --activation out"):
            read_with_tokenizer(tmp_path, source, activation="gelu")


def test_what_is_declared_is_not_given_again(tmp_path):
    published_folder(tmp_path)
    with pytest.raises(ValueError, match="open_clip_config.json declares"):
        read_clip(tmp_path, activation="quick_gelu")
    with pytest.raises(ValueError, match="activation must be one of"):
        read_clip(tmp_path, activation="relu")


@pytest.mark.parametrize("part", VARIANTS)
def test_variants_are_refused_by_name(part):
    state = {**openai_state(tiny_config(), "meta"), part if part == "logit_bias" else f"{part}x": torch.zeros(())}
    with pytest.raises(ValueError, match=re.escape(VARIANTS[part]) + ".*" + re.escape(part)):
        read_clip(Checkpoint(state, {}, (Origin("meta"),)), activation="gelu")


def test_transformers_names_without_their_config_are_refused(tmp_path):
    save_file({"text_model.final_layer_norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json of type clip"):
        read_clip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mm_clip"}))
    with pytest.raises(ValueError, match="found: mm_clip"):
        read_clip(tmp_path)


# OpenAI's own files


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_hashes_and_names_are_those_of_the_paper_s_repository():
    assert len(OPENAI_MODELS) == 9
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256, _ in OPENAI_MODELS.values())


def test_a_name_is_downloaded_once_and_checked(tmp_path, cache, monkeypatch):
    sizes = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    content = traced(tmp_path / "x.pt", openai_state(tiny_config(activation="quick_gelu")) | sizes).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(OPENAI_MODELS, "ViT-B/32", (sha256, "ViT-B-32.pt"))
    asked = []

    def download(url, destination, hash_prefix, progress):
        asked.append((url, hash_prefix))
        with open(destination, "wb") as file:
            file.write(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        conversion, _ = read_with_tokenizer(tmp_path, "ViT-B/32")
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/ViT-B-32.pt"
    assert asked == [(url, sha256)]
    assert conversion.checkpoint.origins == (Origin(url, None, sha256),)
    assert conversion.empty.config.text_config.hidden_act == "quick_gelu"
    (cached,) = cache.iterdir()
    cached.write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match=f"SHA-256.*delete {re.escape(str(cached))} first"):
        read_with_tokenizer(tmp_path, "ViT-B/32")


def test_openai_s_files_have_no_revisions():
    with pytest.raises(ValueError, match="RN50 .*leave --revision out"):
        read_clip("RN50", revision="main")


def test_a_local_file_is_known_by_its_hash_and_not_by_its_name(tmp_path, monkeypatch):
    save_file(openai_state(tiny_config()), tmp_path / "RN50.pt")
    sha256 = hashlib.sha256((tmp_path / "RN50.pt").read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="--activation"):
        read_with_tokenizer(tmp_path, tmp_path / "RN50.pt")
    monkeypatch.setitem(OPENAI_MODELS, "RN101", (sha256, "RN101.pt"))
    conversion, _ = read_with_tokenizer(tmp_path, tmp_path / "RN50.pt")
    assert conversion.empty.config.text_config.hidden_act == "quick_gelu"
    assert "/RN101.pt" in conversion.checkpoint.origins[0].name


def test_a_download_that_fails_is_one_sentence(cache, monkeypatch):
    def download(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(OSError, match=r"RN50 could not be downloaded from https://.*RN50\.pt: no route"):
        read_clip("RN50")


# Back


def features(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        images = model.get_image_features(batch["pixel_values"]).pooler_output
        texts = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    return images, texts


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize(
    ("model_class", "peer_class", "name"),
    [(MMClipTextModel, CLIPTextModel, "text_model."), (MMClipVisionModel, CLIPVisionModel, "vision_model.")],
)
def test_a_tower_alone_with_and_without_its_prefix(tmp_path, model_class, peer_class, name, prefix):
    config = tiny_config(activation="quick_gelu")
    config = config.text_config if model_class is MMClipTextModel else config.vision_config
    theirs = peer_class(transformers_config(config)).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert not any(key.startswith(name) for key in state)
    old = {"embeddings.position_ids": torch.arange(16)[None]}
    state = {(name if prefix else "") + key: tensor for key, tensor in {**state, **old}.items()}
    save_file(state, tmp_path / "model.safetensors")
    conversion, prepare = read_clip(tmp_path)
    model = conversion.build()
    assert type(model) is model_class
    inputs = prepare(["a red square"] if name == "text_model." else pictures(1), return_tensors="pt")
    with torch.no_grad():
        ours, reference = model(**inputs).pooler_output, theirs(**inputs).pooler_output
    assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_a_picture_tower_takes_no_tokenizer(tmp_path):
    CLIPVisionModel(transformers_config(tiny_config().vision_config)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="leave --tokenizer out"):
        read_clip(tmp_path, tokenizer=tmp_path)


OLD_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # of every early config.json on the Hub


def test_the_ids_of_old_configs(tmp_path, capsys):
    model, processor = our_model()
    folder, out = save_as_transformers(model, processor, tmp_path / "source"), tmp_path / "out"
    declared = json.loads((folder / "config.json").read_text())
    declared["text_config"] |= OLD_IDS
    (folder / "config.json").write_text(json.dumps(declared))
    assert main(["convert", "clip", str(folder), str(out), "--check"]) == 0, capsys.readouterr().err
    text, end = AutoModel.from_pretrained(out).config.text_config, len(tokenizer()) - 1
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (end - 1, end, end)


def test_the_check_draws_every_id_but_the_end_token():
    config = tiny_config().text_config
    config.vocab_size, config.bos_token_id, config.eos_token_id = 6, 0, 3
    for ids in peer_check_clip._texts(config).tolist():
        length = ids.index(3)
        assert 1 <= length < CONTEXT
        assert set(ids[length:]) == {3}
        assert set(ids[:length]) <= {0, 1, 2, 4, 5}


MISTYPED = [
    (("text_config",), "x"),
    (("vision_config",), 3),
    (("projection_dim",), "x"),
    (("text_config", "vocab_size"), "x"),
    (("text_config", "num_attention_heads"), 0),
    (("text_config", "num_attention_heads"), 7),
    (("text_config", "eos_token_id"), "x"),
    (("vision_config", "hidden_act"), "swish9"),
    (("vision_config", "image_size"), "x"),
    (("vision_config", "patch_size"), 0),
    (("vision_config", "num_hidden_layers"), "2"),
]


@pytest.mark.parametrize(("field", "value"), MISTYPED, ids=str)
def test_a_damaged_config_of_transformers_is_one_sentence(tmp_path, field, value):
    folder = save_as_transformers(*our_model(), tmp_path / "source")
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_clip(damaged(folder, "config.json", field, value))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_transformers_opens_what_is_written(tmp_path, activation):
    model, processor = our_model(tiny_config(activation=activation))
    folder = save_as_transformers(model, processor, tmp_path / "theirs")
    theirs, loading = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    their_processor = CLIPProcessor.from_pretrained(folder)
    assert isinstance(their_processor.tokenizer, CLIPTokenizer)
    square = pictures(1)[0].crop((0, 0, 36, 36))  # where the two crop rules agree
    raw = {"images": [square], "text": ["a red square", "two blue circles"]}
    batch = processor(**raw)
    their_batch = their_processor(**raw, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], their_batch["input_ids"])
    assert torch.allclose(batch["pixel_values"], their_batch["pixel_values"], atol=1e-6)
    for ours, reference in zip(features(model, batch), features(theirs, their_batch), strict=True):
        assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_transformers_layout_is_bit_equal_and_comes_back(tmp_path):
    model, processor = our_model()
    config, state = export_transformers(model)
    assert isinstance(config, CLIPConfig)
    assert state["logit_scale"].shape == ()
    folder = save_as_transformers(model, processor, tmp_path / "theirs")
    conversion, again = read_clip(folder)
    built = conversion.build().state_dict()
    assert all(torch.equal(tensor, built[name]) for name, tensor in model.state_dict().items())
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert list(again.image_processor.image_mean) == [0.3, 0.4, 0.5]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (lambda: tiny_config(resnet=True), "no tower of type mm_clip_resnet"),
        (lambda: clip_config(model_type="mm_vit"), "no tower of type mm_vit"),
        (lambda: clip_config(image_size=(32, 48)), r"image_size = .32, 48"),
        (lambda: tiny_config(vision_pooling="mean"), "vision_pooling = 'mean'"),
    ],
)
def test_what_transformers_cannot_be_is_named_and_nothing_written(tmp_path, config, named):
    model, processor = our_model(tiny_config())
    model.config = config()
    with pytest.raises(ValueError, match=named):
        save_as_transformers(model, processor, tmp_path / "theirs")
    assert not list(tmp_path.iterdir())


def test_an_end_token_of_two_means_something_else_to_transformers():
    config = tiny_config()
    config.text_config.eos_token_id = 2
    with pytest.raises(ValueError, match="eos_token_id = 2"):
        transformers_config(config)


@pytest.mark.parametrize("resnet", [False, True])
def test_open_clip_s_layout_there_and_back(tmp_path, resnet):
    model, processor = our_model(tiny_config(resnet, "quick_gelu"))
    processor.image_processor.convert_rgb_first = False
    folder = save_as_open_clip(model, processor, tmp_path / "theirs")
    state = load_file(folder / "open_clip_model.safetensors")
    assert state.keys() == openai_state(model.config).keys()
    assert state["logit_scale"].shape == ()
    declared = json.loads((folder / "open_clip_config.json").read_text())
    assert declared["model_cfg"]["quick_gelu"] is True
    assert declared["preprocess_cfg"]["mean"] == [0.3, 0.4, 0.5]
    conversion, again = read_clip(folder)
    built = conversion.build()
    assert essentials(built.config) == essentials(model.config)
    assert all(torch.equal(tensor, built.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda config: setattr(config, "text_pooling", "mean"), "text_pooling"),
        (lambda config: setattr(config.text_config, "eos_token_id", 5), "eos_token_id = 5"),
        (lambda config: setattr(config.text_config, "hidden_act", "quick_gelu"), "QuickGELU in one tower"),
        (lambda config: setattr(config.text_config, "hidden_act", "relu"), "'relu'"),
        (lambda config: setattr(config.vision_config, "num_channels", 1), "num_channels = 1"),
    ],
)
def test_what_open_clip_cannot_be_is_named(change, named):
    config = tiny_config()
    change(config)
    with pytest.raises(ValueError, match=named):
        open_clip_config(config)


def test_the_width_of_mlps_survives_a_ratio_that_is_truncated():
    config = tiny_config().text_config
    for width in (7, 48, 768, 1408, 1664):
        for hidden in {4 * width, 6144, 8192, *range(width, 5 * width, max(width // 31, 1))}:
            config.hidden_size, config.intermediate_size = width, hidden
            assert int(width * mlp_ratio(config)) == hidden


# The command


def test_the_command_writes_a_folder_that_opens_with_its_card(tmp_path, capsys):
    source, out = published_folder(tmp_path / "source"), tmp_path / "out"
    assert main(["convert", "clip", str(source), str(out), "--license", "mit"]) == 0
    assert str(out) in capsys.readouterr().out
    model, processor = AutoModel.from_pretrained(out), AutoProcessor.from_pretrained(out)
    expected = read_clip(source)[0].build()
    batch = processor(images=pictures(2), text=["a red square", "nothing"])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits_per_image, expected(**batch).logits_per_image)
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "source" in card


def test_the_command_refuses_in_a_sentence_and_leaves_nothing(tmp_path, capsys):
    source = published_folder(tmp_path / "source", declared=False)
    assert main(["convert", "clip", str(source), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("--activation") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_missing_peer_is_one_sentence_before_anything_is_converted(tmp_path, capsys, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    source = published_folder(tmp_path / "source")
    assert main(["convert", "clip", str(source), str(tmp_path / "out"), "--check"]) == 1
    assert "pip install open_clip_torch" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_differences_of_zeros():
    zeros = torch.zeros(3)
    assert peers.largest_difference(zeros, zeros) == 0
    assert peers.largest_difference(zeros + 1e-3, zeros) > 1
    assert peers.largest_difference(zeros, zeros + 2) == 1


def test_the_check_of_pictures_of_one_channel(tmp_path, capsys):
    config = tiny_config()
    config.vision_config.num_channels = 1
    model, processor = our_model(config)
    save_as_transformers(model, processor, tmp_path / "source")
    command = ["convert", "clip", str(tmp_path / "source"), str(tmp_path / "out"), "--check"]
    assert main(command) == 0, capsys.readouterr().err


def test_a_place_that_is_taken_is_found_before_the_source_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/out"):
        for way in ([], ["--to", "open_clip"]):
            assert main(["convert", "clip", str(tmp_path / "no source"), str(tmp_path / out), *way]) == 1
            assert "no source" not in capsys.readouterr().err


def test_the_check_passes_and_fails_with_the_weights(tmp_path, capsys, monkeypatch):
    model, processor = our_model()
    save_as_transformers(model, processor, tmp_path / "source")
    command = ["convert", "clip", str(tmp_path / "source"), str(tmp_path / "out"), "--check"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    differences = [float(number) for number in re.findall(r"embeddings (\S+?)[,.]? ?(?=text|\n)", printed)]
    assert len(differences) == 2
    assert all(difference < 1e-5 for difference in differences)

    rules = conversion_clip.transformers_rules
    swapped = {"q_proj": "k_proj", "k_proj": "q_proj"}

    def wrong_rules(model_class, tower_prefix):
        swap = [
            conversion_clip.rename(
                f"text_model.encoder.layers.{{i}}.self_attn.{theirs}.{{p}}",
                f"text_model.encoder.layers.{{i}}.self_attn.{ours}.{{p}}",
            )
            for theirs, ours in swapped.items()
        ]
        others = [
            conversion_clip.rename(
                f"text_model.encoder.layers.{{i}}.{name}", f"text_model.encoder.layers.{{i}}.{name}"
            )
            for name in (
                "layer_norm1.{p}",
                "layer_norm2.{p}",
                "mlp.{name*}",
                "self_attn.v_proj.{p}",
                "self_attn.out_proj.{p}",
            )
        ]
        kept = [
            rule
            for rule in rules(model_class, tower_prefix)
            if rule.sources[0] != "text_model.encoder.layers.{i}.{name*}"
        ]
        return [*kept, *swap, *others]

    monkeypatch.setattr(conversion_clip, "transformers_rules", wrong_rules)
    assert main([*command[:3], str(tmp_path / "wrong"), "--check"]) == 1
    assert "disagrees with transformers" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("layout", ["transformers", "open_clip"])
def test_the_command_goes_back(tmp_path, layout, capsys):
    model, processor = our_model()
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    assert main(["convert", "clip", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", layout]) == 0
    built = read_clip(tmp_path / "theirs")[0].build().state_dict()
    assert all(torch.equal(tensor, built[name]) for name, tensor in model.state_dict().items())
    command = ["convert", "clip", str(tmp_path / "ours"), str(tmp_path / "other"), "--to", layout, "--check"]
    assert main(command) == 1
    assert "leave --check out" in capsys.readouterr().err


def test_the_command_pushes_a_folder_that_may_be_pushed(tmp_path, capsys, monkeypatch):
    source, out = published_folder(tmp_path / "source"), tmp_path / "out"
    pushed = []

    def push(folder, repo_id):
        check_folder(folder)
        pushed.append((folder, repo_id))
        return "https://hub.example/commit/1"

    monkeypatch.setattr(convert, "push_folder", push)
    assert main(["convert", "clip", str(source), str(out), "--push-to-hub", "someone/clip"]) == 0
    assert pushed == [(out, "someone/clip")]
    assert "https://hub.example/commit/1" in capsys.readouterr().out
    assert "someone/clip" in (out / "README.md").read_text()


@pytest.mark.parametrize("model", ["clip", "vit", "pic2word"])
def test_the_scripts_are_the_command(monkeypatch, capsys, model):
    script = Path(__file__).parents[3] / "conversion" / f"convert_{model}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(script), run_name="__main__")
    assert done.value.code == 0
    assert f"convert {model}" in capsys.readouterr().out
