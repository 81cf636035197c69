"""Row 10: published layout to ours and back, bit-equal; every name accounted for; a wrong file refused with the names."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
    PreTrainedModel,
    ViTForImageClassification,
    ViTModel,
)

from hf_mm.conversion.checkpoint import merge
from hf_mm.conversion.engine import export, stored_tensors
from hf_mm.conversion.rules import ConversionError, Rule, plan, rename
from hf_mm.models.blip2 import conversion_blip2_rules
from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config
from hf_mm.models.blip2.conversion_blip2 import read_blip2
from hf_mm.models.blip2.conversion_blip2_export import export_lavis, export_transformers
from hf_mm.models.blip2.modeling_blip2 import MMBlip2ForConditionalGeneration
from hf_mm.models.blip2.modeling_blip2_stage1 import MMBlip2ForImageTextRetrieval, MMBlip2ForPreTraining
from hf_mm.models.clip import conversion_clip
from hf_mm.models.clip.configuration_clip import MMClipConfig, MMClipResNetConfig
from hf_mm.models.clip.modeling_clip import MMClipModel, MMClipTextModel, MMClipVisionModel
from hf_mm.models.eva_vit import conversion_eva_vit
from hf_mm.models.eva_vit.modeling_eva_vit import EvaViTModel
from hf_mm.models.pic2word import conversion_pic2word
from hf_mm.models.pic2word.modeling_pic2word import Pic2WordMapper, Pic2WordModel
from hf_mm.models.vit import conversion_vit
from hf_mm.models.vit.modeling_vit import MMViTForImageClassification, MMViTModel

from .cases import PICTURE, QFORMER, blip2_config, cases_for, largest_error, qformer_words
from .published import eva_state, mapper_state, open_clip_json, openai_state, pic2word_content, transformers_json
from .published_blip2 import blip2_json, lavis_content, lavis_state

PIC2WORD = conversion_pic2word.PUBLISHED_FILE
LAVIS = "blip2_finetune_coco.pth"
PEERS = {
    MMBlip2ForConditionalGeneration: Blip2ForConditionalGeneration,
    MMBlip2ForImageTextRetrieval: Blip2ForImageTextRetrieval,
    MMViTForImageClassification: ViTForImageClassification,
    MMViTModel: ViTModel,
    MMClipTextModel: CLIPTextModel,
    MMClipVisionModel: CLIPVisionModel,
    MMClipModel: CLIPModel,
}


# Published towers have a prefix, which transformers leaves out of a new one.
PREFIXES = {MMClipTextModel: "text_model.", MMClipVisionModel: "vision_model."}


@dataclass(frozen=True)
class Published:
    """A published folder of a case's sizes, made without the converter.

    Attributes:
        folder: config and weights, and the vocabulary where there are texts.
        weights: the file of weights.
        peer: the model that wrote it, where it is one of transformers'.
    """

    folder: Path
    weights: Path
    peer: PreTrainedModel | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        if self.weights.name == LAVIS:
            return torch.load(self.weights, weights_only=True)["model"]
        if self.weights.name != PIC2WORD:
            return load_file(self.weights)
        published = conversion_pic2word.open_pic2word(self.folder)
        clip, mapper = published.select("state_dict."), published.select("state_dict_img2text.")
        if self.mapper_alone:
            return dict(mapper.tensors)
        return dict(merge(clip.with_prefix("clip."), mapper.with_prefix("mapper.")).tensors)

    @property
    def mapper_alone(self) -> bool:
        return not (self.folder / "clip").exists()

    def write(self, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        """Writes such tensors to a copy of the folder."""
        if self.weights.name == LAVIS:
            torch.save(lavis_content(tensors), folder / LAVIS)
            return
        if self.weights.name != PIC2WORD:
            save_file(tensors, folder / self.weights.name)
            return
        mapper = (
            tensors if self.mapper_alone else {name: t for name, t in tensors.items() if name.startswith("mapper.")}
        )
        clip = {name.removeprefix("clip."): tensor for name, tensor in tensors.items() if name not in mapper}
        content = pic2word_content(clip, {name.removeprefix("mapper."): tensor for name, tensor in mapper.items()})
        torch.save(content, folder / PIC2WORD)


def has_resnet(config) -> bool:
    return isinstance(config, MMClipConfig) and isinstance(config.vision_config, MMClipResNetConfig)


def is_clip(case) -> bool:
    return case.model_class is MMClipModel


def is_eva(case) -> bool:
    return case.model_class is EvaViTModel


def is_pic2word(case) -> bool:
    return case.model_class in (Pic2WordModel, Pic2WordMapper)


def is_blip2(case) -> bool:
    return isinstance(case.config(), MMBlip2Config)


def is_stage1(case) -> bool:
    return case.model_class is MMBlip2ForPreTraining


def published_config(case, layout):
    """The case's; of BLIP-2 in sizes and settings that the layout has."""
    if not is_blip2(case):
        return case.config()
    tower, text = {**PICTURE, "model_type": "eva_vit"}, case.config().text_config
    published = {"vision_config": tower, "itc_temperature": 0.07}
    if layout == "lavis":  # heads of 64, and what shapes do not tell is as the paper has it
        tower["hidden_size"] = 128
        numbers = {"hidden_size": 128, "layer_norm_eps": 1e-12, "dropout": 0.1, "attention_dropout": 0.1}
        return blip2_config(**published, qformer_config={**QFORMER, **qformer_words(), **numbers})
    published["vision_norm_eps"] = 1e-6  # the tower's
    if text is not None:  # pictures are a word behind those of the tokenizer
        published["image_token_id"], text.vocab_size = text.vocab_size, text.vocab_size + 4
    return blip2_config(text, **published)


# A layout that a case is published in. CLIP has two; transformers' has no ResNet tower. Pic2Word has its authors', the
# EVA ViT that of LAVIS; transformers' of the latter has one norm more than the model. BLIP-2's stage 1 is whole in LAVIS's
# files alone, which hold no language model.
PUBLISHED = [
    (case, layout)
    for case in cases_for(10)
    for layout, has_it in (
        ("transformers", not (has_resnet(case.config()) or is_pic2word(case) or is_eva(case) or is_stage1(case))),
        ("open_clip", is_clip(case)),
        ("authors", is_pic2word(case)),
        ("lavis", is_eva(case) or is_stage1(case)),
    )
    if has_it
]
EVERY = pytest.mark.parametrize(("case", "layout"), PUBLISHED, ids=str)
TRANSFORMERS = pytest.mark.parametrize(
    ("case", "layout"), [pair for pair in PUBLISHED if pair[1] == "transformers"], ids=str
)


@pytest.fixture
def published(case, layout, tmp_path) -> Published:
    folder, config = tmp_path / "published", published_config(case, layout)
    folder.mkdir()
    if layout == "authors":
        return authors_folder(case, folder)
    if is_eva(case):
        save_file(eva_state(config), folder / "eva_vit_g.safetensors")
        return Published(folder, folder / "eva_vit_g.safetensors")
    if "text" in case.inputs:
        getattr(case.preparer, "tokenizer", case.preparer).save_pretrained(folder)
    if layout == "lavis":
        state = {**lavis_state(config), **eva_state(config.vision_config, prefix="visual_encoder.")}
        torch.save(lavis_content(state), folder / LAVIS)
        return Published(folder, folder / LAVIS)
    if layout == "open_clip":
        save_file(openai_state(config), folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps(open_clip_json(config)))
        return Published(folder, folder / "open_clip_model.safetensors")
    classifies = case.model_class is MMViTForImageClassification
    declared = blip2_json(config) if is_blip2(case) else transformers_json(config, classifies)
    peer_class = PEERS[case.model_class]
    peer = peer_class(peer_class.config_class.from_dict(dict(declared))).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, parameter in peer.named_parameters():
            if name.endswith("qkv.bias"):  # EVA's keys have none
                parameter.view(3, -1)[1] = 0
    peer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(declared))
    if prefix := PREFIXES.get(case.model_class):
        tensors = load_file(folder / "model.safetensors")
        save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return Published(folder, folder / "model.safetensors", peer)


def authors_folder(case, folder: Path) -> Published:
    """The authors' file, with the folder of open_clip's that its CLIP comes from, which says how many heads it has."""
    config = case.config()
    if case.model_class is Pic2WordMapper:
        clip, mapper = {"logit_scale": torch.ones(())}, mapper_state(config)
    else:
        clip, mapper = openai_state(config.clip_config), mapper_state(config.mapper_config)
        case.preparer.tokenizer.save_pretrained(folder / "clip")
        save_file(clip, folder / "clip" / "open_clip_model.safetensors")
        (folder / "clip" / "open_clip_config.json").write_text(json.dumps(open_clip_json(config.clip_config)))
    torch.save(pic2word_content(clip, mapper), folder / PIC2WORD)
    return Published(folder, folder / PIC2WORD)


def read(case, source: Path):
    if is_blip2(case):
        return read_blip2(source, tokenizer=source)[0]
    if case.model_class is Pic2WordModel:
        return conversion_pic2word.read_pic2word(source, source / "clip")[0]
    if case.model_class is Pic2WordMapper:
        return conversion_pic2word.read_mapper(conversion_pic2word.open_pic2word(source))
    if is_eva(case):
        return conversion_eva_vit.read_eva_vit(source, num_attention_heads=case.config().num_attention_heads)[0]
    module_read = conversion_vit.read_vit if case.config().model_type == "mm_vit" else conversion_clip.read_clip
    return module_read(source)[0]


def within(name: str, rules: list[Rule]) -> list[Rule]:
    """The table of a part, with its name before those on both sides."""
    prefixed = [
        [tuple(f"{name}.{pattern}" for pattern in patterns) for patterns in (rule.sources, rule.targets)]
        for rule in rules
    ]
    return [Rule(*names, rule.forward, rule.backward) for names, rule in zip(prefixed, rules, strict=True)]


def blip2_rules(layout: str) -> list[Rule]:
    """Those of all parts; what transformers lacks begins anew, beside the checkpoint."""
    rules = conversion_blip2_rules
    if layout == "lavis":
        tower = conversion_eva_vit.eva_rules("visual_encoder.", "vision_tower.", PICTURE["num_hidden_layers"])
        return [*rules.lavis_rules(), *tower]
    beside = [rename(name, name) for name in ("language_model.{name*}", "temperature")]
    return [*rules.transformers_rules(), *rules.their_tower(), *beside]


def back(case, layout, model) -> dict[str, torch.Tensor]:
    """The tensors as they are published."""
    if is_blip2(case):
        return export_lavis(model) if layout == "lavis" else export_transformers(model)[1]
    return export(model, rules_of(case, layout))


def rules_of(case, layout):
    if is_blip2(case):
        return blip2_rules(layout)
    if case.model_class is Pic2WordMapper:
        return conversion_pic2word.mapper_rules()
    if case.model_class is Pic2WordModel:
        clip = within("clip", conversion_clip.open_clip_rules())
        return [*clip, *within("mapper", conversion_pic2word.mapper_rules())]
    if is_eva(case):
        return conversion_eva_vit.eva_rules(num_hidden_layers=case.config().num_hidden_layers)
    if case.config().model_type == "mm_vit":
        return conversion_vit.transformers_rules(case.model_class)
    if layout == "open_clip":
        return conversion_clip.open_clip_rules(resnet=has_resnet(case.config()))
    return conversion_clip.transformers_rules(case.model_class)


@EVERY
def test_there_and_back_is_bit_equal(case, layout, published):
    model = read(case, published.folder).build()
    assert type(model) is case.model_class
    written, tensors = back(case, layout, model), published.tensors
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name], tensor), name


@TRANSFORMERS
def test_the_converted_model_computes_what_the_publisher_s_does(case, layout, published):
    """Of transformers' layout; tests/peers compares with open_clip's."""
    model, batch = read(case, published.folder).build(), case.batch(3)
    if not case.speaks:
        batch.pop("labels", None)
    elif is_blip2(case):
        batch["input_ids"] = batch["input_ids"].where(batch["input_ids"] >= 0, model.config.image_token_id)
    with torch.no_grad():
        ours, theirs = case.read(model(**batch), batch), case.read(published.peer(**batch), batch)
    for name in ours.keys() & {"logits_per_image", "logits_per_text"}:
        ours[name] = ours[name] * getattr(model, "temperature", 1)  # which transformers lacks
    compared = ours.keys() & theirs.keys()
    assert compared
    for name in compared:
        assert largest_error(ours[name], theirs[name]) <= 1e-5, name


@EVERY
def test_config_says_what_the_case_does(case, layout, published):
    """Sizes, activation and norms come from what was published, not from the case."""
    not_published = {"architectures", "dtype", "transformers_version", "_name_or_path", "id2label", "label2id"}
    not_published |= {"pos_embed_interpolation", "initializer_factor", "pad_token_id", "bos_token_id"}
    not_published |= {"dropout", "attention_dropout", "base_models"} if layout == "authors" else set()
    not_published |= {"base_models"} if layout == "lavis" else set()

    def assert_says(read_config: dict, expected: dict) -> None:
        for field in expected.keys() - not_published:
            value, wanted = read_config[field], expected[field]
            if isinstance(wanted, dict):
                assert_says(value, wanted)
            else:
                assert (list(value) if isinstance(value, (list, tuple)) else value) == (
                    list(wanted) if isinstance(wanted, (list, tuple)) else wanted
                ), field

    expected = published_config(case, layout)
    clip = getattr(expected, "clip_config", expected)
    if layout == "open_clip" or clip is not expected:  # open_clip declares the joint space's width once
        for tower in (clip.vision_config, clip.text_config):
            tower.projection_dim = clip.projection_dim
    assert_says(read(case, published.folder).empty.config.to_dict(), expected.to_dict())


@EVERY
def test_the_written_folder_opens_and_says_where_it_came_from(case, layout, published, tmp_path):
    conversion, out = read(case, published.folder), tmp_path / "out"
    conversion.save(out, processor=case.preparer if case.has_processor else None, progress=False)
    model, loading = case.auto_class.from_pretrained(out, output_loading_info=True)
    assert type(model) is case.model_class
    assert not any(loading.values()), loading
    built = conversion.build().state_dict()
    assert model.state_dict().keys() == built.keys()
    assert all(torch.equal(tensor, built[name]) for name, tensor in model.state_dict().items())
    source, *_ = json.loads((out / "conversion.json").read_text())["sources"]
    assert source["name"] == "published"
    assert len(source["sha256"]) == 64


def changed(published: Published, change) -> Path:
    """The published folder with other tensors."""
    tensors = published.tensors
    change(tensors)
    copy = published.folder.parent / "changed"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(published.folder, copy)
    published.write(tensors, copy)
    return copy


@EVERY
def test_every_missing_key_is_named(case, layout, published):
    """Each kind of key alone: there is none that the model could do without, but what is dropped."""
    conversion = read(case, published.folder)
    wanted, names = stored_tensors(conversion.empty), set(conversion.checkpoint.tensors)
    becomes = {source: step.targets for step in conversion.steps for source in step.sources}
    assert becomes.keys() == names >= set(published.tensors)
    assert {target for targets in becomes.values() for target in targets} == wanted.keys()
    kinds = {re.sub(r"\d+", "#", name): name for name in names if becomes[name]}
    for name in kinds.values():
        with pytest.raises(ConversionError) as refusal:
            plan(rules_of(case, layout), names - {name}, wanted)
        assert any(target in str(refusal.value) for target in (name, *becomes[name]))


@EVERY
def test_a_missing_key_is_refused_when_a_folder_is_read(case, layout, published):
    name = list(published.tensors)[-1]
    with pytest.raises(ConversionError):
        read(case, changed(published, lambda tensors: tensors.pop(name)))


@EVERY
def test_a_key_too_many_is_named(case, layout, published):
    folder = changed(published, lambda tensors: tensors.update({"visual.of_another.model": torch.zeros(3)}))
    with pytest.raises((ConversionError, ValueError), match=r"visual\.of_another\.model"):
        read(case, folder)


@EVERY
def test_a_tensor_of_another_shape_is_named(case, layout, published):
    name = next(name for name, tensor in published.tensors.items() if tensor.ndim == 1 and "bias" in name)

    def lengthen(tensors):
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    with pytest.raises(ConversionError, match=r"\(\d+,\)"):
        read(case, changed(published, lengthen))


@EVERY
def test_a_file_cut_short_leaves_nothing_behind(case, layout, published, tmp_path):
    whole = published.weights.read_bytes()
    published.weights.write_bytes(whole[: len(whole) // 2])
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises((ConversionError, OSError), match=published.weights.name.replace(".", r"\.")):
        read(case, published.folder).save(tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
