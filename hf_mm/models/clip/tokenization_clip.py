"""Tokenizer of CLIP: cleaned, lower-cased text to byte-level BPE."""

import functools
import gzip
import html
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers.tokenization_utils_base import BatchEncoding
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import logging

logger = logging.get_logger(__name__)

START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"
PUBLISHED_MERGES = 48_894
PLAIN = re.compile(r"[ -%'-~\t\n\r]*")  # nothing to mend: printable ASCII without "&"
SPLIT = r"(?i:<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class MMClipTokenizer(TokenizersBackend):
    """CLIP's tokenizer: cleans the text, splits it into byte-level BPE tokens, and adds the start and end token.

    The text is mended with `ftfy`, HTML entities are resolved, white space is collapsed, and the case is lowered, in
    every way of calling. By default a text is cut to `model_max_length` tokens, the end token last, with one warning.
    Batches are padded on the right with the end token, which the text tower never looks beyond.

    Args:
        vocab: tokens to ids in CLIP's order (see `clip_vocabulary`), or the path of a `vocab.json`.
        merges: pairs of symbols, best first, or the path of a `merges.txt`.
        model_max_length: context length of the text tower, start and end token included.
        **kwargs: the other options of transformers' tokenizers.

    Source:
        Radford et al. 2021, section 2.4 and the published code.
    """

    vocab_files_names = {"vocab_file": "vocab.json", "merges_file": "merges.txt", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    model = BPE

    def __init__(
        self,
        vocab: dict[str, int] | str,
        merges: list[tuple[str, str]] | str,
        model_max_length: int = 77,
        **kwargs,
    ):
        if isinstance(vocab, str):
            vocab, merges = BPE.read_file(vocab, merges)
        _check_vocabulary(vocab)
        self._tokenizer = _bpe_tokenizer(vocab, merges)
        for state in ("_json_truncation", "_json_padding", "tokenizer_truncation", "tokenizer_padding"):
            kwargs.pop(state, None)  # left by the call before saving, not a setting
        specials = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
        super().__init__(model_max_length=model_max_length, **{**specials, **kwargs})
        if str(self.pad_token) != str(self.eos_token):
            raise ValueError(
                f"CLIP pads with its end token {self.eos_token!r}; pad_token={self.pad_token!r} is refused."
            )
        self._refuse_left_padding(None)
        self._tokenizer.post_processor = processors.RobertaProcessing(
            (self.eos_token, self.eos_token_id), (self.bos_token, self.bos_token_id), False, False
        )

    @classmethod
    def from_bpe_file(
        cls, path: str | Path, num_merges: int = PUBLISHED_MERGES, model_max_length: int = 77
    ) -> "MMClipTokenizer":
        """Builds the tokenizer from the published `bpe_simple_vocab_16e6.txt.gz`.

        Args:
            path: the file, gzipped or plain: a header line, then one merge a line.
            num_merges: how many merges to take; the published models take 48,894 of the 262 thousand.
            model_max_length: context length of the text tower.

        Returns:
            A tokenizer of `512 + num_merges + 2` ids.

        Raises:
            ValueError: If the file is damaged or holds fewer merges.
        """
        path = Path(path)
        raw = path.read_bytes()
        try:
            lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8").split("\n")
            merges = [tuple(line.split()) for line in lines[1 : num_merges + 1] if line]
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a readable merge file: {error}") from error
        if len(merges) < num_merges or any(len(merge) != 2 for merge in merges):
            raise ValueError(f"{path} does not hold {num_merges} merges: it is truncated or another file.")
        return cls(clip_vocabulary(merges), merges, model_max_length=model_max_length)

    @classmethod
    def train_from_iterator(
        cls, texts: Iterable[str] | Iterable[list[str]], vocab_size: int, model_max_length: int = 77
    ) -> "MMClipTokenizer":
        """Learns the merges from texts; equal texts give an equal tokenizer.

        Args:
            texts: the corpus, text by text or in lists.
            vocab_size: number of ids, at least 514; fewer come out if no more pairs occur twice.
            model_max_length: context length of the text tower.

        Returns:
            A tokenizer whose vocabulary is in CLIP's order and covers every string.
        """
        alphabet = _byte_symbols()
        if vocab_size < 2 * len(alphabet) + 2:
            raise ValueError(
                f"vocab_size={vocab_size} is too small: 512 byte symbols and 2 special tokens come first."
            )
        # While training, the last symbol of a word is one character too, so that the trainer knows all 512 beforehand.
        word_final = {symbol: chr(0xE000 + ord(symbol)) for symbol in alphabet}
        learner = Tokenizer(BPE())
        learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        learner.train_from_iterator(
            (" ".join(word[:-1] + word_final[word[-1]] for word in words) for words in _words(texts)),
            BpeTrainer(
                vocab_size=vocab_size - 2,
                min_frequency=2,
                initial_alphabet=[*alphabet, *word_final.values()],
                show_progress=False,
            ),
        )
        published = str.maketrans({final: symbol + WORD_END for symbol, final in word_final.items()})
        learned = json.loads(learner.to_str())["model"]["merges"]
        merges = [(left.translate(published), right.translate(published)) for left, right in learned]
        return cls(clip_vocabulary(merges), merges, model_max_length=model_max_length)

    def train_new_from_iterator(
        self, text_iterator: Iterable[str] | Iterable[list[str]], vocab_size: int, **kwargs
    ) -> "MMClipTokenizer":
        """Learns a new tokenizer of the same kind and context length, see `train_from_iterator`."""
        return self.train_from_iterator(text_iterator, vocab_size, self.model_max_length)

    def pad(self, encoded_inputs: Any, *args, padding_side: str | None = None, **kwargs) -> BatchEncoding:
        self._refuse_left_padding(padding_side)
        return super().pad(encoded_inputs, *args, padding_side=padding_side, **kwargs)

    def _get_padding_truncation_strategies(self, padding: Any = False, truncation: Any = None, **kwargs) -> tuple:
        truncation = True if truncation is None else truncation
        return super()._get_padding_truncation_strategies(padding=padding, truncation=truncation, **kwargs)

    def _encode_plus(
        self,
        text: Any,
        text_pair: Any = None,
        is_split_into_words: bool = False,
        padding_side: str | None = None,
        **kwargs,
    ) -> BatchEncoding:
        if text_pair is not None or is_split_into_words:
            raise ValueError(
                "CLIP reads one whole text a row: text pairs and texts already split into words are refused."
            )
        self._refuse_left_padding(padding_side)
        texts = check_texts(text)
        cleaned = clean_text(texts) if isinstance(texts, str) else [clean_text(row) for row in texts]
        encoded = super()._encode_plus(text=cleaned, padding_side=padding_side, **kwargs)
        if any(encoding.overflowing for encoding in encoded.encodings):
            logger.warning_once("Texts longer than the context were cut, the end token kept.")
        return encoded

    def _refuse_left_padding(self, padding_side: str | None) -> None:
        if (padding_side or self.padding_side) != "right":
            raise ValueError("CLIP pads on the right only: on the left, padding would shift every position.")


def clip_vocabulary(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Numbers the tokens in CLIP's order: 256 bytes, the same at a word's end, the merges, start and end of text.

    Args:
        merges: pairs of symbols, best first.

    Returns:
        Tokens to ids.
    """
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + WORD_END for symbol in symbols), *map("".join, merges), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def clean_text(text: str) -> str:
    """Mends, unescapes, collapses white space and lowers the case, as CLIP's training texts were cleaned."""
    if not PLAIN.fullmatch(text):
        text = html.unescape(html.unescape(_text_fixer()(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


def check_texts(text: Any) -> str | list[str]:
    """Passes one string, or any iterable of strings as a list.

    Raises:
        ValueError: If it is empty, or a row is missing or no string; the row is named.
    """
    if isinstance(text, str):
        return text
    if not isinstance(text, Iterable):
        raise ValueError(f"A text must be a string or a list of strings, not {text!r:.80}.")
    rows = list(text)
    if not rows:
        raise ValueError("The list of texts is empty.")
    for index, row in enumerate(rows):
        if not isinstance(row, str):
            raise ValueError(
                f"Text {index} is {row!r:.80}, not a string: fill the missing text in or leave its row out."
            )
    return rows


@functools.cache
def _text_fixer() -> Callable[[str], str]:
    try:
        from ftfy import fix_text
    except ImportError:
        logger.warning(
            "ftfy is not installed: curly quotes, full-width letters and broken encodings stay as they are, which the "
            "published CLIP models never saw. `pip install ftfy` mends it."
        )
        return functools.partial(unicodedata.normalize, "NFC")
    return fix_text


def _words(texts: Iterable[str] | Iterable[list[str]]) -> Iterator[list[str]]:
    """Splits each text of a corpus into words of byte symbols."""
    split = _bpe_tokenizer(clip_vocabulary([]), []).pre_tokenizer.pre_tokenize_str
    for entry in texts:
        rows = check_texts(entry)
        for text in [rows] if isinstance(rows, str) else rows:
            yield [word for word, _ in split(clean_text(text))]


def _byte_symbols() -> list[str]:
    """The 256 printable characters that stand for the bytes, in CLIP's order."""
    return [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)]), *map(chr, range(256, 324))]


def _check_vocabulary(vocab: dict[str, int]) -> None:
    missing = [symbol for symbol in clip_vocabulary([]) if symbol not in vocab]
    if missing:
        raise ValueError(
            f"The vocabulary lacks {len(missing)} of CLIP's byte symbols and special tokens, {missing[0]!r} first."
        )


def _bpe_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(BPE(vocab, merges, end_of_word_suffix=WORD_END))
    # What clean_text does, as far as possible, for readers of tokenizer.json that do not know this class.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(WORD_END, "Ġ"), decoders.ByteLevel(), decoders.Strip(" ", 0, 1)]
    )
    return tokenizer
