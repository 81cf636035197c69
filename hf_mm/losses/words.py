"""Word warm-up: soft tokens learn the words of a caption in a language model's embedding space, without running it."""

from __future__ import annotations

import torch
from torch import nn

from .contrastive import at_least_float32

IGNORED = -100
PULL = 0.3  # weight of the distance beside the cross-entropy


def word_loss(
    soft_tokens: torch.Tensor, words: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft token k is told apart as the k-th token of its picture's caption, and drawn to it.

    The logit of a word is `scale` times the product of the soft token with the word's embedding, from which the mean of
    all `words` is subtracted: what every embedding has in common tells no word from another. The unit of products is the
    mean squared distance of words from their mean, so that embeddings of any size do alike. To the cross-entropy `PULL`
    times the squared distance from the right word is added, in the same unit. What a picture leaves open then becomes a
    mean of words, which a language model reads more easily than a vector far from all of them. This warm-up is this
    project's own. It costs next to nothing beside a pass through the language model, and teaches where in the language
    model's space the words of a picture lie.

    Args:
        soft_tokens: ``(B, K, D)``, of K queries.
        words: ``(V, D)``, embeddings of the words that captions use.
        targets: ``(B, K)`` rows of `words`, `IGNORED` where there is none.
        scale: of the logits: about that of a soft token that is its word.

    Returns:
        The mean over targets, in float32 at least, and the share of them whose word scores best.

    Raises:
        ValueError: shapes do not fit.
    """
    if soft_tokens.shape[:2] != targets.shape or soft_tokens.shape[-1:] != words.shape[-1:]:
        raise ValueError(
            f"soft tokens {tuple(soft_tokens.shape)}, words {tuple(words.shape)} and targets {tuple(targets.shape)} must "
            "be (B, K, D), (V, D) and (B, K)."
        )
    soft_tokens, words = at_least_float32(soft_tokens), at_least_float32(words)
    with torch.autocast(soft_tokens.device.type, enabled=False):
        soft_tokens, centred = soft_tokens.flatten(0, 1), words - words.mean(dim=0)
        spread = centred.square().sum(dim=-1).mean()
        logits = scale / spread * (soft_tokens @ centred.T)
    targets = targets.flatten()
    told = targets != IGNORED
    count = told.sum().clamp(min=1)
    entropy = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / count
    misses = (soft_tokens - words[targets.where(told, 0)]).square().sum(dim=-1)
    distance = (misses * told).sum() / count / spread
    right = ((logits.argmax(dim=-1) == targets) & told).sum() / count
    return entropy + PULL * distance, right.detach()
