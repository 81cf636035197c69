"""Made-up photographs, and the same ones as a folder, a Parquet file, and WebDataset shards."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image, ImageDraw

NUM_SHARDS = 4


def photograph(seed: int) -> bytes:
    """A JPEG of 500 x 375 with the file size of a photograph: soft light, shapes, fine grain."""
    rng = np.random.default_rng(seed)
    light = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
    draw = ImageDraw.Draw(light)
    for _ in range(12):
        x, y = rng.integers(0, 500), rng.integers(0, 375)
        box = (x, y, x + rng.integers(20, 120), y + rng.integers(20, 120))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape(tuple(map(int, box)), fill=tuple(map(int, rng.integers(0, 256, 3))))
    grain = rng.normal(0, 12, (375, 500, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(light) + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_sources(root: Path, texts: list[str]) -> float:
    """Writes the same pictures as a folder, a Parquet file and shards; the mean size of a JPEG in KB."""
    pictures = [photograph(seed) for seed in range(len(texts))]
    (root / "folder").mkdir()
    (root / "webdataset").mkdir()
    for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        (root / "folder" / f"{number:05}.jpg").write_bytes(picture)
        (root / "folder" / f"{number:05}.txt").write_text(text)
    Dataset.from_dict(
        {"image": [{"bytes": picture, "path": None} for picture in pictures], "caption": texts}
    ).to_parquet(root / "table.parquet")
    for shard in range(NUM_SHARDS):
        with tarfile.open(root / "webdataset" / f"{shard:03}.tar", "w") as tar:
            for number in range(shard, len(texts), NUM_SHARDS):
                for ending, content in (("jpg", pictures[number]), ("txt", texts[number].encode())):
                    info = tarfile.TarInfo(f"{number:05}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return sum(map(len, pictures)) / len(pictures) / 1e3
