"""Tables of names between two layouts of the same weights, read in either direction.

A table is a sequence of rules. A rule names tensors of the source layout and of the target layout; placeholders in braces
stand for one part of a name (``{i}``, no dots) or for any rest (``{rest*}``), and bind alike on both sides:

    rename("visual.ln_pre.{p}", "vision_model.pre_layrnorm.{p}")
    split("resblocks.{i}.attn.in_proj_{p}", ["layers.{i}.q_proj.{p}", "layers.{i}.k_proj.{p}", "layers.{i}.v_proj.{p}"])
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

Transform = Callable[[list[torch.Tensor]], list[torch.Tensor]]
PLACEHOLDER = re.compile(r"\\\{(\w+)(\\\*)?\\\}")
MAX_NAMES = 8  # in an error message
MAX_LENGTH = 300  # characters of each of them, and of the errors of other libraries


class ConversionError(ValueError):
    """A checkpoint does not fit the table of names, or the model: the message lists the names."""


@dataclass(frozen=True)
class Rule:
    """n tensors of the source layout are m tensors of the target layout.

    Args:
        sources: patterns of the source layout's names.
        targets: patterns of the target layout's names; none for what is read and dropped.
        forward: source tensors to target tensors, in the order of the patterns, in torch operations alone (checks run
            them on the meta device).
        backward: its inverse.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    forward: Transform
    backward: Transform

    def inverse(self) -> Rule:
        """The rule from the target layout to the source layout."""
        return Rule(self.targets, self.sources, self.backward, self.forward)


def rename(source: str, target: str) -> Rule:
    """The same tensor under another name."""
    return Rule((source,), (target,), list, list)


def transpose(source: str, target: str) -> Rule:
    """A matrix stored the other way round: an ``x @ P`` against a Linear, or a Flax kernel."""
    return Rule((source,), (target,), lambda tensors: [tensors[0].T], lambda tensors: [tensors[0].T])


def split(source: str, targets: Sequence[str], dim: int = 0) -> Rule:
    """One fused tensor, such as ``in_proj_weight``, is several of equal size along `dim`."""
    return Rule(
        (source,),
        tuple(targets),
        lambda tensors: list(tensors[0].chunk(len(targets), dim)),
        lambda tensors: [torch.cat(tensors, dim)],
    )


def reshape(source: str, target: str, forward: Sequence[int], backward: Sequence[int]) -> Rule:
    """The same numbers in another shape, such as a logit scale ``()`` as ``(1,)``."""
    return Rule(
        (source,),
        (target,),
        lambda tensors: [tensors[0].reshape(tuple(forward))],
        lambda tensors: [tensors[0].reshape(tuple(backward))],
    )


def drop(*sources: str) -> list[Rule]:
    """Names that the target layout has no use for: read, and not written back."""
    return [Rule((source,), (), lambda tensors: [], lambda tensors: []) for source in sources]


def inverse(rules: Iterable[Rule]) -> list[Rule]:
    """The table read from right to left."""
    return [rule.inverse() for rule in rules]


@dataclass(frozen=True)
class Step:
    """One rule with its placeholders bound: which tensors become which."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transform: Transform


def plan(rules: Iterable[Rule], sources: Iterable[str], targets: Iterable[str] | None = None) -> list[Step]:
    """Binds a table to the names of a checkpoint, and accounts for every name on both sides.

    Args:
        rules: the table.
        sources: names of the checkpoint.
        targets: names that the model has; None takes what the table gives.

    Returns:
        The steps, in the order of the table.

    Raises:
        ConversionError: a name of the checkpoint that no rule reads or two rules read, a name of the model that no rule
            sets or two rules set, or a rule that finds some of its tensors but not all.
    """
    sources = set(sources)
    steps = [step for rule in rules for step in _bind(rule, sources)]
    read = [name for step in steps for name in step.sources]
    written = [name for step in steps for name in step.targets]
    targets = set(written) if targets is None else set(targets)
    complaints = [
        ("holds keys that this layout does not have", sources - set(read)),
        ("lacks", set(read) - sources),
        ("has nothing for the model's", targets - set(written)),
        ("has what the model has no place for, its", set(written) - targets),
        ("holds keys that two rules read", _repeated(read)),
        ("gives two tensors for", _repeated(written)),
    ]
    found = [f"it {complaint} {listed(names)}" for complaint, names in complaints if names]
    if found:
        raise ConversionError(f"The checkpoint does not fit: {'; '.join(found)}.")
    return steps


def run(steps: Iterable[Step], tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the target tensors with their names one step at a time; nothing else is held."""
    for step in steps:
        results = step.transform([tensors[name] for name in step.sources])
        yield from zip(step.targets, results, strict=True)


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first few, and how many more there are."""
    names = [f"{name:.{MAX_LENGTH}}" for name in sorted(names)]
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def first_line(error: BaseException) -> str:
    """What an error says, for a sentence: its first line, without the full stop, or else its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")[:MAX_LENGTH]


def _bind(rule: Rule, names: set[str]) -> Iterator[Step]:
    """A step for every binding of the placeholders that at least one source name has."""
    bindings = {}
    for pattern in map(_compiled, rule.sources):
        for name in names:
            if match := pattern.fullmatch(name):
                bindings[tuple(sorted(match.groupdict().items()))] = match.groupdict()
    for _, binding in sorted(bindings.items()):
        sources, targets = (
            tuple(_filled(pattern, binding) for pattern in patterns) for patterns in (rule.sources, rule.targets)
        )
        yield Step(sources, targets, rule.forward)


def _compiled(pattern: str) -> re.Pattern:
    def group(match: re.Match) -> str:
        return f"(?P<{match[1]}>{'.+' if match[2] else '[^.]+'})"

    return re.compile(PLACEHOLDER.sub(group, re.escape(pattern)))


def _filled(pattern: str, binding: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\*?\}", lambda match: binding[match[1]], pattern)


def _repeated(names: list[str]) -> set[str]:
    seen = set()
    return {name for name in names if name in seen or seen.add(name)}
