"""BLIP-2's config: the Q-Former and the tower under it must fit."""

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from small import config_of, qformer_fields, vision_config

from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config, MMBlip2QFormerConfig

WIDTHS = {"mm_clip_vision": 16, "convnext": 10, "swin": 16, "mm_clip_resnet": 256}


@pytest.mark.parametrize("tower", WIDTHS)
def test_a_q_former_of_another_tower_is_one_sentence(tower):
    given = qformer_fields(encoder_hidden_size=WIDTHS[tower] + 1)
    for qformer in (given, MMBlip2QFormerConfig(**given)):
        with pytest.raises(StrictDataclassClassValidationError) as refused:
            MMBlip2Config(vision_config=vision_config(tower), qformer_config=qformer)
        sentence = str(refused.value.__cause__)
        assert f"is {WIDTHS[tower] + 1}," in sentence and f"have width {WIDTHS[tower]}:" in sentence
        assert sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize("tower", WIDTHS)
def test_the_tower_s_own_width_is_taken_and_may_be_given(tower):
    taken = config_of(tower).qformer_config.encoder_hidden_size
    given = config_of(tower, qformer_fields={"encoder_hidden_size": WIDTHS[tower]})
    assert taken == given.qformer_config.encoder_hidden_size == WIDTHS[tower]


def test_the_width_is_that_of_the_layer_that_is_read():
    """Swin's maps grow from stage to stage: its hidden size is that of the last."""
    earlier = {"vision_config": vision_config("swin"), "vision_feature_layer": 0}
    assert MMBlip2Config(**earlier, qformer_config=qformer_fields()).qformer_config.encoder_hidden_size == 8
    MMBlip2Config(**earlier, qformer_config=qformer_fields(encoder_hidden_size=8))
    with pytest.raises(StrictDataclassClassValidationError, match="is 16, .* width 8"):
        MMBlip2Config(**earlier, qformer_config=qformer_fields(encoder_hidden_size=16))


def test_what_no_longer_fits_is_not_saved(tmp_path):
    config = config_of()
    config.qformer_config.encoder_hidden_size = 24
    with pytest.raises(StrictDataclassClassValidationError, match="is 24, .* width 16"):
        config.save_pretrained(tmp_path)


def test_defaults_are_the_published_ones():
    """The Q-Former's are those for ViT-g, the config's default tower."""
    assert MMBlip2Config().qformer_config.to_dict() == MMBlip2QFormerConfig().to_dict()


def test_queries_are_the_q_formers():
    """Under the name that transformers' config has for them."""
    with pytest.raises(ValueError, match="num_query_tokens is the Q-Former's: set it in qformer_config"):
        MMBlip2Config(num_query_tokens=8)
