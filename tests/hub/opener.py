"""Opens models as others would, and writes down what they answer.

    python -I opener.py FOLDER

FOLDER holds a folder for each way that hf_mm can stand: "without" (it cannot be imported), "bare" (ftfy cannot either),
"beside" (it can but is not) and "with" (it is imported first). Remote code is trusted in the first three. Each is a process
of its own; in "beside" each job is.
In these lie the jobs, each a folder with ``job.pt``:

    source: folder or id of the model
    models: names of AutoClasses
    prepare: names of AutoClasses of what prepares the inputs, and for each its arguments
    labels: further inputs of the models
    tasks: pipelines
    first: name of the AutoClass that is asked before any other
    save: whether everything is saved again, to ``again``, and opened from there (without pipelines)
"""

import json
import logging
import os
import sys
import traceback
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import pipeline

LABELS = ["red square", "circle", "line"]


def answers(source: str, job: dict, **trust) -> dict:
    """What a model says, opened by every AutoClass of the job."""

    def opened(auto_class: str, **options):
        return getattr(transformers, auto_class).from_pretrained(source, **trust, **options)

    opened(job["first"])
    classes, batches, outputs, loading = {"AutoConfig": type(opened("AutoConfig"))}, {}, {}, {}
    for auto_class, inputs in job["prepare"].items():
        prepare = opened(auto_class)
        classes[auto_class] = type(prepare)
        batches[auto_class] = dict(prepare(**inputs, return_tensors="pt"))
    for auto_class in job["models"]:
        model, loading[auto_class] = opened(auto_class, output_loading_info=True)
        classes[auto_class] = type(model)
        torch.manual_seed(0)  # of what a loss draws
        with torch.no_grad():
            found = model(**next(iter(batches.values())), **job["labels"])
        outputs[auto_class] = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    return {
        "classes": {name: f"{own.__module__}.{own.__qualname__}" for name, own in classes.items()},
        "outputs": outputs,
        "batches": batches,
        "loading": {
            name: {kind: sorted(map(str, keys)) for kind, keys in info.items()} for name, info in loading.items()
        },
        "pipelines": {task: json.dumps(asked(task, source, job, trust)) for task in job["tasks"]},
    }


def asked(task: str, source: str, job: dict, trust: dict) -> list:
    pipe = pipeline(task, model=source, **trust)
    inputs = next(iter(job["prepare"].values()))
    if "images" in inputs:
        pictures = [Image.fromarray(pixels.numpy()) for pixels in inputs["images"]]
        return pipe(pictures, **({"candidate_labels": LABELS} if task.startswith("zero-shot") else {}))
    return pipe(inputs["text"])


class Warnings(logging.Handler):
    """What transformers' loggers and those below them say."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []
        transformers.utils.logging.get_logger("transformers").addHandler(self)
        logging.getLogger().addHandler(self)

    def emit(self, record):
        self.messages.append(record.getMessage())


def do(folder: Path, **trust) -> None:
    """One job, and its answer beside it."""
    job = torch.load(folder / "job.pt")
    warnings = Warnings()
    try:
        answer = answers(job["source"], job, **trust) | {"warnings": warnings.messages}
        if job["save"]:
            for auto_class in (job["models"][-1], *job["prepare"]):
                opened = getattr(transformers, auto_class).from_pretrained(job["source"], **trust)
                opened.save_pretrained(folder / "again")
            answer["again"] = answers(str(folder / "again"), {**job, "tasks": ()}, **trust)
    except ImportError as error:
        answer = {"error": str(error)}
    torch.save(answer, folder / "answer.pt")


class NoImport:
    """Finds none of some packages, as if they were not installed."""

    def __init__(self, *packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def is_imported() -> bool:
    return any(name.split(".")[0] == "hf_mm" for name in sys.modules)


def do_with(jobs: list[Path]) -> None:
    import hf_mm  # noqa: F401 - registers the models

    for job in jobs:
        do(job)


def do_without(jobs: list[Path], *more_packages: str) -> None:
    sys.meta_path.insert(0, NoImport("hf_mm", *more_packages))
    for job in jobs:
        do(job, trust_remote_code=True)
    assert not is_imported()


def do_bare(jobs: list[Path]) -> None:
    do_without(jobs, "ftfy")


def do_beside(jobs: list[Path]) -> None:
    for job in jobs:
        in_another_process(do, job, trust_remote_code=True)
    assert not is_imported()


RUNS = {"without": do_without, "bare": do_bare, "beside": do_beside, "with": do_with}


def in_another_process(function, *arguments, **options) -> None:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        return
    status = 1
    try:
        function(*arguments, **options)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, run in RUNS.items():
        if jobs := sorted(path.parent for path in Path(sys.argv[1]).glob(f"{name}/*/job.pt")):
            in_another_process(run, jobs)
