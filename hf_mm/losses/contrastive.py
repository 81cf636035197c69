"""Contrastive losses over every rank: local rows against gathered columns, with a differentiable gather.

Each rank holds b pictures and b texts. It computes only the logits of its own rows, ``(b, W * b)``, and takes its
loss over them; gradients of other ranks' losses come back through the gather. Under DDP's mean over ranks this is
exactly the gradient of one batch of W * b, at 1 / W of the logits (the scheme of open_clip's released models).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def is_distributed() -> bool:
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _GatherRows(torch.autograd.Function):
    """Concatenates the rows of all ranks; backward sums what every rank sends back for this rank's rows."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        ctx.num_rows = rows.shape[0]
        gathered = rows.new_empty((dist.get_world_size() * rows.shape[0], *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.num_rows :][: ctx.num_rows]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """``(b, ...)`` of this rank to ``(W * b, ...)`` of all, in rank order, differentiable.

    Raises:
        ValueError: on every rank, where the ranks hold different numbers of rows.
    """
    sizes = torch.empty(dist.get_world_size(), dtype=torch.int64, device=rows.device)
    dist.all_gather_into_tensor(sizes, torch.tensor([rows.shape[0]], dtype=torch.int64, device=rows.device))
    if (sizes != rows.shape[0]).any():
        raise ValueError(
            f"every rank needs the same number of rows for a contrastive loss, but they hold {sizes.tolist()}: "
            "drop the last incomplete batch (dataloader_drop_last=True)."
        )
    return _GatherRows.apply(rows)


def image_text_contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    image_ids: torch.Tensor | None = None,
    text_ids: torch.Tensor | None = None,
    gather: bool = True,
) -> torch.Tensor:
    """The symmetric loss of CLIP (Radford et al. 2021, figure 3): picture i belongs to text i, all others are negatives.

    Args:
        image_embeds: ``(b, D)`` of unit length.
        text_embeds: ``(b, D)`` of unit length.
        logit_scale: scalar or ``(1,)``, the factor itself (not its logarithm).
        image_ids: ``(b,)`` integers; pictures with equal ids show the same thing, so the texts of one are never
            negatives of the other.
        text_ids: ``(b,)`` integers; equal texts are never each other's negatives.
        gather: over all ranks where there are several. Off, the loss is of this rank alone.

    Returns:
        The mean over this rank's rows; the mean of it over ranks is the loss of the whole batch.

    Raises:
        ValueError: numbers of pictures and texts (or of ids) differ, or ranks hold different numbers of rows.
    """
    check_pairs(image_embeds.shape[0], text_embeds.shape[0], image_ids, text_ids)
    image_embeds, text_embeds = at_least_float32(image_embeds), at_least_float32(text_embeds)
    gather = gather and is_distributed()
    all_images = gather_rows(image_embeds) if gather else image_embeds
    all_texts = gather_rows(text_embeds) if gather else text_embeds
    targets = _own_columns(image_embeds, gather)

    with torch.autocast(image_embeds.device.type, enabled=False):
        logits_per_image = logit_scale * image_embeds @ all_texts.T
        logits_per_text = logit_scale * text_embeds @ all_images.T if gather else logits_per_image.T
    same = [_same_ids(ids, gather) for ids in (image_ids, text_ids) if ids is not None]
    if same:
        not_negative = torch.stack(same).any(dim=0).scatter(1, targets[:, None], False)
        logits_per_image = logits_per_image.masked_fill(not_negative, float("-inf"))
        logits_per_text = logits_per_text.masked_fill(not_negative, float("-inf"))
    loss_of_images = nn.functional.cross_entropy(logits_per_image, targets)
    loss_of_texts = nn.functional.cross_entropy(logits_per_text, targets)
    return (loss_of_images + loss_of_texts) / 2


def check_pairs(
    num_images: int, num_texts: int, image_ids: torch.Tensor | None = None, text_ids: torch.Tensor | None = None
) -> None:
    """Raises ValueError where pictures and texts, or their ids, are not equally many."""
    if num_images != num_texts:
        raise ValueError(
            f"a contrastive loss needs one text per picture, but there are {num_images} pictures and {num_texts} texts."
        )
    for name, ids in (("image_ids", image_ids), ("text_ids", text_ids)):
        if ids is not None:
            _check_ids(name, ids, num_images)


def supervised_contrastive_loss(
    embeds: torch.Tensor, ids: torch.Tensor, temperature: float, gather: bool = True
) -> torch.Tensor:
    """Pulls rows with equal ids together (Khosla et al. 2020, equation 2): several views of one thing.

    Args:
        embeds: ``(b, D)`` of unit length.
        ids: ``(b,)`` integers; the other rows with the same id are the positives.
        temperature: divides the similarities.
        gather: over all ranks where there are several.

    Returns:
        The mean over this rank's rows; a row without a positive counts as 0.

    Raises:
        ValueError: not one id per row, or ranks hold different numbers of rows.
    """
    _check_ids("ids", ids, embeds.shape[0])
    embeds = at_least_float32(embeds)
    gather = gather and is_distributed()
    itself = _own_columns(embeds, gather)[:, None]
    with torch.autocast(embeds.device.type, enabled=False):
        logits = embeds @ (gather_rows(embeds) if gather else embeds).T / temperature
    log_probs = logits.scatter(1, itself, float("-inf")).log_softmax(dim=1)
    positive = _same_ids(ids, gather).scatter(1, itself, False)
    per_row = log_probs.masked_fill(~positive, 0.0).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    return -per_row.mean()


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision to float32: at a logit scale of 100, a step of bfloat16 is half a logit."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_ids(name: str, ids: torch.Tensor, num_rows: int) -> None:
    if ids.shape != (num_rows,):
        raise ValueError(f"{name} must have shape ({num_rows},), one id per row, not {tuple(ids.shape)}.")


def _own_columns(rows: torch.Tensor, gather: bool) -> torch.Tensor:
    """``(b,)``: where this rank's rows stand among the gathered ones."""
    own = torch.arange(rows.shape[0], device=rows.device)
    return own + dist.get_rank() * rows.shape[0] if gather else own


def _same_ids(ids: torch.Tensor, gather: bool) -> torch.Tensor:
    """``(b, W * b)`` bool: which of all rows carry the id of each of this rank's rows."""
    return ids[:, None] == (gather_rows(ids) if gather else ids)[None, :]


def query_text_contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    temperature: torch.Tensor | float,
    image_ids: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    gather: bool = True,
    gather_with_grad: bool = True,
    same: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """BLIP-2's contrastive loss (Li et al. 2023, section 3.2): of a picture's queries the best matching one counts.

    Args:
        image_embeds: ``(b, K, D)`` of unit length, K queries a picture.
        text_embeds: ``(b, D)`` of unit length; text i belongs to picture i.
        temperature: divides the cosines.
        image_ids: ``(b,)`` integers; the texts of pictures with equal ids all are right, in equal parts.
        label_smoothing: this part of the target is spread over all columns.
        gather: over all ranks where there are several.
        gather_with_grad: let gradients reach the rows of other ranks, and of one's own as columns.
        same: what `same_image` gives, where it is known already: ids are then not gathered again.

    Returns:
        The mean over this rank's rows, logits of its pictures against all texts ``(b, G)`` and of its texts against all
        pictures ``(b, G)``, G the rows of all ranks.

    Raises:
        ValueError: see `image_text_contrastive_loss`.
    """
    check_pairs(image_embeds.shape[0], text_embeds.shape[0], image_ids)
    image_embeds, text_embeds = at_least_float32(image_embeds), at_least_float32(text_embeds)
    gather = gather and is_distributed()
    all_images = gather_rows(image_embeds) if gather else image_embeds
    all_texts = gather_rows(text_embeds) if gather else text_embeds
    if not gather_with_grad:
        all_images, all_texts = all_images.detach(), all_texts.detach()
    with torch.autocast(image_embeds.device.type, enabled=False):
        logits_per_image = (image_embeds @ all_texts.T).amax(dim=1) / temperature
        logits_per_text = torch.einsum("td,gkd->tgk", text_embeds, all_images).amax(dim=2) / temperature
    same = same_image(image_embeds, image_ids, gather) if same is None else same
    same = same.to(logits_per_image.dtype)
    targets = (1 - label_smoothing) * same / same.sum(dim=1, keepdim=True) + label_smoothing / same.shape[1]
    loss_of_images = nn.functional.cross_entropy(logits_per_image, targets)
    loss_of_texts = nn.functional.cross_entropy(logits_per_text, targets)
    return (loss_of_images + loss_of_texts) / 2, logits_per_image, logits_per_text


def same_image(rows: torch.Tensor, image_ids: torch.Tensor | None, gather: bool) -> torch.Tensor:
    """``(b, G)`` bool: which of all rows are of the picture of each of this rank's rows."""
    if image_ids is not None:
        return _same_ids(image_ids, gather)
    own = _own_columns(rows, gather)
    columns = rows.shape[0] * (dist.get_world_size() if gather else 1)
    return own[:, None] == torch.arange(columns, device=rows.device)


def gather_padded(rows: torch.Tensor, fill: int) -> torch.Tensor:
    """``(b, T)`` of this rank to ``(W * b, T_max)`` of all, shorter rows filled on the right."""
    longest = torch.tensor([rows.shape[1]], device=rows.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return gather_rows(nn.functional.pad(rows, (0, int(longest) - rows.shape[1]), value=fill))
