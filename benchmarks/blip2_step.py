"""One training step of BLIP-2's second stage, and its peak memory, against transformers around the same language model.

.venv-peers/bin/python -m benchmarks.blip2_step [--device cuda] [--threads N] [--quick]

`make language-model` comes first: the language model is SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from benchmarks import blip2_models
from benchmarks.blip2_models import B16, CAPTION, DEMO, PROMPT, Size
from benchmarks.harness import in_child, interleave, read_arguments
from benchmarks.memory import resident
from benchmarks.report import OURS, Report
from hf_mm.composite.language_model import label_logits, label_loss

SIZES = {"b16": B16, "demo": DEMO, "quick": blip2_models.quick(B16)}
PEER, CACHED = "transformers", "cached"
MEMORY_ROUNDS = 1
LOSS_TOLERANCE = 1e-4
TARGET = 1.1
NOTES = [
    f"Equal work: the same weights, the language model even the same module; the same pictures and texts, {PROMPT} tokens of "
    f"a prompt and captions of {CAPTION // 2} to {CAPTION}, padded on the right, labels at the captions alone; sdpa; no "
    "dropout; no cache of keys and values; fused AdamW over Q-Former, queries, the norm before it and the projection. Losses "
    "and gradient norms of both are compared first.",
    "Equally frozen: tower and language model take no gradient and stay in eval mode. transformers' model is given no "
    "no_grad around its tower, which it has no place for: with frozen weights no graph is kept there either.",
    "Both compute everything from pixels in memory, the tower included. What differs is what hf_mm leaves out, above all the "
    "product with the vocabulary where no label is to be predicted: at pictures, prompt and padding.",
    "GFLOP/s and share of peak are of what each multiplies itself, counted by torch.",
    "From cached features, for information: hf_mm is given the tower's features, in memory; transformers' model takes none.",
    "The demo's size: tower and Q-Former about as large as `make demo-blip2` has them, so that nearly all is the language "
    "model.",
    "Memory of a step: what grows from before the models are built to the peak of the second training step: weights, "
    "gradients, both moments of AdamW, activations. Memory of the logits: what grows from before to the peak of the last "
    "norm, the product with the vocabulary, the loss and its backward pass to hidden states, weights not counted. On a CPU "
    "the resident set, on CUDA what torch has allocated. Each in a process of its own.",
    "The language model is SmolLM2-135M-Instruct with its weights (`make language-model` fetches it); tower and Q-Former "
    "have random ones.",
]
Batch = dict[str, torch.Tensor]


def loss_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return model(use_cache=False, **batch).loss


def for_peer(size: Size, batch: Batch) -> Batch:
    """What transformers' model is given in place of a batch of ours."""
    return {**batch, "input_ids": blip2_models.peer_ids(size.text_config, batch["input_ids"])}


def contenders(size: Size, device: str) -> dict[str, tuple[PreTrainedModel, Batch]]:
    """The models, with one set of weights, and what each is given."""
    ours = blip2_models.build_stage2(size).to(device)
    texts, pixels = blip2_models.stage2_texts(size, device), blip2_models.random_pixels(size, device)
    live = {"pixel_values": pixels, **texts}
    return {
        OURS: (ours, live),
        CACHED: (ours, {"vision_features": ours.vision_features(pixels), **texts}),
        PEER: (blip2_models.peer_of(ours), for_peer(size, live)),
    }


def check_agreement(models: dict[str, tuple[PreTrainedModel, Batch]]) -> dict[str, float]:
    """The FLOPs of each contender's forward and backward pass.

    Raises:
        AssertionError: losses or gradients of the contenders differ, or how much of them trains.
    """
    losses, norms, trained, flops = {}, {}, {}, {}
    for name, (model, batch) in models.items():
        losses[name], flops[name] = blip2_models.count_pass(partial(loss_of, model, batch))
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        norms[name] = torch.nn.utils.get_total_norm(gradients).item()
        trained[name] = sum(gradient.numel() for gradient in gradients)
        model.zero_grad(set_to_none=True)
    assert max(losses.values()) - min(losses.values()) <= LOSS_TOLERANCE, f"losses differ: {losses}"
    assert max(norms.values()) <= 1.001 * min(norms.values()), f"gradient norms differ: {norms}"
    assert len(set(trained.values())) == 1, f"not as many numbers train: {trained}"
    return flops


def steps_of(models: dict[str, tuple[PreTrainedModel, Batch]]) -> dict[str, Callable[[], None]]:
    """A training step of each contender; those of one model share its optimizer."""
    optimizers = {id(model): blip2_models.adamw(model) for model, _ in models.values()}
    return {
        name: blip2_models.make_step(optimizers[id(model)], partial(loss_of, model, batch))
        for name, (model, batch) in models.items()
    }


def measure_time(report: Report, size: Size) -> None:
    models = contenders(size, report.args.device)
    flops = check_agreement(models)
    costs = interleave(steps_of(models), report.args.rounds, warmup=1)
    cases = (("a step", OURS, PEER, TARGET), ("a step from cached features", CACHED, f"{PEER}, live", None))
    for case, ours, theirs, target in cases:
        report.add(
            f"{size.title}: {case}",
            {OURS: costs[ours], theirs: costs[PEER]},
            at_least=target,
            flops={OURS: flops[ours], theirs: flops[PEER]},
        )


def step_alone(name: str, size: Size, device: str) -> Callable[[], None]:
    """The step of one contender, whose model is all that is kept."""
    model = blip2_models.build_stage2(size).to(device)
    batch = {"pixel_values": blip2_models.random_pixels(size, device), **blip2_models.stage2_texts(size, device)}
    if name == PEER:
        model, batch = blip2_models.peer_of(model), for_peer(size, batch)
    return steps_of({name: (model, batch)})[name]


def logits_alone(name: str, size: Size, device: str) -> Callable[[], torch.Tensor]:
    """From hidden states ``(B, T, D)`` to the loss, which is returned, and back: a language model without blocks."""
    config = copy.deepcopy(size.text_config)
    config.num_hidden_layers = 0
    torch.manual_seed(0)
    lm = LlamaForCausalLM(config).to(device).requires_grad_(False).eval()
    batch = blip2_models.stage2_texts(size, device)
    mask, labels = batch["attention_mask"], batch["labels"]
    hidden_states = torch.randn(*labels.shape, config.hidden_size).to(device).requires_grad_()

    def at_labels() -> torch.Tensor:
        return label_loss(*label_logits(lm, hidden_states, mask, labels))

    def everywhere() -> torch.Tensor:
        logits = lm(inputs_embeds=hidden_states, attention_mask=mask, use_cache=False).logits
        return lm.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size)

    def run() -> torch.Tensor:
        hidden_states.grad = None
        loss = at_labels() if name == OURS else everywhere()
        loss.backward()
        return loss.detach()

    return run


def in_use(device: str) -> int:
    """Bytes, after what was let go has gone back to the system."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def peak_of(function: Callable[[], object], device: str) -> int:
    """Bytes in use at the peak of a call."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    in_use(device)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    function()
    return resident("VmHWM")


def child(part: str, name: str, size_name: str, device: str) -> int:
    """Bytes that a step of one contender needs at its peak, or the part of it that makes logits."""
    before = in_use(device)
    make = {"step": step_alone, "logits": logits_alone}[part]
    run = make(name, SIZES[size_name], device)
    run()  # makes the optimizer's state, and whatever the kernels keep
    if part == "logits":
        before = in_use(device)
    return peak_of(run, device) - before


def peak(part: str, name: str, size_name: str, args: argparse.Namespace) -> float:
    """`child` in a process of its own."""
    command = ("-m", "benchmarks.blip2_step", "--child", part, name, size_name, args.device)
    return float(in_child(*command, threads=args.threads))


def measure_memory(report: Report, size_name: str) -> None:
    for part, title in (("step", "a step"), ("logits", "logits and loss")):
        ways = {name: partial(peak, part, name, size_name, report.args) for name in (OURS, PEER)}
        costs = interleave(ways, MEMORY_ROUNDS, warmup=0)
        case = f"{SIZES[size_name].title}: peak memory of {title}"
        report.add(case, costs, unit="MiB", scale=2**-20, at_most=1.0)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:])))
        return
    args = read_arguments(__doc__, rounds=3, cuda=True)
    report = Report("blip2_step", "A training step of stage 2 of BLIP-2", args, NOTES)
    for size_name in ["quick"] if args.quick else ["b16", "demo"]:
        measure_time(report, SIZES[size_name])
        measure_memory(report, size_name)
    report.finish()


if __name__ == "__main__":
    main()
