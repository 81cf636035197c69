import copy
import gzip
import html
import json
import logging
import pickle
import random
import re
import sys
import unicodedata

import ftfy
import numpy as np
import pytest
import regex
from tokenizers import Tokenizer
from transformers import AutoTokenizer, CLIPTokenizer, DataCollatorWithPadding

import hf_mm  # noqa: F401 - registers the tokenizer
from hf_mm.models.clip import tokenization_clip
from hf_mm.models.clip.conversion_clip import published_tokenizer
from hf_mm.models.clip.tokenization_clip import MMClipTokenizer, clean_text, clip_vocabulary

CORPUS = [
    "a photo of a cat's whiskers, they're lovely",
    "the naïve résumé of 3 dogs in 2024 🐶🐱",
    "i'll say we've seen that it don't, i'm sure he'd file_name_3d",
    "日本語 テスト ½ Ⅳ ² ☆ — “quoted”",
] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return MMClipTokenizer.train_from_iterator(CORPUS, 800, model_max_length=32)


def merges_of(tokenizer):
    return [tuple(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


def joined(symbols, pair):
    result, index = [], 0
    while index < len(symbols):
        found = tuple(symbols[index : index + 2]) == pair
        result.append("".join(pair) if found else symbols[index])
        index += 2 if found else 1
    return result


class OriginalTokenizer:
    """The original code's algorithm, re-implemented from its description: greedy pair merging in plain Python."""

    PATTERN = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        regex.IGNORECASE,
    )

    def __init__(self, merges):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.symbol = {byte: chr(byte) for byte in printable}
        self.symbol |= {byte: chr(256 + k) for k, byte in enumerate(others)}
        tokens = [self.symbol[byte] for byte in printable + others]
        tokens += [token + "</w>" for token in tokens] + ["".join(merge) for merge in merges]
        self.ids = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
        self.rank = {merge: index for index, merge in enumerate(merges)}

    def split(self, piece):
        if piece in ("<|startoftext|>", "<|endoftext|>"):
            return [piece]
        symbols = [self.symbol[byte] for byte in piece.encode("utf-8")]
        symbols[-1] += "</w>"
        while True:
            known = [pair for pair in zip(symbols, symbols[1:], strict=False) if pair in self.rank]
            if not known:
                return symbols
            symbols = joined(symbols, min(known, key=self.rank.get))

    def __call__(self, text):
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = re.sub(r"\s+", " ", text).strip().lower()
        tokens = [token for piece in self.PATTERN.findall(text) for token in self.split(piece)]
        return [self.ids[token] for token in ["<|startoftext|>", *tokens, "<|endoftext|>"]]


PLAIN = [
    "a photo of a cat",
    "A  Photo\tof\na CAT ",
    "file_name_3d",
    "A\n'll 11p223RF☆ho!!to?",
    "__",
    "½ Ⅳ ²",
    "naïve résumé",
    "nai\u0308ve re\u0301sume\u0301",
    "it's they're we've i'm he'll she'd don't",
    "''s 's' !'t",
    "日本語のテスト、漢字",
    "🐶🐱 dog👩‍👩‍👧cat 🇩🇪",
    "İstanbul ISTANBUL ıi",
    "1234567890 3.14 10km",
    "...!?!... #hash @you a/b\\c",
    "Привет Ελλάδα שלום مرحبا हिन्दी",
    "",
    "   \n ",
]
CLEANED = [
    "the “quoted” ‘word’ it’s",
    "fish &amp; chips &lt;b&gt; &amp;lt;i&amp;gt; caf&#233; &nbsp; x",
    "cafÃ© â€œmojibakeâ€\x9d",
    "ﬁne ﬂow oﬀer",
    "ＦＵＬＬ ｗｉｄｔｈ １２３",
    "bell\x07 null\x00 escape\x1b[31mred\x1b[0m tab\x0b",
    "soft\u00adhyphen zero\u200bwidth line\u2028break",
    "ΟΔΟΣ ΣΑΣ",
    "e&#769; combined after unescaping",
    "a <|endoftext|> b <|STARTOFTEXT|>c&lt;|endoftext|&gt;",
    "'ſ 'S 'LL",
]


@pytest.mark.parametrize("text", PLAIN + CLEANED)
def test_ids_equal_the_original_algorithm(tokenizer, text):
    """F19: words are split as the original splits them."""
    original = OriginalTokenizer(merges_of(tokenizer))
    assert tokenizer(text, truncation=False)["input_ids"] == original(text)


def test_ids_equal_the_original_algorithm_on_random_text(tokenizer):
    """F19: also where nobody would write it."""
    original = OriginalTokenizer(merges_of(tokenizer))
    ranges = [(0, 0x500), (0x1E00, 0x2C00), (0x3000, 0x3200), (0xFB00, 0xFB07), (0xFF00, 0xFF80), (0x1F300, 0x1F700)]
    letters = [chr(code) for low, high in ranges for code in range(low, high)]
    # Code points that Unicode versions disagree on; and U+0345, which the original's ignore-case splitting loses.
    letters = [c for c in letters if unicodedata.category(c) != "Cn" and c != "\u0345"]
    letters += ["'s", "'ll", "&amp;", "&amp;lt;", "&#233;", "é", "“", "’", " ", " the ", "ſ", "Σ", "1"] * 50
    draw = random.Random(0)
    texts = ["".join(draw.choices(letters, k=draw.randint(1, 12))) for _ in range(1500)]
    assert tokenizer(texts, truncation=False)["input_ids"] == [original(text) for text in texts]


@pytest.mark.parametrize("text", [text for text in PLAIN if text.strip()])
def test_ids_equal_transformers_on_plain_text(tokenizer, text):
    """F19: the ids are those of the reference tokenizer."""
    theirs = CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=merges_of(tokenizer))
    assert tokenizer(text, truncation=False)["input_ids"] == theirs(text)["input_ids"]


def test_every_character_is_covered(tokenizer):
    """F19: no character is dropped."""
    for text in ["file_name_3d", "A\n'll 11p223RF☆ho!!to?", "__", "½ Ⅳ ²", "naïve résumé", "\u0345x 𐍈 ͵"]:
        decoded = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
        assert decoded.replace(" ", "") == re.sub(r"\s", "", clean_text(text))


def test_fixed_points_of_the_published_vocabulary(tokenizer):
    assert tokenizer("a * , !")["input_ids"][1:-1] == [320, 265, 267, 256]
    assert len(clip_vocabulary([(str(k), "x") for k in range(tokenization_clip.PUBLISHED_MERGES)])) == 49408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_decoding_gives_the_words_back(tokenizer):
    text = "a photo of the naïve 日本語 🐶 dogs"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer("a cat")["input_ids"]) == "<|startoftext|>a cat <|endoftext|>"
    assert tokenizer.decode(tokenizer("</w>")["input_ids"], skip_special_tokens=True) == "</ w >"


def test_the_published_vocabulary():
    """F19: ids with the published vocabulary, which comes along."""
    tokenizer = published_tokenizer()
    original = OriginalTokenizer(merges_of(tokenizer))
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    for text in PLAIN + CLEANED:
        assert tokenizer(text, truncation=False)["input_ids"] == original(text)


# Building


def test_each_learned_merge_is_the_most_frequent_pair_of_its_time(tokenizer):
    original = OriginalTokenizer([])
    words = [original.split(piece) for text in CORPUS for piece in original.PATTERN.findall(clean_text(text))]
    assert len(merges_of(tokenizer)) > 90
    for merge in merges_of(tokenizer):
        counts = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        assert counts[merge] == max(counts.values()) >= 2
        words = [joined(word, merge) for word in words]


def test_learning_takes_a_generator_and_stops_at_the_size():
    tokenizer = MMClipTokenizer.train_from_iterator(iter(CORPUS), 530)
    assert len(tokenizer) == 530
    assert sorted(tokenizer.get_vocab().values()) == list(range(530))
    assert tokenizer.model_max_length == 77
    again = tokenizer.train_new_from_iterator(iter([CORPUS[:5], CORPUS[5:]]), 530)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_missing_text_in_the_corpus_is_refused():
    with pytest.raises(ValueError, match="not None"):
        MMClipTokenizer.train_from_iterator(["a cat", None], 600)


def test_learning_does_not_depend_on_the_order_of_the_texts(tokenizer):
    draw = random.Random(0)
    for _ in range(5):
        again = MMClipTokenizer.train_from_iterator(draw.sample(CORPUS, len(CORPUS)), 800)
        assert again.get_vocab() == tokenizer.get_vocab()
        assert merges_of(again) == merges_of(tokenizer)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="513 is too small"):
        MMClipTokenizer.train_from_iterator(CORPUS, 513)


@pytest.mark.parametrize("name", ["bpe.txt.gz", "bpe.txt"])
def test_the_merge_file_gives_the_same_tokenizer(tokenizer, name, tmp_path):
    merges = merges_of(tokenizer)
    text = "\n".join(["#version: 0.2", *map(" ".join, merges), "unused merge", ""]).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    read = MMClipTokenizer.from_bpe_file(tmp_path / name, num_merges=len(merges), model_max_length=32)
    assert read.get_vocab() == tokenizer.get_vocab()
    assert read(PLAIN)["input_ids"] == tokenizer(PLAIN)["input_ids"]


def test_a_damaged_merge_file_is_refused(tmp_path):
    path = tmp_path / "bpe.txt.gz"
    whole = gzip.compress(b"#version\na b\nc d\n")
    for content, words in [
        (whole[:-12], "not a readable"),
        (b"a b", "not a readable"),
        (whole, "does not hold 48894"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}.*{words}"):
            MMClipTokenizer.from_bpe_file(path)
    path.write_bytes(gzip.compress(b"#version\na b c\n"))
    with pytest.raises(ValueError, match="does not hold 1 merges"):
        MMClipTokenizer.from_bpe_file(path, num_merges=1)


def test_vocabularies_that_miss_bytes_are_refused():
    with pytest.raises(ValueError, match="lacks"):
        MMClipTokenizer({"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}, [])


# Calling


def test_long_texts_are_cut_with_the_end_token_last_and_one_warning(tokenizer, caplog):
    """F15: a long text costs its end, not the run."""
    logging.Logger.warning_once.cache_clear()
    whole = tokenizer("a cat " * 200, truncation=False)["input_ids"]
    assert len(whole) == 402
    assert "cut" not in caplog.text
    expected = [*whole[:31], tokenizer.eos_token_id]
    assert tokenizer("a cat " * 200)["input_ids"] == expected
    assert tokenizer(["a cat", "a cat " * 200], padding=True, return_tensors="pt")["input_ids"][1].tolist() == expected
    assert tokenizer.encode("a cat " * 200) == expected
    assert tokenizer("a cat " * 200, max_length=8)["input_ids"] == [*whole[:7], tokenizer.eos_token_id]
    assert caplog.text.count("were cut") == 1


def test_padding_is_on_the_right_with_the_end_token(tokenizer):
    batch = tokenizer(["a", "a cat"], padding=True)
    end = tokenizer.eos_token_id
    assert batch["input_ids"][0] == [tokenizer.bos_token_id, 320, end, end]
    assert batch["attention_mask"] == [[1, 1, 1, 0], [1, 1, 1, 1]]
    collated = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)([tokenizer("a"), tokenizer("a cat")])
    assert collated["input_ids"].shape == (2, 8)
    assert (collated["input_ids"][0, 2:] == end).all()


def test_left_padding_is_refused_everywhere(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"
    for call in (
        lambda: tokenizer("a", padding_side="left"),
        lambda: tokenizer.pad([tokenizer("a")], padding_side="left"),
        lambda: left("a"),
        lambda: left.pad([{"input_ids": [1]}]),
        lambda: MMClipTokenizer.from_pretrained(tmp_path, padding_side="left"),
    ):
        with pytest.raises(ValueError, match="on the right only"):
            call()


def test_another_padding_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match="pads with its end token"):
        MMClipTokenizer(tokenizer.get_vocab(), merges_of(tokenizer), pad_token="!")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (["a dog", None], "Text 1 is None"),
        (["a dog", float("nan")], "Text 1 is nan"),
        ([["a", "dog"]], r"Text 0 is \['a', 'dog'\]"),
        ([1], "Text 0 is 1"),
        (float("nan"), "not nan"),
        ([], "list of texts is empty"),
    ],
)
def test_what_is_no_text_is_refused(tokenizer, text, words):
    """F16: None and NaN are named by their row."""
    with pytest.raises(ValueError, match=words):
        tokenizer(text)


def test_pairs_and_split_words_are_refused(tokenizer):
    with pytest.raises(ValueError, match="text pairs"):
        tokenizer("a", "b")
    with pytest.raises(ValueError, match="split into words"):
        tokenizer(["a", "b"], is_split_into_words=True)


def test_columns_of_text_are_lists(tokenizer):
    expected = tokenizer(["a cat", "a dog"])["input_ids"]
    for column in (("a cat", "a dog"), np.array(["a cat", "a dog"]), iter(["a cat", "a dog"])):
        assert tokenizer(column)["input_ids"] == expected


def test_blank_texts_are_start_and_end(tokenizer):
    """F16: empty and blank texts are texts."""
    assert tokenizer(["", "   "])["input_ids"] == [[tokenizer.bos_token_id, tokenizer.eos_token_id]] * 2


def test_without_ftfy_the_rest_of_the_cleaning_stays_with_one_warning(tokenizer, monkeypatch, caplog):
    """F19: the absence of ftfy is told once."""
    monkeypatch.setitem(sys.modules, "ftfy", None)
    tokenization_clip._text_fixer.cache_clear()
    with caplog.at_level(logging.WARNING):
        texts = ["nai\u0308ve  RÉSUMÉ &amp;amp; co", "“quoted”"]
        ids = tokenizer(texts)["input_ids"]
    tokenization_clip._text_fixer.cache_clear()
    monkeypatch.undo()
    assert caplog.text.count("ftfy is not installed") == 1
    assert ids[0] == tokenizer("naïve résumé & co")["input_ids"]
    assert ids[1] != tokenizer("“quoted”")["input_ids"] == tokenizer('"quoted"')["input_ids"]


# Saving


def test_saved_and_reopened_it_is_the_same(tokenizer, tmp_path):
    tokenizer("a cat and a dog", padding="max_length", max_length=5)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "MMClipTokenizer"
    for reopened in (
        MMClipTokenizer.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(tokenizer)),
        copy.deepcopy(tokenizer),
    ):
        assert type(reopened) is MMClipTokenizer
        assert reopened.model_max_length == 32
        assert reopened.get_vocab() == tokenizer.get_vocab()
        assert reopened(PLAIN + CLEANED)["input_ids"] == tokenizer(PLAIN + CLEANED)["input_ids"]
        assert len(reopened("a cat " * 200)["input_ids"]) == 32
        assert reopened.decode(reopened("a cat")["input_ids"], skip_special_tokens=True) == "a cat"


def test_vocabulary_and_merge_files_alone_are_enough(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"vocab.json", "merges.txt"}
    reopened = MMClipTokenizer.from_pretrained(tmp_path)
    assert (
        reopened(PLAIN + CLEANED, truncation=False)["input_ids"]
        == tokenizer(PLAIN + CLEANED, truncation=False)["input_ids"]
    )


def test_the_file_alone_lower_cases_and_splits_for_other_readers(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.encode("A  Photo of a CAT's").ids == tokenizer("A  Photo of a CAT's")["input_ids"]


def test_files_that_transformers_clip_saved_are_read(tokenizer, tmp_path):
    theirs = CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=merges_of(tokenizer), model_max_length=20)
    theirs.save_pretrained(tmp_path)
    ours = MMClipTokenizer.from_pretrained(tmp_path)
    assert ours.model_max_length == 20
    assert ours(PLAIN)["input_ids"] == [
        ids[:19] + [ids[-1]] if len(ids) > 20 else ids for ids in map(OriginalTokenizer(merges_of(tokenizer)), PLAIN)
    ]
