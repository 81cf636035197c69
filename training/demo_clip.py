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

from hf_mm.plots.clip_report import clip_report
from hf_mm.trainers.recipes import RESULT_FILE

CELLS = {
    "cell": "known emoji, artist's version held out",
    "style": "known emoji, new artist (OpenMoji)",
    "concept": "new emoji, known artists",
    "both": "new emoji, new artist",
}


def print_metrics(metrics: dict) -> None:
    print(
        f"\n{'picture → caption, %':<42}{'captions':>9}{'R@1':>7}{'R@10':>7}{'chance':>9}{'pixels':>8}{'original size':>15}"
    )
    for cell, description in CELLS.items():
        row, original = metrics["size_normalized"][cell], metrics["original"][cell]
        pixels = "–" if row["pixels_r10"] is None else f"{row['pixels_r10']:.1f}"
        print(
            f"{description:<42}{row['captions']:>9}{row['i2t_r1']:>7.1f}{row['i2t_r10']:>7.1f}"
            f"{row['chance_r10']:>9.1f}{pixels:>8}{original['i2t_r10']:>15.1f}"
        )
    print("(chance, pixels and original size: R@10)")


def main() -> None:
    started = time.perf_counter()
    folder = train()
    results = json.loads((folder / RESULT_FILE).read_text())
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
    except ValueError as error:
        sys.exit(f"error: {error}")
