"""Reading a recipe: one YAML file, with command-line flags over it; and the folder that its run fills."""

from __future__ import annotations

import difflib
import json
import sys
from dataclasses import fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser

RECIPE_FILE = "recipe.json"


def read_recipe(path: str | Path) -> dict:
    """Reads a recipe's YAML: sections of settings, flattened into one dictionary.

    Raises:
        ValueError: the file does not exist or is not YAML, is not made of sections, or sets something twice.
    """
    try:
        sections = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"recipe {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path} is not YAML: {error}.") from error
    settings = {}
    for section, values in (sections or {}).items():
        if not isinstance(values, dict):
            raise ValueError(f"recipe {path}: {section!r} must be a section of settings, not {values!r}.")
        if twice := settings.keys() & values.keys():
            raise ValueError(f"recipe {path} sets {sorted(twice)[0]!r} in two sections.")
        settings |= values
    return settings


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


def claim_output_dir(output_dir: str | Path, recipe: dict, overwrite: bool = False) -> None:
    """Makes the folder of a run and writes its recipe there; a folder that holds another run is refused.

    Args:
        output_dir: where the run writes.
        recipe: the settings that its result depends on, as JSON.
        overwrite: take the folder over: what it holds is left in place, its checkpoints are removed by the caller.

    Raises:
        ValueError: the folder holds a run of another recipe; the sentence names the first setting that differs.
    """
    path = Path(output_dir) / RECIPE_FILE
    recipe = json.loads(json.dumps(recipe, default=str))
    if path.exists() and not overwrite:
        earlier = json.loads(path.read_text())
        for name in sorted(recipe.keys() | earlier.keys()):
            if earlier.get(name) != recipe.get(name):
                raise ValueError(
                    f"{output_dir} holds a run with {name} = {earlier.get(name)!r}, now it is {recipe.get(name)!r}: "
                    "choose another --output_dir, or pass --overwrite to start anew."
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(recipe, indent=2, sort_keys=True))
    aside.replace(path)
