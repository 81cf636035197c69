"""Zero-shot scoring: 1,000 pictures (as features), 1,000 classes, 80 templates, against open_clip's builder.

.venv-peers/bin/python -m benchmarks.zero_shot [--device cuda] [--threads N] [--quick]
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SimpleTokenizer, build_zero_shot_classifier
from torch import nn

from benchmarks import clip_models
from benchmarks.clip_models import B32, DOCUMENTED_CONTEXT, TINY
from benchmarks.harness import interleave, read_arguments
from benchmarks.report import Report
from benchmarks.text_encoding import tokenizers
from hf_mm.evaluation.zero_shot import (
    build_classifier,
    classification_metrics,
    fill_templates,
    load_classifier,
    save_classifier,
)
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.processing_clip import MMClipProcessor

NUM_PICTURES = 1000
NOTES = [
    "Cold: the classifier is built from all texts, then the pictures are scored. Warm: the classifier is read from its "
    "file, then the pictures are scored.",
    "The same scoring: top-1 and top-5 by the function of open_clip's training script for both. Its own: "
    "classification_metrics, which gives balanced accuracy, chance and majority too (cold as well), against that function.",
    "open_clip at 77 tokens is what its documentation does; cut to the longest prompt, its text tower has as few tokens as "
    "any of ours: the better of the two counts.",
    "ImageNet's class names and 80 templates as open_clip ships them; features of the pictures are random.",
    "The text tower is that of ViT-B/32 on CUDA, and 128 wide with 2 layers on a CPU, where open_clip's tokens would "
    "take ViT-B/32 an hour a round.",
]


def open_clip_accuracy(features: torch.Tensor, classifier: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Top-1 and top-5 as in open_clip_train.zero_shot."""
    predicted = (100.0 * features @ classifier).topk(5, 1, True, True)[1].t()
    correct = predicted.eq(labels.view(1, -1).expand_as(predicted))
    return [float(correct[:k].reshape(-1).float().sum(0, keepdim=True).cpu().numpy()[0]) / len(labels) for k in (1, 5)]


def shorter(model: nn.Module, size: clip_models.Size, context: int) -> nn.Module:
    """open_clip's model with the same weights and a shorter context."""
    state = model.state_dict()
    cut = clip_models.build("open_clip", replace(size, context=context))
    cut.load_state_dict({**state, "positional_embedding": state["positional_embedding"][:context]})
    return cut.to(state["logit_scale"].device)


def main() -> None:
    args = read_arguments(__doc__, rounds=5, cuda=True)
    size = replace(B32 if args.device == "cuda" else TINY, vocab_size=B32.vocab_size, context=DOCUMENTED_CONTEXT)
    size = clip_models.quick(size) if args.quick else size
    names, templates = IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
    if args.quick:
        names, templates = names[:12], templates[:4]
    texts = fill_templates(names, [template("{}") for template in templates])

    models = {name: model.eval() for name, model in clip_models.build_all(size, args.device).items()}
    ours, processor = models["hf_mm"], MMClipProcessor(MMClipImageProcessorPil(), tokenizers()[0])
    longest = max(map(len, processor.tokenizer([text for row in texts for text in row])["input_ids"]))
    peers = {
        "open_clip, 77 tokens": (models["open_clip"], SimpleTokenizer(context_length=DOCUMENTED_CONTEXT)),
        f"open_clip, {longest} tokens": (
            shorter(models["open_clip"], size, longest).eval(),
            SimpleTokenizer(context_length=longest),
        ),
    }

    generator = torch.Generator().manual_seed(0)
    features = nn.functional.normalize(torch.randn(NUM_PICTURES, size.projection_dim, generator=generator), dim=-1)
    labels = torch.randint(len(names), (NUM_PICTURES,), generator=generator)

    def build_ours() -> torch.Tensor:
        return build_classifier(ours, processor, texts, progress=False)

    def build_peer(name: str) -> torch.Tensor:
        model, tokenizer = peers[name]
        return build_zero_shot_classifier(model, tokenizer, names, templates, device=args.device).cpu()

    def score(classifier: torch.Tensor) -> list[float]:
        return open_clip_accuracy(features, classifier, labels)

    def score_by_ours(classifier: torch.Tensor) -> list[float]:
        metrics = classification_metrics(features @ classifier.T, labels)
        return [metrics["top1"], metrics["top5"]]

    report = Report("zero_shot", "Zero-shot scoring of 1,000 pictures", args, NOTES)
    case = f"{len(names)} classes x {len(templates)} templates, text tower of {size.name}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        save_classifier(build_ours(), names, path / "hf_mm")
        cold = {"hf_mm": lambda: score_by_ours(build_ours())}
        warm = {"hf_mm": lambda: score(load_classifier(path / "hf_mm")[0].T)}
        for name in peers:
            torch.save(build_peer(name), path / name)
            torch.testing.assert_close(
                torch.load(path / name).T, load_classifier(path / "hf_mm")[0], atol=1e-4, rtol=0
            )
            cold[name] = lambda name=name: score(build_peer(name))
            warm[name] = lambda name=name: score(torch.load(path / name))
        own = {**warm, "hf_mm": lambda: score_by_ours(load_classifier(path / "hf_mm")[0])}
        report.add(f"{case}, cold", interleave(cold, args.rounds, warmup=0), unit="s", scale=1, at_least=1.0)
        report.add(f"{case}, warm, the same scoring", interleave(warm, 20 * args.rounds, warmup=5), at_least=1.0)
        report.add(f"{case}, warm, each its own scoring", interleave(own, 20 * args.rounds, warmup=5), at_least=1.0)
    report.finish()


if __name__ == "__main__":
    main()
