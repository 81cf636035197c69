"""An index of 100,000 pictures: written, opened and searched without faiss, against faiss's exact IndexFlatIP.

.venv-peers/bin/python -m benchmarks.image_index [--threads N] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import faiss
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import nn

from benchmarks.harness import in_child, interleave, read_arguments
from benchmarks.memory import resident
from benchmarks.report import OURS, Report
from hf_mm.pipelines.image_index import FORMAT, ImageIndex
from hf_mm.pipelines.picture_source import row_features

NUM_PICTURES = 100_000
WIDTHS = (512, 768)
NUM_QUERIES = (1, 32, 1000)
K = 50
NOTES = [
    "Embeddings are random directions: embedding the pictures, the same for both, is not counted.",
    "Indexing: from embeddings in memory to a saved index, opened again. Ours also writes ids; faiss reads the whole file, "
    "ours maps it.",
    "Searching: rows and cosines of the 50 best, from an opened index whose file is in the page cache; numpy arrays in and "
    "out for faiss, tensors for ours. Ours sums the products of the best in float64 as well, so that ties are decided. "
    "At least 99 % of the rows of both are equal and scores within 1e-5 before anything is timed.",
    "Memory: growth of the resident set from before the index is opened to the peak of a search, pages of the mapped file "
    "included, which the system may drop at any time; in a process of its own.",
    "Equal threads for numpy, torch and faiss.",
]


def directions(count: int, width: int, seed: int) -> torch.Tensor:
    """``(count, width)`` of unit length."""
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(count, width, generator=generator), dim=-1)


def index_of(embeddings: torch.Tensor) -> ImageIndex:
    """An index of pictures that are not kept."""
    count, width = embeddings.shape
    features = row_features(width, {})
    schema = features.arrow_schema
    columns = {
        "id": pa.array(map(str, range(count))),
        "image": pa.array([None] * count, schema.field("image").type),
        "content": pa.array([""] * count),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embeddings.flatten().numpy()), width),
    }
    description = {
        "format": FORMAT,
        "model": "",
        "fingerprint": "",
        "config": {},
        "dtype": "float32",
        "image_processor": {},
    }
    return ImageIndex(Dataset(pa.Table.from_pydict(columns, schema=schema), fingerprint="random"), description)


def open_ours(folder: Path) -> ImageIndex:
    """Opens a saved index, to be searched without faiss."""
    index = ImageIndex.open(folder)
    index.uses_faiss = False
    return index


def write_ours(embeddings: torch.Tensor, folder: Path) -> None:
    index_of(embeddings).save(folder)
    open_ours(folder)


def write_faiss(embeddings: torch.Tensor, file: Path) -> None:
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings.numpy())
    faiss.write_index(index, str(file))
    faiss.read_index(str(file))


def searches(path: Path, queries: torch.Tensor) -> dict[str, Callable[[], tuple]]:
    """Both contenders on the files that `write_ours` and `write_faiss` made: scores and rows."""
    ours, theirs = open_ours(path / "hf_mm"), faiss.read_index(str(path / "faiss"))
    return {OURS: lambda: ours.search(queries, K), "faiss": lambda: theirs.search(queries.numpy(), K)}


def check_agreement(contenders: dict[str, Callable[[], tuple]]) -> None:
    """Scores are equal, and rows but for the few whose order float32 cannot tell.

    Raises:
        AssertionError: they are not.
    """
    scores, rows = (np.asarray(part) for part in contenders[OURS]())
    peer_scores, peer_rows = contenders["faiss"]()
    assert np.abs(scores - peer_scores).max() < 1e-5, "scores differ"
    assert (rows == peer_rows).mean() > 0.99, "rows differ"


def child(name: str, path: str, width: str, num_queries: str) -> int:
    """Bytes that opening and searching takes at its peak."""
    queries = directions(int(num_queries), int(width), seed=1)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    if name == OURS:
        open_ours(Path(path, "hf_mm")).search(queries, K)
    else:
        faiss.read_index(str(Path(path, "faiss"))).search(queries.numpy(), K)
    return resident("VmHWM") - before


def peak(name: str, path: Path, width: int, num_queries: int, args: argparse.Namespace) -> float:
    """`child` in a process of its own."""
    command = ("-m", "benchmarks.image_index", "--child", name, str(path), str(width), str(num_queries))
    return float(in_child(*command, threads=args.threads))


def measure(report: Report, path: Path, num_pictures: int, width: int, args: argparse.Namespace) -> None:
    embeddings = directions(num_pictures, width, seed=0)
    case = f"{num_pictures:,} pictures of width {width}"

    def written(write: Callable, name: str) -> None:
        shutil.rmtree(path / name, ignore_errors=True)
        write(embeddings, path / name)

    writers = {OURS: partial(written, write_ours, "hf_mm"), "faiss": partial(written, write_faiss, "faiss")}
    report.add(f"{case}: indexing", interleave(writers, args.rounds), at_least=0.9)
    for num_queries in NUM_QUERIES:
        contenders = searches(path, directions(num_queries, width, seed=1))
        check_agreement(contenders)
        rounds = args.rounds if args.quick or num_queries > 100 else 5 * args.rounds
        report.add(f"{case}: {num_queries} queries", interleave(contenders, rounds), at_least=0.9)
    memory = {name: partial(peak, name, path, width, NUM_QUERIES[-1], args) for name in (OURS, "faiss")}
    costs = interleave(memory, min(args.rounds, 3), warmup=0)
    report.add(f"{case}: memory, {NUM_QUERIES[-1]} queries", costs, unit="MiB", scale=2**-20, at_least=0.9)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:])))
        return
    args = read_arguments(__doc__, rounds=5)
    if os.environ.get("OMP_NUM_THREADS") != str(args.threads):  # numpy reads it when it starts
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.image_index", *sys.argv[1:]], environment)
    datasets.disable_progress_bars()
    faiss.omp_set_num_threads(args.threads)
    report = Report("image_index", "Searching an index of pictures", args, NOTES)
    for width in WIDTHS[:1] if args.quick else WIDTHS:
        with tempfile.TemporaryDirectory() as folder:
            measure(report, Path(folder), 3000 if args.quick else NUM_PICTURES, width, args)
    report.finish()


if __name__ == "__main__":
    main()
