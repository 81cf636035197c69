"""The contenders of the index benchmark find the same pictures, and both ways of the index do."""

from argparse import Namespace

import pytest

pytest.importorskip("faiss", reason="faiss is in the environment of the peers alone")
pytest.importorskip("open_clip", reason="open_clip is in the environment of the peers alone")

import datasets
import numpy as np
import torch

from benchmarks import image_index
from benchmarks.image_index import check_agreement, directions, index_of, open_ours, searches, write_faiss, write_ours

datasets.disable_progress_bars()


@pytest.fixture
def files(tmp_path):
    embeddings = directions(3000, 64, seed=0)
    write_ours(embeddings, tmp_path / "hf_mm")
    write_faiss(embeddings, tmp_path / "faiss")
    return tmp_path


@pytest.mark.parametrize("num_queries", [1, 32, 200])
def test_contenders_agree(files, num_queries):
    check_agreement(searches(files, directions(num_queries, 64, seed=1)))


def test_a_contender_with_other_embeddings_is_noticed(files):
    (files / "faiss").unlink()
    write_faiss(directions(3000, 64, seed=2), files / "faiss")
    with pytest.raises(AssertionError, match="differ"):
        check_agreement(searches(files, directions(8, 64, seed=1)))


def test_memory_is_measured(files):
    assert image_index.peak("hf_mm", files, 64, 8, Namespace(threads=1)) > 3000 * 64 * 4


def test_with_and_without_faiss_rows_and_scores_are_equal():
    """Bit for bit, ties and excluded pictures too."""
    distinct = directions(150, 48, seed=0)
    index = index_of(distinct.repeat(8, 1))
    queries = torch.cat([directions(20, 48, seed=1), distinct[:5]])
    exclude = [[str(row), str(row + 150)] for row in range(25)]
    for k in (1, 13, 1200):
        found = {}
        for index.uses_faiss in (True, False):
            found[index.uses_faiss] = index.search(queries, k, exclude)
        assert torch.equal(found[True][1], found[False][1])
        assert torch.equal(found[True][0], found[False][0])
    best = index.search(distinct[:1], 6)[1]
    assert best.tolist() == [[0, 150, 300, 450, 600, 750]]


def test_an_index_uses_faiss_where_it_is_installed(files):
    index = image_index.ImageIndex.open(files / "hf_mm")
    assert index.uses_faiss and not open_ours(files / "hf_mm").uses_faiss
    scores, rows = index.search(directions(4, 64, seed=1), 10)
    whole = directions(4, 64, seed=1).double() @ directions(3000, 64, seed=0).double().T
    assert np.array_equal(rows, whole.topk(10).indices)
    torch.testing.assert_close(scores.double(), whole.topk(10).values, atol=1e-6, rtol=0)
