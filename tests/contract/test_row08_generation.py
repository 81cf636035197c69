"""Row 8: a language model goes on after pictures and text, however it is searched, and each row after its own pictures."""

import pytest
import torch

from .cases import cases_for, in_double

EVERY = pytest.mark.parametrize("case", cases_for(8), ids=str)
SEARCHES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}
SEARCHED = pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
NEW = 5
ROWS = 4


@pytest.fixture
def model(case):
    """That never ends a row by itself, so that rows have equally many words."""
    model = case.build().double()
    model.generation_config.update(eos_token_id=None, pad_token_id=0, max_new_tokens=NEW, do_sample=False)
    return model


def prompts(case, rows=range(ROWS), **raw) -> dict[str, torch.Tensor]:
    """Texts of several lengths, with a picture each."""
    whole = {**case.raw(ROWS), **raw}
    chosen = {name: [whole[name][row] for row in rows] for name in ("images", "text")}
    return in_double(dict(case.preparer(**chosen, return_tensors="pt")))


def said(case, batch, sequences: torch.Tensor) -> torch.Tensor:
    """The new words."""
    return sequences[:, 1 if case.config().is_encoder_decoder else batch["input_ids"].shape[1] :]


@torch.no_grad()
def next_logits(case, model, batch, words: torch.Tensor) -> torch.Tensor:
    """``(B, n + 1, V)``: what `forward` says after the prompt and each of n words, nothing kept from one to the next."""
    if case.config().is_encoder_decoder:
        start = torch.full((len(words), 1), model.language_model.config.decoder_start_token_id)
        return model(**batch, decoder_input_ids=torch.cat([start, words], 1)).logits
    longer = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    grown = {**batch, **{name: torch.cat([batch[name], more], 1) for name, more in longer.items()}}
    return model(**grown).logits[:, -words.shape[1] - 1 :]


@EVERY
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_greedy_takes_the_likeliest_word_of_forward(case, model, use_cache):
    batch = prompts(case)
    words = torch.zeros(ROWS, 0, dtype=torch.long)
    for _ in range(NEW):
        words = torch.cat([words, next_logits(case, model, batch, words)[:, -1:].argmax(-1)], 1)
    sequences = model.generate(**batch, use_cache=use_cache)
    assert torch.equal(said(case, batch, sequences), words)
    if not case.config().is_encoder_decoder:
        assert torch.equal(sequences[:, :-NEW], batch["input_ids"])


@EVERY
def test_cached_scores_are_those_of_forward(case, model):
    batch = prompts(case)
    outputs = model.generate(**batch, return_dict_in_generate=True, output_logits=True)
    words = said(case, batch, outputs.sequences)
    expected = next_logits(case, model, batch, words)[:, :-1]
    assert torch.stack(outputs.logits, 1).shape == expected.shape == (ROWS, NEW, expected.shape[2])
    torch.testing.assert_close(torch.stack(outputs.logits, 1).double(), expected, rtol=1e-5, atol=1e-5)


@EVERY
@SEARCHED
def test_a_padded_batch_equals_its_rows_one_by_one(case, model, search):
    """Of sampling, whose draws a batch shares, with one choice a word."""
    search = {**search, **({"top_k": 1} if search.get("do_sample") else {})}
    batch = prompts(case)
    assert (batch["attention_mask"] == 0).any()
    if not case.config().is_encoder_decoder:
        assert (batch["attention_mask"][:, -1] == 1).all()
    together = said(case, batch, model.generate(**batch, **search)).chunk(ROWS)
    for row in range(ROWS):
        alone = prompts(case, [row])
        assert (alone["attention_mask"] == 1).all()
        assert torch.equal(said(case, alone, model.generate(**alone, **search)), together[row])


@EVERY
@SEARCHED
def test_rows_never_see_another_row_s_picture(case, model, search):
    options = {**search, "return_dict_in_generate": True, "output_logits": True}
    images = case.raw(ROWS)["images"]
    batch, other = prompts(case), prompts(case, images=[images[0], images[3], images[2], images[3]])
    first = []
    for inputs in (batch, other):
        torch.manual_seed(1)
        outputs = model.generate(**inputs, **options)
        first.append(outputs.logits[0].view(ROWS, -1))
    assert torch.equal(first[0][[0, 2, 3]], first[1][[0, 2, 3]])
    assert (first[0][1] - first[1][1]).abs().max() > 1e-3


@EVERY
@SEARCHED
def test_the_vision_side_runs_once_a_call(case, model, search):
    calls = []
    for name in ("vision_tower", "qformer"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    batch = prompts(case)
    model.generate(**batch, **search)
    assert calls == ["vision_tower", "qformer"]
    features = model.vision_features(batch.pop("pixel_values"))
    calls.clear()
    model.generate(**batch, vision_features=features, **search)
    assert calls == ["qformer"]


@EVERY
@SEARCHED
def test_features_in_place_of_pictures_say_the_same(case, model, search):
    batch = prompts(case)
    inputs = {**batch, "vision_features": model.vision_features(batch["pixel_values"])}
    del inputs["pixel_values"]
    found = []
    for given in (batch, inputs):
        torch.manual_seed(2)
        found.append(model.generate(**given, **search))
    assert torch.equal(*found)


@EVERY
def test_samples_are_drawn_by_the_seed(case, model):
    """A seed's are its own; several of a row are not one, and stand together."""
    batch = prompts(case)
    options = {"do_sample": True, "num_return_sequences": 5}
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(**batch, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    words = said(case, batch, drawn[0])
    assert len(words) == 5 * ROWS
    assert len(set(map(tuple, words[:5].tolist()))) > 1
    if not case.config().is_encoder_decoder:
        assert torch.equal(drawn[0][:, :-NEW], batch["input_ids"].repeat_interleave(5, 0))


@EVERY
def test_samples_follow_the_distribution_of_forward(case, model):
    batch, number = prompts(case, [0]), 4000
    torch.manual_seed(0)
    sequences = model.generate(**batch, do_sample=True, top_k=0, num_return_sequences=number, max_new_tokens=1)
    expected = next_logits(case, model, batch, torch.zeros(1, 0, dtype=torch.long))[0, -1].softmax(-1)
    share = torch.bincount(said(case, batch, sequences)[:, 0], minlength=len(expected)) / number
    assert ((share - expected).abs() <= 5 * (expected / number).sqrt() + 2 / number).all()


@EVERY
def test_beams_are_scored_by_their_likelihood_and_beat_greedy(case, model):
    batch = prompts(case)
    outputs = model.generate(
        **batch, num_beams=4, num_return_sequences=3, return_dict_in_generate=True, output_scores=True
    )
    words = said(case, batch, outputs.sequences)
    greedy = said(case, batch, model.generate(**batch))

    def likelihood(words: torch.Tensor, times: int) -> torch.Tensor:
        """Of words that follow each row `times` times, as `forward` has it."""
        repeated = {name: value.repeat_interleave(times, 0) for name, value in batch.items()}
        scores = next_logits(case, model, repeated, words)[:, :-1].log_softmax(-1)
        return scores.gather(2, words[..., None]).sum((1, 2)).view(ROWS, times)

    found = likelihood(words, 3)
    torch.testing.assert_close(outputs.sequences_scores.view(ROWS, 3).double() * NEW, found, rtol=1e-4, atol=1e-4)
    assert (found.diff(dim=1) <= 1e-6).all()
    assert (found[:, 0] >= likelihood(greedy, 1)[:, 0] - 1e-6).all()
    assert len(set(map(tuple, words[:3].tolist()))) == 3


@EVERY
def test_rows_have_as_many_pictures_as_they_like(case, model):
    images, texts = case.raw(3)["images"], ["<image> over a <image>", "grey", "what is <image>"]
    rows = [images[:2], [], images[2:]]
    batch = in_double(dict(case.preparer(images=rows, text=texts, return_tensors="pt")))
    together = said(case, batch, model.generate(**batch))
    for row, (pictures, text) in enumerate(zip(rows, texts, strict=True)):
        alone = in_double(dict(case.preparer(images=[pictures], text=[text], return_tensors="pt")))
        assert torch.equal(said(case, alone, model.generate(**alone))[0], together[row])


@EVERY
def test_pictures_alone_are_prompt_enough(case, model):
    """As the processor prepares them where no text is given."""
    batch = in_double(dict(case.preparer(images=case.raw(ROWS)["images"], return_tensors="pt")))
    expected = said(case, batch, model.generate(**batch))
    assert torch.equal(model.generate(pixel_values=batch["pixel_values"])[:, -NEW:], expected)


@EVERY
def test_a_row_that_ends_is_filled_up(case, model):
    """With whatever of its words as end token; other rows go on."""
    batch = prompts(case)
    words = said(case, batch, model.generate(**batch))
    end = int(words[0, 1])
    ended = said(case, batch, model.generate(**batch, eos_token_id=end, pad_token_id=0))
    for row, expected in zip(ended.tolist(), words.tolist(), strict=True):
        length = expected.index(end) + 1 if end in expected else NEW
        assert row[:length] == expected[:length]
        assert set(row[length:]) <= {0}


@EVERY
def test_a_saved_model_says_the_same_in_its_own_way(case, model, tmp_path):
    """Its generation config is kept, and the processor reads what it says."""
    model.generation_config.update(num_beams=2, max_new_tokens=3)
    model.save_pretrained(tmp_path)
    case.preparer.save_pretrained(tmp_path)
    opened, batch = case.auto_class.from_pretrained(tmp_path), prompts(case)
    sequences = model.generate(**batch)
    assert opened.generation_config.num_beams == 2
    assert torch.equal(opened.generate(**batch), sequences)
    texts = case.preparer.decode(sequences, skip_special_tokens=True, input_ids=batch["input_ids"])
    words = case.preparer.tokenizer.batch_decode(said(case, batch, sequences), skip_special_tokens=True)
    assert [text.split() for text in texts] == [text.split() for text in words]
    assert any(texts)


@EVERY
def test_training_mode_changes_no_word(case, model):
    """Dropout of the language model and of the tower never acts; the Q-Former has none here."""
    batch = prompts(case)
    expected = model.generate(**batch)
    assert torch.equal(model.train().generate(**batch), expected)
