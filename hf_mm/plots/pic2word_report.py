"""The report of a Pic2Word trained on the bundled emoji: what it finds, how often, and what word a picture became."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import nn

from ..composite.dual_encoder import word_embeddings
from ..data.emoji import load_emoji
from ..evaluation.composed.protocol import embed_queries
from ..evaluation.embeddings import inference
from ..evaluation.emoji_composed import (
    TONES,
    TRAINED_STYLES,
    EmojiPictures,
    Questions,
    embed_emoji,
    style_questions,
    tone_questions,
)
from ..evaluation.formatting import format_percent
from .clip_report import ATTRIBUTION
from .figures import plot_composed, plot_losses, plot_recalls, plot_words
from .report import Picture, Section, Table, write_report

METHODS = {  # ways to ask that read the model's embeddings
    "composed": "picture as a word",
    "image_text": "picture plus words",
    "image_only": "picture alone",
    "text_only": "words alone",
}
BASELINES = {**METHODS, "pixels": "16x16 pixels alone"}
ROWS = {**BASELINES, "chance": "chance", "name": "the true name as a word"}
HOW_TO_READ = (
    "In the tables, large: how often a right picture is among the first ten; small: how often it is first, and among the "
    "first fifty. Ties count against the model. The true name is no baseline: it is told what the picture shows."
)
SPLITS = {"cell": "known emoji, drawings held out", "concept": "new emoji"}


@dataclass(frozen=True)
class _Task:
    """A kind of question: how it is told, and where its questions come from."""

    title: str
    text: str
    field: str
    domains: tuple[str, ...]
    questions: Callable[[EmojiPictures, str], Questions]
    thing: str  # the column in which a picture and its target are equal
    wanted: str  # what the words ask for


TASKS = {
    "style_conversion": _Task(
        "The same thing by another artist",
        "The picture says what, the words say by whom. Searched are the drawings of all artists; that of the query is left "
        "out. Where the frozen CLIP puts the drawings of one thing close together, whoever drew them, the picture alone is "
        "a strong baseline.",
        "style",
        TRAINED_STYLES,
        style_questions,
        "hexcode",
        "artist",
    ),
    "attribute_edit": _Task(
        "The same person or hand in a skin tone",
        "The picture says what, the words say which tone. Searched are all drawings in all tones. The right one differs "
        "from the query in little but a colour, so the picture alone, and its pixels alone, are strong; the words must "
        "add the tone.",
        "tone",
        tuple(TONES),
        tone_questions,
        "base",
        "tone",
    ),
}


def pic2word_report(
    model: nn.Module,
    processor: Any,
    metrics: dict[str, dict[str, Any]],
    log_history: list[dict[str, Any]],
    path: str | Path,
    pictures: EmojiPictures | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Writes the report of a Pic2Word that was trained on the bundled emoji, as one page with everything inside it.

    Args:
        model: `Pic2WordModel` over a CLIP whose vocabulary marks the ends of words, as that of CLIP does.
        processor: its processor.
        metrics: what `evaluate_style_conversion` and `evaluate_attribute_edit` returned, by split, under
            ``"style_conversion"`` and ``"attribute_edit"``.
        log_history: of the Trainer.
        path: of the HTML file.
        pictures: what `embed_emoji` made of them with this model; by default it is called.
        seed: of the choice of the pictures to show.
        progress: show bars.

    Returns:
        The path.

    Raises:
        ValueError: `metrics` lacks one of the two, or no entry of `log_history` has a loss.
    """
    if lacking := [name for name in TASKS if not metrics.get(name)]:
        raise ValueError(f"metrics has no {lacking[0]!r}: pass the results of both, {' and '.join(TASKS)}, by split.")
    pictures = pictures or embed_emoji(model, processor, progress=progress)
    emoji = load_emoji("all", skin_tones=True, normalize_size=pictures.normalize_size)
    sections = [
        _task(model, processor, metrics[name], pictures, emoji, task, Random(seed), progress)
        for name, task in TASKS.items()
    ]
    sections += [
        _words(model, processor, pictures, emoji, Random(seed)),
        Section(
            "Training",
            "Each picture of a batch is to be found by the sentence that holds its own word, and no other. No words but "
            "those of that one sentence were read, and no picture was ever changed: what the other sentences do to a "
            "picture, they do because the frozen CLIP understands them.",
            [Picture(plot_losses(log_history), "The loss over the steps of training")],
        ),
        Section("About the pictures", ATTRIBUTION),
    ]
    return write_report(path, "A picture as a word", _lead(model, metrics), sections)


def _lead(model: nn.Module, metrics: dict[str, dict[str, Any]]) -> str:
    split = max(metrics["style_conversion"], key=list(SPLITS).index)
    result = metrics["style_conversion"][split]
    mean = result["results"]["mean"]
    return (
        f"A network of {model.mapper.num_parameters():,} parameters turns a picture into a word of a frozen CLIP of "
        f"{model.clip.num_parameters() / 1e6:.1f} million. Put into a sentence such as “{_shown(result, 'twemoji')}”, the "
        "word should find the picture that the sentence describes. All pictures asked with on this page are ones that "
        "training never saw.\n\n"
        f"Of {SPLITS[split]} it finds the asked artist’s drawing among the first ten for "
        f"{format_percent(mean['composed']['r10'])} % of the questions. {margin_in_words(mean)} By chance it would be "
        f"{format_percent(mean['chance']['r10'])} %."
    )


def margin_in_words(mean: dict[str, dict[str, float]], metric: str = "r10") -> str:
    """How far the model is from the best of the three baselines that read its embeddings, in a sentence."""
    best = max(list(METHODS)[1:], key=lambda method: mean[method][metric])
    margin = mean["composed"][metric] - mean[best][metric]
    return (
        f"The best baseline, {METHODS[best]}, finds {format_percent(mean[best][metric])} %: the picture as a word finds "
        f"{abs(margin):.1f} points {'more' if margin > 0 else 'less'}."
    )


def _shown(result: dict[str, Any], domain: str) -> str:
    return result["prompt"].format(style=domain, tone=domain)


def _task(
    model: nn.Module,
    processor: Any,
    by_split: dict[str, dict[str, Any]],
    pictures: EmojiPictures,
    emoji: Dataset,
    task: _Task,
    rng: Random,
    progress: bool,
) -> Section:
    figures, tables = [], []
    for split, words in SPLITS.items():
        if split not in by_split:
            continue
        result, questions = by_split[split], task.questions(pictures, split)
        found = _search(model, processor, pictures, questions, result, task.field, progress)
        chosen = sorted(rng.sample(range(len(questions.queries)), min(3, len(questions.queries))))
        groups = {domain: result["results"][domain] for domain in (*task.domains, "mean")}
        figures += [
            Picture(
                _examples(pictures, emoji, questions, found, result, chosen),
                f"Three questions and the first pictures that four ways to ask find for each: {words}",
                f"{_capital(words)}; the questions were drawn at random. A green frame is a right picture.",
            ),
            Picture(
                plot_recalls(
                    {
                        domain: {name: row[way]["r10"] for way, name in BASELINES.items()}
                        for domain, row in groups.items()
                    },
                    {domain: row["chance"]["r10"] for domain, row in groups.items()},
                    "found among the first ten, %",
                ),
                f"Bars: recall at 10 of each way to ask, for each {task.wanted}: {words}",
                f"{_capital(words)}. {margin_in_words(groups['mean'])}",
            ),
        ]
        whole = f"among all {result['gallery']:,} pictures"
        tables += [
            _recalls(f"{_capital(words)}, {whole}.", result, "results", task),
            _recalls(f"{_capital(words)}, among those of the asked {task.wanted} alone.", result, "filtered", task),
            _first_answers(
                f"{_capital(words)}: what the first answer, {whole}, got right.", pictures, questions, found, task
            ),
        ]
    return Section(task.title, f"{task.text}\n\n{HOW_TO_READ}", figures, tables)


def _search(
    model: nn.Module,
    processor: Any,
    pictures: EmojiPictures,
    questions: Questions,
    result: dict[str, Any],
    field: str,
    progress: bool,
    count: int = 5,
) -> dict[str, np.ndarray]:
    """For each way to ask the rows of the first pictures, ``(q, count)``, of the whole gallery without the query."""
    prompts, texts = (
        [text.replace(f"{{{field}}}", domain) for domain in questions.domains]
        for text in (result["prompt"], result["text_only_prompt"])
    )
    asked = embed_queries(model, processor, pictures.features[questions.queries], prompts, texts, progress=progress)
    gallery = nn.functional.normalize(pictures.features[questions.gallery], dim=-1)
    itself = torch.from_numpy(questions.gallery[None] == questions.queries[:, None])
    return {
        method: questions.gallery[(asked[method] @ gallery.T).masked_fill(itself, -2).topk(count).indices.numpy()]
        for method in METHODS
    }


def _examples(
    pictures: EmojiPictures,
    emoji: Dataset,
    questions: Questions,
    found: dict[str, np.ndarray],
    result: dict[str, Any],
    chosen: Sequence[int],
):
    def opened(rows: Sequence[int]) -> list[Image.Image]:
        return [emoji[int(row)]["image"] for row in rows]

    looks = pictures.looks.numpy()
    return plot_composed(
        opened(questions.queries[chosen]),
        [f"“{_shown(result, questions.domains[number])}”" for number in chosen],
        opened(questions.targets[chosen]),
        {name: [opened(found[method][number]) for number in chosen] for method, name in METHODS.items()},
        {
            name: [(looks[found[method][number]] == looks[questions.targets[number]]).tolist() for number in chosen]
            for method, name in METHODS.items()
        },
    )


def _recalls(caption: str, result: dict[str, Any], gallery: str, task: _Task) -> Table:
    counts = {**result["queries"], "mean": sum(result["queries"].values())}
    domains = [*task.domains, "mean"]

    def cell(row: dict[str, float]) -> str:
        first, ten, fifty = (format_percent(row[metric]) for metric in ("r1", "r10", "r50"))
        return f"{ten}\nfirst {first}, of 50 {fifty}"

    return Table(
        ["%", *(f"{domain}\n{counts[domain]:,}\u00a0questions" for domain in domains)],
        [
            [_capital(name), *(cell(result[gallery][domain][method]) for domain in domains)]
            for method, name in ROWS.items()
        ],
        caption,
    )


def _first_answers(
    caption: str, pictures: EmojiPictures, questions: Questions, found: dict[str, np.ndarray], task: _Task
) -> Table:
    """Which half of the question the first answer got right."""
    things = pictures.columns[task.thing]
    domain_of = np.full(len(things), "", dtype=questions.domain_of.dtype)
    domain_of[questions.gallery] = questions.domain_of
    rows = []
    for method, name in METHODS.items():
        first = found[method][:, 0]
        thing = things[first] == things[questions.queries]
        domain = domain_of[first] == questions.domains
        shares = (thing & domain, thing & ~domain, ~thing & domain, ~thing & ~domain)
        rows.append([_capital(name), *(format_percent(100 * float(share.mean())) for share in shares)])
    return Table(
        [
            "% of first answers",
            f"right thing\nright {task.wanted}",
            f"right thing\nwrong {task.wanted}",
            f"wrong thing\nright {task.wanted}",
            f"wrong thing\nwrong {task.wanted}",
        ],
        rows,
        caption,
    )


@dataclass(frozen=True)
class NearestWords:
    """The words of a vocabulary that are nearest to pseudo-words, by the cosine of their embeddings.

    Attributes:
        words: n lists of k, nearest first.
        cosines: ``(n, k)``.
        lengths: ``(n,)``, of the pseudo-words.
        word_length: the mean over the vocabulary.
        word_cosine: the mean cosine of a word of the vocabulary to the one that is nearest to it.
        vocabulary: all words that were compared.
    """

    words: list[list[str]]
    cosines: torch.Tensor
    lengths: torch.Tensor
    word_length: float
    word_cosine: float
    vocabulary: frozenset[str]


def nearest_words(
    model: nn.Module, tokenizer: Any, features: torch.Tensor, words: Iterable[str], count: int = 5
) -> NearestWords:
    """Looks up what words pictures became.

    Args:
        model: `Pic2WordModel`.
        tokenizer: of its CLIP.
        features: ``(n, D)``, of pictures, not of unit length.
        words: to compare with; those that are not one token are left out.
        count: k, how many words to a picture.

    Raises:
        ValueError: fewer than k + 1 of the words are one token.
    """
    words = sorted(set(words))
    encoded = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
    ids = {word: tokens[0] for word, tokens in zip(words, encoded, strict=True) if len(tokens) == 1}
    if len(ids) <= count:
        raise ValueError(
            f"{len(ids)} of {len(words)} words are one token: more than {count} are needed to compare with."
        )
    with inference(model):
        pseudo_words = model.mapper(features.to(model.device)).pseudo_words.float().cpu()
        table = word_embeddings(model.clip).weight[list(ids.values())].float().cpu()
    directions = nn.functional.normalize(table, dim=-1)
    best = (nn.functional.normalize(pseudo_words, dim=-1) @ directions.T).topk(count)
    between = (directions @ directions.T).fill_diagonal_(-1)
    vocabulary = list(ids)
    return NearestWords(
        words=[[vocabulary[place] for place in row] for row in best.indices.tolist()],
        cosines=best.values,
        lengths=pseudo_words.norm(dim=-1),
        word_length=float(table.norm(dim=-1).mean()),
        word_cosine=float(between.amax(dim=-1).mean()),
        vocabulary=frozenset(vocabulary),
    )


def words_of(text: str) -> set[str]:
    """The words of a name, in small letters, of two letters at least."""
    return set(re.findall(r"[^\W\d_]{2,}", text.lower()))


def _words(model: nn.Module, processor: Any, pictures: EmojiPictures, emoji: Dataset, rng: Random) -> Section:
    figures, rows = [], []
    column = pictures.columns
    known = set().union(*map(words_of, column["caption"]), *(words_of(tag) for tags in emoji["tags"] for tag in tags))
    for split, words in SPLITS.items():
        shown = np.flatnonzero((column["split"] == split) & (column["skin_tone"] == 0))
        near = nearest_words(model, processor.tokenizer, pictures.features[shown], known)
        own = [words_of(name) & near.vocabulary for name in column["caption"][shown]]
        hit = torch.tensor(
            [[not found_words.isdisjoint(name) for name in own] for found_words in map(set, near.words)]
        )
        named = torch.tensor([bool(name) for name in own])
        hit = hit[named][:, named]
        by_chance = (hit.sum() - hit.diagonal().sum()) / (hit.numel() - len(hit))
        rows.append(
            [
                f"{_capital(words)}\n{len(hit):,} pictures",
                format_percent(100 * float(hit.diagonal().float().mean())),
                format_percent(100 * float(by_chance)),
                f"{len({row[0] for row in near.words}):,}",
                f"{float(near.cosines[:, 0].mean()):.2f}\n{near.word_cosine:.2f}",
                f"{float(near.lengths.mean()):.2f}\n{near.word_length:.2f}",
            ]
        )
        chosen = sorted(rng.sample(range(len(shown)), min(4, len(shown))))
        figures.append(
            Picture(
                plot_words(
                    [emoji[int(shown[number])]["image"] for number in chosen],
                    [column["caption"][shown[number]] for number in chosen],
                    [near.words[number] for number in chosen],
                    [near.cosines[number].tolist() for number in chosen],
                    [[word in own[number] for word in near.words[number]] for number in chosen],
                ),
                f"Four pictures and the words of the vocabulary that are nearest to what each became: {words}",
                f"{_capital(words)}, drawn at random. Beside each word its cosine.",
            )
        )
    return Section(
        "What word did it become?",
        "The network writes a vector where a word’s embedding would stand. Here are the words whose embeddings point most "
        "nearly the same way, of those in emoji’s names and tags that are one token. Nothing in training asks for that: a "
        "vector need not be near any word to make the sentence find the picture. Where a word of the name is near all the "
        "same, the network found by itself what others call the thing.",
        figures,
        [
            Table(
                [
                    "",
                    "name\u00a0near\n% of pictures",
                    "by chance\n%",
                    "different\nfirst words",
                    "cosine\nof a word",
                    "length\nof a word",
                ],
                rows,
                "Of the pictures whose name has such a word. Name near: a word of the picture’s own name is among its five "
                "nearest. By chance: a word of another picture’s name is. Cosine: of a picture’s word to the nearest word of "
                "the vocabulary; small, of a word of the vocabulary to the one nearest to it. Length: of a picture’s word; "
                "small, of the vocabulary’s words. The layers of the text tower add to a word’s vector: the longer it is, the "
                "less the words around it change.",
            )
        ],
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
