"""Opens a trained CLIP as a stranger would, in a process of its own, and asks it about pictures it never saw.

python training/use_clip.py outputs/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor, pipeline

import hf_mm  # noqa: F401  registers the models
from hf_mm.data.emoji import load_emoji

CHOICES = ["a face", "an animal", "food", "a vehicle", "a building", "clothing", "a heart", "a clock"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a trained CLIP")
    parser.add_argument("--pictures", type=int, default=8)
    arguments = parser.parse_args()
    folder = str(Path(arguments.model).resolve()) if Path(arguments.model).exists() else arguments.model

    unseen = load_emoji("cell", normalize_size=True).shuffle(seed=0).select(range(arguments.pictures))
    captions = sorted(set(load_emoji("train")["caption"]))

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=unseen["image"], text=captions, return_tensors="pt")
    with torch.inference_mode():
        best = model(**inputs).logits_per_image.softmax(dim=-1).topk(2, dim=-1)

    classify = pipeline("zero-shot-image-classification", model=folder)
    answers = classify(unseen["image"][:], candidate_labels=CHOICES, hypothesis_template="{}")

    print(
        f"\n{'picture (drawn by an artist whose version was held out)':<56} {f'best of {len(captions):,} names':<34} best of 8 labels"
    )
    for row, places, scores, answer in zip(unseen, best.indices, best.values, answers, strict=True):
        name = captions[int(places[0])]
        mark = "✓" if name == row["caption"] else " "
        print(
            f"{row['caption'][:44]:<45} {row['style']:<10} {mark} {name[:24]:<25}{float(scores[0]):5.0%}  "
            f"{answer[0]['label']} {answer[0]['score']:.0%}"
        )


if __name__ == "__main__":
    main()
