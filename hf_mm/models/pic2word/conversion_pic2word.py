"""The authors' file of Pic2Word and ours: the mapping network, and the CLIP that is stored beside it.

Source:
    google-research/composed_image_retrieval (Apache-2.0): ``model/model.py``, ``src/main.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...conversion.checkpoint import Checkpoint, Origin, open_checkpoint
from ...conversion.engine import RECORD, Conversion, compose, convert, export, whole_folder
from ...conversion.layouts import count_numbers, declared_by, first_line, refuse_lacking, require
from ...conversion.rules import ConversionError, Rule, listed, rename, run
from ..clip.configuration_clip import MMClipConfig, MMClipResNetConfig
from ..clip.conversion_clip import is_transformers_layout, open_clip_rules, published_tokenizer, read_clip
from ..clip.modeling_clip import MMClipModel
from ..clip.open_clip_config import open_clip_config
from ..clip.openai_files import open_clip_source
from ..clip.processing_clip import MMClipProcessor
from .configuration_pic2word import Pic2WordConfig, Pic2WordMapperConfig
from .modeling_pic2word import Pic2WordMapper, Pic2WordModel
from .processing_pic2word import Pic2WordProcessor

CLIP_ENTRY, MAPPER_ENTRY = "state_dict", "state_dict_img2text"
PUBLISHED_FILE = "pic2word_model.pt"
ACTIVATION = "quick_gelu"  # the authors' code has no other, and none leaves a trace in a file
DROPOUT = 0.1  # likewise


def mapper_rules() -> list[Rule]:
    """The authors' mapping network to ours. Theirs counts Linear, Dropout and ReLU of a layer as 0, 1 and 2."""
    return [rename("layers.{i}.0.{p}", "layers.{i}.{p}"), rename("fc_out.{p}", "fc_out.{p}")]


# Reading


def open_pic2word(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """Opens the authors' file: its two state dicts as ``state_dict.{name}`` and ``state_dict_img2text.{name}``.

    What DistributedDataParallel puts before the names is taken off; epoch and optimizer are passed over.

    Raises:
        ConversionError: the file lacks one of them, is cut short, or holds what is no tensor.
        OSError: it cannot be read.
    """
    return open_checkpoint(source, entries=(CLIP_ENTRY, MAPPER_ENTRY), revision=revision, token=token)


def read_pic2word(
    source: str | Path | Checkpoint,
    clip: str | Path | None = None,
    *,
    revision: str | None = None,
    clip_revision: str | None = None,
    token: str | None = None,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Conversion, Pic2WordProcessor]:
    """Reads the authors' file; nothing is written before ``Conversion.save``.

    Args:
        source: the file, a folder or an id of the Hub that has it, or what `open_pic2word` made of one.
        clip: the CLIP that the mapping network was trained on, ``"ViT-L/14"`` for the published one: a name of OpenAI's, a
            file, folder or id of the Hub, published (see `read_clip`) or ours. The stored CLIP must be the same. By
            default the stored one is converted.
        revision: of a Hub id.
        clip_revision: of `clip`, if that is a Hub id.
        token: of the Hub.
        tokenizer: folder of a CLIP tokenizer, for a vocabulary that is neither the published one nor beside `clip`.
        dtype: of the weights.

    Returns:
        The conversion, checked, to a `Pic2WordModel`, and its processor.

    Raises:
        ConversionError: keys are missing or left over, shapes differ, or the stored CLIP is another than `clip`; the keys
            are named.
        ValueError: `clip` cannot be read as a CLIP, or has another activation than the authors' code.
        OSError: a source cannot be read.
    """
    if clip_revision is not None and clip is None:
        raise ValueError(
            "The CLIP that is stored beside the mapping network has no revisions: leave --clip-revision out."
        )
    published = source if isinstance(source, Checkpoint) else open_pic2word(source, revision=revision, token=token)
    mapper, stored = read_mapper(published, dtype), published.select(f"{CLIP_ENTRY}.")
    if clip is None:
        base, processor = read_clip(stored, activation=ACTIVATION, tokenizer=tokenizer, dtype=dtype)
    else:
        base, processor = read_base(open_clip_source(clip, revision=clip_revision, token=token), tokenizer, dtype)
        require_same(stored, base)
    _require_fit(mapper.empty.config, base.empty.config)
    processor = Pic2WordProcessor(processor.image_processor, processor.tokenizer)
    origin = base.checkpoint.origins[-1]
    config = Pic2WordConfig(
        clip_config=base.empty.config,
        mapper_config=mapper.empty.config,
        placeholder_token_id=processor.placeholder_token_id,
        base_models={"clip": {"name": origin.name, "revision": origin.revision}},
    )
    parts = {"mapper": mapper, "clip": base}
    return compose(parts, model_class=Pic2WordModel, config=config, dtype=dtype), processor


def read_mapper(published: Checkpoint, dtype: torch.dtype = torch.float32) -> Conversion:
    """The mapping network alone, a `Pic2WordMapper`, of what `open_pic2word` opened; its shapes tell the sizes.

    Raises:
        ConversionError: keys are missing or left over, or shapes do not fit each other; they are named.
    """
    mapper = published.select(f"{MAPPER_ENTRY}.")
    config = mapper_config(mapper.tensors)
    return convert(mapper, model_class=Pic2WordMapper, config=config, rules=mapper_rules(), dtype=dtype)


def mapper_config(tensors: Mapping[str, torch.Tensor]) -> Pic2WordMapperConfig:
    """The config that the shapes of the authors' mapping network imply."""
    names = ("layers.0.0.weight", "fc_out.weight")
    require(tensors, names, "mapping network of Pic2Word")
    shapes = {name: tuple(tensors[name].shape) for name in names}
    if wrong := [f"{name} {shape}" for name, shape in shapes.items() if len(shape) != 2 or 0 in shape]:
        raise ConversionError(f"This is no mapping network of Pic2Word: {listed(wrong)} should be a matrix.")
    (hidden_dim, image_dim), (word_dim, _) = shapes.values()
    return Pic2WordMapperConfig(
        image_dim=image_dim,
        hidden_dim=hidden_dim,
        word_dim=word_dim,
        num_hidden_layers=count_numbers(tensors, "layers."),
        dropout=DROPOUT,
    )


def read_base(
    checkpoint: Checkpoint, tokenizer: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Conversion, MMClipProcessor]:
    """The frozen CLIP from a source of its own, published or ours.

    Raises:
        ConversionError, ValueError: see `read_clip`; or it is a tower alone, or has another activation than `ACTIVATION`.
    """
    configs, name = checkpoint.configs, checkpoint.origins[0].name
    if configs.get("config.json", {}).get("model_type") == MMClipConfig.model_type:
        conversion, processor = _read_ours(checkpoint, tokenizer, dtype)
    else:
        declared = is_transformers_layout(checkpoint) or "open_clip_config.json" in configs
        activation = None if declared else ACTIVATION
        conversion, processor = read_clip(checkpoint, activation=activation, tokenizer=tokenizer, dtype=dtype)
    if not isinstance(conversion.empty, MMClipModel):
        raise ValueError(f"{name} holds one tower of a CLIP: name the whole model with --clip.")
    if found := activations(conversion.empty.config) - {ACTIVATION}:
        raise ValueError(
            f"{name} declares the activation {listed(found)}, but the mapping network was trained on a CLIP with "
            f"{ACTIVATION}: name that one with --clip."
        )
    return conversion, processor


def _read_ours(
    checkpoint: Checkpoint, tokenizer: str | Path | None, dtype: torch.dtype
) -> tuple[Conversion, MMClipProcessor]:
    """A CLIP that is in our layout already; where it was converted, from what is on record."""
    if tokenizer is not None:
        raise ValueError(f"{checkpoint.origins[0].name} has its own tokenizer: leave --tokenizer out.")
    with declared_by("config.json"):
        config = MMClipConfig.from_dict(checkpoint.configs["config.json"])
    try:
        processor = MMClipProcessor.from_pretrained(checkpoint.folder)
    except Exception as error:  # transformers raises anything
        raise ValueError(f"{checkpoint.origins[0].name} holds no processor of CLIP: {first_line(error)}.") from error
    with declared_by(RECORD):
        recorded = [Origin(**origin) for origin in checkpoint.configs.get(RECORD, {}).get("sources", [])]
    checkpoint = replace(checkpoint, origins=(*checkpoint.origins, *recorded))
    rules = [rename("{name*}", "{name*}")]
    return convert(checkpoint, model_class=MMClipModel, config=config, rules=rules, dtype=dtype), processor


def activations(config: MMClipConfig) -> set[str]:
    """Those of the two towers; the ResNet has none to choose."""
    return {tower.hidden_act for tower in (config.vision_config, config.text_config) if hasattr(tower, "hidden_act")}


def require_same(stored: Checkpoint, base: Conversion) -> None:
    """Compares the stored CLIP with the named one, a tensor at a time, in what the dtypes of both files can hold.

    Raises:
        ConversionError: they differ; the stored keys that do are named, with the largest difference.
    """
    source, name = stored.origins[0].name, base.checkpoint.origins[0].name
    config, theirs = base.empty.config, base.checkpoint.tensors
    rules = open_clip_rules(resnet=isinstance(config.vision_config, MMClipResNetConfig))
    advice = "name the CLIP that the mapping network was trained on, or leave --clip out to keep the stored one"
    try:
        conversion = convert(stored, model_class=MMClipModel, config=config, rules=rules)
    except ConversionError as error:
        misfit = str(error).rstrip(".")
        raise ConversionError(f"The CLIP stored in {source} is not {name} ({misfit}): {advice}.") from error
    step_of = {target: step for step in base.steps for target in step.targets}
    differences: dict[str, float] = {}
    for step in conversion.steps:
        for target, tensor in run([step], stored.tensors):
            if difference := _difference(tensor, dict(run([step_of[target]], theirs))[target]):
                differences |= {key: max(difference, differences.get(key, 0.0)) for key in step.sources}
    if differences:
        raise ConversionError(
            f"The CLIP stored in {source} is not {name}: it differs in {listed(differences)}, by up to "
            f"{max(differences.values()):.1e}; {advice}."
        )


def _difference(stored: torch.Tensor, base: torch.Tensor) -> float:
    """max |difference| of numbers that were cast to both dtypes; infinite where there is no number."""
    ours, theirs = (tensor.to(base.dtype).to(stored.dtype) for tensor in (stored, base))
    if torch.equal(ours, theirs):
        return 0.0
    return float((ours.double() - theirs.double()).abs().nan_to_num(nan=torch.inf).max())


def _require_fit(mapper: Pic2WordMapperConfig, clip: MMClipConfig) -> None:
    """Raises ConversionError where the mapping network reads or writes other widths than the CLIP has."""
    for key, width, wanted, what in (
        ("layers.0.0.weight", mapper.image_dim, clip.projection_dim, "picture embeddings"),
        ("fc_out.weight", mapper.word_dim, clip.text_config.hidden_size, "token embeddings"),
    ):
        if width != wanted:
            raise ConversionError(
                f"The mapping network does not belong to this CLIP: {MAPPER_ENTRY}.{key} is made for {what} of {width}, "
                f"but the CLIP's have {wanted}."
            )


# Back


def export_pic2word(model: Pic2WordModel) -> dict[str, dict[str, torch.Tensor]]:
    """Our model as the authors' code opens it: ``state_dict`` of the whole CLIP and ``state_dict_img2text``.

    Raises:
        ValueError: the authors' code has no such model; what it lacks is named.
    """
    clip = model.config.clip_config
    if not isinstance(clip, MMClipConfig):
        refuse_lacking("the authors' Pic2Word", [f"dual encoder of type {clip.model_type}"])
    open_clip_config(clip)
    towers = [clip.text_config, clip.vision_config]
    lacking = [f"hidden_act = {name!r}" for name in activations(clip) - {ACTIVATION}]
    lacking += [
        f"{tower.num_attention_heads} heads in a width of {tower.hidden_size}"
        for tower in towers
        if tower.hidden_size != 64 * tower.num_attention_heads
    ]
    lacking += [
        f"MLP of {tower.intermediate_size} in a width of {tower.hidden_size}"
        for tower in towers
        if getattr(tower, "intermediate_size", 4 * tower.hidden_size) != 4 * tower.hidden_size
    ]
    lacking += [
        f"layer_norm_eps = {eps}" for eps in {getattr(tower, "layer_norm_eps", 1e-5) for tower in towers} - {1e-5}
    ]
    refuse_lacking("the authors' Pic2Word", lacking)
    rules = open_clip_rules(resnet=isinstance(clip.vision_config, MMClipResNetConfig))
    return {CLIP_ENTRY: export(model.clip, rules), MAPPER_ENTRY: export(model.mapper, mapper_rules())}


def save_as_pic2word(model: Pic2WordModel, processor: Pic2WordProcessor, folder: str | Path) -> Path:
    """Writes a folder with a ``pic2word_model.pt`` that the authors' code opens for evaluation; it has no optimizer.

    Raises:
        ValueError: the authors' code has no such model or tokenizer; what it lacks is named. Nothing is written.
    """
    if processor.tokenizer.get_vocab() != published_tokenizer().get_vocab():
        refuse_lacking("the authors' Pic2Word", ["tokenizer but the published one"])
    content: dict[str, Any] = {"epoch": 0, "name": Path(folder).name, **export_pic2word(model)}
    with whole_folder(Path(folder)) as aside:
        torch.save(content, aside / PUBLISHED_FILE)
    return Path(folder)
