"""Published ViT checkpoints: what is read from them, what is refused, and the way back."""

import json
import re

import numpy as np
import pytest
import torch
from contract.cases import PICTURE, largest_error, pictures
from contract.published import flax_arrays
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification, ViTModel

from hf_mm.cli import main
from hf_mm.conversion import layouts
from hf_mm.conversion import pictures as pictures_of_configs
from hf_mm.conversion.checkpoint import Checkpoint, Origin
from hf_mm.conversion.engine import export
from hf_mm.conversion.layouts import published_heads
from hf_mm.conversion.rules import ConversionError
from hf_mm.models.vit import conversion_vit
from hf_mm.models.vit.configuration_vit import MMViTConfig
from hf_mm.models.vit.conversion_vit import (
    VARIANTS,
    flax_rules,
    image_processor_from_timm,
    image_processor_from_transformers,
    read_vit,
    save_as_timm,
    save_as_transformers,
    timm_arguments,
    timm_preprocessing,
    timm_rules,
    transformers_config,
    transformers_rules,
)
from hf_mm.models.vit.image_processing_vit import MMViTImageProcessorPil
from hf_mm.models.vit.modeling_vit import MMViTForImageClassification, MMViTModel

CLASSES = 5
LABELS = ("id2label", "label2id")
STYLES = {
    "original": {},
    "optimizer": {"prefix": "opt/target/"},
    "linen": {"prefix": "params/", "linen": True},
    "big_vision": {"prefix": "params/img/", "linen": True, "big_vision": True},
}


def tiny_config(**changes) -> MMViTConfig:
    return MMViTConfig(**{**PICTURE, **changes})


def as_checkpoint(tensors, configs=None) -> Checkpoint:
    tensors = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in tensors.items()
    }
    return Checkpoint(tensors, configs or {}, (Origin("published"),))


def our_model(model_class=MMViTForImageClassification, **changes):
    """A tiny model in eval mode, every parameter moved off its initial value."""
    model = model_class(tiny_config(**{"num_labels": CLASSES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_bit_equal(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


# The authors' files


def flax_forward(arrays: dict[str, np.ndarray], pixels: np.ndarray, patch: int, prefix: str) -> np.ndarray:
    """The published equations in float64 on the published arrays, with pictures (B, H, W, 3); logits or pooled features."""
    arrays = {name.removeprefix(prefix): array.astype(np.float64) for name, array in arrays.items()}

    def find(*endings: str) -> np.ndarray:
        (name,) = [name for name in arrays if any(name.endswith(ending) for ending in endings)]
        return arrays[name]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]

    def gelu(x):
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    batch, height, width, _ = pixels.shape
    tiles = pixels.reshape(batch, height // patch, patch, width // patch, patch, 3)
    x = np.einsum("bipjqc,pqcd->bijd", tiles, arrays["embedding/kernel"]) + arrays["embedding/bias"]
    x = x.reshape(batch, -1, x.shape[-1])
    if "cls" in arrays:
        x = np.concatenate([np.repeat(arrays["cls"], batch, axis=0), x], axis=1)
    x = x + find("pos_embedding")
    for number in range(len({name.split("/")[1] for name in arrays if "encoderblock" in name})):
        block = f"Transformer/encoderblock_{number}"
        members = {name.split("/")[2] for name in arrays if name.startswith(block)}
        first, second = sorted(name for name in members if name.startswith("LayerNorm"))
        (attention,) = (f"{block}/{name}" for name in members if name.startswith("MultiHead"))
        (mlp,) = (f"{block}/{name}" for name in members if name.startswith("Mlp"))
        y = norm(x, f"{block}/{first}")
        q, k, v = (
            np.einsum("btd,dhe->bhte", y, arrays[f"{attention}/{part}/kernel"])
            + arrays[f"{attention}/{part}/bias"][:, None]
            for part in ("query", "key", "value")
        )
        scores = np.einsum("bhte,bhse->bhts", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("bhts,bhse->bthe", weights, v)
        x = x + np.einsum("bthe,hed->btd", mixed, arrays[f"{attention}/out/kernel"]) + arrays[f"{attention}/out/bias"]
        y = norm(x, f"{block}/{second}")
        y = gelu(y @ arrays[f"{mlp}/Dense_0/kernel"] + arrays[f"{mlp}/Dense_0/bias"])
        x = x + y @ arrays[f"{mlp}/Dense_1/kernel"] + arrays[f"{mlp}/Dense_1/bias"]
    x = norm(x, "Transformer/encoder_norm")
    x = x[:, 0] if "cls" in arrays else x.mean(axis=1)
    if "pre_logits/kernel" in arrays:
        x = np.tanh(x @ arrays["pre_logits/kernel"] + arrays["pre_logits/bias"])
    return x @ arrays["head/kernel"] + arrays["head/bias"] if "head/kernel" in arrays else x


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("changes", "classes"),
    [({}, CLASSES), ({"pre_logits": True}, CLASSES), ({"pooling": "mean"}, CLASSES), ({"pre_logits": True}, 0)],
    ids=["classifier", "pre_logits", "mean", "trunk"],
)
def test_a_file_of_the_authors_computes_their_equations(tmp_path, style, changes, classes):
    config = tiny_config(num_attention_heads=3, **changes)
    arrays = flax_arrays(config, classes, **STYLES[style])
    np.savez(tmp_path / "ViT-B_16.npz", **arrays)
    conversion, _ = read_vit(tmp_path / "ViT-B_16.npz", dtype=torch.float64)
    model = conversion.build()
    assert type(model) is (MMViTForImageClassification if classes else MMViTModel)
    numerics = (model.config.hidden_act, model.config.layer_norm_eps, model.config.pos_embed_interpolation)
    assert numerics == ("gelu_pytorch_tanh", 1e-6, "bilinear_corners")
    pixels = np.random.default_rng(1).standard_normal((2, 32, 32, 3))
    with torch.no_grad():
        outputs = model(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    ours = outputs.logits if classes else outputs.pooler_output
    theirs = flax_forward(arrays, pixels, config.patch_size, STYLES[style].get("prefix", ""))
    assert largest_error(ours, torch.from_numpy(theirs)) <= 1e-9


@pytest.mark.parametrize("style", STYLES)
def test_a_file_of_the_authors_there_and_back(style):
    config = tiny_config(num_attention_heads=3, pre_logits=True)
    arrays = flax_arrays(config, CLASSES, **STYLES[style])
    model = read_vit(as_checkpoint(arrays))[0].build()
    options = dict(STYLES[style])
    prefix = options.pop("prefix", "")
    if options.pop("big_vision", False):
        options["positions"] = "pos_embedding"
    back = export(model, flax_rules(model.config, type(model), **options))
    assert_bit_equal(back, {name.removeprefix(prefix): torch.from_numpy(array) for name, array in arrays.items()})


def test_what_lies_beside_the_vision_transformer_is_left_out_and_named(tmp_path, warned):
    """LiT and SigLIP have a text tower and a temperature beside it; training files an optimiser's state."""
    for style, beside in (
        ("big_vision", {"params/txt/Encoder_0/encoderblock_0/w": 3, "params/t": 1}),
        ("optimizer", {"opt/state/param_states/Transformer/encoderblock_0/LayerNorm_0/scale/grad_ema": 3}),
    ):
        warned.clear()
        arrays = flax_arrays(tiny_config(), CLASSES, **STYLES[style])
        others = {name: np.zeros(size, np.float32) for name, size in beside.items()}
        np.savez(tmp_path / f"{style}.npz", **others, **arrays)
        model = read_vit(tmp_path / f"{style}.npz")[0].build()
        assert_bit_equal(model.state_dict(), read_vit(as_checkpoint(arrays))[0].build().state_dict())
        (warning,) = warned.messages
        assert STYLES[style]["prefix"] in warning
        assert all(name in warning for name in beside)


def test_two_vision_transformers_in_a_file_are_refused():
    arrays = {}
    for prefix in ("teacher/", "student/"):
        arrays |= flax_arrays(tiny_config(), CLASSES, prefix=prefix)
    with pytest.raises(ConversionError, match="student/, teacher/"):
        read_vit(as_checkpoint(arrays))


def test_numbers_of_bfloat16_in_an_npz(tmp_path):
    arrays = flax_arrays(tiny_config(), CLASSES)
    halves = {name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}
    np.savez(
        tmp_path / "vit.npz", **{name: half.view(torch.int16).numpy().view("V2") for name, half in halves.items()}
    )
    model = read_vit(tmp_path / "vit.npz")[0].build()
    assert_bit_equal(model.state_dict(), read_vit(as_checkpoint(halves))[0].build().state_dict())


def test_a_rectangular_picture_has_to_be_said():
    arrays = flax_arrays(tiny_config(image_size=(32, 48)), CLASSES)
    with pytest.raises(ValueError, match="24 patches.*--image-size"):
        read_vit(as_checkpoint(arrays))
    conversion, processor = read_vit(as_checkpoint(arrays), image_size=(32, 48))
    assert conversion.empty.config.image_size == [32, 48]
    assert processor(pictures(1), return_tensors="pt").pixel_values.shape == (1, 3, 32, 48)
    with pytest.raises(ValueError, match="24x24.*3x3.*24"):
        read_vit(as_checkpoint(arrays), image_size=(24, 24))


def test_pictures_of_the_authors_are_resized_without_antialiasing():
    _, processor = read_vit(as_checkpoint(flax_arrays(tiny_config(), CLASSES)))
    reference = MMViTImageProcessorPil(size={"height": 32, "width": 32}, antialias=False)
    assert processor.to_dict() == reference.to_dict()


@pytest.mark.parametrize("damage", ["truncated", "text", "objects", "missing"])
def test_a_damaged_npz_is_one_sentence(tmp_path, damage):
    path = tmp_path / "weights.npz"
    arrays = flax_arrays(tiny_config(), CLASSES)
    if damage == "objects":
        arrays["cls"] = np.array([{"a": 1}], dtype=object)
    np.savez(path, **arrays)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    elif damage == "text":
        path.write_text("not found")
    elif damage == "missing":
        path.unlink()
    with pytest.raises((ValueError, OSError), match=r"weights\.npz") as refusal:
        read_vit(path)
    assert "\n" not in str(refusal.value)


# What is refused


@pytest.mark.parametrize("part", VARIANTS)
def test_variants_are_refused_by_name(part):
    arrays = {**flax_arrays(tiny_config(), CLASSES), f"x.{part}y": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=re.escape(VARIANTS[part]) + r".*" + re.escape(part)):
        read_vit(as_checkpoint(arrays))


def test_what_is_no_vit_is_refused_with_its_names():
    with pytest.raises(ConversionError, match=r"layer1\.0\.conv1\.weight"):
        read_vit(as_checkpoint({"layer1.0.conv1.weight": torch.zeros(3)}))


@pytest.mark.parametrize(
    "name", ["embedding/kernel", "Transformer/posembed_input/pos_embedding", "head/kernel", "cls"]
)
def test_a_missing_array_is_named(name):
    arrays = flax_arrays(tiny_config(), CLASSES)
    del arrays[name]
    ours = {"head/kernel": "classifier.weight", "cls": "--image-size"}
    with pytest.raises(ValueError, match=re.escape(ours.get(name, name))):
        read_vit(as_checkpoint(arrays))


@pytest.mark.parametrize(
    ("layout", "option"),
    [
        ("authors", {"activation": "gelu"}),
        ("authors", {"num_attention_heads": 3}),
        ("transformers", {"activation": "gelu"}),
        ("transformers", {"image_size": (32, 32)}),
    ],
)
def test_options_that_checkpoints_tell_themselves_are_refused(tmp_path, layout, option):
    source = as_checkpoint(flax_arrays(tiny_config(), CLASSES))
    if layout == "transformers":
        their_model().save_pretrained(tmp_path)
        source = tmp_path
    with pytest.raises(ValueError, match=rf"{layout} layout tell {next(iter(option))} themselves"):
        read_vit(source, **option)


# transformers


def their_model(model_class=ViTForImageClassification, **changes):
    config = transformers_config(tiny_config(**changes), MMViTModel)
    config.num_labels = CLASSES
    theirs = model_class(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return theirs


def test_labels_and_dropout_of_transformers_are_kept(tmp_path):
    theirs = their_model(hidden_dropout=0.1, attention_dropout=0.2, qkv_bias=False)
    theirs.config.id2label = {number: f"class {number}" for number in range(CLASSES)}
    theirs.config.label2id = {label: number for number, label in theirs.config.id2label.items()}
    theirs.config.problem_type = "multi_label_classification"
    theirs.save_pretrained(tmp_path)
    config = read_vit(tmp_path)[0].empty.config
    assert config.id2label == theirs.config.id2label
    assert config.label2id == theirs.config.label2id
    assert config.problem_type == "multi_label_classification"
    assert (config.hidden_dropout, config.attention_dropout, config.qkv_bias) == (0.1, 0.2, False)
    assert config.pos_embed_interpolation == "bicubic"


@pytest.mark.parametrize("model_class", [ViTForImageClassification, ViTModel])
def test_the_names_in_memory_are_read_too(tmp_path, model_class):
    theirs = their_model(model_class)
    theirs.save_pretrained(tmp_path)
    on_disk = read_vit(tmp_path)[0].build().state_dict()
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    assert state.keys() != load_file(tmp_path / "model.safetensors").keys()
    save_file(state, tmp_path / "model.safetensors")
    assert_bit_equal(read_vit(tmp_path)[0].build().state_dict(), on_disk)


def test_names_of_transformers_need_their_config(tmp_path):
    their_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json of type vit"):
        read_vit(tmp_path / "model.safetensors")


def test_another_pooler_is_refused(tmp_path):
    theirs = their_model(ViTModel)
    theirs.config.pooler_act = "relu"
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="relu"):
        read_vit(tmp_path)


def test_a_classifier_does_not_run_a_pooler_that_its_file_has(tmp_path, warned):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state |= {"vit.pooler.dense.weight": torch.randn(48, 48), "vit.pooler.dense.bias": torch.randn(48)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = read_vit(tmp_path)[0].build()
    assert not model.config.pre_logits
    assert "vit.pooler.dense.bias, vit.pooler.dense.weight" in warned.text
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        reference = ViTForImageClassification.from_pretrained(tmp_path)(pixels).logits
        assert largest_error(model(pixels).logits, reference) <= 1e-5


def test_preprocessing_of_transformers():
    old = {"size": 40, "resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_processor_type": "ViTFeatureExtractor"}
    new = {**old, "size": {"height": 40, "width": 40}}
    expected = MMViTImageProcessorPil(size=new["size"], image_mean=[0.1, 0.2, 0.3])
    for declared in (old, new):
        found = image_processor_from_transformers({"preprocessor_config.json": declared}, 224)
        assert found.to_dict() == expected.to_dict()
    default = image_processor_from_transformers({}, [32, 48])
    assert default.to_dict() == MMViTImageProcessorPil(size={"height": 32, "width": 48}).to_dict()


@pytest.mark.parametrize("model_class", [MMViTForImageClassification, MMViTModel])
def test_transformers_opens_what_is_written(tmp_path, model_class):
    model = our_model(model_class, pre_logits=model_class is MMViTModel, pos_embed_interpolation="bicubic")
    processor = MMViTImageProcessorPil(size={"height": 32, "width": 32}, image_std=[0.3, 0.4, 0.5])
    folder = save_as_transformers(model, processor, tmp_path / "theirs")
    peer_class = ViTModel if model_class is MMViTModel else ViTForImageClassification
    theirs, loading = peer_class.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    their_processor = AutoImageProcessor.from_pretrained(folder)
    batch = processor(pictures(1), return_tensors="pt")
    assert (batch.pixel_values - their_processor(pictures(1), return_tensors="pt").pixel_values).abs().max() <= 1e-5
    with torch.no_grad():
        ours, reference = model(**batch), theirs(**batch)
    for name in ours.keys() & reference.keys():
        assert largest_error(ours[name], reference[name]) <= 1e-5
    conversion, again = read_vit(folder)
    assert_bit_equal(conversion.build().state_dict(), model.state_dict())
    assert again.to_dict() == processor.to_dict()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pooling": "mean"}, "pooling = 'mean'"),
        ({"stem": "conv", "stem_num_groups": 4}, "stem = 'conv'"),
        ({"patch_size": (8, 16)}, r"patch_size = .8, 16"),
        ({"pre_logits": True}, "pre_logits under a classifier"),
    ],
)
def test_what_transformers_cannot_be_is_named_and_nothing_written(tmp_path, changes, named):
    processor = MMViTImageProcessorPil(size={"height": 32, "width": 32})
    with pytest.raises(ValueError, match=named):
        save_as_transformers(our_model(**changes), processor, tmp_path / "theirs")
    assert not list(tmp_path.iterdir())


# timm


def timm_state(model) -> dict[str, torch.Tensor]:
    """The model's weights under timm's names, moved by hand."""
    ours = model.state_dict()
    trunk = "vit." if isinstance(model, MMViTForImageClassification) else ""
    state = {
        "pos_embed": ours[f"{trunk}embeddings.position_embeddings"],
        "patch_embed.proj.weight": ours[f"{trunk}embeddings.patch_embeddings.weight"],
        "patch_embed.proj.bias": ours[f"{trunk}embeddings.patch_embeddings.bias"],
        "norm.weight": ours[f"{trunk}layernorm.weight"],
        "norm.bias": ours[f"{trunk}layernorm.bias"],
    }
    if model.config.pooling == "cls":
        state["cls_token"] = ours[f"{trunk}embeddings.cls_token"]
    if trunk:
        state |= {"head.weight": ours["classifier.weight"], "head.bias": ours["classifier.bias"]}
    for number in range(model.config.num_hidden_layers):
        layer, block = f"{trunk}encoder.layers.{number}", f"blocks.{number}"
        for kind in ("weight", "bias"):
            for theirs, name in (
                ("norm1", "layer_norm1"),
                ("attn.proj", "self_attn.out_proj"),
                ("norm2", "layer_norm2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                state[f"{block}.{theirs}.{kind}"] = ours[f"{layer}.{name}.{kind}"]
            parts = [ours.get(f"{layer}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            if parts[0] is not None:
                state[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return state


TIMM = {"hidden_size": 128, "intermediate_size": 320, "hidden_act": "gelu", "layer_norm_eps": 1e-6}


@pytest.mark.parametrize("model_class", [MMViTForImageClassification, MMViTModel])
@pytest.mark.parametrize("changes", [{}, {"pooling": "mean"}, {"qkv_bias": False}], ids=["cls", "mean", "no bias"])
def test_timm_s_names_there_and_back(model_class, changes):
    model = our_model(model_class, **TIMM, pos_embed_interpolation="bicubic_antialias", **changes)
    state = timm_state(model)
    conversion, _ = read_vit(as_checkpoint(state), activation="gelu")
    built = conversion.build()
    assert type(built) is model_class
    assert_bit_equal(built.state_dict(), model.state_dict())
    assert_bit_equal(export(built, timm_rules(model_class)), state)
    ignored = {
        "architectures",
        "dtype",
        "_name_or_path",
        *([] if model_class is MMViTForImageClassification else LABELS),
    }
    ours, theirs = (
        {key: value for key, value in m.config.to_dict().items() if key not in ignored} for m in (built, model)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("declared", "activation"),
    [
        ({"architecture": "vit_base_patch16_224"}, "gelu"),
        ({"architecture": "vit_small_patch16_gap_224"}, "gelu"),
        ({"architecture": "vit_base_patch16_224", "model_args": {"act_layer": "gelu_tanh"}}, "gelu_pytorch_tanh"),
        (
            {"architecture": "vit_so400m_patch14_siglip_gap_224", "model_args": {"act_layer": "quick_gelu"}},
            "quick_gelu",
        ),
    ],
)
def test_the_activation_that_timm_declares(declared, activation):
    checkpoint = as_checkpoint(timm_state(our_model(**TIMM)), {"config.json": declared})
    for given in (None, activation):
        assert read_vit(checkpoint, activation=given)[0].empty.config.hidden_act == activation
    other = "quick_gelu" if activation != "quick_gelu" else "gelu"
    with pytest.raises(ValueError, match=f"config.json declares activation = '{activation}': leave --activation out"):
        read_vit(checkpoint, activation=other)


@pytest.mark.parametrize(
    ("declared", "given", "named"),
    [
        ({"model_args": {"num_heads": 4}}, {"num_attention_heads": 2}, "declares num_heads = 4: leave --heads out"),
        (
            {"architecture": "vit_base_patch16_224"},
            {"num_attention_heads": 4},
            "vit_base_patch16_224 in config.json declares num_heads = 2: leave --heads out",
        ),
        (
            {"model_args": {"img_size": [32, 32]}},
            {"image_size": (16, 64)},
            r"declares img_size = \(32, 32\): leave --image-size out",
        ),
    ],
)
def test_what_timm_declares_is_not_given_otherwise(declared, given, named):
    checkpoint = as_checkpoint(timm_state(our_model(**TIMM)), {"config.json": declared})
    activation = None if "architecture" in declared else "gelu"
    with pytest.raises(ValueError, match=named):
        read_vit(checkpoint, activation=activation, **given)


@pytest.fixture
def warned(caplog, monkeypatch):
    for logger in (conversion_vit.logger, layouts.logger, pictures_of_configs.logger):
        monkeypatch.setattr(logger, "propagate", True)
        monkeypatch.setattr(logger.parent, "propagate", True)
    return caplog


def test_a_lone_file_in_timm_s_names_is_asked_about_and_what_is_assumed_is_said(tmp_path, warned):
    save_file(timm_state(our_model(**TIMM)), tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"config\.json, or pass --activation"):
        read_vit(tmp_path / "file.safetensors")
    _, processor = read_vit(tmp_path / "file.safetensors", activation="gelu")
    (warning,) = warned.messages
    for value in (
        "mean = (0.5, 0.5, 0.5)",
        "std = (0.5",
        "crop_pct = 0.9",
        "crop_mode = center",
        "interpolation = bic",
    ):
        assert value in warning
    assert list(processor.image_mean) == [0.5, 0.5, 0.5]


def test_only_what_timm_leaves_open_is_assumed(warned):
    declared = {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3]}
    image_processor_from_timm({**declared, "std": [0.1, 0.2, 0.3]}, 32)
    assert not warned.messages
    image_processor_from_timm(declared, 32)
    (warning,) = warned.messages
    assert "std = (0.5" in warning
    assert "mean" not in warning


def test_the_older_config_of_timm_declares_pictures_at_its_top(warned):
    pictures_of = {
        "crop_mode": "squash",
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
    }
    declared = {"architecture": "vit_base_patch16_224", **pictures_of}
    _, processor = read_vit(as_checkpoint(timm_state(our_model(**TIMM)), {"config.json": declared}))
    assert list(processor.image_mean) == [0.1] * 3
    assert not warned.messages


@pytest.mark.parametrize(
    ("declared", "named"),
    [
        ({"architecture": "vit_so400m_patch14_siglip_gap_224"}, "vit_so400m_patch14_siglip_gap_224.*--activation"),
        ({"model_args": {"act_layer": "swish"}}, "'swish'"),
        ({"model_args": {"norm_layer": "rmsnorm"}}, "norm_layer = 'rmsnorm'"),
        ({"global_pool": "avg"}, "'avg' with a class token"),
        ({"model_args": {"num_heads": 2}}, "timm's model has.*--activation"),
    ],
)
def test_what_timm_builds_otherwise_is_named(declared, named):
    checkpoint = as_checkpoint(timm_state(our_model(**TIMM)), {"config.json": declared})
    with pytest.raises(ValueError, match=named):
        read_vit(checkpoint)


def test_heads_of_timm_s_models():
    assert [published_heads(width) for width in (192, 384, 768, 1024, 1280, 1408, 1664)] == [3, 6, 12, 16, 16, 16, 16]
    model = our_model(hidden_act="gelu")
    checkpoint = as_checkpoint(timm_state(model))
    with pytest.raises(ConversionError, match="48.*heads"):
        read_vit(checkpoint, activation="gelu")
    given = read_vit(checkpoint, num_attention_heads=3, activation="gelu")[0]
    assert given.empty.config.num_attention_heads == 3
    declared = as_checkpoint(timm_state(model), {"config.json": {"model_args": {"num_heads": 4, "act_layer": "gelu"}}})
    assert read_vit(declared)[0].empty.config.num_attention_heads == 4


def test_a_class_token_without_position_is_refused():
    state = timm_state(our_model(**TIMM))
    state["pos_embed"] = state["pos_embed"][:, 1:]
    with pytest.raises(ValueError, match="no_embed_class"):
        read_vit(as_checkpoint(state), activation="gelu")


def test_preprocessing_of_timm():
    declared = {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    }
    processor = image_processor_from_timm(declared, 224)
    assert processor.size["shortest_edge"] == 256
    assert (processor.crop_size["height"], processor.crop_size["width"]) == (224, 224)
    assert timm_preprocessing(processor, 224) == declared
    assert image_processor_from_timm({}, 384).size["shortest_edge"] == 426
    squashed = image_processor_from_timm({"crop_mode": "squash", "crop_pct": 1.0}, (32, 48))
    assert squashed(pictures(1), return_tensors="pt").pixel_values.shape == (1, 3, 32, 48)
    assert timm_preprocessing(squashed, (32, 48))["crop_mode"] == "squash"
    for wrong in ({"crop_mode": "border"}, {"interpolation": "lanczos"}):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))):
            image_processor_from_timm(wrong, 224)


def test_the_part_that_is_cropped_gives_the_size_it_came_from():
    for resized in range(224, 300):
        size = {"size": {"shortest_edge": resized}, "crop_size": 224, "do_center_crop": True}
        declared = timm_preprocessing(MMViTImageProcessorPil(**size, resample=Image.Resampling.BICUBIC), 224)
        assert int(224 / declared["crop_pct"]) == resized
        assert image_processor_from_timm(declared, 224).size["shortest_edge"] == resized


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stem": "conv", "stem_num_groups": 4}, "stem = 'conv'"),
        ({"pre_logits": True}, "pre_logits"),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps = 1e-12"),
        ({"hidden_act": "relu"}, "'relu'"),
    ],
)
def test_what_timm_cannot_be_is_named(changes, named):
    with pytest.raises(ValueError, match=named):
        timm_arguments(tiny_config(**changes))


def test_timm_s_folder_comes_back(tmp_path):
    model = our_model(hidden_act="gelu", image_size=(32, 48), pos_embed_interpolation="bicubic_antialias")
    processor = MMViTImageProcessorPil(size={"height": 32, "width": 48}, resample=3, image_std=[0.3, 0.4, 0.5])
    folder = save_as_timm(model, processor, tmp_path / "theirs")
    conversion, again = read_vit(folder)
    assert_bit_equal(conversion.build().state_dict(), model.state_dict())
    assert conversion.empty.config.image_size == [32, 48]
    assert conversion.empty.config.num_attention_heads == 2
    batch, expected = (prepare(pictures(3), return_tensors="pt").pixel_values for prepare in (again, processor))
    assert torch.equal(batch, expected)


def test_pictures_that_timm_cannot_prepare_leave_nothing(tmp_path):
    processor = MMViTImageProcessorPil(size={"height": 32, "width": 32}, antialias=False)
    with pytest.raises(ValueError, match="timm cannot express"):
        save_as_timm(our_model(hidden_act="gelu"), processor, tmp_path / "theirs")
    assert not list(tmp_path.iterdir())


# Damaged configs


MISTYPED = {
    "timm": [
        {"architecture": 3, "model_args": {"act_layer": None}},
        {"model_args": "x"},
        {"model_args": {"num_heads": "2"}},
        {"model_args": {"num_heads": 7}},
        {"model_args": {"img_size": "x"}},
        {"model_args": {"act_layer": ["gelu"]}},
        {"pretrained_cfg": "x"},
        {"pretrained_cfg": {"crop_pct": "x"}},
        {"pretrained_cfg": {"crop_pct": 0}},
        {"pretrained_cfg": {"mean": "x"}},
        {"pretrained_cfg": {"std": [0.5, 0.5]}},
        {"pretrained_cfg": {"interpolation": 3}},
    ],
    "transformers": [
        {"model_type": 3},
        {"hidden_size": "48"},
        {"hidden_size": 0},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"num_hidden_layers": -1},
        {"hidden_act": "x"},
        {"image_size": "x"},
        {"patch_size": 0},
        {"layer_norm_eps": "x"},
        {"id2label": 3},
    ],
}


@pytest.mark.parametrize(
    ("layout", "change"), [(layout, change) for layout in MISTYPED for change in MISTYPED[layout]]
)
def test_a_damaged_config_is_one_sentence(tmp_path, layout, change, capsys):
    if layout == "timm":
        folder = save_as_timm(
            our_model(**TIMM), MMViTImageProcessorPil(size={"height": 32, "width": 32}), tmp_path / "x"
        )
    else:
        folder = tmp_path / "x"
        their_model().save_pretrained(folder)
    declared = json.loads((folder / "config.json").read_text())
    for name, value in change.items():
        declared[name] = {**declared.get(name, {}), **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(declared))
    capsys.readouterr()
    assert main(["convert", "vit", str(folder), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "declared", [{"image_mean": "x"}, {"size": "x"}, {"resample": "x"}, {"image_std": [1.0, 1.0]}]
)
def test_a_damaged_preprocessor_config_is_one_sentence(tmp_path, declared):
    their_model().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(declared))
    with pytest.raises(ValueError, match=r"^preprocessor_config\.json [^\n]*$"):
        read_vit(tmp_path)


# The command


def test_the_command_writes_a_folder_that_opens(tmp_path, capsys):
    np.savez(tmp_path / "ViT-B_16.npz", **flax_arrays(tiny_config(), CLASSES))
    out = tmp_path / "out"
    assert main(["convert", "vit", str(tmp_path / "ViT-B_16.npz"), str(out)]) == 0
    model, processor = AutoModelForImageClassification.from_pretrained(out), AutoImageProcessor.from_pretrained(out)
    assert not processor.antialias
    with torch.no_grad():
        logits = model(**processor(pictures(2), return_tensors="pt")).logits
    assert logits.shape == (2, CLASSES)
    assert "ViT-B_16.npz" in (out / "README.md").read_text()
    (source,) = json.loads((out / "conversion.json").read_text())["sources"]
    assert len(source["sha256"]) == 64


def test_a_place_that_is_taken_is_found_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/out"):
        assert main(["convert", "vit", str(tmp_path / "no source.npz"), str(tmp_path / out)]) == 1
        error = capsys.readouterr().err
        assert str(tmp_path / out) in error
        assert "no source" not in error


def test_no_revision_of_a_local_file(tmp_path, capsys):
    np.savez(tmp_path / "ViT-B_16.npz", **flax_arrays(tiny_config(), CLASSES))
    command = ["convert", "vit", str(tmp_path / "ViT-B_16.npz"), str(tmp_path / "out"), "--revision", "main"]
    assert main(command) == 1
    assert "revision" in capsys.readouterr().err


def test_the_check_against_transformers(tmp_path, capsys, monkeypatch):
    their_model().save_pretrained(tmp_path / "source")
    assert main(["convert", "vit", str(tmp_path / "source"), str(tmp_path / "out"), "--check"]) == 0
    printed = capsys.readouterr().out
    assert all(float(number) < 1e-5 for number in re.findall(r"(?:tokens|logits) (\S+?)[,.]?(?: |\n)", printed))
    config = conversion_vit.config_from_transformers

    def another_activation(declared, **options):
        return config({**declared, "hidden_act": "relu"}, **options)

    monkeypatch.setattr(conversion_vit, "config_from_transformers", another_activation)
    assert main(["convert", "vit", str(tmp_path / "source"), str(tmp_path / "wrong"), "--check"]) == 1
    assert "disagrees with transformers" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("layout", ["transformers", "timm"])
@pytest.mark.parametrize("model_class", [MMViTForImageClassification, MMViTModel])
def test_the_command_goes_back(tmp_path, layout, model_class):
    model = our_model(model_class, hidden_act="gelu")
    model.save_pretrained(tmp_path / "ours")
    MMViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "ours")
    assert main(["convert", "vit", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", layout]) == 0
    state = load_file(tmp_path / "theirs" / "model.safetensors")
    rules = (transformers_rules if layout == "transformers" else timm_rules)(model_class)
    assert_bit_equal(state, export(model, rules))
