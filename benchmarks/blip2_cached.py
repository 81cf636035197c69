"""Training steps of both stages of BLIP-2: from features kept on disk, against computing the frozen tower in every step.

.venv-peers/bin/python -m benchmarks.blip2_cached [--device cuda] [--threads N] [--quick]

`make language-model` comes first: the language model of stage 2 is SmolLM2-135M.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks import blip2_models
from benchmarks.blip2_models import B16, B16_SMALL, CAPTION, PROMPT, QFORMER_TEXT, Size
from benchmarks.harness import interleave, read_arguments
from benchmarks.report import OURS, Report
from hf_mm.data.features import FeatureSpec, FeatureStore, compute_features
from hf_mm.models.blip2.modeling_blip2_base import MMBlip2PreTrainedModel

NUM_CACHED = 256
LIVE = "hf_mm, live"
LOSS_TOLERANCE = 1e-5
TARGETS = {"stage 1": 3.0, "stage 2": 1.5}
CASES = (("stage 2", B16), ("stage 2", B16_SMALL), ("stage 1", B16), ("stage 1", B16_SMALL))
NOTES = [
    "Equal work but for the picture tower: the same model, texts and step. The tower has the size of ViT-B/16 at 224 pixels "
    "(197 tokens of width 768), random weights, and runs without a graph. fused AdamW over all that trains, no dropout. "
    "Losses of the same pictures are compared first.",
    f"From the cache: hf_mm reads the rows of a step, float32, from {NUM_CACHED} pictures on disk, in an order drawn anew, "
    "within the time; the file lies in the page cache. Live: the tower computes them from pixels that lie in memory: reading, "
    "decoding and augmenting pictures, which a live run also pays, is not counted.",
    f"Stage 1: the three losses together, texts of {QFORMER_TEXT // 2} to {QFORMER_TEXT} tokens, a vocabulary of "
    f"{blip2_models.QFORMER_VOCABULARY:,}. Stage 2: {PROMPT} tokens of a prompt and captions of {CAPTION // 2} to {CAPTION} "
    "before SmolLM2-135M-Instruct (`make language-model` fetches it).",
    "Two Q-Formers, for what is saved depends on what is left. 12x768 is the published one, made for ViT-g, whose picture "
    "costs 15 times as much as one of ViT-B/16. 4x384 goes with this tower: its blocks have a tenth of the tower's weights, "
    "as the published ones have of ViT-g's. GFLOP/s and share of peak are of what each way multiplies, counted by torch.",
]


class Contenders:
    """The two ways of a step of one model."""

    def __init__(self, stage: str, size: Size, device: str, folder: Path):
        build = {"stage 1": blip2_models.build_stage1, "stage 2": blip2_models.build_stage2}[stage]
        texts = {"stage 1": blip2_models.stage1_texts, "stage 2": blip2_models.stage2_texts}[stage]
        self.model: MMBlip2PreTrainedModel = build(size).to(device)
        self.texts, self.pixels = texts(size, device), blip2_models.random_pixels(size, device)
        self.store = self._cache(folder)
        self.device = device

    def _cache(self, folder: Path) -> FeatureStore:
        """The batch's features at the head of many others."""
        features = self.model.vision_features(self.pixels).cpu()
        others = torch.randn(NUM_CACHED - features.shape[0], *features.shape[1:])
        rows = torch.cat([features, others])
        spec = FeatureSpec("benchmark", {}, "last_hidden_state", {})
        keys = [str(number) for number in range(NUM_CACHED)]
        return compute_features(torch.stack, list(rows), keys, spec, folder, progress=False)

    def live(self) -> torch.Tensor:
        return self.model(pixel_values=self.pixels, **self.texts).loss

    def cached(self, indices: list[int] | None = None) -> torch.Tensor:
        batch = self.pixels.shape[0]
        indices = torch.randperm(NUM_CACHED)[:batch].tolist() if indices is None else indices
        return self.model(vision_features=self.store.rows(indices).to(self.device), **self.texts).loss

    def check(self) -> dict[str, float]:
        """The FLOPs of a forward and backward pass either way; hard negatives are drawn alike.

        Raises:
            AssertionError: losses of the same pictures differ.
        """
        same = partial(self.cached, list(range(self.pixels.shape[0])))
        losses, flops = {}, {}
        for name, way in {OURS: same, LIVE: self.live}.items():
            torch.manual_seed(0)
            losses[name], flops[name] = blip2_models.count_pass(way)
            self.model.zero_grad(set_to_none=True)
        assert abs(losses[OURS] - losses[LIVE]) <= LOSS_TOLERANCE, f"losses differ: {losses}"
        return flops

    def steps(self) -> dict[str, Callable[[], None]]:
        optimizer = blip2_models.adamw(self.model)
        ways = {OURS: self.cached, LIVE: self.live}
        return {name: blip2_models.make_step(optimizer, way) for name, way in ways.items()}


def measure(report: Report, stage: str, size: Size) -> None:
    with tempfile.TemporaryDirectory() as folder:
        contenders = Contenders(stage, size, report.args.device, Path(folder))
        flops = contenders.check()
        costs = interleave(contenders.steps(), report.args.rounds, warmup=1)
    report.add(f"{stage}, {size.title}", costs, at_least=TARGETS[stage], flops=flops)


def main() -> None:
    args = read_arguments(__doc__, rounds=3, cuda=True)
    report = Report("blip2_cached", "A training step of BLIP-2 from cached features", args, NOTES)
    for stage, size in CASES:
        measure(report, stage, blip2_models.quick(size) if args.quick else size)
    report.finish()


if __name__ == "__main__":
    main()
