"""Makes a finished run a folder for the Hub: weights, processor and card, nothing else.

python training/export_clip.py outputs/seeds/0 checkpoints/mm-clip-emoji
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor

from hf_mm.hub.model_card import build_model_card, shown_name
from hf_mm.trainers.recipes import RECIPE_FILE, RESULT_FILE


def export(run: Path, folder: Path) -> None:
    """Writes the model of a run to a folder, with a card that opens it from there.

    Raises:
        ValueError: the run is not finished, or the folder holds something.
    """
    if not (run / RESULT_FILE).exists():
        raise ValueError(f"{run} holds no finished run: train it to its end first.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: remove it or choose another folder.")
    model = AutoModel.from_pretrained(run, dtype=torch.float32)
    results = json.loads((run / RESULT_FILE).read_text())
    card = build_model_card(
        "clip",
        model_name=shown_name(folder),
        model=model,
        settings=json.loads((run / RECIPE_FILE).read_text()),
        license="other",
        **results,
    )
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(run).save_pretrained(folder)
    card.save(folder / "README.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("folder", type=Path, help="folder to make")
    arguments = parser.parse_args()
    export(arguments.run, arguments.folder)
    print(f"The model is in {arguments.folder}.")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
