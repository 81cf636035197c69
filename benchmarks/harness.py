"""What every benchmark shares: its arguments, interleaved repeats, child processes, what the processor can do."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def read_arguments(description: str, rounds: int, cuda: bool = False, dtypes: bool = False) -> argparse.Namespace:
    """The command line of a benchmark, with a choice of device and of dtype where it has one. Sets threads and seed."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds; each runs every contender once")
    parser.add_argument(
        "--quick", action="store_true", help="one round at tiny sizes, to see that it works; no results"
    )
    if cuda:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    if dtypes:
        parser.add_argument(
            "--dtype",
            choices=("float32", "bfloat16"),
            default="float32",
            help="bfloat16: float32 weights under autocast, for every contender",
        )
    parser.set_defaults(device="cpu", dtype="float32")
    args = parser.parse_args()
    args.rounds = 1 if args.quick else args.rounds
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def interleave(contenders: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Runs each contender once a round, in an order drawn anew each round, so that drifts of the clock meet them all.

    Args:
        contenders: name to what is timed; one that measures itself returns its cost as a float.
        rounds: timed rounds.
        warmup: rounds before these whose times are dropped.

    Returns:
        Name to `rounds` costs: seconds, or what the contender returned.
    """
    costs = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        for name in random.Random(number).sample(sorted(contenders), len(contenders)):
            synchronize()
            start = time.perf_counter()
            own = contenders[name]()
            synchronize()
            seconds = time.perf_counter() - start
            if number >= warmup:
                costs[name].append(own if isinstance(own, float) else seconds)
    return costs


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def in_child(*command: str, threads: int) -> Any:
    """Runs Python with `command` (``-m module ...`` or ``-c code``) in a process of its own; the JSON of its last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    return json.loads(child.stdout.splitlines()[-1])


def matmul_peak(device: str, dtype: str, quick: bool = False) -> float:
    """GFLOP/s of the fastest of several square matrix multiplications, each the best of five."""
    best = 0.0
    for size in (256,) if quick else (512, 1024, 2048) if device == "cpu" else (4096, 8192):
        left, right = torch.randn(2, size, size, device=device, dtype=getattr(torch, dtype))
        seconds = min(interleave({"multiply": lambda left=left, right=right: left @ right}, 5)["multiply"])
        best = max(best, 2 * size**3 / seconds / 1e9)
    return best


def processor_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
