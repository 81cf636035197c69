"""Conversions of parts, each from a source of its own, as one of the whole model."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub.dataclasses import strict
from safetensors.torch import load_file
from toy_published import RULES, ToyConfig, ToyModel, expected_tensors, published_tensors
from transformers import PreTrainedConfig

from hf_mm.conversion.checkpoint import Checkpoint, Origin, open_checkpoint
from hf_mm.conversion.engine import Conversion, compose, convert
from hf_mm.conversion.rules import ConversionError
from hf_mm.nn.pretrained import MMPreTrainedModel


@strict
class PairConfig(PreTrainedConfig):
    model_type = "toy_pair"
    sub_configs = {"left_config": ToyConfig, "right_config": ToyConfig}

    left_config: dict | PreTrainedConfig | None = None
    right_config: dict | PreTrainedConfig | None = None


class Pair(MMPreTrainedModel):
    config_class = PairConfig
    _tied_weights_keys = {f"{side}.lm_head.weight": f"{side}.embeddings.weight" for side in ("left", "right")}

    def __init__(self, config: PairConfig):
        super().__init__(config)
        self.left, self.right = ToyModel(config.left_config), ToyModel(config.right_config)
        self.post_init()


LEFT, RIGHT = ToyConfig(), ToyConfig(hidden_size=4, num_hidden_layers=1, vocab_size=7)


def a_part(config: ToyConfig, name: str, dtype=torch.float32) -> tuple[Conversion, dict[str, torch.Tensor]]:
    published = published_tensors(config, dtype)
    checkpoint = Checkpoint(published, {}, (Origin(name), Origin("both.pt")))
    return convert(checkpoint, model_class=ToyModel, config=config, rules=RULES), expected_tensors(published, config)


def composed(parts, dtype=torch.float32, **configs) -> Conversion:
    config = PairConfig(**{"left_config": LEFT, "right_config": RIGHT, **configs})
    return compose(parts, model_class=Pair, config=config, dtype=dtype)


def test_parts_become_one_folder_in_the_dtype_of_the_whole(tmp_path):
    (left, ours), (right, theirs) = a_part(LEFT, "left.pt"), a_part(RIGHT, "right.pt", torch.float16)
    folder = composed({"left": left, "right": right}, torch.bfloat16).save(tmp_path / "model", progress=False)
    expected = {f"left.{name}": tensor for name, tensor in ours.items()}
    expected |= {f"right.{name}": tensor for name, tensor in theirs.items()}
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.bfloat16() if tensor.is_floating_point() else tensor), name
    sources = json.loads((folder / "conversion.json").read_text())["sources"]
    assert [source["name"] for source in sources] == ["left.pt", "both.pt", "right.pt"]


def test_two_parts_of_one_file(tmp_path):
    published = published_tensors(LEFT)
    torch.save({"model": published, "ema": published}, tmp_path / "both.pt")
    checkpoint = open_checkpoint(tmp_path / "both.pt", entries=["model", "ema"])
    parts = {
        side: convert(checkpoint.select(f"{entry}."), model_class=ToyModel, config=LEFT, rules=RULES)
        for side, entry in (("left", "model"), ("right", "ema"))
    }
    whole = composed(parts, right_config=LEFT)
    sha256 = hashlib.sha256((tmp_path / "both.pt").read_bytes()).hexdigest()
    assert whole.checkpoint.origins == (Origin("both.pt", None, sha256),)
    model = whole.build()
    assert torch.equal(model.left.projection.weight, published["proj"].T)
    assert torch.equal(model.right.logit_scale, published["logit_scale"][None])
    read = {name for step in whole.steps for name in step.sources}
    assert read == {f"{side}.{name}" for side in parts for name in published}


def test_parts_that_are_not_the_whole_are_refused_by_name():
    (left, _), (right, _) = a_part(LEFT, "left.pt"), a_part(RIGHT, "right.pt")
    with pytest.raises(ConversionError, match=r"nothing for the model's right\.embeddings\.weight, "):
        composed({"left": left})
    with pytest.raises(ConversionError, match=r"no place for, its middle\.embeddings\.weight, "):
        composed({"left": left, "right": right, "middle": left})
    wider, _ = a_part(ToyConfig(num_hidden_layers=1), "wider.pt")
    with pytest.raises(
        ConversionError, match=r"right\.embeddings\.weight would be \(11, 6\) where the model has \(7, 4\)"
    ):
        composed({"left": left, "right": wider})


def test_composing_reads_no_numbers():
    (left, _), (right, _) = a_part(LEFT, "left.pt"), a_part(RIGHT, "right.pt")
    meta = {name: tensor.to("meta") for name, tensor in left.checkpoint.tensors.items()}
    whole = composed({"left": replace(left, checkpoint=replace(left.checkpoint, tensors=meta)), "right": right})
    assert all(tensor.is_meta for tensor in whole.empty.state_dict().values())
