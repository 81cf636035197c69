"""Captions by the Q-Former alone, against a loop over transformers' Q-Former that keeps nothing between words."""

import pytest
import torch
from qformer_oracle import (
    CLS,
    DEC,
    PAD,
    SEP,
    LMHeadOracle,
    QFormerOracle,
    blip2_config,
    copy_by_names,
    features_of,
    perturbed,
    relative_error,
    texts_of,
)
from torch import nn
from transformers import AutoModel, LogitsProcessorList

from hf_mm.models.blip2.modeling_blip2 import MMBlip2ForPreTraining, MMBlip2ForQFormerCaptioning

LENGTHS = (7, 3, 5, 6)


class CaptioningOracle(nn.Module):
    def __init__(self, model):
        super().__init__()
        config = model.config
        self.vision_norm = nn.LayerNorm(config.qformer_config.encoder_hidden_size, eps=config.vision_norm_eps)
        self.qformer = QFormerOracle(model.qformer)
        self.lm_head = LMHeadOracle(self.qformer.words)
        self.names = {f"vision_norm.{tensor}": f"vision_norm.{tensor}" for tensor in ("weight", "bias")}
        for module in ("qformer", "lm_head"):
            self.names |= {f"{module}.{a}": f"{module}.{b}" for a, b in getattr(self, module).names.items()}
        self.to(torch.float64).eval()
        copy_by_names(model, self, self.names)

    def logits(self, features, ids, mask):
        """``(B, T, V)``; ids as they are, so begun by [DEC]."""
        text = self.qformer.read(self.vision_norm(features), ids, mask, "causal")[1]
        return self.lm_head(text, self.qformer.words)

    def caption(self, feature, prompt, number):
        """The likeliest word again and again, up to and with [SEP]."""
        ids = torch.cat([torch.tensor([DEC]), prompt])
        for _ in range(number):
            word = self.logits(feature[None], ids[None], torch.ones_like(ids)[None])[0, -1].argmax()
            ids = torch.cat([ids, word[None]])
            if word == SEP:
                break
        return ids


def captioner(attention="eager", dtype=torch.float64, sep_bias=0.0, **qformer):
    torch.manual_seed(0)
    model = MMBlip2ForQFormerCaptioning(blip2_config({"max_position_embeddings": 16, **qformer}))
    model.set_attn_implementation(attention)
    model = perturbed(model, dtype)
    model.lm_head.decoder.bias.data[SEP] += sep_bias
    return model


def pictures(number=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(number, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)


def begun(ids, mask):
    ids = ids.clone()
    ids[torch.arange(len(ids)), mask.argmax(1)] = DEC
    return ids


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("first", ["[CLS]", "[DEC]"])
def test_logits(first, side, attention):
    model = captioner(attention)
    features = features_of(4)
    ids, mask = texts_of(*LENGTHS, side=side, width=8)
    given = begun(ids, mask) if first == "[DEC]" else ids
    out = model(given, vision_features=features, attention_mask=mask)
    reference = CaptioningOracle(model).logits(features, begun(ids, mask), mask)
    assert relative_error(out.logits[mask.bool()], reference[mask.bool()]) < 1e-9


def test_logits_in_single_precision():
    model = captioner("sdpa", torch.float32)
    ids, mask = texts_of(*LENGTHS)
    out = model(ids, vision_features=features_of(4, dtype=torch.float32), attention_mask=mask)
    features = features_of(4, dtype=torch.float32).double()
    reference = CaptioningOracle(model).logits(features, begun(ids, mask), mask)
    assert relative_error(out.logits[mask.bool()], reference[mask.bool()]) < 1e-5


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_loss_is_the_shifted_cross_entropy(side):
    model = captioner()
    features = features_of(4)
    ids, mask = texts_of(*LENGTHS, side=side, width=8)
    labels = ids.masked_fill(mask == 0, -100)
    labels[torch.arange(4), mask.argmax(1)] = -100  # no place before it tells it
    labels[0, mask[0].argmax() + 1] = -100  # a prompt
    out = model(ids, vision_features=features, attention_mask=mask, labels=labels)
    logits = CaptioningOracle(model).logits(features, begun(ids, mask), mask)
    terms = [
        -logits[row, place].log_softmax(-1)[labels[row, place + 1]]
        for row in range(4)
        for place in range(7)
        if mask[row, place] and labels[row, place + 1] != -100
    ]
    assert out.loss.item() == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-9)
    model.train()(ids, vision_features=features, attention_mask=mask, labels=labels).loss.backward()
    for name, value in model.named_parameters():
        assert (value.grad is None) == name.startswith("vision_tower."), name


def test_a_cache_gives_the_same_logits_word_by_word():
    model = captioner("sdpa")
    features = features_of(2)
    ids, mask = texts_of(6, 6)
    whole = model(ids, vision_features=features, attention_mask=mask).logits
    out = model(ids[:, :3], vision_features=features, attention_mask=mask[:, :3], use_cache=True)
    steps = [out.logits]
    for place in range(3, 6):
        out = model(ids[:, place : place + 1], attention_mask=mask[:, : place + 1], cache=out.cache)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-10, atol=1e-10)


class TestGenerate:
    @pytest.mark.parametrize("sep_bias", [0.0, 2.0, -50.0], ids=["sep", "soon", "never"])
    @pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
    def test_greedy_is_the_loop(self, use_cache, sep_bias):
        model, features = captioner(sep_bias=sep_bias), features_of(4)
        out = model.generate(vision_features=features, max_new_tokens=8, do_sample=False, use_cache=use_cache)
        assert (out[:, 0] == DEC).all()
        oracle = CaptioningOracle(model)
        with torch.no_grad():
            captions = [oracle.caption(feature, torch.empty(0, dtype=torch.long), 8) for feature in features]
        assert len({tuple(caption.tolist()) for caption in captions}) > 1 or sep_bias > 0
        for ours, caption in zip(out, captions, strict=True):
            assert ours[: len(caption)].tolist() == caption.tolist()
            assert (ours[len(caption) :] == PAD).all()

    @pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
    @pytest.mark.parametrize("first", [CLS, DEC])
    def test_prompts_of_many_lengths(self, first, use_cache):
        """Padded on the left, each as if it were alone, and as the loop."""
        model, features = captioner(sep_bias=-50.0), features_of(3)
        prompts = [torch.tensor(words, dtype=torch.long) for words in ([5, 9, 4], [], [17])]
        ids = torch.full((3, 4), PAD)
        for row, prompt in enumerate(prompts):
            ids[row, 3 - len(prompt) :] = torch.cat([torch.tensor([first]), prompt])
        mask = (ids != PAD).long()
        settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
        before = ids.clone()
        out = model.generate(input_ids=ids, attention_mask=mask, vision_features=features, **settings)
        assert torch.equal(ids, before)
        oracle = CaptioningOracle(model)
        for row, prompt in enumerate(prompts):
            alone = model.generate(
                input_ids=ids[row : row + 1, 3 - len(prompt) :], vision_features=features[row : row + 1], **settings
            )
            with torch.no_grad():
                caption = oracle.caption(features[row], prompt, 6)
            assert out[row, 4:].tolist() == alone[0, 1 + len(prompt) :].tolist()
            assert out[row, 4:].tolist() == caption[1 + len(prompt) :].tolist()

    def test_pictures_are_features_and_are_read_once(self):
        model = captioner(sep_bias=-50.0)
        calls = []
        model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
        live = model.generate(pixel_values=pictures(), max_new_tokens=6, do_sample=False)
        assert len(calls) == 1
        features = model.vision_features(pictures())
        calls.clear()
        kept = model.generate(vision_features=features, max_new_tokens=6, do_sample=False)
        assert not calls and torch.equal(live, kept)

    def test_uncached_generation_reads_pictures_once_too(self):
        model = captioner(sep_bias=-50.0)
        calls = []
        model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
        model.generate(pixel_values=pictures(), max_new_tokens=4, do_sample=False, use_cache=False)
        assert len(calls) == 1

    @pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
    def test_beams(self, use_cache):
        """Two beams find a likelier sentence than one, or the same; the best of them by what the oracle says."""
        model, features = captioner(sep_bias=-50.0), features_of(3)
        oracle, settings = CaptioningOracle(model), {"max_new_tokens": 5, "do_sample": False, "use_cache": use_cache}
        greedy = model.generate(vision_features=features, **settings)
        beams = model.generate(vision_features=features, num_beams=4, **settings)
        assert beams.shape == greedy.shape == (3, 6)

        def likelihood(captions):
            logits = oracle.logits(features, captions, torch.ones_like(captions)).log_softmax(-1)[:, :-1]
            return logits.gather(-1, captions[:, 1:, None]).sum((1, 2))

        with torch.no_grad():
            assert (likelihood(beams) >= likelihood(greedy) - 1e-9).all()
            assert (likelihood(beams) > likelihood(greedy) + 1e-6).any()

    def test_several_sentences_of_a_picture(self):
        model, features = captioner(sep_bias=-50.0), features_of(2)
        out = model.generate(
            vision_features=features, num_beams=3, num_return_sequences=2, max_new_tokens=4, do_sample=False
        )
        assert out.shape == (4, 5)
        best = model.generate(vision_features=features, num_beams=3, max_new_tokens=4, do_sample=False)
        assert torch.equal(out[::2], best)

    def test_sampling(self):
        model, features = captioner(sep_bias=-50.0), features_of(2)
        torch.manual_seed(1)
        out = model.generate(vision_features=features, do_sample=True, max_new_tokens=6, num_return_sequences=3)
        assert out.shape == (6, 7) and len({tuple(row) for row in out.tolist()}) > 3

    def test_one_query(self):
        model, features = captioner(sep_bias=-50.0, num_query_tokens=1), features_of(2)
        out = model.generate(vision_features=features, max_new_tokens=5, do_sample=False)
        oracle = CaptioningOracle(model)
        with torch.no_grad():
            for ours, feature in zip(out, features, strict=True):
                assert ours.tolist() == oracle.caption(feature, torch.empty(0, dtype=torch.long), 5).tolist()

    def test_a_word_more_compiles_nothing_more(self):
        """One graph is of the picture, one of a word after it, and one more of words at every later place."""
        torch._dynamo.reset()
        model, features = captioner("sdpa", sep_bias=-50.0, num_hidden_layers=2), features_of(3)
        settings = {"max_new_tokens": 5, "do_sample": False}
        expected, graphs, after_each_word = model.generate(vision_features=features, **settings), [], []

        def counting(graph, inputs):
            graphs.append(graph)
            return graph.forward

        def count(input_ids, scores):
            after_each_word.append(len(graphs))
            return scores

        model.qformer.compile(backend=counting)
        found = model.generate(vision_features=features, logits_processor=LogitsProcessorList([count]), **settings)
        assert torch.equal(found, expected)
        assert after_each_word[0] and len(set(after_each_word[2:])) == 1, after_each_word
        torch._dynamo.reset()

    @pytest.mark.parametrize("given", ["both", "neither"])
    def test_pictures_or_features(self, given):
        pictures_given = {"pixel_values": pictures(2), "vision_features": features_of(2)} if given == "both" else {}
        with pytest.raises(ValueError):
            captioner().generate(max_new_tokens=2, **pictures_given)


def test_opens_a_checkpoint_of_pretraining(tmp_path):
    """What the generation loss trained speaks, word for word."""
    torch.manual_seed(0)
    whole = perturbed(MMBlip2ForPreTraining(blip2_config()), torch.float32)
    whole.save_pretrained(tmp_path)
    opened = MMBlip2ForQFormerCaptioning.from_pretrained(tmp_path)
    for name, value in opened.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    assert opened.lm_head.decoder.weight is opened.qformer.embeddings.word_embeddings.weight


def test_saves_and_opens(tmp_path):
    model = captioner(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    opened = MMBlip2ForQFormerCaptioning.from_pretrained(tmp_path, attn_implementation="eager")
    features = features_of(2, dtype=torch.float32)
    one, two = (each.generate(vision_features=features, max_new_tokens=5, do_sample=False) for each in (model, opened))
    assert torch.equal(one, two)
    assert AutoModel.from_pretrained(tmp_path) is not None


class TestRefusals:
    def test_padding_on_the_right(self):
        ids, mask = texts_of(4, 2)
        with pytest.raises(ValueError, match="padding_side='left'"):
            captioner().generate(input_ids=ids, attention_mask=mask, vision_features=features_of(2))

    def test_a_picture_after_a_filled_cache(self):
        model, (ids, mask) = captioner(), texts_of(3, 3)
        cache = model(input_ids=ids, vision_features=features_of(2), use_cache=True).cache
        with pytest.raises(ValueError, match="the cache holds the picture already"):
            model(input_ids=ids[:, -1:], vision_features=features_of(2), cache=cache)
        with pytest.raises(ValueError, match="must cover the 4 tokens"):
            model(input_ids=ids[:, -1:], attention_mask=mask[:, -1:], cache=cache)

    def test_a_q_former_without_text(self):
        with pytest.raises(ValueError, match="set use_text"):
            captioner(use_text=False)

    def test_no_text(self):
        with pytest.raises(ValueError, match="call generate"):
            captioner()(vision_features=features_of(2))


def test_loss_of_parts_is_that_of_the_batch():
    """Told how many labels the whole batch has, as under gradient accumulation (F10)."""
    model, features, (ids, mask) = captioner(), features_of(2), texts_of(7, 3)
    labels = ids.masked_fill(mask == 0, -100)
    count = int((labels[:, 1:] != -100).sum())
    whole = model(input_ids=ids, attention_mask=mask, vision_features=features, labels=labels).loss
    parts = [
        model(
            input_ids=ids[row : row + 1],
            attention_mask=mask[row : row + 1],
            vision_features=features[row : row + 1],
            labels=labels[row : row + 1],
            num_items_in_batch=count,
        ).loss
        for row in range(2)
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)
