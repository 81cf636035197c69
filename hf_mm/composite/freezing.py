"""What frozen means: parameters and buffers stay bit-equal, whatever `train()` says, and checkpointing still works.

A part is frozen where none of its own parameters trains. A part *upstream* of everything that trains (a picture tower
under a connector) runs without gradients. A part *downstream* (a text tower behind new words) stays in the graph: its
gradients flow through to what trains, and its blocks are computed again in backward where checkpointing is on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def freeze(module: nn.Module) -> nn.Module:
    """Takes every parameter of a module out of training, and the module into eval mode. Returns the module."""
    return module.requires_grad_(False).eval()


def is_trained(module: nn.Module) -> bool:
    """Whether any parameter trains, one of an adapter included."""
    return any(parameter.requires_grad for parameter in module.parameters())


def upstream(*modules: nn.Module) -> AbstractContextManager:
    """The context in which parts run that nothing trained feeds: without gradients unless one of them trains itself."""
    return nullcontext() if any(map(is_trained, modules)) else torch.no_grad()


def hold_frozen(module: nn.Module) -> None:
    """Puts back into eval mode whatever of a module does not train, and makes checkpointing work there.

    What trains is left as it is: layers of the module that train themselves, with the Dropout right in them, and adapters,
    whose dropout is their own.
    """
    if not _hold(module, {id(adapter) for adapter in _adapters(module)}):
        module.training = False


def _hold(module: nn.Module, adapters: set[int]) -> bool | None:
    """Whether a module trains, its adapters apart, or None where it has no parameters, as a Dropout, which goes by what it
    stands in. Lowers the flags below it."""
    below = [(child, _hold(child, adapters)) for child in module.children() if id(child) not in adapters]
    own = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
    own += [child_trains for _, child_trains in below if child_trains is not None]
    trains = any(own) if own else None
    for child, child_trains in below:
        if child_trains is False:
            child.training = False
        elif child_trains is None and trains is False:
            child.eval()
    if isinstance(module, GradientCheckpointingLayer):
        module._is_held = not trains
        if module._is_held and module.gradient_checkpointing and not hasattr(module, "_lowers_flag"):
            module.register_forward_pre_hook(_raise_flag)
            module._lowers_flag = module.register_forward_hook(_lower_flag, always_call=True)
    return trains


def checkpoints_unheld(layer: nn.Module) -> bool:
    """Whether checkpointing was switched on in a block after it was last held."""
    return getattr(layer, "gradient_checkpointing", False) is True and not hasattr(layer, "_lowers_flag")


def has_adapters(module: nn.Module) -> bool:
    """Whether PEFT has put anything inside a module."""
    return next(_adapters(module), None) is not None


def _adapters(module: nn.Module) -> Iterator[nn.Module]:
    """What PEFT has put inside a module: of each of its wrappers all but the layer that is wrapped."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for wrapper in module.modules():
        if isinstance(wrapper, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            for name, child in wrapper.named_children():
                if name not in ("base_layer", "original_module"):
                    yield child


def _raise_flag(layer: GradientCheckpointingLayer, args: tuple) -> None:
    """A block checkpoints in training mode only, in which dropout written into its forward would act: the flag of a
    held block is up while it decides, and down while it computes and at all other times."""
    if layer._is_held and layer.gradient_checkpointing and torch.is_grad_enabled():
        if not isinstance(layer._gradient_checkpointing_func, _InEvalMode):
            layer._gradient_checkpointing_func = _InEvalMode(layer, layer._gradient_checkpointing_func)
        layer.training = True


def _lower_flag(layer: GradientCheckpointingLayer, args: tuple, output: object) -> None:
    if layer._is_held:
        layer.training = False


class _InEvalMode:
    """A checkpointing function that lowers its layer's flag while the layer computes, the second time too."""

    def __init__(self, layer: nn.Module, checkpoint: Callable):
        self.layer, self.checkpoint = layer, checkpoint

    def __call__(self, function: Callable, *args):
        return self.checkpoint(self._compute, function, *args)

    def _compute(self, function: Callable, *args):
        if self.layer._is_held:
            self.layer.training = False
        return function(*args)
