"""Opens saved models as a user's script would, and writes down what they answer.

    python fresh_process.py FOLDER

FOLDER holds one folder per case, with ``raw.pt`` (inputs as a user has them, AutoClass, options) beside the model.
"""

import sys
from pathlib import Path

import torch
import transformers

import hf_mm  # noqa: F401 - registers the models

torch.set_num_threads(1)

for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    raw = torch.load(folder / "raw.pt")
    config = transformers.AutoConfig.from_pretrained(folder)
    model, info = getattr(transformers, raw["auto_class"]).from_pretrained(folder, output_loading_info=True)
    prepare, batch = None, raw["batch"]
    if batch is None:
        prepare = transformers.AutoProcessor.from_pretrained(folder)
        batch = dict(prepare(**raw["inputs"], return_tensors="pt", **raw["options"]))
    torch.manual_seed(0)  # of what a loss draws
    with torch.no_grad():
        outputs = model(**batch, **raw["labels"])
    torch.save(
        {
            "config": config.to_dict(),
            "model_class": type(model).__name__,
            "training": model.training,
            "loading": {name: sorted(map(str, keys)) for name, keys in info.items()},
            "prepare_class": type(prepare).__name__,
            "batch": batch,
            "outputs": {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)},
            "buffers": dict(model.named_buffers()),
        },
        folder / "answer.pt",
    )
