"""Small CLIP checkpoints in the published layouts, and one of ours."""

import json

import torch
from contract.cases import tokenizer, vocabulary
from contract.published import open_clip_json, openai_state
from safetensors.torch import save_file

from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.conversion_clip import read_clip
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.models.clip.processing_clip import MMClipProcessor

TOWER = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
RESNET = {
    "model_type": "mm_clip_resnet",
    "depths": [1, 2, 1, 1],
    "width": 8,
    "num_attention_heads": 4,
    "image_size": 64,
}


def tiny_config(resnet: bool = False, activation: str = "gelu", **fields) -> MMClipConfig:
    """Widths of 64, whose heads shapes tell."""
    vision = {**TOWER, "num_attention_heads": 1, "image_size": 32, "patch_size": 8, "hidden_act": activation}
    text = {**TOWER, "num_attention_heads": 1, "hidden_act": activation, **vocabulary()}
    return MMClipConfig(
        vision_config={**(RESNET if resnet else vision), "projection_dim": 24},
        text_config={**text, "projection_dim": 24},
        projection_dim=24,
        **fields,
    )


def published_folder(folder, config=None, declared=True, text_prefix=""):
    """What push_to_hf_hub of open_clip leaves, with a small vocabulary."""
    config = config or tiny_config()
    tokenizer().save_pretrained(folder)
    save_file(openai_state(config, text_prefix=text_prefix), folder / "open_clip_model.safetensors")
    if declared:
        (folder / "open_clip_config.json").write_text(json.dumps(open_clip_json(config)))
    return folder


def read_with_tokenizer(folder, path, **options):
    """Reads a lone file; the tokenizer lies in the folder."""
    tokenizer().save_pretrained(folder / "tokenizer")
    return read_clip(path, tokenizer=folder / "tokenizer", **options)


def essentials(config) -> dict:
    ignored = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    return {
        name: essentials(value) if isinstance(value, dict) else list(value) if isinstance(value, tuple) else value
        for name, value in (config if isinstance(config, dict) else config.to_dict()).items()
        if name not in ignored
    }


def our_model(config=None) -> tuple[MMClipModel, MMClipProcessor]:
    model = MMClipModel(config or tiny_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    side = model.config.vision_config.image_size
    return model, MMClipProcessor(MMClipImageProcessorPil(size=side, image_mean=[0.3, 0.4, 0.5]), tokenizer())
