"""Texts as BLIP-2 was trained on them: captions and questions cleaned, questions in their template, captions split."""

import re

import numpy as np

PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
QUESTION_TEMPLATE = "Question: {} Answer:"
SHORT_ANSWER_TEMPLATE = "Question: {} Short answer:"


def clean_caption(text: str, max_words: int = 50) -> str:
    """Lower-cases a caption, writes spaces for ``. ! " ( ) * # : ; ~`` and keeps its first words.

    As LAVIS's `BlipCaptionProcessor`; BLIP's pre-training kept 30 words.
    """
    text = re.sub(r"\s{2,}", " ", PUNCTUATION.sub(" ", text.lower()))
    return _first_words(text.strip(" \n"), max_words)


def clean_question(text: str, max_words: int = 50) -> str:
    """Lower-cases a question, deletes ``. ! " ( ) * # : ; ~`` and keeps its first words.

    As LAVIS's `BlipQuestionProcessor`.
    """
    return _first_words(PUNCTUATION.sub("", text.lower()).rstrip(" "), max_words)


def split_prefix(text: str, rng: np.random.Generator) -> tuple[str, str]:
    """Splits a caption for prefix language modelling (section 3.2): what the model is given, what it learns to add.

    The prefix has between one word and half of them, each number equally likely. A single word is all suffix.

    Args:
        text: a caption.
        rng: draws one number a caption of four words or more.

    Raises:
        ValueError: the caption has no word.
    """
    words = text.split()
    if not words:
        raise ValueError("an empty caption cannot be split into a prefix and a suffix.")
    half = len(words) // 2
    cut = int(rng.integers(1, half, endpoint=True)) if half else 0
    return " ".join(words[:cut]), " ".join(words[cut:])


def _first_words(text: str, number: int) -> str:
    return " ".join(text.split(" ")[:number])
