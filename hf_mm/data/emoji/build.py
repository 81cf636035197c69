"""Renders the emoji of four artists into the Parquet files of this folder. For maintainers.

    npm install @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 @iconify-json/fluent-emoji-flat@1.2.6 \\
        openmoji@17.0.0 emojibase-data@17.0.0
    pip install resvg_py==0.5.0
    python -m hf_mm.data.emoji.build node_modules

Pictures, names and splits depend on these packages alone; with the same Pillow and pyarrow the files are the same to
the byte.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZE = 64
TONES = (1, 3, 5)
ICONIFY = {
    "noto": "@iconify-json/noto",
    "twemoji": "@iconify-json/twemoji",
    "fluent": "@iconify-json/fluent-emoji-flat",
}
TRAIN_STYLES = tuple(ICONIFY)
LICENSES = {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "fluent": "MIT", "openmoji": "CC-BY-SA-4.0"}
NUM_VAL, NUM_TEST, NUM_CELLS, SEED = 82, 165, 211, 0

# Drawings published under two names at once: kept in training, never asked for.
PUBLISHED_TWICE = {"grinning cat", "cat face", "black medium square", "white square button"}

# Where a mirrored drawing would carry a wrong name: it shows a direction, a map, letters or figures.
MIRROR_SUBGROUPS = {
    "alphanum",
    "arrow",
    "av-symbol",
    "book-paper",
    "hand-fingers-partial",
    "hand-single-finger",
    "keycap",
    "music",
    "musical-instrument",
    "punctuation",
    "religion",
    "sound",
    "time",
    "transport-sign",
    "writing",
    "zodiac",
}
MIRROR_WORDS = re.compile(
    r"\b((left|right)(wards)?|raised (back of )?hand|speech balloon|chart (in|de)creasing|check|beginner"
    r"|clock|quarter|crescent|gibbous|globe|map|sign|button"
    r"|hundred points|ZZZ|place medal|8 ball|eighteen|calendar|e-mail|copyright|registered|trade mark)\b"
)
FACING_RIGHT = "27A1"

# Concepts that differ in gender, age or number only belong to one family, so that no split separates them.
FAMILIES = [
    {"boy", "girl", "child"},
    {"old man", "old woman", "older person"},
    {"prince", "princess", "person with crown"},
    {"Santa Claus", "Mrs. Claus", "Mx Claus"},
    {"man dancing", "woman dancing"},
    {"pregnant man", "pregnant woman", "pregnant person"},
    {"people holding hands", "women holding hands", "men holding hands", "woman and man holding hands"},
]
ALWAYS_TRAIN = ("family", "kiss", "couple with heart")
PERSON, VARIANT_SIGNS = {"1F468", "1F469", "1F9D1"}, {"2640", "2642", FACING_RIGHT}
MALE = re.compile(r"\b(man|men|boy|prince|Santa)\b")
FEMALE = re.compile(r"\b(woman|women|girl|princess|Mrs)\b")


@dataclass
class Concept:
    """One entry of the catalogue: a base emoji, or one of its skin tones."""

    key: str
    full_hexcode: str
    base: str
    emoji: str
    caption: str
    tags: list[str]
    group: str
    subgroup: str
    skin_tone: int
    family: str


def normalize_key(hexcode: str) -> str:
    """Drops the joiners and variation selectors in which the sources differ."""
    return "-".join(part for part in hexcode.upper().split("-") if part not in ("FE0F", "200D"))


def read_concepts(packages: Path) -> list[Concept]:
    """Catalogue entries of the core set, each followed by its single skin tones."""
    folder = packages / "emojibase-data"
    names = json.loads((folder / "meta/groups.json").read_text())
    concepts = []
    for entry in json.loads((folder / "en/data.json").read_text()):
        if "group" not in entry:  # regional indicators
            continue
        group, subgroup = names["groups"][str(entry["group"])], names["subgroups"][str(entry["subgroup"])]
        if group == "component" or subgroup in ("country-flag", "subdivision-flag"):
            continue
        base = normalize_key(entry["hexcode"])
        family = family_of(base, entry["label"])
        for variant in [entry, *entry.get("skins", [])]:
            tone = variant.get("tone", 0)
            if tone == 0 or tone in TONES:
                concepts.append(
                    Concept(
                        key=normalize_key(variant["hexcode"]),
                        full_hexcode=variant["hexcode"],
                        base=base,
                        emoji=variant["emoji"],
                        caption=variant["label"],
                        tags=entry.get("tags", []),
                        group=group,
                        subgroup=subgroup,
                        skin_tone=tone,
                        family=family,
                    )
                )
    return concepts


def family_of(key: str, caption: str) -> str:
    """The name under which concepts are kept together in one split."""
    for name in ALWAYS_TRAIN:
        if caption == name or caption.startswith(f"{name}:"):
            return name
    for members in FAMILIES:
        if caption in members:
            return sorted(members)[0]
    parts = [part for part in key.split("-") if part not in VARIANT_SIGNS]
    return "-".join("P" if part in PERSON else part for part in parts)


def gender_of(concept: Concept) -> str:
    """One of male, female, both or nothing, by the code points and the name."""
    parts = concept.key.split("-")
    male = "2642" in parts or bool(MALE.search(concept.caption))
    female = "2640" in parts or bool(FEMALE.search(concept.caption))
    return {(True, True): "both", (True, False): "male", (False, True): "female"}.get((male, female), "")


def split_families(concepts: list[Concept]) -> dict[str, str]:
    """Holds out families for validation and test in proportion within each subgroup; the rest trains.

    The fraction that a subgroup could not give is carried over to the next; families of one concept make the totals
    exact at the end. Every subgroup keeps a family in training.
    """
    rng = random.Random(SEED)
    members, of_subgroup = Counter(concept.family for concept in concepts), defaultdict(list)
    protected = {concept.family for concept in concepts if concept.caption in PUBLISHED_TWICE} | set(ALWAYS_TRAIN)
    for family, subgroup in sorted({concept.family: concept.subgroup for concept in concepts}.items()):
        if family not in protected:
            of_subgroup[subgroup].append(family)

    split, owed = dict.fromkeys(members, "train"), {"test": 0.0, "val": 0.0}
    wanted = {"test": NUM_TEST, "val": NUM_VAL}
    for subgroup in sorted(of_subgroup):
        families = of_subgroup[subgroup]
        rng.shuffle(families)
        size = sum(members[family] for family in families)
        for part in owed:
            owed[part] += size * wanted[part] / len(concepts)
        for family in families[1:]:
            part = max(owed, key=owed.get)
            if owed[part] >= members[family] / 2:
                split[family] = part
                owed[part] -= members[family]

    singles = [family for families in of_subgroup.values() for family in families[1:] if members[family] == 1]
    rng.shuffle(singles)
    for part, number in wanted.items():
        held = sum(members[family] for family in members if split[family] == part)
        source, target = ("train", part) if held < number else (part, "train")
        movable = [family for family in singles if split[family] == source]
        for family in movable[: abs(number - held)]:
            split[family] = target
    return split


def hold_out_cells(bases: list[Concept], split: dict[str, str], drawn: dict[str, set[str]]) -> dict[str, str]:
    """For some training concepts that all training artists drew, and nothing else alike: the style that training does not see."""
    rng = random.Random(SEED)
    complete = [
        concept.key
        for concept in bases
        if split[concept.family] == "train"
        and concept.caption not in PUBLISHED_TWICE
        and drawn[concept.key].issuperset(TRAIN_STYLES)
    ]
    return {key: rng.choice(TRAIN_STYLES) for key in rng.sample(sorted(complete), NUM_CELLS)}


def cell_of(concept: Concept, style: str, split: dict[str, str], cells: dict[str, str]) -> str:
    """The split of one picture."""
    new_style = style not in TRAIN_STYLES
    part = split[concept.family]
    if part == "train":
        return "style" if new_style else "cell" if cells.get(concept.base) == style else "train"
    return {"test": ("concept", "both"), "val": ("val", "val_style")}[part][new_style]


def read_drawings(packages: Path) -> dict[str, dict[str, str]]:
    """SVG texts by style and key."""
    drawings = {style: dict(read_iconify(packages / package)) for style, package in ICONIFY.items()}
    folder = packages / "openmoji/color/svg"
    drawings["openmoji"] = {normalize_key(path.stem): path.read_text() for path in sorted(folder.glob("*.svg"))}
    return drawings


def read_iconify(folder: Path) -> Iterator[tuple[str, str]]:
    """Key and SVG text of every drawing of an iconify package; three of them have a height of their own."""
    icons = json.loads((folder / "icons.json").read_text())
    for hexcode, name in json.loads((folder / "chars.json").read_text()).items():
        icon = {"left": 0, "top": 0, "width": icons.get("width", 16), "height": icons.get("height", 16)}
        icon |= icons["icons"][name]
        box = f"{icon['left']} {icon['top']} {icon['width']} {icon['height']}"
        yield (
            normalize_key(hexcode),
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}">{icon["body"]}</svg>',
        )


def render(svg: str) -> bytes:
    """A drawing as 64x64 RGB on white, lossless WebP."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(drawing, ((SIZE - drawing.width) // 2, (SIZE - drawing.height) // 2))
    file = io.BytesIO()
    canvas.convert("RGB").save(file, "WEBP", lossless=True, method=4, quality=60)
    return file.getvalue()


def mirrors_harmlessly(concept: Concept, bases: Container[str]) -> bool:
    """Whether the mirrored drawing still has this name, and is not the drawing of another concept."""
    return (
        concept.subgroup not in MIRROR_SUBGROUPS
        and not MIRROR_WORDS.search(concept.caption)
        and f"{concept.base}-{FACING_RIGHT}" not in bases
    )


def build_rows(packages: Path) -> list[dict]:
    """Every picture with its columns, artist by artist in the order of the catalogue."""
    concepts, drawings = read_concepts(packages), read_drawings(packages)
    bases = [concept for concept in concepts if concept.skin_tone == 0]
    split = split_families(bases)
    uses = {style: Counter(drawings[style].values()) for style in drawings}
    drawn = {
        concept.key: {style for style in drawings if uses[style][drawings[style].get(concept.key)] == 1}
        for concept in bases
    }
    cells = hold_out_cells(bases, split, drawn)
    return [
        {
            "hexcode": concept.key,
            "full_hexcode": concept.full_hexcode,
            "base": concept.base,
            "emoji": concept.emoji,
            "style": style,
            "caption": concept.caption,
            "tags": concept.tags,
            "group": concept.group,
            "subgroup": concept.subgroup,
            "skin_tone": concept.skin_tone,
            "gender": gender_of(concept),
            "family": concept.family,
            "split": cell_of(concept, style, split, cells),
            "flip_ok": mirrors_harmlessly(concept, drawn),
            "license": LICENSES[style],
            "image": {"bytes": render(drawings[style][concept.key]), "path": f"{style}/{concept.key}.webp"},
        }
        for style in LICENSES
        for concept in concepts
        if concept.key in drawings[style]
    ]


SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("hexcode", "full_hexcode", "base", "emoji", "style", "caption")]
    + [("tags", pa.list_(pa.string())), ("group", pa.string()), ("subgroup", pa.string()), ("skin_tone", pa.int8())]
    + [(name, pa.string()) for name in ("gender", "family", "split")]
    + [("flip_ok", pa.bool_()), ("license", pa.string())]
    + [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the node_modules folder with the five packages")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()

    files = defaultdict(list)
    for row in build_rows(arguments.packages):
        name = "tones" if row["skin_tone"] else "core"
        files[f"{name}_openmoji" if row["style"] == "openmoji" else name].append(row)
    for name, rows in files.items():
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        path = arguments.output / f"{name}.parquet"
        pq.write_table(table, path, compression="zstd", compression_level=19)
        splits = ", ".join(f"{split} {number}" for split, number in Counter(row["split"] for row in rows).items())
        print(f"{path.name}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB: {splits}")


if __name__ == "__main__":
    main()
