"""Run from a folder that holds no source: does the installed wheel have everything?

It leaves a model with generated code in ``standalone/``, and its answers, for without_package.py.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline

import hf_mm
from hf_mm.data.emoji import load_emoji
from hf_mm.hub.model_card import find_template
from hf_mm.hub.standalone import standalone_changes
from hf_mm.models.clip.conversion_clip import published_tokenizer
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.processing_clip import MMClipProcessor
from hf_mm.models.clip.tokenization_clip import MMClipTokenizer

package = Path(hf_mm.__file__).parent
assert "site-packages" in package.parts, f"the source tree was imported, not the wheel: {package}"
assert (package / "py.typed").is_file()

pictures = load_emoji("concept")
assert len(pictures) > 400 and pictures[0]["image"].size == (64, 64)
assert all("{{" in find_template(name).read_text() for name in ("clip", "converted"))
assert len(published_tokenizer()) == 49408

tokenizer = MMClipTokenizer.train_from_iterator(pictures["caption"], vocab_size=700, model_max_length=16)
processor = MMClipProcessor(
    MMClipImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer
)
tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
config = AutoConfig.for_model(
    "mm_clip",
    projection_dim=16,
    vision_config={**tower, "image_size": 32, "patch_size": 8},
    text_config={
        **tower,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    },
)
model = AutoModelForZeroShotImageClassification.from_config(config).eval()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    opened, prepared = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    # Two pictures: a product of one row rounds by where the weights lie in memory, and those of a file lie elsewhere.
    inputs = prepared(images=[pictures[row]["image"] for row in (0, 1)], text=["a face", "a cat"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(opened(**inputs).logits_per_image, model(**inputs).logits_per_image)
    model.save_pretrained("standalone")
    processor.save_pretrained("standalone")
    for name, text in standalone_changes("standalone").items():
        Path("standalone", name).write_text(text)
    save_file(
        dict(inputs) | {"logits": opened(**inputs).logits_per_image.detach().contiguous()}, "answers.safetensors"
    )
    answers = pipeline("zero-shot-image-classification", model=folder)(
        pictures[0]["image"], candidate_labels=["face", "cat"]
    )
    assert abs(sum(answer["score"] for answer in answers) - 1) < 1e-4
print(f"hf_mm {hf_mm.__version__}: the wheel builds, saves and opens a model, loads its pictures, finds its card.")
