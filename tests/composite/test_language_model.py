"""Any language model fed with soft tokens, held to what it gives by itself when it is called by hand."""

import logging
import math

import pytest
import torch
from models.blip2.small import places_read
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedModel,
    ViTConfig,
)

from hf_mm.composite import language_model
from hf_mm.composite.freezing import hold_frozen
from hf_mm.composite.language_model import (
    check_labels,
    embed_tokens,
    embed_with_slots,
    embedding_rms,
    embedding_width,
    generate_from_embeds,
    label_logits,
    label_loss,
    language_model_from_config,
    open_language_model,
    read_embeds,
    read_once,
    shared_start,
)

VOCAB, SLOT = 48, -200
IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, **IDS}
LLAMA |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3}
GEMMA = {**LLAMA, "head_dim": 8}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3, **IDS}
OPT = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "init_std": 0.3, **IDS}
OPT |= {"max_position_embeddings": 64, "word_embed_proj_dim": 16, "dropout": 0.0}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": VOCAB, "pad_token_id": 0}
T5 |= {"eos_token_id": 1, "decoder_start_token_id": 0, "dropout_rate": 0.0, "initializer_factor": 3.0}
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "init_std": 0.3, **IDS}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0}
BART |= {"max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None}

DECODERS = {
    "opt": ("opt", OPT),
    "opt-projected": ("opt", {**OPT, "word_embed_proj_dim": 12, "do_layer_norm_before": False}),
    "llama": ("llama", LLAMA),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 8, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", GPT2),
    "bloom": ("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3, **IDS}),
    "gemma": ("gemma", GEMMA),
    "gemma2": ("gemma2", {**GEMMA, "final_logit_softcapping": 0.5}),
    "granite": ("granite", {**LLAMA, "logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "cohere": ("cohere", {**LLAMA, "logit_scale": 0.25}),
    "mamba": ("mamba", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.3, **IDS}),
}
ENCODER_DECODERS = {
    "t5": ("t5", T5),
    "t5-v1.1": ("t5", {**T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "bart": ("bart", {**BART, "scale_embedding": True}),
    "marian": ("marian", {**BART, "scale_embedding": True}),  # scales the embeddings of ids, and no others
    "m2m_100": ("m2m_100", BART),  # does not move labels on by a method of its own
}
FAMILIES = DECODERS | ENCODER_DECODERS


def lm_of(family: str, **fields) -> PreTrainedModel:
    torch.manual_seed(0)
    model_type, config = FAMILIES[family]
    lm = language_model_from_config(AutoConfig.for_model(model_type, **{**config, **fields})).eval()
    return lm.requires_grad_(False)


def batch(lm: PreTrainedModel, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """Two texts with three and two slots, with their slots and soft tokens; the second text is shorter by two."""
    ids = torch.tensor([[5, SLOT, SLOT, 7, SLOT, 9, 11, 2], [6, SLOT, 8, SLOT, 10, 2, 0, 0]])
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    soft = torch.randn(5, 1, embedding_width(lm), dtype=dtype, generator=torch.Generator().manual_seed(1))
    return ids, mask, ids == SLOT, soft.requires_grad_()


def labels_of(lm: PreTrainedModel) -> torch.Tensor:
    if lm.config.is_encoder_decoder:
        return torch.tensor([[9, 11, 13, 1], [7, 1, -100, -100]])
    return torch.tensor([[-100] * 3 + [7, -100, 9, 11, 2], [6, -100, -100, -100, 10, 2, -100, -100]])


def labels_at(lm: PreTrainedModel) -> list[tuple[int, int]]:
    """The places whose labels can be predicted: a decoder predicts none at the first."""
    first = 0 if lm.config.is_encoder_decoder else 1
    return [(row, place) for row in range(2) for place in range(first, labels_of(lm).shape[1])]


def count_rows(lm: PreTrainedModel) -> list[int]:
    """Of what reaches the product with the vocabulary, call by call."""
    rows = []
    lm.get_output_embeddings().register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    return rows


def quiet_about(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def heard(caplog):
    """caplog hears what transformers logs."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_the_language_models_own(family):
    lm = lm_of(family).double()
    ids, mask, slots, soft = batch(lm, torch.float64)
    labels = labels_of(lm)

    logits, targets = label_logits(lm, embed_with_slots(lm, ids, slots, soft), mask, labels)
    loss = label_loss(logits, targets)
    (gradient,) = torch.autograd.grad(loss, soft)

    embeds = embed_tokens(lm, ids.clamp(min=0))
    rows = [embeds[row, place] for row in range(2) for place in range(8)]
    for place, token in zip(slots.flatten().nonzero().flatten().tolist(), soft.flatten(0, 1), strict=True):
        rows[place] = token
    by_hand = lm(inputs_embeds=torch.stack(rows).view(2, 8, -1), attention_mask=mask, labels=labels)
    log_p = by_hand.logits.log_softmax(-1)
    places = [(row, place) for row, place in labels_at(lm) if labels[row, place] != -100]
    ahead = 0 if lm.config.is_encoder_decoder else 1
    terms = [-log_p[row, place - ahead, labels[row, place]] for row, place in places]
    expected = sum(terms) / len(terms)
    (expected_gradient,) = torch.autograd.grad(expected, soft)

    assert logits.shape == (6, VOCAB) and len(places) == 6
    # Parts of these are in float32, whatever the model is: of Mamba the logits.
    near = {"mamba": 1e-6, "bloom": 1e-7, "gemma2": 1e-7}.get(family, 1e-9)
    assert abs(loss - expected) < near and abs(loss - by_hand.loss) < 1e-6  # the language model's own is in float32
    torch.testing.assert_close(gradient, expected_gradient, atol=near, rtol=near)
    assert gradient[[0, 1, 2, 3]].abs().amax(-1).min() > 1e-6
    assert all(parameter.grad is None for parameter in lm.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_targets_are_those_of_the_labelled_places(family):
    lm = lm_of(family)
    ids, mask, slots, soft = batch(lm)
    labels = labels_of(lm)
    embeds = embed_with_slots(lm, ids, slots, soft)
    rows = count_rows(lm)
    logits, targets = label_logits(lm, embeds, mask, labels)
    all_rows = labels.numel() if lm.config.is_encoder_decoder else 6
    assert rows == [all_rows]

    if lm.config.is_encoder_decoder:
        whole = lm(inputs_embeds=embeds, attention_mask=mask, labels=labels).logits
        places = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
        assert targets.tolist() == [9, 11, 13, 1, 7, 1]
    else:
        whole = lm(inputs_embeds=embeds, attention_mask=mask).logits
        places = [(0, 2), (0, 4), (0, 5), (0, 6), (1, 3), (1, 4)]
        assert targets.tolist() == [7, 9, 11, 2, 10, 2]
    torch.testing.assert_close(logits, torch.stack([whole[place] for place in places]), atol=2e-6, rtol=1e-5)


@pytest.fixture
def every_place_pays(monkeypatch):
    monkeypatch.setattr(language_model, "FEWEST_SPARED", 1)


def beginning(shared: int) -> tuple[torch.Tensor, ...]:
    """Two texts that begin with the same words, before the slots of `batch` and padding."""
    words = torch.arange(3, 3 + shared).expand(2, -1)
    ids = torch.cat(
        [words, torch.tensor([[5, SLOT, SLOT, 7, SLOT, 9, 11, 2], [6, SLOT, 8, SLOT, 10, 2, 0, 0]])], dim=1
    )
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    labels = torch.full_like(ids, -100)
    labels[0, -2:], labels[1, -4:-2] = torch.tensor([11, 2]), torch.tensor([10, 2])
    return ids, mask, ids == SLOT, labels


@pytest.mark.usefixtures("every_place_pays")
@pytest.mark.parametrize("family", DECODERS)
def test_what_all_texts_begin_with_is_read_once(family):
    lm = lm_of(family).double()
    ids, mask, slots, labels = beginning(9)
    soft = torch.randn(5, 1, embedding_width(lm), dtype=torch.float64, requires_grad=True)
    shared = shared_start(lm, ids, slots, mask, labels)
    assert shared == 9
    places, results = places_read(lm), []
    for alike in (0, shared):
        places.clear()
        logits, targets = label_logits(lm, embed_with_slots(lm, ids, slots, soft), mask, labels, alike)
        loss = label_loss(logits, targets)
        results.append((logits, targets, *torch.autograd.grad(loss, soft), sum(places)))
    whole, once = results
    near = 1e-5 if family == "mamba" else 1e-6
    torch.testing.assert_close(once[0], whole[0], atol=near, rtol=near)
    assert once[1].equal(whole[1])
    torch.testing.assert_close(once[2], whole[2], atol=near, rtol=near)
    assert whole[3] == 2 * 16
    assert once[3] == (9 + 2 * 16 if family == "mamba" else 9 + 2 * 7)  # it keeps no keys and values


@pytest.mark.usefixtures("every_place_pays")
@pytest.mark.parametrize("family", DECODERS)
def test_a_picture_of_all_texts_is_read_once_and_learns_from_all(family):
    """Its gradient is the sum of those that each text gives a picture of its own."""
    lm = lm_of(family).double()
    ids, mask, slots, labels = beginning(3)
    ids[1, 3:7], ids[0, 7] = ids[0, 3:7], 12
    slots = (ids == SLOT) & (torch.arange(ids.shape[1]) < 6)
    labels[:, :7] = -100
    soft = torch.randn(1, 2, embedding_width(lm), dtype=torch.float64, requires_grad=True)
    shared = shared_start(lm, ids, slots, mask, labels, one_picture=True)
    assert shared == 6  # from the seventh place, alike too, a token is predicted
    results = []
    places = places_read(lm)
    for alike in (0, shared):
        places.clear()
        embeds = embed_with_slots(lm, ids, slots, soft.expand(2, -1, -1))
        logits, targets = label_logits(lm, embeds, mask, labels, alike, one_picture=True)
        results.append((logits, targets, *torch.autograd.grad(label_loss(logits, targets), soft), sum(places)))
    whole, once = results
    assert whole[3] == 2 * 10
    assert once[3] == (6 + 2 * 10 if family == "mamba" else 6 + 2 * 4)
    near = 1e-5 if family == "mamba" else 1e-6
    torch.testing.assert_close(once[0], whole[0], atol=near, rtol=near)
    assert once[1].equal(whole[1])
    assert whole[2].abs().min() > 0
    torch.testing.assert_close(once[2], whole[2], atol=near, rtol=near)


@pytest.mark.usefixtures("every_place_pays")
def test_words_before_pictures_are_read_without_gradient(monkeypatch):
    lm, (ids, mask, slots, labels) = lm_of("llama"), beginning(9)
    soft = torch.randn(5, 1, embedding_width(lm), requires_grad=True)
    learnt = []

    def read(*args):
        rest, begun = read_once(*args)
        learnt.append(begun["cache"].layers[0].keys.requires_grad)
        return rest, begun

    monkeypatch.setattr(language_model, "read_once", read)
    for one_picture in (False, True):
        label_logits(lm, embed_with_slots(lm, ids, slots, soft), mask, labels, 9, one_picture)
    assert learnt == [False, True]


@pytest.mark.usefixtures("every_place_pays")
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_blocks_that_are_computed_again_forget_what_was_read_once(family):
    """Checkpointed blocks take no cache: all is read, and the loss stays what it was."""
    lm, (ids, mask, slots, labels) = lm_of(family), beginning(9)
    soft = torch.randn(5, 1, embedding_width(lm), requires_grad=True)

    def loss():
        shared = shared_start(lm, ids, slots, mask, labels)
        return label_loss(*label_logits(lm, embed_with_slots(lm, ids, slots, soft), mask, labels, shared)), shared

    expected, shared = loss()
    lm.gradient_checkpointing_enable()
    hold_frozen(lm)
    found, none = loss()
    assert (shared, none) == (9, 0)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert loss()[1] == 9


@pytest.mark.parametrize("family", ["opt", "gpt2", "bart"])
def test_more_places_than_were_learnt_are_refused(family):
    lm = lm_of(family, max_position_embeddings=8) if family != "gpt2" else lm_of(family, n_positions=8)
    embeds, mask = torch.randn(2, 9, embedding_width(lm)), torch.ones(2, 9, dtype=torch.long)
    said = {"decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)} if lm.config.is_encoder_decoder else {}
    for given in (mask, None):
        with pytest.raises(ValueError, match="a text has 9 places, pictures included, but .* has learnt 8"):
            read_embeds(lm, embeds, given, **said)
        with pytest.raises(ValueError, match="a text has 9 places"):
            generate_from_embeds(lm, embeds, given, max_new_tokens=1)
    read_embeds(lm, embeds[:, 1:], mask[:, 1:], **said)
    if said:
        with pytest.raises(ValueError, match="a text has 9 places"):
            read_embeds(lm, embeds[:, :2], mask[:, :2], decoder_input_ids=torch.zeros(2, 9, dtype=torch.long))
        return
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), mask[:, :6]], dim=1)  # six words are six places
    wide = torch.randn(2, 10, embedding_width(lm))
    read_embeds(lm, wide, padded)
    generate_from_embeds(lm, wide, padded, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("family", ["llama", "mamba", "t5", "m2m_100"])
def test_places_that_are_computed_have_no_end(family):
    lm = lm_of(family, max_position_embeddings=8)
    said = {"decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)} if lm.config.is_encoder_decoder else {}
    read_embeds(lm, torch.randn(2, 9, embedding_width(lm)), torch.ones(2, 9, dtype=torch.long), **said)


def test_labels_are_of_the_vocabulary_that_is_spoken():
    """Which of an encoder-decoder need not be the one that is read."""
    lm = lm_of("marian", share_encoder_decoder_embeddings=False, decoder_vocab_size=100)
    spoken, read = 99, lm.config.vocab_size
    assert read < spoken
    check_labels(lm, torch.tensor([[spoken, -100]]), 1)
    with pytest.raises(ValueError, match="label 100 is not in the language model's vocabulary, which has 100"):
        check_labels(lm, torch.tensor([[100, -100]]), 1)


def test_what_stands_beside_the_text_is_cut_with_it():
    lm, (ids, mask, slots, labels) = lm_of("llama"), beginning(9)
    embeds = embed_with_slots(lm, ids, slots, torch.randn(5, 1, embedding_width(lm)))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    expected, _ = label_logits(lm, embeds, mask, labels)
    torch.testing.assert_close(label_logits(lm, embeds, mask, labels, position_ids=places[:1])[0], expected)
    for shared in (0, 9):
        found, _ = label_logits(lm, embeds, mask, labels, shared, position_ids=places)
        torch.testing.assert_close(found, expected)
        other, _ = label_logits(lm, embeds, mask, labels, shared, position_ids=places * 2)
        assert (other - expected).abs().max() > 1e-3


def test_a_pass_of_its_own_must_pay():
    lm, (ids, mask, slots, labels) = lm_of("llama"), beginning(9)

    def shared(rows: int) -> int:
        return shared_start(lm, *(given[:1].expand(rows, -1) for given in (ids, slots, mask, labels)))

    assert 10 * 4 < language_model.FEWEST_SPARED < 10 * 5
    assert shared(5) == 0
    assert shared(6) == 10


@pytest.mark.usefixtures("every_place_pays")
def test_what_texts_have_in_common_ends_where_they_part():
    lm = lm_of("llama")
    ids, mask, slots, labels = beginning(9)
    assert shared_start(lm, ids, slots, mask, labels) == 9
    other = ids.clone()
    other[1, 8] = 40
    assert shared_start(lm, other, slots, mask, labels) == 8
    pictures = slots.clone()
    pictures[0, 3] = True
    assert shared_start(lm, ids, pictures, mask, labels) == 3
    assert shared_start(lm, ids, pictures, mask, labels, one_picture=True) == 9
    padded = mask.clone()
    padded[0, 0] = 0
    assert shared_start(lm, ids, slots, padded, labels) == 0
    told = labels.clone()
    told[0, 9] = 7  # predicted from place 8
    assert shared_start(lm, ids, slots, mask, told) == 8
    same, unlabelled = ids[:1].repeat(2, 1), torch.full_like(labels, -100)
    whole = shared_start(lm, same, torch.zeros_like(slots), mask[:1].repeat(2, 1), unlabelled)
    assert whole == 15
    embeds = lm.get_input_embeddings()(same.clamp(min=0))
    logits, targets = label_logits(lm, embeds, mask[:1].repeat(2, 1), unlabelled, whole)
    assert logits.shape == (0, lm.config.vocab_size) and targets.shape == (0,)
    lm.get_input_embeddings().weight.requires_grad_(True)
    assert shared_start(lm, ids, slots, mask, labels) == 0
    assert shared_start(lm_of("t5"), ids, slots, mask, labels[:, :4]) == 0


def test_a_language_model_that_knows_no_places_computes_all(monkeypatch):
    lm = lm_of("gemma2")
    ids, mask, slots, soft = batch(lm)
    embeds = embed_with_slots(lm, ids, slots, soft)
    expected, targets = label_logits(lm, embeds, mask, labels_of(lm))
    monkeypatch.setattr(type(lm), "__module__", "transformers_modules.gemma")
    rows = count_rows(lm)
    logits, same = label_logits(lm, embeds, mask, labels_of(lm))
    assert rows == [14] and same.equal(targets)  # all places but the last of each text
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_label_gives_no_loss_and_no_gradient(family):
    lm = lm_of(family)
    ids, mask, slots, soft = batch(lm)
    logits, targets = label_logits(
        lm, embed_with_slots(lm, ids, slots, soft), mask, torch.full_like(labels_of(lm), -100)
    )
    assert logits.shape == (0, VOCAB) and targets.shape == (0,)
    loss = label_loss(logits, targets)
    assert loss.item() == 0
    loss.backward()
    assert soft.grad.equal(torch.zeros_like(soft))


@pytest.mark.parametrize("family", [family for family in DECODERS if family != "mamba"])
def test_padding_on_either_side_is_as_none(family):
    lm = lm_of(family)
    ids, mask, slots, soft = batch(lm)
    labels = labels_of(lm)
    embeds = embed_with_slots(lm, ids, slots, soft)
    right, _ = label_logits(lm, embeds, mask, labels)

    noise = torch.randn(1, 2, embeds.shape[-1])
    left = embeds[0], torch.cat([noise[0], embeds[1, :6]])
    left_labels = torch.stack([labels[0], torch.cat([torch.tensor([-100, -100]), labels[1, :6]])])
    left_labels[1, 2] = -100  # the first place, which was not predicted either
    left_padded, _ = label_logits(lm, torch.stack(left), mask.flip(1) | (mask * 0), left_labels)
    torch.testing.assert_close(left_padded, right, atol=2e-6, rtol=1e-5)

    alone = [
        label_logits(lm, embeds[i : i + 1, :n], mask[i : i + 1, :n], labels[i : i + 1, :n])[0]
        for i, n in enumerate((8, 6))
    ]
    torch.testing.assert_close(torch.cat(alone), right, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_from_embeddings_of_words_is_generation_from_words(family):
    lm = lm_of(family)
    ids, mask = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]), torch.ones(2, 5, dtype=torch.long)
    slots = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]).bool()
    words = embed_tokens(lm, ids)[slots].view(2, 2, -1)
    embeds = embed_with_slots(lm, ids.masked_fill(slots, SLOT), slots, words)
    torch.testing.assert_close(embeds, embed_tokens(lm, ids))
    for options in ({"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}):
        options = {"max_new_tokens": 5, "min_new_tokens": 3, **options}
        written = generate_from_embeds(lm, embeds, mask, **options)
        expected = lm.generate(input_ids=ids, attention_mask=mask, **options)
        assert written.equal(expected if lm.config.is_encoder_decoder else expected[:, 5:])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mamba"])
def test_generation_is_that_of_each_row_alone_and_without_cache(family):
    lm = lm_of(family)
    ids, mask, slots, soft = batch(lm)
    embeds = embed_with_slots(lm, ids, slots, soft).detach()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "repetition_penalty": 3.0}
    alone = [
        generate_from_embeds(lm, embeds[i : i + 1, :n], mask[i : i + 1, :n], **options) for i, n in enumerate((8, 6))
    ]
    if not lm.config.is_encoder_decoder:
        embeds, mask = torch.stack([embeds[0], embeds[1].roll(2, 0)]), mask.flip(1)
    written = generate_from_embeds(lm, embeds, mask, **options)
    assert written.equal(torch.cat(alone)) and written.unique().numel() > 3
    assert generate_from_embeds(lm, embeds, mask, use_cache=False, **options).equal(written)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("pad", [None, 3])
def test_a_row_that_ends_early_is_padded_and_nothing_is_warned_of(family, pad, heard):
    lm = lm_of(family)
    lm.generation_config.pad_token_id = None if pad is None else 0
    before = lm.generation_config.to_dict()
    ids, mask, slots, soft = batch(lm)
    embeds = embed_with_slots(lm, ids, slots, soft).detach()
    mask = torch.ones_like(mask)
    options = {"max_new_tokens": 6, "do_sample": False}
    free = generate_from_embeds(lm, embeds, mask, min_new_tokens=6, **options)
    first = 1 if lm.config.is_encoder_decoder else 0
    end = int(free[0, first + 1])
    given = {} if pad is None else {"pad_token_id": pad}
    expected = torch.full_like(free, end if pad is None else pad)
    for row, line in enumerate(free.tolist()):
        length = line.index(end, first) + 1 if end in line[first:] else len(line)
        expected[row, :length] = free[row, :length]
    assert not expected.equal(free)
    for config in (
        {"eos_token_id": [end], **given},
        {"generation_config": GenerationConfig(eos_token_id=[end], **given)},
    ):
        heard.clear()
        written = generate_from_embeds(lm, embeds, mask, **config, **options)
        assert written.equal(expected[:, : written.shape[1]]) and expected[:, written.shape[1] :].unique().numel() <= 1
        assert "generation_config" in config or not quiet_about(heard)
    assert lm.generation_config.to_dict() == before


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_the_end_is_learnt_where_it_is_the_padding_too(family):
    lm = lm_of(family, pad_token_id=2).requires_grad_(True)
    ids = torch.tensor([[SLOT, 5, 6, 2, 2, 2]])
    mask, labels = torch.tensor([[1, 1, 1, 1, 0, 0]]), torch.tensor([[-100, 5, 6, 2, -100, -100]])
    soft = torch.ones(1, 1, 16)
    optimizer = torch.optim.Adam(lm.parameters(), lr=0.02)
    for _ in range(25):
        logits, targets = label_logits(lm, embed_with_slots(lm, ids, ids == SLOT, soft), mask, labels)
        assert targets.tolist() == [5, 6, 2]
        label_loss(logits, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    written = generate_from_embeds(lm, soft, mask[:, :1], max_new_tokens=6, do_sample=False)
    assert written.tolist() == [[5, 6, 2]]


def test_slots_are_filled_in_reading_order_and_never_looked_up():
    lm = lm_of("llama")
    ids, _, slots, soft = batch(lm)
    looked_up = []
    lm.get_input_embeddings().register_forward_pre_hook(lambda _, args: looked_up.append(args[0]))
    embeds = embed_with_slots(lm, ids, slots, soft)
    assert embeds[slots].equal(soft[:, 0]) and looked_up[0].min() >= 0
    assert embeds[~slots].equal(lm.get_input_embeddings().weight[ids[~slots]])
    embeds.square().sum().backward()
    torch.testing.assert_close(soft.grad, 2 * soft)
    assert lm.get_input_embeddings().weight.grad is None
    assert not embed_with_slots(lm, ids.clamp(min=3), slots & False, soft[:0].detach()).requires_grad
    assert embed_with_slots(lm.bfloat16(), ids, slots, soft).dtype == torch.bfloat16


def test_slots_and_words_that_cannot_be_are_refused():
    lm = lm_of("llama")
    ids, _, slots, soft = batch(lm)
    with pytest.raises(ValueError, match="5 slots for 4 soft tokens"):
        embed_with_slots(lm, ids, slots, soft[:4])
    with pytest.raises(ValueError, match="id 48 of the text"):
        embed_with_slots(lm, ids.where(slots, VOCAB), slots, soft)
    with pytest.raises(ValueError, match="id -200 of the text"):
        embed_with_slots(lm, ids, slots & False, soft[:0])


@pytest.mark.parametrize(
    "family, scale", [("llama", 1), ("gemma", 4), ("opt-projected", 1), ("bart", 4), ("marian", 4)]
)
def test_embedding_rms_is_of_what_is_read_and_of_used_rows(family, scale):
    lm = lm_of(family)
    weight = lm.get_input_embeddings().weight
    weight[[0, 7]] = 0
    used = weight.double()[[i for i in range(VOCAB) if i not in (0, 7)]]
    expected = scale * math.sqrt(used.square().mean())
    assert embedding_rms(lm) == pytest.approx(expected, rel=1e-6)
    assert embedding_rms(lm, chunk_size=5) == pytest.approx(expected, rel=1e-6)
    assert embedding_width(lm) == weight.shape[1] == embed_tokens(lm, torch.tensor([[3]])).shape[-1]


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    ],
    ids=["lora", "modules_to_save", "tokens"],
)
def test_an_adapted_language_model_is_like_any_other(adapter):
    plain = lm_of("llama", tie_word_embeddings=False)
    expected_rms = embedding_rms(plain)
    ids, mask, slots, soft = batch(plain)
    labels = labels_of(plain)
    expected = label_logits(plain, embed_with_slots(plain, ids, slots, soft), mask, labels)
    adapted = get_peft_model(plain, LoraConfig(r=2, **adapter)).eval()
    rows = count_rows(adapted)
    logits, targets = label_logits(adapted, embed_with_slots(adapted, ids, slots, soft), mask, labels)
    torch.testing.assert_close(logits, expected[0])
    assert rows == [6] and targets.equal(expected[1])
    assert embedding_width(adapted) == 16 and embedding_rms(adapted) == pytest.approx(expected_rms)
    with pytest.raises(ValueError, match="id 48"):
        embed_with_slots(adapted, ids.where(slots, VOCAB), slots, soft)


def test_label_loss_by_hand():
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, -100, 0, 4])
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    rows = [(0, 1), (2, 0), (3, 4)]
    plain = -sum(log_p[row] for row in rows)
    smooth = -sum(0.9 * log_p[row] + 0.1 * log_p[row[0]].mean() for row in rows)
    torch.testing.assert_close(label_loss(logits, targets), plain / 3)
    torch.testing.assert_close(label_loss(logits, targets, num_items_in_batch=7), plain / 7)
    torch.testing.assert_close(label_loss(logits, targets, torch.tensor(7)), plain / 7)
    torch.testing.assert_close(label_loss(logits, targets, label_smoothing=0.1), smooth / 3)
    half = logits.bfloat16()
    assert label_loss(half, targets).equal(label_loss(half.float(), targets))
    assert label_loss(half, targets).dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_finite(family):
    lm = lm_of(family).bfloat16()
    ids, mask, slots, soft = batch(lm)
    logits, targets = label_logits(lm, embed_with_slots(lm, ids, slots, soft), mask, labels_of(lm))
    loss = label_loss(logits, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite() and soft.grad.isfinite().all() and soft.grad.abs().sum() > 0


def test_compiled_in_one_graph():
    lm = lm_of("llama", num_hidden_layers=1)
    ids, mask, slots, soft = batch(lm)

    def loss_of(ids, mask, slots, soft, labels):
        return label_loss(*label_logits(lm, embed_with_slots(lm, ids, slots, soft), mask, labels), label_smoothing=0.1)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for labels in (labels_of(lm), torch.full_like(labels_of(lm), -100)):
        expected, loss = (function(ids, mask, slots, soft, labels) for function in (loss_of, compiled))
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(*(torch.autograd.grad(value, soft)[0] for value in (loss, expected)))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_language_model_is_opened_as_what_it_is(family, tmp_path):
    lm = lm_of(family)
    lm.save_pretrained(tmp_path)
    opened = open_language_model(str(tmp_path), dtype=torch.float64)
    assert type(opened) is type(lm) and opened.dtype == torch.float64
    assert all(value.equal(lm.state_dict()[name].double()) for name, value in opened.state_dict().items())


def test_what_is_no_language_model_is_refused(tmp_path):
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match="vit is no language model that AutoModelForCausalLM opens"):
        language_model_from_config(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vit is no language model"):
        open_language_model(str(tmp_path))
    with pytest.raises(ValueError, match="openai-gpt cannot generate from embeddings"):
        language_model_from_config(AutoConfig.for_model("openai-gpt", n_embd=8, n_layer=1, n_head=1, vocab_size=9))
