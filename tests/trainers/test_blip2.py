"""The trainer of BLIP-2: what it optimises at which rate, what it logs, and the word warm-up."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, ResNetConfig, ResNetModel

from hf_mm.losses.words import word_loss
from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config
from hf_mm.models.blip2.modeling_blip2 import MMBlip2ForConditionalGeneration
from hf_mm.models.blip2.modeling_blip2_stage1 import ACCURACIES, MMBlip2ForPreTraining
from hf_mm.trainers.blip2 import (
    WORD_LOGIT_SCALE,
    Blip2Trainer,
    Blip2TrainingArguments,
    WordWarmup,
    layer_decay_factors,
)
from hf_mm.trainers.checkpointing import latest_checkpoint
from hf_mm.trainers.contrastive import ContrastiveTrainer
from hf_mm.trainers.picture import PictureTrainer

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {"model_type": "mm_vit", **TOWER, "image_size": 16, "patch_size": 8}
QFORMER = {
    "num_query_tokens": 2,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 20,
    "max_position_embeddings": 8,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "bos_token_id": 3,
}
LANGUAGE = {"model_type": "llama", **TOWER, "num_hidden_layers": 1, "vocab_size": 20}


def stage1() -> MMBlip2ForPreTraining:
    torch.manual_seed(0)
    return MMBlip2ForPreTraining(MMBlip2Config(vision_config=VISION, qformer_config=QFORMER, joint_dim=8))


def stage2() -> MMBlip2ForConditionalGeneration:
    torch.manual_seed(0)
    qformer = {**QFORMER, "use_text": False}
    return MMBlip2ForConditionalGeneration(
        MMBlip2Config(vision_config=VISION, qformer_config=qformer, text_config=LANGUAGE)
    )


class Pairs(Dataset):
    """24 random pictures, two of each thing, with a text, a caption of 1 to 4 words, and its words."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        words = torch.randint(4, 20, (5,), generator=draw)
        length = 1 + index % 4
        labels = torch.cat([torch.full((2,), -100), words[:4]])
        labels[2 + length :] = -100
        return {
            "pixel_values": torch.randn(3, 16, 16, generator=draw),
            "text": torch.cat([torch.tensor([1]), words, torch.tensor([2])]),
            "image_ids": torch.tensor(index // 2),
            "caption": torch.cat([torch.full((2,), -200), words[:4]]),
            "labels": labels,
            "word_targets": words[:2] - 4,
        }


def collate_for(*names):
    rename = {"text": "input_ids", "caption": "input_ids"}

    def collate(samples):
        return {rename.get(name, name): torch.stack([sample[name] for sample in samples]) for name in names}

    return collate


STAGE1 = collate_for("pixel_values", "text", "image_ids")
STAGE2 = collate_for("pixel_values", "caption", "labels")
WORDS = collate_for("pixel_values", "word_targets")


def trainer_of(model, output_dir, collator=STAGE1, **arguments) -> Blip2Trainer:
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "lr_scheduler_type": "constant",
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = Blip2TrainingArguments(output_dir=str(output_dir), **{**defaults, **arguments})
    return Blip2Trainer(model=model, args=args, train_dataset=Pairs(), data_collator=collator)


def test_both_trainers_share_what_is_not_about_the_loss():
    assert issubclass(Blip2Trainer, PictureTrainer) and issubclass(ContrastiveTrainer, PictureTrainer)


def test_the_log_names_the_three_losses_the_accuracies_and_the_temperature(tmp_path):
    trainer = trainer_of(stage1(), tmp_path, max_steps=2, save_strategy="no", logging_steps=2, learning_rate=0.0)
    seen = []
    parts_of = trainer.parts_of
    trainer.parts_of = lambda outputs: seen.append(outputs) or parts_of(outputs)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert len(seen) == 2
    for name in ("loss_itc", "loss_itm", "loss_itg"):
        assert entry[name] == pytest.approx(sum(outputs[name].item() for outputs in seen) / 2, abs=1e-4)
    for place, name in enumerate(ACCURACIES):
        mean = sum(outputs.accuracies[place].item() for outputs in seen) / 2
        assert entry[f"accuracy_{name}"] == pytest.approx(mean, abs=1e-4)
    assert entry["loss"] == pytest.approx(entry["loss_itc"] + entry["loss_itm"] + entry["loss_itg"], abs=1e-3)
    assert entry["temperature"] == pytest.approx(0.07)


def test_averages_leave_out_what_could_not_be_measured(tmp_path):
    trainer = trainer_of(stage1(), tmp_path)
    for some, none, broken in ((1.0, torch.nan, 1.0), (torch.nan, torch.nan, torch.inf), (2.0, torch.nan, 1.0)):
        trainer._record(some=torch.tensor(some), none=torch.tensor(none), broken=torch.tensor(broken))
    trainer.log(logs := {"loss": 1.0})
    assert logs["some"] == 1.5 and math.isnan(logs["none"]) and logs["broken"] == math.inf
    trainer._record(some=torch.tensor(4.0))
    trainer.log(logs := {"loss": 1.0})
    assert logs["some"] == 4.0 and "none" not in logs


ADAPTED = {
    "whole": lambda model: model,
    "wrapped": lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])),
    "injected": lambda model: inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model),
}


@pytest.mark.parametrize("adapted", ADAPTED)
def test_hard_negatives_are_a_function_of_seed_and_step(tmp_path, adapted):
    """Whatever torch's own generator says; another step or seed draws others. With adapters it has another class."""
    trainer = trainer_of(ADAPTED[adapted](stage1()), tmp_path)
    batch = STAGE1([Pairs()[i] for i in range(16)])
    model = trainer.model.train()

    def drawn(step: int, own_seed: int) -> list[int]:
        torch.manual_seed(own_seed)
        trainer.state.global_step = step
        _, outputs = trainer.compute_loss(model, batch, return_outputs=True)
        return torch.cat(outputs.negatives).tolist()

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert drawn(3, 0) == drawn(3, 1) != drawn(4, 0)
    trainer.args.seed += 1
    other = drawn(3, 0)
    trainer.args.seed -= 1
    assert other != drawn(3, 0)


def test_frozen_parts_stay_and_matrices_alone_decay(tmp_path):
    """The temperature, of one dimension, is in no group that decays."""
    trainer = trainer_of(stage1(), tmp_path, weight_decay=0.3)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    decay = {group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}
    assert not any(name.startswith("vision_tower.") for own in decay.values() for name in own)
    assert {"temperature", "vision_norm.weight", "itm_head.bias"} <= decay[0.0]
    assert {"itm_head.weight", "qformer.layers.0.cross_attn.k_proj.weight"} <= decay[0.3]


def test_rates_fall_off_towards_the_patches(tmp_path):
    """lr * decay^(L + 1 - l), before and after Trainer's schedule has set them; no decay of gains among them."""
    model = stage1()
    model.vision_tower.requires_grad_(True)
    trainer = trainer_of(
        model, tmp_path, layer_decay=0.5, weight_decay=0.3, lr_scheduler_type="linear", save_strategy="no"
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trainer.create_optimizer_and_scheduler(num_training_steps=4)

    def rates(prefix: str) -> list[float]:
        groups = trainer.optimizer.param_groups
        return sorted({g["lr"] for g in groups for p in g["params"] if names[id(p)].startswith(prefix)})

    for factor in (1.0, 0.75):  # at the beginning, and after one of four steps of a linear schedule
        for block in range(3):
            expected = 1e-2 * factor * 0.5 ** (3 + 1 - (block + 1))
            assert rates(f"vision_tower.encoder.layers.{block}.") == [pytest.approx(expected)]
        assert rates("vision_tower.embeddings.") == [pytest.approx(1e-2 * factor * 0.5**4)]
        assert rates("qformer.") == rates("temperature") == [pytest.approx(1e-2 * factor)]
        assert trainer._get_learning_rate() == pytest.approx(1e-2 * factor)  # what is logged
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == sum(p.requires_grad for p in model.parameters())
    for group in trainer.optimizer.param_groups:
        assert all((p.ndim < 2) <= (group["weight_decay"] == 0.0) for p in group["params"])


def test_what_comes_after_the_blocks_learns_at_the_full_rate():
    tower = stage1().vision_tower
    factors = {name: layer_decay_factors(tower, 0.5)[parameter] for name, parameter in tower.named_parameters()}
    after = [factor for name, factor in factors.items() if "layers." not in name and "embeddings." not in name]
    assert after and set(after) == {1.0}


def test_a_tower_of_stages_has_no_place_for_blocks():
    tower = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1]))
    with pytest.raises(ValueError, match="resnet is no single stack of blocks"):
        layer_decay_factors(tower, 0.9)


def test_labels_of_accumulated_batches_weigh_alike(tmp_path):
    """Captions of unequal length: two halves give the gradient of the whole, not the mean of two means."""
    norms = []
    for size, halves in ((8, 1), (4, 2)):
        trainer = trainer_of(
            stage2(),
            tmp_path / str(size),
            STAGE2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=halves,
            max_steps=1,
            save_strategy="no",
            learning_rate=0.0,
            data_seed=3,
            max_grad_norm=1e9,
        )
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        trainer.train()
        norms.append((trainer.state.log_history[0]["grad_norm"], trainer.state.log_history[0]["loss"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_the_warmup_is_the_loss_of_its_soft_tokens_and_shares_the_models_parts():
    model = stage2()
    ids = torch.arange(4, 20)
    warmup = WordWarmup.of(model, ids)
    batch = WORDS([Pairs()[i] for i in range(6)])
    outputs = warmup.eval()(**batch)
    soft = model.eval().get_image_features(batch["pixel_values"]).pooler_output
    words = model.language_model.get_input_embeddings().weight[ids]
    loss, accuracy = word_loss(soft, words, batch["word_targets"], 30.0)
    torch.testing.assert_close(outputs.loss, loss)
    torch.testing.assert_close(outputs.accuracy, accuracy)
    assert {name for name, _ in warmup.named_parameters()} - {name for name, _ in model.named_parameters()} == {
        "logit_scale"
    }
    again = warmup.warmed_up()
    assert again.generation_config is warmup.generation_config is model.generation_config
    own = dict(model.named_parameters())
    assert all(parameter is own[name] for name, parameter in again.named_parameters())
    assert type(again) is MMBlip2ForConditionalGeneration


def test_the_warmup_learns_the_words_of_its_pictures_without_the_language_model(tmp_path, monkeypatch):
    model = stage2()
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
    before = {name: tensor.clone() for name, tensor in model.language_model.state_dict().items()}
    warmup = WordWarmup.of(model, torch.arange(4, 20))
    trainer = trainer_of(warmup, tmp_path, WORDS, max_steps=60, save_steps=30)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "accuracy" in entry]
    assert log[-1]["loss"] < 0.75 * log[0]["loss"] and log[-1]["accuracy"] > log[0]["accuracy"]
    assert warmup.logit_scale.item() != pytest.approx(WORD_LOGIT_SCALE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.language_model.state_dict().items())
    kept = json.loads((tmp_path / "checkpoint-60" / "config.json").read_text())
    assert kept["model_type"] == "mm_blip2"


def test_a_resumed_warmup_has_its_scale_again(tmp_path):
    straight = trainer_of(WordWarmup.of(stage2(), torch.arange(4, 20)), tmp_path / "straight", WORDS)
    straight.train()
    first = trainer_of(WordWarmup.of(stage2(), torch.arange(4, 20)), tmp_path / "run", WORDS)
    first.args.max_steps = 2
    first.train()
    again = trainer_of(WordWarmup.of(stage2(), torch.arange(4, 20)), tmp_path / "run", WORDS)
    again.train(resume_from_checkpoint=latest_checkpoint(tmp_path / "run"))
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_half_precision_is_refused_where_it_trains_and_taken_where_it_is_frozen(tmp_path):
    model = stage1()
    model.vision_tower.to(torch.bfloat16)
    trainer_of(model, tmp_path)
    model.vision_tower.requires_grad_(True)
    with pytest.raises(ValueError, match="bfloat16 and trainable"):
        trainer_of(model, tmp_path)


@pytest.mark.parametrize("decay", [0, 1.2])
def test_a_decay_that_is_none_is_refused(tmp_path, decay):
    with pytest.raises(ValueError, match="layer_decay must be above 0 and at most 1"):
        Blip2TrainingArguments(output_dir=str(tmp_path), layer_decay=decay)


def test_label_smoothing_is_refused_where_nothing_would_smooth(tmp_path):
    """Trainer's own would take labels for aligned with the scores, and replace the losses of stage 1."""
    with pytest.raises(ValueError, match="label_smoothing_factor is not followed .* set it to 0"):
        Blip2TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1)


def test_several_gpus_of_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Blip2TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="on 2 GPUs: start one for each with torchrun or accelerate launch"):
        trainer_of(stage1(), tmp_path)
