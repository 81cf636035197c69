"""LAVIS's BLIP-2 over the picture tower of CLIP ViT-L/14, in every form in which that comes."""

import pytest
import torch
from published_blip2s import (
    clip_sources,
    clip_state,
    largest_difference,
    lavis_file,
    lavis_state,
    pixels,
    require_equal,
    their_clip,
)

from hf_mm.models.blip2.conversion_blip2 import read_blip2
from hf_mm.models.blip2.conversion_blip2_export import export_lavis
from hf_mm.models.clip.configuration_clip import MMClipVisionConfig


@pytest.mark.parametrize("form", ["flat", "cut", "openai", "transformers"])
def test_clip_is_read_before_its_last_block(tmp_path, stage1_file, bert_folder, form):
    source = tmp_path / clip_sources(tmp_path)[form]
    conversion, _, notes = read_blip2(stage1_file, vision=source, tokenizer=bert_folder)
    ours = conversion.build()
    assert isinstance(ours.config.vision_config, MMClipVisionConfig)
    assert ours.config.vision_feature_layer == (-1 if form == "cut" else -2)
    assert ours.config.vision_config.hidden_act == "quick_gelu"
    with torch.no_grad():
        expected = their_clip(clip_state())(pixels(), output_hidden_states=True).hidden_states[-2]
        assert largest_difference(ours.vision_features(pixels()), expected) <= 1e-5
    assert bool(notes) == (form == "cut")


def test_a_trained_tower_of_clip(tmp_path, bert_folder):
    """Fine-tuned files hold 23 blocks: what comes after them is filled in, and named."""
    state = {**lavis_state(), **clip_state("visual_encoder.", blocks=23)}
    conversion, _, notes = read_blip2(lavis_file(tmp_path / "vitL.pth", state), tokenizer=bert_folder)
    ours = conversion.build()
    require_equal({"w": ours.vision_tower.post_layernorm.weight.data}, {"w": torch.ones(64)})
    assert "norm" in notes[0]
    back = export_lavis(ours)
    filled = {"visual_encoder.ln_post.weight": torch.ones(64), "visual_encoder.ln_post.bias": torch.zeros(64)}
    require_equal(back, state | filled)
