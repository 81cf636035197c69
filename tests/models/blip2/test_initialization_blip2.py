"""What a new Q-Former starts from: transformers' BERT is the oracle of its text, and words of a corpus come apart."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ResNetConfig,
    ResNetModel,
)

import hf_mm  # noqa: F401  registers the towers
from hf_mm.models.blip2.configuration_blip2 import MMBlip2QFormerConfig
from hf_mm.models.blip2.initialization_blip2 import init_from_bert, learn_wordpiece, resize_tower
from hf_mm.models.blip2.modeling_qformer import MMBlip2QFormerModel, QFormerLMHead

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 30}


def pair(**fields) -> tuple[MMBlip2QFormerModel, QFormerLMHead, BertForMaskedLM]:
    torch.manual_seed(0)
    config = MMBlip2QFormerConfig(
        **SHAPE | fields, **IDS, vocab_size=31, num_query_tokens=3, encoder_hidden_size=8, max_position_embeddings=12
    )
    bert = BertForMaskedLM(BertConfig(**SHAPE, vocab_size=30, max_position_embeddings=20))
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    head = QFormerLMHead(config)
    qformer = MMBlip2QFormerModel(config).eval()
    head.decoder.weight = qformer.embeddings.word_embeddings.weight
    return qformer, head, bert.eval()


@torch.no_grad()
def test_text_is_read_and_said_as_bert_does():
    """Without its embedding of the first segment, which the Q-Former has not."""
    qformer, head, bert = pair()
    init_from_bert(qformer, head, bert)
    bert.bert.embeddings.token_type_embeddings.weight.zero_()
    ids = torch.tensor([[1, 5, 9, 2], [1, 7, 2, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    text = qformer(input_ids=ids, attention_mask=mask, text_mode="unimodal").text_hidden_state
    expected = bert(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    kept = mask.bool()
    torch.testing.assert_close(text[kept], expected.hidden_states[-1][kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head(text)[kept][:, :30], expected.logits[kept], rtol=1e-4, atol=1e-4)


def test_queries_get_the_mlp_of_the_text_and_nothing_else():
    qformer, head, bert = pair()
    before = {name: tensor.clone() for name, tensor in qformer.state_dict().items()}
    init_from_bert(qformer, head, bert)
    after = qformer.state_dict()
    for name, tensor in after.items():
        if "query_mlp" in name or "query_layer_norm" in name:
            assert torch.equal(tensor, after[name.replace("query_", "text_")])
        if "cross_attn" in name or "query_tokens" in name:
            assert torch.equal(tensor, before[name])
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(after[words][30], before[words][30])  # [DEC]
    assert not torch.equal(after[words][:30], before[words][:30])


def test_a_bert_without_a_head_leaves_the_head_alone():
    qformer, head, bert = pair()
    before = head.transform.weight.clone()
    init_from_bert(qformer, head, bert.bert)
    assert isinstance(bert.bert, BertModel) and torch.equal(head.transform.weight, before)
    init_from_bert(qformer, None, bert)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"hidden_size": 32}, "BERT's hidden_size is 16, the Q-Former's 32"),
        ({"num_hidden_layers": 3}, "BERT has 2 blocks, the Q-Former 3"),
        ({"use_text": False}, "set use_text"),
    ],
)
def test_another_shape_is_refused(fields, sentence):
    torch.manual_seed(0)
    qformer = MMBlip2QFormerModel(MMBlip2QFormerConfig(**SHAPE | fields, **IDS, vocab_size=31, encoder_hidden_size=8))
    with pytest.raises(ValueError, match=sentence):
        init_from_bert(qformer, None, pair()[2])


@pytest.mark.parametrize("kind", ["mm_vit", "eva_vit", "mm_clip_vision"])
@torch.no_grad()
def test_a_resized_tower_sees_what_it_saw_by_interpolation(kind):
    shape = {**SHAPE, "image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    tower = AutoModel.from_config(AutoConfig.for_model(kind, **shape)).eval()
    pixels = torch.randn(2, 3, 24, 24)
    before = tower(pixels, interpolate_pos_encoding=True).last_hidden_state
    resize_tower(tower.requires_grad_(False), 24)
    torch.testing.assert_close(tower(pixels).last_hidden_state, before)
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_a_tower_without_positions_cannot_be_resized():
    with pytest.raises(ValueError, match="resnet has no table of positions"):
        resize_tower(ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])), 32)


def test_a_size_that_patches_do_not_tile_is_refused_and_nothing_is_changed():
    tower = AutoModel.from_config(AutoConfig.for_model("eva_vit", **SHAPE, image_size=16, patch_size=4))
    with pytest.raises(ValueError, match=r"image_size \(26\).*patch_size \(4\)"):
        resize_tower(tower, 26)
    assert tower.config.image_size == 16 and tower.embeddings.position_embeddings.shape[1] == 17


CORPUS = ["Smiling face", "smiling cat", "grinning face with smiling eyes", "Frowning face!"] * 2


def test_words_come_apart_in_learnt_pieces_and_together_again(tmp_path):
    learn_wordpiece(CORPUS, 80).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("SMILING face")["input_ids"][1:-1] == tokenizer("smiling Face")["input_ids"][1:-1]
    assert tokenizer.tokenize("smiling") == ["smiling"]  # six times in the corpus
    for text in ("smiling faces", "grinning cats with eyes", "winning"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id in tokenizer("日")["input_ids"]
    assert tokenizer.bos_token == "[DEC]" and tokenizer.pad_token_id == 0 and len(tokenizer) <= 80


def test_equal_texts_give_an_equal_vocabulary_in_every_process():
    code = (
        "from hf_mm.models.blip2.initialization_blip2 import learn_wordpiece; "
        "words = [f'{a}{b}{c}' for a in 'abcde' for b in 'fgh' for c in 'aeiou'] * 2; "
        "print(sorted(learn_wordpiece(words, 90).get_vocab().items(), key=lambda item: item[1]))"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "12"
    }
    assert len(runs) == 1 and len(eval(runs.pop())) == 90


def test_a_vocabulary_holds_every_character():
    with pytest.raises(ValueError, match="vocab_size must be at least"):
        learn_wordpiece(CORPUS, 20)
    with pytest.raises(ValueError, match="there are none"):
        learn_wordpiece([], 100)
