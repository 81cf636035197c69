"""Converts a published ViT, as ``hf-mm convert vit`` does: ``python conversion/convert_vit.py SOURCE OUT --check``."""

import sys

from hf_mm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "vit", *sys.argv[1:]]))
