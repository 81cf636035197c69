"""Model cards, filled from the run that made the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import PreTrainedModel

from ..evaluation.formatting import format_percent
from .standalone import INSTALL

EMOJI = "emoji"  # the source of the bundled pictures
EMOJI_NAME = "Emoji by four artists"
PIPELINE_TAGS = {  # by template; the Hub has none for composed retrieval
    "clip": "zero-shot-image-classification",
    "pic2word": "image-feature-extraction",
    "blip2_stage1": "zero-shot-image-classification",
    "blip2": "image-text-to-text",
}
RECALLS = {
    f"{prefix}r{k}": (f"recall_at_{k}", f"{name} R@{k}")
    for prefix, name in (
        ("i2t_", "picture to caption"),
        ("t2i_", "caption to picture"),
        ("word_", "picture as a word to picture"),
        ("", "picture and words to picture"),
    )
    for k in (1, 5, 10, 50)
}


def find_template(name: str) -> Path:
    """The Markdown template of a model's card, in the installed package or in a checkout.

    Args:
        name: name of the template, ``"clip"``.

    Returns:
        Its path.

    Raises:
        ValueError: there is no such template.
    """
    package = Path(__file__).parents[1]
    folders = [package / "model_cards", package.parent / "model_cards"]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    names = sorted(file.stem for file in folder.glob("*.md")) if folder else []
    if name not in names:
        raise ValueError(f"there is no model card template {name!r}: choose from {', '.join(names) or 'none'}.")
    return folder / f"{name}.md"


def build_model_card(
    template: str,
    *,
    model_name: str,
    model: PreTrainedModel,
    metrics: dict[str, Any],
    training: dict[str, Any],
    data: dict[str, Any],
    settings: dict[str, Any],
    machine: dict[str, Any],
    license: str,
) -> ModelCard:
    """Fills a template from a training run. Nothing is sent or downloaded; ``card.save(folder / "README.md")`` writes it.

    Of sources and settings that are local paths, only the last part is printed.

    Args:
        template: name of the template, see `find_template`.
        model_name: what the reader opens: a folder, or the id of the repository.
        model: the trained model.
        metrics: what `hf_mm.evaluation` returned: a dict of retrieval metrics, such a dict for each test set, or several
            evaluations of either kind by name; or for each evaluation what `hf_mm.evaluation.emoji_composed`
            returns for each test set. A dict whose ``"is_result"`` is False is left out. Empty if there was none.
        training: facts of the run to print, such as its steps and seconds.
        data: ``"source"``, ``"pictures"`` (0 where unknown), ``"skipped"``, the rows left out with reasons, and where it
            was recorded ``"is_local"``: by name of the setting, whether ``source`` and ``model_name_or_path`` were paths
            where the run was. Without it a name is taken for a path where there is such a file now.
        settings: what the run was set to, for the bundled pictures with the ``"split"``; nested settings are printed with
            dots, empty ones left out.
        machine: hardware and versions.
        license: the weights' licence, an id of the Hub: ``"other"`` where it is not settled.

    Returns:
        The card, with metadata for the Hub.

    Raises:
        ValueError: there is no such template.
    """
    source, base_model = data["source"], settings.get("model_name_or_path")
    is_local = data.get("is_local", {})
    dataset = hub_id(source, is_local.get("source"))
    shown_source = public_name(source, is_local.get("source"))
    is_local_name = {base_model: is_local.get("model_name_or_path")}
    evaluations = _evaluations(metrics)
    text = fill_template(
        template,
        model_name=model_name,
        config=model.config,
        parameters=model.num_parameters(),
        trained_parameters=model.num_parameters(only_trainable=True),
        license=license,
        is_emoji=source == EMOJI,
        source=shown_source,
        dataset=dataset,
        base_model=public_name(base_model, is_local.get("model_name_or_path")) if base_model else "",
        bases={
            part: {**base, "name": public_name(base["name"] or "", is_local_name.get(base["name"]))}
            for part, base in (getattr(model.config, "base_models", None) or {}).items()
        },
        pictures=data["pictures"],
        skipped=len(data["skipped"]),
        evaluations=evaluations,
        training=training,
        settings=dict(_flatten(settings, is_local)),
        machine=machine,
    )
    metadata = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[template],
        tags=["hf_mm", model.config.model_type],
        datasets=[dataset] if dataset else None,
        base_model=hub_id(base_model, is_local.get("model_name_or_path")),
        model_name=model_name,
        eval_results=list(_eval_results(evaluations, EMOJI_NAME if source == EMOJI else shown_source, dataset))
        or None,
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n")


def fill_template(name: str, **values: Any) -> str:
    """Renders the template of that name, which may use ``install`` and the values.

    Raises ValueError where there is no such template, UndefinedError for a missing value.
    """
    path = find_template(name)
    environment = Environment(
        loader=FileSystemLoader(path.parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": format_percent, "cell": _table_cell}
    return environment.get_template(path.name).render(install=INSTALL, **values)


def _evaluations(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Metrics as ``{name of the evaluation: {name of the test set: row}}``, with what else an evaluation returned."""
    if _is_row(metrics):
        metrics = {"held_out": metrics}
    if any(_is_row(value) for value in metrics.values()):
        metrics = {"": metrics}
    kept = {
        name: {key: row for key, row in evaluation.items() if not _is_row(row) or row.get("is_result", True)}
        for name, evaluation in metrics.items()
    }
    return {name: evaluation for name, evaluation in kept.items() if evaluation}


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and not RECALLS.keys().isdisjoint(value)


def _eval_results(evaluations: dict[str, dict[str, Any]], name: str, dataset: str | None) -> Iterator[EvalResult]:
    """Every recall, for the model index; the Hub asks for a type of data set without blanks where there is no id."""
    dataset_type = dataset or re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-") or "private"
    for task_type, evaluation, test_set, row in _result_rows(evaluations):
        for metric in (metric for metric in RECALLS if metric in row):
            metric_type, metric_name = RECALLS[metric]
            yield EvalResult(
                task_type=task_type,
                dataset_type=dataset_type,
                dataset_name=name,
                dataset_config=evaluation or None,
                dataset_split=test_set,
                metric_type=metric_type,
                metric_name=metric_name,
                metric_value=row[metric],
            )


def _result_rows(evaluations: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str, dict[str, float]]]:
    """Task, evaluation, test set and recalls of the model itself; of composed retrieval for each group of queries."""
    for evaluation, test_sets in evaluations.items():
        for test_set, row in test_sets.items():
            if _is_row(row):
                yield "image-text-retrieval", evaluation, test_set, row
            elif isinstance(row, dict):
                for group, methods in row.get("results", {}).items():
                    yield "composed-image-retrieval", f"{evaluation} {group}", test_set, methods["composed"]


def shown_name(folder: Path) -> str:
    """What a card opens: the folder as the command had it, or its name alone where that is a path of one machine."""
    is_one_machines = folder.is_absolute() or ".." in folder.parts or not folder.parts
    return folder.resolve().name if is_one_machines else folder.as_posix()


def hub_id(name: str | None, is_local: bool | None = None) -> str | None:
    """The name, if it is one of the Hub and not of a file or of the bundled pictures.

    Args:
        name: of a data set or model.
        is_local: whether it is that of a file; None looks for one.
    """
    if name is None or name == EMOJI or (Path(name).exists() if is_local is None else is_local):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def public_name(name: str, is_local: bool | None = None) -> str:
    """The name as it may be printed: of a local path, the last part only. See `hub_id`."""
    return name if hub_id(name, is_local) else Path(name).name


def _flatten(settings: dict[str, Any], is_local: Mapping[str, bool], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, is_local, f"{prefix}{name}.")
        elif isinstance(value, str):
            known = is_local.get(prefix + name)
            yield prefix + name, public_name(value, known) if _may_be_path(value, known) else value
        elif value is not None:
            yield prefix + name, value


def _may_be_path(value: str, is_local: bool | None) -> bool:
    """Whether a setting may be a path or an id, and no sentence in which a slash stands."""
    is_sentence = " " in value and not (is_local or Path(value).is_absolute() or Path(value).exists())
    return "/" in value and not is_sentence


def _table_cell(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return str(value).replace("|", "\\|")
