"""One training step of CLIP: forward, backward, fused AdamW, against transformers and open_clip.

.venv-peers/bin/python -m benchmarks.train_step [--device cuda] [--dtype bfloat16] [--threads N] [--quick]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks import clip_models
from benchmarks.clip_models import B32, DOCUMENTED_CONTEXT, TINY, Size
from benchmarks.harness import interleave, read_arguments
from benchmarks.report import Report

LOSS_TOLERANCE = 1e-4
TARGETS = {TINY.name: 1.15, B32.name: 1.05}
SHARE = 0.7  # of the matrix-multiply peak
NOTES = [
    "Equal work: the same weights, pictures and texts, every text of full length; sdpa; dropout 0; no mask; fused AdamW "
    "with the same two groups (matrices decay); gradients set to None. Loss and gradient norm of all are compared first.",
    "As documented: open_clip at its fixed 77 tokens, transformers (and ours) with the mask of its processor. The "
    "optimizer stays the fused one. Shown beside, never the headline.",
    "Share of peak: multiply-adds of the full model at the equal length, counted by hand and the same for every "
    "contender, whether it does all of them or finds a way around some; the peak is that of torch's own matmul.",
]
Inputs = tuple[torch.Tensor, ...]


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW; what has two dimensions or more decays, for every library alike."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)


def check_agreement(models: dict[str, nn.Module], inputs: dict[str, Inputs]) -> dict[str, float]:
    """The loss of each contender, in float32.

    At random weights every loss is near ln(batch size), so the norm of the gradient is compared too.

    Raises:
        AssertionError: losses differ by more than 1e-4, or gradient norms by more than one in a thousand.
    """
    losses, norms = {}, {}
    for name, loss_of in clip_models.loss_functions(models).items():
        loss = loss_of(*inputs[name])
        loss.backward()
        losses[name] = loss.item()
        norms[name] = torch.nn.utils.get_total_norm([p.grad for p in models[name].parameters()]).item()
        models[name].zero_grad(set_to_none=True)
    assert max(losses.values()) - min(losses.values()) <= LOSS_TOLERANCE, f"losses differ: {losses}"
    assert max(norms.values()) <= 1.001 * min(norms.values()), f"gradient norms differ: {norms}"
    return losses


def make_step(
    model: nn.Module, loss_of: Callable[..., torch.Tensor], inputs: Inputs, autocast: bool = False
) -> Callable[[], None]:
    """A function that trains one step."""
    optimizer = adamw(model)

    def step() -> None:
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(*inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def contenders(size: Size, device: str, documented: bool) -> tuple[dict[str, nn.Module], dict[str, Inputs]]:
    """The three models in training mode, and what each is given."""
    models = clip_models.build_all(size, device, DOCUMENTED_CONTEXT if documented else None)
    for model in models.values():
        model.train()
    pixels, ids = clip_models.random_batch(size, device)
    inputs = dict.fromkeys(models, (pixels, ids))
    if documented:
        inputs = dict.fromkeys(models, (pixels, ids, torch.ones_like(ids)))
        inputs["open_clip"] = pixels, nn.functional.pad(ids, (0, DOCUMENTED_CONTEXT - size.num_tokens))
    return models, inputs


def measure(report: Report, size: Size, documented: bool) -> None:
    args = report.args
    models, inputs = contenders(size, args.device, documented)
    check_agreement(models, inputs)
    losses = clip_models.loss_functions(models)
    autocast = args.dtype == "bfloat16"
    steps = {name: make_step(models[name], losses[name], inputs[name], autocast) for name in models}
    costs = interleave(steps, args.rounds, warmup=1)
    case = f"{size.name}, batch {size.batch_size}, {size.num_tokens} tokens"
    if documented:
        report.add(f"{case}: as documented", costs)
    else:
        flops = size.train_flops(size.num_tokens)
        report.add(f"{case}: equal work", costs, at_least=TARGETS[size.name], flops=flops, share=SHARE)


def main() -> None:
    args = read_arguments(__doc__, rounds=15, cuda=True, dtypes=True)
    report = Report("train_step", "A training step of CLIP", args, NOTES)
    for size in (TINY, B32):
        for documented in (False, True):
            measure(report, clip_models.quick(size) if args.quick else size, documented)
    report.finish()


if __name__ == "__main__":
    main()
