"""Row 6, the frozen rule: what is frozen stays bit-equal and in eval mode, and costs no gradient that nobody needs."""

import copy
import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from .cases import JOINT, blocks, cases_for, first_layer, frozen_towers, in_double, recomputed, trained
from .training import NUM_SAMPLES, samples_of, trainer_for

WITH_CLIP = pytest.mark.parametrize("case", cases_for(6, lambda case: case.connector == "mapper"), ids=str)
FROZEN = pytest.mark.parametrize("case", cases_for(6, lambda case: bool(case.frozen_parts)), ids=str)
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
TRAINED_FILES = {"config.json", "base_models.json", "trained_part.safetensors"}


def parts_of(model) -> list[torch.nn.Module]:
    return [model.get_submodule(name) for name in model.frozen_parts]


def frozen(model) -> dict[str, torch.Tensor]:
    """Copies of the parameters and buffers of frozen parts."""
    return {
        f"{part}.{name}": tensor.clone()
        for part in model.frozen_parts
        for name, tensor in model.get_submodule(part).state_dict().items()
    }


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def assert_same_loss(case, ours: torch.Tensor, expected: torch.Tensor):
    """Bit-equal; of words, which in training are scored at their places alone, but for rounding."""
    torch.testing.assert_close(ours, expected, rtol=1e-6 if case.speaks else 0, atol=0)


def with_dropout(case, rate: float = 0.5):
    """The model with dropout in what trains."""
    config = case.config()
    getattr(config, f"{case.connector}_config").dropout = rate
    return case.build(config)


def gradients_of(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trained(model).items()}


def of_the_model(model):
    model.train()


def of_the_parts(model):
    for part in parts_of(model):
        part.train()


def of_what_is_in_the_parts(model):
    for part in parts_of(model):
        for child in part.children():
            child.train()


def of_single_layers(model):
    for part in parts_of(model):
        for module in part.modules():
            if not list(module.children()):
                module.training = True


TRAIN_CALLS = (of_the_model, of_the_parts, of_what_is_in_the_parts, of_single_layers)


def decayed(case, folder, train_calls=()):
    """A run of Trainer with weight decay, of a step for each of `train_calls`, which come right before its forward."""
    model, left = case.build(), list(train_calls)
    if left:
        model.register_forward_pre_hook(lambda module, args: left.pop(0)(model))
    options = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 1e-2, "max_steps": len(TRAIN_CALLS)}
    trainer = trainer_for(case, folder, model=model, samples=samples_of(case.batch(NUM_SAMPLES)), **options)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@FROZEN
def test_training_moves_nothing_frozen_whatever_train_says(case, tmp_path):
    """Weights, and BatchNorm's statistics; attention_dropout is in the configs of the frozen towers."""
    plain, losses = decayed(case, tmp_path)
    called, same_losses = decayed(case, tmp_path, TRAIN_CALLS)
    assert losses == same_losses
    assert len(losses) == len(TRAIN_CALLS)
    for model in (plain.model, called.model):
        assert_same(frozen(model), frozen(case.build()))
        before = trained(case.build())
        assert not any(torch.equal(value, before[name]) for name, value in trained(model).items())
    assert_same(trained(called.model), trained(plain.model))


@FROZEN
def test_nothing_frozen_has_a_gradient_or_an_optimizer_state(case, tmp_path):
    trainer, _ = decayed(case, tmp_path)
    own = trained(trainer.model)
    assert own
    assert not {name for name in own if name.startswith(tuple(trainer.model.frozen_parts))}
    optimizer = trainer.optimizer.optimizer
    assert set(optimizer.state) == set(own.values())
    assert {parameter for group in optimizer.param_groups for parameter in group["params"]} == set(own.values())
    assert all(parameter.grad is None for part in parts_of(trainer.model) for parameter in part.parameters())


@FROZEN
def test_dropout_acts_in_what_trains_and_never_in_what_is_frozen(case):
    model, batch = with_dropout(case), case.batch(3)
    torch.manual_seed(0)
    expected = model(**batch)
    features = model.vision_features(batch["pixel_values"])
    for call in TRAIN_CALLS:
        model.train()
        call(model)
        once, again = model(**batch), model(**batch)
        assert once.loss != again.loss
        assert torch.equal(model.vision_features(batch["pixel_values"]), features)
        model.get_submodule(case.connector).eval()
        assert_same_loss(case, model(**batch).loss, expected.loss)
        assert not any(module.training for part in parts_of(model) for module in part.modules())
    for call in TRAIN_CALLS[1:]:
        model.eval()
        call(model)
        assert model(**batch).loss == expected.loss
        assert not any(module.training for module in model.modules())


@WITH_CLIP
def test_texts_run_within_a_graph(case):
    model, batch = case.build().train(), case.batch(3)
    outputs = model(**batch)
    assert not outputs.vision_model_output.pooler_output.requires_grad
    assert not model.get_image_features(batch["pixel_values"]).pooler_output.requires_grad
    assert outputs.text_model_output.pooler_output.grad_fn is not None


@FROZEN
def test_pictures_run_without_a_graph(case):
    """Pixels leave no more for the backward than their features do."""
    model, batch = case.build().train(), case.batch(3)

    def saved_for_backward(**inputs) -> list[tuple[int, ...]]:
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: shapes.append(tensor.shape), lambda _: None):
            model(**inputs)
        return sorted(map(tuple, shapes))

    features = model.vision_features(batch["pixel_values"])
    without_pictures = {name: value for name, value in batch.items() if name != "pixel_values"}
    assert saved_for_backward(**batch) == saved_for_backward(**without_pictures, vision_features=features) != []


def calls_and_gradients(model, batch, reentrant: bool | None = None):
    """How often each block computes in a step, and the gradients; with checkpointing where it is said of which kind."""
    model, calls = model.double().train(), Counter()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for block in blocks(model):
        first_layer(block).register_forward_pre_hook(lambda module, args, block=block: calls.update([block]))
    gradients = gradients_of(model, model(**batch).loss)
    return [calls[block] for block in blocks(model)], gradients


def times_again(model, again: set[int], plain: list[int]) -> list[int]:
    """How often blocks compute of which some compute again."""
    return [number * (2 if id(block) in again else 1) for block, number in zip(blocks(model), plain, strict=True)]


@FROZEN
@REENTRANT
def test_checkpointing_computes_again_what_gradients_pass_and_only_that(case, reentrant):
    model, batch = case.build(), in_double(case.batch(4))
    plain, gradients = calls_and_gradients(case.build(), batch)
    calls, checkpointed = calls_and_gradients(model, batch, reentrant)
    again = {id(block) for block in recomputed(model)}
    assert 0 < len(again) < len(plain)
    assert min(plain) >= 1
    assert calls == times_again(model, again, plain)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-12, atol=1e-14)
    assert not any(module.training for part in parts_of(model) for module in part.modules())


def frozen_blocks(model) -> list[torch.nn.Module]:
    return [block for part in parts_of(model) for block in blocks(part)]


def drop_in_forward(model):
    """Frozen blocks that have dropout as a function in their forward, under their own flag, as many of transformers do."""

    def forward(self, *args, **kwargs):
        output = super(type(self), self).forward(*args, **kwargs)
        if isinstance(output, tuple):
            return F.dropout(output[0], 0.5, training=self.training), *output[1:]
        return F.dropout(output, 0.5, training=self.training)

    for block in frozen_blocks(model):
        block.__class__ = type("Dropping", (type(block),), {"forward": forward})
    return model


@FROZEN
@REENTRANT
def test_dropout_in_a_block_s_own_forward_does_not_act_under_checkpointing(case, reentrant):
    batch = in_double(case.batch(4))
    _, gradients = calls_and_gradients(case.build(), batch)
    model = drop_in_forward(case.build())
    calls, checkpointed = calls_and_gradients(model, batch, reentrant)
    assert max(calls) >= 2
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-12, atol=1e-14)
    assert not any(block.training for block in frozen_blocks(model))
    block = next(block for block in reversed(frozen_blocks(model)) if hasattr(block, "layer_norm1"))
    states = torch.ones(1, 3, block.layer_norm1.weight.shape[0]).double()
    with torch.no_grad():
        assert torch.equal(block(states, None), block(states, None))
        block._is_held, block.training = False, True
        assert not torch.equal(block(states, None), block(states, None))


ADAPTED = [(case, name) for case in FROZEN.args[1] for name in case.adapted]
TOWERS = pytest.mark.parametrize(("case", "tower"), ADAPTED, ids=[f"{case}, {tower}" for case, tower in ADAPTED])


def adapted(case, tower: str, dropout: float = 0.0) -> PeftModel:
    """With adapters that do something; the connector trains whole."""
    lora = {"r": 2, "lora_alpha": 4, "target_modules": case.adapted[tower], "lora_dropout": dropout}
    model = get_peft_model(case.build(), LoraConfig(**lora, modules_to_save=[case.connector]))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def base_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """Frozen weights and buffers under the names that they have without adapters."""
    state = model.base_model.model.state_dict()
    return {
        name.replace(".base_layer", ""): value.clone()
        for name, value in state.items()
        if "lora_" not in name and name.startswith(tuple(f"{part}." for part in model.base_model.model.frozen_parts))
    }


@TOWERS
def test_an_adapter_in_a_frozen_part_has_its_own_dropout(case, tower):
    """The base's would act with the part's flag, were it not held."""
    dropping, plain, batch = adapted(case, tower, dropout=0.5), adapted(case, tower), case.batch(3)
    expected = plain.eval()(**batch).loss
    for call in TRAIN_CALLS:
        for model in (dropping, plain):
            model.train()
            call(model.base_model.model)
        assert dropping(**batch).loss != dropping(**batch).loss
        assert_same_loss(case, plain(**batch).loss, expected)


@TOWERS
def test_training_adapters_leaves_the_base_bit_equal(case, tower, tmp_path):
    model = adapted(case, tower, dropout=0.2)
    before = {name: value.clone() for name, value in trained(model).items()}
    assert {name for name in before if "lora_" in name}
    assert {name for name in before if case.connector in name}
    options = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 1e-2}
    trainer_for(case, tmp_path, model=model, samples=samples_of(case.batch(NUM_SAMPLES)), **options).train()
    assert not any(torch.equal(value, before[name]) for name, value in trained(model).items())
    assert_same(base_of(model), frozen(case.build()))


@TOWERS
@REENTRANT
def test_checkpointing_with_adapters_in_one_tower(case, tower, reentrant):
    batch = in_double(case.batch(4))
    torch.manual_seed(1)
    plain, gradients = calls_and_gradients(adapted(case, tower), batch)
    torch.manual_seed(1)
    model = adapted(case, tower)
    calls, checkpointed = calls_and_gradients(model, batch, reentrant)
    again = {id(block) for block in recomputed(model.base_model.model)}
    assert calls == times_again(model, again, plain)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-12, atol=1e-14)


@FROZEN
def test_features_in_place_of_pictures_change_no_bit(case):
    """Float32; in training, with what dropout draws."""
    model, batch = with_dropout(case), case.batch(4)
    features = model.vision_features(batch["pixel_values"])
    inputs = {**batch, "vision_features": features}
    del inputs["pixel_values"]
    with torch.no_grad():
        assert_same(case.read(model(**inputs), batch), case.read(model(**batch), batch))
    model.train()
    found = []
    for given in (inputs, batch):
        torch.manual_seed(3)
        outputs = model(**given)
        found.append({**case.read(outputs, batch), **gradients_of(model, outputs.loss)})
    assert_same(*found)
    rows = torch.cat([model.eval().vision_features(pixels[None]) for pixels in batch["pixel_values"]])
    torch.testing.assert_close(rows, features, rtol=1e-5, atol=1e-6)


@WITH_CLIP
def test_composed_features_of_features_change_no_bit(case):
    model, batch = case.build(), case.batch(4)
    inputs = {**batch, "vision_features": model.vision_features(batch["pixel_values"])}
    del inputs["pixel_values"]
    with torch.no_grad():
        ours = model.get_composed_features(**inputs).pooler_output
        assert torch.equal(ours, model.get_composed_features(**batch).pooler_output)
        assert model(**batch).vision_model_output is not None
        assert model(**inputs).vision_model_output is None


@WITH_CLIP
def test_features_of_another_width_are_refused(case):
    batch = case.batch(3)
    del batch["pixel_values"]
    for width in (JOINT - 1, JOINT + 1):
        with pytest.raises(ValueError, match=rf"{JOINT}\).*\(3, {width}\).*trained on\.$"):
            case.build().get_composed_features(**batch, vision_features=torch.ones(3, width))


OPENED = """
import sys
from pathlib import Path
import torch
import hf_mm
torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    name, batch = torch.load(folder / "call.pt")
    model_class = next(own for entry in hf_mm.MODELS.values() for own in entry.models.values() if own.__name__ == name)
    model = model_class.from_trained_part(str(folder / "trained"))
    torch.manual_seed(0)  # of what a loss draws
    with torch.no_grad():
        outputs = model(**batch)
    answer = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    torch.save((answer, model.state_dict(), model.training), folder / "answer.pt")
"""


def named(case, folder):
    """The model, its frozen parts saved one by one and known by their folders."""
    model = case.build()
    model.config.base_models = {}
    for name in model.frozen_parts:
        model.get_submodule(name).save_pretrained(folder / name)
        model.config.base_models[name] = {"name": str(folder / name), "revision": None}
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The trained part of every case beside its frozen ones, opened by name in another process."""
    root = tmp_path_factory.mktemp("trained_parts")
    for number, case in enumerate(FROZEN.args[1]):
        model = named(case, root / str(number))
        model.save_trained_part(root / str(number) / "trained")
        torch.save((case.model_class.__name__, case.batch(3)), root / str(number) / "call.pt")
    subprocess.run([sys.executable, "-c", OPENED, str(root)], check=True)
    return {case.name: root / str(number) for number, case in enumerate(FROZEN.args[1])}


@pytest.fixture
def part(case, saved, tmp_path):
    """A copy of a case's trained part, to be spoilt."""
    folder = tmp_path / "trained"
    folder.mkdir()
    for file in (saved[case.name] / "trained").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@FROZEN
def test_the_trained_part_is_restored_in_a_fresh_process_by_name(case, saved):
    model, batch = case.build(seeded=False), case.batch(3)
    answer, state, training = torch.load(saved[case.name] / "answer.pt")
    assert not training
    assert_same(state, model.state_dict())
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = model(**batch)
    assert_same(case.read(answer, batch), case.read(outputs, batch))


@FROZEN
def test_the_trained_part_holds_what_trains_and_names_the_rest(case, saved):
    folder, model = saved[case.name] / "trained", case.build()
    says = {"generation_config.json"} if model.can_generate() else set()
    assert {file.name for file in folder.iterdir()} == TRAINED_FILES | says
    assert_same(load_file(folder / "trained_part.safetensors"), trained(model))
    bases = json.loads((folder / "base_models.json").read_text())
    assert set(bases) == set(model.frozen_parts)
    for name, base in bases.items():
        assert base["name"] == str(saved[case.name] / name)
        assert len(base["fingerprint"]) == 32


@FROZEN
def test_a_restored_model_is_frozen_and_trains(case, part):
    model = case.model_class.from_trained_part(str(part))
    assert set(trained(model)) == set(trained(case.build()))
    model.train()
    assert not any(module.training for own in parts_of(model) for module in own.modules())
    gradients_of(model, model(**case.batch(3)).loss)


@FROZEN
def test_another_base_is_refused_by_its_fingerprint(case, part):
    """One changed bit is enough, be it of a buffer; the right base is taken from wherever it is."""
    for name in case.frozen_parts:
        other = copy.deepcopy(case.build().get_submodule(name))
        stored = other.state_dict()
        tensors = [*(tensor for key, tensor in other.named_buffers() if key in stored), *other.parameters()]
        tensor = next(tensor for tensor in tensors if tensor.is_floating_point())
        with torch.no_grad():
            tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(torch.inf))
        with pytest.raises(ValueError, match=rf"not the {name} that this was trained on.*{name}=\.$"):
            case.model_class.from_trained_part(str(part), **{name: other})
        right = case.build().get_submodule(name)
        restored = case.model_class.from_trained_part(str(part), **{name: right})
        assert_same(restored.state_dict(), case.build().state_dict())


@FROZEN
def test_a_part_that_lacks_a_file_or_a_tensor_is_refused(case, part):
    file = part / "trained_part.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    name = sorted(tensors)[0]
    lacking = {other: tensor for other, tensor in tensors.items() if other != name}
    reshaped = {**tensors, name: torch.cat([tensors[name], tensors[name]])}
    for wrong in (lacking, {**tensors, f"{case.connector}.of_another.model": torch.zeros(2)}, reshaped):
        save_file(wrong, file, metadata={"format": "pt"})
        (odd,) = {key for key in wrong.keys() | tensors.keys() if wrong.get(key) is not tensors.get(key)}
        with pytest.raises(ValueError, match=rf"trained part.*{odd}"):
            case.model_class.from_trained_part(str(part))
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="trained part.*cut short"):
        case.model_class.from_trained_part(str(part))
    file.write_bytes(whole)
    for lost in sorted(TRAINED_FILES):
        content = (part / lost).read_bytes()
        (part / lost).unlink()
        with pytest.raises(OSError, match=lost):
            case.model_class.from_trained_part(str(part))
        (part / lost).write_bytes(content)


@FROZEN
def test_a_trained_part_that_would_lose_weights_is_not_saved(case, tmp_path):
    """Adapters inside a frozen part, or one that trains after all."""
    model = case.build()
    name, *_ = model.frozen_parts
    model.get_submodule(name).requires_grad_(True)
    with pytest.raises(ValueError, match=rf"{name} has weights that train.*save_pretrained"):
        model.save_trained_part(tmp_path / "trained")
    with pytest.raises(ValueError, match=rf"({'|'.join(model.frozen_parts)}) has weights that train, or adapters"):
        adapted(case, list(case.adapted)[-1]).base_model.model.save_trained_part(tmp_path / "trained")
    assert not (tmp_path / "trained").exists()


@FROZEN
def test_a_reopened_model_is_frozen_again(case, tmp_path):
    """from_pretrained makes every parameter trainable; the towers that are frozen are the same."""
    case.build().save_pretrained(tmp_path)
    model = case.auto_class.from_pretrained(tmp_path)
    assert set(trained(model)) == set(trained(case.build()))
    assert len(frozen_towers(model)) == 1
