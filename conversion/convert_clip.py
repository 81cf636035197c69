"""Converts a published CLIP, as ``hf-mm convert clip`` does: ``python conversion/convert_clip.py SOURCE OUT --check``."""

import sys

from hf_mm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "clip", *sys.argv[1:]]))
