"""One number that changes with any bit of a frozen module, and with nothing else."""

import pytest
import torch
from torch import nn

from hf_mm.composite.fingerprint import fingerprint


def module(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Conv2d(2, 2, 3), nn.Embedding(5, 2))
    return layers.to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.data.reshape(-1).view(torch.uint8)


def test_it_is_the_same_in_every_process():
    """BLAKE2b of ``["count", "torch.int64", []]``, the bytes of 7, ``["weight", "torch.float32", [2, 2]]`` and those of
    four floats, worked out with `struct`."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, -0.5]])
    layer.register_buffer("count", torch.tensor(7))
    assert fingerprint(layer) == "d9f235f6e893a37deef5d870b7ee8257"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_bit_of_any_parameter_or_buffer_changes_it(dtype):
    layers = module(dtype)
    found = {fingerprint(layers)}
    tensors = layers.state_dict()
    for tensor in tensors.values():
        bits(tensor)[-1] ^= 1
        found.add(fingerprint(layers))
        bits(tensor)[-1] ^= 1
    assert len(found) == 1 + len(tensors) == 1 + 2 + 5 + 2 + 1
    assert fingerprint(layers) in found


def test_names_dtype_and_shape_change_it():
    weight = nn.Parameter(torch.arange(4.0))
    zeros = [torch.zeros(4, dtype=torch.float16), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(2, 2).half()]
    variants = [nn.ParameterDict({"a": weight}), nn.ParameterDict({"b": weight})]
    variants += [nn.ParameterDict({"a": nn.Parameter(tensor)}) for tensor in zeros]
    assert len({fingerprint(variant) for variant in variants}) == len(variants)


def test_values_that_move_between_tensors_change_it():
    one, other = torch.zeros(2), torch.ones(2)
    assert fingerprint(nn.ParameterDict({"a": one, "b": other})) != fingerprint(
        nn.ParameterDict({"a": other, "b": one})
    )


def test_memory_layout_and_order_and_ties_do_not():
    layers, strided = module(), module()
    expected = fingerprint(layers)
    strided[0].weight.data = strided[0].weight.data.T.contiguous().T
    strided = strided.to(memory_format=torch.channels_last)
    assert not strided[0].weight.is_contiguous() and not strided[2].weight.is_contiguous()
    assert fingerprint(strided) == expected

    names = ["0", "1", "2", "3"]
    reverse = nn.ModuleDict({name: layers[int(name)] for name in reversed(names)})
    assert fingerprint(reverse) == expected

    tied, untied = (nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(2)]) for _ in range(2))
    tied[1].weight = tied[0].weight
    for layer in untied:
        layer.weight.data = tied[0].weight.data.clone()
    assert fingerprint(tied) == fingerprint(untied)


def test_training_mode_and_gradients_do_not():
    layers = module()
    expected = fingerprint(layers)
    assert fingerprint(layers.requires_grad_(False).eval()) == expected


def test_scalars_and_empty_tensors_count():
    layer = nn.Module()
    layer.register_buffer("scalar", torch.tensor(1.5))
    layer.register_buffer("empty", torch.empty(0, 3))
    before = fingerprint(layer)
    layer.empty = torch.empty(3, 0)
    assert fingerprint(layer) != before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_is_the_same_on_a_gpu():
    assert fingerprint(module().cuda()) == fingerprint(module())


def test_tensors_without_values_are_refused():
    with torch.device("meta"):
        layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="bias is on the meta device"):
        fingerprint(layer)
