"""The card of a saved folder, filled from what a training run or a conversion left in it, or from what is known."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from ..auto import MODELS
from ..conversion.engine import RECORD
from ..trainers.recipes import RECIPE_FILE, RESULT_FILE
from .converted_card import converted_card, finetuned_card
from .model_card import build_model_card, shown_name
from .standalone import read_config


def write_card(
    folder: str | Path,
    license: str = "other",
    model_name: str | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
) -> Path:
    """Writes, or renews, the ``README.md`` of a saved model: of a finished run, of a conversion, or trained further.

    Args:
        folder: with ``config.json``, and the recipe and the results of a run, or the record of a conversion; one without
            either is taken for a model that was trained further in some other way.
        license: of the weights, an id of the Hub; ``"other"`` where it is not settled.
        model_name: what the reader opens; by default the folder.
        base_model, dataset: of a model that was trained further, see `finetuned_card`.

    Returns:
        Path of the card. It is there whole, or as it was.

    Raises:
        ValueError: the folder holds no model of the table, a record that is damaged or not finished, or one that tells
            the base model and the data set itself.
    """
    folder = Path(folder)
    config = read_config(folder)
    model_name = model_name or shown_name(folder)
    records = [name for name in (RECIPE_FILE, RESULT_FILE, RECORD) if (folder / name).is_file()]
    if records and (base_model or dataset):
        raise ValueError(f"{folder / records[0]} tells base model and data set: leave them out.")
    if {RECIPE_FILE, RESULT_FILE} <= set(records):
        card = _trained_card(folder, config, license, model_name)
    elif RECORD in records:
        _read(folder / RECORD, "sources")
        record = _read(folder / RECORD)
        remarks = record.get("remarks", {})
        card = converted_card(_model_class(config), config, record["sources"], license, model_name, **remarks)
    elif records:
        raise ValueError(
            f"{folder} holds a run that is not finished, of {records[0]} alone: train it to its end first."
        )
    else:
        card = finetuned_card(_model_class(config), config, license, model_name, base_model, dataset)
    aside = folder / ".README.md.tmp"
    card.save(aside)
    return aside.replace(folder / "README.md")


def _trained_card(folder: Path, config: PreTrainedConfig, license: str, model_name: str) -> ModelCard:
    with torch.device("meta"):  # the card counts parameters and reads none
        model = AutoModel.from_config(config)
    results = _read(folder / RESULT_FILE, "metrics", "training", "data", "machine")
    return build_model_card(
        config.model_type.removeprefix("mm_"),
        model_name=model_name,
        model=model,
        settings=_read(folder / RECIPE_FILE),
        license=license,
        **results,
    )


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that was saved; where the config does not tell, the trunk."""
    models = list(MODELS[config.model_type].models.values())
    return next((model for model in models if model.__name__ in (config.architectures or [])), models[0])


def _read(path: Path, *keys: str) -> dict:
    """A JSON file; with `keys`, only these."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key] for key in keys} if keys else content
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of hf_mm: it lacks {error}.") from error
