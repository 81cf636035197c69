"""Lets the published torchvision wheel import beside a CPU build of torch. Import this before torchvision, transformers, timm.

The wheel's compiled operators need CUDA's libraries. Its Python code asks only for the schemas of two of them, so with
these two lines transforms and models work; the compiled operators (non-maximum suppression) do not.
"""

from importlib.util import find_spec

import torch

BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

if find_spec("torchvision") and not torch.cuda.is_available():
    LIBRARY = torch.library.Library("torchvision", "DEF")  # kept: the schemas go with it
    for name in ("nms", "qnms"):
        LIBRARY.define(name + BOXES)
