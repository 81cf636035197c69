"""The whole way in one command: train a small CLIP on real pictures, evaluate it, save it, open it anew, show it.

    python training/demo_clip.py training/recipes/clip_emoji.yaml --output_dir outputs/demo

A second call finds the finished run and only opens and shows it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from train_clip import LOG_FILE, train
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

from hf_mm.evaluation.emoji_probes import SHOTS, evaluate_emoji_probes
from hf_mm.evaluation.emoji_robustness import evaluate_emoji_robustness
from hf_mm.evaluation.hard_negatives import evaluate_hard_negatives
from hf_mm.evaluation.style_shift import RESULTS
from hf_mm.files import write_json
from hf_mm.plots.clip_report import clip_report
from hf_mm.trainers.recipes import RESULT_FILE

STUDIES_FILE = "studies.json"


def print_metrics(metrics: dict) -> None:
    """R@1 and R@10 of picture to caption, each with what chance and the nearest pixels reach in brackets."""
    print(
        f"\n{'picture → caption, % (chance, nearest pixels)':<48}{'captions':>9}{'R@1':>20}{'R@10':>22}{'as published':>22}"
    )
    for cell, description in RESULTS.items():
        row, published = metrics["size_normalized"][cell], metrics["original"][cell]
        print(
            f"{description:<48}{row['captions']:>9,}{with_baselines(row, 'r1'):>20}{with_baselines(row, 'r10'):>22}"
            f"{with_baselines(published, 'r10'):>22}"
        )
    print("(as published: R@10 on drawings at their own sizes)")


def with_baselines(row: dict, at: str) -> str:
    chance, pixels = row[f"chance_{at}"], row[f"pixels_{at}"]
    return f"{row[f'i2t_{at}']:.1f} ({chance:.1f}, {'–' if pixels is None else f'{pixels:.1f}'})"


def study(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> dict:
    """Few-shot probes, hard negatives and effective robustness; measured once and kept in the run's folder."""
    file = folder / STUDIES_FILE
    if is_missing_or_older(file, folder / RESULT_FILE):
        print("\nWhat it learned: few-shot probes, names easily confused, effective robustness (two minutes or so) …")
        studies = {
            "probes": evaluate_emoji_probes(model, processor, progress=False),
            "hard_negatives": evaluate_hard_negatives(model, processor, progress=False),
            "robustness": evaluate_emoji_robustness(model, processor, progress=False),
        }
        write_json(file, studies)
    return json.loads(file.read_text())


def is_missing_or_older(file: Path, source: Path) -> bool:
    return not file.exists() or file.stat().st_mtime < source.stat().st_mtime


def print_studies(studies: dict) -> None:
    """How many examples equal the names of a class, and the distance from the line of the pixel classifiers."""
    probe, shift = studies["probes"]["subgroup"]["concept"], studies["robustness"]["known_concepts"]
    shots = probe["shots_to_match"]
    equal = (
        f"more than {SHOTS[-1]}" if shots is None else f"at most {SHOTS[0]}" if shots == SHOTS[0] else f"{shots:.1f}"
    )
    print(
        f"\n{probe['classes']} kinds of things, new emoji by known artists: {probe['zero_shot']:.1f} % right by names alone "
        f"(chance {probe['chance']:.1f});\n  a linear probe of the picture tower needs {equal} emoji per kind to equal that."
    )
    print(
        f"{probe['classes']} kinds of things, known emoji by the new artist: {shift['model']['shift']:.1f} % right, "
        f"{shift['effective_robustness']:+.1f} points from what classifiers\n  of pixels foretell "
        f"({shift['expected']:.1f}; they scatter by {shift['scatter']:.1f})."
    )


def main() -> None:
    started = time.perf_counter()
    folder = train()
    results = json.loads((folder / RESULT_FILE).read_text())
    if results["data"]["source"] != "emoji":
        print(f"The demo shows the bundled pictures only; the model trained on yours is in {folder}.")
        return
    print_metrics(results["metrics"])
    subprocess.run([sys.executable, str(Path(__file__).with_name("use_clip.py")), str(folder)], check=True)

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    studies, report = study(model, processor, folder), folder / "report.html"
    print_studies(studies)
    if is_missing_or_older(report, folder / STUDIES_FILE):
        log_history = json.loads((folder / LOG_FILE).read_text())
        clip_report(model, processor, results["metrics"], log_history, studies, report)
    print(
        f"\nTraining took {results['training']['seconds'] / 60:.1f} minutes, this call {time.perf_counter() - started:.0f} s."
    )
    print(f"Model:  {folder}\nReport: {report.resolve()}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
