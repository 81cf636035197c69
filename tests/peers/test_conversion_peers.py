"""Checkpoints that open_clip and timm write themselves, through the converters and back."""

import copy
import json

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("timm")

import numpy as np
import open_clip
import timm
import torch
from contract.cases import CONTEXT, pictures, tokenizer
from contract.published import flax_arrays, openai_state
from open_clip.model import convert_weights_to_fp16, set_model_preprocess_cfg
from open_clip.push_to_hf_hub import save_for_hf
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf as save_timm
from torch import nn

from hf_mm.cli import main
from hf_mm.models.clip import conversion_clip
from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.conversion_clip import config_from_open_clip, published_tokenizer, read_clip, save_as_open_clip
from hf_mm.models.clip.presets_clip import PRESETS
from hf_mm.models.vit import conversion_vit
from hf_mm.models.vit.configuration_vit import MMViTConfig
from hf_mm.models.vit.conversion_vit import read_vit, save_as_timm
from hf_mm.nn.patches import to_pair

from .parity import BOUNDS, output_errors, worst

VOCABULARY = len(tokenizer())
EVERY_DTYPE = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
EVERY_TOWER = pytest.mark.parametrize("tower", ["vit", "resnet"])
VISION = {
    "vit": {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32},
    "resnet": {"layers": [1, 2, 1, 1], "width": 8, "image_size": 64, "patch_size": None},
}
TEXT = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 64, "heads": 1, "layers": 2}
PREPROCESSING = {
    "mean": (0.4, 0.5, 0.6),
    "std": (0.3, 0.2, 0.3),
    "interpolation": "bilinear",
    "resize_mode": "shortest",
}


def perturbed(model: nn.Module) -> nn.Module:
    """In eval mode, every parameter and every statistic moved off its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def their_model(tower: str, quick_gelu: bool = False, custom_text: bool = False, **vision) -> tuple[nn.Module, dict]:
    config = {
        "embed_dim": 24,
        "quick_gelu": quick_gelu,
        "vision_cfg": {**VISION[tower], **vision},
        "text_cfg": dict(TEXT),
    }
    model = perturbed((open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**copy.deepcopy(config)))
    set_model_preprocess_cfg(model, {**PREPROCESSING, "size": model.visual.image_size})
    return model, {**config, "custom_text": True} if custom_text else config


def batch(model: nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures, and texts padded with zeros as open_clip's tokenizer does."""
    ids = torch.zeros(4, CONTEXT, dtype=torch.long)
    for row, length in zip(ids, (7, 3, 10, 5), strict=True):
        row[:length] = torch.tensor([VOCABULARY - 2, *torch.randint(1, VOCABULARY - 2, (length - 2,)), VOCABULARY - 1])
    return torch.randn(4, 3, *to_pair(model.visual.image_size), dtype=dtype), ids


@torch.no_grad()
def errors(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> dict[str, float]:
    ours, theirs = ours.to(dtype), copy.deepcopy(theirs).to(dtype)
    pixels, ids = batch(theirs, dtype)
    outputs = ours(input_ids=ids, pixel_values=pixels)
    images, texts = theirs.encode_image(pixels), theirs.encode_text(ids)
    return output_errors(
        {
            "image": outputs.vision_model_output.pooler_output,
            "text": outputs.text_model_output.pooler_output,
            "logits": outputs.logits_per_image,
        },
        {"image": images, "text": texts, "logits": theirs.get_logits(pixels, ids)[0]},
    )


# How open_clip, its training script and OpenAI's release store a model


def as_state_dict(model, config, folder):
    torch.save(model.state_dict(), folder / "model.pt")
    return folder / "model.pt"


def as_training_checkpoint(model, config, folder):
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer}, folder / "epoch_3.pt")
    return folder / "epoch_3.pt"


def as_folder(model, config, folder):
    save_for_hf(model, tokenizer(), config, folder / "repository", safe_serialization=True)
    return folder / "repository"


STORED = {"state dict": as_state_dict, "training": as_training_checkpoint, "folder": as_folder}


def read(source, folder, **options):
    tokenizer().save_pretrained(folder / "tokenizer")
    return read_clip(source, tokenizer=folder / "tokenizer", **options)


@EVERY_TOWER
@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("stored", STORED)
def test_from_open_clip_s_own_files(tmp_path, stored, tower, quick_gelu, custom_text):
    theirs, config = their_model(tower, quick_gelu, custom_text)
    source = STORED[stored](theirs, config, tmp_path)
    options = {} if stored == "folder" else {"activation": "quick_gelu" if quick_gelu else "gelu"}
    for dtype, bound in BOUNDS.items():
        conversion, processor = read(source, tmp_path, dtype=dtype, **options)
        assert worst(errors(conversion.build(), theirs, dtype)) <= (bound, "")
    mean = [0.4, 0.5, 0.6] if stored == "folder" else [0.48145466, 0.4578275, 0.40821073]
    assert list(processor.image_processor.image_mean) == mean


@EVERY_TOWER
def test_another_activation_is_noticed(tmp_path, tower):
    theirs, config = their_model(tower, quick_gelu=True)
    source = as_state_dict(theirs, config, tmp_path)
    model = read(source, tmp_path, activation="gelu")[0].build()
    assert errors(model, theirs, torch.float32)["text"] > 1e-4


@EVERY_TOWER
@pytest.mark.parametrize("how", ["script", "trace"])
def test_from_an_archive_like_openai_s(tmp_path, how, tower):
    """TorchScript with matrices in half precision, and three scalars beside the weights."""
    theirs, _ = their_model(tower, quick_gelu=True)
    convert_weights_to_fp16(theirs)
    theirs.float()  # the numbers are those of half precision
    stored = copy.deepcopy(theirs)
    pixels, ids = batch(theirs, torch.float32)
    archive = (
        torch.jit.script(stored) if how == "script" else torch.jit.trace(stored, (pixels, ids), check_trace=False)
    )
    convert_weights_to_fp16(stored)
    halves = {name for name, tensor in stored.state_dict().items() if tensor.dtype == torch.float16}
    assert "text_projection" in halves
    assert "ln_final.weight" not in halves
    for name, parameter in archive.named_parameters():
        if name in halves:
            parameter.data = parameter.data.half()
    archive.save(tmp_path / "archive.pt")
    for dtype, bound in BOUNDS.items():
        conversion, _ = read(tmp_path / "archive.pt", tmp_path, dtype=dtype, activation="quick_gelu")
        assert worst(errors(conversion.build(), theirs, dtype)) <= (bound, "")


@EVERY_DTYPE
def test_heads_and_mlps_that_only_a_config_tells(tmp_path, dtype):
    theirs, config = their_model("vit", width=48, head_width=12, mlp_ratio=4.3637)
    conversion, _ = read(as_folder(theirs, config, tmp_path), tmp_path, dtype=dtype)
    assert worst(errors(conversion.build(), theirs, dtype)) <= (BOUNDS[dtype], "")


@EVERY_TOWER
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clip_opens_what_is_written(tmp_path, tower, quick_gelu):
    theirs, config = their_model(tower, quick_gelu, mlp_ratio=4.3637)
    conversion, processor = read_clip(as_folder(theirs, config, tmp_path))
    model = conversion.build()
    folder = save_as_open_clip(model, processor, tmp_path / "back")
    again, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert type(again) is open_clip.CLIP
    state, expected = again.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert worst(errors(model, again.eval(), torch.float32)) <= (1e-5, "")

    for picture in pictures(3):
        ours = processor(images=picture).pixel_values[0]
        assert (ours - preprocess(picture)).abs().max() <= 1e-6
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    for text in ("two blue circles", "A yellow Triangle"):
        ids = processor(text=text).input_ids[0]
        assert torch.equal(tokenize(text)[0, : len(ids)], ids)


def test_the_published_vocabulary_needs_no_files(tmp_path):
    text = {**TEXT, "vocab_size": 49408, "context_length": 77}
    config = {"embed_dim": 24, "vision_cfg": VISION["vit"], "text_cfg": text}
    theirs = perturbed(open_clip.CLIP(**copy.deepcopy(config)))
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    conversion, processor = read_clip(tmp_path / "model.pt", activation="gelu")
    folder = save_as_open_clip(conversion.build(), processor, tmp_path / "back")
    assert {path.name for path in folder.iterdir()} == {"open_clip_model.safetensors", "open_clip_config.json"}
    tokenize, captions = (
        open_clip.get_tokenizer(f"local-dir:{folder}"),
        ["a photo of a cat", "“curly” &amp; naïve 123"],
    )
    for ids, ours in zip(tokenize(captions), published_tokenizer()(captions).input_ids, strict=True):
        assert ids[: len(ours)].tolist() == ours


# Sizes


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes_are_open_clip_s(name):
    """open_clip's own config of each name, and the names and shapes of the model that it builds from it."""
    declared = open_clip.get_model_config(name)
    preset = MMClipConfig.from_preset(name)
    declared["quick_gelu"] = preset.text_config.hidden_act == "quick_gelu"
    ours, theirs = config_from_open_clip(declared).to_dict(), preset.to_dict()
    for config in (ours["vision_config"], theirs["vision_config"]):
        config["depths"] = list(config.get("depths", []))
    assert ours == theirs
    with torch.device("meta"):
        built = open_clip.CLIP(**declared)
    shapes = {key: tuple(tensor.shape) for key, tensor in built.state_dict().items()}
    assert {key: tuple(tensor.shape) for key, tensor in openai_state(preset, "meta").items()} == shapes


# timm


def timm_model(**options) -> nn.Module:
    sizes = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 5, **options}
    return perturbed(timm.create_model("vit_tiny_patch16_224", **sizes))


@torch.no_grad()
def vit_errors(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> dict[str, float]:
    ours, theirs = ours.to(dtype), copy.deepcopy(theirs).to(dtype)
    pixels = torch.randn(3, 3, *theirs.patch_embed.img_size, dtype=dtype)
    trunk = getattr(ours, "vit", ours)(pixels)
    reference = {"tokens": theirs.forward_features(pixels), "outputs": theirs(pixels)}
    outputs = trunk.pooler_output if ours is getattr(ours, "vit", ours) else ours(pixels).logits
    return output_errors({"tokens": trunk.last_hidden_state, "outputs": outputs}, reference)


MODELS = {
    "classifier": {},
    "trunk": {"num_classes": 0},
    "mean": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "no bias": {"qkv_bias": False},
    "tanh": {"act_layer": "gelu_tanh"},
    "rectangle": {"img_size": (32, 64), "num_heads": 4},
}


@pytest.mark.parametrize("kind", MODELS)
def test_from_timm_s_own_folder_and_back(tmp_path, kind):
    theirs = timm_model(**MODELS[kind])
    rectangle = kind == "rectangle"
    preprocessing = {"crop_mode": "squash", "crop_pct": 1.0} if rectangle else {}
    save_timm(theirs, tmp_path / "theirs", safe_serialization=True, data_config=preprocessing or None)
    for dtype, bound in BOUNDS.items():
        conversion, processor = read_vit(tmp_path / "theirs", dtype=dtype)
        assert worst(vit_errors(conversion.build(), theirs, dtype)) <= (bound, "")
    model = read_vit(tmp_path / "theirs")[0].build()
    folder = save_as_timm(model, processor, tmp_path / "back")
    assert load_file(folder / "model.safetensors").keys() == theirs.state_dict().keys()
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    state, expected = again.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert worst(vit_errors(model, again, torch.float32)) <= (1e-5, "")

    transform = create_transform(**resolve_data_config({}, model=again), is_training=False)
    for picture in pictures(3):
        ours = processor(picture, return_tensors="pt").pixel_values[0]
        assert (ours - transform(picture)).abs().max() <= 1e-6


@pytest.mark.parametrize("linen", [False, True])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_authors_files_as_timm_reads_them(tmp_path, pooling, linen):
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    config = MMViTConfig(**sizes, image_size=32, patch_size=8, pooling=pooling)
    prefix = "params/" if linen else ""
    np.savez(tmp_path / "vit.npz", **flax_arrays(config, 7, prefix=prefix, linen=linen, big_vision=linen))
    poolings = {"cls": {}, "mean": {"class_token": False, "global_pool": "avg", "fc_norm": False}}
    theirs = timm.models.VisionTransformer(
        **poolings[pooling],
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=4,
        mlp_ratio=2,
        num_classes=7,
        act_layer="gelu_tanh",
    ).eval()
    theirs.load_pretrained(str(tmp_path / "vit.npz"))
    for dtype, bound in BOUNDS.items():
        conversion, _ = read_vit(tmp_path / "vit.npz", dtype=dtype)
        assert worst(vit_errors(conversion.build(), theirs, dtype)) <= (bound, "")


# The command's own check


@EVERY_TOWER
@pytest.mark.parametrize("custom_text", [False, True])
def test_the_check_of_a_clip(tmp_path, tower, custom_text, capsys):
    theirs, config = their_model(tower, True, custom_text)
    source, out = as_folder(theirs, config, tmp_path), tmp_path / "out"
    assert main(["convert", "clip", str(source), str(out), "--check"]) == 0, capsys.readouterr().err
    assert "open_clip: image embeddings" in capsys.readouterr().out
    assert (out / "README.md").is_file()


def test_the_check_of_a_clip_finds_another_activation(tmp_path, capsys, monkeypatch):
    theirs, config = their_model("vit", quick_gelu=True)
    source, out = as_folder(theirs, config, tmp_path), tmp_path / "out"

    def without_quick_gelu(model_cfg):
        return config_from_open_clip({**model_cfg, "quick_gelu": False})

    monkeypatch.setattr(conversion_clip, "config_from_open_clip", without_quick_gelu)
    assert main(["convert", "clip", str(source), str(out), "--check"]) == 1
    assert "disagrees with open_clip" in capsys.readouterr().err
    assert not out.exists()


def test_the_check_of_timm_s_and_of_the_authors_files(tmp_path, capsys):
    save_timm(timm_model(), tmp_path / "theirs", safe_serialization=True)
    config = MMViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    config.image_size, config.patch_size, config.pre_logits = 32, 8, True
    np.savez(tmp_path / "vit.npz", **flax_arrays(config, 7))
    for source in ("theirs", "vit.npz"):
        command = ["convert", "vit", str(tmp_path / source), str(tmp_path / f"out of {source}"), "--check"]
        assert main(command) == 0, capsys.readouterr().err
        assert "difference from timm: tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("what", "wrong"), [("_timm_heads", 2), ("_timm_activation", "quick_gelu")])
def test_the_check_of_a_vit_finds_other_heads_and_another_activation(tmp_path, capsys, monkeypatch, what, wrong):
    save_timm(timm_model(embed_dim=128, num_heads=4), tmp_path / "theirs", safe_serialization=True)
    command = ["convert", "vit", str(tmp_path / "theirs"), str(tmp_path / "out"), "--check"]
    with monkeypatch.context() as patch:
        patch.setattr(conversion_vit, what, lambda *arguments: wrong)
        assert main(command) == 1
    assert "disagrees with timm" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(command) == 0, capsys.readouterr().err
    assert "cannot verify" not in capsys.readouterr().out


@pytest.mark.parametrize(("option", "value"), [("--heads", "2"), ("--activation", "quick_gelu")])
def test_what_timm_s_folder_declares_cannot_be_given_otherwise(tmp_path, capsys, option, value):
    save_timm(timm_model(embed_dim=192, num_heads=3), tmp_path / "theirs", safe_serialization=True)
    assert main(["convert", "vit", str(tmp_path / "theirs"), str(tmp_path / "out"), option, value]) == 1
    assert f"leave {option} out" in capsys.readouterr().err


def test_the_check_says_what_it_cannot_verify(tmp_path, capsys):
    torch.save(timm_model().state_dict(), tmp_path / "vit.pt")
    theirs, config = their_model("vit", quick_gelu=True)
    as_state_dict(theirs, config, tmp_path)
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    clip = ["clip", str(tmp_path / "model.pt"), str(tmp_path / "clip"), "--tokenizer", str(tmp_path / "tokenizer")]
    vit = ["vit", str(tmp_path / "vit.pt"), str(tmp_path / "vit")]
    for peer, command in (("timm", vit), ("open_clip", clip)):
        assert main(["convert", *command, "--activation", "gelu", "--check"]) == 0, capsys.readouterr().err
        said = (
            f"difference from {peer}, built with the heads and activation that were given, which this cannot verify: "
        )
        assert said in capsys.readouterr().out


def test_a_model_that_timm_does_not_know_is_one_sentence(tmp_path, capsys):
    save_timm(timm_model(), tmp_path / "theirs", safe_serialization=True)
    declared = json.loads((tmp_path / "theirs" / "config.json").read_text())
    declared["architecture"] = "vit_of_the_future_patch16_224"
    declared["model_args"] |= {"act_layer": "gelu"}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(declared))
    assert main(["convert", "vit", str(tmp_path / "theirs"), str(tmp_path / "out"), "--check"]) == 1
    assert "timm's own model of the checkpoint, which it does not build (Unknown model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
