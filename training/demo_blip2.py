"""BLIP-2 in one command: give a frozen language model eyes, and see how much of what it says is sight.

    python training/demo_blip2.py --output_dir outputs/demo-blip2
    python training/demo_blip2.py --language_model tiny --output_dir outputs/demo-blip2-tiny
    python training/demo_blip2.py --open outputs/demo-blip2

Trains stage 1, the warm-up in words, stage 2, and the last two once more on features of zeros: what a connector learns
without sight from the same budget. Then it captions pictures that training never saw. A second call finds what is done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from demo_clip import is_missing_or_older
from PIL import Image
from tiny_language_model import open_tiny_language_model
from torch import nn
from train_blip2 import SMOLLM2, SPLITS, TestSet, emoji_rows, emoji_set, train
from train_clip import LOG_FILE
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin, pipeline

from hf_mm.data.emoji import load_emoji
from hf_mm.evaluation.caption_ranking import score_captions
from hf_mm.evaluation.captioning import caption_metrics, generate_texts, shuffled_metrics
from hf_mm.evaluation.embeddings import embed_images, embed_texts, inference
from hf_mm.evaluation.picture_gap import picture_gap, rank_captions
from hf_mm.files import write_json
from hf_mm.models.blip2.modeling_blip2 import MMBlip2ForConditionalGeneration, MMBlip2ForPreTraining
from hf_mm.plots.blip2_report import blip2_report
from hf_mm.trainers.recipes import RECIPE_FILE, RESULT_FILE

RECIPES = Path(__file__).parent / "recipes"
RUNS = ("stage1", "words", "stage2", "blind_words", "blind")
TINY = "tiny"
DEMO_FILE = "demo.json"
RANKED = {"cell": "train", "concept": "concept"}  # splits whose captions are ranked, and where other captions are from
CANDIDATES, GROUP = 100, 10  # captions to choose from: in all, and at most of one subgroup
BLIND = "blind"  # no more than what is learnt without sight
ACCEPT = {  # what a run should reach; gaps in nats per token, all else in percent
    "cell": {
        "gap": 0.9,
        "win_rate": 80.0,
        "nll": BLIND,
        "top1": 10.0,
        "top5": 35.0,
        "group_top1": 25.0,
        "word_f1_gain": 6.0,
    },
    "concept": {"gap": 0.8, "win_rate": 80.0, "nll": BLIND, "top5": 15.0, "word_f1_gain": 4.0},
    "style": {"gap": 0.15},
}
TITLES = {"cell": "Known emoji, drawings held out", "concept": "New emoji", "style": "Known emoji, a new artist"}
MEASURES = {  # as the table names them
    "gap": "gap, nats per token",
    "win_rate": "win rate, %",
    "nll": "nats per token",
    "top1": "first of 100, %",
    "top5": "among five of 100, %",
    "group_top1": "first of its kind, %",
    "word_f1": "word F1, %",
    "exact": "exact, %: no claim",
}


def train_all(recipes: str, output_dir: Path, language_model: str, flags: Sequence[str]) -> dict[str, Path]:
    """Trains what is not trained yet. Returns the folder of each of `RUNS`; that of stage 2 is `output_dir`."""
    folders = {name: Path(f"{output_dir}-{name}") for name in RUNS} | {"stage2": output_dir}

    def run(stage: str, name: str, *settings: str) -> None:
        print(f"\n{name.replace('_', ' ')}:", flush=True)
        train([str(RECIPES / recipes.format(stage)), *settings, "--output_dir", str(folders[name]), *flags])

    run("stage1", "stage1")
    words = ("--model_name_or_path", str(folders["stage1"]), "--language_model", language_model)
    run("words", "words", *words)
    run("stage2", "stage2", "--model_name_or_path", str(folders["words"]))
    blind = ("--blind", "true", "--eval_pictures", "8")  # what it says is the same of all, see `look`
    run("words", "blind_words", *words, *blind)
    run("stage2", "blind", "--model_name_or_path", str(folders["blind_words"]), *blind)
    return folders


@dataclass
class Candidates:
    """Captions that pictures are asked to choose from.

    Attributes:
        captions: C of them.
        right: ``(n,)``, the column of each picture's own.
        shared: ``(n, C)`` bool, `CANDIDATES` of them, the same for every picture, which begin with the pictures' own.
        kind: ``(n, C)`` bool, each picture's own and as many others of its subgroup as make `GROUP`, where there are.
    """

    captions: list[str]
    right: torch.Tensor
    shared: torch.Tensor
    kind: torch.Tensor

    @classmethod
    def draw(cls, split: str, own: Sequence[str], seed: int = 0) -> Candidates:
        """For pictures of a split that are called `own`."""
        subgroups = {}
        for source in (split, RANKED[split]):
            emoji = load_emoji(source).select_columns(["caption", "subgroup"])
            subgroups |= zip(emoji["caption"], emoji["subgroup"], strict=True)
        rng, pool = Random(seed), list(dict.fromkeys(own))
        others = sorted(subgroups.keys() - set(pool))
        pool += rng.sample(others, min(len(others), max(0, CANDIDATES - len(pool))))
        kinds = []
        for caption in own:
            near = sorted(one for one in subgroups if subgroups[one] == subgroups[caption] and one != caption)
            kinds.append([caption, *rng.sample(near, min(len(near), GROUP - 1))])
        captions = list(dict.fromkeys([*pool, *(one for kind in kinds for one in kind)]))
        column = {caption: number for number, caption in enumerate(captions)}
        shared, kind = torch.zeros(2, len(own), len(captions), dtype=torch.bool)
        shared[:, : len(pool)] = True
        for row, names in enumerate(kinds):
            kind[row, [column[name] for name in names]] = True
        return cls(captions, torch.tensor([column[caption] for caption in own]), shared, kind)

    def ranks(self, scores: torch.Tensor, prefix: str = "") -> dict[str, float]:
        """How often the right caption is first, or among five, of ``(n, C)`` scores."""
        shared = rank_captions(scores.masked_fill(~self.shared, -torch.inf), self.right)
        kind = rank_captions(scores.masked_fill(~self.kind, -torch.inf), self.right)
        return {
            f"{prefix}top1": shared["top1"],
            f"{prefix}top5": shared["top5"],
            f"{prefix}group_top1": kind["top1"],
        }

    def chance(self) -> dict[str, float]:
        flat = rank_captions(self.shared.double().masked_fill(~self.shared, -torch.inf), self.right)
        kind = rank_captions(self.kind.double().masked_fill(~self.kind, -torch.inf), self.right)
        return {"top1": flat["chance_top1"], "top5": flat["chance_top5"], "group_top1": kind["chance_top1"]}


@dataclass
class Tower:
    """The CLIP whose picture tower is frozen in the model, as a captioner by itself: it gives a picture the caption of the
    nearest picture of training, and ranks captions by its own text tower."""

    model: PreTrainedModel
    processor: ProcessorMixin
    images: torch.Tensor  # (n, D), of training
    captions: list[str]

    @classmethod
    def open(cls, name: str) -> Tower:
        model, processor = AutoModel.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
        emoji = load_emoji("train", normalize_size=True)
        return cls(model, processor, embed_images(model, processor, emoji["image"]), list(emoji["caption"]))

    def look(self, own: TestSet, candidates: Candidates | None) -> tuple[dict[str, float], list[str]]:
        """Its figures, and its captions."""
        images = embed_images(self.model, self.processor, own.pictures, progress=False)
        captions = [self.captions[row] for row in (images @ self.images.T).argmax(dim=1).tolist()]
        figures = worded(caption_metrics(captions, own.captions), shuffled_metrics(captions, own.captions, own.groups))
        if candidates is not None:
            texts = embed_texts(self.model, self.processor, candidates.captions, progress=False)
            figures |= candidates.ranks(images @ texts.T)
        return figures, captions


def worded(own: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """What is shown of the scores of captions, with their own references and with those of other pictures."""
    return {"word_f1": own["word_f1"], "other_word_f1": other["word_f1"], "exact": own["exact"]}


def of_run(results: dict[str, Any], split: str) -> dict[str, float]:
    """What a run of stage 2 measured itself."""
    gap, captions = (results["metrics"][name][split] for name in ("picture_gap", "captions"))
    shuffled = {"word_f1": captions["shuffled_word_f1"]}
    return {name: value for name, value in gap.items() if name != "captions"} | worded(captions, shuffled)


def look(folders: dict[str, Path]) -> dict[str, Any]:
    """The figures of the demo, by split: of the model, of the one trained blind, of the frozen tower alone, of chance.

    Returns:
        ``splits``, ``retrieval`` of stage 1, and what a run should reach, ``accept``.
    """
    results = {name: json.loads((folders[name] / RESULT_FILE).read_text()) for name in ("stage1", "stage2")}
    settings = {name: json.loads((folders[name] / RECIPE_FILE).read_text()) for name in ("stage1", "stage2")}
    tower = Tower.open(settings["stage1"]["vision_tower"])
    sight, blind = (opened(MMBlip2ForConditionalGeneration, folders[name]) for name in ("stage2", "blind"))
    unseen = unseen_picture(*sight)
    blind_caption = generate_texts(*blind, None, vision_features=unseen, progress=False)[0]
    splits = {}
    for split in SPLITS:
        own = emoji_set(split, settings["stage2"]["eval_pictures"])
        row = {"model": of_run(results["stage2"], split), "chance": {"gap": 0.0, "win_rate": 50.0}}
        candidates = None
        if split in RANKED:
            candidates = Candidates.draw(split, [captions[0] for captions in own.captions])
            row["model"] |= rank_by_model(*sight, own, unseen, candidates)
            row["chance"] |= candidates.chance()
        row["blind"] = look_blind(*blind, own, unseen, blind_caption, candidates)
        row["nearest"], nearest = tower.look(own, candidates)
        said = results["stage2"]["metrics"]["captions"][split]["examples"]
        rows = emoji_rows(len(load_emoji(split)), len(own))
        row["examples"] = [
            {
                "row": number,
                "truth": one["references"][0],
                "model": one["caption"],
                "blind": blind_caption,
                "nearest": near,
            }
            for number, one, near in zip(rows, said, nearest, strict=False)
        ]
        splits[split] = {"pictures": len(own), **row}
    return {"splits": splits, "retrieval": results["stage1"]["metrics"]["retrieval"], "accept": ACCEPT}


def unseen_picture(model: nn.Module, processor: ProcessorMixin) -> torch.Tensor:
    """``(1, N, E)``: the features of zeros that a blind model is shown in place of any picture."""
    pixels = processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
    with inference(model):
        return torch.zeros_like(model.vision_features(pixels))


def look_blind(
    model: nn.Module,
    processor: ProcessorMixin,
    own: TestSet,
    unseen: torch.Tensor,
    caption: str,
    candidates: Candidates | None,
) -> dict[str, float]:
    """The figures of a model that is shown the same in place of every picture, and says the same of all."""
    captions = [captions[0] for captions in own.captions]
    sums, lengths = score_captions(model, processor, unseen, captions, progress=False)
    nll = -sums[0] / lengths
    said = [caption] * len(own)
    figures = {name: value for name, value in picture_gap(nll, nll).items() if name != "captions"}
    figures |= worded(caption_metrics(said, own.captions), shuffled_metrics(said, own.captions, own.groups))
    if candidates is not None:
        sums, lengths = score_captions(model, processor, unseen, candidates.captions, progress=False)
        figures |= candidates.ranks((sums / lengths).expand(len(own), -1), "plain_")
    return figures


def rank_by_model(
    model: nn.Module, processor: ProcessorMixin, own: TestSet, unseen: torch.Tensor, candidates: Candidates
) -> dict[str, float]:
    """Ranking by the log-likelihood less that under a blank picture, and (``plain_``) by the mean over tokens."""
    features = own.encoded(model, processor, batch_size=128, blind=False).features
    sums, lengths = score_captions(
        model, processor, features, candidates.captions, candidates.shared | candidates.kind
    )
    blank, _ = score_captions(model, processor, unseen, candidates.captions, progress=False)
    return candidates.ranks(sums - blank) | candidates.ranks(sums / lengths, "plain_")


def opened(model_class: type[PreTrainedModel], folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    return model_class.from_pretrained(folder, dtype=torch.float32).eval(), AutoProcessor.from_pretrained(folder)


def print_figures(figures: dict[str, Any]) -> None:
    """For each split what was measured, and beside it what needs no sight, or no language model."""
    for split, row in figures["splits"].items():
        print(f"\n{TITLES[split]}: {row['pictures']} pictures")
        columns = ("model", "other picture", "blind", "tower alone", "chance", "to reach")
        print(f"{'':<22}" + "".join(f"{name:>15}" for name in columns))
        for measure, title in MEASURES.items():
            print(
                f"{title:<22}"
                + "".join(f"{cell:>15}" for cell in cells_of(measure, row, figures["accept"].get(split, {})))
            )


def cells_of(measure: str, row: dict[str, Any], accept: dict[str, float]) -> list[str]:
    """A measure of the model, beside what it is with another picture, blind, for the tower alone, by chance, and what to
    reach."""
    model, blind = row["model"], row["blind"]
    other = {"nll": model["nll_other"], "word_f1": model["other_word_f1"]}.get(measure)
    without = blind.get(f"plain_{measure}", blind.get(measure))
    values = [model.get(measure), other, without, row["nearest"].get(measure), row["chance"].get(measure)]
    digits = 2 if measure in ("nll", "gap") else 1
    cells = ["–" if value is None else f"{value:.{digits}f}" for value in values]
    reached = f"{measure}_gain" if measure == "word_f1" else measure
    if accept.get(measure) == BLIND:
        return [*cells, "≤ blind"]
    if reached not in accept:
        return [*cells, "–"]
    sign = "+" if reached != measure else ""
    return [*cells, f"{sign}{accept[reached]:.{digits}f}"]


def markdown(figures: dict[str, Any]) -> str:
    """The splits whose captions are ranked as a table; in brackets what the model has with other pictures."""
    columns = [name for split in RANKED for name in (TITLES[split], "blind", "tower alone", "chance")]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for measure, title in MEASURES.items():
        cells = []
        for split in RANKED:
            model, other, *others, _ = cells_of(measure, figures["splits"][split], {})
            cells += [f"**{model}**" + ("" if other == "–" else f" ({other})"), *others]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def missed(figures: dict[str, Any]) -> list[str]:
    """What a run should have reached and did not, in words."""
    found = []
    for split, accept in figures["accept"].items():
        model, blind = (figures["splits"][split][name] for name in ("model", "blind"))
        values = {**model, "word_f1_gain": model["word_f1"] - model["other_word_f1"]}
        for name, least in accept.items():
            if least == BLIND:
                if values[name] > blind[name]:
                    found.append(f"{split}: {name} is {values[name]:.2f}, without sight {blind[name]:.2f}")
            elif values[name] < least:
                found.append(f"{split}: {name} is {values[name]:.2f}, less than {least:g}")
    return found


def show(folder: Path, pictures: int = 8) -> None:
    """Opens a trained model as a stranger would, and lets it say what unseen pictures are."""
    describe = pipeline("image-text-to-text", model=str(folder))
    unseen = load_emoji("concept", normalize_size=True).shuffle(seed=1).select(range(pictures))
    print("\nNew emoji, and what they are taken for:")
    for row in unseen:
        said = describe(images=row["image"], text="", return_full_text=False)
        print(f"  {row['caption'] + ' by ' + row['style']:<44}→ {said[0]['generated_text'].strip()}")


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Any other flag is one of train_blip2.py and goes to all five runs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-blip2"))
    parser.add_argument(
        "--recipes", default="blip2_{}_emoji.yaml", help="of the stages; blip2_smoke_{}.yaml to try it out"
    )
    parser.add_argument(
        "--language_model",
        default=SMOLLM2,
        help=f"a folder, a Hub id, {SMOLLM2}, or {TINY}: one that is trained here, first",
    )
    parser.add_argument("--open", type=Path, metavar="FOLDER", help="only open what was trained, and let it speak")
    arguments, flags = parser.parse_known_args()
    if arguments.open:
        show(arguments.open)
        return
    language_model = str(open_tiny_language_model()) if arguments.language_model == TINY else arguments.language_model
    folders = train_all(arguments.recipes, arguments.output_dir, language_model, flags)
    folder = folders["stage2"]
    if json.loads((folder / RESULT_FILE).read_text())["data"]["source"] != "emoji":
        print(f"The demo shows the bundled pictures only; the model trained on yours is in {folder}.")
        return
    if is_missing_or_older(folder / DEMO_FILE, folders["blind"] / RESULT_FILE):
        print("\nAsking the language model which of 100 captions fits …", flush=True)
        write_json(folder / DEMO_FILE, look(folders))
    figures = json.loads((folder / DEMO_FILE).read_text())
    print_figures(figures)
    subprocess.run([sys.executable, __file__, "--open", str(folder)], check=True)

    report = folder / "report.html"
    if is_missing_or_older(report, folder / DEMO_FILE):
        histories = {name: json.loads((run / LOG_FILE).read_text()) for name, run in folders.items()}
        parts = (*opened(MMBlip2ForPreTraining, folders["stage1"]), *opened(MMBlip2ForConditionalGeneration, folder))
        pairs = json.loads((folders["stage1"] / RESULT_FILE).read_text())["training"]["batch_size"]
        blip2_report(*parts, figures, histories, report, stage1_batch_size=pairs)
    for line in missed(figures):
        print(f"Not reached: {line}.")
    seconds = {
        name: json.loads((run / RESULT_FILE).read_text())["training"]["seconds"] for name, run in folders.items()
    }
    told = ", ".join(f"{name.replace('_', ' ')} {value:.0f} s" for name, value in seconds.items())
    print(f"\nTraining: {told}. This call took {(time.perf_counter() - started) / 60:.1f} minutes.")
    print(f"Model:  {folder}\nReport: {report.resolve()}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
