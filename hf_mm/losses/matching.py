"""Image-text matching with hard negatives (Li et al. 2021, ALBEF, section 3.2; Li et al. 2023, BLIP-2, section 3.2)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from .contrastive import is_distributed

IGNORED = -100


def draw_hard_negatives(
    logits: torch.Tensor, same: torch.Tensor, generator: torch.Generator | None = None, gather: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws for each row a wrong column, the more likely the more alike the two are.

    Args:
        logits: ``(b, G)`` of this rank's rows against the columns of all ranks.
        same: ``(b, G)`` bool, which columns are right and never drawn.
        generator: of the noise. With equal generators, W ranks of b rows draw what one rank of W * b rows draws.
        gather: whether the columns are of all ranks.

    Returns:
        ``(b,)`` columns, drawn from the softmax over the wrong ones, and ``(b,)`` bool, false where there is no wrong one.
    """
    rows, columns = logits.shape
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if gather and is_distributed() else (0, 1)
    device = torch.device("cpu") if logits.device.type == "mps" else logits.device  # which has no float64
    if generator is None:
        uniform = torch.rand(rows, columns, device=device, dtype=torch.float64)
    else:
        uniform = torch.rand(ranks * rows, columns, generator=generator, device=generator.device, dtype=torch.float64)
        uniform = uniform[rank * rows :][:rows]
    gumbel = -(-uniform.to(device).clamp(min=1e-300).log()).log()
    drawn = (logits.detach().to(device).double() + gumbel).masked_fill(same.to(device), -torch.inf).argmax(dim=1)
    return drawn.to(logits.device), ~same.all(dim=1)


def image_text_matching_loss(
    logits: torch.Tensor, valid: tuple[torch.Tensor, torch.Tensor], gather: bool = True
) -> torch.Tensor:
    """Two-way cross-entropy over b right pairs, b with a drawn picture and b with a drawn text.

    Args:
        logits: ``(3 * b, 2)`` in this order; class 1 is a match. A constant guess at best reaches 0.6365.
        valid: ``(b,)`` bool each, whether a row has a drawn picture and a drawn text; others are left out.
        gather: count over all ranks.
    """
    labels = matching_labels(valid)
    return mean_of_labelled(logits, labels, gather=gather)


def matching_labels(valid: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """``(3 * b,)``: 1 for the right pairs, 0 for the drawn ones, `IGNORED` where none could be drawn."""
    return torch.cat([torch.ones_like(valid[0], dtype=torch.long), torch.where(torch.cat(valid), 0, IGNORED)])


def mean_of_labelled(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, gather: bool = True
) -> torch.Tensor:
    """Cross-entropy whose mean over ranks is the mean over the labels of all ranks, however many each has.

    Args:
        logits: ``(n, C)``.
        labels: ``(n,)``, `IGNORED` where there is none.

    Returns:
        Zero, with a gradient of zero, where no rank has a label.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    count = (labels != IGNORED).sum()
    if gather and is_distributed():
        dist.all_reduce(count)
        total = total * dist.get_world_size()
    return total / count.clamp(min=1)
