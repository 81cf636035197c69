import sys
from itertools import combinations

import pytest
import torch
from toy_speaker import ToySpeaker, ToySpeakerProcessor

from hf_mm.evaluation.vqa import (
    CONTRACTIONS,
    evaluate_vqa,
    exact_accuracy,
    mean_accuracy,
    normalize_answer,
    spacy_lemmatizer,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("answer", "normal"),  # what the official code makes of them
    [
        ("Yes.", "yes"),
        ("The  two DOGS", "2 dogs"),
        ("none", "0"),
        ("A an the", ""),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("lets", "lets"),
        ("shes", "shes"),
        ("t-shirt", "t shirt"),
        ("blue/green", "blue green"),
        ("what ?", "what"),
        ("x,y", "x y"),
        ("x, y-z", "x y z"),
        ("1,000 (one-way)", "1000 oneway"),
        ("5.5", "5.5"),
        ("5.", "5"),
        (".5", ".5"),
        ("U.S.", "us"),
        ("a.m", "am"),
        ("$5 10%", "$5 10%"),
        ("\tred\nhat ", "red hat"),
        ("." * 40, "." * 8),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_by_the_official_code(answer, normal):
    assert normalize_answer(answer) == normal


def test_a_contraction_gets_back_the_one_apostrophe_that_it_lacks():
    assert len(CONTRACTIONS) == 114
    for lacking, whole in CONTRACTIONS.items():
        if lacking != "somebody'd":
            assert len(whole) == len(lacking) + 1
            assert lacking.replace("'", "") == whole.replace("'", "")


@pytest.mark.parametrize(("matches", "accuracy"), enumerate([0, 0.3, 0.6, 0.9, *[1] * 7]))
def test_accuracy_of_ten_answers(matches, accuracy):
    answers = ["cat"] * matches + ["dog", "cow"] * 5
    answers = answers[:10]
    assert vqa_accuracy("Cat" if matches < 10 else "cat", answers) == pytest.approx(accuracy)


def test_accuracy_is_the_mean_over_all_sets_of_one_answer_less():
    generator = torch.Generator().manual_seed(0)
    for count in (2, 3, 5, 10):
        for _ in range(20):
            answers = [str(number) for number in torch.randint(3, (count,), generator=generator).tolist()]
            sets = list(combinations(answers, count - 1))
            expected = sum(min(1, own.count("1") / 3) for own in sets) / len(sets)
            assert vqa_accuracy("1", answers) == pytest.approx(expected)


def test_answers_that_are_all_alike_are_not_normalised():
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1
    assert vqa_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1


def test_exact_accuracy():
    assert exact_accuracy("The T-shirt.", "t-shirt") == 1
    assert exact_accuracy("shirt", "t-shirt") == 0
    assert mean_accuracy(["a cat", "dog", "2"], ["cat", "cat", ["two", "2", "2", "2"]]) == pytest.approx(200 / 3)


QUESTIONS = ["what is it?", "how many are there?", "is it red?"]
ANSWERS = [["cat"] * 6 + ["kitten"] * 4, ["two"] * 10, ["yes"] * 8 + ["no"] * 2]


def test_a_model_is_asked_in_the_processors_own_way():
    table = {(0, QUESTIONS[0]): "A Cat", (1, QUESTIONS[1]): "three", (2, QUESTIONS[2]): "no"}
    model, processor = ToySpeaker(table), ToySpeakerProcessor()
    metrics = evaluate_vqa(model, processor, range(3), QUESTIONS, ANSWERS, progress=False, length_penalty=-1)
    assert metrics["predictions"] == ["A Cat", "three", "no"]
    assert metrics["accuracy"] == pytest.approx(100 * (1 + 0 + 0.6) / 3)
    assert metrics["majority"] == pytest.approx(100 / 3)
    assert metrics["questions"] == 3
    assert processor.calls[0]["mode"] == "vqa"
    assert model.calls[0]["length_penalty"] == -1


def test_a_model_is_asked_by_a_prompt_about_features_and_its_answers_are_lemmatised():
    model = ToySpeaker({(5, "Q: how many? A:"): "cats", (6, "Q: what is this, then? A:"): "dogs"})
    processor = ToySpeakerProcessor()
    metrics = evaluate_vqa(
        model,
        processor,
        None,
        ["what is this, then?", "how many?"],
        ["dog", "cat"],
        "Q: {} A:",
        lambda answer: answer.removesuffix("s"),
        vision_features=torch.tensor([6.0, 5.0]),
        progress=False,
    )
    assert metrics["predictions"] == ["dog", "cat"]
    assert metrics["accuracy"] == 100
    assert metrics["majority"] == 50
    assert "mode" not in processor.calls[0]


def test_lemmatising_needs_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match="pip install spacy"):
        spacy_lemmatizer()


def test_the_lemmatiser_changes_nouns_and_verbs_alone(monkeypatch):
    class Spacy:
        @staticmethod
        def load(name):
            if name != "small":
                raise OSError(name)
            return lambda text: [Token(*word.split("/")) for word in text.split()]

    class Token:
        def __init__(self, text, lemma_, pos_):
            self.text, self.lemma_, self.pos_ = text, lemma_, pos_

    monkeypatch.setitem(sys.modules, "spacy", Spacy)
    assert spacy_lemmatizer("small")("better/good/ADJ dogs/dog/NOUN ran/run/VERB") == "better dog run"
    with pytest.raises(OSError, match="python -m spacy download large"):
        spacy_lemmatizer("large")


@pytest.mark.parametrize(
    ("answers", "options", "message"),
    [
        (ANSWERS[:2], {}, "3 questions and 2 answers"),
        ([*ANSWERS[:2], ["yes"]], {}, "question 2 has 1 answers"),
        (["", "a", "b"], {}, "question 0 has 0 answers"),
        (ANSWERS, {"prompt": "Question?"}, "has no {}"),
    ],
)
def test_bad_input_is_refused(answers, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_vqa(ToySpeaker({}), ToySpeakerProcessor(), range(3), QUESTIONS, answers, progress=False, **options)
