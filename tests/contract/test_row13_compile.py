"""Row 13: torch compiles and exports whole models, which then answer as before."""

import pytest
import torch
from transformers import LogitsProcessorList

from .cases import all_configs, cases_for, trained

EVERY = pytest.mark.parametrize("case", cases_for(13), ids=str)
WITH_LOSS = pytest.mark.parametrize("case", cases_for(13, lambda case: case.loss), ids=str)
SPEAKING = pytest.mark.parametrize("case", cases_for(13, lambda case: 8 not in case.reasons), ids=str)
TOWERS = pytest.mark.parametrize("case", cases_for(13, lambda case: not case.loss and 4 not in case.reasons), ids=str)


@pytest.fixture(autouse=True)
def nothing_is_compiled_twice():
    """Every test starts with nothing compiled; a second graph for the same model is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def two_batches_of(case, number: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of the same shapes."""
    batch = case.batch(number)
    return batch, {name: value.flip(0) for name, value in batch.items()}


def called(forward, batch: dict[str, torch.Tensor]):
    """The outputs; what a loss draws is drawn alike, compiled or not."""
    torch.manual_seed(0)
    return forward(**batch)


def assert_equal(outputs: dict[str, torch.Tensor], references: dict[str, torch.Tensor]):
    assert set(outputs) == set(references)
    for name, reference in references.items():
        torch.testing.assert_close(
            outputs[name], reference, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@WITH_LOSS
def test_compiled_training_has_equal_outputs_and_gradients(case):
    model = case.build(seeded=False).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def outputs_and_gradients(forward, batch):
        model.zero_grad()
        outputs = called(forward, batch)
        outputs.loss.backward()
        return case.read(outputs, batch), {name: parameter.grad for name, parameter in trained(model).items()}

    for batch in two_batches_of(case, 4):
        outputs, gradients = outputs_and_gradients(compiled, batch)
        references, reference_gradients = outputs_and_gradients(model, batch)
        assert_equal(outputs, references)
        largest = max(gradient.abs().max() for gradient in reference_gradients.values())
        for name, gradient in reference_gradients.items():
            assert (gradients[name] - gradient).abs().max() <= 1e-5 * largest, name


@TOWERS
def test_compiled_towers_have_equal_outputs_and_hidden_states(case):
    """The first call that asks for hidden states puts transformers' hooks in place, and must not be a compiled one."""
    model = case.build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def outputs_and_states(forward, batch):
        outputs = forward(**batch, output_hidden_states=True)
        recorded = outputs.get("qformer_outputs") or outputs
        kept = (
            torch.ones(1, 1)
            if hasattr(recorded, "cross_attentions")
            else batch.get("attention_mask", torch.ones(1, 1))
        )
        states = {
            f"hidden_states[{number}]": state * kept[..., None] for number, state in enumerate(recorded.hidden_states)
        }
        return {**case.read(outputs, batch), **states}

    with torch.no_grad():
        for batch in two_batches_of(case, 4):
            references = outputs_and_states(model, batch)
            layers = getattr(model.config, "qformer_config", model.config)
            assert f"hidden_states[{4 if 'resnet' in case.name else layers.num_hidden_layers}]" in references
            assert_equal(outputs_and_states(compiled, batch), references)


@EVERY
def test_one_graph_serves_every_batch_size(case):
    model = case.build(seeded=False)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        model(**case.batch(2))  # see the towers above, of a tower's layer that is not the last
        for number in (2, 3, 5):
            batch = case.batch(number)
            assert_equal(case.read(called(compiled, batch), batch), case.read(called(model, batch), batch))


@EVERY
def test_an_exported_model_takes_any_batch_size(case):
    model, batch, other = case.build(seeded=False), case.batch(4), case.batch(6)
    for config in all_configs(model.config):  # of a language model: a cache is no output of a program
        config.use_cache = False
    number = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (), batch, dynamic_shapes={name: {0: number} for name in batch})
    with torch.no_grad():
        ours, expected = called(program.module(), other), called(model, other)
        assert_equal(case.read(ours, other), case.read(expected, other))


@SPEAKING
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_word_more_compiles_nothing_more(case, cache):
    """One graph is of the prompt and one of a word after it; over a cache that grows, one more serves every length."""
    model, graphs, after_each_word = case.build(), [], []
    model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False, max_new_tokens=5)
    raw = case.raw(3)
    batch = dict(case.preparer(images=raw["images"], text=raw["text"], return_tensors="pt"))
    options = {"cache_implementation": cache}
    expected = model.generate(**batch, **options)

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def count(input_ids, scores):
        after_each_word.append(len(graphs))
        return scores

    model.language_model.compile(backend=counting)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for _ in range(2):
            found = model.generate(**batch, **options, logits_processor=LogitsProcessorList([count]))
            assert torch.equal(found, expected)
    assert after_each_word[0] and len(set(after_each_word[2:])) == 1, after_each_word
