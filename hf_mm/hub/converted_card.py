"""Model cards of weights whose training is not recorded: converted ones, and ones that were trained further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from ..auto import MODELS
from ..models.blip2.configuration_blip2 import MMBlip2Config
from .model_card import fill_template, hub_id, public_name

TASKS = {
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForCausalLM": "text-generation",
}
COMPOSED = "composed-image-retrieval"
TYPE_TASKS = {"pic2word": COMPOSED}  # of a trunk with a pipeline of ours
HUB_TAGS = {COMPOSED: "image-feature-extraction"}  # of a task that the Hub does not know
TEXT_TASKS = {
    "zero-shot-image-classification",
    "feature-extraction",
    "image-text-to-text",
    "text-generation",
    COMPOSED,
}


def converted_card(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    origins: Sequence[Mapping[str, Any]],
    license: str,
    model_name: str,
    changes: Sequence[str] = (),
    license_note: str = "",
) -> ModelCard:
    """The card of weights that were published elsewhere and are stored here in the layout of hf_mm.

    Nothing is sent or downloaded; ``card.save(folder / "README.md")`` writes it.

    Args:
        model_class: what the weights were converted to.
        config: of the converted model.
        origins: where the weights came from, a mapping for each source: ``"name"`` (id on the Hub, URL or file; of a
            local path only the last part is printed), and where known ``"revision"`` and ``"sha256"``.
        license: of the weights, an id of the Hub: ``"other"`` where it is not known.
        model_name: what the reader opens: a folder, or the id of the repository.
        changes: sentences about what else this conversion did than to rename tensors.
        license_note: what is known of a licence that is ``"other"``.

    Returns:
        The card, with metadata for the Hub.

    Raises:
        ValueError: no origin is given, or the model class is not in the table of models.
    """
    if not origins:
        raise ValueError("a card of converted weights needs at least one origin: name the checkpoint they come from.")
    base_models = [origin["name"] for origin in origins if _is_on_the_hub(origin)]
    return _card(
        "converted",
        model_class,
        config,
        license=license,
        model_name=model_name,
        metadata={"base_model": base_models or None},
        origins=[_shown(origin) for origin in origins],
        changes=changes,
        license_note=license_note,
    )


def finetuned_card(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    license: str,
    model_name: str,
    base_model: str | None = None,
    dataset: str | None = None,
) -> ModelCard:
    """The card of weights that were trained further, by a run of which nothing is recorded but what is given here.

    Nothing is sent or downloaded; ``card.save(folder / "README.md")`` writes it.

    Args:
        model_class: what was trained.
        config: of the model.
        license: of the weights, an id of the Hub: ``"other"`` where it is not settled.
        model_name: what the reader opens: a folder, or the id of the repository.
        base_model: what the training began from: an id of the Hub with its owner, or another name; None where it is not
            known. Of a local path the last part is printed.
        dataset: what it was trained on, likewise.

    Returns:
        The card, with metadata for the Hub.

    Raises:
        ValueError: the model class is not in the table of models.
    """
    return _card(
        "finetuned",
        model_class,
        config,
        license=license,
        model_name=model_name,
        metadata={"base_model": _owned_id(base_model), "datasets": [dataset] if _owned_id(dataset) else None},
        base_model=public_name(base_model) if base_model else "",
        dataset=public_name(dataset) if dataset else "",
    )


def _card(
    template: str,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    *,
    license: str,
    model_name: str,
    metadata: dict[str, Any],
    **values: Any,
) -> ModelCard:
    """A card with what the config tells, and further metadata and values of its template."""
    task = task_of(model_class, config)
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=HUB_TAGS.get(task, task),
        tags=["hf_mm", config.model_type],
        **metadata,
    )
    text = fill_template(
        template,
        model_name=model_name,
        model_class=model_class.__name__,
        auto_class=_auto_class_of(model_class, config),
        parts=parts_of(config),
        parameters=count_parameters(model_class, config),
        dtype=_dtype_of(config),
        license=license,
        task=task,
        reads_by_clip=task in TEXT_TASKS and config.model_type != MMBlip2Config.model_type,
        **values,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def task_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> str | None:
    """The task of a model class of the table: by its AutoClass, for trunks by their type or by what they read.

    Returns:
        The name of its pipeline; None for a part that reads what no pipeline takes.

    Raises:
        ValueError: the table has no such class for this type of model.
    """
    auto_class = _auto_class_of(model_class, config)
    if auto_class in TASKS:
        return TASKS[auto_class]
    by_input = {"pixel_values": "image-feature-extraction", "input_ids": "feature-extraction"}
    return TYPE_TASKS.get(config.model_type, by_input.get(model_class.main_input_name))


def count_parameters(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    """Number of parameters, counted on a model without memory."""
    with torch.device("meta"):
        return model_class(config).num_parameters()


def parts_of(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The configs that a composite is made of, by name; of a single model, its own."""
    parts = {name.removesuffix("_config"): getattr(config, name) for name in config.sub_configs}
    return {name: part for name, part in parts.items() if part is not None} or {"model": config}


def _auto_class_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """The most specific AutoClass that opens this class."""
    entry = MODELS.get(config.model_type)
    names = [auto.__name__ for auto, model in entry.models.items() if model is model_class] if entry else []
    if not names:
        raise ValueError(f"{model_class.__name__} is not a class of the type {config.model_type!r} in hf_mm's table.")
    return next((name for name in TASKS if name in names), names[0])


def _dtype_of(config: PreTrainedConfig) -> str:
    return str(config.dtype or torch.float32).removeprefix("torch.")


def _owned_id(name: str | None) -> str | None:
    """The name, if it is an id of the Hub with its owner: one without may be any name."""
    return hub_id(name) if name and "/" in name else None


def _is_on_the_hub(origin: Mapping[str, Any]) -> bool:
    """A name without an owner may be that of a file: only one with a commit is an id."""
    return hub_id(origin["name"]) is not None and ("/" in origin["name"] or origin.get("revision") is not None)


def _shown(origin: Mapping[str, Any]) -> dict[str, str | None]:
    """An origin as the card prints it: of a URL without its query, of a local path the last part."""
    name = origin["name"].split("?")[0] if "://" in origin["name"] else public_name(origin["name"])
    return {"name": name, "revision": origin.get("revision"), "sha256": origin.get("sha256")}
