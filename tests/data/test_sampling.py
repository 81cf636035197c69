"""The order of training: a function of seed and epoch, and the same for any number of processes."""

from collections import Counter

import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader, Dataset

from hf_mm.data.sampling import POOL, Draw, GroupBatchSampler

GROUPS = [f"group {i % 10}" for i in range(35)] + ["alone", "alone too"]  # 12 groups


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_visits_every_group_once(epoch):
    batches = epoch_of(GroupBatchSampler(GROUPS, batch_size=6, views=2), epoch)
    assert [len(batch) for batch in batches] == [6] * 4
    visits = Counter(GROUPS[draw.index] for batch in batches for draw in batch)
    assert visits == dict.fromkeys(GROUPS, 2)
    assert {draw.epoch for batch in batches for draw in batch} == {epoch}


def test_views_of_a_group_are_different_pictures_side_by_side():
    for batch in epoch_of(GroupBatchSampler(GROUPS, batch_size=6, views=3), 0):
        for start in (0, 3):
            views = batch[start : start + 3]
            assert len({GROUPS[draw.index] for draw in views}) == 1
            assert len({(draw.index, draw.copy) for draw in views}) == 3
            expected = {0} if GROUPS.count(GROUPS[views[0].index]) >= 3 else {0, 1, 2}
            assert {draw.copy for draw in views} == expected


def test_a_group_shows_other_pictures_in_other_epochs():
    sampler = GroupBatchSampler(["a"] * 6 + ["b"] * 6, batch_size=4, views=2)
    seen = Counter(draw.index for epoch in range(300) for batch in epoch_of(sampler, epoch) for draw in batch)
    assert set(seen) == set(range(12))
    assert all(abs(count - 100) < 4.5 * (300 * 2 / 9) ** 0.5 for count in seen.values())


def test_without_views_an_epoch_visits_every_picture_once():
    batches = epoch_of(GroupBatchSampler(["same"] * 20, batch_size=5), 3)
    assert sorted(draw for batch in batches for draw in batch) == [Draw(3, index) for index in range(20)]


def test_the_last_incomplete_batch_is_dropped():
    sampler = GroupBatchSampler(range(23), batch_size=5)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 4
    assert all(len(batch) == 5 for batch in batches)
    left_out = [set(range(23)) - {draw.index for batch in epoch_of(sampler, e) for draw in batch} for e in range(5)]
    assert all(len(left) == 3 for left in left_out)
    assert len(set().union(*left_out)) > 3


def test_the_order_depends_on_seed_and_epoch_alone():
    first, second = GroupBatchSampler(GROUPS, 4, 2, seed=5), GroupBatchSampler(GROUPS, 4, 2, seed=5)
    list(first)
    orders = [[[draw.index for draw in batch] for batch in epoch_of(first, epoch)] for epoch in range(4)]
    for epoch in (3, 0, 2, 1):
        assert [[draw.index for draw in batch] for batch in epoch_of(second, epoch)] == orders[epoch]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    assert epoch_of(GroupBatchSampler(GROUPS, 4, 2, seed=6), 0) != epoch_of(first, 0)


def test_texts_of_a_batch_are_of_similar_length():
    lengths = [(7 * number) % 11 for number in range(192)]
    sampler = GroupBatchSampler(range(192), 4, seed=1, lengths=lengths)
    plain = GroupBatchSampler(range(192), 4, seed=1)
    for epoch in range(2):
        batches = [[draw.index for draw in batch] for batch in epoch_of(sampler, epoch)]
        assert sorted(sum(batches, [])) == list(range(192))
        spreads = [max(own) - min(own) for own in ([lengths[index] for index in batch] for batch in batches)]
        assert max(spreads) <= 4  # 32 pictures of a pool have 11 lengths, 4 neighbours of them at most 4
        assert [min(lengths[index] for index in batch) for batch in batches[:POOL]] != sorted(
            min(lengths[index] for index in batch) for batch in batches[:POOL]
        )
        drawn = [draw.index for batch in epoch_of(plain, epoch) for draw in batch]
        pool = POOL * 4
        for start in range(0, 192, pool):  # a pool holds what it would without lengths
            own = sum(batches[start // 4 : start // 4 + POOL], [])
            assert sorted(own) == sorted(drawn[start : start + pool])
    assert epoch_of(sampler, 0) == epoch_of(GroupBatchSampler(range(192), 4, seed=1, lengths=lengths), 0)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("num_groups", [16, 19, 21, 24])
def test_ranks_share_the_batches_of_one_process(views, num_groups):
    groups = list(range(num_groups)) * views
    whole = list(GroupBatchSampler(groups, 8, views, seed=1))
    ranks = [
        list(BatchSamplerShard(GroupBatchSampler(groups, 4, views, seed=1), num_processes=2, process_index=rank))
        for rank in range(2)
    ]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole


class Counting(Dataset):
    def __init__(self):
        self.read = []

    def __len__(self):
        return len(GROUPS)

    def __getitem__(self, draw):
        self.read.append(draw)
        return draw.index


@pytest.mark.parametrize("skipped", [0, 1, 5, 6])
def test_resuming_reads_no_row_twice(skipped):
    dataset, sampler = Counting(), GroupBatchSampler(GROUPS, batch_size=4, views=2)
    sampler.set_epoch(2)
    whole = list(sampler)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=list)
    batches = list(skip_first_batches(loader, skipped))
    assert batches == [[draw.index for draw in batch] for batch in whole[skipped:]]
    assert dataset.read == [draw for batch in whole[skipped:] for draw in batch]


@pytest.mark.parametrize(
    ("batch_size", "views", "sentence"),
    [
        (5, 2, r"batch_size \(5\) must be a multiple of views_per_group \(2\)"),
        (4, 0, r"batch_size \(4\) must be a multiple of views_per_group \(0\)"),
        (4, 8, r"batch_size \(4\) must be a multiple of views_per_group \(8\)"),
        (26, 2, "needs 13 groups of pictures, but the data has 12: make per_device_train_batch_size smaller"),
        (38, 1, "needs 38 groups of pictures, but the data has 37: make"),
    ],
)
def test_impossible_batches_are_refused(batch_size, views, sentence):
    with pytest.raises(ValueError, match=sentence):
        GroupBatchSampler(GROUPS, batch_size, views)


def test_lengths_that_cannot_be_grouped_are_refused():
    with pytest.raises(ValueError, match="views_per_group of 1, not 2"):
        GroupBatchSampler(GROUPS, 4, 2, lengths=[1] * len(GROUPS))
    with pytest.raises(ValueError, match="a length for each of 37 pictures, not 3"):
        GroupBatchSampler(GROUPS, 4, lengths=[1, 2, 3])
