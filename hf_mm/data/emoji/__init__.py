"""Real pictures that ship with the package: emoji by four artists, with names, tags, groups, skin tones and splits."""

from .loading import FEATURES, SPLITS, STYLES, load_emoji
from .transforms import normalize_size

__all__ = ["FEATURES", "SPLITS", "STYLES", "load_emoji", "normalize_size"]
