"""Row 2: what is saved opens in a fresh process and answers with the same bits."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from .cases import FOLDER, cases_for, trained

EVERY = pytest.mark.parametrize("case", cases_for(2), ids=str)
WITH_PROCESSOR = pytest.mark.parametrize("case", cases_for(2, lambda case: case.has_processor), ids=str)


def folder_of(case) -> str:
    return case.name.replace(" ", "_").replace(",", "")


def as_arrays(raw: dict) -> dict:
    """Pictures as tensors, which need no pickle on their way to the other process."""
    return {**raw, "images": [torch.from_numpy(np.array(image)) for image in raw["images"]]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with every case's model and processor, opened once in another process."""
    root = tmp_path_factory.mktemp("saved")
    for case in cases_for(2):
        folder = root / folder_of(case)
        case.build().save_pretrained(folder)
        batch = case.batch(3)
        if case.has_processor:
            case.preparer.save_pretrained(folder)
        labelled = "labels" in case.inputs
        raw = {
            "auto_class": case.auto_class.__name__,
            "inputs": {name: value for name, value in as_arrays(case.raw(3)).items() if name in case.inputs},
            "options": {"padding": True} if case.inputs == ("text",) else {},
            "labels": {"labels": batch["labels"]} if labelled else {},
            "batch": None if case.has_processor else batch,
        }
        torch.save(raw, folder / "raw.pt")
    subprocess.run([sys.executable, FOLDER / "fresh_process.py", root], check=True)
    return root


@pytest.fixture
def answer(saved, case):
    return torch.load(saved / folder_of(case) / "answer.pt")


@EVERY
def test_outputs_are_bit_equal(case, answer):
    model, batch = case.build(seeded=False), case.batch(3)
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = model(**batch)
    expected = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    assert set(answer["outputs"]) == set(expected)
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(answer["outputs"][name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    buffers = dict(model.named_buffers())
    assert set(answer["buffers"]) == set(buffers)
    assert all(torch.equal(answer["buffers"][name], buffer) for name, buffer in buffers.items())


@EVERY
def test_the_classes_of_the_table_are_opened(case, answer):
    assert answer["model_class"] == case.model_class.__name__
    assert not answer["training"]
    expected = case.build().config.to_dict()
    ignored = {"dtype", "architectures", "transformers_version", "_name_or_path"}

    def as_json(config):
        return {
            key: as_json(value) if isinstance(value, dict) else list(value) if isinstance(value, tuple) else value
            for key, value in config.items()
            if key not in ignored
        }

    assert as_json(answer["config"]) == as_json(expected)


@WITH_PROCESSOR
def test_processors_keep_every_setting(case, answer):
    assert answer["prepare_class"] == type(case.preparer).__name__
    expected = {name: value for name, value in case.batch(3).items() if name != "labels" or case.speaks}
    assert set(answer["batch"]) == set(expected)
    for name, value in expected.items():
        assert torch.equal(answer["batch"][name], value), name


@EVERY
def test_no_key_is_missing_unexpected_or_mismatched(case, answer):
    assert {name: keys for name, keys in answer["loading"].items() if keys} == {}


@EVERY
def test_safetensors_hold_every_weight_once_and_nothing_else_does(case, saved):
    folder = saved / folder_of(case)
    suffixes = {path.suffix for path in folder.iterdir() if path.name not in ("raw.pt", "answer.pt")}
    assert suffixes <= {".safetensors", ".json", ".txt"}
    with safe_open(folder / "model.safetensors", "pt") as stored:
        shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    model = case.build()
    weights = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = len(weights) - len({value.data_ptr() for value in model.state_dict().values()})
    assert len(shapes) == len(weights) - tied
    assert set(shapes) <= set(weights)
    assert all(weights[name] == shape for name, shape in shapes.items())
    assert all(parameter.ndim for parameter in trained(model).values())
