"""What the ranks of a distributed run compute, for the tests to compare with one process.

torchrun --nproc_per_node 2 -m losses.ranks equal FOLDER     both losses on equal parts of one batch
python -m losses.ranks unequal FOLDER                        ranks with 3 and 2 rows (RANK and WORLD_SIZE are set)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from contract.cases import CASES

from hf_mm.losses.contrastive import image_text_contrastive_loss, supervised_contrastive_loss

ROWS = 8
TEMPERATURE = 0.2
IMAGE_IDS = torch.tensor([3, 1, 3, 2, 7, 3, 2, 9])
TEXT_IDS = torch.tensor([0, 1, 2, 3, 4, 1, 1, 4])
IDS = {
    "no ids": {},
    "image ids": {"image_ids": IMAGE_IDS},
    "text ids": {"text_ids": TEXT_IDS},
    "both ids": {"image_ids": IMAGE_IDS, "text_ids": TEXT_IDS},
}


def embeddings(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit-length pictures and texts and the factor of their similarities, as leaves."""
    generator = torch.Generator().manual_seed(3)
    pair = torch.nn.functional.normalize(torch.randn(2, rows, 6, generator=generator, dtype=torch.float64), dim=-1)
    scale = torch.tensor([5.0], dtype=torch.float64)
    return tuple(leaf.clone().requires_grad_() for leaf in (*pair, scale))


def own_part(rows: torch.Tensor) -> torch.Tensor:
    return rows.chunk(dist.get_world_size())[dist.get_rank()].detach().clone().requires_grad_(rows.is_floating_point())


def equal_parts() -> dict:
    answers = {}
    for name, ids in IDS.items():
        images, texts, scale = embeddings()
        images, texts = own_part(images), own_part(texts)
        loss = image_text_contrastive_loss(
            images, texts, scale, **{key: own_part(value) for key, value in ids.items()}
        )
        answers[name] = (loss.detach(), *torch.autograd.grad(loss, (images, texts, scale)))
    images = own_part(embeddings()[0])
    loss = supervised_contrastive_loss(images, own_part(IMAGE_IDS), TEMPERATURE)
    answers["supervised"] = (loss.detach(), *torch.autograd.grad(loss, (images,)))
    return answers


def lone_inference() -> torch.Tensor | None:
    """One rank alone asks the model, as a demo on rank 0 does; it would wait for ever if it gathered."""
    if dist.get_rank() > 0:
        return None
    case = next(case for case in CASES if case.name == "mm_clip")
    with torch.no_grad():
        return case.build()(**case.batch(3)).loss


if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if command == "equal":
        dist.init_process_group("gloo")
        answers = {**equal_parts(), "lone": lone_inference()}
        torch.save(answers, folder / f"{dist.get_rank()}.pt")
        dist.barrier()
    else:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'meeting'}",
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
        images, texts, scale = embeddings(3 - dist.get_rank())
        image_text_contrastive_loss(images, texts, scale)
