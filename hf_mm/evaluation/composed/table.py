"""The result of a protocol as a table to read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..formatting import format_percent
from .protocol import METHODS

ROWS = METHODS | {
    "text_only_bare": "the captions alone",
    "image_text_bare": "mean of picture and captions alone",
}
UNVERIFIED = " (?)"
APART = ("results", "published", "submissions")


def format_table(result: dict[str, Any]) -> str:
    """What was asked, then group by group ours, the baselines, chance and what is published, in percent.

    Args:
        result: what a protocol returns.
    """
    measured, published = result["results"], result["published"]
    blocks = ["\n".join(f"{name}: {_facts(value)}" for name, value in result.items() if name not in APART)]
    for group in [*measured, *(group for group in published if group not in measured)]:
        rows = {ROWS.get(name, name): metrics for name, metrics in measured.get(group, {}).items()}
        for name, line in published.get(group, {}).items():
            rows[f"published: {name}{'' if line['verified'] else UNVERIFIED}"] = line["metrics"]
        blocks.append(_block(group, rows))
    lines = [line for group in published.values() for line in group.values()]
    sources = dict.fromkeys(line["source"] for line in lines)
    note = f"Published: {'; '.join(sources)}.{UNVERIFIED}: not checked against the source."
    return "\n\n".join([*blocks, note])


def _facts(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_facts(one)}" for name, one in value.items())
    return format_percent(value) if isinstance(value, float) else str(value)


def _block(group: str, rows: dict[str, dict[str, float]]) -> str:
    columns = list(dict.fromkeys(metric for metrics in rows.values() for metric in metrics))
    first = max(map(len, [group, *rows]))

    def line(name: str, cells: Iterable[str]) -> str:
        return "  ".join(
            [
                name.ljust(first),
                *(cell.rjust(max(5, len(column))) for column, cell in zip(columns, cells, strict=True)),
            ]
        )

    return "\n".join(
        [line(group, columns)]
        + [line(name, [format_percent(metrics.get(column)) for column in columns]) for name, metrics in rows.items()]
    )
