"""One training step of Pic2Word: from features kept on disk, against computing the frozen picture tower in every step.

.venv-peers/bin/python -m benchmarks.pic2word_step [--device cuda] [--dtype bfloat16] [--threads N] [--quick]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPModel

from benchmarks import clip_models
from benchmarks.clip_models import B32, Size
from benchmarks.harness import interleave, read_arguments
from benchmarks.report import OURS, Report
from hf_mm.data.features import FeatureSpec, FeatureStore, compute_features
from hf_mm.models.pic2word.modeling_pic2word import Pic2WordModel

SIZES = (
    replace(B32, name="ViT-B/32", batch_size=32, num_tokens=6),
    replace(B32, name="ViT-B/16", batch_size=32, patch_size=16, num_tokens=6),
)
TARGET = 5.0
PLACE = 4  # of the picture's word in "a photo of *": start, three words, the word, end
NUM_CACHED = 2_000
NOTES = [
    "Equal work but for the picture tower: the same frozen weights, the same 32 pictures with the sentence "
    '"a photo of *" (6 tokens), the mapping network 512-512, fused AdamW over it alone, no dropout. Losses of all are '
    "compared first. CLIP takes no gradient anywhere, and the picture tower runs without a graph, for every contender.",
    f"hf_mm reads the 32 rows of a step from a cache of {NUM_CACHED:,} on disk, in an order drawn anew, within the time; the "
    "file lies in the page cache. 'hf_mm, live' and 'transformers, live' compute the tower from pixels that lie in memory: "
    "reading, decoding and augmenting pictures, which a live run also pays, is not counted. transformers has no Pic2Word: a "
    "hook on its token embedding puts the word in.",
]


def published_loss(clip: CLIPModel, mapper: nn.Module, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Pic2Word over transformers' CLIP, as its paper has it."""
    with torch.no_grad():
        features = clip.get_image_features(pixel_values=pixels).pooler_output
    words = mapper(features)

    def put(module, args, embeds):
        return torch.cat([embeds[:, :PLACE], words[:, None], embeds[:, PLACE + 1 :]], dim=1)

    hook = clip.text_model.embeddings.token_embedding.register_forward_hook(put)
    texts = clip.get_text_features(input_ids=ids).pooler_output
    hook.remove()
    images, texts = (nn.functional.normalize(part, dim=-1) for part in (features, texts))
    logits = clip.logit_scale.exp() * images @ texts.T
    labels = torch.arange(logits.shape[0], device=logits.device)
    return (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2


class Contenders:
    """The three ways of a step, over one set of weights."""

    def __init__(self, size: Size, device: str, folder: Path):
        models = clip_models.build_all(size, device)
        self.ours = Pic2WordModel.from_clip_pretrained(models["hf_mm"], hidden_dim=512, dropout=0.0).to(device).train()
        self.clip = models["transformers"].requires_grad_(False).eval()
        layers = [layer for hidden in self.ours.mapper.layers for layer in (hidden, nn.ReLU())]
        self.mapper = nn.Sequential(*layers, self.ours.mapper.fc_out)
        self.pixels, ids = clip_models.random_batch(size, device)
        placeholder = self.ours.config.placeholder_token_id
        self.ids = ids[:1].clone().index_fill_(1, torch.tensor([PLACE], device=device), placeholder).expand_as(ids)
        self.store = self._cache(folder)
        self.optimizer = torch.optim.AdamW(self.ours.mapper.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
        self.device = device

    def _cache(self, folder: Path) -> FeatureStore:
        """The batch's features at the head of many others."""
        features = self.ours.vision_features(self.pixels).cpu()
        others = torch.randn(NUM_CACHED - features.shape[0], features.shape[1])
        rows = torch.cat([features, others])
        spec = FeatureSpec("benchmark", {}, "image_embeds", {})
        keys = [str(number) for number in range(NUM_CACHED)]
        return compute_features(torch.stack, list(rows), keys, spec, folder, progress=False)

    def live(self) -> torch.Tensor:
        return self.ours(input_ids=self.ids, pixel_values=self.pixels).loss

    def cached(self, indices: list[int] | None = None) -> torch.Tensor:
        batch = self.ids.shape[0]
        indices = torch.randperm(NUM_CACHED)[:batch].tolist() if indices is None else indices
        return self.ours(input_ids=self.ids, vision_features=self.store.rows(indices).to(self.device)).loss

    def transformers(self) -> torch.Tensor:
        return published_loss(self.clip, self.mapper, self.pixels, self.ids)

    def check(self) -> None:
        """Raises AssertionError where the three losses of the same pictures differ."""
        losses = [self.live(), self.cached(list(range(self.ids.shape[0]))), self.transformers()]
        losses = [loss.item() for loss in losses]
        assert max(losses) - min(losses) <= 1e-4, f"losses differ: {losses}"

    def step(self, loss_of: Callable[[], torch.Tensor], autocast: bool) -> Callable[[], None]:
        def step() -> None:
            with torch.autocast(self.pixels.device.type, torch.bfloat16, enabled=autocast):
                loss = loss_of()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return step


def measure(report: Report, size: Size) -> None:
    args = report.args
    with tempfile.TemporaryDirectory() as folder:
        contenders = Contenders(size, args.device, Path(folder))
        contenders.check()
        ways = {
            OURS: contenders.cached,
            "hf_mm, live": contenders.live,
            "transformers, live": contenders.transformers,
        }
        autocast = args.dtype == "bfloat16"
        steps = {name: contenders.step(way, autocast) for name, way in ways.items()}
        costs = interleave(steps, args.rounds, warmup=1)
    report.add(f"{size.name}, batch {size.batch_size}: cached against live", costs, at_least=TARGET)


def main() -> None:
    args = read_arguments(__doc__, rounds=5, cuda=True, dtypes=True)
    report = Report("pic2word_step", "A training step of Pic2Word", args, NOTES)
    for size in SIZES:
        measure(report, clip_models.quick(size) if args.quick else size)
    report.finish()


if __name__ == "__main__":
    main()
