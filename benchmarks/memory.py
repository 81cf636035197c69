"""Peak memory of a training step of CLIP, against transformers and open_clip; each in a process of its own.

.venv-peers/bin/python -m benchmarks.memory [--device cuda] [--dtype bfloat16] [--threads N] [--quick]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks import clip_models
from benchmarks.clip_models import B32, TINY
from benchmarks.harness import in_child, interleave, read_arguments
from benchmarks.report import Report
from benchmarks.train_step import make_step

SIZES = {"tiny": TINY, "b32": B32, "quick": clip_models.quick(TINY)}
STEPS = 3
NOTES = [
    "What grows from before the model is built to the peak of three training steps: weights, gradients, both moments of "
    "AdamW, activations. On a CPU the resident set (pages of the libraries themselves, the same for all, are taken "
    "off), on CUDA what torch has allocated.",
    "Equal work as in train_step: sdpa, texts of full length, fused AdamW, gradients set to None.",
]


def child(name: str, size_name: str, device: str, dtype: str) -> int:
    """Bytes that training one contender needs at its peak."""
    size = SIZES[size_name]
    before = torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")
    model = clip_models.build(name, size).train().to(device)
    loss_of = clip_models.loss_functions({name: model})[name]
    step = make_step(model, loss_of, clip_models.random_batch(size, device), autocast=dtype == "bfloat16")
    step()  # makes the optimizer's state; what building the model took is forgotten here
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    for _ in range(STEPS):
        step()
    return (torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")) - before


def peak(name: str, size_name: str, args: argparse.Namespace) -> float:
    """`child` in a process of its own."""
    return float(
        in_child("-m", "benchmarks.memory", "--child", name, size_name, args.device, args.dtype, threads=args.threads)
    )


def resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM); Linux only."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:])))
        return
    args = read_arguments(__doc__, rounds=3, cuda=True, dtypes=True)
    report = Report("memory", "Peak memory of a training step of CLIP", args, NOTES)
    for size_name in ["quick"] if args.quick else ["tiny", "b32"]:
        size = SIZES[size_name]
        contenders = {name: partial(peak, name, size_name, args) for name in clip_models.LIBRARIES}
        case = f"{size.name}, batch {size.batch_size}, {size.num_tokens} tokens"
        report.add(case, interleave(contenders, args.rounds, warmup=0), unit="MiB", scale=2**-20, at_most=1.0)
    report.finish()


if __name__ == "__main__":
    main()
