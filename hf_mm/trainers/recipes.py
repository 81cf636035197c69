"""Reading a recipe: one YAML file, with command-line flags over it; and the folder that its run fills."""

from __future__ import annotations

import difflib
import json
import platform
import shutil
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch
import transformers
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import write_json
from ..version import __version__
from .checkpointing import latest_checkpoint

RECIPE_FILE = "recipe.json"
RESULT_FILE = "results.json"
LEFT_BY_A_RUN = (
    *(RESULT_FILE, "model.safetensors", "config.json", "README.md"),
    *("log_history.json", "studies.json", "report.html", "qformer_tokenizer"),
)

# Settings of TrainingArguments that the trained weights depend on.
DECISIVE = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "seed", "data_seed", "bf16", "fp16"),
)
SAMPLING, AT_RANDOM = "train_sampling_strategy", "random"  # decisive too, but unknown to runs from before it was
# Settings of other groups that it does not depend on.
INDECISIVE = {"cache_images", "features_batch_size", "features_dir", "overwrite", "strict"}


def read_recipe(path: str | Path) -> dict:
    """Reads a recipe's YAML: sections of settings, flattened into one dictionary.

    A recipe may begin with ``extends: other.yaml`` (a file beside it) and then needs only what differs.

    Raises:
        ValueError: the file does not exist or is not YAML, is not made of sections, or sets something twice.
    """
    path = Path(path)
    try:
        sections = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ValueError(f"recipe {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path} is not YAML: {error}.") from error
    if not isinstance(sections, dict):
        raise ValueError(f"recipe {path} must be made of sections of settings.")
    base = sections.pop("extends", None)
    settings = {}
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise ValueError(f"recipe {path}: {section!r} must be a section of settings, not {values!r}.")
        if twice := settings.keys() & values.keys():
            raise ValueError(f"recipe {path} sets {sorted(twice)[0]!r} in two sections.")
        settings |= values
    return {**read_recipe(path.with_name(base)), **settings} if base else settings


def parse_recipe(argument_classes: tuple[type, ...], argv: list[str] | None = None) -> tuple:
    """Parses ``[recipe.yaml] [--flag value ...]`` into one instance of each argument class; flags win.

    Raises:
        ValueError: the recipe sets something that no argument class knows.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(argument_classes)
    if argv and not argv[0].startswith("-"):
        settings = read_recipe(recipe := argv.pop(0))
        known = {field.name for argument_class in argument_classes for field in fields(argument_class) if field.init}
        for name in settings.keys() - known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"recipe {recipe} sets {name!r}, which does not exist" + (f": {close[0]!r}?" if close else ".")
            )
        parser.set_defaults(**settings)
    return parser.parse_args_into_dataclasses(args=argv)


def decisive_settings(*groups) -> dict:
    """What a run's result depends on: every setting of its own groups, and those of Trainer that matter."""
    settings = {}
    for group in groups:
        if isinstance(group, TrainingArguments):
            own = {f.name for f in fields(group)} - {f.name for f in fields(TrainingArguments)}
            settings |= {name: getattr(group, name) for name in (*DECISIVE, *sorted(own))}
            if (sampling := getattr(group, SAMPLING)) != AT_RANDOM:
                settings[SAMPLING] = sampling
            workers = group.dataloader_num_workers
        else:
            settings |= asdict(group)
    if settings.get("streaming"):
        settings["dataloader_num_workers"] = workers
    kept = {name: value for name, value in settings.items() if name not in INDECISIVE}
    return json.loads(json.dumps(kept, default=str))


def refuse_other_sampling(args: TrainingArguments, *known: str) -> None:
    """For recipes whose batches are drawn at random by a sampler of their own, or in one of the `known` ways.

    Raises:
        ValueError: another `train_sampling_strategy` is set, which nothing would follow.
    """
    if (sampling := getattr(args, SAMPLING)) not in (AT_RANDOM, *known):
        raise ValueError(f"batches are drawn {' or '.join((AT_RANDOM, *known))}: {SAMPLING} cannot be {sampling}.")


def claim_output_dir(output_dir: str | Path, settings: dict, overwrite: bool = False) -> None:
    """Makes the folder of a run and writes its settings there; a folder that holds another run is refused.

    Args:
        output_dir: where the run writes.
        settings: what its result depends on, see `decisive_settings`.
        overwrite: start anew: what the earlier run left is removed.

    Raises:
        ValueError: the folder holds a run with other settings; the sentence names the first that differs.
    """
    folder = Path(output_dir)
    if overwrite:
        left = [folder / name for name in LEFT_BY_A_RUN if (folder / name).exists()]
        for file in (*left, *folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
            _remove(file)
    else:
        _refuse_another_run(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECIPE_FILE, settings, sort_keys=True)


def is_finished(args: TrainingArguments, settings: dict) -> bool:
    """Whether the folder of a run holds its end. Asked before anything is opened or computed.

    Raises:
        ValueError: see `claim_output_dir`.
    """
    if args.overwrite:
        return False
    _refuse_another_run(Path(args.output_dir), settings)
    return (Path(args.output_dir) / RESULT_FILE).exists()


def starting_point(args: TrainingArguments, settings: dict) -> str | None:
    """The checkpoint that a run goes on from, or None, in the folder that the first process claims for it. Asked when all
    is ready to train, so that a run that fails before leaves its folder free.

    Raises:
        ValueError: see `claim_output_dir`.
    """
    with args.main_process_first(local=False, desc="claiming the output folder"):
        if args.process_index == 0:
            claim_output_dir(args.output_dir, settings, args.overwrite)
        return latest_checkpoint(args.output_dir)


def _refuse_another_run(folder: Path, settings: dict) -> None:
    if not (folder / RECIPE_FILE).exists():
        return
    earlier = json.loads((folder / RECIPE_FILE).read_text("utf-8"))
    for name in sorted(settings.keys() | earlier.keys()):
        if earlier.get(name) != settings.get(name):
            raise ValueError(
                f"{folder} holds a run with {name} = {earlier.get(name)!r}, now it is {settings.get(name)!r}: "
                "choose another --output_dir, or start anew with --overwrite true or by removing that folder."
            )


def _remove(path: Path) -> None:
    """Removes a file or a folder, which is gone at once, never half."""
    if path.is_dir():
        aside = path.with_name(f".{path.name}.removed")
        path.replace(aside)
        shutil.rmtree(aside)
    else:
        path.unlink()


def describe_machine(args: TrainingArguments) -> dict[str, str | int]:
    """What a run ran on, for its card."""
    return {
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type.upper(),
        "processes": args.world_size,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_mm": __version__,
    }
