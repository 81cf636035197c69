"""Opening the bundled emoji as a `datasets.Dataset`."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features, Image, List, Value
from datasets.table import InMemoryTable
from PIL import Image as PILImage

from .transforms import normalize_size as fit_to_frame

FOLDER = Path(__file__).parent
STYLES = ("noto", "twemoji", "fluent", "openmoji")
SPLITS = {
    "train": "training concepts by Noto, Twemoji and Fluent",
    "cell": "training concepts, by a training artist whose version was left out of training",
    "style": "training concepts by OpenMoji, which training never sees",
    "val": "validation concepts by the training artists",
    "val_style": "validation concepts by OpenMoji",
    "concept": "test concepts, never trained on, by the training artists",
    "both": "test concepts by OpenMoji: new concept and new style",
}
FEATURES = Features(
    {
        "hexcode": Value("string"),  # code points, joiners and variation selectors dropped: the concept
        "full_hexcode": Value("string"),
        "base": Value("string"),  # hexcode of the same emoji without skin tone
        "emoji": Value("string"),
        "style": Value("string"),
        "caption": Value("string"),  # the name in Unicode CLDR
        "tags": List(Value("string")),
        "group": Value("string"),
        "subgroup": Value("string"),
        "skin_tone": Value("int8"),  # 0 none, 1 light, 3 medium, 5 dark
        "gender": Value("string"),  # "", "male", "female" or "both"
        "family": Value("string"),  # concepts that no split separates
        "split": Value("string"),
        "flip_ok": Value("bool"),  # a mirrored picture still has this name
        "license": Value("string"),
        "image": Image(),  # 64x64 RGB on white
    }
)


def load_emoji(
    split: str = "train",
    styles: str | list[str] | tuple[str, ...] | None = None,
    skin_tones: bool = False,
    normalize_size: bool = False,
) -> Dataset:
    """Opens the bundled emoji. Nothing is downloaded and nothing is written.

    Args:
        split: a key of `SPLITS`, or ``"all"``. Splits separate families of concepts, never pictures of one concept.
        styles: artists to keep, of `STYLES`; by default all that the split has.
        skin_tones: also the light, medium and dark variants of people and hands.
        normalize_size: bring every drawing to 60 of 64 pixels, see `hf_mm.data.emoji.normalize_size`.

    Returns:
        Rows with the columns of `FEATURES`, in a fixed order.

    Raises:
        ValueError: an unknown split or style, or a split without a picture in these styles.
    """
    if split not in ("all", *SPLITS):
        raise ValueError(f"unknown split {split!r}: choose one of all, {', '.join(SPLITS)}.")
    if styles is None:
        styles = STYLES
    elif not isinstance(styles, (list, tuple)):
        styles = (styles,)
    if unknown := [style for style in styles if style not in STYLES]:
        raise ValueError(f"unknown style {unknown[0]!r}: choose from {', '.join(STYLES)}.")

    table = _table(split, tuple(styles), skin_tones)
    if normalize_size:
        fitted = _fitted_images(split, tuple(styles), skin_tones)
        table = table.set_column(table.schema.get_field_index("image"), "image", fitted)
    table = table.cast(FEATURES.arrow_schema)
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=FEATURES))


def _table(split: str, styles: tuple[str, ...], skin_tones: bool) -> pa.Table:
    names = ["core", "core_openmoji"] + (["tones", "tones_openmoji"] if skin_tones else [])
    table = pa.concat_tables([pq.read_table(FOLDER / f"{name}.parquet", memory_map=True) for name in names])
    if split != "all":
        table = table.filter(pc.equal(table["split"], split))
    held = table["style"].unique().to_pylist()
    table = table.filter(pc.is_in(table["style"], pa.array(styles, pa.string()))).combine_chunks()
    if not table.num_rows:
        raise ValueError(f"split {split!r} has no picture in styles {list(styles)}: choose from {', '.join(held)}.")
    return table


@lru_cache(maxsize=8)
def _fitted_images(split: str, styles: tuple[str, ...], skin_tones: bool) -> pa.Array:
    """Encoded pictures with their drawings at one size (lossless), kept for the next call."""
    fitted = []
    for image in _table(split, styles, skin_tones)["image"].to_pylist():
        file = io.BytesIO()
        fit_to_frame(PILImage.open(io.BytesIO(image["bytes"]))).save(file, "PNG", compress_level=1)
        fitted.append({"bytes": file.getvalue(), "path": image["path"]})
    return pa.array(fitted, type=FEATURES.arrow_schema.field("image").type)
