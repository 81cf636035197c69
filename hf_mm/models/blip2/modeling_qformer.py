"""The Q-Former: learned queries that read a picture, beside a text (Li et al. 2023, section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...nn.attention import Attention, CrossAttention
from ...nn.blocks import MLP
from ...nn.pretrained import MMPreTrainedModel
from .configuration_blip2 import MMBlip2QFormerConfig

KeysValues = Sequence[tuple[torch.Tensor, torch.Tensor] | None]
TextMode = Literal["unimodal", "bidirectional", "causal", "fused"]
QUERY, TEXT, CAUSAL_TEXT = range(3)


@dataclass
class MMBlip2QFormerOutput(ModelOutput):
    """What the Q-Former makes of a picture and a text, whichever are given.

    Args:
        last_hidden_state: ``(B, Nq, d)``, the queries; of a text alone ``(B, T, d)``.
        text_hidden_state: ``(B, T, d)``.
        causal_hidden_state: ``(B, T, d)``, the text once more, begun by ``[DEC]`` and read from left to right; of
            ``text_mode="fused"`` alone.
        cache: keys and values of everything that was read.
        hidden_states, attentions: of each block.
        cross_attentions: ``(B, heads, Nq, N)`` of each block whose queries attend to the picture.
    """

    last_hidden_state: torch.Tensor | None = None
    text_hidden_state: torch.Tensor | None = None
    causal_hidden_state: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


class QFormerEmbeddings(nn.Module):
    """Queries, then text; the text's positions count from 0 whatever stands before it."""

    def __init__(self, config: MMBlip2QFormerConfig):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.hidden_size))
        if config.use_text:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, batch_size: int, with_queries: bool, input_ids: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """``(B, S, d)``."""
        rows = [self.query_tokens.expand(batch_size, -1, -1)] if with_queries else []
        if input_ids is not None:
            rows.append(self.word_embeddings(input_ids) + self.position_embeddings(position_ids))
        return self.dropout(self.layer_norm(torch.cat(rows, dim=1)))


class QFormerLayer(GradientCheckpointingLayer):
    """Self-attention of queries and text together, cross-attention of the queries to the picture, and an MLP each.

    Every sublayer is followed by its LayerNorm: LN(x + f(x)).
    """

    def __init__(self, config: MMBlip2QFormerConfig, number: int):
        super().__init__()
        self.number = number
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = None
        if number % config.cross_attention_frequency == 0:
            self.cross_attn = CrossAttention(config, config.encoder_hidden_size)
            self.cross_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query_mlp = MLP(config)
        self.query_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.use_text:
            self.text_mlp = MLP(config)
            self.text_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        num_queries: int,
        attention_mask: torch.Tensor | None,
        picture_keys: torch.Tensor | None,
        picture_values: torch.Tensor | None,
        picture_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """``(B, S, d)`` to ``(B, S, d)``; the first `num_queries` rows are queries."""
        attended, _ = self.self_attn(hidden_states, attention_mask, cache=cache, layer=self.number, **kwargs)
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attended))
        queries, text = hidden_states.tensor_split([num_queries], dim=1)
        if num_queries and self.cross_attn is not None:
            attended, _ = self.cross_attn(queries, (picture_keys, picture_values), picture_mask, **kwargs)
            queries = self.cross_attn_layer_norm(queries + self.dropout(attended))
        if num_queries:
            queries = self.query_layer_norm(queries + self.dropout(self.query_mlp(queries)))
        if text.shape[1]:
            text = self.text_layer_norm(text + self.dropout(self.text_mlp(text)))
        return torch.cat([queries, text], dim=1)


class MMBlip2QFormerModel(MMPreTrainedModel):
    """The Q-Former alone, its queries included."""

    config: MMBlip2QFormerConfig
    base_model_prefix = "qformer"
    main_input_name = "encoder_hidden_states"
    input_modalities = ("image", "text")
    _no_split_modules = ["QFormerEmbeddings", "QFormerLayer"]
    _skip_keys_device_placement = ["cache"]
    _input_embed_layer = "word_embeddings"
    _can_record_outputs = {
        "hidden_states": QFormerLayer,
        "attentions": Attention,
        "cross_attentions": CrossAttention,
    }

    def __init__(self, config: MMBlip2QFormerConfig):
        super().__init__(config)
        self.embeddings = QFormerEmbeddings(config)
        self.layers = nn.ModuleList(QFormerLayer(config, number) for number in range(config.num_hidden_layers))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, QFormerEmbeddings):
            init.normal_(module.query_tokens, std=self.config.initializer_range)
        if isinstance(module, QFormerLayer) and self.config.use_text:
            for name, parameter in module.text_mlp.named_parameters():
                init.copy_(module.query_mlp.get_parameter(name), parameter)

    def get_input_embeddings(self) -> nn.Module | None:
        return self.embeddings.word_embeddings if self.config.use_text else None

    def set_input_embeddings(self, value: nn.Module):
        self.embeddings.word_embeddings = value

    def picture_keys_values(
        self, encoder_hidden_states: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        """Keys and values of pictures ``(B, N, E)`` in every block, None in those that do not look at pictures.

        `forward` takes them in place of `encoder_hidden_states`, as often as a picture is read.
        """
        if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[-1] != self.config.encoder_hidden_size:
            raise ValueError(
                f"picture features must be (pictures, tokens, {self.config.encoder_hidden_size}), not "
                f"{tuple(encoder_hidden_states.shape)}: take them from the vision tower that this Q-Former was made for."
            )
        source = encoder_hidden_states.to(self.dtype)
        return [layer.cross_attn and layer.cross_attn.keys_values(source) for layer in self.layers]

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        encoder_hidden_states: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        text_mode: TextMode = "bidirectional",
        encoder_attention_mask: torch.Tensor | None = None,
        picture_keys_values: KeysValues | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MMBlip2QFormerOutput:
        """Reads pictures, texts, or both together (section 3.2, figure 2).

        Args:
            encoder_hidden_states: ``(B, N, encoder_hidden_size)``, the pictures. Without them there are no queries.
            input_ids: ``(B, T)``, the texts, begun by ``[CLS]``.
            attention_mask: ``(B, T)``, 1 for tokens; of texts after a cache that holds texts, for all of these.
            text_mode: which of queries and text see which.
                ``unimodal``: each themselves. ``bidirectional``: both both. ``causal``: the queries themselves, the text
                the queries and what it has said. ``fused``: ``unimodal`` and ``causal`` in one pass, the second over a
                copy of the text that begins with ``[DEC]``.
            encoder_attention_mask: ``(B, N)``, 1 for the picture's tokens; by default all are.
            picture_keys_values: what `picture_keys_values()` gives, in place of `encoder_hidden_states`.
            cache: filled by this pass; one that is filled already holds the queries and the text before `input_ids`.

        Raises:
            ValueError: nothing is given, pictures in two ways, text to a Q-Former without text, a text longer than
                `max_position_embeddings`, features of another width, or a cache of what cannot go on word by word.
        """
        config = self.config
        if encoder_hidden_states is not None:
            if picture_keys_values is not None:
                raise ValueError("give either encoder_hidden_states or picture_keys_values, not both.")
            picture_keys_values = self.picture_keys_values(encoder_hidden_states)
        with_queries = picture_keys_values is not None
        past = cache.get_seq_length() if cache is not None else 0
        if cache is not None:
            _check_cache(past, with_queries, text_mode)
        self._check(picture_keys_values, input_ids, attention_mask, text_mode, past)
        position_ids = text_mask = None
        if input_ids is not None:
            position_ids, text_mask = self._text_positions(input_ids, attention_mask, past)
            if text_mode == "fused":
                input_ids = torch.cat([input_ids, self.begun_by_dec(input_ids, attention_mask)], dim=1)
                position_ids, text_mask = (torch.cat([whole, whole], dim=1) for whole in (position_ids, text_mask))

        batch_size = input_ids.shape[0] if input_ids is not None else number_of_pictures(picture_keys_values)
        hidden_states = self.embeddings(batch_size, with_queries, input_ids, position_ids)
        num_queries = config.num_query_tokens if with_queries else 0
        mask = self._mask(hidden_states, num_queries, text_mask, text_mode, past)
        picture_mask = self._picture_mask(hidden_states[:, :num_queries], picture_keys_values, encoder_attention_mask)
        picture_keys_values = picture_keys_values if with_queries else [None] * config.num_hidden_layers
        for layer, keys_values in zip(self.layers, picture_keys_values, strict=True):
            keys, values = keys_values or (None, None)
            hidden_states = layer(hidden_states, num_queries, mask, keys, values, picture_mask, cache=cache, **kwargs)

        queries, text = hidden_states.tensor_split([num_queries], dim=1)
        text, causal_text = text.chunk(2, dim=1) if text_mode == "fused" and input_ids is not None else (text, None)
        has_text = input_ids is not None
        return MMBlip2QFormerOutput(
            last_hidden_state=queries if with_queries else text,
            text_hidden_state=text if has_text else None,
            causal_hidden_state=causal_text,
            cache=cache,
        )

    def begun_by_dec(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The texts with ``[DEC]`` in place of their first token."""
        first = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        return torch.where((first.cumsum(dim=1) == 1) & (first == 1), self.config.bos_token_id, input_ids)

    def _check(
        self,
        picture_keys_values: KeysValues | None,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        text_mode: TextMode,
        past: int,
    ) -> None:
        if input_ids is None:
            if picture_keys_values is None:
                raise ValueError("the Q-Former needs pictures (encoder_hidden_states), a text (input_ids) or both.")
            return
        config = self.config
        if not config.use_text:
            raise ValueError(
                "this Q-Former has no text (use_text is False): leave input_ids out, or use one that has."
            )
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must be (texts, tokens), but its shape is {tuple(input_ids.shape)}.")
        if attention_mask is not None and not past and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, not "
                f"{tuple(attention_mask.shape)}."
            )
        if attention_mask is not None and past:
            seen = past - config.num_query_tokens + input_ids.shape[1]
            if attention_mask.shape[1] != seen:
                raise ValueError(
                    f"attention_mask must cover the {seen} tokens of the text so far, not {attention_mask.shape[1]}."
                )
        if picture_keys_values is not None:
            pictures = number_of_pictures(picture_keys_values)
            if pictures != input_ids.shape[0]:
                raise ValueError(f"there are {pictures} pictures for {input_ids.shape[0]} texts: give one each.")
        if text_mode not in get_args(TextMode):
            raise ValueError(f"text_mode {text_mode!r} is not one of {', '.join(get_args(TextMode))}.")
        if torch.compiler.is_compiling():
            return
        lowest, highest = torch.stack(input_ids.aminmax()).tolist()
        if lowest < 0 or highest >= config.vocab_size:
            raise ValueError(
                f"input_ids holds id {lowest if lowest < 0 else highest}, but the size of the vocabulary is "
                f"{config.vocab_size}: prepare the text with the Q-Former's own tokenizer."
            )

    def _text_positions(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, past: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions ``(B, T)`` of the new tokens, padding passed over, and the mask of all text, ``(B, T_past + T)``."""
        config, length = self.config, input_ids.shape[1]
        if attention_mask is None:
            past_text = max(past - config.num_query_tokens, 0)
            attention_mask = input_ids.new_ones(input_ids.shape[0], past_text + length)
        positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        limit = config.max_position_embeddings
        may_exceed = attention_mask.shape[1] > limit and not torch.compiler.is_compiling()
        if may_exceed and (longest := int(positions.max()) + 1) > limit:
            raise ValueError(
                f"a text has {longest} tokens, but the Q-Former has {limit} positions: shorten it (truncation=True)."
            )
        return positions[:, -length:], attention_mask

    def _mask(
        self,
        hidden_states: torch.Tensor,
        num_queries: int,
        text_mask: torch.Tensor | None,
        text_mode: TextMode,
        past: int,
    ) -> torch.Tensor | None:
        """Who sees whom, in the form that the attention kernel takes."""
        if past:
            columns = nn.functional.pad(text_mask, (self.config.num_query_tokens, 0), value=1)
            seen = hidden_states.new_empty(hidden_states.shape[0], columns.shape[1], 0)
            follows = {} if hidden_states.shape[1] == 1 else {"and_mask_function": lambda b, h, q, kv: kv <= past + q}
            return create_bidirectional_mask(
                self.config, hidden_states, columns, encoder_hidden_states=seen, **follows
            )
        if text_mask is None:
            return None
        columns = nn.functional.pad(text_mask, (num_queries, 0), value=1)
        if text_mode == "bidirectional" or (not num_queries and text_mode == "unimodal"):
            return create_bidirectional_mask(self.config, hidden_states, columns)
        length, device = text_mask.shape[1], hidden_states.device
        kinds = {"unimodal": [TEXT], "causal": [CAUSAL_TEXT], "fused": [TEXT, CAUSAL_TEXT]}[text_mode]
        length = length // len(kinds)
        kind = torch.tensor([QUERY] * num_queries + [k for k in kinds for _ in range(length)], device=device)
        place = torch.arange(kind.shape[0], device=device)

        def sees(batch, head, row, column):
            same = (kind[row] == kind[column]) & ((kind[row] != CAUSAL_TEXT) | (place[column] <= place[row]))
            return same | ((kind[row] == CAUSAL_TEXT) & (kind[column] == QUERY))

        return create_bidirectional_mask(self.config, hidden_states, columns, and_mask_function=sees)

    def _picture_mask(
        self, queries: torch.Tensor, keys_values: KeysValues | None, encoder_attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        if keys_values is None or encoder_attention_mask is None:
            return None
        keys, _ = keys_values[0]
        return create_bidirectional_mask(self.config, queries, encoder_attention_mask, encoder_hidden_states=keys)


def number_of_pictures(keys_values: KeysValues) -> int:
    """B of what `picture_keys_values()` gives: the first block looks at pictures, whichever others do."""
    keys, _ = keys_values[0]
    return keys.shape[0]


def _check_cache(past: int, with_queries: bool, text_mode: TextMode) -> None:
    if text_mode != "causal":
        raise ValueError(f"a text that is read in text_mode {text_mode!r} cannot go on word by word: take 'causal'.")
    if past and with_queries:
        raise ValueError("the cache holds the picture already: leave pictures out.")
    if not past and not with_queries:
        raise ValueError("a cache begins with a picture: give one with the first words.")


class QFormerLMHead(nn.Module):
    """BERT's head: a word's place in the text to scores of the vocabulary, ``(..., d)`` to ``(..., V)``."""

    def __init__(self, config: MMBlip2QFormerConfig):
        super().__init__()
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        for layer in (self.transform, self.decoder):
            init.normal_(layer.weight, std=std)
            init.zeros_(layer.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.layer_norm(self.activation(self.transform(hidden_states))))


__all__ = ["MMBlip2QFormerModel"]
