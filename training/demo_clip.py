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
from transformers import AutoModel, AutoProcessor

from hf_mm.evaluation.style_shift import RESULTS
from hf_mm.plots.clip_report import clip_report
from hf_mm.trainers.recipes import RESULT_FILE


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


def main() -> None:
    started = time.perf_counter()
    folder = train()
    results = json.loads((folder / RESULT_FILE).read_text())
    if results["data"]["source"] != "emoji":
        print(f"The demo shows the bundled pictures only; the model trained on yours is in {folder}.")
        return
    print_metrics(results["metrics"])
    subprocess.run([sys.executable, str(Path(__file__).with_name("use_clip.py")), str(folder)], check=True)

    report = folder / "report.html"
    if not report.exists() or report.stat().st_mtime < (folder / RESULT_FILE).stat().st_mtime:
        model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
        log_history = json.loads((folder / LOG_FILE).read_text())
        clip_report(model, processor, results["metrics"], log_history, report)
    print(
        f"\nTraining took {results['training']['seconds'] / 60:.1f} minutes, this call {time.perf_counter() - started:.0f} s."
    )
    print(f"Model:  {folder}\nReport: {report.resolve()}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
