"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

ASIDE = ".incomplete"


def write_json(path: str | Path, value: Any, indent: int | None = 2, sort_keys: bool = False) -> None:
    """Writes a JSON file in UTF-8: aside, flushed to the disk, and then renamed over what was there.

    Args:
        path: of the file, in a folder that exists.
        value: what JSON can hold.
        indent: spaces of a level; None writes one line without spaces.
        sort_keys: write the keys of every object in their order.

    Raises:
        TypeError, ValueError: JSON cannot hold the value; nothing is written.
        OSError: the file cannot be written; what was there stays.
    """
    path = Path(path)
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, indent=indent, sort_keys=sort_keys, separators=separators, ensure_ascii=False)
    aside = path.with_name(path.name + ASIDE)
    try:
        aside.write_text(text + "\n", encoding="utf-8")
        flush(aside)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def flush(file: Path) -> None:
    """Has the system write a file to the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
