"""Gathers several finished runs of one recipe (seeds) into a file, and prints it as the table that the README shows.

python training/summarize_runs.py outputs/seed0 outputs/seed1 outputs/seed2 --output training/results/clip_emoji.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hf_mm.evaluation.style_shift import RESULTS
from hf_mm.files import write_json
from hf_mm.trainers.recipes import RECIPE_FILE, RESULT_FILE

FIGURES = ("i2t_r1", "i2t_r10")


def summarize(folders: list[Path]) -> dict:
    """The retrieval figures of every run, with chance and pixel baseline, which no seed changes."""
    runs = [json.loads((folder / RESULT_FILE).read_text()) for folder in folders]
    seeds = [json.loads((folder / RECIPE_FILE).read_text())["seed"] for folder in folders]
    summary = {
        "seeds": seeds,
        "steps": runs[0]["training"]["steps"],
        "parameters": runs[0]["training"]["parameters"],
        "machines": [run["machine"] for run in runs],
        "cells": {},
    }
    for cell in RESULTS:
        rows = [run["metrics"]["size_normalized"][cell] for run in runs]
        fixed = ("images", "captions", "chance_r1", "chance_r10", "pixels_r1", "pixels_r10")
        summary["cells"][cell] = {
            **{name: rows[0][name] for name in fixed},
            **{name: [row[name] for row in rows] for name in FIGURES},
            "original_i2t_r10": [run["metrics"]["original"][cell]["i2t_r10"] for run in runs],
        }
    return summary


def markdown(summary: dict) -> str:
    """The table: mean over runs, the worst in brackets."""
    lines = [
        "| picture → caption, % | captions | R@1 | R@10 | chance R@1 / R@10 | nearest pixels R@1 / R@10 |",
        "|---|---|---|---|---|---|",
    ]
    for cell, description in RESULTS.items():
        row = summary["cells"][cell]
        figures = [f"{sum(row[name]) / len(row[name]):.1f} ({min(row[name]):.1f})" for name in FIGURES]
        baselines = [
            " / ".join("–" if row[f"{name}_{at}"] is None else f"{row[f'{name}_{at}']:.1f}" for at in ("r1", "r10"))
            for name in ("chance", "pixels")
        ]
        lines.append(" | ".join(["| " + description, f"{row['captions']:,}", *figures, *baselines]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    summary = summarize(arguments.runs)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, summary, sort_keys=True)
    print(markdown(summary))


if __name__ == "__main__":
    main()
