"""The contenders of BLIP-2's benchmarks do the same work, and what the notes say of it is so."""

import sys

import pytest

pytest.importorskip("open_clip", reason="open_clip is in the environment of the peers alone")

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from benchmarks import blip2_cached, blip2_generation, blip2_models, blip2_step
from benchmarks.blip2_models import B16, B16_SMALL
from hf_mm.models.blip2.configuration_blip2 import MMBlip2QFormerConfig
from hf_mm.models.blip2.modeling_qformer import MMBlip2QFormerModel
from hf_mm.models.eva_vit.configuration_eva_vit import EvaViTConfig
from hf_mm.models.eva_vit.modeling_eva_vit import EvaViTModel

QUICK = blip2_models.quick(B16)
TRAINED = ("vision_norm.", "qformer.", "language_projection.")
STAGES = ("stage 1", "stage 2")


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of what is not as before."""
    now = model.state_dict()
    return {name for name in without_key_biases(before) if not torch.equal(now[name], before[name])}


def without_key_biases(names) -> set[str]:
    """Their gradients are rounding errors, of which Adam makes whole steps or none."""
    return {name for name in names if not name.endswith("k_proj.bias")}


def spoil(layer: nn.Linear) -> None:
    """Gives a layer weights of its own, for those it has may be another model's too."""
    layer.weight = nn.Parameter(1.5 * layer.weight.detach(), requires_grad=layer.weight.requires_grad)


def flops_of(model, pixels: torch.Tensor) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pixels)
    return counter.get_total_flops()


def numbers_in(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_contenders_of_stage_2_agree_and_ours_leaves_out_the_vocabulary_at_places_without_label():
    models = blip2_step.contenders(QUICK, "cpu")
    flops = blip2_step.check_agreement(models)
    batch, text = models["hf_mm"][1], QUICK.text_config
    places = batch["labels"].numel() - (batch["labels"] != -100).sum().item()
    product = 2 * 2 * text.hidden_size * text.vocab_size  # of one place, forward and back to the hidden states
    assert flops["transformers"] - flops["hf_mm"] >= places * product
    assert flops["cached"] < flops["hf_mm"]


@pytest.mark.parametrize("part", ["language_projection", "qformer.encoder.layer.1.output_query.dense"])
def test_a_contender_of_stage_2_with_other_weights_is_noticed(part):
    models = blip2_step.contenders(QUICK, "cpu")
    spoil(models["transformers"][0].get_submodule(part))
    with pytest.raises(AssertionError, match="differ"):
        blip2_step.check_agreement(models)


def test_a_contender_that_trains_more_is_noticed():
    models = blip2_step.contenders(QUICK, "cpu")
    models["transformers"][0].vision_model.encoder.layers[1].mlp.fc2.bias.requires_grad_(True)
    with pytest.raises(AssertionError, match="differ|numbers train"):
        blip2_step.check_agreement(models)


def test_both_train_the_same_weights_alike():
    """A step of either, from equal weights: the peer's are in the memory of ours."""
    after = {}
    for name in ("hf_mm", "cached", "transformers"):
        torch.manual_seed(0)
        models = blip2_step.contenders(QUICK, "cpu")
        ours = models["hf_mm"][0]
        before = state_of(ours)
        blip2_step.steps_of(models)[name]()
        assert changed(ours, before) == {part for part in without_key_biases(before) if part.startswith(TRAINED)}
        now = state_of(ours)
        after[name] = {part: now[part] for part in without_key_biases(now)}
    for name in ("cached", "transformers"):
        torch.testing.assert_close(after[name], after["hf_mm"], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["hf_mm", "transformers"])
def test_a_step_by_itself_runs(name):
    blip2_step.step_alone(name, QUICK, "cpu")()


def test_the_peak_of_a_call_is_what_it_allocates():
    numbers = 2**23
    before = blip2_step.in_use("cpu")
    grown = blip2_step.peak_of(lambda: torch.ones(numbers).sum(), "cpu") - before
    assert 0.9 < grown / (4 * numbers) < 1.3


def test_logits_by_themselves_give_one_loss_and_ours_take_less_memory(monkeypatch):
    monkeypatch.setattr(
        blip2_models, "TINY_LLAMA", LlamaConfig(**{**blip2_models.TINY_LLAMA.to_dict(), "vocab_size": 65536})
    )
    losses, peaks = {}, {}
    for name in ("hf_mm", "transformers"):
        losses[name] = blip2_step.logits_alone(name, QUICK, "cpu")().item()
        peaks[name] = blip2_step.child("logits", name, "quick", "cpu")
    assert losses["hf_mm"] == pytest.approx(losses["transformers"], abs=1e-5)
    labels = blip2_models.stage2_texts(QUICK)["labels"]
    whole, labelled = (4 * 65536 * places for places in (labels.numel(), (labels != -100).sum().item()))
    assert peaks["transformers"] > 2 * whole  # logits and their gradient
    assert 2 * labelled < peaks["hf_mm"] < min(5 * labelled, peaks["transformers"])


@pytest.mark.parametrize("stage", STAGES)
def test_cached_and_live_agree_and_differ_by_the_tower(stage, tmp_path):
    contenders = blip2_cached.Contenders(stage, QUICK, "cpu", tmp_path)
    flops = contenders.check()
    tower = contenders.model.vision_tower
    assert flops["hf_mm, live"] - flops["hf_mm"] == flops_of(tower, contenders.pixels)
    before = state_of(contenders.model)
    for step in contenders.steps().values():
        step()
    kept = {name for name in before if name.startswith(("vision_tower.", "language_model."))}
    assert changed(contenders.model, before) == without_key_biases(before) - kept
    contenders.check()


@pytest.mark.parametrize("stage", STAGES)
def test_features_of_other_pictures_are_noticed(stage, tmp_path):
    contenders = blip2_cached.Contenders(stage, QUICK, "cpu", tmp_path)
    contenders.pixels = contenders.pixels.flip(0)
    with pytest.raises(AssertionError, match="differ"):
        contenders.check()


def test_sizes_are_what_the_notes_of_the_cache_say():
    with torch.device("meta"):
        tower, vit_g = blip2_models.tower(B16), EvaViTModel(EvaViTConfig()).eval()
        small = MMBlip2QFormerConfig(**blip2_models.qformer_fields(B16_SMALL), encoder_hidden_size=768, use_text=False)
        small, published = (MMBlip2QFormerModel(config) for config in (small, MMBlip2QFormerConfig(use_text=False)))
        picture = torch.empty(1, 3, 224, 224)
    assert numbers_in(tower) == pytest.approx(86e6, rel=0.01)
    for qformer, beside in ((small, tower), (published, vit_g)):
        assert numbers_in(qformer.layers) / numbers_in(beside) == pytest.approx(0.105, abs=0.003)
    assert flops_of(vit_g, picture) / flops_of(tower, picture) == pytest.approx(15, abs=0.5)


def test_contenders_of_generation_say_the_same_after_one_pass_of_the_tower():
    contenders = blip2_generation.Contenders(QUICK, "cpu")
    assert contenders.check() == {"hf_mm": 1, "transformers": 1}
    clock = blip2_generation.Clock()
    ids = contenders.hf_mm(**blip2_generation.EXACTLY, stopping_criteria=[clock])
    assert len(clock.times) == ids.shape[1] == blip2_generation.NEW_TOKENS


@pytest.mark.parametrize("name", ["theirs", "ours"])
def test_a_contender_of_generation_with_other_weights_is_noticed(name):
    contenders = blip2_generation.Contenders(QUICK, "cpu")
    spoil(getattr(contenders, name).language_projection)
    with pytest.raises(AssertionError, match="differ"):
        contenders.check()


def test_a_tower_that_runs_twice_is_noticed():
    contenders = blip2_generation.Contenders(QUICK, "cpu")
    alone = contenders.ours.get_image_features
    contenders.ours.get_image_features = lambda *args, **kwargs: (alone(*args, **kwargs), alone(*args, **kwargs))[1]
    with pytest.raises(AssertionError, match="ran 2 times"):
        contenders.check()


def test_time_a_token_leaves_the_first_out():
    clock = blip2_generation.Clock()
    clock.times = [5.0, 5.5, 7.0, 8.0]
    assert clock.seconds_per_token == 1.0


@pytest.mark.parametrize(("name", "cases"), [("step", 4), ("cached", 4), ("generation", 3)])
def test_a_quick_check_shows_every_case(name, cases, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick", "--threads", "1"])
    script = {"step": blip2_step, "cached": blip2_cached, "generation": blip2_generation}[name]
    if name == "step":
        monkeypatch.setattr(script, "peak", lambda *args: float(script.child(*args[:-1], "cpu")))
    script.main()
    printed = capsys.readouterr().out
    assert printed.count("\n## ") == cases and "A quick check" in printed
