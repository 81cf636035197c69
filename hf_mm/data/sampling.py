"""Which pictures a step sees: a function of (seed, epoch) alone, so that a killed run goes on with the same batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Draw(NamedTuple):
    """What a batch asks a dataset for. The epoch travels with the index, into any worker process."""

    epoch: int
    index: int
    copy: int = 0  # tells apart two draws of one picture in an epoch


class GroupBatchSampler:
    """Batches of `views` different pictures of each of ``batch_size / views`` groups.

    An epoch visits every group once, in an order of its own, and draws anew which pictures of a group it sees; a group
    with fewer pictures than `views` gives one twice. With ``views=1`` groups do not matter: an epoch visits every
    picture once. The last incomplete batch is dropped.

    Batch k of one process is the batches 2k and 2k+1, of half the size, of two processes.

    Args:
        groups: the group of each picture.
        batch_size: pictures in a batch.
        views: pictures of a group in a batch; must divide `batch_size`.
        seed: of every epoch's order.

    Raises:
        ValueError: `views` does not divide `batch_size`, or there are too few groups for one batch.
    """

    drop_last = True

    def __init__(self, groups: Sequence, batch_size: int, views: int = 1, seed: int = 0):
        if views < 1 or batch_size % views:
            raise ValueError(f"batch_size ({batch_size}) must be a multiple of views_per_group ({views}).")
        if views == 1:
            self.members = np.arange(len(groups))[:, None]
        else:
            of_group: dict = {}
            for index, group in enumerate(groups):
                of_group.setdefault(group, []).append(index)
            self.members = [np.array(indices) for indices in of_group.values()]
        self.batch_size, self.views, self.seed, self.epoch = batch_size, views, seed, 0
        if not len(self):
            raise ValueError(
                f"a batch needs {batch_size // views} groups of pictures, but the data has {len(self.members)}: "
                "make per_device_train_batch_size smaller."
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.members) * self.views // self.batch_size

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self.epoch
        rng = np.random.default_rng((self.seed, epoch))
        groups_per_batch = self.batch_size // self.views
        order = rng.permutation(len(self.members))[: len(self) * groups_per_batch]
        for start in range(0, len(order), groups_per_batch):
            yield [
                draw for group in order[start : start + groups_per_batch] for draw in self._views_of(group, epoch, rng)
            ]

    def _views_of(self, group: int, epoch: int, rng: np.random.Generator) -> list[Draw]:
        chosen = rng.permutation(self.members[group])
        return [Draw(epoch, int(chosen[i % len(chosen)]), i // len(chosen)) for i in range(self.views)]
