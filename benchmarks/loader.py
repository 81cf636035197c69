"""Pictures a second from JPEG files to a batch of CLIP's inputs, against open_clip's transform under the same loader.

.venv-peers/bin/python -m benchmarks.loader [--threads N] [--quick]
"""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from open_clip.transform import image_transform
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.harness import interleave, read_arguments
from benchmarks.pictures import write_sources
from benchmarks.report import Report
from benchmarks.text_encoding import captions, tokenizers
from hf_mm.data.collators import ContrastiveCollator, ImageTextDraws, ImageTextStream
from hf_mm.data.image_text import Columns, DataArguments, ImageTextRows, open_rows, open_stream
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.processing_clip import MMClipProcessor

BATCH_SIZE = 32
SHUFFLE_BUFFER = 64
Transform = Callable[[Image.Image], torch.Tensor]
CASES = {"folder": "folder", "table.parquet": "Parquet", "webdataset": "WebDataset"}
NOTES = [
    "Made-up photographs, 500 x 375, JPEG of quality 90, to 224 x 224; every contender also tokenises the captions, "
    "with our tokenizer. Rows, DataLoader and workers are the same; folder and Parquet are read by index, "
    "WebDataset shards as a stream. Beyond the target of 1, the aim is 1.3.",
    "open_clip, our rows: its transform on the picture that our rows have opened (upright, RGB). open_clip, Image.open: "
    "its transform on the picture as PIL opens it, lazily, as its own CsvDataset does. The better of the two counts.",
    "The pixels of all agree within 1e-4 (folder, Parquet) before anything is timed.",
]


class PeerRows(torch.utils.data.Dataset):
    """Our rows with another transform, on pictures that our rows (`eager`) or PIL alone open."""

    def __init__(self, rows: ImageTextRows, transform: Transform, eager: bool):
        self.rows, self.transform, self.eager = rows, transform, eager

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return read(self.rows.columns, self.rows.dataset[index], self.transform, self.eager)


class PeerStream(IterableDataset):
    """The same for a stream."""

    def __init__(self, stream: Any, columns: Columns, transform: Transform, eager: bool):
        self.stream, self.columns, self.transform, self.eager = stream, columns, transform, eager

    def __iter__(self) -> Iterator[tuple[torch.Tensor, str]]:
        for row in self.stream.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER):
            yield read(self.columns, row, self.transform, self.eager)


def read(columns: Columns, row: dict[str, Any], transform: Transform, eager: bool) -> tuple[torch.Tensor, str]:
    """The pixels ``(3, n, n)`` and the caption of a row."""
    if eager:
        sample = columns.read(row, 0)
        return transform(sample.image), sample.captions[0]
    picture = row[columns.image]
    source = columns.folder / picture if isinstance(picture, str) else io.BytesIO(picture["bytes"])
    return transform(Image.open(source)), columns.captions(row)[0]


class First(IterableDataset):
    """The first `count` samples of an endless stream, shared among the workers."""

    def __init__(self, stream: IterableDataset, count: int):
        self.stream, self.count = stream, count

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        return itertools.islice(self.stream, self.count // (worker.num_workers if worker else 1))


class PeerCollator:
    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, samples: list[tuple[torch.Tensor, str]]) -> dict[str, torch.Tensor]:
        pixels, texts = zip(*samples, strict=True)
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        return {"pixel_values": torch.stack(pixels), **tokens}


def loaders(source: Path, count: int, workers: int) -> dict[str, DataLoader]:
    """A DataLoader for each contender, of the same pictures."""
    processor = MMClipProcessor(MMClipImageProcessorPil(), tokenizers()[0])
    transform = image_transform(224, is_train=False)
    ours, theirs = ContrastiveCollator(processor), PeerCollator(processor.tokenizer)
    peers = {"open_clip, our rows": True, "open_clip, Image.open": False}
    args = DataArguments(source=str(source))
    if source.name == "webdataset":
        stream, columns = open_stream(args)
        own = ImageTextStream(stream, columns, processor.image_processor, shuffle_buffer=SHUFFLE_BUFFER)
        data = {"hf_mm": First(own, count)}
        for name, eager in peers.items():
            data[name] = First(PeerStream(stream, columns, transform, eager), count)
    else:
        rows = open_rows(args)
        data = {"hf_mm": ImageTextDraws(rows, processor.image_processor)}
        data |= {name: PeerRows(rows, transform, eager) for name, eager in peers.items()}
    return {
        name: DataLoader(
            dataset,
            BATCH_SIZE,
            num_workers=workers,
            collate_fn=ours if name == "hf_mm" else theirs,
            persistent_workers=workers > 0,
        )
        for name, dataset in data.items()
    }


def exhaust(loader: Iterable[dict[str, Any]], count: int) -> None:
    seen = sum(len(batch["pixel_values"]) for batch in loader)
    assert seen == count, f"{seen} pictures instead of {count}"


def assert_equal_pixels(contenders: dict[str, DataLoader]) -> None:
    first, *others = (next(iter(loader))["pixel_values"] for loader in contenders.values())
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-4, rtol=0)


def main() -> None:
    args = read_arguments(__doc__, rounds=9)
    count = 64 if args.quick else 512
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        datasets.config.HF_DATASETS_CACHE = root / "cache"
        size = (
            f"{count} JPEG files of {write_sources(root, captions(count)):.0f} KB on average; batches of {BATCH_SIZE}."
        )
        report = Report("loader", "Loading and preparing pictures", args, [*NOTES, size])
        for name, workers in itertools.product(CASES, (0, 2)):
            contenders = loaders(root / name, count, workers)
            if name != "webdataset" and not workers:
                assert_equal_pixels(contenders)
            runs = {key: lambda loader=loader: exhaust(loader, count) for key, loader in contenders.items()}
            costs = interleave(runs, args.rounds)
            case = f"{CASES[name]}, {workers} workers"
            report.add(case, costs, unit="s", scale=1, at_least=1.0, pictures=count)
        report.finish()


if __name__ == "__main__":
    main()
