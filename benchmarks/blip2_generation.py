"""Captions by BLIP-2: beams against transformers around the same language model, and greedy against that model bare.

.venv-peers/bin/python -m benchmarks.blip2_generation [--device cuda] [--threads N] [--quick]

`make language-model` comes first: the language model is SmolLM2-135M.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks import blip2_models
from benchmarks.blip2_models import B16, PROMPT, Size
from benchmarks.harness import interleave, read_arguments, synchronize
from benchmarks.report import OURS, Report
from hf_mm.composite.language_model import embed_with_slots

PEER, BARE = "transformers", "bare language model"
NUM_BEAMS, NEW_TOKENS = 5, 30
EXACTLY = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
NOTES = [
    f"Prompts of one picture and {PROMPT} tokens, equal for all rows but for the picture; exactly {NEW_TOKENS} new tokens.",
    f"{NUM_BEAMS} beams: hf_mm and transformers have the same weights, the language model even the same module, whose "
    "`generate` both call: the difference is what each does before. New ids of both are compared first. The time is that of "
    "the whole call, picture tower included.",
    "A token, greedy: the time from the first new token to the last, over the tokens between: what reading pictures and "
    "prompt takes is not in it. The bare language model is given the embeddings that hf_mm computed of pictures and prompt; "
    "new ids of both are compared first.",
    "The whole call, greedy, for information: of hf_mm with the tower and the Q-Former, of the bare language model without.",
    "The language model is SmolLM2-135M-Instruct with its weights (`make language-model` fetches it); tower and Q-Former "
    "have random ones, so that the texts mean nothing.",
]
Generate = Callable[..., torch.Tensor]


class Clock(StoppingCriteria):
    """Reads the time at every new token; never stops."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @property
    def seconds_per_token(self) -> float:
        """Of those after the first."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


class Timed:
    """One greedy contender, which measures itself: seconds a token; those of whole calls are kept beside."""

    def __init__(self, generate: Generate):
        self.generate = generate
        self.calls: list[float] = []

    def __call__(self) -> float:
        clock, start = Clock(), time.perf_counter()
        self.generate(**EXACTLY, stopping_criteria=StoppingCriteriaList([clock]))
        synchronize()
        self.calls.append(time.perf_counter() - start)
        return clock.seconds_per_token


class Contenders:
    """Three ways to ``(B, 30)`` new ids."""

    def __init__(self, size: Size, device: str):
        self.ours = blip2_models.build_stage2(size).to(device).eval()
        self.theirs = blip2_models.peer_of(self.ours).eval()
        self.pixels, self.prompts = blip2_models.random_pixels(size, device), blip2_models.prompts(size, device)
        ids = blip2_models.peer_ids(size.text_config, self.prompts["input_ids"])
        self.their_prompts = {**self.prompts, "input_ids": ids}
        self.embeds = self._embeds()

    @torch.no_grad()
    def _embeds(self) -> torch.Tensor:
        """``(B, T, D)``: what the language model reads of pictures and prompts."""
        soft_tokens = self.ours.get_image_features(pixel_values=self.pixels).pooler_output
        ids = self.prompts["input_ids"]
        return embed_with_slots(self.ours.language_model, ids, ids == blip2_models.SLOT, soft_tokens)

    def hf_mm(self, **kwargs) -> torch.Tensor:
        return self.ours.generate(pixel_values=self.pixels, **self.prompts, **kwargs)[:, -NEW_TOKENS:]

    def transformers(self, **kwargs) -> torch.Tensor:
        return self.theirs.generate(pixel_values=self.pixels, **self.their_prompts, **kwargs)[:, -NEW_TOKENS:]

    def bare(self, **kwargs) -> torch.Tensor:
        mask = self.prompts["attention_mask"]
        return self.ours.language_model.generate(inputs_embeds=self.embeds, attention_mask=mask, **kwargs)

    def check(self) -> dict[str, int]:
        """Compares what they say, and counts how often each runs its picture tower in one call.

        Raises:
            AssertionError: new ids of the contenders differ, or ours runs the tower more than once.
        """
        counted = {OURS: Passes(self.ours.vision_tower), PEER: Passes(self.theirs.vision_model)}
        beams = {name: way(**EXACTLY, num_beams=NUM_BEAMS) for name, way in self.beams().items()}
        numbers = {name: passes.stop() for name, passes in counted.items()}
        assert torch.equal(*beams.values()), f"new ids of the beams differ: {beams}"
        assert beams[OURS].shape[1] == NEW_TOKENS
        greedy = {name: way(**EXACTLY) for name, way in self.greedy().items()}
        assert torch.equal(*greedy.values()), f"new ids of the greedy searches differ: {greedy}"
        assert numbers[OURS] == 1, f"the tower ran {numbers[OURS]} times in one call"
        return numbers

    def beams(self) -> dict[str, Generate]:
        return {OURS: self.hf_mm, PEER: self.transformers}

    def greedy(self) -> dict[str, Generate]:
        return {OURS: self.hf_mm, BARE: self.bare}


class Passes:
    """Counts the calls of a module from now on."""

    def __init__(self, module: nn.Module):
        self.number = 0
        self.hook = module.register_forward_hook(self._count)

    def _count(self, *_) -> None:
        self.number += 1

    def stop(self) -> int:
        self.hook.remove()
        return self.number


def measure(report: Report, size: Size) -> None:
    rounds, contenders = report.args.rounds, Contenders(size, report.args.device)
    numbers = contenders.check()
    told = ", ".join(f"{name} {number}" for name, number in numbers.items())
    report.notes = [*report.notes, f"The picture tower runs so often in one call with beams: {told}."]
    calls = {name: partial(way, **EXACTLY, num_beams=NUM_BEAMS) for name, way in contenders.beams().items()}
    costs = interleave(calls, rounds, warmup=1)
    report.add(f"{size.title}: {NEW_TOKENS} tokens, {NUM_BEAMS} beams", costs, at_least=1.0)
    timed = {name: Timed(way) for name, way in contenders.greedy().items()}
    report.add(f"{size.title}: a token, greedy", interleave(timed, rounds, warmup=1), at_least=0.95)
    wholes = {name: way.calls[-rounds:] for name, way in timed.items()}
    report.add(f"{size.title}: {NEW_TOKENS} tokens, greedy, the whole call", wholes)


def main() -> None:
    args = read_arguments(__doc__, rounds=4, cuda=True)
    report = Report("blip2_generation", "Captions by BLIP-2", args, NOTES)
    measure(report, blip2_models.quick(B16) if args.quick else B16)
    report.finish()


if __name__ == "__main__":
    main()
