"""After smoke.py and without hf_mm: the generated code opens the model and answers with the same bits."""

from importlib.util import find_spec

import torch
from safetensors.torch import load_file
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

assert find_spec("hf_mm") is None, "hf_mm is still installed"
answers = load_file("answers.safetensors")
logits = answers.pop("logits")
model = AutoModelForZeroShotImageClassification.from_pretrained("standalone", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("standalone", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(**answers).logits_per_image, logits)
texts = processor(text=["a face", "a cat"], return_tensors="pt")["input_ids"]
assert torch.equal(texts, answers["input_ids"])
print("Without hf_mm, the generated code opens the model.")
