"""Pictures, tokenizers of few words, and what the rows of a processor hold."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SLOT, QUERIES = -200, 3
SLOTS = [SLOT] * QUERIES
IGNORED = -100
IMAGES = [Image.fromarray(np.full((20 + i, 30, 3), 40 * i + 20, dtype=np.uint8)) for i in range(4)]
A, B, C, D = IMAGES
WORDS = [
    "a",
    "photo",
    "of",
    "cat",
    "dog",
    "red",
    "two",
    "what",
    "color",
    "is",
    "it",
    "question",
    ":",
    "answer",
    "short",
    "?",
    ".",
    ",",
    "one",
    "answers",
    "dogs",
    "and",
    "on",
    "the",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "what is it?"}]},
]


def word_tokenizer(before: list[str], after: list[str], special: list[str], **options) -> PreTrainedTokenizerFast:
    """One token a word of lower-cased text, between the tokens `before` and `after`."""
    vocab = {word: number for number, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=special[0]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if before or after:
        frame = [(token, vocab[token]) for token in before + after]
        backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=frame)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=special[0], **options)


def byte_level(bos: str | None, **options) -> PreTrainedTokenizerFast:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    pairs = [("Ġ", "c"), ("a", "t"), ("Ġc", "at"), ("Ġ", "a"), ("o", "f"), ("Ġ", "of")]
    merged = ["".join(pair) for pair in pairs]
    vocab = {token: number for number, token in enumerate([*special, *symbols, *merged])}
    backend = Tokenizer(models.BPE(vocab, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos is not None:
        frame = [(bos, vocab[bos])]
        backend.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=frame)
    named = {"eos_token": "</s>", "pad_token": "<pad>"} | ({} if bos is None else {"bos_token": bos})
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **named | options, extra_special_tokens=["<|im_start|>", "<|im_end|>"]
    )


def pieces(tokenizer, *texts: str | None) -> list[int]:
    """Ids of texts tokenised one by one, where None is a picture."""
    rows = [SLOTS if text is None else tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [number for row in rows for number in row]


def rows(batch, name="input_ids") -> list[list[int]]:
    """Rows without their padding."""
    return [row[mask.bool()].tolist() for row, mask in zip(batch[name], batch["attention_mask"], strict=True)]


def same(batch, expected):
    assert batch.keys() == expected.keys()
    for name, values in batch.items():
        assert torch.equal(values, expected[name]), name
