import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from contract.cases import PICTURE, largest_error, pictures
from contract.published import eva_state
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2VisionConfig,
    Blip2VisionModel,
    BlipImageProcessorPil,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging as transformers_logging

from hf_mm.conversion.checkpoint import Checkpoint, Origin, open_checkpoint
from hf_mm.conversion.engine import convert, export, stored_tensors
from hf_mm.conversion.rules import ConversionError, drop, plan, rename
from hf_mm.models.eva_vit.configuration_eva_vit import EvaViTConfig
from hf_mm.models.eva_vit.conversion_eva_vit import (
    config_from_transformers,
    eva_config,
    eva_layout,
    eva_rules,
    export_lavis,
    read_eva_vit,
    save_as_transformers,
    transformers_rules,
)
from hf_mm.models.eva_vit.modeling_eva_vit import EvaViTModel

HEADS = 2
TINY = {**PICTURE, "num_attention_heads": HEADS}
VISION = {**TINY, "initializer_range": 0.02}
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def tiny_config() -> EvaViTConfig:
    return EvaViTConfig(**TINY)


def write(content, file: Path) -> Path:
    torch.save(content, file)
    return file


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def lavis_equations(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The tower of LAVIS, written out on the tensors of its file."""

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        standard = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return standard * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    kernel = state["patch_embed.proj.weight"]
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)  # B, C, N, 8, 8
    x = torch.einsum("bcnij,dcij->bnd", patches, kernel) + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(len(pixels), -1, -1), x], 1) + state["pos_embed"]
    for block in (f"blocks.{number}" for number in range(TINY["num_hidden_layers"])):
        q_bias, v_bias = state[f"{block}.attn.q_bias"], state[f"{block}.attn.v_bias"]
        fused = norm(x, f"{block}.norm1") @ state[f"{block}.attn.qkv.weight"].T
        fused = fused + torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        query, key, value = fused.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = query * query.shape[-1] ** -0.5 @ key.mT
        x = x + linear((scores.softmax(-1) @ value).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + linear(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, f"{block}.mlp.fc2")
    return x


# The layout of LAVIS


def test_the_converted_tower_computes_the_equations_of_lavis(tmp_path):
    state = {name: tensor.double() for name, tensor in eva_state(tiny_config()).items()}
    source = write(state, tmp_path / "eva_vit_g.pth")
    model = read_eva_vit(source, num_attention_heads=HEADS, dtype=torch.float64)[0].build()
    assert largest_error(model(PIXELS.double()).last_hidden_state, lavis_equations(state, PIXELS.double())) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_flat_file_there_and_back_is_bit_equal(dtype, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in eva_state(tiny_config()).items()}
    source = write(state, tmp_path / "eva_vit_g.pth")
    model = read_eva_vit(source, num_attention_heads=HEADS, dtype=dtype)[0].build()
    assert equal(export_lavis(model), state)
    assert equal(
        export_lavis(model, "visual_encoder."), {f"visual_encoder.{name}": tensor for name, tensor in state.items()}
    )


def test_the_tower_of_a_whole_file_of_lavis(tmp_path, caplog):
    """Under ``"model"`` and ``visual_encoder.``; what else is there is named and left aside."""
    state = eva_state(tiny_config(), prefix="visual_encoder.")
    others = {"query_tokens": torch.zeros(1, 4, 8), "ln_vision.weight": torch.ones(48), "temp": torch.tensor(0.07)}
    source = write({"model": {**state, **others}, "epoch": 3}, tmp_path / "blip2_finetune_coco.pth")
    transformers_logging.enable_propagation()
    conversion = read_eva_vit(source, num_attention_heads=HEADS)[0]
    transformers_logging.disable_propagation()
    assert "ln_vision.weight, query_tokens, temp are left aside" in caplog.text
    assert equal(export_lavis(conversion.build(), "visual_encoder."), state)


def test_of_the_published_40_blocks_39_are_kept_and_norm_and_head_are_dropped():
    """Names and shapes alone, at full size."""
    tensors = eva_state(EvaViTConfig(), device="meta", blocks=40, head=True)
    conversion, image_processor = read_eva_vit(Checkpoint(tensors, {}, (Origin("eva_vit_g.pth"),)))
    assert conversion.empty.config.to_dict() == EvaViTConfig(dtype="float32").to_dict()
    dropped = {name for step in conversion.steps if not step.targets for name in step.sources}
    others = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert dropped == {name for name in tensors if name.startswith("blocks.39.")} | others
    written = {name for step in conversion.steps for name in step.targets}
    assert written == stored_tensors(conversion.empty).keys()
    assert dict(image_processor.size) == {"height": 224, "width": 224}


def test_39_blocks_are_all_kept():
    tensors = eva_state(EvaViTConfig(image_size=364), device="meta", prefix="visual_encoder.")
    config = eva_config(tensors, "visual_encoder.")
    assert (config.num_hidden_layers, config.num_attention_heads, config.image_size) == (39, 16, 364)
    assert config.to_dict() == EvaViTConfig(image_size=364).to_dict()


def test_a_41st_block_is_refused():
    tensors = eva_state(EvaViTConfig(), device="meta", blocks=41)
    with pytest.raises(ConversionError, match=r"no place for.*layers\.40|does not have.*blocks\.40"):
        plan(eva_rules(), tensors)


def test_rules_take_both_prefixes():
    """As a part of a bigger table: the names of both sides at their places in the whole."""
    tensors = {**eva_state(tiny_config(), prefix="visual_encoder."), "ln_vision.weight": torch.ones(48)}
    rules = [
        *eva_rules("visual_encoder.", "vision_tower.", num_hidden_layers=2),
        rename("ln_vision.{p}", "vision_norm.{p}"),
    ]
    model = EvaViTModel(tiny_config())
    targets = {f"vision_tower.{name}" for name in stored_tensors(model)} | {"vision_norm.weight"}
    assert {name for step in plan(rules, tensors, targets) for name in step.targets} == targets


def test_heads_that_nothing_tells_are_asked_for(tmp_path):
    state = eva_state(EvaViTConfig(**{**TINY, "hidden_size": 40, "num_attention_heads": 4}))
    with pytest.raises(ConversionError, match="width 40.*how many heads"):
        read_eva_vit(write(state, tmp_path / "eva.pth"))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="The checkpoint describes nothing.*num_attention_heads"):
        eva_config(eva_state(tiny_config()), num_attention_heads=5)


def test_every_missing_key_is_named(tmp_path):
    """Each kind of key alone: none is optional."""
    state = eva_state(tiny_config())
    conversion = read_eva_vit(write(state, tmp_path / "eva.pth"), num_attention_heads=HEADS)[0]
    becomes = {source: step.targets for step in conversion.steps for source in step.sources}
    assert becomes.keys() == state.keys()
    for name in {re.sub(r"\d+", "#", name): name for name in state}.values():
        with pytest.raises(ConversionError) as refusal:
            plan(eva_rules(num_hidden_layers=2), state.keys() - {name}, stored_tensors(conversion.empty))
        assert any(target in str(refusal.value) for target in (name, *becomes[name])), name


WRONG = {  # what is done to a file, and what the sentence that refuses it must match
    "no positions": (lambda state: state.pop("pos_embed"), "lacks pos_embed"),
    "no value bias": (lambda state: state.pop("blocks.1.attn.v_bias"), r"layers\.1\.self_attn\.v_proj\.bias"),
    "no first block": (
        lambda state: state.pop("blocks.0.attn.qkv.weight"),
        "holds no EVA ViT, which would have blocks.0.attn.qkv.weight",
    ),
    "a key bias": (
        lambda state: state.update({"blocks.0.attn.k_bias": torch.zeros(48)}),
        r"does not have blocks\.0\.attn\.k_bias",
    ),
    "BLIP's ViT": (
        lambda state: state.update({"blocks.0.attn.qkv.bias": torch.zeros(144)}),
        "keys have a bias.*blocks.0.attn.qkv.bias",
    ),
    "LayerScale": (lambda state: state.update({"blocks.0.gamma_1": torch.zeros(48)}), "LayerScale.*gamma_1"),
    "BEiT": (
        lambda state: state.update({"rel_pos_bias.relative_position_bias_table": torch.zeros(3)}),
        "relative positions.*relative_position_bias_table",
    ),
    "positions of no square": (
        lambda state: state.update({"pos_embed": torch.zeros(1, 16, 48)}),
        "15 patches is not of a square",
    ),
    "another width inside": (
        lambda state: state.update({"blocks.1.mlp.fc1.weight": torch.zeros(90, 48)}),
        r"fc1\.weight.*\(90, 48\)",
    ),
    "a flat kernel": (
        lambda state: state.update({"patch_embed.proj.weight": torch.zeros(48, 192)}),
        "The checkpoint describes nothing that can be built",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_by_name(change, message, tmp_path):
    state = eva_state(tiny_config())
    change(state)
    with pytest.raises(ValueError, match=message):
        read_eva_vit(write(state, tmp_path / "eva.pth"), num_attention_heads=HEADS)


def test_a_file_cut_short_leaves_nothing_behind(tmp_path):
    source = write(eva_state(tiny_config()), tmp_path / "eva_vit_g.pth")
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConversionError, match="eva_vit_g.pth is no whole file"):
        read_eva_vit(source, num_attention_heads=HEADS)[0].save(tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["eva_vit_g.pth"]


def test_two_towers_are_refused():
    names = ["visual_encoder.blocks.0.attn.qkv.weight", "visual_encoder_m.blocks.0.attn.qkv.weight"]
    with pytest.raises(ConversionError, match="more than one ViT.*visual_encoder., visual_encoder_m."):
        eva_layout(names)


# The layout of transformers


def perturbed(peer):
    """Every parameter moved off its initial value; the bias of the keys stays zero."""
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("self_attn.qkv.bias"):
                parameter.unflatten(0, (3, -1))[1].zero_()
    return peer.eval()


@pytest.fixture
def tower(tmp_path) -> tuple[Blip2VisionModel, Path]:
    peer = perturbed(Blip2VisionModel(Blip2VisionConfig(**VISION)))
    peer.save_pretrained(tmp_path / "published")
    return peer, tmp_path / "published"


def without_norm(peer: Blip2VisionModel) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in peer.state_dict().items() if not name.startswith("post_layernorm.")}


def test_transformers_tower_there_and_back_is_bit_equal(tower, caplog):
    peer, folder = tower
    transformers_logging.enable_propagation()
    model = read_eva_vit(folder)[0].build()
    transformers_logging.disable_propagation()
    assert "post_layernorm is left out" in caplog.text
    ours, theirs = (some(PIXELS, output_hidden_states=True).hidden_states for some in (model, peer))
    assert max(largest_error(*pair) for pair in zip(ours, theirs, strict=True)) <= 1e-5
    assert equal(export(model, transformers_rules()), without_norm(peer))


def test_the_tower_of_a_whole_blip_2_of_transformers(tmp_path):
    qformer = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**qformer, "encoder_hidden_size": 48, "vocab_size": 99, "max_position_embeddings": 64},
        text_config={"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 91},
        num_query_tokens=4,
    )
    whole = perturbed(Blip2ForImageTextRetrieval(config))
    whole.save_pretrained(tmp_path / "published")
    model = read_eva_vit(tmp_path / "published")[0].build()
    assert equal(export(model, transformers_rules()), without_norm(whole.vision_model))
    with torch.no_grad():
        theirs = whole.vision_model(PIXELS, output_hidden_states=True).hidden_states[-1]
        assert largest_error(model(PIXELS).last_hidden_state, theirs) <= 1e-5


def test_keys_with_a_bias_are_refused(tower):
    _, folder = tower
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layers.1.self_attn.qkv.bias"][50] = 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConversionError, match=r"keys have a bias.*encoder\.layers\.1\.self_attn\.qkv\.bias is not zero"
    ):
        read_eva_vit(folder)


def test_the_initialisation_of_transformers_which_is_as_good_as_zero_is_not_taken_over():
    declared = {**TINY, "model_type": "blip_2_vision_model", "initializer_range": 1e-10}
    for config in (declared, {"model_type": "blip-2", "vision_config": declared}):
        assert config_from_transformers(config).to_dict() == tiny_config().to_dict()


def test_a_file_without_its_config_is_refused(tower):
    with pytest.raises(ValueError, match="no config.json of type blip-2 or blip_2_vision_model"):
        read_eva_vit(tower[1] / "model.safetensors")


def test_other_heads_than_declared_are_refused(tower):
    with pytest.raises(ValueError, match="config.json declares num_attention_heads = 2"):
        read_eva_vit(tower[1], num_attention_heads=4)


def test_no_bias_at_all_is_refused(tower):
    declared = json.loads((tower[1] / "config.json").read_text())
    (tower[1] / "config.json").write_text(json.dumps({**declared, "qkv_bias": False}))
    with pytest.raises(ValueError, match="queries and values have no bias"):
        read_eva_vit(tower[1])


@pytest.mark.parametrize("key", ["embeddings.class_embedding", "encoder.layers.1.self_attn.qkv.bias"])
def test_a_key_that_is_missing_in_transformers_layout_is_named(key, tower):
    tensors = load_file(tower[1] / "model.safetensors")
    tensors.pop(key)
    save_file(tensors, tower[1] / "model.safetensors")
    with pytest.raises(ConversionError, match=r"embeddings\.cls_token|layers\.1\.self_attn\.q_proj\.bias"):
        read_eva_vit(tower[1])


def test_transformers_opens_what_is_written_for_it(tower, tmp_path):
    conversion, image_processor = read_eva_vit(tower[1])
    model = conversion.build()
    save_as_transformers(model, image_processor, tmp_path / "back")
    opened, info = Blip2VisionModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    theirs = opened(PIXELS, output_hidden_states=True)
    ours = model(PIXELS).last_hidden_state
    assert largest_error(theirs.hidden_states[-1], ours) <= 1e-5
    assert largest_error(theirs.last_hidden_state, torch.layer_norm(ours, (48,), eps=1e-6)) <= 1e-5
    again = read_eva_vit(tmp_path / "back")[0].build()
    assert equal(again.state_dict(), model.state_dict())
    processor = BlipImageProcessorPil.from_pretrained(tmp_path / "back")
    for picture in pictures(3):
        pixels = (some(picture, return_tensors="pt")["pixel_values"] for some in (processor, image_processor))
        torch.testing.assert_close(*pixels, rtol=0, atol=1e-6)


def test_what_transformers_lacks_is_named(tmp_path):
    model = EvaViTModel(EvaViTConfig(**{**TINY, "image_size": (32, 48), "num_channels": 1}))
    with pytest.raises(ValueError, match=r"no image_size = \[32, 48\], no num_channels = 1"):
        save_as_transformers(model, None, tmp_path / "back")
    assert not list(tmp_path.iterdir())


# Pictures, and what is saved


def test_pictures_are_squashed_to_the_model_s_size(tmp_path):
    """PIL bicubic to both sides, / 255, CLIP's mean and standard deviation."""
    source = write(eva_state(tiny_config()), tmp_path / "eva.pth")
    image_processor = read_eva_vit(source, num_attention_heads=HEADS)[1]
    for picture in pictures(4):
        resized = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float64) / 255
        expected = (resized - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD
        pixels = image_processor(picture, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), rtol=0, atol=1e-6)


def test_what_the_folder_declares_of_pictures_is_kept(tower):
    settings = {"size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3], "resample": 2}
    (tower[1] / "preprocessor_config.json").write_text(json.dumps(settings))
    image_processor = read_eva_vit(tower[1])[1]
    assert list(image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert (image_processor.resample, image_processor.do_center_crop) == (Image.Resampling.BILINEAR, False)
    assert image_processor(pictures(1)[0], return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_the_written_folder_opens_with_the_weights_of_the_file(tmp_path):
    state = eva_state(tiny_config())
    conversion, image_processor = read_eva_vit(write(state, tmp_path / "eva.pth"), num_attention_heads=HEADS)
    conversion.save(tmp_path / "out", processor=image_processor, progress=False)
    opened, info = EvaViTModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert equal(export_lavis(opened), state)
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["sources"][0]["name"] == "eva.pth"


def test_a_part_of_a_composite_is_read_from_what_was_opened(tmp_path):
    """By prefix, from a checkpoint that other rules read too."""
    state = eva_state(tiny_config(), prefix="visual_encoder.")
    whole = open_checkpoint(write({"model": {**state, "temp": torch.ones(())}}, tmp_path / "blip2.pth"))
    config = eva_config(whole.tensors, "visual_encoder.", num_attention_heads=HEADS)
    rules = [*eva_rules("visual_encoder.", num_hidden_layers=config.num_hidden_layers), *drop("temp")]
    model = convert(whole, model_class=EvaViTModel, config=config, rules=rules).build()
    assert equal(export_lavis(model, "visual_encoder."), state)
