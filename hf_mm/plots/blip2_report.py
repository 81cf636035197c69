"""The report of a BLIP-2 trained on the bundled emoji: what it says of pictures, and how much of that is sight."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch import nn

from ..composite.vision_tower import tower_layout
from ..data.emoji import load_emoji
from ..evaluation.embeddings import embed_images, embed_texts, inference
from ..evaluation.formatting import format_percent
from ..evaluation.image_text_matching import MATCH, best_query_cosines, matching_head
from ..evaluation.retrieval import right_texts, shared_captions
from ..models.blip2.text_blip2 import clean_caption
from .clip_report import ATTRIBUTION
from .figures import (
    MATCHING_PLATEAU,
    plot_answers,
    plot_captions,
    plot_losses,
    plot_matching_accuracy,
    plot_query_attention,
    plot_runs,
    plot_stage1,
)
from .report import Picture, Section, Table, write_report

SPLITS = {
    "cell": "new drawings of known emoji",
    "concept": "new emoji",
    "style": "known emoji by a new artist",
}
SHOWN = ("cell", "concept")  # splits whose captions are ranked, and whose pictures are shown
SPEAKERS = {"model": "the model", "blind": "blind", "nearest": "nearest"}
RANKINGS = ("top1", "top5", "group_top1")
PLAIN = ("plain_top1", "plain_top5")
MEASURES = {  # which every split has, by who is measured
    "model": ("nll", "nll_other", "gap", "gap_se", "win_rate", "win_rate_se", "word_f1", "other_word_f1", "exact"),
    "blind": ("nll", "nll_other", "gap", "win_rate", "word_f1", "other_word_f1", "exact"),
    "nearest": ("word_f1", "other_word_f1", "exact"),
    "chance": ("gap", "win_rate"),
}
RANKED = {"model": RANKINGS + PLAIN, "blind": PLAIN, "nearest": RANKINGS, "chance": RANKINGS}  # beside these, of SHOWN
THRESHOLDS = ("nll", "gap", "win_rate", *RANKINGS, "word_f1_gain")
RETRIEVAL = {
    "i2t_r1": "name found\nfirst",
    "i2t_r10": "name found\namong ten",
    "t2i_r1": "picture found\nfirst",
    "t2i_r10": "picture found\namong ten",
}
LOGGED = {  # what a run must have logged
    "stage1": (
        *("loss_itc", "loss_itm", "loss_itg"),
        *("accuracy_itm_right_pair", "accuracy_itm_drawn_image", "accuracy_itm_drawn_text"),
    ),
    "words": ("loss",),
    "stage2": ("loss",),
    "blind": ("loss",),
}
OPTIONAL_RUNS = ("words",)
NEAR_PLATEAU = 0.95  # a matching loss above this part of its plateau has hardly left it
QUERIES_SHOWN = 6


def blip2_report(
    stage1: nn.Module,
    stage1_processor: Any,
    model: nn.Module,
    processor: Any,
    results: Mapping[str, Any],
    log_histories: Mapping[str, Sequence[dict[str, Any]]],
    path: str | Path,
    seed: int = 0,
    progress: bool = True,
    stage1_batch_size: int | None = None,
) -> Path:
    """Writes the report of a BLIP-2 that was trained on the bundled emoji, as one page with everything inside it.

    Args:
        stage1: `MMBlip2ForPreTraining`.
        stage1_processor: its processor.
        model: `MMBlip2ForConditionalGeneration` that went on from it.
        processor: its processor.
        results: three dicts by split. ``"splits"`` has ``"pictures"`` (their number), the measures ``"model"``,
            ``"blind"`` (a connector trained without sight with the same budget), ``"nearest"`` (the frozen tower: the
            caption of the nearest training picture, and captions ranked by the tower's own similarity) and
            ``"chance"``, each with the keys of `MEASURES` and, for `SHOWN`, of `RANKED`; and for `SHOWN`
            ``"examples"``: dicts of the ``"row"`` of ``load_emoji(split, normalize_size=True)``, the ``"truth"`` and
            what ``"model"``, ``"blind"`` and ``"nearest"`` say. ``"retrieval"``: what `evaluate_image_text_matching`
            returned for `SHOWN`, and ``"reranked"``, its k. ``"accept"``: least values to reach; of ``"nll"`` any
            value means that of ``"blind"`` at most, ``"word_f1_gain"`` is word_f1 less other_word_f1. Nats a token, and
            percentages from 0 to 100.
        log_histories: of the Trainer of each run: ``"stage1"``, ``"stage2"``, ``"blind"``, and ``"words"`` where
            there was a warm-up in words.
        path: of the HTML file.
        seed: of the choice of the pictures to show.
        progress: show bars.
        stage1_batch_size: pairs of a step of stage 1 over all ranks, for the reference line of the contrastive loss.

    Returns:
        The path.

    Raises:
        ValueError: `results` or `log_histories` lacks something, a threshold is of no measure, or a row of an example
            is not there. Nothing is computed then.
    """
    _check_results(results)
    _check_logs(log_histories)
    emoji = {split: load_emoji(split, normalize_size=True) for split in SHOWN}
    _check_examples(results["splits"], emoji)
    rng = Random(seed)
    sections = [
        _captions(results["splits"], emoji, rng),
        _sight(results),
        _queries(model, processor, emoji, rng),
        _matching(stage1, stage1_processor, results["retrieval"], log_histories["stage1"], emoji, rng, progress),
        _training(stage1, stage1_processor, log_histories, stage1_batch_size),
        Section("About the pictures", ATTRIBUTION),
    ]
    return write_report(path, "Eyes for a language model", _lead(model, results), sections)


def _check_results(results: Mapping[str, Any]) -> None:
    _require(results, ("splits", "retrieval", "accept"), "results")
    _require(results["splits"], SPLITS, "results['splits']")
    for split in SPLITS:
        row, name = results["splits"][split], f"results['splits']['{split}']"
        _require(row, ("pictures", *MEASURES, *(("examples",) if split in SHOWN else ())), name)
        for who, measures in MEASURES.items():
            ranked = RANKED[who] if split in SHOWN else ()
            _require(row[who], (*measures, *ranked), f"{name}['{who}']")
    _require(results["retrieval"], SHOWN, "results['retrieval']")
    searched = [prefix + key for key in RETRIEVAL for prefix in ("", "itc_", "chance_")]
    for split, row in results["retrieval"].items():
        _require(row, (*searched, "captions", "reranked"), f"results['retrieval']['{split}']")
    for split, thresholds in results["accept"].items():
        _refuse_unknown([split], SPLITS, "results['accept']")
        _refuse_unknown(thresholds, THRESHOLDS, f"results['accept']['{split}']")


def _check_logs(log_histories: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    _require(log_histories, [run for run in LOGGED if run not in OPTIONAL_RUNS], "log_histories")
    for run in log_histories.keys() & LOGGED.keys():
        logged = set().union(*log_histories[run])
        _require(logged, LOGGED[run], f"log_histories['{run}']")


def _check_examples(splits: Mapping[str, Any], emoji: dict[str, Dataset]) -> None:
    for split, rows in emoji.items():
        name = f"results['splits']['{split}']['examples']"
        if not splits[split]["examples"]:
            raise ValueError(f"{name} is empty: give what was said of at least one picture.")
        for example in splits[split]["examples"]:
            _require(example, ("row", "truth", *SPEAKERS), name)
            if not 0 <= example["row"] < len(rows):
                raise ValueError(
                    f"{name} has the row {example['row']}, but there are {len(rows)} pictures: give rows of load_emoji."
                )


def _require(given: Iterable[str], needed: Iterable[str], name: str) -> None:
    if lacking := [key for key in needed if key not in given]:
        raise ValueError(f"{name} has no {lacking[0]!r}: pass all that the demo measured and logged.")


def _refuse_unknown(given: Iterable[str], known: Iterable[str], name: str) -> None:
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{name} has {unknown[0]!r}: give no other than {', '.join(known)}.")


def _lead(model: nn.Module, results: Mapping[str, Any]) -> str:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    cell, concept = (results["splits"][split] for split in SHOWN)
    return (
        f"A Q-Former looks at a picture and turns it into {model.config.num_query_tokens} soft words of a frozen language "
        f"model of {model.language_model.num_parameters() / 1e6:.1f} million parameters, which goes on to say what the "
        f"picture shows. {trained / 1e6:.1f} million parameters were trained for that. All pictures asked about on this "
        "page are ones that training never saw.\n\n"
        f"Does it look? Under somebody else’s picture a token of a name costs {_nats(cell['model']['gap'])} nats more than "
        f"under its own for {SPLITS['cell']}, and {_nats(concept['model']['gap'])} for {SPLITS['concept']}. Blind, it would "
        f"be 0; a connector that was trained without sight has {_nats(cell['blind']['gap'])} and "
        f"{_nats(concept['blind']['gap'])}. The name costs less under its own picture for {_share(cell, 'win_rate')} and "
        f"{_share(concept, 'win_rate')}, and comes first among the names to choose from for {_share(cell, 'top1')} and "
        f"{_share(concept, 'top1')}. {_reached_in_words(results)}\n\n"
        f"Does it name what it sees? Exactly right are {format_percent(cell['model']['exact'])} % of the captions of "
        f"{SPLITS['cell']} and {format_percent(concept['model']['exact'])} % of those of {SPLITS['concept']}; the name of "
        f"the training picture that is nearest in the frozen tower is right for {format_percent(cell['nearest']['exact'])} "
        f"% and {format_percent(concept['nearest']['exact'])} %. This is printed because one would ask; no claim rests on "
        "it."
    )


def _share(row: Mapping[str, Any], metric: str) -> str:
    return f"{format_percent(row['model'][metric])} % (chance {format_percent(row['chance'][metric])} %)"


def _reached_in_words(results: Mapping[str, Any]) -> str:
    verdicts = [
        reached(results["splits"][split], metric, threshold)
        for split, thresholds in results["accept"].items()
        for metric, threshold in thresholds.items()
    ]
    if not verdicts:
        return "There are no thresholds to reach."
    return f"Of {len(verdicts)} thresholds it reaches {'all' if all(verdicts) else sum(verdicts)}."


def reached(row: Mapping[str, Any], metric: str, threshold: float) -> bool:
    """Whether the model of a split reaches a threshold of ``results["accept"]``."""
    model = row["model"]
    if metric == "nll":
        return model["nll"] <= row["blind"]["nll"]
    if metric == "word_f1_gain":
        return _gain(model) >= threshold
    return model.get(metric) is not None and model[metric] >= threshold


def _gain(row: Mapping[str, float]) -> float:
    return row["word_f1"] - row["other_word_f1"]


def _captions(splits: Mapping[str, Any], emoji: dict[str, Dataset], rng: Random, count: int = 6) -> Section:
    def said(split: str) -> Picture:
        examples = splits[split]["examples"]
        chosen = [examples[place] for place in sorted(rng.sample(range(len(examples)), min(count, len(examples))))]
        answers = {name: [example[who] for example in chosen] for who, name in SPEAKERS.items()}
        names = [clean_caption(example["truth"]) for example in chosen]
        return Picture(
            plot_answers(
                [emoji[split][example["row"]]["image"] for example in chosen],
                [example["truth"] for example in chosen],
                answers,
                {
                    who: [clean_caption(one) == name for one, name in zip(texts, names, strict=True)]
                    for who, texts in answers.items()
                },
            ),
            f"{len(chosen)} pictures ({SPLITS[split]}), beside each its name and three captions",
            f"{_capital(SPLITS[split])}.",
        )

    return Section(
        "What it says",
        "Bold is the right name. Below it is what the model says; what a connector says that was trained without sight, "
        "with the same budget; and the name of the training picture that is nearest in the frozen tower. Green is exactly "
        "right. The pictures were drawn at random, not chosen.",
        [said(split) for split in SHOWN],
    )


def _sight(results: Mapping[str, Any]) -> Section:
    return Section(
        "How much of it is sight",
        "A low loss proves nothing: without sight one can learn how names of emoji read. So everything is measured beside "
        "what needs no sight.\n\n"
        "Cost is what a token of the right caption costs, in nats; less is better. The gap is what it costs more under "
        "somebody else’s picture, and wins are the captions that cost less under their own, a tie being none; both with a "
        "standard error. In the ranking the right caption competes with others, all of them or those of its own kind of "
        "emoji, by how much likelier the picture makes it than a blank picture does. Small: by how likely it is, whatever "
        "the blank picture says, which favours captions that are likely anyway; a connector that was trained blind has "
        "that alone. The frozen tower ranks by its own similarity.\n\n"
        "Words is how well the words of the caption and of the name agree (F1). It gains what it has more than the same "
        "captions set beside other pictures; a constant caption gains nothing. Exact matches are shown because one would "
        "ask, and nothing is claimed of them.",
        tables=[_measures(split, results["splits"][split], results["accept"].get(split, {})) for split in SPLITS],
    )


def _measures(split: str, row: Mapping[str, Any], accept: Mapping[str, float]) -> Table:
    model, blind, nearest, chance = (row[who] for who in MEASURES)
    plain_chance = [_with_plain(chance.get(key), chance.get(key)) for key in ("top1", "top5")]

    def words(who: Mapping[str, float]) -> list[str]:
        return [format_percent(who["word_f1"]), f"{_gain(who):.1f}".replace("-", "−"), format_percent(who["exact"])]

    def ranked(who: Mapping[str, float]) -> list[str]:
        return [_with_plain(who.get(key), who.get(f"plain_{key}")) for key in ("top1", "top5")]

    return Table(
        [
            "",
            *("cost\nnats", "gap\nnats", "wins\n%"),
            *("first\nof\u00a0all,\u00a0%", "first\u00a05\nof\u00a0all,\u00a0%", "first\nof\u00a0kind,\u00a0%"),
            *("words\nF1, %", "gain\npoints", "exact, %\nnot claimed"),
        ],
        [
            [
                "The model",
                _nats(model["nll"]),
                f"{_nats(model['gap'])}\n± {_nats(model['gap_se'])}",
                f"{format_percent(model['win_rate'])}\n± {format_percent(model['win_rate_se'])}",
                *ranked(model),
                format_percent(model.get("group_top1")),
                *words(model),
            ],
            [
                "Other picture\nthe same captions",
                _nats(model["nll_other"]),
                *["–"] * 5,
                format_percent(model["other_word_f1"]),
                *["–"] * 2,
            ],
            [
                "Trained blind\nsame budget",
                _nats(blind["nll"]),
                _nats(blind["gap"]),
                format_percent(blind["win_rate"]),
                *ranked(blind),
                "–",
                *words(blind),
            ],
            [
                "Nearest picture\ntower alone",
                *["–"] * 3,
                *ranked(nearest),
                format_percent(nearest.get("group_top1")),
                *words(nearest),
            ],
            [
                "Chance",
                "–",
                _nats(chance["gap"]),
                format_percent(chance["win_rate"]),
                *plain_chance,
                format_percent(chance.get("group_top1")),
                *["–"] * 3,
            ],
            ["To be reached", *_thresholds(row, accept)],
        ],
        f"{_capital(SPLITS[split])}: {row['pictures']:,} pictures.",
    )


def _thresholds(row: Mapping[str, Any], accept: Mapping[str, float]) -> list[str]:
    """The cells of a row of `_measures`."""

    def cell(metric: str) -> str:
        if metric not in accept:
            return "–"
        bound = f"≤ {_nats(row['blind']['nll'])}" if metric == "nll" else f"≥ {accept[metric]:g}"
        return f"{bound}\n{'reached' if reached(row, metric, accept[metric]) else 'missed'}"

    return [*map(cell, THRESHOLDS[:-1]), "–", cell("word_f1_gain"), "–"]


def _with_plain(value: float | None, plain: float | None) -> str:
    if value is None and plain is None:
        return "–"
    return format_percent(value) + ("" if plain is None else f"\n{format_percent(plain)}")


def _nats(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _queries(model: nn.Module, processor: Any, emoji: dict[str, Dataset], rng: Random, count: int = 2) -> Section:
    title = "What each query attends to"
    chosen = {split: sorted(rng.sample(range(len(rows)), min(count, len(rows)))) for split, rows in emoji.items()}
    shown = [emoji[split][row] for split, rows in chosen.items() for row in rows]
    pixel_values = processor(images=[row["image"] for row in shown], return_tensors="pt")["pixel_values"]
    weights = query_attention(model, pixel_values)
    side = square_grid(model, tuple(pixel_values.shape[-2:]), weights.shape[-1])
    if side is None:
        return Section(
            title,
            f"The {weights.shape[-1]} tokens of this vision tower are not a square grid of places of the picture and "
            "nothing else, so there is no map to draw.",
        )
    maps = weights.unflatten(-1, (side, side))
    first = f"the first {QUERIES_SHOWN} of {maps.shape[1]}" if maps.shape[1] > QUERIES_SHOWN else f"{maps.shape[1]}"
    return Section(
        title,
        f"How much of the attention of each query each of the {side}x{side} places of the tower’s grid gets, over all "
        f"heads of the last block that looks at the picture. Darker orange is more attention, relative to the most in "
        f"the map. {_overlap_in_words(weights)}",
        [
            Picture(
                plot_query_attention(
                    [row["caption"] for row in shown[part]],
                    [row["image"] for row in shown[part]],
                    maps[part, :QUERIES_SHOWN],
                ),
                f"Pictures ({SPLITS[split]}), and beside each {first} maps of the attention of a query over it",
                f"{_capital(SPLITS[split])}, drawn at random.",
            )
            for split, part in zip(chosen, (slice(0, count), slice(count, None)), strict=True)
        ],
    )


def query_attention(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """How much each query attends to each token of the vision tower, in the last block that looks at the picture.

    Args:
        model: has a Q-Former as `qformer`, such as `MMBlip2ForConditionalGeneration`; its attention kernel is changed and
            put back.
        pixel_values: ``(n, C, H, W)``.

    Returns:
        ``(n, queries, tokens)`` float32 on the CPU, the mean over heads; each row is of sum 1.
    """
    kernel = model.qformer.config._attn_implementation
    model.qformer.set_attn_implementation("eager")
    try:
        with inference(model):
            features = model.get_image_features(pixel_values.to(model.device, model.dtype), output_attentions=True)
    finally:
        model.qformer.set_attn_implementation(kernel)
    return features.qformer_outputs.cross_attentions[-1].float().mean(dim=1).cpu()


def square_grid(model: nn.Module, image_size: tuple[int, int], num_tokens: int) -> int | None:
    """The side of the square grid of places that the tokens of a vision tower are; None where they are anything else.

    Args:
        model: of BLIP-2.
        image_size: height and width of the pictures.
        num_tokens: of a picture. A class token beside the places makes one too many.
    """
    config = model.config
    grid = tower_layout(config.vision_config, config.vision_feature_layer, image_size).grid
    return grid[0] if grid and grid[0] == grid[1] and grid[0] * grid[1] == num_tokens else None


def _overlap_in_words(weights: torch.Tensor) -> str:
    """Do the queries look at different places, and does it depend on the picture where one looks?"""
    between_pictures = overlap(weights.transpose(0, 1))
    words = f"the maps of one query on two pictures overlap by {100 * between_pictures:.0f} %"
    if weights.shape[1] > 1:
        words = f"the maps of two queries on one picture overlap by {100 * overlap(weights):.0f} %, and {words}"
    return f"Here, {words}; 100 % would be the same places."


def overlap(weights: torch.Tensor) -> float:
    """The attention that two maps have in common, the sum of the lesser weights, as a mean over all pairs of one group.

    Args:
        weights: ``(groups, maps, places)``, each map of sum 1.

    Returns:
        From 0 to 1; NaN for one map a group.
    """
    number = weights.shape[1]
    common = torch.minimum(weights[:, :, None], weights[:, None]).sum(dim=-1)
    pairs = ~torch.eye(number, dtype=torch.bool)
    return common[:, pairs].mean().item()


def _matching(
    stage1: nn.Module,
    processor: Any,
    retrieval: Mapping[str, Any],
    log_history: Sequence[dict[str, Any]],
    emoji: dict[str, Dataset],
    rng: Random,
    progress: bool,
    count: int = 4,
) -> Section:
    figures, rows, sentences = [], [], []
    for split, drawings in emoji.items():
        images = list(drawings["image"])
        looks = [(style, image.tobytes()) for style, image in zip(drawings["style"], images, strict=True)]
        found = hard_matches(stage1, processor, images, drawings["caption"][:], looks, progress=progress)
        chosen = sorted(rng.sample(range(len(images)), min(count, len(images))))
        figures.append(_shown_matches(found, images, chosen, SPLITS[split]))
        wins = found.probabilities[:, 0] > found.probabilities[:, 1]
        sentences.append(_wins_in_words(wins, SPLITS[split]))
        mean = (100 * found.probabilities[:, :2]).mean(dim=0).tolist()
        rows.append(
            [
                f"{_capital(SPLITS[split])}\n{len(images):,} pictures",
                format_percent(100 * wins.float().mean().item()),
                "50.0",
                *map(format_percent, mean),
            ]
        )
    return Section(
        "Right and nearly right captions",
        "Stage 1 also learns to say whether a picture and a caption match. Here it is asked about the right caption and "
        "the three wrong ones that are nearest to the picture by cosine, its hardest negatives; the bars are its "
        f"probabilities of a match.\n\n{_plateau_in_words(log_history)}\n\n{' '.join(sentences)}",
        figures,
        [
            Table(
                [
                    "",
                    *(
                        "right caption wins\n%",
                        "chance\n%",
                        "said of the right\n% match",
                        "said of the wrong\n% match",
                    ),
                ],
                rows,
                "The right caption against the nearest wrong one, over all pictures. A tie is no win.",
            ),
            _retrieval(retrieval),
        ],
    )


@dataclass(frozen=True)
class HardMatches:
    """What the matching head says of pictures with their right caption and with the nearest wrong ones.

    Attributes:
        texts: the g captions.
        columns: ``(n, 1 + k)``, for each picture which caption is its own, and which are the nearest wrong ones by
            cosine, nearest first.
        probabilities: ``(n, 1 + k)``, from 0 to 1, of a match.
    """

    texts: list[str]
    columns: torch.Tensor
    probabilities: torch.Tensor


def hard_matches(
    model: nn.Module,
    processor: Any,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    ids: Sequence[Hashable],
    count: int = 3,
    batch_size: int = 64,
    progress: bool = True,
) -> HardMatches:
    """Asks the matching head of a stage 1 about pictures with their hardest negatives.

    Args:
        model, processor: see `evaluate_image_text_matching`.
        images: n pictures.
        captions: of each; those of all pictures are chosen from.
        ids: n ids of what the pictures show; a caption of a picture with the same id is no wrong one.
        count: k, wrong captions of a picture.
        batch_size: pictures at a time.
        progress: show bars.

    Raises:
        ValueError: a picture has fewer than k wrong captions.
    """
    texts = list(dict.fromkeys(captions))
    right = right_texts(shared_captions([[caption] for caption in captions], ids), texts)
    if (fewest := int((~right).sum(dim=1).min())) < count:
        raise ValueError(f"a picture has {fewest} wrong captions, but {count} are asked for: give more captions.")
    cosines = best_query_cosines(
        embed_images(model, processor, images, progress=progress),
        embed_texts(model, partial(processor, mode="matching"), texts, progress=progress),
    )
    own = torch.tensor([texts.index(caption) for caption in captions])
    wrong = cosines.masked_fill(right, -torch.inf).topk(count, dim=1).indices
    columns = torch.cat([own[:, None], wrong], dim=1)
    match = matching_head(model, processor, images, texts)
    logits = [
        match(rows.repeat_interleave(1 + count), columns[rows].flatten())
        for rows in torch.arange(len(images)).split(batch_size)
    ]
    probabilities = torch.cat(logits).float().cpu().softmax(dim=-1)[:, MATCH]
    return HardMatches(texts, columns, probabilities.view_as(columns))


def _shown_matches(found: HardMatches, images: Sequence[Image.Image], chosen: Sequence[int], words: str) -> Picture:
    order = found.probabilities[chosen].argsort(dim=1, descending=True, stable=True)
    columns = found.columns[chosen].gather(1, order).tolist()
    return Picture(
        plot_captions(
            [images[row] for row in chosen],
            [[found.texts[column] for column in own] for own in columns],
            [{found.texts[found.columns[row, 0]]} for row in chosen],
            found.probabilities[chosen].gather(1, order).tolist(),
        ),
        f"{len(chosen)} pictures ({words}), beside each the right caption among the three nearest wrong ones",
        f"{_capital(words)}, drawn at random; likeliest match first, the right one in green.",
    )


def _wins_in_words(wins: torch.Tensor, words: str) -> str:
    share = wins.double().mean().item()
    error = math.sqrt(share * (1 - share) / len(wins))
    more = "above" if share - 0.5 > 2 * error else "below" if 0.5 - share > 2 * error else "not to be told from"
    return (
        f"For {words}, the right caption wins over the nearest wrong one for {format_percent(100 * share)} % of "
        f"{len(wins):,} pictures, with a standard error of {100 * error:.1f}: {more} chance, which is 50 %."
    )


def _plateau_in_words(log_history: Sequence[dict[str, Any]]) -> str:
    loss = last_mean(log_history, "loss_itm")
    said = (
        f"In training the matching loss came to {loss:.3f}. One answer to everything reaches "
        f"{MATCHING_PLATEAU:.3f} at best, since one pair of three is right"
    )
    if loss < NEAR_PLATEAU * MATCHING_PLATEAU:
        return f"{said}."
    return f"{said}: the head is still near that plateau, has hardly learnt to match, and the bars mean little."


def last_mean(log_history: Sequence[dict[str, Any]], name: str) -> float:
    """The mean of the last tenth of what was logged under a name, one entry at least."""
    values = [entry[name] for entry in log_history if name in entry]
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last)


def _retrieval(retrieval: Mapping[str, Any]) -> Table:
    def cell(row: Mapping[str, float], key: str) -> str:
        cosine, chance = format_percent(row[f"itc_{key}"]), format_percent(row[f"chance_{key}"])
        return f"{format_percent(row[key])}\ncosine {cosine}\nchance {chance}"

    reranked = sorted({row["reranked"] for row in retrieval.values()})
    return Table(
        ["%", *RETRIEVAL.values()],
        [
            [f"{_capital(SPLITS[split])}\n{row['captions']:,} names", *(cell(row, key) for key in RETRIEVAL)]
            for split, row in ((split, retrieval[split]) for split in SPLITS if split in retrieval)
        ],
        f"Searching with stage 1: cosines rank everything, and the matching head ranks the best "
        f"{' or '.join(map(str, reranked))} again. Small: by the cosines alone, and by chance.",
    )


def _training(
    stage1: nn.Module,
    processor: Any,
    log_histories: Mapping[str, Sequence[dict[str, Any]]],
    batch_size: int | None,
) -> Section:
    unigram = unigram_loss(stage1, processor, load_emoji("train")["caption"][:])
    figures = [
        Picture(
            plot_stage1(log_histories["stage1"], batch_size, unigram),
            "The contrastive, the matching and the generation loss over the steps of stage 1, with reference lines",
            "Stage 1. Dashed is what needs no look at the picture: "
            + ("" if batch_size is None else f"all {batch_size:,} pairs of a step alike; ")
            + "one answer to every pair; one guess at every word, after how often the names have it.",
        ),
        Picture(
            plot_matching_accuracy(log_histories["stage1"]),
            "Accuracy of the matching head over the steps, of right pairs, drawn pictures and drawn texts",
            "Matching in stage 1, apart for the right pairs, those with a drawn picture and those with a drawn text. "
            "Whoever always says no gets none of the first and all of the others.",
        ),
    ]
    if "words" in log_histories:
        figures.append(
            Picture(
                plot_losses(log_histories["words"]),
                "The loss of the warm-up in words over the steps",
                "The warm-up between the stages, this project’s own: soft words learn the words of names in the language "
                "model’s space, without running it.",
            )
        )
    figures.append(
        Picture(
            plot_runs({"with pictures": log_histories["stage2"], "without sight": log_histories["blind"]}),
            "The loss of stage 2 over the steps, with pictures and without sight",
            "Stage 2, and the same without sight: where both fall together, what was learnt is how names read.",
        )
    )
    return Section(
        "Training",
        "Stage 1 trains the Q-Former on the frozen tower by three losses at once. In stage 2 its queries are read by the "
        "frozen language model, whose loss is the only one.",
        figures,
    )


def unigram_loss(model: nn.Module, processor: Any, texts: Sequence[str]) -> float:
    """The least generation loss of one guess at every word, whatever the picture and the words before: in nats.

    With label smoothing it is the entropy of the smoothed frequencies of words.

    Args:
        model: a stage 1.
        processor: its processor.
        texts: what was trained on.
    """
    inputs = processor(text=list(texts), mode="contrastive", return_tensors="pt")
    told = inputs["input_ids"][:, 1:][inputs["attention_mask"][:, 1:] == 1]
    size, smoothing = model.config.qformer_config.vocab_size, model.config.label_smoothing
    share = torch.bincount(told, minlength=size).double() / len(told)
    share = (1 - smoothing) * share + smoothing / size
    return -torch.special.xlogy(share, share).sum().item()


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
