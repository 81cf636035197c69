"""Ours against named peers, one script a claim, figures in results/."""

from . import torchvision_schemas  # noqa: F401 - before anything imports transformers
