"""The gather and the losses on two ranks that are forked here, and on one rank that is alone."""

import math
import multiprocessing
import traceback

import pytest
import torch
import torch.distributed as dist

from hf_mm.losses.contrastive import (
    at_least_float32,
    gather_rows,
    image_text_contrastive_loss,
    is_distributed,
    supervised_contrastive_loss,
)

RANKS = 2


def on_one_rank(function, rank, world_size, folder):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
        torch.save(function(rank), folder / f"{rank}.pt")
        dist.barrier()
    except Exception:
        (folder / f"{rank}.error").write_text(traceback.format_exc())


def on_ranks(function, folder, world_size=RANKS):
    """What `function(rank)` gives on every rank of a gloo group of forked processes."""
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=on_one_rank, args=(function, rank, world_size, folder)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    errors = [path.read_text() for path in folder.glob("*.error")]
    assert not errors, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def rows(number: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and texts of unit length, ``(number, 4)`` each."""
    generator = torch.Generator().manual_seed(11)
    pair = torch.randn(2, number, 4, generator=generator, dtype=torch.float64)
    return tuple(torch.nn.functional.normalize(pair, dim=-1))


IDS = torch.tensor([5, 6, 5, 7, 6, 5])
SCALE = torch.tensor(4.0, dtype=torch.float64)


def own(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor[3 * rank : 3 * rank + 3].clone().requires_grad_(tensor.is_floating_point())


def share_of_right(queries, keys, ids, scale):
    """-log of the right key's share among itself and the keys of other ids, a query at a time."""
    ids = torch.arange(len(keys)) if ids is None else ids
    terms = []
    for i, query in enumerate(queries):
        weights = (scale * keys @ query).exp()
        terms.append(-(weights[i] / (weights[i] + weights[ids != ids[i]].sum())).log())
    return torch.stack(terms)


def test_rows_come_in_rank_order_and_gradients_from_every_rank(tmp_path):
    values = torch.arange(24.0).reshape(2, 2, 3, 2)

    def gather(rank):
        mine = values[rank].transpose(0, 1).requires_grad_()  # (3, 2, 2), not contiguous
        gathered = gather_rows(mine)
        weights = torch.arange(float(gathered.numel())).reshape(gathered.shape) ** 2 * (rank + 1)
        return gathered.detach(), torch.autograd.grad((gathered * weights).sum(), mine)[0]

    expected = torch.cat([values[0].transpose(0, 1), values[1].transpose(0, 1)])
    weights = torch.arange(24.0).reshape(6, 2, 2) ** 2 * 3  # of both ranks
    for rank, (gathered, gradient) in enumerate(on_ranks(gather, tmp_path)):
        assert torch.equal(gathered, expected)
        assert torch.equal(gradient, weights[3 * rank : 3 * rank + 3])


@pytest.mark.parametrize("world_size", [2, 3])
def test_unequal_rows_are_refused_on_every_rank(tmp_path, world_size):
    def gather(rank):
        try:
            gather_rows(torch.zeros(3 if rank else 1, 2))
        except ValueError as error:
            return str(error)

    sizes = [1, 3, 3][:world_size]
    for sentence in on_ranks(gather, tmp_path, world_size):
        assert str(sizes) in sentence
        assert "dataloader_drop_last=True" in sentence


@pytest.mark.parametrize("ids", [None, IDS], ids=["no ids", "ids"])
def test_two_ranks_take_part_in_one_batch_unless_told_not_to(tmp_path, ids):
    images, texts = rows()

    def losses(rank):
        arguments = own(images, rank), own(texts, rank), SCALE
        own_ids = None if ids is None else own(ids, rank)
        together = image_text_contrastive_loss(*arguments, image_ids=own_ids)
        return together.detach(), *(
            image_text_contrastive_loss(*arguments, **{name: own_ids}, gather=False).detach()
            for name in ("image_ids", "text_ids")
        )

    both = (share_of_right(images, texts, ids, SCALE) + share_of_right(texts, images, ids, SCALE)) / 2
    for rank, (together, alone, alone_by_texts) in enumerate(on_ranks(losses, tmp_path)):
        torch.testing.assert_close(together, both[3 * rank : 3 * rank + 3].mean(), rtol=1e-12, atol=0)
        i, t = own(images, rank).detach(), own(texts, rank).detach()
        some_ids = None if ids is None else own(ids, rank)
        expected = (share_of_right(i, t, some_ids, SCALE) + share_of_right(t, i, some_ids, SCALE)).mean() / 2
        torch.testing.assert_close(alone, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(alone_by_texts, expected, rtol=1e-12, atol=0)


def supervised_rows(embeds, ids, temperature):
    """Khosla et al. 2020, equation 2, a row at a time."""
    terms = []
    for i in range(len(embeds)):
        weights = {a: (embeds[i] @ embeds[a] / temperature).exp() for a in range(len(embeds)) if a != i}
        positives = [weights[a] for a in weights if ids[a] == ids[i]]
        terms.append(sum((p / sum(weights.values())).log() for p in positives) / max(len(positives), 1))
    return -torch.stack([torch.as_tensor(term, dtype=embeds.dtype) for term in terms])


def test_views_of_two_ranks_find_each_other_unless_told_not_to(tmp_path):
    embeds = rows()[0]

    def losses(rank):
        return [
            supervised_contrastive_loss(own(embeds, rank), own(IDS, rank), 0.5, gather=gather).detach()
            for gather in (True, False)
        ]

    expected = supervised_rows(embeds, IDS, 0.5)
    for rank, (together, alone) in enumerate(on_ranks(losses, tmp_path)):
        torch.testing.assert_close(together, expected[3 * rank : 3 * rank + 3].mean(), rtol=1e-12, atol=0)
        part = supervised_rows(own(embeds, rank).detach(), own(IDS, rank), 0.5)
        torch.testing.assert_close(alone, part.mean(), rtol=1e-12, atol=0)


def test_both_losses_gather_by_default(tmp_path):
    images, texts = rows()

    def losses(rank):
        pair = own(images, rank), own(texts, rank)
        return (
            *(image_text_contrastive_loss(*pair, SCALE, **kind).item() for kind in ({}, {"gather": True})),
            *(
                supervised_contrastive_loss(pair[0], own(IDS, rank), 0.5, **kind).item()
                for kind in ({}, {"gather": True})
            ),
        )

    for default, gathered, default_of_views, gathered_of_views in on_ranks(losses, tmp_path):
        assert (default, default_of_views) == (gathered, gathered_of_views)


def test_only_several_processes_are_distributed(tmp_path):
    assert not is_distributed()
    assert on_ranks(lambda rank: is_distributed(), tmp_path, world_size=1) == [False]
    (tmp_path / "two").mkdir()
    assert on_ranks(lambda rank: is_distributed(), tmp_path / "two") == [True, True]


def test_a_batch_of_hundreds_is_a_batch():
    rows_of_300 = torch.ones(300, 2, dtype=torch.float64)
    loss = image_text_contrastive_loss(rows_of_300, rows_of_300.clone(), torch.tensor(1.0), torch.arange(300))
    assert loss.item() == pytest.approx(math.log(300), rel=1e-12)


@pytest.mark.parametrize("inside", [False, True], ids=["plain", "autocast"])
def test_logits_are_in_float32_also_under_autocast(inside):
    images, texts = rows()
    exact = (
        image_text_contrastive_loss(images, texts, torch.tensor(100.0)),
        supervised_contrastive_loss(images, IDS, 0.01),
    )
    images, texts = images.float(), texts.float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
        single = (
            image_text_contrastive_loss(images, texts, torch.tensor(100.0)),
            supervised_contrastive_loss(images, IDS, 0.01),
        )
    for ours, reference in zip(single, exact, strict=True):
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(reference.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_precision_is_raised_and_never_lowered(dtype, expected):
    assert at_least_float32(torch.ones(1, dtype=dtype)).dtype == expected


def test_refused_inputs_are_told_their_own_numbers():
    """More texts than pictures, and rows whose second side is not their number."""
    with pytest.raises(ValueError, match="3 pictures and 5 texts"):
        image_text_contrastive_loss(torch.zeros(3, 2), torch.zeros(5, 2), torch.ones(1))
    with pytest.raises(ValueError, match=r"ids must have shape \(3,\), one id per row, not \(1, 3\)"):
        supervised_contrastive_loss(torch.zeros(3, 2), torch.zeros(1, 3), 0.1)
