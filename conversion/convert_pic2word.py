"""Converts the authors' Pic2Word, as ``hf-mm convert pic2word`` does.

``python conversion/convert_pic2word.py pic2word_model.pt OUT --clip openai/clip-vit-large-patch14 --check``
"""

import sys

from hf_mm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "pic2word", *sys.argv[1:]]))
