"""What each rank of a distributed run computes with open_clip's loss.

torchrun --nproc_per_node 2 -m peers.ranks FOLDER
"""

import sys
from pathlib import Path

import benchmarks  # noqa: F401 - before torchvision

# isort: split
import torch
import torch.distributed as dist
from losses.ranks import embeddings, own_part
from open_clip.loss import ClipLoss

from hf_mm.losses.contrastive import image_text_contrastive_loss


def with_gradients(loss_function) -> tuple[torch.Tensor, ...]:
    images, texts, scale = embeddings()
    images, texts = own_part(images), own_part(texts)
    loss = loss_function(images, texts, scale)
    return loss.detach(), *torch.autograd.grad(loss, (images, texts, scale))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    answers = {
        "ours": with_gradients(image_text_contrastive_loss),
        "theirs": with_gradients(ClipLoss(local_loss=True, gather_with_grad=True, **place)),
        "without gradient": with_gradients(ClipLoss(**place)),
    }
    torch.save(answers, Path(sys.argv[1]) / f"{place['rank']}.pt")
    dist.barrier()
