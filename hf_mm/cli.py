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
    """``hf-mm convert clip|vit|pic2word|blip2 SOURCE OUT``: see `hf_mm.hub.convert`."""
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
    pic2word = _add_conversion(
        models,
        "pic2word",
        help="Pic2Word of the authors, with the CLIP that it was trained on",
        source="pic2word_model.pt, a folder with it, or id of the Hub",
        layouts=("pic2word",),
    )
    pic2word.add_argument(
        "--clip", metavar="C", help="as for convert clip, or a folder of ours (default: the one stored)"
    )
    pic2word.add_argument("--clip-revision", metavar="R", help="of a Hub id: branch, tag or commit")
    pic2word.add_argument("--tokenizer", metavar="FOLDER", help="with the vocabulary, where the CLIP has none")
    pic2word.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="to write (default: float32)")
    blip2 = _add_conversion(
        models,
        "blip2",
        help="BLIP-2 of LAVIS or transformers, with its frozen parts",
        source="file of LAVIS (blip2_pretrained*.pth, …), folder, or id of the Hub",
        layouts=("transformers", "lavis"),
    )
    blip2.add_argument(
        "--vision", metavar="V", help="the tower that LAVIS's file lacks: eva_vit_g.pth or a CLIP ViT-L/14"
    )
    blip2.add_argument("--vision-revision", metavar="R", help="of a Hub id: branch, tag or commit")
    blip2.add_argument(
        "--language-model", metavar="L", help="that LAVIS's file of stage 2 lacks: folder or id of the Hub"
    )
    blip2.add_argument("--language-model-revision", metavar="R", help="of a Hub id: branch, tag or commit")
    blip2.add_argument(
        "--tokenizer", metavar="T", help="folder or id (default: the language model's, the folder's, or BERT's)"
    )
    blip2.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="to write (default: the widest of the sources)"
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
        functions = {
            "clip": convert.convert_clip,
            "vit": convert.convert_vit,
            "pic2word": convert.convert_pic2word,
            "blip2": convert.convert_blip2,
        }
        folder = functions[arguments.model](arguments.source, arguments.out, **options)
    elif options:
        names = ", ".join(FLAGS.get(name) or f"--{name.replace('_', '-')}" for name in options)
        raise ValueError(f"--to {layout} writes a folder for another library: leave {names} out.")
    else:
        functions = {
            "clip": convert.export_clip,
            "vit": convert.export_vit,
            "pic2word": convert.export_pic2word,
            "blip2": convert.export_blip2,
        }
        folder = functions[arguments.model](arguments.source, arguments.out, layout)
    print(f"The model is in {folder}.")


def add_evaluate(subparsers) -> None:
    """``hf-mm evaluate PROTOCOL MODEL DATA_FOLDER``: see `hf_mm.evaluation.composed`."""
    parser = subparsers.add_parser("evaluate", help="measure a model by a published protocol on your copy of its data")
    protocols = parser.add_subparsers(metavar="PROTOCOL", required=True)
    _add_protocol(protocols, "domain-conversion", "a photo in the style of …: ImageNet to ImageNet-R")
    objects = _add_protocol(protocols, "object-composition", "one object and the names of the others: COCO val2017")
    objects.add_argument("--queries", metavar="FILE", help="objects drawn: read if it is there, else written")
    objects.add_argument("--seed", type=int, help="of the draw (default: 0)")
    objects.add_argument(
        "--published-area", action="store_true", help="draw tiny objects too, as the published code does"
    )
    cirr = _add_protocol(protocols, "cirr", "a picture and what is different: CIRR rc2")
    cirr.add_argument("--split", choices=("val", "test1"), help="default: val")
    cirr.add_argument("--submission", metavar="FILE", help="write files for the evaluation server, needed for test1")
    _add_protocol(protocols, "fashioniq", "a garment and two sentences: FashionIQ val")


def _add_protocol(protocols, name: str, help: str) -> argparse.ArgumentParser:
    """The arguments that all protocols share; the options are there only where they are given."""
    parser = protocols.add_parser(name, help=help, argument_default=argparse.SUPPRESS)
    parser.add_argument("model", help="folder or id of the Hub of a Pic2Word model with its processor")
    parser.add_argument("folder", type=Path, help="the data as it is published; nothing is downloaded")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: 256")
    parser.set_defaults(run=run_evaluate, protocol=name)
    return parser


def run_evaluate(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModel, AutoProcessor

    from .evaluation.composed import PROTOCOLS
    from .evaluation.composed.protocol import write_json
    from .evaluation.composed.table import format_table

    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "protocol", "model")}
    output = options.pop("output", None)
    for name, file in (("output", output), ("submission", options.get("submission"))):
        if file is not None and Path(file).is_dir():
            raise ValueError(f"--{name} {file} is a folder: name a file.")
    if arguments.model.startswith(("/", ".", "~")) and not Path(arguments.model).expanduser().is_dir():
        raise ValueError(f"there is no folder {arguments.model}: name the folder or the Hub id of a Pic2Word model.")
    model = AutoModel.from_pretrained(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(arguments.model)
    result = PROTOCOLS[arguments.protocol](model, processor, **options)
    print(format_table(result))
    for file in result.get("submissions", ()):
        print(f"{file} is for the evaluation server.")
    if output is not None:
        write_json(output, result)
        print(f"The results are in {output}.")


COMMANDS = (add_push, add_card, add_convert, add_evaluate)


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
