"""The Q-Former against transformers' under every mask of the paper's figure 2, and its invariants."""

import copy

import pytest
import torch
from qformer_oracle import (
    DEC,
    QFormerOracle,
    assert_same_gradients,
    features_of,
    perturbed,
    qformer_config,
    relative_error,
    texts_of,
)
from transformers import AutoModel, DynamicCache

from hf_mm.models.blip2.modeling_qformer import MMBlip2QFormerModel

MODES = ["unimodal", "bidirectional", "causal"]
LENGTHS = (7, 3, 5)


def qformer(dtype=torch.float64, attention="eager", **fields) -> MMBlip2QFormerModel:
    torch.manual_seed(0)
    model = MMBlip2QFormerModel(qformer_config(**fields))
    model.set_attn_implementation(attention)
    return perturbed(model, dtype)


def batch(side="right", width=None):
    ids, mask = texts_of(*LENGTHS, side=side, width=width)
    return features_of(len(LENGTHS)), ids, mask


def assert_close(ours, theirs, dtype=torch.float64):
    assert ours.dtype == dtype
    assert relative_error(ours, theirs) < (1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
class TestAgainstTransformers:
    def test_pictures_alone(self, dtype, attention):
        model, features = qformer(dtype, attention), features_of(3)
        out = model(encoder_hidden_states=features.to(dtype))
        assert out.text_hidden_state is None and out.causal_hidden_state is None
        assert_close(out.last_hidden_state, QFormerOracle(model).read(features)[0], dtype)

    def test_texts_alone(self, dtype, attention):
        model, (_, ids, mask) = qformer(dtype, attention), batch()
        out = model(input_ids=ids, attention_mask=mask)
        text = QFormerOracle(model).read(None, ids, mask)[1]
        for ours in (out.last_hidden_state, out.text_hidden_state):
            assert_close(ours[mask.bool()], text[mask.bool()], dtype)

    @pytest.mark.parametrize("mode", MODES)
    def test_both(self, dtype, attention, mode):
        model, (features, ids, mask) = qformer(dtype, attention), batch()
        out = model(features.to(dtype), ids, mask, text_mode=mode)
        queries, text, _ = QFormerOracle(model).read(features, ids, mask, mode)
        assert_close(out.last_hidden_state, queries, dtype)
        assert_close(out.text_hidden_state[mask.bool()], text[mask.bool()], dtype)

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_fused_is_two_passes(self, dtype, attention, side):
        model, (features, ids, mask) = qformer(dtype, attention), batch(side, width=8)
        out = model(features.to(dtype), ids, mask, text_mode="fused")
        oracle, kept = QFormerOracle(model), mask.bool()
        queries, text, _ = oracle.read(features, ids, mask, "unimodal")
        begun = ids.clone()
        begun[torch.arange(len(ids)), mask.argmax(1)] = DEC
        _, causal, _ = oracle.read(features, begun, mask, "causal")
        assert_close(out.last_hidden_state, queries, dtype)
        assert_close(out.text_hidden_state[kept], text[kept], dtype)
        assert_close(out.causal_hidden_state[kept], causal[kept], dtype)

    @pytest.mark.parametrize("mode", MODES)
    def test_picture_tokens_that_are_masked(self, dtype, attention, mode):
        model, (features, ids, mask) = qformer(dtype, attention), batch()
        picture_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 0, 0, 0]])
        out = model(features.to(dtype), ids, mask, text_mode=mode, encoder_attention_mask=picture_mask)
        queries, text, _ = QFormerOracle(model).read(features, ids, mask, mode, picture_mask)
        assert_close(out.last_hidden_state, queries, dtype)
        assert_close(out.text_hidden_state[mask.bool()], text[mask.bool()], dtype)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_query_tokens": 1},
        {"cross_attention_frequency": 1},
        {"cross_attention_frequency": 3},
        {"num_hidden_layers": 1},
        {"layer_norm_eps": 1e-2},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_other_shapes(fields, mode):
    model, (features, ids, mask) = qformer(**fields), batch()
    out = model(features, ids, mask, text_mode=mode)
    queries, text, _ = QFormerOracle(model).read(features, ids, mask, mode)
    assert_close(out.last_hidden_state, queries)
    assert_close(out.text_hidden_state[mask.bool()], text[mask.bool()])


def test_modes_differ():
    """So that the cases above are several."""
    model, (features, ids, mask) = qformer(), batch()
    outs = [model(features, ids, mask, text_mode=mode) for mode in MODES]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (outs[one].text_hidden_state - outs[other].text_hidden_state).abs().max() > 1e-2
    assert (outs[0].last_hidden_state - outs[1].last_hidden_state).abs().max() > 1e-2


def test_the_approximate_gelu_is_another_function():
    """Of both MLPs: the error function's GELU is told from the hyperbolic tangent's at these tolerances."""
    features, ids, mask = batch()
    model = qformer()
    tanh = MMBlip2QFormerModel(qformer_config(hidden_act="gelu_pytorch_tanh")).double().eval()
    tanh.load_state_dict(model.state_dict())
    queries, text, _ = QFormerOracle(model).read(features, ids, mask, "unimodal")
    out = tanh(features, ids, mask, text_mode="unimodal")
    assert relative_error(out.last_hidden_state, queries) > 2e-5
    assert relative_error(out.text_hidden_state, text) > 2e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_transformers(mode, attention):
    model, (features, ids, mask) = qformer(attention=attention), batch()
    oracle = QFormerOracle(model)
    weights = torch.randn(2, 3, 7, 16, dtype=torch.float64)

    def scalar(queries, text):
        return (queries * weights[0, :, :3]).sum() + (text * weights[1] * mask[..., None]).sum()

    out = model(features, ids, mask, text_mode=mode)
    scalar(out.last_hidden_state, out.text_hidden_state).backward()
    scalar(*oracle.read(features, ids, mask, mode)[:2]).backward()
    assert_same_gradients(model, oracle)
    assert model.embeddings.query_tokens.grad.abs().max() > 0.0


def test_keys_and_values_of_a_picture_are_the_picture():
    model, (features, ids, mask) = qformer(), batch()
    keys_values = model.picture_keys_values(features)
    assert [pair is None for pair in keys_values] == [False, True, False, True]
    for mode in (*MODES, "fused"):
        live = model(features, ids, mask, text_mode=mode)
        kept = model(input_ids=ids, attention_mask=mask, text_mode=mode, picture_keys_values=keys_values)
        for name, value in live.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, kept[name]), (mode, name)
    alone = model(picture_keys_values=keys_values).last_hidden_state
    assert torch.equal(alone, model(features).last_hidden_state)


def test_keys_and_values_carry_gradients():
    model, features = qformer(), features_of(2).requires_grad_()
    model(picture_keys_values=model.picture_keys_values(features)).last_hidden_state.square().sum().backward()
    reference = features.grad
    features.grad = None
    model(features).last_hidden_state.square().sum().backward()
    assert reference.abs().max() > 0.0
    torch.testing.assert_close(reference, features.grad)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_captured(mode):
    model, (features, ids, mask) = qformer(), batch()
    out = model(features, ids, mask, text_mode=mode, output_attentions=True, output_hidden_states=True)
    total = 3 + ids.shape[1]
    assert [tuple(each.shape) for each in out.attentions] == [(3, 2, total, total)] * 4
    assert [tuple(each.shape) for each in out.cross_attentions] == [(3, 2, 3, 5)] * 2
    assert len(out.hidden_states) == 5
    reference = QFormerOracle(model).read(
        features, ids, mask, mode, output_attentions=True, output_hidden_states=True
    )[2]
    kept = torch.cat([torch.ones(3, 3), mask], 1).bool()
    for ours, theirs in zip(out.hidden_states, reference.hidden_states, strict=True):
        assert_close(ours[kept], theirs[kept])
    among_themselves = [each for each in reference.attentions if each.shape[-1] == total]  # others are to the picture
    for ours, theirs in zip(out.attentions, among_themselves, strict=True):
        assert_close(ours.transpose(1, 2)[kept], theirs.transpose(1, 2)[kept])
    for ours, theirs in zip(out.cross_attentions, reference.cross_attentions, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("mode", [*MODES, "fused"])
def test_padding_may_stand_on_either_side(mode):
    model = qformer(attention="sdpa")
    features = features_of(3)
    answers = []
    for side in ("right", "left"):
        for width in (7, 9):
            ids, mask = texts_of(*LENGTHS, side=side, width=width)
            out = model(features, ids, mask, text_mode=mode)
            texts = [out.text_hidden_state] + ([out.causal_hidden_state] if mode == "fused" else [])
            answers.append([out.last_hidden_state, *(text[mask.bool()] for text in texts)])
    for other in answers[1:]:
        for one, two in zip(answers[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", [*MODES, "fused"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_pair_by_itself(mode, attention):
    """Neither the others of a batch nor padding reaches a row."""
    model, (features, ids, mask) = qformer(attention=attention), batch()
    whole = model(features, ids, mask, text_mode=mode)
    for row, length in enumerate(LENGTHS):
        alone = model(features[row : row + 1], ids[row : row + 1, :length], text_mode=mode)
        torch.testing.assert_close(alone.last_hidden_state[0], whole.last_hidden_state[row])
        torch.testing.assert_close(alone.text_hidden_state[0], whole.text_hidden_state[row, :length])
        if mode == "fused":
            torch.testing.assert_close(alone.causal_hidden_state[0], whole.causal_hidden_state[row, :length])


@pytest.mark.parametrize("mode", [*MODES, "fused"])
def test_what_stands_in_padding_does_not_matter(mode):
    model, (features, ids, mask) = qformer(), batch()
    other = torch.where(mask.bool(), ids, 17)
    one = model(features, ids, mask, text_mode=mode)
    two = model(features, other, mask, text_mode=mode)
    assert torch.equal(one.last_hidden_state, two.last_hidden_state)
    assert torch.equal(one.text_hidden_state[mask.bool()], two.text_hidden_state[mask.bool()])


class TestWhoSeesWhom:
    def out(self, mode, features=None, ids=None, model=None):
        given, words, _ = batch()
        model = model or qformer()
        return model(given if features is None else features, words if ids is None else ids, text_mode=mode)

    def moved(self, one, other, places):
        """``(T,)`` bool: where the rows of a text or of queries are different."""
        difference = (one - other).abs().amax((0, 2))
        assert ((difference == 0.0) | (difference > 1e-6)).all()
        assert (difference > 0).tolist() == places

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("place", [1, 4])
    def test_a_word(self, mode, place):
        _, ids, _ = batch()
        other = ids.clone()
        other[:, place] = (ids[:, place] + 5) % 25 + 1
        one, two = self.out(mode), self.out(mode, ids=other)
        self.moved(one.last_hidden_state, two.last_hidden_state, [mode == "bidirectional"] * 3)
        self.moved(
            one.text_hidden_state,
            two.text_hidden_state,
            [mode != "causal" or place <= other for other in range(ids.shape[1])],
        )

    @pytest.mark.parametrize("place", [1, 4])
    def test_a_word_in_one_pass_of_two(self, place):
        _, ids, _ = batch()
        other = ids.clone()
        other[:, place] = (ids[:, place] + 5) % 25 + 1
        one, two = self.out("fused"), self.out("fused", ids=other)
        self.moved(one.last_hidden_state, two.last_hidden_state, [False] * 3)
        self.moved(one.text_hidden_state, two.text_hidden_state, [True] * 7)
        self.moved(one.causal_hidden_state, two.causal_hidden_state, [place <= other for other in range(7)])

    @pytest.mark.parametrize("mode", [*MODES, "fused"])
    def test_a_picture(self, mode):
        one, two = self.out(mode), self.out(mode, features=features_of(3, seed=9))
        self.moved(one.last_hidden_state, two.last_hidden_state, [True] * 3)
        self.moved(one.text_hidden_state, two.text_hidden_state, [mode in ("bidirectional", "causal")] * 7)
        if mode == "fused":
            self.moved(one.causal_hidden_state, two.causal_hidden_state, [True] * 7)

    @pytest.mark.parametrize("first", [28, 11])
    def test_dec_stands_in_place_of_the_first_token_whatever_that_was(self, first):
        _, ids, _ = batch()
        other = ids.clone()
        other[:, 0] = first
        one, two = self.out("fused"), self.out("fused", ids=other)
        assert torch.equal(one.causal_hidden_state, two.causal_hidden_state)


class TestWithoutText:
    def test_has_no_parameter_of_text(self):
        whole, bare = qformer(), qformer(use_text=False)
        gone = {name for name, _ in whole.named_parameters()} - {name for name, _ in bare.named_parameters()}
        assert gone == {
            name
            for name, _ in whole.named_parameters()
            if any(word in name for word in ("word_embeddings", "position_embeddings", "text_mlp", "text_layer_norm"))
        }

    def test_reads_pictures_alike(self):
        bare, features = qformer(use_text=False), features_of(2)
        assert_close(bare(features).last_hidden_state, QFormerOracle(bare).read(features)[0])

    def test_refuses_text(self):
        _, ids, mask = batch()
        with pytest.raises(ValueError, match="text"):
            qformer(use_text=False)(features_of(3), ids, mask)

    def test_opens_a_checkpoint_with_text(self, tmp_path):
        """And leaves it unread."""
        whole = qformer()
        whole.save_pretrained(tmp_path)
        bare = MMBlip2QFormerModel.from_pretrained(tmp_path, use_text=False, attn_implementation="eager")
        features = features_of(2)
        assert_close(bare(features).last_hidden_state, whole(features).last_hidden_state)
        for name, value in bare.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), name


class TestRefusals:
    def test_nothing(self):
        with pytest.raises(ValueError):
            qformer()()

    def test_long_text(self):
        ids, mask = texts_of(10)
        with pytest.raises(ValueError, match=r"10.*9|9.*10"):
            qformer()(features_of(1), ids, mask)

    def test_the_longest_text(self):
        ids, mask = texts_of(9)
        assert qformer()(features_of(1), ids, mask).text_hidden_state.shape == (1, 9, 16)

    def test_features_of_another_width(self):
        with pytest.raises(ValueError, match=r"24.*20|20.*24"):
            qformer()(features_of(1, width=24))

    def test_pictures_in_two_ways(self):
        model, features = qformer(), features_of(2)
        with pytest.raises(ValueError, match="either encoder_hidden_states or picture_keys_values"):
            model(features, picture_keys_values=model.picture_keys_values(features))

    def test_a_cache_of_what_cannot_go_on(self):
        model, (features, ids, mask) = qformer(), batch()
        with pytest.raises(ValueError, match="'bidirectional'.*'causal'"):
            model(features, ids, mask, cache=DynamicCache())
        with pytest.raises(ValueError, match="begins with a picture"):
            model(input_ids=ids, text_mode="causal", cache=DynamicCache())
        cache = DynamicCache()
        model(features, ids, text_mode="causal", cache=cache)
        with pytest.raises(ValueError, match="holds the picture already"):
            model(features, ids[:, :1], text_mode="causal", cache=cache)


@pytest.mark.parametrize("use_text", [True, False])
def test_opens_by_itself(tmp_path, use_text):
    model = qformer(torch.float32, use_text=use_text)
    model.save_pretrained(tmp_path)
    opened, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert type(opened) is MMBlip2QFormerModel
    assert not any(report.values())
    features = features_of(2, dtype=torch.float32)
    torch.testing.assert_close(opened(features).last_hidden_state, model(features).last_hidden_state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, opened.state_dict()[name]), name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kept", [True, False], ids=["keys and values", "features"])
def test_checkpointing_computes_twice_and_the_same(reentrant, kept):
    features, ids, mask = batch()
    gradients, counts = [], []
    for checkpointing in (False, True):
        model = qformer().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls = []
        model.layers[1].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        given = features.clone().requires_grad_()
        pictures = {"picture_keys_values": model.picture_keys_values(given)} if kept else {}
        if not kept:
            pictures = {"encoder_hidden_states": given}
        out = model(input_ids=ids, attention_mask=mask, text_mode="fused", **pictures)
        parts = (out.last_hidden_state, out.text_hidden_state, out.causal_hidden_state)
        sum(part.square().sum() * (i + 1) for i, part in enumerate(parts)).backward()
        gradients.append({"features": given.grad} | {name: p.grad for name, p in model.named_parameters()})
        counts.append(len(calls))
    assert counts == [1, 2]
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


class TestInit:
    @pytest.fixture(scope="class")
    def fresh(self):
        torch.manual_seed(3)
        return MMBlip2QFormerModel(
            qformer_config(hidden_size=128, intermediate_size=256, num_query_tokens=32, vocab_size=500)
        )

    def test_matrices_and_queries_are_normal(self, fresh):
        for name, value in fresh.named_parameters():
            if value.ndim > 1:
                spread = 0.02 / (2 * value.numel()) ** 0.5
                mean = 0.02 / value.numel() ** 0.5
                held = value[1:] if "word_embeddings" in name else value  # a row for padding may be zero
                assert abs(held.std().item() - 0.02) < 6 * spread + 1e-5, name
                assert abs(held.mean().item()) < 5 * mean, name
            else:
                assert (value == (1.0 if name.endswith("norm.weight") else 0.0)).all(), name

    def test_queries_differ(self, fresh):
        queries = fresh.embeddings.query_tokens[0]
        assert torch.cdist(queries, queries).fill_diagonal_(1.0).min() > 0.1

    def test_the_query_mlp_begins_as_the_texts(self, fresh):
        for layer in fresh.layers:
            for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                query, text = layer.query_mlp.get_parameter(part), layer.text_mlp.get_parameter(part)
                assert torch.equal(query, text) and query is not text
                assert query.data_ptr() != text.data_ptr()

    def test_layers_differ(self, fresh):
        firsts = [layer.query_mlp.fc1.weight for layer in fresh.layers]
        assert not torch.equal(firsts[0], firsts[1])

    def test_the_published_size(self):
        """The Q-Former's share of 186,705,470: without vision norm, projections, heads and temperature."""
        with torch.device("meta"):
            model = MMBlip2QFormerModel(qformer_config(**PUBLISHED))
        others = 2 * 1408 + 2 * (768 * 256 + 256) + (768 * 2 + 2) + 1
        lm_head = 768 * 768 + 768 + 2 * 768 + 30523
        assert sum(value.numel() for value in model.parameters()) == 186_705_470 - others - lm_head


PUBLISHED = {
    "num_query_tokens": 32,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "encoder_hidden_size": 1408,
    "vocab_size": 30523,
    "max_position_embeddings": 512,
}


def test_dropout_is_there_in_training_alone():
    model, (features, ids, mask) = qformer(dropout=0.3, attention_dropout=0.3), batch()
    calm = [model(features, ids, mask).last_hidden_state for _ in range(2)]
    assert torch.equal(*calm)
    model.train()
    assert not torch.equal(*[model(features, ids, mask).last_hidden_state for _ in range(2)])


def test_a_batch_in_half_precision_keeps_its_type():
    model, (features, ids, mask) = qformer(torch.bfloat16, attention="sdpa"), batch()
    out = model(features.bfloat16(), ids, mask, text_mode="fused")
    reference = qformer()(features, ids, mask, text_mode="fused")
    kept = {"text_hidden_state": mask.bool(), "causal_hidden_state": mask.bool(), "last_hidden_state": ...}
    for name, rows in kept.items():
        assert out[name].dtype == torch.bfloat16
        assert relative_error(out[name][rows], reference[name][rows]) < 0.1


def test_inputs_stay_as_they_are():
    model, given = qformer(), batch()
    before = copy.deepcopy(given)
    model(*given, text_mode="fused")
    for one, other in zip(given, before, strict=True):
        assert torch.equal(one, other)
