"""The report of a CLIP trained on the bundled emoji: what it finds, how well, and where it looks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedModel

from ..data.emoji import STYLES, load_emoji
from ..evaluation.embeddings import embed_images, embed_texts, inference
from ..evaluation.formatting import format_percent
from ..evaluation.metrics import retrieval_metrics, retrieval_ranks
from ..evaluation.pixels import embed_pixels
from ..evaluation.retrieval import right_texts, shared_captions
from ..evaluation.style_shift import NEW_STYLE
from .figures import (
    plot_attention,
    plot_captions,
    plot_few_shot,
    plot_losses,
    plot_mistakes,
    plot_neighbours,
    plot_retrieval,
    plot_robustness,
    plot_style_shift,
    plot_temperature,
    token_attention,
)
from .report import Picture, Section, Table, write_report

CELLS = {  # split: what its pictures are
    "cell": "known emoji by known artists",
    "style": "known emoji by the new artist",
    "concept": "new emoji by known artists",
    "both": "new emoji by the new artist",
}
VALIDATION = {"val": "validation emoji by known artists"}
MEMORY = {"fit": "training pictures"}
ARTISTS = {"noto": "Noto", "twemoji": "Twemoji", "fluent": "Fluent", "openmoji": "OpenMoji, new"}
STUDIES = ("probes", "hard_negatives", "robustness")
CONFUSABLE = {  # set: (row of the table, what its names are like)
    "gender": ("Women and men", "cook, man cook, woman cook"),
    "clock_faces": ("Clock faces", "three o’clock, three-thirty"),
    "moon_phases": ("Moons", "full moon, first quarter moon"),
    "keycaps": ("Keycaps", "keycap: 1, keycap: 2"),
    "zodiac": ("Zodiac signs", "Aries, Taurus"),
    "hearts": ("Hearts", "red heart, broken heart"),
    "geometric": ("Shapes", "red circle, red square"),
    "arrows": ("Arrows", "up arrow, up-left arrow"),
    "skin_tones": ("Skin tones", "light, medium, dark or none"),
}
FORMS = {"size_normalized": "drawings brought to one size", "original": "drawings as published"}
ATTRIBUTION = """
Noto Emoji, Copyright Google Inc., Apache License 2.0, https://github.com/googlefonts/noto-emoji.

Twemoji graphics, Copyright Twitter, Inc. and other contributors, CC BY 4.0
https://creativecommons.org/licenses/by/4.0/, https://github.com/jdecked/twemoji.

Fluent Emoji, Copyright (c) Microsoft Corporation, MIT, https://github.com/microsoft/fluentui-emoji.

All emojis designed by OpenMoji (https://openmoji.org/) - the open-source emoji and icon project. License: CC BY-SA 4.0
https://creativecommons.org/licenses/by-sa/4.0/.

Changed in all: rasterised to 64x64 pixels on white, drawings brought to one size. Names, tags and groups from Unicode
CLDR by way of Emojibase, MIT, Copyright (c) 2017-2019 Miles Johnson.
"""


def clip_report(
    model: PreTrainedModel,
    processor: Any,
    metrics: dict[str, dict[str, Any]],
    log_history: list[dict[str, Any]],
    studies: dict[str, dict[str, Any]],
    path: str | Path,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Writes the report of a CLIP that was trained on the bundled emoji, as one page with everything inside it.

    Args:
        model: `MMClipModel`.
        processor: its processor.
        metrics: what `evaluate_emoji` returned, under ``"size_normalized"`` and ``"original"``.
        log_history: of the Trainer.
        studies: what `evaluate_emoji_probes`, `evaluate_hard_negatives` and `evaluate_emoji_robustness` returned, under
            ``"probes"``, ``"hard_negatives"`` and ``"robustness"``.
        path: of the HTML file.
        seed: of the choice of captions and pictures to show.
        progress: show a bar.

    Returns:
        The path.

    Raises:
        ValueError: `metrics` lacks one of the two forms, `studies` one of the three, or no entry of `log_history` has a
            loss.
    """
    if lacking := [form for form in FORMS if not metrics.get(form)]:
        raise ValueError(
            f"metrics has no {lacking[0]!r}: pass evaluate_emoji's result for both sizes of the drawings."
        )
    if lacking := [study for study in STUDIES if not studies.get(study)]:
        raise ValueError(f"studies has no {lacking[0]!r}: pass the results of all of {', '.join(STUDIES)}.")
    shown = _embed(model, processor, progress)
    rng = Random(seed)
    examples = {split: rng.sample(np.flatnonzero(shown.split == split).tolist(), 4) for split in CELLS}
    sections = [
        _found_pictures(shown, rng),
        _found_captions(shown, examples),
        _mistakes(shown),
        _neighbours(shown, rng),
        _results(metrics),
        _style_shift(metrics),
        _kinds(metrics["size_normalized"]),
        _few_shot(studies["probes"]["subgroup"]),
        _robustness(studies["robustness"]),
        _hard_negatives(studies["hard_negatives"]),
        _attention(model, processor, shown, [row for rows in examples.values() for row in rows[:3]]),
        _training(log_history),
        Section("About the pictures", ATTRIBUTION),
    ]
    return write_report(path, "What a small CLIP learned from emoji", _lead(model, log_history, metrics), sections)


@dataclass
class _Shown:
    """The pictures that training never saw, and all names, with what the model says of them."""

    emoji: Dataset  # all of them, trained on or not
    images: list[Image.Image]
    split: np.ndarray
    style: np.ndarray
    captions: list[str]
    embeddings: torch.Tensor
    names: list[str]
    right: torch.Tensor  # (pictures, names): the name of this picture, or of an identical one
    cosines: torch.Tensor  # (pictures, names)
    probabilities: torch.Tensor  # (pictures, names), over the names


def _embed(model: PreTrainedModel, processor: Any, progress: bool) -> _Shown:
    emoji = load_emoji("all", normalize_size=True)
    names = sorted(set(emoji["caption"]))
    unseen = emoji.select(np.flatnonzero(np.isin(emoji["split"][:], list(CELLS))))
    images = list(unseen["image"])
    looks = [(style, image.tobytes()) for style, image in zip(unseen["style"], images, strict=True)]
    right = shared_captions([[name] for name in unseen["caption"]], looks)
    embeddings = embed_images(model, processor, images, progress=progress)
    cosines = embeddings @ embed_texts(model, processor, names, progress=progress).T
    return _Shown(
        emoji=emoji,
        images=images,
        split=np.array(unseen["split"][:]),
        style=np.array(unseen["style"][:]),
        captions=unseen["caption"][:],
        embeddings=embeddings,
        names=names,
        right=right_texts(right, names),
        cosines=cosines,
        probabilities=(cosines * model.logit_scale.detach().float().cpu().exp()).softmax(dim=-1),
    )


def _lead(model: PreTrainedModel, log_history: list[dict], metrics: dict) -> str:
    steps = max(entry["step"] for entry in log_history)
    cell, style = (metrics["size_normalized"][split] for split in ("cell", "style"))
    return (
        f"A model of {model.num_parameters() / 1e6:.1f} million parameters read the names of emoji beside drawings by "
        f"three artists, for {steps:,} steps. Every result on this page is of pictures that it never saw in training, unless "
        "it says so.\n\n"
        f"It puts the right one of {cell['captions']:,} names among its first ten for {cell['i2t_r10']:.0f} % of new "
        f"drawings by the artists it knows, and for {style['i2t_r10']:.0f} % of those by an artist it never saw; "
        f"chance is {cell['chance_r10']:.1f} %."
    )


def _found_pictures(shown: _Shown, rng: Random, columns: int = 6) -> Section:
    def found(splits: tuple[str, ...], count: int, alt: str, caption: str) -> Picture:
        rows = np.isin(shown.split, splits)
        known = np.flatnonzero(shown.right[torch.from_numpy(rows)].any(dim=0).numpy())
        chosen = sorted(rng.sample(known.tolist(), count))
        best = [shown.cosines[:, name].topk(columns).indices.tolist() for name in chosen]
        return Picture(
            plot_retrieval(
                [shown.names[name] for name in chosen],
                [[shown.images[row] for row in rows] for rows in best],
                [[bool(shown.right[row, name]) for row in rows] for name, rows in zip(chosen, best, strict=True)],
            ),
            alt,
            caption,
        )

    return Section(
        "Pictures found for names",
        f"Each name was searched for among the {len(shown.images):,} pictures that training never saw; the "
        f"{columns} nearest are shown. A green frame is a right one. The names were drawn at random.",
        [
            found(
                ("cell", "style"),
                6,
                "Six names of known emoji, the nearest pictures beside each",
                "Known emoji: the name was in the training texts, the pictures are new. Most have one right picture, "
                "by the new artist.",
            ),
            found(
                ("concept", "both"),
                6,
                "Six names of emoji that training never saw, the nearest pictures beside each",
                "New emoji: neither the name nor any picture of them was trained on. Each has up to four right "
                "pictures. What is found here is found by words that the name shares with others.",
            ),
        ],
    )


def _found_captions(shown: _Shown, examples: dict[str, list[int]], count: int = 4) -> Section:
    def found(rows: list[int], description: str) -> Picture:
        best = shown.probabilities[rows].topk(count, dim=-1)
        return Picture(
            plot_captions(
                [shown.images[row] for row in rows],
                [[shown.names[name] for name in names] for names in best.indices.tolist()],
                [{shown.names[name] for name in shown.right[row].nonzero().flatten().tolist()} for row in rows],
                best.values.tolist(),
            ),
            f"Four pictures ({description}) and the {count} likeliest names of each",
            f"{_capital(description)}.",
        )

    return Section(
        "Names found for pictures",
        f"The {count} likeliest of all {len(shown.names):,} names, with the model's own probabilities. Green is right; "
        "where none is, the right name stands below. The pictures were drawn at random.",
        [found(rows, CELLS[split]) for split, rows in examples.items()],
    )


def _mistakes(shown: _Shown, count: int = 4) -> Section:
    scores, answers = shown.probabilities.max(dim=-1)
    ranks = retrieval_ranks(shown.cosines, shown.right)
    wrong = ~shown.right[torch.arange(len(answers)), answers]
    drawn = {}
    for row, (style, name) in enumerate(zip(shown.emoji["style"][:], shown.emoji["caption"][:], strict=True)):
        drawn.setdefault(name, {})[style] = row

    def drawing(name: str, style: str) -> Image.Image:
        rows = drawn[name]
        return shown.emoji[rows.get(style, next(iter(rows.values())))]["image"]

    def mistakes(splits: tuple[str, ...], by: torch.Tensor, alt: str, caption: str) -> Picture:
        candidates = np.flatnonzero(np.isin(shown.split, splits) & wrong.numpy())
        worst = sorted(candidates.tolist(), key=lambda row: -by[row].item())[:count]
        return Picture(
            plot_mistakes(
                [shown.images[row] for row in worst],
                named := [shown.names[answers[row]] for row in worst],
                scores[worst].tolist(),
                [drawing(name, shown.style[row]) for name, row in zip(named, worst, strict=True)],
                [shown.captions[row] for row in worst],
                ranks[worst].tolist(),
            ),
            alt,
            caption,
        )

    return Section(
        "Worst mistakes",
        f"Nothing here is drawn at random: of each kind the {count} pictures whose wrong name the model is surest of, "
        f"among all {len(shown.names):,} names; then those whose right name comes last. At the right is a drawing of what "
        "the model named, by the same artist where there is one; it may have been trained on.",
        [
            *(
                mistakes(
                    (split,),
                    scores,
                    f"The {count} surest mistakes among {words}, each with a drawing of what was named",
                    f"Surest and wrong: {words}. Of {int((shown.split == split).sum()):,} pictures "
                    f"{format_percent(100 * float(wrong[shown.split == split].float().mean()))} % get a wrong name first.",
                )
                for split, words in CELLS.items()
            ),
            *(
                mistakes(
                    splits,
                    ranks,
                    f"The {count} {kind} pictures whose right name the model puts last",
                    f"Furthest off: {kind} emoji, by any artist.",
                )
                for splits, kind in ((("cell", "style"), "known"), (("concept", "both"), "new"))
            ),
        ],
    )


def _neighbours(shown: _Shown, rng: Random, count: int = 5) -> Section:
    pixels = embed_pixels(shown.images)
    is_new = np.isin(shown.split, ("concept", "both"))
    rows_of = {style: np.flatnonzero(is_new & (shown.style == style)) for style in STYLES}
    right = (shown.right.float() @ shown.right.float().T) > 0

    def found(embeddings: torch.Tensor, style: str, other: str) -> dict[str, float]:
        queries, gallery = rows_of[style], rows_of[other]
        similarity = embeddings[queries] @ embeddings[gallery].T
        return retrieval_metrics(similarity, right[queries][:, gallery], "i2i")

    def picture(style: str) -> Picture:
        queries = sorted(rng.sample(rows_of[style].tolist(), count))
        others = [other for other in STYLES if other != style]
        nearest = [
            [rows_of[other][(shown.embeddings[rows_of[other]] @ shown.embeddings[row]).argmax()] for other in others]
            for row in queries
        ]
        artists = [ARTISTS[style].split(",")[0] for style in (style, *others)]
        return Picture(
            plot_neighbours(
                artists,
                [shown.captions[row] for row in queries],
                [shown.images[row] for row in queries],
                [[shown.images[row] for row in rows] for rows in nearest],
                [[bool(right[row, other]) for other in rows] for row, rows in zip(queries, nearest, strict=True)],
            ),
            f"{count} drawings by {artists[0]}, beside each the nearest drawings by {', '.join(artists[1:])}",
            f"The first of each row is by {artists[0]}; then the nearest one by each other artist.",
        )

    pairs = {(a, b): (found(shown.embeddings, a, b), found(pixels, a, b)) for a in STYLES for b in STYLES if a != b}
    ours, by_pixels = zip(*pairs.values(), strict=True)
    means = [
        format_percent(float(np.mean([one[key] for one in found])))
        for found, key in ((ours, "i2i_r1"), (by_pixels, "i2i_r1"), (ours, "chance_i2i_r1"))
    ]
    return Section(
        "The same thing by other artists",
        f"No names here: a drawing of a new emoji, and the most similar one among the {len(rows_of[NEW_STYLE]):,} new emoji "
        "of another artist. A green frame is the same emoji. The drawings were picked at random.",
        [picture(rng.choice([style for style in STYLES if style != NEW_STYLE])), picture(NEW_STYLE)],
        [
            Table(
                ["% of drawings by", *(f"among\n{ARTISTS[style]}" for style in STYLES)],
                [
                    [
                        ARTISTS[style],
                        *(
                            "–" if style == other else _both_forms(*(one["i2i_r1"] for one in pairs[style, other]))
                            for other in STYLES
                        ),
                    ]
                    for style in STYLES
                ],
                "How often the nearest drawing is the same emoji. Large: the model's embeddings. Small: the same with 16x16 "
                f"pixels. Over all pairs of artists: {means[0]} % by the model, {means[1]} % by pixels, {means[2]} % by chance.",
            )
        ],
    )


def _results(metrics: dict[str, dict]) -> Section:
    normalized, original = (metrics[form] for form in FORMS)

    def rows(descriptions: dict[str, str], *keys: str) -> list[list[str]]:
        return [
            [
                f"{_capital(words)}\n{normalized[split]['images']:,} pictures, {normalized[split]['captions']:,} names",
                *(_both_forms(normalized[split][key], original[split][key]) for key in keys),
            ]
            for split, words in descriptions.items()
        ]

    results = CELLS | VALIDATION
    naming = ["%", "R@1", "R@5", "R@10", "chance\nR@1", "chance\nR@10", "pixels\nR@1", "pixels\nR@10"]
    naming_keys = ("i2t_r1", "i2t_r5", "i2t_r10", "chance_r1", "chance_r10", "pixels_r1", "pixels_r10")
    finding = ["%", "R@1", "R@10", "chance\nR@1", "chance\nR@10"]
    finding_keys = ("t2i_r1", "t2i_r10", "chance_t2i_r1", "chance_t2i_r10")
    return Section(
        "How well it names pictures",
        "A picture counts as named within k (R@k) if its name is among the first k. Ties count against the model. Known "
        "emoji are sought among the names of all training emoji, new ones among their own names. OpenMoji is the artist "
        "that training never saw.\n\n"
        "The baseline has no model: it gives the name of the training picture whose 16x16 pixels are most alike. It "
        "keeps every training picture at hand and compares drawings with drawings, never with words, which makes it "
        "strong for known emoji. It cannot name new ones (–): for these see the kinds of things below.",
        [
            Picture(
                plot_style_shift([_bars(description, metrics[form][split]) for split, description in CELLS.items()]),
                f"Bars: R@1 and R@10 of four kinds of pictures, with chance and the pixel baseline, {words}",
                f"{_capital(words)}.",
            )
            for form, words in FORMS.items()
        ],
        [
            Table(
                naming,
                rows(results, *naming_keys),
                "Naming pictures. Large: drawings brought to one size. Small: drawings as published.",
            ),
            Table(
                finding,
                rows(results, *finding_keys),
                "The other way: finding the pictures of a name among those of its row.",
            ),
            Table(naming, rows(MEMORY, *naming_keys), "Memory, not a result: the pictures that it was trained on."),
        ],
    )


def _style_shift(metrics: dict[str, dict]) -> Section:
    normalized, original = (metrics[form]["styles"] for form in FORMS)
    columns = [
        *(("seen", key) for key in ("i2t_r1", "i2t_r10", "chance_r10", "pixels_r10")),
        *(("new", key) for key in ("i2t_r1", "i2t_r10", "chance_r10")),
    ]
    rows = [
        [
            f"{ARTISTS[style]}\n{normalized[style]['seen']['images']:,} known, {normalized[style]['new']['images']:,} new",
            *(_both_forms(normalized[style][kind][key], original[style][kind][key]) for kind, key in columns),
        ]
        for style in STYLES
    ]
    return Section(
        "The shift of style",
        "The same for each artist. Three were trained on; OpenMoji, with its black outlines and flat colours, was not.",
        [
            Picture(
                plot_style_shift([_bars(ARTISTS[style], normalized[style][kind]) for style in STYLES]),
                f"Bars: R@1 and R@10 of {words} for each of four artists, with chance",
                f"{_capital(words)}, drawings of one size.",
            )
            for kind, words in (("seen", "known emoji"), ("new", "new emoji"))
        ],
        [
            Table(
                [
                    "%",
                    *("R@1\nknown", "R@10\nknown", "chance\nR@10\nknown", "pixels\nR@10\nknown"),
                    *("R@1\nnew", "R@10\nnew", "chance\nR@10\nnew"),
                ],
                rows,
                "Large: drawings brought to one size. Small: drawings as published.",
            )
        ],
    )


def _kinds(metrics: dict[str, Any]) -> Section:
    header = ["accuracy", "top\u00a05", "balanced", "by\u00a0name", "chance", "majority", "pixels"]
    keys = ("accuracy", "top5", "balanced_accuracy", "name_accuracy", "chance", "majority", "pixels_accuracy")
    return Section(
        "What kind of thing it is",
        "Each picture is sorted into classes such as food-fruit. A class is the mean embedding of the names of its "
        "training emoji; by name, it is only its own name. Balanced accuracy counts every class the same; majority is "
        "always the most frequent class. Here the pixel baseline has an answer for new emoji too: the class of the "
        "training picture whose pixels are most alike.",
        tables=[
            Table(
                [f"% of {table['both']['classes']} classes", *header],
                [
                    [
                        f"{_capital(description)}\n{table[split]['images']:,} pictures",
                        *(format_percent(table[split][key]) for key in keys),
                    ]
                    for split, description in CELLS.items()
                ],
                f"{_capital(name)}s of emoji, drawings of one size.",
            )
            for name, table in (("subgroup", metrics["subgroup"]), ("group", metrics["group"]))
        ],
    )


def _few_shot(probes: dict[str, Any]) -> Section:
    counts = [point["shots"] for point in probes["concept"]["few_shot"]]
    classes = probes["concept"]["classes"]

    def equal(row: dict[str, Any]) -> str:
        needed = [row["shots_to_match"], row["shots_to_match_name"]]
        return "\n".join(_examples(shots, counts) for shots in needed)

    def cells(row: dict[str, Any]) -> list[str]:
        points = zip(row["few_shot"], row["pixels_few_shot"], strict=True)
        return [
            _both_forms(row["zero_shot"], row["zero_shot_name"]),
            *(_both_forms(ours["accuracy"], pixels["accuracy"]) for ours, pixels in points),
            _both_forms(row["accuracy"], row["pixels_accuracy"]),
            _both_forms(row["chance"], row["majority"]),
            equal(row),
        ]

    return Section(
        "How many examples equal a name",
        f"Sorting pictures into the same {classes} kinds, without names and with them. Zero-shot classification needs no "
        "picture of a class: a class is the names of its training emoji, or only its own name. A probe needs pictures: it "
        "is a linear classifier of the frozen features of the picture tower, learnt from a few emoji of each class, each "
        "in all its training drawings. Where the probe crosses a line, so many emoji per class are worth as much as the "
        "names.\n\n"
        "The tower learnt its features from these same drawings with their names. So this tells what form the knowledge "
        "has, not what training without names would give; the probe of 8x8 pixels knows nothing but its examples. Every fit "
        "stops after 100 steps, also where it has not yet converged.",
        [
            Picture(
                plot_few_shot(probes[split]),
                f"Accuracy on {CELLS[split]} over the number of training emoji per class, for features and pixels, "
                "with lines for zero-shot classification and chance",
                f"{_capital(CELLS[split])}. {_equality(probes[split], counts)} On {probes[split]['images']:,} pictures, an "
                f"accuracy like that has a standard error of "
                f"{_standard_error(probes[split]['zero_shot'], probes[split]['images']):.1f} points.",
            )
            for split in ("concept", "both")
        ],
        [
            Table(
                [
                    f"% of {classes} classes",
                    "names\nclass\u00a0name",
                    *(f"{shots}\u00a0emoji\npixels" for shots in counts),
                    "all\npixels",
                    "chance\nmajority",
                    "names\u00a0equal\nclass\u00a0name",
                ],
                [
                    [f"{_capital(words)}\n{probes[split]['images']:,} pictures", *cells(probes[split])]
                    for split, words in CELLS.items()
                ],
                "Large: zero-shot by the names of a class; probes of features. Small, below: zero-shot by the name of the "
                "class alone; probes of pixels. A probe's figure is the mean of three draws; a class with fewer emoji gives "
                "all it has. Last column: so many emoji per class equal the names. Known emoji may be among a probe's "
                "examples, drawn by another artist.",
            )
        ],
    )


def _examples(shots: float | None, counts: list[int]) -> str:
    """How many examples equal a name, for a table; outside of what was measured, a bound."""
    if shots is None:
        return f"> {counts[-1]}"
    return f"≤ {counts[0]}" if shots == counts[0] else f"{shots:.1f}"


def _equality(row: dict[str, Any], counts: list[int]) -> str:
    shots = row["shots_to_match"]
    if shots is None:
        return f"Even {counts[-1]} emoji per class do not equal the names."
    if shots == counts[0]:
        return f"Already {counts[0]} emoji per class equals the names, or does better."
    return f"The names are worth about {shots:.1f} emoji per class."


def _robustness(robustness: dict[str, Any]) -> Section:
    known, new = robustness["known_concepts"], robustness["new_concepts"]
    return Section(
        "Does it carry over?",
        f"{len(known['reference'])} classifiers of pixels learnt the same kinds of things from the same drawings, with more "
        "and less detail and data. Those that do better on the artists they know do better on the new one, too, but lose on "
        "the way. Does the model, which has language, lose less? The line through the classifiers foretells an accuracy on "
        "the new artist; the distance from it is the effective robustness. Both axes are logits.\n\n"
        f"{_off_the_line('known', known)}\n\n{_off_the_line('new', new)}",
        [
            Picture(
                plot_robustness(row),
                f"Accuracy on the new artist over accuracy on known artists for {kind} emoji: classifiers of pixels, the "
                "line through them, and the model",
                f"{_capital(kind)} emoji: {row['images']:,} pictures by known artists, {row['images_shift']:,} by the "
                "new one.",
            )
            for kind, row in (("known", known), ("new", new))
        ],
    )


def _off_the_line(kind: str, row: dict[str, Any]) -> str:
    """Effective robustness in words: the figure, its noise, and whether the line is a guess."""
    distance, expected = row["effective_robustness"], row["expected"]
    before, after = row["model"]["in"], row["model"]["shift"]
    steepness = row["slope"] * expected * (100 - expected) / (before * (100 - before))
    error = math.hypot(_standard_error(after, row["images_shift"]), steepness * _standard_error(before, row["images"]))
    noise = 2 * math.hypot(row["scatter"], error)
    return (
        f"On {kind} emoji the line foretells {expected:.1f} % and the model reaches {after:.1f} %: {abs(distance):.1f} "
        f"points {'more' if distance >= 0 else 'less'}. The classifiers themselves scatter by {row['scatter']:.1f} points "
        f"around their line, and so few pictures leave a standard error of {error:.1f} points. Twice both together is "
        f"{noise:.1f}: the distance is {'larger' if abs(distance) > noise else 'smaller, so it may be chance'}."
        + (
            " On the artists it knows the model is outside of the range of the classifiers, so the line is a guess there."
            if row["extrapolated"]
            else ""
        )
    )


def _standard_error(percent: float, count: int) -> float:
    return math.sqrt(percent * (100 - percent) / count)


def _hard_negatives(results: dict[str, Any]) -> Section:
    parts = {"unseen": "known artists", "style": "new artist\nknown emoji", "both": "new artist\nnew emoji"}

    def cell(row: dict[str, Any]) -> str:
        if not row["images"]:
            return "–\nno pictures"
        chance, pixels = format_percent(row["chance"]), format_percent(row["pixels_accuracy"])
        count = f"{row['images']:,} picture{'s' if row['images'] > 1 else ''}"
        return f"{format_percent(row['accuracy'])}\nchance {chance}\npixels {pixels}\n{count}"

    return Section(
        "Fine differences",
        "Here each picture is named only among names that are easily confused with its own: a woman or a man, three o’clock "
        "or nine. A model that knows only the kind of thing stays at chance. The pixel baseline gives the name of the most "
        "similar training drawing; where a name in question has none, it has no answer (–). Where the pictures are few, "
        "one more or less is several points.\n\n"
        "Skin tones were not trained on, neither as pictures nor as words.",
        tables=[
            Table(
                ["% right", *parts.values()],
                [
                    [
                        f"{label}\n{names}\n{results[name]['captions']:,} names",
                        *(cell(results[name][part]) for part in parts),
                    ]
                    for name, (label, names) in CONFUSABLE.items()
                ],
                "Pictures that training never saw, drawings of one size.",
            )
        ],
    )


def _bars(name: str, row: dict[str, Any]) -> dict[str, Any]:
    numbers = {"r1": row["i2t_r1"], "r10": row["i2t_r10"]}
    return {"name": name, **numbers, "chance_r10": row["chance_r10"], "pixels_r10": row["pixels_r10"]}


def _attention(model: PreTrainedModel, processor: Any, shown: _Shown, rows: list[int]) -> Section:
    images = [shown.images[row] for row in rows]
    maps = attention_maps(model, processor, images)
    return Section(
        "Where it looks",
        "How much of the last layer's attention each patch gets, over all heads. The picture tower sees "
        f"{maps.shape[1]}x{maps.shape[2]} patches. Darker orange is more attention, relative to the most in the picture.",
        [
            Picture(
                plot_attention(images[part], maps[part]),
                f"{len(images[part])} pictures, and beside each a map of the attention over it",
            )
            for part in (slice(0, len(images) // 2), slice(len(images) // 2, None))
        ],
    )


def attention_maps(model: PreTrainedModel, processor: Any, images: list[Image.Image]) -> torch.Tensor:
    """``(n, rows, cols)``: how much of the last layer's attention each patch of a picture gets, see `token_attention`.

    Args:
        model: has a ViT as `vision_model`, such as `MMClipModel`; its attention kernel is changed and put back.
        processor: its processor.
        images: n pictures.
    """
    tower = model.vision_model
    kernel = tower.config._attn_implementation
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    tower.set_attn_implementation("eager")
    try:
        with inference(model):
            attentions = tower(pixel_values, output_attentions=True).attentions
    finally:
        tower.set_attn_implementation(kernel)
    grid = tower.config.grid_size
    return token_attention(attentions, attentions[-1].shape[-1] - grid[0] * grid[1], grid)


def _training(log_history: list[dict[str, Any]]) -> Section:
    return Section(
        "Training",
        "The contrastive loss asks which text of the batch belongs to a picture, and which picture to a text; the view "
        "loss which other picture shows the same emoji. The temperature is learnt.",
        [
            Picture(plot_losses(log_history), "The loss and its parts over the steps of training"),
            Picture(plot_temperature(log_history), "The temperature over the steps of training"),
        ],
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _both_forms(value: float | None, original: float | None) -> str:
    return f"{format_percent(value)}\n{format_percent(original)}"
