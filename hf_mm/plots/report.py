"""Sections of text, figures and tables as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

STYLESHEET = """
:root { color-scheme: light; --ink: #1f2933; --grey: #5b6773; --line: #dde2e7; --accent: #2f6690; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 1.0625rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 53rem; margin: 0 auto; padding: 4rem 1.5rem 6rem; }
h1, h2 { line-height: 1.2; letter-spacing: -0.015em; text-wrap: balance; }
h1 { margin: 0 0 1.25rem; font-size: clamp(1.9rem, 1.4rem + 2.2vw, 2.75rem); font-weight: 700; }
h2 { margin: 0 0 .75rem; font-size: clamp(1.3rem, 1.15rem + .6vw, 1.6rem); font-weight: 650; }
p { margin: 0 0 1rem; max-width: 42rem; text-wrap: pretty; overflow-wrap: anywhere; }
header { padding-bottom: 2.25rem; border-bottom: 1px solid var(--line); }
header p { font-size: 1.2rem; line-height: 1.55; color: var(--grey); }
header p:last-child { margin: 0; }
section { padding-top: 3rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.75rem 2.5rem;
  margin-top: 1.75rem; align-items: start; }
figure { margin: 0; }
figcaption { margin-top: .6rem; max-width: 42rem; color: var(--grey); font-size: .9rem; line-height: 1.45; }
.table { margin-top: 1.75rem; }
.table figcaption { margin: 0 0 .6rem; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch;
  background: linear-gradient(to left, #fff 1rem, #fff0) right / 2rem 100% no-repeat local,
    linear-gradient(to left, #1f293326, #fff0) right / .75rem 100% no-repeat scroll; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
img { display: block; width: 100%; max-width: 30rem; height: auto; }
table { width: 100%; border-collapse: separate; border-spacing: 0; font-size: .95rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
th, td { padding: .6rem 0 .6rem 1.25rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th:first-child { position: sticky; left: 0; padding-left: 0; min-width: 8.5rem; background: #fff; }
thead th { color: var(--grey); font-size: .85rem; font-weight: 600; vertical-align: bottom;
  border-bottom: 1.5px solid var(--ink); }
tbody th { font-weight: 600; }
.number { text-align: right; }
td.number { white-space: nowrap; }
small { display: block; color: var(--grey); font-size: .8rem; font-weight: 400; }
@media (max-width: 40rem) { main { padding: 2.25rem 1.1rem 4rem; } section { padding-top: 2.25rem; } }
"""


@dataclass
class Picture:
    """A figure with its text.

    Args:
        figure: to draw.
        alt: what it shows, for those who cannot see it.
        caption: below it.
    """

    figure: Figure
    alt: str
    caption: str = ""


@dataclass
class Table:
    """A table whose first column names its rows.

    Args:
        header: one text a column.
        rows: as many cells each. In both, the first line of a cell is large and the others are small below it.
        caption: above it.
        num_text_columns: columns of text at the left; the others are numbers, set to the right.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    num_text_columns: int = 1

    def __post_init__(self):
        for index, row in enumerate(self.rows):
            if len(row) != len(self.header):
                raise ValueError(
                    f"row {index} of the table has {len(row)} cells but its header has {len(self.header)}."
                )


@dataclass
class Section:
    """A part of a page.

    Args:
        title: its heading.
        text: paragraphs, an empty line between two.
        figures: after the text.
        tables: after the figures.
    """

    title: str
    text: str = ""
    figures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


def write_report(path: str | Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Writes a page with everything inside it: figures as SVG, no script, nothing to fetch.

    Args:
        path: of the HTML file; missing folders are made.
        title: heading of the page.
        lead: paragraphs below it, an empty line between two.
        sections: in the order of reading.

    Returns:
        The path.
    """
    path = Path(path)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLESHEET}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
{_paragraphs(lead)}
</header>
{"".join(map(_section, sections))}</main>
</body>
</html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(page, encoding="utf-8")
    return aside.replace(path)


def _paragraphs(text: str) -> str:
    return "\n".join(f"<p>{escape(paragraph.strip())}</p>" for paragraph in text.split("\n\n") if paragraph.strip())


def _section(section: Section) -> str:
    figures = "\n".join(map(_picture, section.figures))
    parts = [
        f"<h2>{escape(section.title)}</h2>",
        _paragraphs(section.text),
        figures and f'<div class="figures">\n{figures}\n</div>',
        *map(_table, section.tables),
    ]
    return "<section>\n" + "\n".join(filter(None, parts)) + "\n</section>\n"


def _picture(picture: Picture) -> str:
    caption = f"\n<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    image = f'<img src="{_data_uri(picture.figure)}" alt="{escape(picture.alt)}">'
    return f"<figure>\n{image}{caption}\n</figure>"


def _data_uri(figure: Figure) -> str:
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "hf_mm"}):  # equal figures, equal bytes
        figure.savefig(file, format="svg", dpi=160, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def _table(table: Table) -> str:
    caption = f"<figcaption>{escape(table.caption)}</figcaption>\n" if table.caption else ""
    header = "".join(_cell("th", text, "col", i >= table.num_text_columns) for i, text in enumerate(table.header))
    rows = "\n".join(
        "<tr>"
        + _cell("th", row[0], "row", False)
        + "".join(_cell("td", text, "", i >= table.num_text_columns) for i, text in enumerate(row[1:], start=1))
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<figure class="table">\n{caption}<div class="scroll" tabindex="0">\n<table>\n<thead>\n<tr>{header}</tr>\n'
        f"</thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>\n</figure>"
    )


def _cell(tag: str, text: str, scope: str, is_number: bool) -> str:
    value, *below = text.split("\n")
    attributes = (f' scope="{scope}"' if scope else "") + (' class="number"' if is_number else "")
    return f"<{tag}{attributes}>{escape(value)}{''.join(f'<small>{escape(line)}</small>' for line in below)}</{tag}>"
