"""Writes checkpoints of a given size, converts them, and prints the peaks of memory in bytes.

python measure_memory.py FOLDER MEBIBYTES

MEBIBYTES is the size of the weights in float32; they are read from safetensors in float32, and in float16 from a
TorchScript archive. ``anonymous`` is what the process itself holds (RssAnon, sampled every
millisecond), ``resident`` the peak of all pages in memory with those of mapped files (VmHWM); both above the interpreter.
"""

import json
import multiprocessing
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig

from hf_mm.conversion.checkpoint import open_checkpoint
from hf_mm.conversion.engine import convert
from hf_mm.conversion.rules import split, transpose
from hf_mm.nn.pretrained import MMPreTrainedModel

WIDTH = 1024
PER_LAYER = 16  # MiB: in_proj (3w, w) and proj (w, w) in float32
RULES = [
    split("blocks.{i}.in_proj", [f"layers.{{i}}.{part}.weight" for part in "qkv"]),
    transpose("blocks.{i}.proj", "layers.{i}.out.weight"),
]


@strict
class LongConfig(PreTrainedConfig):
    model_type = "long_published"
    num_hidden_layers: int = 6


class LongModel(MMPreTrainedModel):
    config_class = LongConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(
            nn.ModuleDict({part: nn.Linear(WIDTH, WIDTH, bias=False) for part in ("q", "k", "v", "out")})
            for _ in range(config.num_hidden_layers)
        )
        self.post_init()


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.in_proj = nn.Parameter(torch.randn(3 * WIDTH, WIDTH, dtype=dtype))
        self.proj = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=dtype))


class Published(nn.Module):
    def __init__(self, layers: int, dtype: torch.dtype):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dtype) for _ in range(layers))

    def forward(self):
        return 0


def status(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def watch(peak: dict[str, int], stop: threading.Event) -> None:
    while not stop.is_set():
        peak["anonymous"] = max(peak["anonymous"], status("RssAnon"))
        time.sleep(0.001)


def write(file: Path, layers: int, kind: str, form: str) -> None:
    published = Published(layers, getattr(torch, form))
    if kind == "archive":
        torch.jit.save(torch.jit.script(published), str(file))
    else:
        save_file(published.state_dict(), file)


def measure(way: str, file: Path, layers: int) -> dict[str, int]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    baseline = {"anonymous": status("RssAnon"), "resident": status("VmRSS")}
    peak, stop = dict(baseline), threading.Event()
    watcher = threading.Thread(target=watch, args=(peak, stop))
    watcher.start()
    config = LongConfig(num_hidden_layers=layers)
    conversion = convert(open_checkpoint(file), model_class=LongModel, config=config, rules=RULES)
    if way == "save":
        conversion.save(file.parent / "model", progress=False)
    else:
        assert conversion.build().num_parameters() * 4 == layers * PER_LAYER << 20
    stop.set()
    watcher.join()
    peak["resident"] = status("VmHWM")
    above = {name: peak[name] - baseline[name] for name in peak}
    return {**above, "weights": layers * PER_LAYER << 20, "file": file.stat().st_size}


def main(folder: Path, layers: int) -> None:
    torch.set_num_threads(1)
    warm_up = folder / "warm-up"
    warm_up.mkdir()
    write(warm_up / "file", 1, "safetensors", "float32")
    for way in ("build", "save"):  # what the libraries allocate when they are first used
        measure(way, warm_up / "file", 1)
    pool = multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1)  # a heap of its own for each
    for kind, form in (("safetensors", "float32"), ("archive", "float16")):
        file = folder / kind / "file"
        file.parent.mkdir()
        pool.apply(write, (file, layers, kind, form))
        for way in ("save", "build"):
            peak = pool.apply(measure, (way, file, layers))
            print(json.dumps({"case": f"{kind} {form} {way}", **peak}), flush=True)
        shutil.rmtree(file.parent)
    pool.terminate()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) // PER_LAYER)
