"""Converts a published BLIP-2, as ``hf-mm convert blip2`` does.

``python conversion/convert_blip2.py blip2_pretrained.pth OUT --vision eva_vit_g.pth``

Of stage 2: ``… blip2_pretrained_opt2.7b.pth OUT --vision eva_vit_g.pth --language-model facebook/opt-2.7b``
"""

import sys

from hf_mm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "blip2", *sys.argv[1:]]))
