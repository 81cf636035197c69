"""Captions to embeddings with CLIP ViT-B/32's text tower, against transformers and open_clip.

.venv-peers/bin/python -m benchmarks.text_encoding [--device cuda] [--dtype bfloat16] [--threads N] [--quick]
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from open_clip import SimpleTokenizer
from open_clip.tokenizer import default_bpe
from torch import nn
from transformers import CLIPTokenizer

from benchmarks import clip_models
from benchmarks.clip_models import B32, DOCUMENTED_CONTEXT
from benchmarks.harness import interleave, read_arguments
from benchmarks.report import Report
from hf_mm.data.emoji import load_emoji
from hf_mm.evaluation.embeddings import embed_texts
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.processing_clip import MMClipProcessor
from hf_mm.models.clip.tokenization_clip import MMClipTokenizer

BATCH_SIZE = 64
FRAMES = (
    "a {}",
    "a photo of a {} next to a {}",
    "a man is holding a {} in his right hand",
    "two people are looking at a {} on a busy street",
    "a small {} on a wooden table near a window",
    "a black and white photo of a {} and a {} in the snow",
    "a woman in a red coat walks past a {} while a child points at a {}",
    "close up of a {}",
)
NOTES = [
    "Captions are sentences around names of the bundled emoji, every one different.",
    "Equal lengths: token ids in, every row as long as the mean caption, open_clip's context set to it; no tokenizer.",
    "As documented: strings in. Ours: embed_texts. transformers: its tokenizer with padding=True, batches in the given "
    "order. open_clip: its tokenizer at 77 tokens, encode_text(normalize=True).",
    "inference_mode for all; embeddings of all agree within 1e-4 before anything is timed.",
]


def captions(count: int) -> list[str]:
    """Different captions of the usual lengths."""
    names = sorted(name for name in set(load_emoji()["caption"]) if name.isascii() and ":" not in name)
    rng, found = random.Random(0), {}
    while len(found) < count:
        frame = rng.choice(FRAMES)
        found[frame.format(*rng.sample(names, frame.count("{}")))] = None
    return list(found)


def tokenizers(context: int = DOCUMENTED_CONTEXT) -> tuple[MMClipTokenizer, CLIPTokenizer, SimpleTokenizer]:
    """The published tokenizer of CLIP in the three libraries."""
    ours = MMClipTokenizer.from_bpe_file(default_bpe(), model_max_length=context)
    bpe = json.loads(ours.backend_tokenizer.to_str())["model"]
    theirs = CLIPTokenizer(bpe["vocab"], [tuple(pair) for pair in bpe["merges"]], model_max_length=context)
    return ours, theirs, SimpleTokenizer(context_length=context)


def from_ids(models: dict[str, nn.Module], ids: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Contenders that encode batches of equally long rows of token ids."""

    def encode(one_batch: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return lambda: torch.cat([nn.functional.normalize(one_batch(part), dim=-1) for part in ids.split(BATCH_SIZE)])

    return {
        "hf_mm": encode(lambda part: models["hf_mm"].get_text_features(input_ids=part).pooler_output),
        "transformers": encode(lambda part: models["transformers"].get_text_features(input_ids=part).pooler_output),
        "open_clip": encode(lambda part: models["open_clip"].encode_text(part)),
    }


def from_strings(
    models: dict[str, nn.Module], texts: Sequence[str], device: str
) -> dict[str, Callable[[], torch.Tensor]]:
    """Contenders that encode captions as the documentation of each library does."""
    ours, theirs, third = tokenizers()
    processor = MMClipProcessor(MMClipImageProcessorPil(), ours)
    batches = [texts[start : start + BATCH_SIZE] for start in range(0, len(texts), BATCH_SIZE)]

    def of_ours() -> torch.Tensor:
        return embed_texts(models["hf_mm"], processor, texts, BATCH_SIZE, progress=False)

    def of_transformers() -> torch.Tensor:
        rows = []
        for batch in batches:
            inputs = theirs(batch, padding=True, return_tensors="pt").to(device)
            rows.append(nn.functional.normalize(models["transformers"].get_text_features(**inputs).pooler_output))
        return torch.cat(rows)

    def of_open_clip() -> torch.Tensor:
        return torch.cat([models["open_clip"].encode_text(third(b).to(device), normalize=True) for b in batches])

    return {"hf_mm": of_ours, "transformers": of_transformers, "open_clip": of_open_clip}


def assert_equal(results: dict[str, torch.Tensor]) -> None:
    first, *others = (result.float().cpu() for result in results.values())
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-4, rtol=0)


def main() -> None:
    args = read_arguments(__doc__, rounds=9, cuda=True, dtypes=True)
    size = clip_models.quick(B32) if args.quick else B32
    texts = captions(16 if args.quick else 2048 if args.device == "cuda" else 256)
    lengths = [len(row) for row in tokenizers()[0](texts)["input_ids"]]
    mean = round(sum(lengths) / len(lengths))
    spread = f"Captions have {min(lengths)} to {max(lengths)} tokens, {sum(lengths) / len(lengths):.1f} on average."
    report = Report("text_encoding", "Encoding captions with CLIP ViT-B/32", args, [*NOTES, spread])

    equal = replace(size, context=mean, num_tokens=mean, batch_size=len(texts))
    documented = replace(size, context=DOCUMENTED_CONTEXT)
    for case, shape in ((f"equal lengths ({mean} tokens)", equal), ("as documented", documented)):
        models = {name: model.eval() for name, model in clip_models.build_all(shape, args.device).items()}
        if shape is equal:
            contenders = from_ids(models, clip_models.random_ids(equal, args.device))
        else:
            contenders = from_strings(models, texts, args.device)
        with torch.inference_mode():
            assert_equal({name: encode() for name, encode in contenders.items()})
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                costs = interleave(contenders, args.rounds)
        report.add(f"{len(texts)} captions, {case}", costs)
    report.finish()


if __name__ == "__main__":
    main()
