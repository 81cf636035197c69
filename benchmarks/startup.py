"""Time to import the package and to open a saved CLIP ViT-B/32, against transformers; each in a process of its own.

.venv-peers/bin/python -m benchmarks.startup [--threads N] [--quick]
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from benchmarks import clip_models
from benchmarks.harness import in_child, interleave, read_arguments
from benchmarks.report import Report

NOTES = [
    "Import: from the first statement of a fresh interpreter, torch included for both, to the end of `import hf_mm` or "
    "`from transformers import AutoModel, PreTrainedModel`.",
    "Opening: from_pretrained on a folder that the library itself wrote, float32, files in the page cache; both "
    "libraries are imported before the clock starts.",
    "Each measurement is a child process; one round is dropped as a warm-up of the disk.",
]
TIMED = """
import time
{before}
start = time.perf_counter()
{timed}
print(time.perf_counter() - start)
"""
IMPORTS = {
    "hf_mm": "import benchmarks; import hf_mm",
    "transformers": "import benchmarks; from transformers import AutoModel, PreTrainedModel",
}
CLASSES = {"hf_mm": "MMClipModel", "transformers": "CLIPModel"}
BOTH = "import benchmarks; from transformers import CLIPModel; from hf_mm.models.clip.modeling_clip import MMClipModel"


def seconds(timed: str, threads: int, before: str = "") -> float:
    return in_child("-c", TIMED.format(before=before, timed=timed), threads=threads)


def main() -> None:
    args = read_arguments(__doc__, rounds=15)
    report = Report("startup", "Starting up", args, NOTES)
    imports = {name: partial(seconds, timed, args.threads) for name, timed in IMPORTS.items()}
    report.add("Importing", interleave(imports, args.rounds), at_most=1.25)
    size = clip_models.quick(clip_models.B32) if args.quick else clip_models.B32
    with tempfile.TemporaryDirectory() as root:
        opening = {}
        for name, model_class in CLASSES.items():
            folder = Path(root, name)
            clip_models.build(name, size).save_pretrained(folder)
            opening[name] = partial(seconds, f"{model_class}.from_pretrained({str(folder)!r})", args.threads, BOTH)
        report.add("Opening a saved CLIP ViT-B/32", interleave(opening, args.rounds), at_most=1.1)
    report.finish()


if __name__ == "__main__":
    main()
