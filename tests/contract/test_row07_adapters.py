"""Row 7: PEFT's LoRA attaches by a pattern of names, trains, is saved alone, reloads, resumes and merges.

PEFT matches the pattern with the whole name of a module, counted from the model that is wrapped. A ResNet tower has its
queries and values in the pool at its end; its blocks hold convolutions. Adapters in one tower of a frozen part are in
test_row06_frozen.py.
"""

import copy
import re

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from hf_mm.trainers.callbacks import MAX_LOGIT_SCALE, ClampLogitScale, find_logit_scale
from hf_mm.trainers.contrastive import ContrastiveTrainer, ContrastiveTrainingArguments

from .cases import attentions, blocks, cases_for, first_layer, in_double, largest_error, tokenizer
from .training import NUM_SAMPLES, samples_of, trainer_for, with_loss

EVERYWHERE = r".*\.(q_proj|v_proj|\d+\.conv[123])"
IN_PICTURE_TOWER = r"vision_model\..*\.(q_proj|v_proj|\d+\.conv[123])"
IN_TEXT_TOWER = r"text_model\..*\.(q_proj|v_proj)"
TOWERS = {
    EVERYWHERE: ("vision_model", "text_model"),
    IN_PICTURE_TOWER: ("vision_model",),
    IN_TEXT_TOWER: ("text_model",),
}
HEADS = {
    "mm_clip_resnet": ["attnpool.c_proj"],
    "mm_clip with mm_clip_resnet": ["vision_model.attnpool.c_proj", "text_projection"],
    "MMViTForImageClassification": ["classifier"],
    "MMViTModel": ["pre_logits"],
    "MMClipTextModel": ["final_layer_norm"],
    "MMClipVisionModel": ["post_layernorm"],
    "MMClipModel": ["visual_projection", "text_projection"],
    "EvaViTModel": ["embeddings.patch_embeddings"],
    "Pic2WordModel": ["mapper"],
    "MMBlip2ForImageTextRetrieval": ["vision_projection", "text_projection", "itm_head"],
    "MMBlip2ForPreTraining": ["vision_projection", "text_projection", "itm_head", "lm_head.transform"],
    "MMBlip2ForConditionalGeneration": ["language_projection"],
}
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def is_dual(case) -> bool:
    return case.model_type == "mm_clip"


def has_texts(case) -> bool:
    """Those of CLIP's tokenizer."""
    return "text" in case.inputs and not is_blip2(case)


def is_blip2(case) -> bool:
    return case.model_type == "mm_blip2"


def learns_tokens(case) -> bool:
    """Its vocabulary may grow and train, which a frozen one does not."""
    return has_texts(case) and not case.frozen_parts


CASES_AND_TARGETS = [
    (case, targets) for case in cases_for(7) for targets in (TOWERS if is_dual(case) else [EVERYWHERE])
]
EVERY = pytest.mark.parametrize("case", cases_for(7), ids=str)
EVERY_TARGET = pytest.mark.parametrize(
    ("case", "targets"),
    CASES_AND_TARGETS,
    ids=[
        f"{case}, {' and '.join(TOWERS[targets])}" if is_dual(case) else str(case)
        for case, targets in CASES_AND_TARGETS
    ],
)
BLIP2 = pytest.mark.parametrize("case", cases_for(7, is_blip2), ids=str)
DUAL = pytest.mark.parametrize("case", cases_for(7, is_dual), ids=str)
WITH_TEXTS = pytest.mark.parametrize("case", cases_for(7, has_texts), ids=str)
LEARNS_TOKENS = pytest.mark.parametrize("case", cases_for(7, learns_tokens), ids=str)


def lora(targets: str = EVERYWHERE, **options) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules=targets, **options)


def heads(case) -> list[str]:
    return HEADS.get(case.name) or HEADS[case.model_class.__name__]


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_noise(model):
    """Moves every trainable weight off its initial value, since LoRA begins as no change at all."""
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def adapted(case, targets: str = EVERYWHERE, **options) -> PeftModel:
    return with_noise(get_peft_model(case.build(), lora(targets, **options))).eval()


def weights(model) -> dict[str, torch.Tensor]:
    """Parameters and buffers."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def frozen(model) -> dict[str, torch.Tensor]:
    """Parameters and buffers that do not train, under the names of the model without adapters."""
    kept = {name: value for name, value in weights(model).items() if not value.requires_grad}
    return {re.sub(r"^base_model\.model\.|\.base_layer|\.original_module", "", name): kept[name] for name in kept}


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def assert_same_outputs(case, ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    """Bit-equal; of BLIP-2 but for the last bits of float32."""
    if not is_blip2(case):
        assert_same(ours, expected)
        return
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert largest_error(ours[name], value) <= 2e-6, name


@torch.no_grad()
def outputs_of(case, model) -> dict[str, torch.Tensor]:
    case.drawing_alike(model.get_base_model() if isinstance(model, PeftModel) else model)
    batch = case.batch(3)
    return case.read(model(**batch), batch)


def adapter_trainer(case, folder, model, samples=None, **arguments):
    """transformers' Trainer; a tower alone learns to answer with ones."""
    samples = samples or samples_of(case.batch(NUM_SAMPLES))
    trainer = trainer_for(case, folder, model=model, samples=samples, **{"optim": "adamw_torch", **arguments})
    if not case.loss:
        trainer.compute_loss_func = lambda outputs, *args, **options: (outputs.pooler_output - 1).square().mean()
    return trainer


@EVERY_TARGET
def test_adapters_sit_in_the_named_projections_alone(case, targets):
    model = get_peft_model(case.build(), lora(targets))
    found = [name for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)]
    towers = TOWERS[targets] if is_dual(case) else ("",)
    prefixes = tuple(f"{tower}." if tower else "" for tower in towers)
    assert all(name.startswith(prefixes) for name in found)
    whole = [model.base_model.model.get_submodule(tower) for tower in towers]
    convolutional = [block for tower in whole for block in blocks(tower) if hasattr(block, "conv1")]
    assert len(found) == 2 * sum(len(list(attentions(tower))) for tower in whole) + 3 * len(convolutional)
    assert {name.rpartition(".")[2] for name in found} <= {"q_proj", "v_proj", "conv1", "conv2", "conv3"}
    expected = {f"base_model.model.{name}.lora_{side}.default.weight" for name in found for side in "AB"}
    assert set(trainable(model)) == expected


@DUAL
@pytest.mark.parametrize(
    ("targets", "moved", "kept"),
    [(IN_PICTURE_TOWER, "image_embeds", "text_embeds"), (IN_TEXT_TOWER, "text_embeds", "image_embeds")],
    ids=["vision_model", "text_model"],
)
def test_adapters_of_one_tower_leave_the_other_alone(case, targets, moved, kept):
    ours, base = outputs_of(case, adapted(case, targets)), outputs_of(case, case.build())
    assert torch.equal(ours[kept], base[kept])
    assert largest_error(ours[moved], base[moved]) > 1e-3


@EVERY_TARGET
def test_training_moves_the_adapters_alone(case, targets, tmp_path):
    model = get_peft_model(case.build(), lora(targets))
    before = copy.deepcopy(trainable(model))
    options = {"max_steps": 10, "learning_rate": 3e-2, "per_device_train_batch_size": NUM_SAMPLES}
    trainer = adapter_trainer(case, tmp_path, model, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert not any(torch.equal(value, before[name]) for name, value in trainable(model).items())
    assert_same(frozen(model), weights(case.build()))


@EVERY_TARGET
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_every_block_and_changes_no_gradient(case, targets, reentrant):
    """A reentrant checkpoint passes no gradient on where its input needs none; the trained head hides that."""
    batch = in_double(case.batch(4))

    def calls_and_gradients(checkpointing: bool):
        model, calls = adapted(case, targets, modules_to_save=heads(case)).double().train(), []
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        for block in blocks(model):
            first_layer(block).register_forward_pre_hook(lambda module, args: calls.append(module))
        outputs = case.read(model(**batch), batch)
        sum(value.square().sum() for value in outputs.values()).backward()
        return len(calls), {name: parameter.grad for name, parameter in trainable(model).items()}

    calls, gradients = calls_and_gradients(checkpointing=False)
    checkpointed_calls, checkpointed_gradients = calls_and_gradients(checkpointing=True)
    for name, gradient in gradients.items():
        assert checkpointed_gradients[name] is not None, name
        # float64: what is computed again may round otherwise
        torch.testing.assert_close(checkpointed_gradients[name], gradient, rtol=1e-12, atol=1e-14)
    assert calls >= len(list(blocks(case.build())))
    assert checkpointed_calls == 2 * calls


@DUAL
def test_checkpointing_in_trainer_ends_with_equal_adapters(case, tmp_path):
    def trained(**arguments):
        trainer = adapter_trainer(case, tmp_path, adapted(case), max_steps=3, learning_rate=1e-2, **arguments)
        trainer.train()
        return trainable(trainer.model)

    assert_same(trained(activation_checkpointing=True), trained())


@EVERY
def test_heads_train_whole_and_are_kept_with_the_adapter(case, tmp_path):
    model = get_peft_model(case.build(), lora(modules_to_save=heads(case)))
    adapter_trainer(case, tmp_path / "run", model, learning_rate=1e-2).train()
    assert_same(frozen(model), weights(case.build()))
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = case.build()
    for head in heads(case):
        for name, initial in base.get_submodule(head).named_parameters():
            assert not torch.equal(stored[f"base_model.model.{head}.{name}"], initial), head
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_same_outputs(case, outputs_of(case, reloaded.eval()), outputs_of(case, model.eval()))


@EVERY
def test_a_saved_adapter_holds_what_trains_and_no_more(case, tmp_path):
    model = adapted(case, modules_to_save=heads(case))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == ADAPTER_FILES
    names = {re.sub(r"\.default|\.modules_to_save", "", name): value for name, value in trainable(model).items()}
    assert_same(load_file(tmp_path / "adapter_model.safetensors"), names)


@EVERY
def test_an_adapter_reloads_onto_its_base(case, tmp_path):
    """By PeftModel onto a model in memory, and by the auto class, which finds the base in the adapter's config."""
    case.build().save_pretrained(tmp_path / "base")
    base = case.auto_class.from_pretrained(tmp_path / "base")
    model = with_noise(get_peft_model(base, lora(modules_to_save=heads(case)))).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = outputs_of(case, model)
    plain = outputs_of(case, case.build())
    assert max(largest_error(expected[name], value) for name, value in plain.items()) > 1e-3

    wrapped = PeftModel.from_pretrained(case.build(), tmp_path / "adapter").eval()
    opened = case.auto_class.from_pretrained(tmp_path / "adapter")
    assert type(opened) is case.model_class
    assert not opened.training
    assert_same_outputs(case, outputs_of(case, wrapped), expected)
    assert_same_outputs(case, outputs_of(case, opened), expected)


@EVERY
def test_the_trainable_part_alone_is_restored(case):
    """Into a model whose adapters were drawn anew."""
    options = {"modules_to_save": heads(case)}
    model = adapted(case, **options)
    part = copy.deepcopy(get_peft_model_state_dict(model))
    assert sum(value.numel() for value in part.values()) == sum(value.numel() for value in trainable(model).values())
    torch.manual_seed(1)
    other = with_noise(get_peft_model(case.build(), lora(**options))).eval()
    assert not set_peft_model_state_dict(other, part).unexpected_keys
    assert_same(trainable(other), trainable(model))
    assert_same(outputs_of(case, other), outputs_of(case, model))


@EVERY_TARGET
def test_a_merged_model_is_whole_without_peft(case, targets, tmp_path):
    """F12: both towers are merged, and nothing that was not targeted changes."""
    model = adapted(case, targets, modules_to_save=heads(case))
    adapters = {name for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    expected = outputs_of(case, model)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {"generation_config.json"} == {
        "config.json",
        "model.safetensors",
    }

    merged = case.auto_class.from_pretrained(tmp_path)
    for name, value in outputs_of(case, merged).items():
        assert largest_error(value, expected[name]) <= 1e-5, name
    base, ours = weights(case.build()), weights(merged)
    assert set(ours) == set(base)
    changed = {name for name in base if not torch.equal(ours[name], base[name])}
    of_heads = {name for name in base if name.startswith(tuple(f"{head}." for head in heads(case)))}
    assert changed == {f"{name}.weight" for name in adapters} | of_heads


def contrastive_trainer(case, folder, model, samples=None, **arguments):
    options = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    options |= {"per_device_train_batch_size": NUM_SAMPLES // 2, **arguments}
    return ContrastiveTrainer(
        model=model,
        args=ContrastiveTrainingArguments(output_dir=str(folder), **options),
        train_dataset=samples or samples_of(case.batch(NUM_SAMPLES)),
    )


def wrapped(model, config: LoraConfig):
    return get_peft_model(model, config)


def injected(model, config: LoraConfig):
    return inject_adapter_in_model(config, model)


def added(model, config: LoraConfig):
    model.add_adapter(config)
    return model


def run(case, folder, attach, trainer, seed: int, resume: str | None = None):
    """Six steps of LoRA with dropout and with its own draw of fresh adapters; a checkpoint stands inside an epoch."""
    base = case.build()
    torch.manual_seed(seed)
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    trainer = trainer(case, folder, attach(base, lora(lora_dropout=0.2)), **arguments, lr_scheduler_type="linear")
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_end(resumed, straight):
    assert_same(trainable(resumed.model), trainable(straight.model))
    assert_same(frozen(resumed.model), frozen(straight.model))
    ours, expected = resumed.optimizer.state_dict(), straight.optimizer.state_dict()
    assert ours["param_groups"] == expected["param_groups"]
    assert set(ours["state"]) == set(expected["state"])
    for number, state in expected["state"].items():
        assert_same(ours["state"][number], state)
    assert resumed.lr_scheduler.state_dict() == straight.lr_scheduler.state_dict()
    ours, expected = (
        [(entry["loss"], entry["learning_rate"]) for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (resumed, straight)
    )
    assert ours == expected
    assert len({rate for _, rate in ours}) == 6


WAYS = [
    *((case, adapter_trainer, wrapped) for case in cases_for(7, with_loss)),
    *((case, adapter_trainer, injected) for case in cases_for(7, is_dual)),
    *((case, contrastive_trainer, wrapped) for case in cases_for(7, is_dual)),
]


@pytest.mark.parametrize(
    ("case", "trainer", "attach"),
    WAYS,
    ids=[f"{case}, {trainer.__name__}, {attach.__name__}" for case, trainer, attach in WAYS],
)
def test_a_resumed_run_ends_like_one_left_alone(case, trainer, attach, tmp_path):
    """F08: the fresh adapters of the second run are not those of the first."""
    straight = run(case, tmp_path / "straight", attach, trainer, seed=1)
    assert_same(frozen(straight.model), weights(case.build()))
    checkpoint = str(tmp_path / "straight" / "checkpoint-3")
    resumed = run(case, tmp_path / "resumed", attach, trainer, seed=2, resume=checkpoint)
    assert_same_end(resumed, straight)


@pytest.fixture
def accepted_peft(monkeypatch):
    """transformers' `add_adapter` asks for a PEFT that may not be out yet; from 0.21 on it has what is needed."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21")


@pytest.mark.parametrize("case", cases_for(7, is_dual)[:1], ids=str)
@pytest.mark.parametrize(
    ("trainer", "sentence"), [(adapter_trainer, "checkpoint-3"), (contrastive_trainer, "add_adapter.*get_peft_model")]
)
def test_an_adapter_added_in_place_is_refused_at_resume(case, trainer, sentence, accepted_peft, tmp_path):
    """F08: Trainer saves such an adapter but does not read it back; what must not happen is training on without."""
    run(case, tmp_path / "straight", added, trainer, seed=1)
    assert "adapter_model.safetensors" in {path.name for path in (tmp_path / "straight" / "checkpoint-3").iterdir()}
    checkpoint = str(tmp_path / "straight" / "checkpoint-3")
    with pytest.raises(ValueError, match=sentence):
        run(case, tmp_path / "resumed", added, trainer, seed=2, resume=checkpoint)


@DUAL
def test_the_final_adapter_of_the_contrastive_trainer_opens_alone(case, tmp_path):
    case.build().save_pretrained(tmp_path / "base")
    base = case.auto_class.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora(modules_to_save=heads(case)))
    trainer = contrastive_trainer(case, tmp_path / "run", model, max_steps=2, learning_rate=1e-2)
    trainer.processing_class = case.preparer
    trainer.train()
    trainer.save_whole_model(tmp_path / "final")
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert names >= ADAPTER_FILES
    assert not names & {"model.safetensors", "config.json"}
    opened = case.auto_class.from_pretrained(tmp_path / "final")
    assert_same(outputs_of(case, opened), outputs_of(case, model.eval()))


@DUAL
def test_the_logit_scale_is_found_and_logged_behind_a_wrapper(case, tmp_path):
    model = get_peft_model(case.build(), lora())
    assert find_logit_scale(model) is model.base_model.model.logit_scale
    trainer = contrastive_trainer(case, tmp_path, model, max_steps=1)
    trainer.train()
    expected = torch.exp(-case.build().logit_scale).item()
    assert trainer.state.log_history[0]["temperature"] == pytest.approx(expected, abs=1e-5)


@DUAL
@pytest.mark.parametrize(("trains", "after"), [(True, MAX_LOGIT_SCALE), (False, 4.7)])
def test_a_logit_scale_is_clamped_only_where_it_trains(case, trains, after, tmp_path):
    """A frozen one beyond the bound belongs to the base, onto which the adapter will be put again."""
    base = case.build()
    torch.nn.init.constant_(base.logit_scale, 4.7)
    model = get_peft_model(base, lora())
    find_logit_scale(model).requires_grad_(trains)
    ClampLogitScale().on_optimizer_step(None, None, None, model=model)
    assert find_logit_scale(model).item() == pytest.approx(after, rel=1e-7)


@DUAL
def test_a_trainable_weight_that_no_adapter_file_would_hold_is_refused(case, tmp_path):
    """F08: LoRA cannot keep the logit scale, which is no module; a resumed run would begin with the old one."""
    model = get_peft_model(case.build(), lora())
    find_logit_scale(model).requires_grad_(True)
    with pytest.raises(ValueError, match="logit_scale.*adapter"):
        contrastive_trainer(case, tmp_path, model)


NEW_TOKENS = ["<mascot>", "<logo>"]
NEW_TEXTS = ["a <mascot> over a <logo>", "<logo>", "nothing"]


@pytest.fixture
def larger_tokenizer():
    larger = copy.deepcopy(tokenizer())
    assert larger.add_tokens(NEW_TOKENS) == 2
    return larger


def resized(model, larger, seed: int = 0):
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(larger))
    return model.eval()


def token_table(model) -> torch.Tensor:
    return model.get_input_embeddings().weight


@torch.no_grad()
def embed(case, model, larger, texts: list[str]) -> torch.Tensor:
    inputs = larger(texts, padding=True, return_tensors="pt")
    return getattr(model, "get_text_features", model)(**inputs).pooler_output


@WITH_TEXTS
def test_a_larger_vocabulary_is_in_the_config_and_keeps_its_rows(case, larger_tokenizer, tmp_path):
    """F06: the end token, no longer the last id, is still where texts are pooled."""
    size = len(tokenizer())
    model = resized(case.build(), larger_tokenizer)
    model.save_pretrained(tmp_path)
    reloaded = case.auto_class.from_pretrained(tmp_path)
    for each in (model, reloaded):
        assert each.config.get_text_config().vocab_size == size + 2
        assert token_table(each).shape[0] == size + 2
        assert torch.equal(token_table(each)[:size], token_table(case.build()))
    texts = ["a red square", "two blue circles and a green line"]
    expected = embed(case, case.build(), tokenizer(), texts)
    assert torch.equal(embed(case, model, larger_tokenizer, texts), expected)
    assert torch.equal(embed(case, reloaded, larger_tokenizer, texts), expected)
    longer = embed(case, model, larger_tokenizer, NEW_TEXTS)
    alone = torch.cat([embed(case, model, larger_tokenizer, [text]) for text in NEW_TEXTS])
    torch.testing.assert_close(longer, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(embed(case, reloaded, larger_tokenizer, NEW_TEXTS), longer)


@BLIP2
def test_a_larger_vocabulary_of_blip2_keeps_what_is_said(case, tmp_path):
    """F06: of the Q-Former's text or of the language model's, heads and tied weights included."""
    model, size = case.build(), case.config().get_text_config().vocab_size
    before, expected = trainable(model).keys(), outputs_of(case, model)
    model.resize_token_embeddings(size + 2)
    assert trainable(model).keys() == before
    model.save_pretrained(tmp_path)
    for each in (model, case.drawing_alike(case.auto_class.from_pretrained(tmp_path))):
        assert each.config.get_text_config().vocab_size == size + 2
        assert each.get_input_embeddings().weight.shape[0] == size + 2
        for name, value in outputs_of(case, each).items():
            if name == "logits":
                assert value.shape[-1] == size + 2
                torch.testing.assert_close(value[..., :size], expected[name], rtol=1e-5, atol=1e-5)
            elif name not in ("loss", "loss_itg"):  # over more words
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def new_rows(larger) -> dict:
    return {"trainable_token_indices": {"token_embedding": larger.convert_tokens_to_ids(NEW_TOKENS)}}


@LEARNS_TOKENS
def test_new_tokens_travel_with_the_adapter(case, larger_tokenizer, tmp_path):
    """F13: a fresh base draws other rows for the new tokens; the adapter brings the trained ones."""
    model = get_peft_model(resized(case.build(), larger_tokenizer, seed=1), lora(**new_rows(larger_tokenizer)))
    inputs = larger_tokenizer((NEW_TEXTS * NUM_SAMPLES)[:NUM_SAMPLES], padding=True, return_tensors="pt")
    samples = samples_of({**case.batch(NUM_SAMPLES), **inputs})
    (name,) = [name for name in trainable(model) if "trainable_tokens" in name]
    before = trainable(model)[name].detach().clone()
    adapter_trainer(case, tmp_path / "run", model, samples, learning_rate=1e-2).train()
    assert (trainable(model)[name] != before).any(dim=1).all()

    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rows = stored[name.replace(".default", "")]
    assert torch.equal(rows, trainable(model)[name])
    fresh = resized(case.build(), larger_tokenizer, seed=2)
    untrained = embed(case, fresh, larger_tokenizer, NEW_TEXTS[:2])
    reloaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    expected = embed(case, model.eval(), larger_tokenizer, NEW_TEXTS)
    assert torch.equal(embed(case, reloaded, larger_tokenizer, NEW_TEXTS), expected)
    assert largest_error(untrained, expected[:2]) > 1e-3
    merged = reloaded.merge_and_unload()
    assert torch.equal(token_table(merged), torch.cat([token_table(case.build()), rows]))
    assert largest_error(embed(case, merged, larger_tokenizer, NEW_TEXTS), expected) <= 1e-5


@LEARNS_TOKENS
def test_an_adapter_with_new_tokens_needs_the_resize(case, larger_tokenizer, tmp_path):
    """F13: PEFT names the row that the base lacks."""
    model = get_peft_model(resized(case.build(), larger_tokenizer), lora(**new_rows(larger_tokenizer)))
    model.save_pretrained(tmp_path)
    size = len(tokenizer())
    with pytest.raises(IndexError, match=f"index {size} .* size {size}"):
        PeftModel.from_pretrained(case.build(), tmp_path)


@WITH_TEXTS
def test_an_id_beyond_the_vocabulary_is_named(case, larger_tokenizer):
    """F13: the tokenizer grew and the model did not."""
    size = len(tokenizer())
    with pytest.raises(ValueError, match=rf"{size + 1}.*{size}.*resize_token_embeddings"):
        embed(case, case.build(), larger_tokenizer, NEW_TEXTS)
