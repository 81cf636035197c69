"""Frozen parts stay as they are, bit for bit, whatever is done to the model around them."""

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import BertConfig, CLIPConfig, CLIPModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_mm.composite.freezing import freeze, hold_frozen, is_trained, upstream
from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.models.pic2word.modeling_pic2word import Pic2WordModel

STAR, END = 5, 49
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURE = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 50, "bos_token_id": 48, "eos_token_id": END, "pad_token_id": END}
RESNET = {
    "model_type": "mm_clip_resnet",
    "depths": (1, 1, 1, 1),
    "width": 8,
    "num_attention_heads": 4,
    "image_size": 32,
}
IDS = torch.tensor([[48, 1, 2, STAR, END]] * 4)
MASK = torch.ones_like(IDS)
PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
DROPOUT = {"attention_dropout": 0.5}
CHECKPOINTING = [{"use_reentrant": False}, {"use_reentrant": True}]


def ours() -> MMClipModel:
    """BatchNorm in the picture tower, dropout in the text tower."""
    return MMClipModel(MMClipConfig(vision_config=RESNET, text_config={**TEXT, **DROPOUT}, projection_dim=24))


def over_bert() -> MMClipModel:
    """Dropout as modules of the text tower, and as an argument of the picture tower's attention."""
    bert = BertConfig(**{**SMALL, "vocab_size": 50, "pad_token_id": END}, hidden_dropout_prob=0.5)
    fields = {"vision_config": {**PICTURE, **DROPOUT}, "text_config": bert, "text_pooling": "mean"}
    return MMClipModel(MMClipConfig(**fields, projection_dim=24))


def theirs() -> CLIPModel:
    return CLIPModel(
        CLIPConfig(text_config={**TEXT, **DROPOUT}, vision_config={**PICTURE, **DROPOUT}, projection_dim=24)
    )


DUALS = {"ours over a ResNet": ours, "ours over bert": over_bert, "transformers' CLIP": theirs}


def pic2word(dual=ours) -> Pic2WordModel:
    """Its mapper has no dropout: whatever varies is of the frozen part."""
    torch.manual_seed(0)
    clip = dual()
    for parameter in clip.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return Pic2WordModel.from_clip_pretrained(clip, placeholder_token_id=STAR, hidden_dim=20, dropout=0.0)


def forward(model: Pic2WordModel, **inputs):
    return model(IDS, **{"pixel_values": PIXELS, **inputs}, attention_mask=MASK)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_bit_equal(module: nn.Module, before: dict[str, torch.Tensor]):
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def steps(model: nn.Module, number: int = 2, **inputs):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(number):
        optimizer.zero_grad()
        forward(model, **inputs).loss.backward()
        optimizer.step()


def train_the_part(model):
    model.train()
    model.clip.train()


def train_a_tower(model):
    model.train()
    model.clip.text_model.train()
    model.clip.vision_model.train()


def train_each_module(model):
    for module in model.modules():
        module.train()


def train_and_eval_and_train(model):
    model.train().eval().train()


def set_every_flag(model):
    for module in model.modules():
        module.training = True


WAYS = {
    "train()": lambda model: model.train(),
    "train() of the part": train_the_part,
    "train() of a tower": train_a_tower,
    "train() of each module": train_each_module,
    "again": train_and_eval_and_train,
    "flags": set_every_flag,
    "the part of a model in eval mode": lambda model: model.eval().clip.train(),
    "a tower of a model in eval mode": lambda model: model.eval().clip.text_model.train(),
}


@pytest.mark.parametrize(
    ("dual", "way"),
    [*((ours, way) for way in WAYS), *((dual, "train() of a tower") for dual in (over_bert, theirs))],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_frozen_part_is_bit_equal_and_in_eval_mode_whatever_is_trained(dual, way):
    model = pic2word(dual)
    before, calm = state(model.clip), forward(model)
    way = WAYS[way]
    way(model)
    loud = forward(model)
    assert torch.equal(loud.composed_embeds, calm.composed_embeds)
    assert torch.equal(loud.image_embeds, calm.image_embeds)
    steps(model, 1)
    assert_bit_equal(model.clip, before)
    assert not any(module.training for module in model.clip.modules())
    for call in (
        lambda: model.get_text_features(IDS, MASK),
        lambda: model.get_image_features(PIXELS),
        lambda: model.get_composed_features(IDS, PIXELS, attention_mask=MASK),
    ):
        way(model)
        assert torch.equal(call().pooler_output, call().pooler_output)
    assert_bit_equal(model.clip, before)


@pytest.mark.parametrize("dual", DUALS.values(), ids=DUALS)
def test_no_dropout_of_the_frozen_part_without_gradients_in_training_mode(dual):
    model = pic2word(dual)
    calm = forward(model).composed_embeds
    model.activation_checkpointing_enable()
    model.train()
    with torch.no_grad():
        assert torch.equal(forward(model).composed_embeds, calm)
    with torch.inference_mode():
        assert torch.equal(forward(model).composed_embeds, calm)
    assert not any(module.training for module in model.clip.modules())


def test_the_picture_tower_keeps_no_graph_and_the_text_tower_does():
    model = pic2word().train()
    assert not model.get_image_features(PIXELS).pooler_output.requires_grad
    assert model.get_composed_features(IDS, PIXELS).pooler_output.requires_grad
    out = forward(model)
    out.loss.backward()
    assert not out.image_embeds.requires_grad
    assert all(parameter.grad is None for parameter in model.clip.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in model.mapper.parameters())


def test_freeze_and_upstream():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    with upstream(module):
        assert torch.is_grad_enabled()
    assert is_trained(module)
    assert freeze(module) is module
    assert not is_trained(module) and not any(part.training for part in module.modules())
    with upstream(module):
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    module[1].bias.requires_grad_()
    assert is_trained(module)


def counted(model) -> list:
    """The blocks of the text tower in the order in which they are computed, and whether in training mode."""
    calls = []
    blocks = [module for module in model.clip.text_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        # The attention of a block, since its own forward is what checkpointing wraps.
        inner = next(child for name, child in block.named_children() if "att" in name)

        inner.register_forward_pre_hook(lambda module, args, number=number: calls.append((number, module.training)))
    return calls


def enable_first(model, kwargs):
    model.activation_checkpointing_enable(kwargs)
    model.train()


def enable_last(model, kwargs):
    model.train()
    model.activation_checkpointing_enable(kwargs)


def enable_on_the_part(model, kwargs):
    model.train()
    model.clip.activation_checkpointing_enable(kwargs)


def enable_again(model, kwargs):
    model.activation_checkpointing_enable(kwargs)
    model.train()
    model.activation_checkpointing_disable()
    model.train()
    model.activation_checkpointing_enable(kwargs)
    model.train()


ORDERS = [enable_first, enable_last, enable_on_the_part, enable_again]


@pytest.mark.parametrize(
    ("dual", "kwargs", "order"),
    [
        *((ours, kwargs, order) for kwargs in CHECKPOINTING for order in ORDERS),
        *((dual, CHECKPOINTING[0], enable_first) for dual in (over_bert, theirs)),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_frozen_blocks_are_computed_again_in_backward_and_gradients_are_equal(dual, kwargs, order):
    plain = pic2word(dual).train()
    forward(plain).loss.backward()
    model = pic2word(dual)
    calls = counted(model)
    order(model, kwargs)
    loss = forward(model).loss
    assert [number for number, _ in calls] == [0, 1]
    loss.backward()
    assert [number for number, _ in calls] == [0, 1, 1, 0]
    assert not any(training for _, training in calls)
    assert not any(module.training for module in model.clip.modules())
    for ours_, reference in zip(model.mapper.parameters(), plain.mapper.parameters(), strict=True):
        torch.testing.assert_close(ours_.grad, reference.grad, rtol=1e-5, atol=1e-7)


def test_without_checkpointing_nothing_is_computed_again():
    model = pic2word()
    calls = counted(model)
    model.activation_checkpointing_enable()
    model.train()
    model.activation_checkpointing_disable()
    model.train()
    forward(model).loss.backward()
    assert len(calls) == 2
    with torch.no_grad():
        model.activation_checkpointing_enable()
        model.train()
        forward(model)
    assert len(calls) == 4


def hooks_of(model) -> int:
    """Those of freezing: transformers adds one of its own each time that checkpointing is switched on."""
    hooks = [[*module._forward_hooks.values(), *module._forward_pre_hooks.values()] for module in model.modules()]
    return sum(getattr(hook, "__module__", None) == hold_frozen.__module__ for own in hooks for hook in own)


def test_hooks_do_not_pile_up():
    model = pic2word()
    model.activation_checkpointing_enable()
    model.train()
    once = hooks_of(model)
    assert once > 0
    for _ in range(3):
        model.train().eval()
        model.activation_checkpointing_disable()
        model.activation_checkpointing_enable()
        model.train()
        forward(model).loss.backward()
    assert hooks_of(model) == once


def test_a_copy_of_the_model_is_held_by_itself():
    model = pic2word()
    model.activation_checkpointing_enable()
    model.train()
    forward(model).loss.backward()
    twin = copy.deepcopy(model)
    calls, others = counted(twin), counted(model)
    twin.zero_grad()
    forward(twin).loss.backward()
    assert [number for number, _ in calls] == [0, 1, 1, 0]
    assert not others
    assert not any(training for _, training in calls)
    assert hooks_of(twin) == hooks_of(model)
    for one, other in zip(twin.mapper.parameters(), model.mapper.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for module in (twin, model):
        assert not any(part.training for part in module.clip.modules())


def test_nothing_outside_keeps_a_held_model_alive():
    model = pic2word()
    model.activation_checkpointing_enable()
    model.train()
    forward(model).loss.backward()
    gone = weakref.ref(model.clip.text_model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kwargs", CHECKPOINTING, ids=["not reentrant", "reentrant"])
def test_an_exception_inside_a_block_leaves_its_flag_lowered(kwargs):
    model = pic2word(over_bert)
    model.activation_checkpointing_enable(kwargs)
    model.train()
    calm = forward(model).composed_embeds.detach()
    block = next(m for m in model.clip.text_model.modules() if isinstance(m, GradientCheckpointingLayer))

    def fail(module, args):
        raise RuntimeError("out of memory")

    for inner in (block, next(iter(block.children()))):
        hook = inner.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            forward(model)
        hook.remove()
        assert not any(module.training for module in model.clip.modules())
        assert torch.equal(forward(model).composed_embeds, calm)
    out = forward(model)
    hook = next(iter(block.children())).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        out.loss.backward()
    hook.remove()
    assert not any(module.training for module in model.clip.modules())


def adapted(model: Pic2WordModel) -> Pic2WordModel:
    config = LoraConfig(target_modules=r".*text_model.*\.(q_proj|query)", lora_dropout=0.5, init_lora_weights=False)
    inject_adapter_in_model(config, model.clip)
    return model


@pytest.mark.parametrize("part", [False, True], ids=["train()", "train() of the part"])
@pytest.mark.parametrize("dual", [ours, theirs])
def test_adapters_keep_their_own_dropout_and_the_rest_stays_calm(dual, part):
    model = adapted(pic2word(dual))
    frozen = {name: tensor for name, tensor in state(model.clip).items() if "lora" not in name}
    calm = forward(model.eval()).composed_embeds
    assert torch.equal(forward(model).composed_embeds, calm)
    model.train()
    if part:
        model.clip.train()
    torch.manual_seed(1)
    first, second = forward(model).composed_embeds, forward(model).composed_embeds
    assert not torch.equal(first, second)
    for module in model.clip.modules():
        if isinstance(module, nn.Dropout) and module.p == 0.5:
            module.p = 0.0
    # What varied was the adapters' dropout alone.
    assert torch.equal(forward(model).composed_embeds, calm)
    for name, module in model.clip.named_modules():
        assert module.training == ("lora_" in name), name
    before = {name: tensor for name, tensor in state(model.clip).items() if "lora" in name}
    steps(model)
    after = model.clip.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kwargs", CHECKPOINTING, ids=["not reentrant", "reentrant"])
def test_adapters_train_through_checkpointing(kwargs):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(pic2word())
        for module in model.clip.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        calls = counted(model)
        if checkpointing:
            model.activation_checkpointing_enable(kwargs)
        model.train()
        forward(model).loss.backward()
        assert len(calls) == (4 if checkpointing else 2)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 6 + 4
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_whole_model_wrapped_by_peft_holds_its_frozen_part():
    model = pic2word()
    calm = forward(model).composed_embeds
    config = LoraConfig(target_modules=r".*text_model.*q_proj", modules_to_save=["mapper"], lora_dropout=0.5)
    wrapped = get_peft_model(model, config).train()
    # B is zero at first: all that could change the outcome is dropout of the frozen part.
    out = wrapped(input_ids=IDS, pixel_values=PIXELS, attention_mask=MASK)
    assert torch.equal(out.composed_embeds, calm)
    before = {name: t for name, t in state(model.clip).items() if "lora" not in name}
    steps(model)
    assert all(torch.equal(model.clip.state_dict()[name], tensor) for name, tensor in before.items())


def test_part_of_the_part_unfrozen_trains_and_the_rest_is_bit_equal():
    """A projection is trained; the towers' weights, and the statistics of BatchNorm in them, stay."""
    model = pic2word()
    before, calm = state(model.clip), forward(model)
    model.clip.text_projection.requires_grad_(True)
    model.train()
    assert torch.equal(forward(model).composed_embeds, calm.composed_embeds)
    steps(model)
    after = model.clip.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["text_projection.weight"]


def test_the_picture_side_unfrozen_gets_gradients():
    model = pic2word(theirs)
    before = state(model.clip)
    model.clip.visual_projection.requires_grad_(True)
    model.train()
    assert forward(model).image_embeds.requires_grad
    assert not model.vision_features(PIXELS).requires_grad
    steps(model)
    after = model.clip.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["visual_projection.weight"]


def test_wholly_unfrozen_it_trains_like_any_other_and_frozen_again_it_is_still():
    model = pic2word()
    before = state(model.clip)
    model.clip.requires_grad_(True)
    model.train()
    assert all(module.training for module in model.clip.modules())
    calls = counted(model)
    model.activation_checkpointing_enable()
    forward(model).loss.backward()
    assert calls == [(0, True), (1, True), (1, True), (0, True)]
    steps(model, 1)
    after = model.clip.state_dict()
    assert not torch.equal(after["vision_model.bn1.running_mean"], before["vision_model.bn1.running_mean"]) or any(
        not torch.equal(after[name], before[name]) for name in before if "running_mean" in name
    )
    assert all(
        not torch.equal(after[name], before[name])
        for name, parameter in model.clip.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    )
    freeze(model.clip)
    model.zero_grad(set_to_none=True)
    model.train()
    before, calm = state(model.clip), forward(model.eval()).composed_embeds
    model.train()
    assert torch.equal(forward(model).composed_embeds, calm)
    calls.clear()
    steps(model)
    assert len(calls) == 8
    assert_bit_equal(model.clip, before)


def test_frozen_again_by_its_parameters_alone():
    """Without a call of freeze(): requires_grad says what is frozen."""
    model = pic2word()
    model.clip.requires_grad_(True)
    model.train()
    model.clip.requires_grad_(False)
    before = state(model.clip)
    assert torch.equal(forward(model).composed_embeds, forward(model).composed_embeds)
    steps(model)
    assert_bit_equal(model.clip, before)


def test_under_autocast_the_mapper_trains_in_float32():
    model = pic2word(theirs).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = forward(model)
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.mapper.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_frozen_part_in_half_precision_stays_bit_equal_while_the_mapper_trains(dtype):
    model = pic2word(theirs)
    model.clip.to(dtype)
    before, start = state(model.clip), state(model.mapper)
    model.activation_checkpointing_enable()
    model.train()
    steps(model)
    assert_bit_equal(model.clip, before)
    after = model.mapper.state_dict()
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in after.values())
    assert not any(torch.equal(after[name], tensor) for name, tensor in start.items())
