"""Texts as the published training cleaned them: every case is worked out by hand from the rules."""

import numpy as np
import pytest

from hf_mm.models.blip2.text_blip2 import clean_caption, clean_question, split_prefix

CAPTIONS = {
    "A Dog.": "a dog",
    "a dog, isn't it?": "a dog, isn't it?",
    "a well-known cat; two dogs": "a well-known cat two dogs",
    "Look!Here": "look here",
    '"Hello" (world) *#1:~': "hello world 1",
    "a  b\n\nc \t d": "a b c d",
    "a\tb": "a\tb",
    " cat \n": "cat",
    "...": "",
    "": "",
    "É ½ 日本": "é ½ 日本",
}
QUESTIONS = {
    "What is this?": "what is this?",
    "It's 3:30, isn't it?": "it's 330, isn't it?",
    "what (exactly) is *this*?  ": "what exactly is this?",
    "a.b.c": "abc",
    " two  spaces": " two  spaces",
    "...": "",
}


@pytest.mark.parametrize(("text", "cleaned"), CAPTIONS.items(), ids=map(repr, CAPTIONS))
def test_captions(text, cleaned):
    assert clean_caption(text) == cleaned
    assert clean_caption(cleaned) == cleaned


@pytest.mark.parametrize(("text", "cleaned"), QUESTIONS.items(), ids=map(repr, QUESTIONS))
def test_questions(text, cleaned):
    assert clean_question(text) == cleaned


@pytest.mark.parametrize("clean", [clean_caption, clean_question])
def test_first_words_are_kept(clean):
    words = [f"w{number}" for number in range(60)]
    assert clean(" ".join(words)) == " ".join(words[:50])
    assert clean(" ".join(words[:50])) == " ".join(words[:50])
    assert clean(" ".join(words), max_words=30) == " ".join(words[:30])


@pytest.mark.parametrize(("number", "cuts"), [(2, {1}), (3, {1}), (4, {1, 2}), (5, {1, 2}), (9, {1, 2, 3, 4})])
def test_a_prefix_has_one_word_to_half_of_them(number, cuts):
    words = [f"w{index}" for index in range(number)]
    seen = set()
    for seed in range(60):
        prefix, suffix = split_prefix("  ".join(words), np.random.default_rng(seed))
        assert f"{prefix} {suffix}".split() == words
        seen.add(len(prefix.split()))
    assert seen == cuts


def test_every_place_is_equally_likely():
    """600 draws among 5 places: each within 5 standard deviations (9.8) of 120."""
    rng = np.random.default_rng(0)
    words = " ".join(map(str, range(10)))
    counts = np.bincount([len(split_prefix(words, rng)[0].split()) for _ in range(600)], minlength=6)[1:]
    assert counts.sum() == 600
    assert np.abs(counts - 120).max() < 49


def test_a_split_depends_on_its_seed_alone():
    words = " ".join(map(str, range(40)))
    splits = [split_prefix(words, np.random.default_rng((7, 0, index))) for index in range(8)]
    assert splits == [split_prefix(words, np.random.default_rng((7, 0, index))) for index in range(8)]
    assert len(set(splits)) > 3


def test_one_word_is_all_suffix():
    assert split_prefix("cat", np.random.default_rng(0)) == ("", "cat")
    with pytest.raises(ValueError, match="empty caption"):
        split_prefix("  ", np.random.default_rng(0))
