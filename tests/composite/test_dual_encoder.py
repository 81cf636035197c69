"""Words among the tokens of any dual encoder, against its own table of embeddings."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, CLIPConfig, ElectraConfig, SiglipConfig

from hf_mm.composite.dual_encoder import joint_width, texts_with_words, word_embeddings, word_width
from hf_mm.models.clip.configuration_clip import MMClipConfig

START, END, FREE = 48, 49, 30
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURE = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 50, "bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
TEXT |= {"max_position_embeddings": 12}
ELECTRA = ElectraConfig(**SMALL, vocab_size=50, embedding_size=20)
DUALS = {
    "mm_clip": MMClipConfig(vision_config=PICTURE, text_config=TEXT, projection_dim=24),
    "mm_clip over electra, of narrow words": MMClipConfig(
        vision_config=PICTURE, text_config=ELECTRA, text_pooling="mean", projection_dim=24
    ),
    "clip": CLIPConfig(vision_config=PICTURE, text_config=TEXT, projection_dim=24),
    "siglip": SiglipConfig(vision_config=PICTURE, text_config={**TEXT, "projection_size": 28}),
}
IDS = torch.tensor([[START, 3, 4, END, END, END, END], [START, 7, 8, 9, 2, 1, END]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
PLACES = torch.tensor([[0, 0, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 0]]).bool()


def dual_encoder(name: str):
    torch.manual_seed(0)
    dual = AutoModel.from_config(DUALS[name]).double().eval()
    for parameter in dual.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return dual


def words_of(dual, number: int = 4) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(number, word_width(dual.config), dtype=torch.float64)


def by_table(dual, words: torch.Tensor) -> torch.Tensor:
    """Each word in the row of an id that no text holds."""
    dual, ids = copy.deepcopy(dual), IDS.clone()
    ids[PLACES] = FREE + torch.arange(4)
    with torch.no_grad():
        dual.text_model.get_input_embeddings().weight[FREE : FREE + 4] = words
    return dual.get_text_features(input_ids=ids, attention_mask=MASK).pooler_output


@pytest.mark.parametrize("name", DUALS)
def test_widths_are_those_of_what_the_model_computes(name):
    dual = dual_encoder(name)
    table = word_embeddings(dual)
    assert isinstance(table, nn.Embedding)
    assert table is dual.text_model.get_input_embeddings()
    assert word_width(dual.config) == table.embedding_dim
    assert (
        joint_width(dual.config) == dual.get_text_features(input_ids=IDS, attention_mask=MASK).pooler_output.shape[1]
    )


@pytest.mark.parametrize("name", DUALS)
def test_words_are_rows_of_the_table(name):
    dual = dual_encoder(name)
    words = words_of(dual)
    ours = texts_with_words(dual, IDS, words, PLACES, MASK).pooler_output
    torch.testing.assert_close(ours, by_table(dual, words), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DUALS)
def test_the_tables_own_words_change_nothing(name):
    dual = dual_encoder(name)
    words = word_embeddings(dual)(IDS[PLACES])
    plain = dual.get_text_features(input_ids=IDS, attention_mask=MASK).pooler_output
    ours = texts_with_words(dual, IDS, words, PLACES, MASK).pooler_output
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DUALS)
def test_gradients_reach_the_words_alone_of_a_frozen_encoder(name):
    """By central differences along a random direction."""
    dual = dual_encoder(name).requires_grad_(False)
    words = words_of(dual).requires_grad_()
    weights = torch.randn(2, joint_width(dual.config), dtype=torch.float64)

    def value(words):
        return (texts_with_words(dual, IDS, words, PLACES, MASK).pooler_output * weights).sum()

    (gradient,) = torch.autograd.grad(value(words), words)
    assert (gradient.abs().amax(dim=1) > 1e-6).all()
    direction, step = torch.randn_like(words), 1e-5
    with torch.no_grad():
        slope = (value(words + step * direction) - value(words - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", DUALS)
def test_the_encoder_is_left_as_it_was(name):
    """Also where the call fails on the way."""
    dual = dual_encoder(name)
    table = word_embeddings(dual)
    before = copy.deepcopy(dual.state_dict())
    plain = dual.get_text_features(input_ids=IDS, attention_mask=MASK).pooler_output
    texts_with_words(dual, IDS, words_of(dual), PLACES, MASK)
    with pytest.raises((RuntimeError, ValueError)):
        texts_with_words(dual, IDS, words_of(dual)[:, :-1], PLACES, MASK)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        texts_with_words(dual, IDS.repeat(1, 4), words_of(dual), PLACES.repeat(1, 4), MASK[:, :2])
    assert not table._forward_hooks
    assert all(torch.equal(before[key], tensor) for key, tensor in dual.state_dict().items())
    assert torch.equal(dual.get_text_features(input_ids=IDS, attention_mask=MASK).pooler_output, plain)


@pytest.mark.parametrize("name", ["mm_clip", "clip"])
def test_hidden_states_are_given_on_request(name):
    dual = dual_encoder(name)
    out = texts_with_words(dual, IDS, words_of(dual), PLACES, MASK, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    positions = dual.text_model.embeddings.position_embedding.weight
    first = out.hidden_states[0][1, [1, 3, 5]] - positions[[1, 3, 5]]
    torch.testing.assert_close(first, words_of(dual)[1:])
