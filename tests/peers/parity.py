"""Ours and a peer with the same weights: the largest error of every output and of every gradient of the loss."""

from collections.abc import Callable

import torch
from contract.cases import largest_error
from torch import nn

Find = Callable[[str], tuple[str, Callable[[torch.Tensor], torch.Tensor]]]

BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5}


def perturbed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in eval mode, every parameter, those of norms and biases too, moved off its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def share_weights(model: nn.Module, peer: nn.Module, find: Find) -> nn.Module:
    """Gives `peer` the weights of `model`, in its dtype; every number of the peer must be one of ours.

    Args:
        model: ours.
        peer: theirs.
        find: our name of a parameter to the peer's, and the part of theirs that is ours, as a view of our shape.
    """
    peer = peer.to(next(model.parameters()).dtype).eval()
    theirs = dict(peer.named_parameters())
    with torch.no_grad():
        for parameter in theirs.values():
            parameter.fill_(torch.nan)
        for name, parameter in model.named_parameters():
            their_name, part = find(name)
            target = part(theirs[their_name])
            assert target.shape == parameter.shape, name
            target.copy_(parameter)
    unfilled = [name for name, parameter in theirs.items() if parameter.isnan().any()]
    assert not unfilled, f"the peer alone has {unfilled}"
    return peer


def output_errors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """max |difference| / max |theirs| of each output."""
    assert set(ours) == set(theirs)
    return {name: largest_error(ours[name], theirs[name]) for name in ours}


def gradient_errors(
    model: nn.Module, loss: torch.Tensor, peer: nn.Module, peer_loss: torch.Tensor, find: Find
) -> dict[str, float]:
    """max |difference| / max |theirs| of the gradient of each of our parameters.

    The softmax takes no notice of a bias of the keys: that gradient is rounding error around zero, and is measured
    against the largest of all.
    """
    loss.backward()
    peer_loss.backward()
    theirs = {name: parameter.grad for name, parameter in peer.named_parameters()}
    largest = max(gradient.abs().max() for gradient in theirs.values())
    errors = {}
    for name, parameter in model.named_parameters():
        their_name, part = find(name)
        reference = part(theirs[their_name])
        if "k_proj.bias" in name:
            errors[name] = ((parameter.grad - reference).abs().max() / largest).item()
        else:
            errors[name] = largest_error(parameter.grad, reference)
    return errors


def worst(errors: dict[str, float]) -> tuple[float, str]:
    return max((error, name) for name, error in errors.items())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def third(of: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The rows of queries, keys or values in a fused projection, which come in this order."""
    return lambda tensor: tensor.chunk(3)["qkv".index(of)]
