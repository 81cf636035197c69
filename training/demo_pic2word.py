"""Pic2Word in one command: train it from three seeds on real pictures, compare, open it anew, show it.

    python training/demo_pic2word.py training/recipes/pic2word_emoji.yaml --output_dir outputs/demo-pic2word
    python training/demo_pic2word.py RECIPE.yaml --seeds 0
    python training/demo_pic2word.py --open outputs/demo-pic2word

All seeds share one cache of CLIP's embeddings. The model of the first seed is the one that is shown; those of the others
lie beside it (``outputs/demo-pic2word-seed1``). A second call finds the finished runs and only opens and shows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

from demo_clip import is_missing_or_older
from train_clip import LOG_FILE
from train_pic2word import train
from transformers import AutoModel, AutoProcessor, pipeline

from hf_mm.data.emoji import load_emoji
from hf_mm.evaluation.emoji_composed import STYLE_PROMPT, TRAINED_STYLES, EmojiPictures, embed_emoji
from hf_mm.evaluation.formatting import format_percent
from hf_mm.pipelines.image_index import DESCRIPTION_FILE, ImageIndex
from hf_mm.plots.pic2word_report import METHODS, ROWS, SPLITS, TASKS, pic2word_report
from hf_mm.trainers.recipes import RECIPE_FILE, RESULT_FILE

INDEX = "index"


def train_seeds(argv: list[str], seeds: list[int]) -> tuple[list[Path], EmojiPictures | None]:
    """Trains a mapping network from each seed, over one cache of features where the recipe has a `features_dir`.

    Returns:
        The folders, and the bundled pictures through CLIP, if anything was trained on them.
    """
    first = train([*argv, "--seed", str(seeds[0])])
    settings = json.loads((first / RECIPE_FILE).read_text())
    rest = {seed: Path(f"{first}-seed{seed}") for seed in seeds[1:]}
    is_done = all((folder / RESULT_FILE).exists() for folder in rest.values())
    pictures = None
    if settings["source"] == "emoji" and not is_done:
        pictures = embed_emoji(AutoModel.from_pretrained(first), AutoProcessor.from_pretrained(first))
    for seed, folder in rest.items():
        train([*argv, "--seed", str(seed), "--output_dir", str(folder)], pictures)
    return [first, *rest.values()], pictures


def print_metrics(runs: list[dict], seeds: list[int]) -> None:
    """Recalls for each domain beside the baselines, and whether the seeds agree on who is better.

    Args:
        runs: the metrics of each seed.
        seeds: likewise.
    """
    for name, task in TASKS.items():
        for split, first in runs[0][name].items():
            results = [run[name][split]["results"] for run in runs]
            questions, domains = sum(first["queries"].values()), (*task.domains, "mean")
            print(
                f"\n{task.title}: {SPLITS.get(split, split)}\n{questions:,} questions “{first['prompt']}” among "
                f"{first['gallery']:,} pictures; R@1 / R@10 / R@50 in %, mean of the seeds (the baselines have none)"
            )
            print(f"{'':<25}" + "".join(f"{domain:>20}" for domain in domains))
            for method, label in ROWS.items():
                cells = [
                    " / ".join(
                        format_percent(mean(result[domain][method][metric] for result in results))
                        for metric in ("r1", "r10", "r50")
                    )
                    for domain in domains
                ]
                print(f"{label:<25}" + "".join(f"{cell:>20}" for cell in cells))
            for metric in ("r10", "r50"):
                print(compare_seeds([result["mean"] for result in results], seeds, metric))


def compare_seeds(results: list[dict], seeds: list[int], metric: str) -> str:
    """The model of each seed against the best of the baselines that read its CLIP's embeddings, in a sentence."""
    values = [result["composed"][metric] for result in results]
    baselines = list(METHODS)[1:]
    best = max(baselines, key=lambda method: results[0][method][metric])
    margin, spread = mean(values) - results[0][best][metric], max(values) - min(values)
    verdict = f"a margin of {margin:+.1f} points"
    if len(seeds) > 1:
        place = (
            "above it by more than" if margin > spread else "below it by more than" if margin < -spread else "within"
        )
        verdict += f", {place} the spread of the seeds ({spread:.1f})"
    return (
        f"R@{metric[1:]}, mean: seeds {', '.join(map(str, seeds))} reach {', '.join(f'{value:.1f}' for value in values)} "
        f"(mean {mean(values):.1f}, least {min(values):.1f}, most {max(values):.1f}); {METHODS[best]} reaches "
        f"{results[0][best][metric]:.1f}: {verdict}."
    )


def show(folder: Path, pictures: int = 6, top_k: int = 3) -> None:
    """Opens a trained model and its index as a stranger would, and asks for drawings by other artists."""
    search = pipeline("composed-image-retrieval", model=str(folder), index=folder / INDEX)
    unseen = load_emoji("concept", normalize_size=True).shuffle(seed=0).select(range(pictures))
    queries = [
        {"image": row["image"], "text": STYLE_PROMPT.format(style=style)}
        for row in unseen
        for style in TRAINED_STYLES
        if style != row["style"]
    ]
    answers = iter(search(queries, top_k=top_k, exclude_query=True))
    print(
        f"\nAsked among the {len(search.index):,} pictures of the index (✓ a right answer, drawn by the asked artist):"
    )
    for row in unseen:
        print(f"{row['caption']} by {row['style']}")
        for style in (style for style in TRAINED_STYLES if style != row["style"]):
            found = [
                f"{'✓ ' if (answer['caption'], answer['style']) == (row['caption'], style) else ''}"
                f"{answer['caption'][:24]} by {answer['style']} {answer['score']:.2f}"
                for answer in next(answers)
            ]
            print(f"  {STYLE_PROMPT.format(style=style):<26}→ {', '.join(found)}")


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="The recipe, and any other flag, is that of train_pic2word.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one mapping network each")
    parser.add_argument("--open", type=Path, metavar="FOLDER", help="only open what was trained, and show it")
    arguments, recipe = parser.parse_known_args()
    if arguments.open:
        show(arguments.open)
        return
    folders, pictures = train_seeds(recipe, arguments.seeds)
    folder, runs = folders[0], [json.loads((each / RESULT_FILE).read_text()) for each in folders]
    if runs[0]["data"]["source"] != "emoji":
        print(f"The demo shows the bundled pictures only; the model trained on yours is in {folder}.")
        return
    print_metrics([run["metrics"] for run in runs], arguments.seeds)

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    if is_missing_or_older(folder / INDEX / DESCRIPTION_FILE, folder / RESULT_FILE):
        emoji = load_emoji("all", normalize_size=True).select_columns(["image", "caption", "style", "split"])
        ImageIndex.build(model, processor, emoji).save(folder / INDEX)
    subprocess.run([sys.executable, __file__, "--open", str(folder)], check=True)

    report = folder / "report.html"
    if is_missing_or_older(report, folder / RESULT_FILE):
        log_history = json.loads((folder / LOG_FILE).read_text())
        pic2word_report(model, processor, runs[0]["metrics"], log_history, report, pictures)
    seconds = " + ".join(f"{run['training']['seconds']:.0f}" for run in runs)
    print(f"\nTraining took {seconds} s, this call {time.perf_counter() - started:.0f} s.")
    print(f"Model:  {folder}\nReport: {report.resolve()}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
