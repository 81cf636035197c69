"""The command ``hf-mm``: a door to functions of the package. ``hf-mm COMMAND --help`` says what each takes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_push(subparsers) -> None:
    """``hf-mm push FOLDER REPO_ID``: see `hf_mm.hub.push.push_folder`."""
    parser = subparsers.add_parser("push", help="push a saved model to the Hub, in one commit")
    parser.add_argument("folder", type=Path, help="folder with model, processor and card")
    parser.add_argument("repo_id", help="repository, name/model")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="R", help="branch that the commit goes to (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request in place of a commit")
    parser.add_argument("--message", metavar="M", help="of the commit")
    code = parser.add_mutually_exclusive_group()
    code.add_argument("--shim", action="store_true", help="add code that needs hf_mm installed, but not imported")
    code.add_argument("--no-standalone", action="store_true", help="add no code: the model opens after import hf_mm")
    parser.set_defaults(run=run_push)


def run_push(arguments: argparse.Namespace) -> None:
    from .hub.push import push_folder

    url = push_folder(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private,
        revision=arguments.revision,
        commit_message=arguments.message,
        create_pr=arguments.create_pr,
        standalone=not arguments.no_standalone,
        shim=arguments.shim,
    )
    print(f"{arguments.folder} is pushed: {url}")


def add_card(subparsers) -> None:
    """``hf-mm card FOLDER``: see `hf_mm.hub.folder_card.write_card`."""
    parser = subparsers.add_parser("card", help="write the card of a trained or converted model")
    parser.add_argument(
        "folder", type=Path, help="folder of a finished run, of converted weights, or of a tuned model"
    )
    parser.add_argument("--license", default="other", metavar="L", help="of the weights, an id of the Hub")
    parser.add_argument("--name", metavar="N", help="what the reader opens: the repository's id (default: the folder)")
    parser.add_argument("--base-model", metavar="B", help="what a tuned model began from, an id of the Hub or a name")
    parser.add_argument("--dataset", metavar="D", help="what it was tuned on, an id of the Hub or a name")
    parser.set_defaults(run=run_card)


def run_card(arguments: argparse.Namespace) -> None:
    from .hub.folder_card import write_card

    card = write_card(
        arguments.folder,
        arguments.license,
        arguments.name,
        base_model=arguments.base_model,
        dataset=arguments.dataset,
    )
    print(f"The card is in {card}.")


FLAGS = {"num_attention_heads": "--heads"}  # of the arguments of functions that are called otherwise


def add_convert(subparsers) -> None:
    """``hf-mm convert clip|vit SOURCE OUT``: see `hf_mm.hub.convert`."""
    parser = subparsers.add_parser("convert", help="convert a published checkpoint to a folder of ours, or one back")
    models = parser.add_subparsers(metavar="MODEL", required=True)
    clip = _add_conversion(
        models,
        "clip",
        help="CLIP of OpenAI, open_clip or transformers",
        source="name of OpenAI's (RN50, ViT-B/32, …), file, folder, or id of the Hub",
        layouts=("transformers", "open_clip"),
    )
    clip.add_argument("--activation", choices=("quick_gelu", "gelu"), help="of a file without open_clip_config.json")
    clip.add_argument("--preset", metavar="P", help="published size of such a file (default: its shapes tell)")
    clip.add_argument("--tokenizer", metavar="FOLDER", help="with the vocabulary, where the source has none")
    vit = _add_conversion(
        models,
        "vit",
        help="ViT of the authors (.npz), transformers or timm",
        source="file, folder, or id of the Hub",
        layouts=("transformers", "timm"),
    )
    vit.add_argument("--activation", metavar="A", help="of timm's weights that do not tell")
    vit.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="where pictures are not square")
    vit.add_argument(
        "--heads", type=int, dest="num_attention_heads", metavar="N", help="where no published size tells"
    )


def _add_conversion(models, name: str, help: str, source: str, layouts: tuple[str, ...]) -> argparse.ArgumentParser:
    """The arguments that all models share; the options are there only where they are given."""
    parser = models.add_parser(name, help=help, argument_default=argparse.SUPPRESS)
    parser.add_argument("source", help=source)
    parser.add_argument("out", type=Path, help="folder to write, which must not hold anything")
    parser.add_argument("--check", action="store_true", help="compare with the library it was published for first")
    parser.add_argument("--push-to-hub", metavar="ID", help="push the folder to this repository")
    parser.add_argument("--revision", metavar="R", help="of a Hub id: branch, tag or commit")
    parser.add_argument("--license", metavar="L", help="of the weights, an id of the Hub, for the card")
    parser.add_argument("--to", choices=layouts, dest="layout", help="the way back: SOURCE is a folder of ours")
    parser.set_defaults(run=run_convert, model=name)
    return parser


def run_convert(arguments: argparse.Namespace) -> None:
    from .hub import convert

    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "model", "source", "out")}
    layout = options.pop("layout", None)
    if layout is None:
        functions = {"clip": convert.convert_clip, "vit": convert.convert_vit}
        folder = functions[arguments.model](arguments.source, arguments.out, **options)
    elif options:
        names = ", ".join(FLAGS.get(name) or f"--{name.replace('_', '-')}" for name in options)
        raise ValueError(f"--to {layout} writes a folder for another library: leave {names} out.")
    else:
        functions = {"clip": convert.export_clip, "vit": convert.export_vit}
        folder = functions[arguments.model](arguments.source, arguments.out, layout)
    print(f"The model is in {folder}.")


COMMANDS = (add_push, add_card, add_convert)


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 1 after an error, which is one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="hf-mm", description=__doc__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for add_command in COMMANDS:
        add_command(subparsers)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
