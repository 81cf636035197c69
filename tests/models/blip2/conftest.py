"""Tokenizers, processors and published files, by the names under which the tests of BLIP-2 know them."""

import pytest
import torch
from published_blip2s import (
    WORDS,
    eva_state,
    lavis_file,
    lavis_state,
    opt_model,
    opt_tokenizer,
    t5_model,
    t5_tokenizer,
)
from small_processors import CHATML, QUERIES, byte_level, word_tokenizer
from transformers import BertTokenizer

from hf_mm.models.blip2.processing_blip2 import MMBlip2Processor
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil

# Files for the converter


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    """A BERT tokenizer without [DEC], as it is published."""
    folder = tmp_path_factory.mktemp("bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n")
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def opt_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opt")
    opt_model().save_pretrained(folder)
    opt_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    t5_model().save_pretrained(folder)
    t5_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def eva_file(tmp_path):
    torch.save(eva_state(), tmp_path / "eva_vit_g.pth")
    return tmp_path / "eva_vit_g.pth"


@pytest.fixture
def stage1_file(tmp_path):
    return lavis_file(tmp_path / "blip2_pretrained.pth", lavis_state())


# Tokenizers and processors


@pytest.fixture(scope="module")
def bert():
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    named = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return word_tokenizer(["[CLS]"], ["[SEP]"], special, **named, bos_token="[DEC]", model_max_length=40)


@pytest.fixture(scope="module")
def t5():
    return word_tokenizer([], ["</s>"], ["<unk>", "<pad>", "</s>"], pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def opt():
    """As OPT's: byte-level, the start token is the end token, "\\n" is a token."""
    return byte_level("</s>", model_max_length=64)


@pytest.fixture
def chat():
    """As SmolLM's and Qwen's: no start token, pad = end, a template for texts alone."""
    tokenizer = byte_level(None, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def image_processor():
    return MMClipImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False)


@pytest.fixture(scope="module")
def stage_1(image_processor, bert):
    return MMBlip2Processor(image_processor, bert)


@pytest.fixture(scope="module")
def opt_processor(image_processor, opt):
    return MMBlip2Processor(image_processor, opt, num_query_tokens=QUERIES, eos="\n")


@pytest.fixture(scope="module")
def t5_processor(image_processor, t5):
    return MMBlip2Processor(image_processor, t5, num_query_tokens=QUERIES, is_encoder_decoder=True)
