"""Where a text is pooled, how padding is cut and told from text, and which inputs are refused with which words."""

import pytest
import torch
from test_modeling_clip import END, START, texts, tiny_clip, tiny_text

from hf_mm.models.clip.modeling_clip import check_mask_shape, drop_right_padding, last_kept_positions

LEFT = "padding on the right only"


@pytest.fixture(scope="module")
def model():
    return tiny_clip()


def test_each_row_ends_at_its_first_end_token():
    ids = torch.tensor(
        [
            [START, END, 7, END, 3],  # an empty text, and anything after it
            [START, 9, 9, 9, END],
            [START, 9, END, END, END],
            [END, END, END, END, END],  # nothing but padding
        ]
    )
    assert tiny_text().end_positions(ids).tolist() == [1, 4, 2, 0]


@pytest.mark.parametrize("token", [END - 1, END + 1], ids=["below", "above"])
def test_only_the_end_token_ends_a_text(token):
    """Not a larger id (an added token), not a smaller one."""
    text_model = tiny_text(vocab_size=70)
    ids = torch.tensor([[START, 5, token, END, END, END]])
    assert text_model.end_positions(ids).tolist() == [3]
    ids[ids == END] = token
    with pytest.raises(ValueError, match=f"row 0 of input_ids has no end token .id {END}."):
        text_model.end_positions(ids)


@pytest.mark.parametrize("row", range(3))
def test_the_first_row_without_an_end_token_is_named(row):
    ids, _ = texts(5, 5, 5, 5, 5, 5, length=8)
    ids[row:4][ids[row:4] == END] = 1
    with pytest.raises(ValueError, match=f"row {row} of input_ids has no end token"):
        tiny_text().end_positions(ids)


@pytest.mark.parametrize("beyond", [0, 5])
def test_an_id_beyond_the_vocabulary_is_named(beyond):
    text_model = tiny_text(vocab_size=70)
    ids = torch.tensor([[START, 5, END, END], [START, 69, 69, END]])
    assert text_model.end_positions(ids).tolist() == [2, 3]
    ids[0, 1] = 70 + beyond
    with pytest.raises(ValueError, match=f"holds id {70 + beyond}, but the model's vocabulary has 70"):
        text_model.end_positions(ids)


@pytest.mark.parametrize("shape", [(6,), (1, 2, 6)], ids=str)
def test_ids_that_are_no_table_are_refused(shape):
    with pytest.raises(ValueError, match=rf"must be \(batch, tokens\), but its shape is \({shape[0]},"):
        tiny_text().end_positions(torch.full(shape, END))


@pytest.mark.parametrize("row", range(3))
def test_padding_on_the_left_is_refused_in_any_row(model, row):
    ids, mask = texts(6, 6, 6)
    ids[row], mask[row] = torch.tensor([END, END, START, 4, 5, END]), torch.tensor([0, 0, 1, 1, 1, 1])
    with pytest.raises(ValueError, match=LEFT):
        model.get_text_features(ids)
    with pytest.raises(ValueError, match=LEFT):
        model.get_text_features(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 1, 1, 1, 1]],
        [[1, 0, 0, 0, 0]],
        [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
    ],
    ids=str,
)
def test_a_mask_that_hides_the_right_end_alone_is_dropped(rows):
    assert drop_right_padding(torch.tensor(rows)) is None
    assert drop_right_padding(torch.tensor(rows).bool()) is None


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 0, 1, 1, 1]],
        [[1, 1, 1, 0, 1]],
        [[1, 1, 0, 1, 0]],
        [[1, 1, 1, 1, 1], [1, 0, 1, 0, 0]],
    ],
    ids=str,
)
def test_a_mask_with_a_hole_is_kept(rows):
    mask = torch.tensor(rows)
    assert drop_right_padding(mask) is mask


def test_no_mask_stays_no_mask():
    assert drop_right_padding(None) is None


def test_embeddings_are_pooled_at_the_last_token_that_is_kept():
    states = torch.zeros(2, 5, 3)
    assert last_kept_positions(None, states).tolist() == [4, 4]
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]])
    assert last_kept_positions(mask, states).tolist() == [3, 0]
    assert last_kept_positions(mask.bool(), states).tolist() == [3, 0]
    assert last_kept_positions(-3 * mask, states).tolist() == [3, 0], "anything but 0 keeps a token"


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (1, 5), (3, 5), (2, 5, 1), (10,)], ids=str)
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=rf"the shape of the texts, \(2, 5\), not \({shape[0]},"):
        check_mask_shape(torch.ones(shape), torch.Size((2, 5)))


def test_a_mask_of_the_same_shape_and_none_pass():
    check_mask_shape(torch.ones(2, 5), torch.Size((2, 5)))
    check_mask_shape(None, torch.Size((2, 5)))


def test_a_mask_is_compared_with_the_texts_before_they_are_cut(model):
    """After cutting, a mask of the longest text's length would pass."""
    ids, _ = texts(4, 6, length=10)
    with pytest.raises(ValueError, match=r"\(2, 10\), not \(2, 6\)"):
        model.get_text_features(ids, torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"\(2, 10\), not \(2, 12\)"):
        model.get_text_features(ids, torch.ones(2, 12))


@pytest.mark.parametrize("lengths", [(3, 5), (7, 2), (10, 10)], ids=str)
def test_texts_are_cut_at_the_longest_ones_end(model, lengths):
    """Ids, mask and positions alike; the words of a text come out as they do from the whole rows."""
    ids, mask = texts(*lengths, length=10)
    mask[0, 1] = 0  # a hole, so that the mask counts
    positions = torch.arange(10).flip(0).repeat(2, 1)
    cut = model.get_text_features(ids, mask, position_ids=positions, output_hidden_states=True)
    assert [states.shape[1] for states in cut.hidden_states] == [max(lengths)] * 3
    whole = model.text_model(ids, mask, position_ids=positions)
    expected = model.text_projection(whole.pooler_output)
    torch.testing.assert_close(cut.pooler_output, expected, rtol=1e-12, atol=1e-12)
    assert cut.pooler_output.shape == (2, 24)
    for other in ({"attention_mask": None}, {"position_ids": None}):
        options = {"attention_mask": mask, "position_ids": positions, **other}
        assert not torch.equal(model.get_text_features(ids, **options).pooler_output, cut.pooler_output)


def test_given_pooling_positions_leave_the_rows_whole(model):
    """No end token is looked for, nothing is cut."""
    ids = texts(5, 8)[0]
    ids[ids == END] = 1
    places = torch.tensor([2, 7])
    pooled = model.get_text_features(ids, pooling_positions=places, output_hidden_states=True)
    assert pooled.hidden_states[0].shape[1] == 8
    states = model.text_model(ids, pooling_positions=places).last_hidden_state
    expected = model.text_projection(states[[0, 1], places])
    torch.testing.assert_close(pooled.pooler_output, expected, rtol=1e-12, atol=1e-12)


def test_features_come_without_tokens_unless_they_are_asked_for(model):
    ids = texts(4, 6)[0]
    assert model.get_text_features(ids).last_hidden_state is None
    asked = model.get_text_features(ids, output_hidden_states=True)
    assert asked.last_hidden_state.shape == (2, 6, 32)


def test_a_tuple_is_given_where_a_tuple_is_asked_for(model):
    ids = texts(4, 6)[0]
    (pooled,) = model.get_text_features(ids, return_dict=False)
    assert torch.equal(pooled, model.get_text_features(ids).pooler_output)
