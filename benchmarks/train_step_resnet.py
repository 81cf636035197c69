"""One training step of CLIP with a ResNet tower, against open_clip, the only peer that has one.

.venv-peers/bin/python -m benchmarks.train_step_resnet [--device cuda] [--dtype bfloat16] [--threads N] [--quick]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from open_clip.model import CLIP as OpenClip
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import clip_models
from benchmarks.harness import interleave, read_arguments
from benchmarks.report import Report
from benchmarks.train_step import SHARE, check_agreement, make_step
from hf_mm.conversion.engine import export
from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.conversion_clip import open_clip_config, open_clip_rules
from hf_mm.models.clip.modeling_clip import MMClipModel

TARGET = 1.05
NOTES = [
    "Equal result: the same weights, pictures and texts, every text of full length; BatchNorm on the batch's statistics; "
    "sdpa; fused AdamW with the same two groups; gradients set to None. Loss and gradient norm are compared first.",
    "Ours multiplies less for it: the attention pool asks one query, and the text tower's last block computes the pooled "
    "token alone. {counts}",
    "Share of peak: each one's own multiply-adds as torch counts them; the peak is that of torch's own matmul.",
]


@dataclass(frozen=True)
class Size:
    """What `clip_models.random_batch` makes a batch of."""

    name: str
    batch_size: int
    image_size: int
    num_tokens: int
    vocab_size: int
    config: MMClipConfig


def rn50() -> Size:
    return sized("RN50", 16, MMClipConfig.from_preset("RN50"))


def quick() -> Size:
    """A smaller relative, for checks that the script works."""
    vision = {"model_type": "mm_clip_resnet", "depths": (1, 1, 1, 1), "width": 16, "num_attention_heads": 8}
    vision |= {"image_size": 64, "projection_dim": 32}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"vocab_size": 1000, "eos_token_id": 999}
    return sized("quick", 4, MMClipConfig(vision_config=vision, text_config=text, projection_dim=32))


def sized(name: str, batch_size: int, config: MMClipConfig, num_tokens: int = 20) -> Size:
    config.text_config.max_position_embeddings = num_tokens
    return Size(name, batch_size, config.vision_config.image_size, num_tokens, config.text_config.vocab_size, config)


def build_both(size: Size, device: str = "cpu") -> dict[str, nn.Module]:
    """Ours and open_clip's with the same weights, in training mode."""
    ours = MMClipModel(size.config)
    with torch.no_grad():  # a new block is its shortcut, and would hide most of the tower from the comparison
        for name, parameter in ours.named_parameters():
            if name.endswith("bn3.weight"):
                parameter.fill_(0.5)
    declared = open_clip_config(size.config)
    theirs = OpenClip(
        declared["embed_dim"], declared["vision_cfg"], declared["text_cfg"], quick_gelu=declared["quick_gelu"]
    )
    state = {name: tensor.clone() for name, tensor in export(ours, open_clip_rules(resnet=True)).items()}
    theirs.load_state_dict(state)
    return {name: model.to(device).train() for name, model in (("hf_mm", ours), ("open_clip", theirs))}


def count_flops(models: dict[str, nn.Module], inputs: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Of a forward and backward pass of each, two a multiply-add."""
    flops = {}
    for name, loss_of in clip_models.loss_functions(models).items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss_of(*inputs).backward()
        models[name].zero_grad(set_to_none=True)
        flops[name] = float(counter.get_total_flops())
    return flops


def main() -> None:
    args = read_arguments(__doc__, rounds=9, cuda=True, dtypes=True)
    size = quick() if args.quick else rn50()
    models = build_both(size, args.device)
    inputs = clip_models.random_batch(size, args.device)
    flops = count_flops(models, inputs)
    counts = "GFLOP a step: " + ", ".join(f"{name} {count / 1e9:.0f}" for name, count in flops.items()) + "."
    notes = [note.format(counts=counts) for note in NOTES]
    report = Report("train_step_resnet", "A training step of CLIP", args, notes)
    check_agreement(models, dict.fromkeys(models, inputs))
    losses = clip_models.loss_functions(models)
    autocast = args.dtype == "bfloat16"
    steps = {name: make_step(models[name], losses[name], inputs, autocast) for name in models}
    report.add(
        f"{size.name}, batch {size.batch_size}, {size.num_tokens} tokens: equal result",
        interleave(steps, args.rounds, warmup=1),
        at_least=TARGET,
        flops=flops,
        share=SHARE,
    )
    report.finish()


if __name__ == "__main__":
    main()
