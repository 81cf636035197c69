"""Which pictures a step sees: a function of (seed, epoch) alone, so that a killed run goes on with the same batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

POOL = 8  # batches whose pictures are dealt out by length


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
        lengths: of each picture's text. Pictures that are drawn for the same `POOL` batches are dealt out by length, so
            that texts of a batch need little padding, and these batches come in an order of their own; what half a batch
            holds then depends on the number of processes.

    Raises:
        ValueError: `views` does not divide `batch_size`, there are too few groups for one batch, or lengths are given
            where a group has several pictures in a batch or another number of pictures.
    """

    drop_last = True

    def __init__(
        self,
        groups: Sequence,
        batch_size: int,
        views: int = 1,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
    ):
        if lengths is not None and (views > 1 or len(lengths) != len(groups)):
            raise ValueError(
                f"batches by length need views_per_group of 1, not {views}, and a length for each of {len(groups)} "
                f"pictures, not {len(lengths)}."
            )
        self.lengths = None if lengths is None else np.asarray(lengths)
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
        if self.lengths is not None:
            order = self._by_length(order, rng)
        for start in range(0, len(order), groups_per_batch):
            yield [
                draw for group in order[start : start + groups_per_batch] for draw in self._views_of(group, epoch, rng)
            ]

    def _by_length(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        pools = np.split(order, range(POOL * self.batch_size, len(order), POOL * self.batch_size))
        batches = [
            rng.permutation(pool[np.argsort(self.lengths[pool], kind="stable")].reshape(-1, self.batch_size))
            for pool in pools
        ]
        return np.concatenate(batches).flatten()

    def _views_of(self, group: int, epoch: int, rng: np.random.Generator) -> list[Draw]:
        chosen = rng.permutation(self.members[group])
        return [Draw(epoch, int(chosen[i % len(chosen)]), i // len(chosen)) for i in range(self.views)]
