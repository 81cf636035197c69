"""The contrastive loss over two processes against open_clip's, rank by rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("open_clip")

import torch

TESTS = Path(__file__).parents[1]
NAMES = ("loss", "images", "texts", "scale")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "peers.ranks", str(folder)],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("rank", range(2))
def test_loss_and_gradients_equal_the_local_loss_with_gathered_gradients(two_ranks, rank):
    ours, theirs = (dict(zip(NAMES, two_ranks[rank][name], strict=True)) for name in ("ours", "theirs"))
    for name in NAMES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-14, msg=name)


def test_their_default_gives_the_embeddings_half_the_gradient(two_ranks):
    """Without gradient through the gather, W ranks give 1 / W of it, which is why ours has no such option."""
    for answers in two_ranks:
        for full, part in zip(answers["ours"][1:3], answers["without gradient"][1:3], strict=True):
            torch.testing.assert_close(part / full.norm(), full / full.norm() / 2)
