"""Row 4: every kernel answers the same, and all attention maps and hidden states can be had."""

import pytest
import torch

from hf_mm.models.clip.modeling_clip_resnet import Stage

from .cases import LAYERS, RESNET, attentions, blocks, cases_for, has_transformer, in_double, largest_error


def recorded_blocks(case, model) -> list[torch.nn.Module]:
    """The blocks of `towers`: of BLIP-2 those of its Q-Former."""
    return list(blocks(model.qformer if hasattr(model, "qformer") else model))


EVERY = pytest.mark.parametrize("case", cases_for(4), ids=str)
TRANSFORMERS = pytest.mark.parametrize("case", cases_for(4, has_transformer), ids=str)
RESNETS = pytest.mark.parametrize("case", cases_for(4, lambda case: not has_transformer(case)), ids=str)


def towers(case, outputs) -> list:
    """The outputs that carry hidden states and attention maps: where there are two towers, first the text's."""
    if outputs.get("qformer_outputs") is not None:
        return [outputs.qformer_outputs]
    pair = [outputs.get("text_model_output"), outputs.get("vision_model_output")]
    return [tower for tower in pair if tower is not None] or [outputs]


@EVERY
def test_sdpa_equals_eager(case):
    model, batch = case.build().double(), in_double(case.batch(3))
    answers = {}
    for kernel in ("sdpa", "eager"):
        model.set_attn_implementation(kernel)
        assert {module.config._attn_implementation for module in attentions(model)} == {kernel}
        answers[kernel] = case.read(model(**batch), batch)
    theirs = any(type(module).__module__.startswith("transformers.") for module in attentions(model))
    for name, reference in answers["eager"].items():  # transformers' eager kernel has its softmax in float32
        assert largest_error(answers["sdpa"][name], reference) <= (1e-5 if theirs else 1e-9), name


@EVERY
def test_sdpa_is_the_default_and_eager_can_be_asked_for(case, tmp_path):
    assert case.build().config._attn_implementation == "sdpa"
    case.build().save_pretrained(tmp_path)
    model = case.auto_class.from_pretrained(tmp_path, attn_implementation="eager")
    assert {module.config._attn_implementation for module in attentions(model)} == {"eager"}


@TRANSFORMERS
def test_every_block_gives_one_map_and_one_hidden_state(case):
    model, batch = case.build(), case.batch(3)
    model.set_attn_implementation("eager")
    outputs = model(**batch, output_attentions=True, output_hidden_states=True)
    recorded = towers(case, outputs)
    assert sum(len(tower.attentions) for tower in recorded) == len(recorded_blocks(case, model)) >= 2
    for tower in recorded:
        length = tower.hidden_states[0].shape[1]
        assert len(tower.hidden_states) == len(tower.attentions) + 1
        assert {tuple(state.shape) for state in tower.hidden_states} == {tuple(tower.hidden_states[0].shape)}
        for attention in tower.attentions:
            assert attention.shape == (3, LAYERS["num_attention_heads"], length, length)
            torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


@TRANSFORMERS
def test_hidden_states_are_those_between_the_blocks(case):
    model, batch = case.build(), case.batch(3)
    seen = []
    for block in recorded_blocks(case, model):
        block.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    outputs = model(**batch, output_hidden_states=True)
    chains = []
    for before, after in seen:
        if not chains or chains[-1][-1] is not before:
            chains.append([before])
        chains[-1].append(after)
    if hasattr(model, "qformer"):  # which matches the pairs after it has read pictures and texts alone
        chains = chains[:1]
    elif case.frozen_parts:  # its pictures come first, since texts hold them
        chains.reverse()
    for tower, expected in zip(towers(case, outputs), chains, strict=True):
        assert len(tower.hidden_states) == len(expected)
        for state, reference in zip(tower.hidden_states, expected, strict=True):
            assert torch.equal(state, reference)


@RESNETS
def test_a_resnet_gives_the_map_of_its_pool_and_what_stands_between_its_stages(case):
    model, batch = case.build(), case.batch(3)
    model.set_attn_implementation("eager")
    seen = []
    for stage in (module for module in model.modules() if isinstance(module, Stage)):
        stage.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    tower = towers(case, model(**batch, output_attentions=True, output_hidden_states=True))[-1]
    (attention,) = tower.attentions
    assert attention.shape == (3, RESNET["num_attention_heads"], 1, 1 + 2 * 2)
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    assert [tuple(state.shape[1:]) for state in tower.hidden_states] == [
        (8, 16, 16),
        (32, 16, 16),
        (64, 8, 8),
        (128, 4, 4),
        (256, 2, 2),
    ]
    expected = [seen[0][0], *(output for _, output in seen)]
    assert all(torch.equal(state, one) for state, one in zip(tower.hidden_states, expected, strict=True))


@EVERY
def test_one_hidden_state_can_be_asked_for_by_index(case):
    model, batch = case.build(), case.batch(3)
    every = towers(case, model(**batch, output_hidden_states=True))
    one = towers(case, model(**batch, output_hidden_states=[-2]))
    for all_states, single in zip(every, one, strict=True):
        kept = [number for number, state in enumerate(single.hidden_states) if state is not None]
        assert kept == [len(all_states.hidden_states) - 2]
        assert torch.equal(single.hidden_states[-2], all_states.hidden_states[-2])


@EVERY
def test_nothing_is_recorded_unasked(case):
    outputs = case.build()(**case.batch(3))
    assert all(
        tower.get("hidden_states") is None and tower.get("attentions") is None for tower in towers(case, outputs)
    )


@pytest.mark.parametrize("case", cases_for(4, lambda case: not case.frozen_parts), ids=str)
def test_flex_attention_equals_eager(case):
    """Forward alone: its backward does not exist on CPUs. Each model is compiled, so towers once and alone."""
    model, batch = case.build(), case.batch(3)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        reference = case.read(model(**batch), batch)
        model.set_attn_implementation("flex_attention")
        answer = case.read(model(**batch), batch)
    for name, value in reference.items():
        assert largest_error(answer[name], value) <= 1e-5, name
