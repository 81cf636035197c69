"""Reading a published checkpoint into a model, against open_clip reading the same file: time and peak memory.

.venv-peers/bin/python -m benchmarks.conversion [--threads N] [--quick]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP as OpenClip
from safetensors.torch import save_file

from benchmarks.harness import in_child, interleave, read_arguments
from benchmarks.memory import resident
from benchmarks.report import Report
from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.conversion_clip import open_clip_config, read_clip

NOTES = [
    "Each measurement is a child process that opens one file into a float32 model in memory: open_clip by "
    "`create_model` (safetensors) or `load_openai_model` (archive, which executes it), ours by `read_clip(...).build()`, "
    "which hashes the file and accounts for every key too. Files lie in the page cache; imports are not counted.",
    "`to a folder` is what `hf-mm convert` does: it also writes weights, config and tokenizer. open_clip has no "
    "counterpart, so its reading stands beside it, without a target.",
    "Memory is what the resident set grows by to its peak, pages of the file that lie mapped included.",
]
MODELS = {"safetensors": "ViT-B-32", "archive": "RN50"}
ACTIVATIONS = {"safetensors": "quick_gelu", "archive": None}  # an archive of OpenAI's tells


def write_file(kind: str, folder: Path, quick: bool = False) -> Path:
    """A checkpoint as published, with random weights; `quick` makes its towers a block deep."""
    config = MMClipConfig.from_preset(MODELS[kind])
    if quick:
        config.text_config.num_hidden_layers = 1
        if kind == "safetensors":
            config.vision_config.num_hidden_layers = 1
    declared = open_clip_config(config)
    model = OpenClip(declared["embed_dim"], declared["vision_cfg"], declared["text_cfg"], quick_gelu=True).eval()
    if kind == "safetensors":
        save_file(model.state_dict(), folder / "open_clip_model.safetensors", metadata={"format": "pt"})
        return folder / "open_clip_model.safetensors"
    return write_archive(model, folder / "RN50.pt", declared["vision_cfg"]["image_size"])


def write_archive(model: OpenClip, path: Path, image_size: int) -> Path:
    """A TorchScript archive with weights in half precision, as OpenAI published its models."""
    model.output_dict = False
    model.attn_mask = model._buffers.pop("attn_mask")  # no tensor of OpenAI's archives
    for name, value in (("input_resolution", image_size), ("context_length", 77), ("vocab_size", 49408)):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    texts = torch.zeros(1, 77, dtype=torch.long)
    texts[0, 0] = 49407
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive = torch.jit.trace(model, (torch.randn(1, 3, image_size, image_size), texts), check_trace=False)
    archive.half().save(str(path))
    return path


def child(name: str, kind: str, path: str, metric: str) -> float:
    """Seconds, or bytes at the peak, of opening the file once."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    start = time.perf_counter()
    if name == "hf_mm":
        read_clip(path, activation=ACTIVATIONS[kind])[0].build()
    elif name == "hf_mm, to a folder":
        with tempfile.TemporaryDirectory() as folder:
            conversion, processor = read_clip(path, activation=ACTIVATIONS[kind])
            conversion.save(Path(folder, "model"), processor=processor, progress=False)
    elif kind == "archive":
        open_clip.load_openai_model(path, precision="fp32", device="cpu")
    else:
        open_clip.create_model(MODELS[kind] + "-quickgelu", pretrained=path)
    seconds = time.perf_counter() - start
    return seconds if metric == "seconds" else float(resident("VmHWM") - before)


def measure(name: str, kind: str, path: Path, metric: str, threads: int) -> float:
    """`child` in a process of its own."""
    return float(in_child("-m", "benchmarks.conversion", "--child", name, kind, str(path), metric, threads=threads))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:])))
        return
    args = read_arguments(__doc__, rounds=5)
    report = Report("conversion", "Reading a published checkpoint", args, NOTES)
    with tempfile.TemporaryDirectory() as root:
        for kind in MODELS:
            folder = Path(root, kind)
            folder.mkdir()
            path = write_file(kind, folder, args.quick)
            size = f"{MODELS[kind]}, {path.stat().st_size / 1e6:.0f} MB, {kind}"
            for metric, unit, scale in (("seconds", "ms", 1e3), ("memory", "MiB", 2**-20)):
                contenders = {
                    name: partial(measure, name, kind, path, metric, args.threads) for name in ("hf_mm", "open_clip")
                }
                costs = interleave(contenders, args.rounds)
                report.add(f"{size}: {metric}", costs, unit=unit, scale=scale, at_most=1.0)
                whole = partial(measure, "hf_mm, to a folder", kind, path, metric, args.threads)
                written = interleave({"hf_mm": whole}, args.rounds)
                report.add(
                    f"{size}: {metric}, to a folder",
                    {**written, "open_clip": costs["open_clip"]},
                    unit=unit,
                    scale=scale,
                )
    report.finish()


if __name__ == "__main__":
    main()
