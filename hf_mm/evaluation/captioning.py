"""Captions that a model writes, scored as COCO scores them, beside what captions score that never saw the picture.

CIDEr and BLEU are pycocoevalcap's, with which published figures are made, and which needs no Java for these two. Words
are told apart by `tokenize_caption` in place of its Java program.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Hashable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from tqdm.auto import tqdm

from .embeddings import inference
from .picture_gap import other_rows

METRICS = ("cider", "bleu1", "bleu2", "bleu3", "bleu4", "word_f1", "exact")
CONSTANTS = 100  # references that are tried as the constant caption

CLITIC = r"'(?:s|m|d|re|ve|ll)\b|n't\b"
TOKEN = re.compile(  # what comes first wins
    rf"""
    (?:mrs?|ms|dr|st|jr|sr|vs|no|etc)\.(?!\w)           # abbreviations keep their full stop
    | (?:[^\W\d_]\.){{2,}}                              # and so do u.s. and p.m.
    | {CLITIC}                                          # 's of man's
    | \w+(?=n't\b)                                      # do of don't
    | \d+(?:[.,:/]\d+)+                                 # 5.50, 3:45, 100,000, 1/2
    | \w+(?:(?:[-/&.]|(?!{CLITIC})')\w+)*               # t-shirt, and/or, o'clock
    | [^\w\s]                                           # every other mark alone
    """,
    re.VERBOSE,
)
SPLIT = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na"}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
DROPPED = frozenset(".?!,:;-'`\"“”–—…")


def evaluate_captioning(
    model: nn.Module,
    processor: Any,
    pictures: Sequence[Any] | None,
    references: Sequence[Sequence[str]],
    prompt: str | None = None,
    batch_size: int = 32,
    vision_features: torch.Tensor | None = None,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    progress: bool = True,
    **generate_kwargs,
) -> dict[str, Any]:
    """Captions pictures and scores the captions, beside two that need no sight.

    Args:
        model, processor, pictures, vision_features, batch_size, progress: see `generate_texts`.
        references: for each of the n pictures its captions, one or more.
        prompt: what every caption goes on from, such as ``"a photo of"``, and is scored without; by default the
            processor's own.
        groups: n labels of what the pictures show; by default pictures with the same references show the same.
        seed: of the draw of other pictures.
        **generate_kwargs: of `model.generate`, such as ``num_beams=5, max_new_tokens=30, min_new_tokens=8``.

    Returns:
        The scores of `caption_metrics`; the same after ``shuffled_`` for the same captions against the references of
        other pictures (None where more than half of the pictures show the same), and after ``constant_`` for one
        caption given to all: the reference that has the best word F1, of the 100 most frequent. Then the count
        ``pictures``, that caption ``constant``, and the list ``captions``.

    Raises:
        ValueError: lengths differ, or a picture has no reference.
        TypeError: the references of a picture are one string.
        ImportError: pycocoevalcap is not installed.
    """
    _check_references(references)
    coco_scorers()
    captions = generate_texts(
        model,
        processor,
        pictures,
        None if prompt is None else [prompt] * len(references),
        batch_size,
        vision_features,
        progress,
        **generate_kwargs,
    )
    groups = [frozenset(own) for own in references] if groups is None else groups
    constant = best_constant(references)
    return {
        "pictures": len(references),
        **caption_metrics(captions, references),
        **_prefixed("shuffled", shuffled_metrics(captions, references, groups, seed)),
        **_prefixed("constant", caption_metrics([constant] * len(references), references)),
        "constant": constant,
        "captions": captions,
    }


def generate_texts(
    model: nn.Module,
    processor: Any,
    pictures: Sequence[Any] | None,
    texts: Sequence[str] | None = None,
    batch_size: int = 32,
    vision_features: torch.Tensor | None = None,
    progress: bool = True,
    processor_kwargs: Mapping[str, Any] | None = None,
    **generate_kwargs,
) -> list[str]:
    """What a model writes about pictures, after a text each.

    Under `torch.distributed` every rank must call this with the same arguments, writes its share and gets everything.

    Args:
        model: has `generate`, and `config.is_encoder_decoder` where it is one; its device, dtype and mode are kept.
        processor: turns ``images=`` and ``text=`` into the inputs of that, and has `batch_decode`. It is asked for
            padding on the left, or on the right for an encoder-decoder. Where it has `eos_token_id`, generation ends
            there.
        pictures: n pictures, or for each text a list of pictures; None with `vision_features`. A `datasets` column
            stays lazy.
        texts: n of them; those of similar length share a batch. None for what the processor says without any.
        batch_size: rows per call of `generate`.
        vision_features: in place of pictures, ``(n, ...)``, what the vision tower gives for each; the processor is then
            told ``num_images=`` in place of ``images=``.
        progress: show a bar.
        processor_kwargs: more options of the processor, such as ``{"mode": "vqa"}``.
        **generate_kwargs: of `model.generate`.

    Returns:
        n texts without what they go on from, special tokens, and white space around.

    Raises:
        ValueError: lengths differ, there are no pictures, pictures and features are both given or neither, the batch
            size is not positive, or `generate` gives several texts to a row.
    """
    if (pictures is None) == (vision_features is None):
        raise ValueError("pass either pictures or vision_features.")
    given = pictures if vision_features is None else vision_features
    if texts is not None and len(given) != len(texts):
        what = "pictures" if vision_features is None else "rows of vision_features"
        raise ValueError(f"there are {len(texts)} texts and {len(given)} {what}: give each text its own.")
    if len(given) == 0:
        raise ValueError("there are no pictures: pass at least one.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1.")

    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    side = "right" if encoder_decoder else "left"
    options = {"padding": True, "padding_side": side, "return_tensors": "pt", **(processor_kwargs or {})}
    has_slots = getattr(processor, "num_query_tokens", 1) is not None  # a Q-Former alone has none in its text
    if not has_slots:
        options.setdefault("mode", "generation")
    if "eos_token_id" not in generate_kwargs and (end := _end_of(processor)) is not None:
        generate_kwargs["eos_token_id"] = end
    ends = torch.tensor(generate_kwargs.get("eos_token_id", [])).flatten().tolist()

    def prepare(rows: list[int]) -> dict[str, torch.Tensor]:
        text = {} if texts is None else {"text": [texts[row] for row in rows]}
        if vision_features is None:
            inputs = dict(processor(images=[pictures[row] for row in rows], **text, **options))
        else:
            counted = {"num_images": [1] * len(rows)} if has_slots else {}
            inputs = dict(processor(**counted, **text, **options)) if counted or text else {}
            inputs["vision_features"] = vision_features[rows]
        for name in ("pixel_values", "vision_features"):
            if name in inputs:
                inputs[name] = inputs[name].to(model.dtype)
        return {name: value.to(model.device) for name, value in inputs.items()}

    def write(rows: list[int]) -> list[str]:
        inputs = prepare(rows)
        ids = model.generate(**inputs, **generate_kwargs)
        if len(ids) != len(rows):
            raise ValueError(f"generate gave {len(ids)} texts for {len(rows)} rows: leave num_return_sequences at 1.")
        begin = 1 if encoder_decoder or "input_ids" not in inputs else inputs["input_ids"].shape[1]
        new = [_until(ends, row) for row in ids[:, begin:].tolist()]
        return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]

    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = range(len(given)) if texts is None else sorted(range(len(given)), key=lambda row: len(texts[row]))
    share = list(order[rank::world_size])
    written: dict[int, str] = {}
    with inference(model), tqdm(total=len(share), unit=" pictures", disable=not progress or rank > 0) as bar:
        for start in range(0, len(share), batch_size):
            rows = share[start : start + batch_size]
            written |= zip(rows, write(rows), strict=True)
            bar.update(len(rows))
    return [text for _, text in sorted(_of_all_ranks(written, world_size).items())]


def caption_metrics(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of captions, in percent, as tables print them.

    Args:
        captions: n captions.
        references: for each its references, one or more.

    Returns:
        ``cider`` (CIDEr-D: 1000 for perfect captions of four words and more, 250 for perfect ones of a single word; its
        word weights come from all the references, so it is 0 for a single picture), ``bleu1`` to ``bleu4`` (over all
        captions at once), ``word_f1`` (the words in common with the nearest reference, counted with repetition,
        averaged) and ``exact`` (captions that have the words of a reference in order). All compare words of
        `tokenize_caption`.

    Raises:
        ValueError: lengths differ, there are no captions, or a picture has no reference.
        TypeError: captions, or the references of a picture, are one string.
        ImportError: pycocoevalcap is not installed.

    Source:
        Vedantam et al. 2015; Papineni et al. 2002; Chen et al. 2015.
    """
    if isinstance(captions, str):
        raise TypeError("captions is one string: pass a list of strings.")
    if len(captions) != len(references):
        raise ValueError(
            f"there are {len(captions)} captions and {len(references)} lists of references: give one each."
        )
    _check_references(references)
    bleu, cider = coco_scorers()
    words = [tokenize_caption(caption) for caption in captions]
    right = [[tokenize_caption(reference) for reference in own] for own in references]
    written = {row: [" ".join(own)] for row, own in enumerate(words)}
    expected = {row: [" ".join(reference) for reference in own] for row, own in enumerate(right)}
    bleus, _ = bleu.compute_score(expected, written, verbose=0)
    scores = (
        cider.compute_score(expected, written)[0],
        *bleus,
        _mean([best_word_f1(own, others) for own, others in zip(words, right, strict=True)]),
        _mean([float(own in others) for own, others in zip(words, right, strict=True)]),
    )
    return {name: 100 * float(score) for name, score in zip(METRICS, scores, strict=True)}


def shuffled_metrics(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, float | None]:
    """`caption_metrics` against the references of other pictures: what captions score without telling pictures apart.

    Args:
        captions, references: see `caption_metrics`.
        groups, seed: see `other_rows`.

    Returns:
        The scores; None where more than half of the pictures are of one group.
    """
    labels = list(range(len(captions)) if groups is None else groups)
    if 2 * max(Counter(labels).values(), default=0) > len(captions):
        return dict.fromkeys(METRICS)
    other = other_rows(len(captions), seed, labels)
    return caption_metrics(captions, [references[row] for row in other.tolist()])


def best_constant(references: Sequence[Sequence[str]], candidates: int = CONSTANTS) -> str:
    """Of the most frequent references, the one that as a caption of every picture has the best word F1."""
    frequent = Counter(reference for own in references for reference in own).most_common(candidates)
    right = [[tokenize_caption(reference) for reference in own] for own in references]

    def score(caption: str) -> float:
        words = tokenize_caption(caption)
        return _mean([best_word_f1(words, own) for own in right])

    return max((caption for caption, _ in frequent), key=score)


def best_word_f1(words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """`word_f1` with the reference that is nearest."""
    return max(word_f1(words, reference) for reference in references)


def word_f1(words: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, a word counting as often as it stands on both sides; 0 to 1."""
    common = (Counter(words) & Counter(reference)).total()
    return 2 * common / max(1, len(words) + len(reference))


def tokenize_caption(text: str) -> list[str]:
    """Words as the Penn Treebank has them, in lower case, without punctuation.

    The rules are those of the Java program with which COCO scores are made: ``man's`` is ``man 's`` and ``don't`` is
    ``do n't``; a word keeps its hyphens, slashes and inner full stops, a number its commas; brackets are words
    (``-lrb-``), as are other symbols; full stops, commas, quotes, dashes and the like are dropped. Unlike there, a
    curly apostrophe is a straight one in every word, runs such as ``?!`` are dropped too, and of abbreviations only the
    commonest keep their full stop.
    """
    found = TOKEN.findall(text.lower().replace("’", "'").replace("‘", "'"))
    words = " ".join(SPLIT.get(word, BRACKETS.get(word, word)) for word in found if word not in DROPPED)
    return words.split()


def coco_scorers() -> tuple[Any, Any]:
    """BLEU and CIDEr of pycocoevalcap.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise ImportError("CIDEr and BLEU need pycocoevalcap: pip install pycocoevalcap.") from error
    return Bleu(4), Cider()


def _end_of(processor: Any) -> int | None:
    try:
        return getattr(processor, "eos_token_id", None)
    except ValueError:  # a tokenizer without one, as BERT's
        return None


def _until(ends: Container[int], ids: list[int]) -> list[int]:
    """Generated ids up to the end of the text: after it a batch is padded, maybe with a word."""
    return list(takewhile(lambda number: number not in ends, ids))


def _of_all_ranks(texts: dict[int, str], world_size: int) -> dict[int, str]:
    if world_size == 1:
        return texts
    parts: list[dict[int, str]] = [{}] * world_size
    dist.all_gather_object(parts, texts)
    return {row: text for part in parts for row, text in part.items()}


def _check_references(references: Sequence[Sequence[str]]) -> None:
    if len(references) == 0:
        raise ValueError("there are no references: give each picture a list of its captions.")
    for index, own in enumerate(references):
        if isinstance(own, str):
            raise TypeError(f"the references of picture {index} are one string: pass a list of strings.")
        if len(own) == 0:
            raise ValueError(f"picture {index} has no reference: leave it out or give it one.")


def _prefixed(prefix: str, scores: dict[str, float | None]) -> dict[str, float | None]:
    return {f"{prefix}_{name}": score for name, score in scores.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
