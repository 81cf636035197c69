"""The figures of `training/demo_blip2.py`: what pictures choose from, and what counts as reached."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

from hf_mm.data.emoji import load_emoji

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

from demo_blip2 import BLIND, CANDIDATES, GROUP, Candidates, cells_of, markdown, missed
from train_blip2 import emoji_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["cell", "concept"])
def drawn(request):
    emoji = load_emoji(request.param)
    own = [emoji["caption"][row] for row in emoji_rows(len(emoji), 40)]
    everywhere = load_emoji("all")
    subgroups = dict(zip(everywhere["caption"], everywhere["subgroup"], strict=True))
    return own, Candidates.draw(request.param, own), subgroups


def test_pictures_choose_among_different_captions_with_their_own(drawn):
    own, candidates, _ = drawn
    assert len(set(candidates.captions)) == len(candidates.captions) == candidates.shared.shape[1]
    assert [candidates.captions[column] for column in candidates.right.tolist()] == own
    for asked in (candidates.shared, candidates.kind):
        assert asked.gather(1, candidates.right[:, None]).all()
    assert candidates.shared.sum(dim=1).tolist() == [CANDIDATES] * len(own)
    assert (candidates.shared | candidates.kind).any(dim=0).all()  # nothing is scored for nobody


def test_captions_of_the_same_kind_are_of_the_same_subgroup(drawn):
    own, candidates, subgroups = drawn
    for name, row in zip(own, candidates.kind, strict=True):
        near = [candidates.captions[column] for column in row.nonzero().flatten().tolist()]
        assert {subgroups[one] for one in near} == {subgroups[name]}
        assert len(near) <= GROUP
    assert candidates.kind.sum() > 2 * len(own)


def test_ranks_and_chance(drawn):
    own, candidates, _ = drawn
    right = torch.nn.functional.one_hot(candidates.right, len(candidates.captions)).double()
    assert candidates.ranks(right) == {"top1": 100.0, "top5": 100.0, "group_top1": 100.0}
    assert candidates.ranks(-right, "plain_") == {
        "plain_top1": 0.0,
        "plain_top5": 0.0,
        "plain_group_top1": 100 * float((candidates.kind.sum(dim=1) == 1).double().mean()),
    }
    sizes = candidates.kind.sum(dim=1).double()
    expected = {"top1": 100 / CANDIDATES, "top5": 500 / CANDIDATES, "group_top1": 100 * float((1 / sizes).mean())}
    assert candidates.chance() == pytest.approx(expected)
    scores = torch.rand(right.shape, generator=torch.Generator().manual_seed(0))
    outside = scores + 2 * (~candidates.shared & ~candidates.kind)
    assert candidates.ranks(outside) == candidates.ranks(scores)  # captions of others do not compete


FIGURES = {
    "splits": {
        "cell": {
            "model": {
                "gap": 1.0,
                "nll": 3.0,
                "nll_other": 4.0,
                "win_rate": 85.0,
                "word_f1": 20.0,
                "other_word_f1": 5.0,
            },
            "blind": {"gap": 0.0, "nll": 3.5, "win_rate": 0.0, "word_f1": 4.0, "plain_top1": 1.0},
            "nearest": {"word_f1": 33.0},
            "chance": {"gap": 0.0, "win_rate": 50.0},
        }
    },
    "accept": {"cell": {"gap": 0.9, "nll": BLIND, "win_rate": 80.0, "word_f1_gain": 6.0}},
}


def test_what_is_reached():
    assert missed(FIGURES) == []
    worse = copy.deepcopy(FIGURES)
    worse["splits"]["cell"]["model"] |= {"gap": 0.8, "nll": 3.6, "word_f1": 10.0}
    assert missed(worse) == [
        "cell: gap is 0.80, less than 0.9",
        "cell: nll is 3.60, without sight 3.50",
        "cell: word_f1_gain is 5.00, less than 6",
    ]


@pytest.mark.parametrize(
    ("measure", "cells"),
    [
        ("gap", ["1.00", "–", "0.00", "–", "0.00", "0.90"]),
        ("nll", ["3.00", "4.00", "3.50", "–", "–", "≤ blind"]),
        ("word_f1", ["20.0", "5.0", "4.0", "33.0", "–", "+6.0"]),
        ("top1", ["–", "–", "1.0", "–", "–", "–"]),
    ],
)
def test_cells_of_the_table(measure, cells):
    assert cells_of(measure, FIGURES["splits"]["cell"], FIGURES["accept"]["cell"]) == cells


def test_the_table_in_markdown():
    cell = FIGURES["splits"]["cell"]
    lines = markdown({"splits": {"cell": cell, "concept": cell}}).splitlines()
    assert {line.count("|") for line in lines} == {10}
    assert "| nats per token | **3.00** (4.00) | 3.50 | – | – | **3.00** (4.00) | 3.50 | – | – |" in lines


def test_the_readme_shows_what_was_measured():
    figures = json.loads((ROOT / "training/results/blip2_emoji.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert markdown(figures) in readme
    assert f"{figures['minutes']} minutes" in readme
    assert all(row["pictures"] >= 100 for row in figures["splits"].values())
    assert not missed(figures)
