"""Answers to questions about pictures, scored as VQA v2, OK-VQA and GQA score them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .captioning import generate_texts

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(DIGITS)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# A contraction that lacks one of its apostrophes gets it back: "dont", "couldnt've" and "couldn'tve".
WITH_APOSTROPHES = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in WITH_APOSTROPHES.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # as the official table has it


def evaluate_vqa(
    model: nn.Module,
    processor: Any,
    pictures: Sequence[Any] | None,
    questions: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    prompt: str | None = None,
    lemmatize: Callable[[str], str] | None = None,
    batch_size: int = 32,
    vision_features: torch.Tensor | None = None,
    progress: bool = True,
    **generate_kwargs,
) -> dict[str, Any]:
    """Asks a model questions about pictures.

    To see what it answers without sight, call this again with ``[pictures[row] for row in other_rows(n)]``, see
    `hf_mm.evaluation.picture_gap`.

    Args:
        model, processor, pictures, vision_features, batch_size, progress: see `generate_texts`.
        questions: n questions.
        answers: for each its human answers, ten in VQA v2 and OK-VQA, scored by `vqa_accuracy`; or one string, scored
            by `exact_accuracy`, as in GQA.
        prompt: with ``{}`` for the question, such as ``"Question: {} Short answer:"``. By default the processor is
            given the bare questions and ``mode="vqa"``, and asks them in its own way.
        lemmatize: applied to the model's answers first, such as `spacy_lemmatizer()` for OK-VQA.
        **generate_kwargs: of `model.generate`, such as ``num_beams=5, max_new_tokens=10, length_penalty=-1``.

    Returns:
        Percentages ``accuracy`` and ``majority`` (always the answer that scores best on `answers`, of the 100 most
        frequent), the count ``questions``, and the list ``predictions``.

    Raises:
        ValueError: lengths differ, the prompt has no ``{}``, or a question has no answer or, in a list, only one.

    Source:
        Goyal et al. 2017 and its evaluation code; Li et al. 2023, section 4.1, for prompt and generation.
    """
    if len(questions) != len(answers):
        raise ValueError(
            f"there are {len(questions)} questions and {len(answers)} answers: give each question its own."
        )
    if prompt is not None and "{}" not in prompt:
        raise ValueError(f"the prompt {prompt!r} has no {{}} where the question goes.")
    for row, own in enumerate(answers):
        if len(own) < (1 if isinstance(own, str) else 2):
            raise ValueError(
                f"question {row} has {len(own)} answers: give a list of two or more, or one string for exact match."
            )
    texts, mode = (questions, {"mode": "vqa"}) if prompt is None else (_filled(prompt, questions), None)
    predictions = generate_texts(
        model, processor, pictures, texts, batch_size, vision_features, progress, mode, **generate_kwargs
    )
    if lemmatize is not None:
        predictions = [lemmatize(prediction) for prediction in predictions]
    return {
        "questions": len(questions),
        "accuracy": mean_accuracy(predictions, answers),
        "majority": max(mean_accuracy([answer] * len(answers), answers) for answer in frequent_answers(answers)),
        "predictions": predictions,
    }


def mean_accuracy(predictions: Sequence[str], answers: Sequence[str | Sequence[str]]) -> float:
    """`exact_accuracy` where the answer is one string and `vqa_accuracy` where it is a list, averaged, in percent."""
    scores = [
        exact_accuracy(prediction, own) if isinstance(own, str) else vqa_accuracy(prediction, own)
        for prediction, own in zip(predictions, answers, strict=True)
    ]
    return 100 * sum(scores) / len(scores)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The official accuracy, 0 to 1: min(1, matches / 3) over all answers but one, averaged over which is left out.

    Both sides are normalised, but, as in the official code, only where the human answers are not all alike.

    Args:
        prediction: of the model.
        answers: of people, two or more.
    """
    prediction, answers = one_line(prediction), [one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
    matches = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(matches) - left_out) / 3) for left_out in matches) / len(matches)


def exact_accuracy(prediction: str, answer: str) -> float:
    """1 if the two are equal after `normalize_answer`, else 0, as for GQA."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def normalize_answer(answer: str) -> str:
    """The official normalisation: punctuation, then lower case, number words, articles and contractions.

    A punctuation mark becomes a space, unless it stands beside one anywhere in the answer, or the answer has a comma
    between digits: then it vanishes wherever it stands. A full stop vanishes unless a digit follows.
    """
    answer = one_line(answer)
    words = [NUMBERS.get(word, word) for word in strip_punctuation(answer).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def one_line(answer: str) -> str:
    """Without line breaks, tabs, and spaces around."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(answer: str) -> str:
    """The first step of `normalize_answer`."""
    has_thousands = re.search(r"\d,\d", answer) is not None
    stripped = answer
    for mark in PUNCTUATION:
        vanishes = has_thousands or f"{mark} " in answer or f" {mark}" in answer
        stripped = stripped.replace(mark, "" if vanishes else " ")
    return re.sub(r"\.(?!\d)", "", stripped, count=32)  # the official code removes no more than 32


def frequent_answers(answers: Sequence[str | Sequence[str]], count: int = 100) -> list[str]:
    """The most frequent of all human answers, each on one line."""
    every = (one_line(answer) for own in answers for answer in ([own] if isinstance(own, str) else own))
    return [answer for answer, _ in Counter(every).most_common(count)]


def spacy_lemmatizer(name: str = "en_core_web_sm") -> Callable[[str], str]:
    """Nouns and verbs become their lemmas, as the published OK-VQA figures have it.

    Raises:
        ImportError: spaCy is not installed.
        OSError: its pipeline is not.
    """
    try:
        import spacy
    except ImportError as error:
        raise ImportError("lemmatising needs spaCy: pip install spacy, or pass a function of your own.") from error
    try:
        pipeline = spacy.load(name)
    except OSError as error:
        raise OSError(f"spaCy has no pipeline {name}: python -m spacy download {name}.") from error

    def lemmatize(answer: str) -> str:
        return " ".join(token.lemma_ if token.pos_ in ("NOUN", "VERB") else token.text for token in pipeline(answer))

    return lemmatize


def _filled(prompt: str, questions: Sequence[str]) -> list[str]:
    return [prompt.replace("{}", question) for question in questions]
