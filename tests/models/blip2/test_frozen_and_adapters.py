"""Stage 2: what stays frozen, what is saved, and what PEFT, bitsandbytes and accelerate make of it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small import (
    VOCABULARY,
    batch_of,
    config_of,
    feed,
    labels_of,
    lively,
    pictures,
    places_read,
    qformer_fields,
    slots,
    stage2,
    text_config,
    vision_config,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_mm.composite import language_model
from hf_mm.composite.language_model import open_language_model
from hf_mm.models.blip2.modeling_blip2 import MMBlip2ForConditionalGeneration
from hf_mm.models.blip2.modeling_blip2_stage1 import MMBlip2ForPreTraining

ROWS = [[*slots(), 0, 5, 6], [9, 10, 11], [0, *slots(), 12, 13, 14]]
NAMES = ["opt", "llama", "t5"]
OWN = ["qformer", "vision_norm", "language_projection"]
FROZEN = ("vision_tower.", "language_model.")


def dropping(name: str) -> MMBlip2ForConditionalGeneration:
    """A model whose language model has dropout, and it alone."""
    field = "dropout_rate" if name == "t5" else "attention_dropout" if name == "llama" else "dropout"
    return stage2(language_model=name, text_fields={field: 0.5})


def step(model, batch: dict, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def training_batch(model, count: int = 2) -> dict[str, torch.Tensor]:
    return {**feed(model, ROWS), "pixel_values": pictures(count)}


def all_tensors(model, prefixes=FROZEN) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach().clone() for name, value in named if name.startswith(prefixes)}


# --- frozen ---


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parts_stay_in_eval_mode_and_bit_equal(name):
    model = dropping(name).train()
    before, own = all_tensors(model), model.language_projection.weight.detach().clone()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    losses = [step(model, training_batch(model), optimizer) for _ in range(3)]

    for part in (model.vision_tower, model.language_model):
        assert not any(module.training for module in part.modules())
    assert model.qformer.training
    assert losses[-1] < losses[0]
    for key, value in all_tensors(model).items():
        assert torch.equal(value, before[key]), key
    assert not torch.equal(own, model.language_projection.weight)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_of_the_language_model_is_off(name):
    model = dropping(name)
    batch = training_batch(model)
    expected = model(**batch).loss
    model.train()
    model.language_model.train()  # by hand, which the next forward undoes
    assert torch.equal(model(**batch).loss, model(**batch).loss)
    assert torch.allclose(model(**batch).loss, expected, rtol=1e-6)
    text = feed(model, [[9, 10, 11]])
    model.language_model.train()
    assert torch.equal(model(**text).loss, model(**text).loss)


@pytest.mark.parametrize("name", NAMES)
def test_the_language_model_is_in_the_graph_and_the_tower_is_not(name):
    model = stage2(language_model=name).train()
    seen = {}
    model.vision_tower.register_forward_hook(lambda _, __, out: seen.update(tower=out.last_hidden_state))
    loss = model(**training_batch(model)).loss
    loss.backward()

    assert not seen["tower"].requires_grad
    for part in OWN:
        assert any(parameter.grad.abs().max() > 0 for parameter in model.get_submodule(part).parameters()), part
    assert model.qformer.embeddings.query_tokens.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.language_model.parameters())
    assert all(parameter.grad is None for parameter in model.vision_tower.parameters())


def block_of(name: str, model) -> torch.nn.Module:
    if name == "t5":
        return model.language_model.decoder.block[0].layer[-1]
    return (
        model.language_model.model.layers[0].mlp
        if name == "llama"
        else model.language_model.model.decoder.layers[0].fc1
    )


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_recomputes_the_language_model_with_equal_gradients(name):
    gradients, counts = [], []
    for checkpointing in (False, True):
        model = dropping(name).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls = []
        block_of(name, model).register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        batch = {**training_batch(model), "pixel_values": pictures(2).double()}
        model(**batch).loss.backward()
        counts.append(len(calls))
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})

    assert counts == [1, 2]
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        assert torch.allclose(gradients[1][key], value, rtol=1e-9, atol=1e-14), key


def test_checkpointing_computes_the_loss_of_what_texts_begin_with(monkeypatch):
    """Words before the picture, which all texts share, are read with the rest then."""
    monkeypatch.setattr(language_model, "FEWEST_SPARED", 1)
    model = stage2().double().train()
    rows = [[0, *range(10, 20), *slots(), 5, 6], [0, *range(10, 20), *slots(), 7, 8]]
    batch = {**feed(model, rows), "pixel_values": pictures(2).double()}
    batch["labels"] = batch["labels"].where(torch.arange(batch["labels"].shape[1]) > 13, -100)
    places, losses = places_read(model.language_model), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append((loss.detach(), model.language_projection.weight.grad.clone()))
    assert places[:2] == [11, 2 * 4] and places[2] == 2 * 15
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-14)


# --- saved and opened ---


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_each_part_keeps_its_dtype(part, dtype, tmp_path):
    """Of a frozen part in half precision beside what trains in float32; unless one dtype is asked for."""
    model = stage2()
    getattr(model, part).to(dtype)
    model.save_pretrained(tmp_path)
    again = MMBlip2ForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert again[name].dtype == tensor.dtype and again[name].equal(tensor), name
    for asked in (torch.float32, torch.float16, torch.bfloat16):
        whole = MMBlip2ForConditionalGeneration.from_pretrained(tmp_path, dtype=asked)
        assert {tensor.dtype for tensor in whole.parameters()} == {asked}
    model.float().save_pretrained(tmp_path)
    whole = MMBlip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert {tensor.dtype for tensor in whole.parameters()} == {torch.float32}


def test_whole_numbers_stay_whole_and_what_is_kept_in_float32_stays_so(tmp_path):
    """A BatchNorm's count of batches, and the layer of T5 that transformers does not open in float16."""
    model = stage2("mm_clip_resnet", language_model="t5")
    model.vision_tower.to(torch.bfloat16)
    model.language_model.save_pretrained(tmp_path / "lm")
    model.language_model = open_language_model(str(tmp_path / "lm"), dtype=torch.float16)
    model.save_pretrained(tmp_path / "model")
    again = MMBlip2ForConditionalGeneration.from_pretrained(tmp_path / "model").state_dict()
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in again.items()} == dtypes
    assert {torch.int64, torch.bfloat16, torch.float16, torch.float32} == set(dtypes.values())
    assert any(name.endswith(".wo.weight") and dtype == torch.float32 for name, dtype in dtypes.items())
    assert all(again[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_what_is_no_part_is_refused(tmp_path):
    tower, language_model = saved_parts(tmp_path)
    lm = open_language_model(language_model)
    for wrong, message in (
        (lm.model, "LlamaModel does not generate text"),
        (AutoModel.from_pretrained(tower), "does not generate text: give a causal or encoder-decoder language model"),
        (get_peft_model(open_language_model(language_model), LoraConfig(**LORA_OF_LM)), "is no PreTrainedModel: give"),
    ):
        with pytest.raises(ValueError, match=message):
            between(tower, wrong)


def saved_parts(folder, name: str = "llama", **text_fields) -> tuple[str, str]:
    """Folders of a tower and of a language model."""
    tower = lively(AutoModel.from_config(vision_config("mm_clip_vision")))
    tower.save_pretrained(folder / "tower")
    language_model = stage2(language_model=name, text_fields=text_fields).language_model
    language_model.save_pretrained(folder / "lm")
    return str(folder / "tower"), str(folder / "lm")


def between(tower: str, language_model, **fields) -> MMBlip2ForConditionalGeneration:
    torch.manual_seed(1)
    return MMBlip2ForConditionalGeneration.from_vision_language_pretrained(
        tower, language_model, qformer_config=qformer_fields(), **fields
    )


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_trained_part_is_saved_alone(name, tmp_path):
    tower, language_model = saved_parts(tmp_path, name)
    model = between(tower, language_model).eval()
    for parameter in model.qformer.parameters():
        parameter += 0.01
    model.save_trained_part(tmp_path / "trained")
    stored = load_file(tmp_path / "trained" / "trained_part.safetensors")
    again = MMBlip2ForConditionalGeneration.from_trained_part(str(tmp_path / "trained")).eval()
    batch = training_batch(model)

    assert {key.split(".")[0] for key in stored} == set(OWN)
    assert model.config.base_models["vision_tower"]["name"] == tower
    assert model.config.base_models["language_model"]["name"] == language_model
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert not any(parameter.requires_grad for parameter in again.language_model.parameters())
    generate = {**batch_of(ROWS, "left"), "pixel_values": pictures(2), "do_sample": False}
    assert torch.equal(again.generate(**generate, max_new_tokens=4), model.generate(**generate, max_new_tokens=4))


def test_another_language_model_is_not_taken_for_that_of_the_training(tmp_path):
    tower, language_model = saved_parts(tmp_path)
    between(tower, language_model).save_trained_part(tmp_path / "trained")
    other = AutoModelForCausalLM.from_config(text_config("llama"))
    with pytest.raises(ValueError, match="language_model"):
        MMBlip2ForConditionalGeneration.from_trained_part(str(tmp_path / "trained"), language_model=other)


@torch.no_grad()
def test_soft_tokens_begin_as_large_as_words(tmp_path):
    """Root mean squares over many pictures."""
    for name in ("llama", "gemma2-soft-capping", "granite-scaling", "bart"):
        model = between(*saved_parts(tmp_path / name, name)).eval()
        soft = model.get_image_features(pictures(32)).pooler_output.pow(2).mean().sqrt()
        weights = model.language_model.get_input_embeddings().weight
        ids = torch.arange(len(weights))
        ids = ids[weights.abs().sum(1) > 0][None]
        seen = model.language_model.get_input_embeddings()(ids)
        if name == "gemma2-soft-capping":
            seen = model.language_model.model.embed_tokens(ids)
        words = seen.pow(2).mean().sqrt()
        assert soft / words == pytest.approx(1, rel=0.35), name


@torch.no_grad()
def test_goes_on_from_stage_1(tmp_path):
    stage1 = MMBlip2ForPreTraining(config_of(use_text=True, text_fields={}))
    lively(stage1).save_pretrained(tmp_path / "stage1")
    _, language_model = saved_parts(tmp_path)
    for use_text in (False, True):
        for source in (stage1, str(tmp_path / "stage1")):
            model = MMBlip2ForConditionalGeneration.from_stage1(source, language_model, use_text=use_text).eval()
            expected = stage1.eval().state_dict()
            for key, value in model.state_dict().items():
                if key.split(".")[0] in ("vision_tower", "vision_norm", "qformer"):
                    assert torch.equal(value, expected[key]), key
            assert ("qformer.embeddings.word_embeddings.weight" in model.state_dict()) == use_text
            assert model(**training_batch(model)).loss.isfinite()


@pytest.mark.parametrize("name", ["opt", "llama", "llama-tied", "t5"])
def test_new_words(name, tmp_path):
    model = stage2(language_model=name)
    lm = model.language_model
    embedding, head = lm.get_input_embeddings().weight.clone(), lm.get_output_embeddings().weight.clone()
    tied = lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    model.resize_token_embeddings(VOCABULARY + 4)

    assert model.config.text_config.vocab_size == lm.config.vocab_size == VOCABULARY + 4
    assert torch.equal(lm.get_input_embeddings().weight[:VOCABULARY], embedding)
    assert torch.equal(lm.get_output_embeddings().weight[:VOCABULARY], head)
    assert (lm.get_input_embeddings().weight is lm.get_output_embeddings().weight) == tied
    assert not any(parameter.requires_grad for parameter in lm.parameters())

    batch = training_batch(model)
    batch["labels"][0, -1] = VOCABULARY + 3
    if name != "t5":
        batch["input_ids"][0, -1 - (batch["input_ids"].shape[1] - len(ROWS[0]))] = VOCABULARY + 2
    model.train()
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()
    model.eval()
    loss = model(**batch).loss
    model.save_pretrained(tmp_path)
    again = MMBlip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.text_config.vocab_size == VOCABULARY + 4
    assert torch.equal(again(**batch).loss, loss)
    both = again.language_model.get_input_embeddings().weight, again.language_model.get_output_embeddings().weight
    assert (both[0] is both[1]) == tied


@pytest.mark.parametrize("name", ["opt", "llama", "t5", "bart"])
@torch.no_grad()
def test_opens_bit_equal_and_frozen(name, tmp_path):
    model = stage2(language_model=name)
    model.save_pretrained(tmp_path)
    again, info = MMBlip2ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = training_batch(model)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    for key, parameter in again.named_parameters():
        assert parameter.requires_grad is not key.startswith(FROZEN), key


ON_DISK = {"vision_tower": "cpu", "language_model": "disk", **dict.fromkeys(OWN, "cpu")}


@pytest.mark.parametrize("places", [ON_DISK, 30_000, 80_000], ids=["by hand", "30 kB", "80 kB"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_language_model_on_disk_answers_the_same(name, places, tmp_path):
    """Chosen by hand, or by a limit of memory."""
    model = stage2(language_model=name)
    model.save_pretrained(tmp_path / "model")
    limit = places if isinstance(places, int) else None
    spread = MMBlip2ForConditionalGeneration.from_pretrained(
        tmp_path / "model",
        device_map="auto" if limit else places,
        max_memory={"cpu": limit} if limit else None,
        offload_folder=str(tmp_path / "disk"),
    )
    assert "disk" in spread.hf_device_map.values()
    batch = training_batch(model)
    assert torch.equal(spread(**batch).logits, model(**batch).logits)
    assert torch.equal(spread(**batch).loss, model(**batch).loss)
    assert torch.equal(spread.train()(**batch).loss, model.train()(**batch).loss)
    prompt = {**batch_of(ROWS, "left"), "pixel_values": pictures(2), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(spread.generate(**prompt), model.generate(**prompt))
    alone = {"pixel_values": pictures(2), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(spread.generate(**alone), model.generate(**alone))


# --- PEFT ---

LORA_OF_LM = {"r": 2, "target_modules": ["q_proj"]}
LORA = {"r": 2, "lora_alpha": 8, "init_lora_weights": False, "target_modules": r".*language_model.*\.(q_proj|v_proj)"}


def adapted(model, **fields) -> PeftModel:
    torch.manual_seed(7)
    return get_peft_model(model, LoraConfig(**{**LORA, "modules_to_save": OWN, **fields}))


def targets(name: str) -> dict:
    return {"target_modules": r".*language_model.*\.(q|v)"} if name == "t5" else {}


@pytest.mark.parametrize("name", NAMES)
def test_only_adapters_and_what_is_between_train(name):
    model = adapted(stage2(language_model=name), **targets(name)).train()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert {key for key in trained if "lora_" in key}
    for key in trained:
        assert ("lora_" in key and ".language_model." in key) or ".modules_to_save.default." in key, key
    assert {"qformer", "vision_norm", "language_projection"} == {
        key.split("base_model.model.")[1].split(".")[0] for key in trained if "lora_" not in key
    }

    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    step(model, training_batch(model.base_model.model), optimizer)
    for key, value in model.named_parameters():
        if not key.endswith("k_proj.bias"):  # softmax is blind to what all keys share
            assert torch.equal(value, before[key]) is (key not in trained), key


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_saved_opened_and_merged(name, tmp_path):
    model = adapted(stage2(language_model=name), **targets(name)).train()
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    batch = training_batch(model.base_model.model)
    step(model, batch, optimizer)
    model.eval().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(stage2(language_model=name), str(tmp_path)).eval()
    prompt = {**batch_of(ROWS, "left"), "pixel_values": pictures(2), "max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        logits, generated = model(**batch).logits, model.generate(**prompt)

        assert any(key.endswith("qformer.embeddings.query_tokens") for key in stored)
        assert not any("vision_tower" in key for key in stored)
        assert all("lora_" in key for key in stored if ".language_model." in key)
        assert torch.equal(again(**batch).logits, logits)
        assert torch.equal(again.generate(**prompt), generated)
        assert (stage2(language_model=name)(**batch).logits - logits).abs().max() > 1e-3
        merged = model.merge_and_unload()
        assert isinstance(merged, MMBlip2ForConditionalGeneration)
        assert torch.allclose(merged(**batch).logits, logits, rtol=0, atol=1e-5)
        assert torch.equal(merged.generate(**prompt), generated)


@pytest.mark.parametrize(
    ("name", "task"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("opt", "FEATURE_EXTRACTION")]
)
def test_an_adapter_may_name_its_task(name, task):
    """PEFT then hands on arguments of None that the model does not know."""
    target = r".*language_model.*\.(q_proj|q)"
    bare, named = (
        get_peft_model(stage2(language_model=name), LoraConfig(r=2, target_modules=target, task_type=one))
        for one in (None, task)
    )
    batch = training_batch(bare)
    for mode in (True, False):
        assert named.train(mode)(**batch).loss.equal(bare.train(mode)(**batch).loss)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    """PEFT alone would leave out what has no place."""
    get_peft_model(stage2(), LoraConfig(**LORA, modules_to_save=OWN)).save_pretrained(tmp_path)
    for other in (stage2(language_model="opt"), stage2(text_fields={"num_hidden_layers": 1})):
        with pytest.raises(ValueError, match="the adapter is of another base: it has .*language_model.*q_proj"):
            PeftModel.from_pretrained(other, tmp_path)
    own = PeftModel.from_pretrained(stage2(), tmp_path)
    own.get_base_model().load_state_dict(stage2().state_dict(), strict=False)  # no adapter


def test_dropout_of_adapters_acts_while_that_of_the_language_model_does_not():
    model = adapted(dropping("opt"), lora_dropout=0.5).train()
    batch = training_batch(model.base_model.model)
    assert not torch.equal(model(**batch).loss, model(**batch).loss)
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.training == ("lora_dropout" in key or "qformer" in key), key


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_reaches_adapters_too(name):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(dropping(name), **targets(name)).double().train()
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable()
        calls = []
        block_of(name, model.base_model.model).register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        batch = {**training_batch(model.base_model.model), "pixel_values": pictures(2).double()}
        model(**batch).loss.backward()
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert len(calls) == 2
    for key, value in gradients[0].items():
        assert torch.allclose(gradients[1][key], value, rtol=1e-9, atol=1e-14), key


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor([*slots(), 0, 5 + index, 6 + index])
        labels = ids.where(ids >= 0, -100)
        return {"input_ids": ids, "labels": labels, "pixel_values": pictures(1, seed=index)[0]}


class StopsAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def run_of(folder, steps: int, resume: bool = False) -> Trainer:
    options = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 0.01, "save_steps": 3}
    options |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    trainer = Trainer(
        model=adapted(stage2(), lora_dropout=0.0),
        args=TrainingArguments(output_dir=str(folder), **options),
        train_dataset=Rows(),
    )
    if steps < 6:
        trainer.add_callback(StopsAt(steps))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def test_a_run_with_adapters_is_resumed(tmp_path):
    straight = run_of(tmp_path / "straight", 6)
    run_of(tmp_path / "halves", 3)
    resumed = run_of(tmp_path / "halves", 6, resume=True)

    for (key, value), (_, other) in zip(
        straight.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(value, other), key
    rates = [
        {entry["step"]: (entry["learning_rate"], entry["loss"]) for entry in run.state.log_history if "loss" in entry}
        for run in (straight, resumed)
    ]
    assert rates[0] == rates[1]
    states = [run.optimizer.state_dict()["state"] for run in (straight, resumed)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value["exp_avg_sq"], states[1][key]["exp_avg_sq"])


@pytest.mark.parametrize("way", ["token indices", "whole embedding"])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_rows_of_new_words_are_in_the_adapter(name, way, tmp_path):
    def base():
        model = stage2(language_model=name)
        torch.manual_seed(0)
        model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
        return model

    new = [VOCABULARY, VOCABULARY + 1]
    if way == "token indices":
        rows = {"trainable_token_indices": {"embed_tokens": new}}
    elif name == "llama":
        rows = {"modules_to_save": [*OWN, "embed_tokens", "lm_head"]}
    else:
        rows = {"modules_to_save": [*OWN, "embed_tokens"], "ensure_weight_tying": True}
    model = adapted(base(), **rows).train()
    batch = batch_of([[*slots(), 0, *new, 5], [*new, 6]])
    batch |= {"labels": labels_of(batch), "pixel_values": pictures(1)}
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.5)
    with torch.no_grad():
        before = model.base_model.model.language_model.get_input_embeddings()(torch.tensor(new)).clone()
    for _ in range(2):
        step(model, batch, optimizer)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), str(tmp_path)).eval()

    with torch.no_grad():
        after = model.base_model.model.language_model.get_input_embeddings()(torch.tensor(new))
        assert (after - before).abs().amin(0).max() > 1e-4
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert any("embed_tokens" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        forgotten = PeftModel.from_pretrained(stage2(language_model=name), str(tmp_path)).eval()
        forgotten(**batch)


# --- bitsandbytes ---


def quantised(bits: int) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="quantisation is an extra of its own: hf_mm[quant]")


LAYER = {4: "Linear4bit", 8: "Linear8bitLt"}
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def quantised_modules(model, bits: int) -> set[str]:
    return {key for key, module in model.named_modules() if type(module).__name__ == LAYER[bits]}


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def take_over_4_bit_weights(whole, model) -> None:
    """Gives an unquantised model the weights that the quantised one computes with."""
    from bitsandbytes.functional import dequantize_4bit

    for key in quantised_modules(model, 4):
        weight = model.get_submodule(key).weight
        whole.get_submodule(key).weight.data = dequantize_4bit(weight.data, weight.quant_state).float()


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_language_model_lets_gradients_through(bits, tmp_path):
    tower, language_model = saved_parts(tmp_path, **WIDE)
    whole = between(tower, language_model).eval()
    model = between(tower, open_language_model(language_model, quantization_config=quantised(bits)))
    model.load_state_dict(
        {key: value for key, value in whole.state_dict().items() if key.split(".")[0] in OWN}, strict=False
    )
    batch = training_batch(model)
    if bits == 4:
        take_over_4_bit_weights(whole, model)
    with torch.no_grad():
        error = relative_error(model.eval()(**batch).logits, whole(**batch).logits)
    layers = quantised_modules(model, bits)
    assert len(layers) == 14
    assert all(key.startswith("language_model.model.layers.") for key in layers)
    assert error < {4: 1e-5, 8: 0.05}[bits]

    model.train()(**batch).loss.backward()
    whole.train()(**batch).loss.backward()
    gradient, reference = (part.qformer.embeddings.query_tokens.grad for part in (model, whole))
    assert relative_error(gradient, reference) < {4: 1e-4, 8: 0.1}[bits]


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_over_a_quantised_language_model(bits, tmp_path):
    tower, language_model = saved_parts(tmp_path, **WIDE)

    def base():
        return between(tower, open_language_model(language_model, quantization_config=quantised(bits)))

    model = adapted(base()).train()
    batch = training_batch(model.base_model.model)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    losses = [step(model, batch, optimizer) for _ in range(3)]
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), str(tmp_path / "adapter")).eval()
    prompt = {**batch_of(ROWS, "left"), "pixel_values": pictures(2), "max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        assert torch.equal(again.generate(**prompt), model.generate(**prompt))


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_opens_with_its_language_model_quantised(bits, tmp_path):
    whole = stage2(text_fields=WIDE)
    whole.save_pretrained(tmp_path)
    config = quantised(bits)
    model = MMBlip2ForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config)
    assert config.llm_int8_skip_modules is None
    batch = training_batch(model)

    layers = quantised_modules(model, bits)
    assert len(layers) == 14
    assert all(key.startswith("language_model.model.layers.") for key in layers)
    with torch.no_grad():
        assert 0 < relative_error(model.eval()(**batch).logits, whole(**batch).logits) < {4: 0.5, 8: 0.05}[bits]
    assert not any(parameter.requires_grad for parameter in model.language_model.parameters())
    model.train()(**batch).loss.backward()
    assert model.qformer.embeddings.query_tokens.grad.abs().max() > 0


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_the_trained_part_beside_a_quantised_language_model(bits, tmp_path):
    tower, language_model = saved_parts(tmp_path, **WIDE)
    model = between(tower, open_language_model(language_model, quantization_config=quantised(bits))).eval()
    model.save_trained_part(tmp_path / "trained")
    again = MMBlip2ForConditionalGeneration.from_trained_part(
        str(tmp_path / "trained"),
        language_model=open_language_model(language_model, quantization_config=quantised(bits)),
    ).eval()
    batch = training_batch(model)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.usefixtures("bitsandbytes")
def test_a_whole_model_with_a_quantised_part_is_not_saved(tmp_path):
    tower, language_model = saved_parts(tmp_path, **WIDE)
    model = between(tower, open_language_model(language_model, quantization_config=quantised(4)))
    with pytest.raises(ValueError, match="language_model is quantised: use save_trained_part"):
        model.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_the_trained_part_knows_how_texts_end(tmp_path):
    model = between(*saved_parts(tmp_path))
    model.generation_config.eos_token_id = 9
    model.save_trained_part(tmp_path / "trained")
    again = MMBlip2ForConditionalGeneration.from_trained_part(str(tmp_path / "trained"))
    assert again.generation_config.eos_token_id == 9
