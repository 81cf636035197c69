"""What tests ask of `opener.py`: the jobs of a case of the contract, and what hf_mm itself answers to them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from hf_mm import MODELS
from hf_mm.hub.standalone import standalone_changes

OPENER = Path(__file__).parent / "opener.py"
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def write_standalone(folder: Path, shim: bool = False) -> None:
    """Makes a saved folder one that opens without hf_mm, as a push does in its commit."""
    for name, text in standalone_changes(folder, shim).items():
        (folder / name).write_text(text, encoding="utf-8")


def job_of(case, source: str | Path, save: bool = False) -> dict:
    """Opens a case's model by every AutoClass of the table, what prepares its inputs, and its pipelines."""
    raw, entry = case.raw(3), MODELS[case.model_type]
    images = {"images": [torch.from_numpy(np.array(image)) for image in raw["images"]]}
    text = {"text": raw["text"]}
    prepare = {}
    if entry.processor:
        whole = {**images, **text, "suffix": raw["suffix"]}
        prepare["AutoProcessor"] = {name: value for name, value in whole.items() if name in case.inputs}
    if "images" in case.inputs:
        prepare["AutoImageProcessor"] = images
    if "text" in case.inputs:
        prepare["AutoTokenizer"] = {**text, "padding": True}
    own = [auto for auto, model in entry.models.items() if model is case.model_class]
    labels = {"labels": torch.arange(3) % case.config().num_labels} if "labels" in case.inputs else {}
    return {
        "source": str(source),
        "models": [auto.__name__ for auto in own],
        "prepare": prepare,
        "labels": labels,
        "tasks": case.tasks,
        "first": "AutoConfig",
        "save": save,
    }


def run_opener(
    jobs: dict[str, dict[str, dict]], folder: Path, environment: dict[str, str]
) -> dict[str, dict[str, dict]]:
    """The answers to jobs by name, for each way that hf_mm can stand: in fresh processes that start in an empty folder."""
    for mode, named in jobs.items():
        for name, job in named.items():
            (folder / mode / name).mkdir(parents=True)
            torch.save(job, folder / mode / name / "job.pt")
    (folder / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-I", OPENER, folder],
        cwd=folder / "empty",
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home"), **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return {mode: {name: torch.load(folder / mode / name / "answer.pt") for name in jobs[mode]} for mode in jobs}


def assert_same_answers(found: dict, expected: dict) -> None:
    """The same bits in every output, batch and pipeline."""
    for kind in ("outputs", "batches"):
        assert set(found[kind]) == set(expected[kind])
        for auto_class, values in expected[kind].items():
            assert set(found[kind][auto_class]) == set(values)
            assert len(values) >= 1
            for name, value in values.items():
                same = torch.equal(*(tensor.nan_to_num(nan=-1.0) for tensor in (found[kind][auto_class][name], value)))
                assert same, f"{auto_class}: {name}"
    assert all(expected["pipelines"][task] == answer for task, answer in found["pipelines"].items())
    assert found["loading"] == expected["loading"]
    assert not any(keys for info in found["loading"].values() for keys in info.values())
