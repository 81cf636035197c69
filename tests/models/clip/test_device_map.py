"""F30: a model whose parts lie on several devices, some of them on disk, answers as before."""

import pytest
import torch
from accelerate import infer_auto_device_map
from contract.cases import CASES
from torch import nn

DUAL = [case for case in CASES if case.model_type == "mm_clip"]


@pytest.fixture
def folder(case, tmp_path):
    case.build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def open_mapped(case, folder, device_map, offload):
    return case.auto_class.from_pretrained(folder, device_map=device_map, offload_folder=offload)


def assert_same_answers(case, mapped):
    batch = case.batch(3)
    with torch.no_grad():
        expected, ours = case.build()(**batch), mapped(**batch)
    for name in ("logits_per_image", "image_embeds", "text_embeds", "loss"):
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", DUAL, ids=str)
@pytest.mark.parametrize("on_disk", ["text_model", "vision_model"])
def test_one_tower_on_disk(case, on_disk, folder, tmp_path):
    parts = [name for name, part in case.build().named_children() if list(part.parameters())]
    device_map = {name: "disk" if name == on_disk else "cpu" for name in (*parts, "logit_scale")}
    mapped = open_mapped(case, folder, device_map, tmp_path / "offload")
    tower = mapped.get_submodule(on_disk)
    assert all(parameter.is_meta for parameter in tower.parameters())
    assert_same_answers(case, mapped)


@pytest.mark.parametrize("case", DUAL, ids=str)
def test_a_map_for_little_memory(case, folder, tmp_path):
    """What a block adds up stays with it, and so do loose parameters with what uses them."""
    model = case.build()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    limit = {"cpu": 3 * size // 4, "disk": 10 * size}
    device_map = infer_auto_device_map(model, max_memory=limit, no_split_module_classes=model._no_split_modules)
    assert set(device_map.values()) == {"cpu", "disk"}
    names = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    assert not [name for name in names for key in device_map if key.startswith(f"{name}.")]
    assert_same_answers(case, open_mapped(case, folder, device_map, tmp_path / "offload"))


@pytest.mark.parametrize("case", DUAL, ids=str)
def test_every_loose_parameter_belongs_to_a_part_that_stays_whole(case):
    """A parameter that is not a layer's own (a class token, a table of positions) moves with the module that adds it."""
    model = case.build()
    layers = (nn.Linear, nn.Embedding, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm)
    for name, module in model.named_modules():
        loose = [child for child, _ in module.named_parameters(recurse=False)]
        if loose and not isinstance(module, layers):
            assert module is model or type(module).__name__ in model._no_split_modules, f"{name}: {loose}"
