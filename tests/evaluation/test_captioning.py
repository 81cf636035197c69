import math
import shutil
import sys
from collections import Counter

import pytest
import torch
from toy_speaker import ToySpeaker, ToySpeakerProcessor

from hf_mm.data.emoji import load_emoji
from hf_mm.evaluation.captioning import (
    METRICS,
    best_constant,
    caption_metrics,
    evaluate_captioning,
    generate_texts,
    shuffled_metrics,
    tokenize_caption,
    word_f1,
)

REFERENCES = [
    ["a red cat sits on a mat", "the cat sits"],
    ["two dogs run on the grass", "dogs run fast on grass today"],
    ["a red bus", "the big red bus drives on the road", "bus"],
]


def test_perfect_captions_have_the_highest_scores():
    own = [[f"caption {word} of picture {word}"] for word in ("one", "two", "six")]
    metrics = caption_metrics([captions[0] for captions in own], own)
    assert metrics == pytest.approx(dict.fromkeys(METRICS, 100) | {"cider": 1000}, rel=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_perfect_captions_have_a_quarter_of_cider_for_each_length_of_ngram_that_they_have(length):
    own = [[" ".join(f"{letter}{word}" for word in range(length))] for letter in "abc"]
    metrics = caption_metrics([captions[0] for captions in own], own)
    assert metrics["cider"] == pytest.approx(250 * min(length, 4))
    assert (metrics["word_f1"], metrics["exact"]) == (100, 100)


def test_cider_of_one_picture_is_zero():
    assert caption_metrics(["a red cat"], [["a red cat"]])["cider"] == 0


def test_bleu_clips_as_in_its_paper():
    # Papineni et al. 2002, section 2.1: two of seven words count
    metrics = caption_metrics(
        ["the the the the the the the"], [["The cat is on the mat.", "There is a cat on the mat."]]
    )
    assert metrics["bleu1"] == pytest.approx(100 * 2 / 7)
    assert metrics["bleu2"] == pytest.approx(0, abs=1e-4)


def test_bleu_is_of_the_whole_corpus_and_punishes_brevity():
    metrics = caption_metrics(["a cat", "a blue dog"], [["a cat on mats"], ["a red dog barks"]])
    brevity = math.exp(1 - 8 / 5)
    assert metrics["bleu1"] == pytest.approx(100 * brevity * 4 / 5)
    assert metrics["bleu2"] == pytest.approx(100 * brevity * math.sqrt(4 / 5 * 1 / 3))


def test_cider_is_that_of_its_paper():
    captions = ["a red cat on the mat", "dogs run on the grass on grass", "the big bus"]
    expected = sum(map(cider_d, captions, REFERENCES)) / 3
    assert caption_metrics(captions, REFERENCES)["cider"] == pytest.approx(100 * expected)
    assert expected > 0.5


def cider_d(caption: str, references: list[str]) -> float:
    """Equations of Vedantam et al. 2015, sections 3 and 6, with clipping and the length penalty of CIDEr-D, sigma 6."""

    def ngrams(text, n):
        words = text.split()
        return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))

    def weights(text, n):
        return {
            gram: count
            * math.log(len(REFERENCES) / max(1, sum(any(gram in ngrams(one, n) for one in own) for own in REFERENCES)))
            for gram, count in ngrams(text, n).items()
        }

    total = 0.0
    for n in (1, 2, 3, 4):
        for reference in references:
            own, other = weights(caption, n), weights(reference, n)
            dot = sum(min(own[gram], other.get(gram, 0)) * other.get(gram, 0) for gram in own)
            norms = math.hypot(*own.values()) * math.hypot(*other.values())
            # the published code measures lengths in pairs of words
            lengths = sum(ngrams(caption, 2).values()) - sum(ngrams(reference, 2).values())
            total += (dot / norms if norms else 0) * math.exp(-(lengths**2) / 72) / len(references)
    return 10 * total / 4


def test_word_f1_counts_words_with_repetition():
    assert word_f1(["a", "a", "b"], ["a", "c"]) == pytest.approx(2 * 1 / 5)
    assert word_f1(["a", "a"], ["a", "a", "a"]) == pytest.approx(2 * 2 / 5)
    assert word_f1([], ["a"]) == word_f1([], []) == 0
    metrics = caption_metrics(["A cat!", "dog"], [["a dog", "the cat"], ["Dog.", "a"]])
    assert metrics["word_f1"] == pytest.approx(75)
    assert metrics["exact"] == 50


@pytest.mark.parametrize(
    ("text", "words"),  # what the Java program makes of them
    [
        ("A man's dog doesn't run.", "a man 's dog does n't run"),
        (
            'A T-shirt, black-and-white; (really) "nice"!',
            "a t-shirt black-and-white -lrb- really -rrb- nice",
        ),
        ("It costs $5.50 or 50% off & more", "it costs $ 5.50 or 50 % off & more"),
        ("and/or 100,000 people 1/2 at 3:45", "and/or 100,000 people 1/2 at 3:45"),
        ("Mr. Smith waves the U.S. flag", "mr. smith waves the u.s. flag"),
        ("I'm you've we'd they'll she's", "i 'm you 've we 'd they 'll she 's"),
        ("the dogs' bowls, he said 'hello'", "the dogs bowls he said hello"),
        ("shan't won't can't cannot", "sha n't wo n't ca n't can not"),
        ("ten o'clock at O'Brien", "ten o'clock at o'brien"),
        ("a - b -- c — d…", "a b c d"),
        ("“café”  naïve\n", "café naïve"),
        ("men’s room", "men 's room"),
        ("", ""),
    ],
)
def test_words_are_those_of_the_penn_treebank(text, words):
    assert tokenize_caption(text) == words.split()


def test_a_curly_apostrophe_is_a_straight_one():
    assert tokenize_caption("three o’clock, don’t") == tokenize_caption("three o'clock, don't")


@pytest.mark.skipif(shutil.which("java") is None, reason="the program that makes the published words needs Java")
def test_words_are_those_of_the_program_of_published_scores():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = sorted(set(load_emoji("all", skin_tones=True)["caption"]))
    published = PTBTokenizer().tokenize({row: [{"caption": text}] for row, text in enumerate(captions)})
    other = [text for row, text in enumerate(captions) if " ".join(tokenize_caption(text)) != published[row][0]]
    assert len(captions) > 2000
    assert all(text.endswith("o’clock") for text in other)


def test_generation_takes_only_what_is_new_and_ends_where_the_processor_says():
    table = {row: f"thing {row}" + "!" * row for row in range(7)}
    texts = ["ask " * (3 - row % 3) for row in range(7)]
    model, processor = ToySpeaker(table).train(), ToySpeakerProcessor()
    written = generate_texts(model, processor, range(7), texts, batch_size=3, progress=False, num_beams=2)
    assert written == list(table.values())
    assert model.training
    assert [call["rows"] for call in model.calls] == [3, 3, 1]
    assert all(call["num_beams"] == 2 and call["eos_token_id"] == 10 for call in model.calls)
    assert all(call["padding_side"] == "left" for call in processor.calls)


def test_generation_from_features_without_text_and_by_an_encoder_decoder():
    table, features = {row: f"thing {row}" for row in range(5)}, torch.arange(5, dtype=torch.float16)
    for encoder_decoder in (False, True):
        for texts in (None, [f"say {row}" for row in range(5)]):
            model, processor = ToySpeaker(table, encoder_decoder), ToySpeakerProcessor()
            options = {"vision_features": features, "progress": False, "processor_kwargs": {"mode": "vqa"}}
            assert generate_texts(model, processor, None, texts, **options) == list(table.values())
            assert processor.calls[0]["num_images"] == [1] * 5
            assert processor.calls[0]["mode"] == "vqa"
            assert processor.calls[0]["padding_side"] == ("right" if encoder_decoder else "left")


def test_a_qformer_alone_is_given_features_and_no_slots():
    processor = ToySpeakerProcessor()
    processor.num_query_tokens = None
    features = torch.tensor([1.0, 0.0])
    for texts in (None, ["say", "what"]):
        model = ToySpeaker({0: "cat", 1: "dog"})
        options = {"vision_features": features, "progress": False}
        assert generate_texts(model, processor, None, texts, **options) == ["dog", "cat"]
    assert [call["num_images"] for call in processor.calls] == [None]


def test_an_own_end_is_kept():
    written = generate_texts(
        ToySpeaker({0: "ab|cd"}), ToySpeakerProcessor(), [0], progress=False, eos_token_id=[ord("|"), 10]
    )
    assert written == ["ab"]


def test_a_seeing_model_beats_the_blind_baselines_and_a_blind_one_does_not():
    references = [[f"a {word} thing", f"one {word} on grass"] for word in ("red", "blue", "green", "pink")]
    seeing = ToySpeaker({row: own[0] for row, own in enumerate(references)})
    metrics = evaluate_captioning(seeing, ToySpeakerProcessor(), range(4), references, "a photo of", progress=False)
    assert metrics["captions"] == [own[0] for own in references]
    assert metrics["pictures"] == 4
    assert (metrics["word_f1"], metrics["exact"]) == (100, 100)
    assert metrics["shuffled_word_f1"] == pytest.approx(100 * 2 / 3)  # "a" and "thing" are said of everything
    assert metrics["shuffled_exact"] == 0
    assert metrics["constant"] == "one red on grass"  # three of four words are said of everything
    assert metrics["constant_word_f1"] == pytest.approx(100 * (1 + 3 * 3 / 4) / 4)
    assert metrics["cider"] > metrics["constant_cider"] > 0
    blind = ToySpeaker(dict.fromkeys(range(4), "a green thing"))
    metrics = evaluate_captioning(blind, ToySpeakerProcessor(), range(4), references, progress=False)
    for name in METRICS:
        assert metrics[name] == pytest.approx(metrics[f"shuffled_{name}"])


def test_pictures_of_the_same_are_not_other_pictures():
    captions, references = list("aabb"), [["a"], ["a"], ["b"], ["b"]]
    for seed in range(10):
        assert shuffled_metrics(captions, references, "aabb", seed)["exact"] == 0
    assert max(shuffled_metrics(captions, references, None, seed)["exact"] for seed in range(10)) > 0
    assert shuffled_metrics(captions, references, "aaab") == dict.fromkeys(METRICS)


def test_metrics_of_a_single_picture():
    metrics = evaluate_captioning(ToySpeaker({0: "cat"}), ToySpeakerProcessor(), [0], [["cat"]], progress=False)
    assert metrics["exact"] == 100
    assert metrics["shuffled_exact"] is None


def test_the_constant_caption_is_the_frequent_one_that_fits_best():
    assert best_constant([["a dog", "x"], ["a dog"], ["a cat"], ["the cat"]]) == "a dog"
    assert best_constant([["b c"], ["b d"], ["q"], ["q"], ["b"]], candidates=1) == "q"


def test_scores_need_their_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    model = ToySpeaker({0: "cat"})
    with pytest.raises(ImportError, match="pip install pycocoevalcap"):
        evaluate_captioning(model, ToySpeakerProcessor(), [0], [["cat"]], progress=False)
    assert model.calls == []


@pytest.mark.parametrize(
    ("captions", "references", "error", "message"),
    [
        ("cat", [["cat"]], TypeError, "captions is one string"),
        (["cat"], ["cat"], TypeError, "picture 0 are one string"),
        (["cat"], [["cat"], ["dog"]], ValueError, "1 captions and 2 lists"),
        (["cat"], [[]], ValueError, "picture 0 has no reference"),
        ([], [], ValueError, "no references"),
    ],
)
def test_bad_captions_are_refused(captions, references, error, message):
    with pytest.raises(error, match=message):
        caption_metrics(captions, references)


@pytest.mark.parametrize(
    ("pictures", "options", "message"),
    [
        ([0], {"texts": ["a", "b"]}, "2 texts and 1 pictures"),
        (None, {"texts": ["a", "b"], "vision_features": torch.zeros(1)}, "2 texts and 1 rows of vision_features"),
        (None, {}, "either pictures or vision_features"),
        ([0], {"vision_features": torch.zeros(1)}, "either pictures or vision_features"),
        ([], {}, "no pictures"),
        ([0], {"batch_size": 0}, "batch_size is 0"),
        ([0], {"texts": ["a"], "num_return_sequences": 3}, "3 texts for 1 rows"),
    ],
)
def test_bad_calls_are_refused(pictures, options, message):
    with pytest.raises(ValueError, match=message):
        generate_texts(ToySpeaker({0: "cat"}), ToySpeakerProcessor(), pictures, progress=False, **options)
