"""What a Q-Former starts from: BERT's weights (Li et al. 2023, section 3.1), a vocabulary of its own, and a tower for pictures
of another size."""

from collections import Counter
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ...nn.patches import to_pair
from ...nn.positions import resize_position_table
from .modeling_qformer import MMBlip2QFormerModel, QFormerLMHead

DEC = "[DEC]"  # begins a text that is to be said
SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "bos_token": DEC,
}
INNER = 0xF0000  # a private plane of Unicode, for characters that begin no word
MAX_ALPHABET = 1000
POSITIONS = (".position_embeddings", ".position_embedding.weight")
ATTENTION = {"q_proj": "self.query", "k_proj": "self.key", "v_proj": "self.value", "out_proj": "output.dense"}


@torch.no_grad()
def init_from_bert(qformer: MMBlip2QFormerModel, lm_head: QFormerLMHead | None, bert: PreTrainedModel) -> None:
    """Starts a Q-Former with text from BERT: embeddings, self-attention and MLPs, those of the queries too.

    Cross-attention, queries, and the words that BERT does not have (``[DEC]``) stay as they are. BERT's embedding of the
    first segment is left out, as in the published training.

    Args:
        qformer: as wide and no deeper than BERT.
        lm_head: takes over the head of masked words, where BERT has one.
        bert: a ``BertModel`` or a model with one, such as ``BertForMaskedLM``.

    Raises:
        ValueError: the two are not of one shape, or the Q-Former has no text.
    """
    source = getattr(bert, "bert", bert)
    _check_bert(qformer, source)
    own, words = qformer.embeddings, source.embeddings
    for name in ("word_embeddings", "position_embeddings"):
        table, given = getattr(own, name).weight, getattr(words, name).weight
        rows = min(table.shape[0], given.shape[0])
        table[:rows] = given[:rows]
    _copy(own.layer_norm, words.LayerNorm)
    for layer, given in zip(qformer.layers, source.encoder.layer, strict=False):
        for name, path in ATTENTION.items():
            _copy(getattr(layer.self_attn, name), given.attention.get_submodule(path))
        _copy(layer.self_attn_layer_norm, given.attention.output.LayerNorm)
        for kind in ("text", "query"):
            mlp = getattr(layer, f"{kind}_mlp")
            _copy(mlp.fc1, given.intermediate.dense)
            _copy(mlp.fc2, given.output.dense)
            _copy(getattr(layer, f"{kind}_layer_norm"), given.output.LayerNorm)
    head = getattr(getattr(bert, "cls", None), "predictions", None)
    if lm_head is not None and head is not None:
        _copy(lm_head.transform, head.transform.dense)
        _copy(lm_head.layer_norm, head.transform.LayerNorm)
        bias = head.bias if hasattr(head, "bias") else head.decoder.bias
        lm_head.decoder.bias[: bias.shape[0]] = bias


@torch.no_grad()
def resize_tower(tower: PreTrainedModel, image_size: int) -> None:
    """Fits a vision tower to pictures of another size, once, as the published fine-tuning does (section 4).

    Raises:
        ValueError: it has no table of positions on a grid that this knows, or its patches do not tile such pictures.
    """
    config = tower.config
    tables = [name for name, _ in tower.named_parameters() if name.endswith(POSITIONS)]
    if len(tables) != 1 or not hasattr(config, "grid_size"):
        raise ValueError(f"{config.model_type} has no table of positions that can be resized: leave image_size out.")
    if any(image_size % side for side in to_pair(config.patch_size)):
        raise ValueError(
            f"image_size ({image_size}) must be a multiple of the tower's patch_size ({config.patch_size})."
        )
    table, before = tower.get_parameter(tables[0]), config.grid_size
    config.image_size = image_size
    rows = table.reshape(-1, table.shape[-1])
    prefix = rows.shape[0] - before[0] * before[1]
    interpolation = getattr(config, "pos_embed_interpolation", "bicubic")
    rows = resize_position_table(rows, before, config.grid_size, interpolation, prefix).clone()
    owner = tower.get_submodule(tables[0].rpartition(".")[0])
    if isinstance(owner, nn.Embedding):
        owner.num_embeddings = rows.shape[0]
    resized = nn.Parameter(rows.view(*table.shape[:-2], *rows.shape), requires_grad=table.requires_grad)
    setattr(owner, tables[0].rpartition(".")[2], resized)


def learn_wordpiece(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer like BERT's, lower-cased, whose pieces of words are learnt from texts; equal texts give an equal one.

    Args:
        texts: the corpus.
        vocab_size: number of ids; fewer come out if no more pieces occur twice.

    Raises:
        ValueError: the characters of the texts and the special tokens leave no room for pieces.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    if not counts:
        raise ValueError("a vocabulary is learnt from texts, but there are none.")
    characters = Counter()
    for word, count in counts.items():
        characters.update(dict.fromkeys(word, count))
    alphabet = sorted(sorted(characters, key=lambda character: (-characters[character], character))[:MAX_ALPHABET])
    inner = {character: chr(INNER + number) for number, character in enumerate(alphabet)}
    pieces = [*SPECIAL_TOKENS.values(), *alphabet, *(f"##{character}" for character in alphabet)]
    if vocab_size < len(pieces):
        raise ValueError(f"vocab_size must be at least {len(pieces)}, all characters of the texts, not {vocab_size}.")
    pieces += _learn_pieces(counts, inner, vocab_size - len(SPECIAL_TOKENS))

    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def _learn_pieces(counts: Counter, inner: dict[str, str], vocab_size: int) -> list[str]:
    """Pieces of more than one character, the most frequent first.

    A character within a word is another symbol than one at its beginning, and the trainer is told of all: its own order
    of symbols, by which it breaks ties, differs from run to run.
    """
    characters = {symbol: character for character, symbol in inner.items()}
    known = [word for word in sorted(counts) if all(character in inner for character in word)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(
        (f"{word[0]}{''.join(inner[character] for character in word[1:])} " * counts[word] for word in known),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=[*inner, *inner.values()],
            show_progress=False,
        ),
    )
    learnt = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    return [
        f"{'##' if piece[0] in characters else ''}{''.join(characters.get(symbol, symbol) for symbol in piece)}"
        for piece, _ in learnt
        if len(piece) > 1
    ]


def _check_bert(qformer: MMBlip2QFormerModel, bert: PreTrainedModel) -> None:
    config, given = qformer.config, bert.config
    if not config.use_text:
        raise ValueError("BERT has words for a Q-Former with text: set use_text.")
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        if getattr(config, name) != getattr(given, name):
            raise ValueError(f"BERT's {name} is {getattr(given, name)}, the Q-Former's {getattr(config, name)}.")
    if config.num_hidden_layers > given.num_hidden_layers:
        raise ValueError(f"BERT has {given.num_hidden_layers} blocks, the Q-Former {config.num_hidden_layers}.")


def _copy(module: nn.Module, given: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(given.get_parameter(name))


__all__ = ["init_from_bert", "learn_wordpiece", "resize_tower"]
