"""Any causal or encoder-decoder language model as a part of a composite: how soft tokens enter it, and how it is trained
and generates from them.

Functions over the whole language model, which is called as it is: what it does to its logits (scaling, soft-capping) is
kept, and a composite's state dict keeps the names that the language model has alone.
"""

from __future__ import annotations

import copy
import inspect

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.utils import ModelOutput

IGNORED = -100
"""The label of a position at which nothing is to be predicted."""
FEWEST_SPARED = 48
"""The fewest places, over all rows, that reading once what they begin with must spare, or the pass does not pay."""


def language_model_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """A new language model.

    Raises:
        ValueError: `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`, of which `is_encoder_decoder` decides, opens no such
            config, or what it opens cannot generate from embeddings.
    """
    return _reading_embeddings(_auto_class(config).from_config(config))


def open_language_model(name_or_path: str, **kwargs) -> PreTrainedModel:
    """A saved language model.

    Args:
        name_or_path: folder or Hub id.
        **kwargs: of ``from_pretrained``, such as `revision`, `dtype` or `quantization_config`.

    Raises:
        ValueError: what was saved is no language model, or cannot generate from embeddings.
    """
    whence = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "trust_remote_code", "code_revision")
    config = AutoConfig.from_pretrained(name_or_path, **{name: kwargs[name] for name in whence if name in kwargs})
    return _reading_embeddings(_auto_class(config).from_pretrained(name_or_path, **kwargs))


def generating_language_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model that was handed over, if it is one that generates from embeddings.

    Raises:
        ValueError: it is not.
    """
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} does not generate text: give a causal or encoder-decoder language model with its head."
        )
    return _reading_embeddings(model)


def embedding_width(lm: PreTrainedModel) -> int:
    """D of the input embeddings, which OPT-350M, for one, has narrower than its layers."""
    return _embedding_layer(lm).embedding_dim


@torch.no_grad()
def embedding_rms(lm: PreTrainedModel, chunk_size: int = 8192) -> float:
    """Root mean square over all entries of the input embeddings as the language model gets them, scaling included; rows
    of zeros, which stand for padding and unused ids, are left out."""
    layer = _embedding_layer(lm)
    device = "cpu" if layer.weight.is_meta else layer.weight.device  # meta: off-loaded, and brought back by the call
    total, count = 0.0, 0
    for ids in torch.arange(layer.num_embeddings, device=device).split(chunk_size):
        rows = embed_tokens(lm, ids[None]).cpu().double().square().mean(-1)
        total, count = total + rows.sum().item(), count + rows.count_nonzero().item()
    return (total / max(count, 1)) ** 0.5


def embed_tokens(lm: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """``(B, T) -> (B, T, D)``: what the language model reads where it is given `input_ids`."""
    return lm.get_input_embeddings()(input_ids) * _scale_outside(lm)


def embed_with_slots(
    lm: PreTrainedModel, input_ids: torch.Tensor, slots: torch.Tensor, soft_tokens: torch.Tensor
) -> torch.Tensor:
    """The embeddings of a text some of whose places are taken by soft tokens.

    Args:
        input_ids: ``(B, T)``; what stands at a slot is never looked up.
        slots: ``(B, T)`` boolean.
        soft_tokens: ``(M, Nq, D)``, which fill the slots in reading order.

    Returns:
        ``(B, T, D)`` in the dtype of the language model.

    Raises:
        ValueError: an id of the text is not in the vocabulary, or the slots are not M * Nq. A compiled graph does not look
            at the first, and raises `RuntimeError` at the second.
    """
    _check_slots(lm, input_ids, slots, soft_tokens)
    embeds = embed_tokens(lm, input_ids.masked_fill(slots, 0))
    return embeds.masked_scatter(slots[..., None].to(embeds.device), soft_tokens.to(embeds))


def read_embeds(
    lm: PreTrainedModel, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **lm_kwargs
) -> ModelOutput:
    """What a language model gives of embeddings ``(B, T, D)``, padding ``(B, T)`` on either side.

    Places are counted from the first that is no padding, as ``generate`` counts them. With a `cache`, the embeddings are
    the last places of `attention_mask`.

    Raises:
        ValueError: padding on the left of an encoder that counts its places by itself, as BART's; more places than the
            language model has learnt.
    """
    _check_side(lm, attention_mask)
    _check_places(_reader(lm), inputs_embeds, attention_mask)
    if (said := lm_kwargs.get("decoder_input_ids")) is not None:
        _check_places(lm.get_decoder(), said)
    if attention_mask is not None and not lm.config.is_encoder_decoder and _takes_positions(lm):
        lm_kwargs.setdefault("position_ids", _positions(attention_mask)[:, -inputs_embeds.shape[1] :])
    return lm(inputs_embeds=inputs_embeds, attention_mask=attention_mask, return_dict=True, **lm_kwargs)


def decoder_input_ids_of(lm: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """``(B, T')``: what a decoder reads to predict `labels`."""
    if hasattr(lm, "prepare_decoder_input_ids_from_labels"):
        return lm.prepare_decoder_input_ids_from_labels(labels=labels)
    moved = F.pad(labels[:, :-1], (1, 0), value=lm.config.decoder_start_token_id)
    return moved.masked_fill(moved == IGNORED, lm.config.pad_token_id)


def check_labels(lm: PreTrainedModel, labels: torch.Tensor, rows: int) -> None:
    """Refuses labels that are not (rows, T) ids of the vocabulary or `IGNORED`. Ids are not looked at in a compiled graph.

    Raises:
        ValueError: as said.
    """
    if labels.ndim != 2 or labels.shape[0] != rows:
        raise ValueError(f"labels must be (texts, tokens) for {rows} texts, but their shape is {tuple(labels.shape)}.")
    if torch.compiler.is_compiling():
        return
    head = lm.get_output_embeddings()
    size = getattr(head, "out_features", None) or _embedding_layer(lm).num_embeddings
    outside = (labels != IGNORED) & ((labels < 0) | (labels >= size))
    if outside.any():
        raise ValueError(
            f"label {int(labels[outside][0])} is not in the language model's vocabulary, which has {size}: put {IGNORED} "
            "where nothing is to be learnt, as at pictures and padding."
        )


def label_logits(
    lm: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    shared: int = 0,
    one_picture: bool = False,
    **lm_kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits where a label is to be predicted, and these labels.

    A decoder-only language model predicts each label from the place before it; one at the first place cannot be predicted
    and is left out, and the last place, from which nothing is predicted, is not read. An encoder-decoder reads
    `inputs_embeds` in its encoder and predicts every label; its decoder reads the labels moved on by one.

    The product with the vocabulary is computed at these places alone where the language model takes `logits_to_keep`, as
    nearly all decoder-only ones do and few encoder-decoders.

    Args:
        inputs_embeds: ``(B, T, D)``.
        attention_mask: ``(B, T)``, 0 at padding, which may stand on either side.
        labels: ``(B, T)`` beside `inputs_embeds`, or ``(B, T')`` of the decoder; -100 where there is none.
        shared: places at which all rows begin alike, see `shared_start`.
        one_picture: whether a picture is among them, see `read_once`.
        **lm_kwargs: of the language model's ``forward``, whole where they are ``(B, T)`` beside `inputs_embeds`.

    Returns:
        logits ``(n, V)`` and targets ``(n,)`` of the n labels, in reading order. In a compiled graph, whose shapes may not
        depend on values, those of all places: targets are then -100 where there is no label, as `label_loss` expects.
    """
    if lm.config.is_encoder_decoder:
        targets = labels
        if "decoder_input_ids" not in lm_kwargs and "decoder_inputs_embeds" not in lm_kwargs:
            lm_kwargs["decoder_input_ids"] = decoder_input_ids_of(lm, labels)
    else:
        inputs_embeds, targets = inputs_embeds[:, :-1], labels[:, 1:]
        attention_mask = None if attention_mask is None else attention_mask[:, :-1]
        beside = {
            name: given[:, :-1]
            for name, given in lm_kwargs.items()
            if isinstance(given, torch.Tensor) and given.ndim == 2 and given.shape[1] == labels.shape[1]
        }
        inputs_embeds, begun = read_once(lm, inputs_embeds, 0 if beside else shared, one_picture)
        targets = targets[:, -inputs_embeds.shape[1] :]
        lm_kwargs |= beside | begun
    labelled = targets != IGNORED
    static = torch.compiler.is_compiling()
    selects = not static and _selects_places(lm)
    if selects:
        lm_kwargs["logits_to_keep"] = labelled
    logits = read_embeds(lm, inputs_embeds, attention_mask, **{"use_cache": False, **lm_kwargs}).logits
    if static:
        return logits.flatten(0, 1), targets.flatten()
    return logits if selects else logits[labelled.to(logits.device)], targets[labelled]


def shared_start(
    lm: PreTrainedModel,
    input_ids: torch.Tensor,
    slots: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    one_picture: bool = False,
) -> int:
    """How many places a frozen decoder-only language model can read once for all rows, because they begin with the same
    words, such as an instruction or examples before the picture, or with the same picture too.

    0 where that spares fewer than `FEWEST_SPARED`, so that a pass of its own would not pay; where the language model
    trains, as one with adapters does; where its blocks are computed again in backward, for they then forget what was read;
    in a compiled graph.

    Args:
        input_ids, slots, attention_mask, labels: ``(B, T)``.
        one_picture: whether all slots hold the same picture, which then is read with the words.
    """
    if torch.compiler.is_compiling() or lm.config.is_encoder_decoder:
        return 0
    if lm.training or any(parameter.requires_grad for parameter in lm.parameters()):
        return 0
    if torch.is_grad_enabled() and any(getattr(module, "gradient_checkpointing", False) for module in lm.modules()):
        return 0
    alike = (input_ids == input_ids[:1]) & attention_mask.bool()
    if not one_picture:
        alike &= ~slots
    alike[:, :-1] &= labels[:, 1:] == IGNORED
    alike[:, -2:] = False  # one place is left to read where nothing is learnt
    count = int(alike.all(dim=0).long().cumprod(dim=0).sum())
    return count if count * (len(input_ids) - 1) >= FEWEST_SPARED else 0


def label_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of what `label_logits` gives, in float32 at least.

    Args:
        logits: ``(n, V)``.
        targets: ``(n,)``; -100 is left out.
        num_items_in_batch: what the sum is divided by, as under gradient accumulation; by default the number of labels.
        label_smoothing: share of the target's probability that is spread over the vocabulary.

    Returns:
        A scalar; 0, from which gradients of 0 flow, where there is no label.
    """
    targets = targets.to(logits.device)
    total = F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        targets,
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORED).sum().clamp(min=1)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def generate_from_embeds(
    lm: PreTrainedModel, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **generate_kwargs
) -> torch.Tensor:
    """What ``lm.generate`` writes after embeddings. Rows that end early are filled up with the end token where neither
    the call nor the language model has an id for padding.

    Args:
        inputs_embeds: ``(B, T, D)``; of decoder-only language models padded on the left.
        attention_mask: ``(B, T)``, 0 at padding.
        **generate_kwargs: of ``lm.generate``. `pad_token_id` should be the tokenizer's.

    Returns:
        As ``lm.generate``: of decoder-only language models the new ids alone, of encoder-decoders ``[start][new]``.

    Raises:
        ValueError: padding on the right of a decoder-only language model, or on the left of an encoder that counts its
            places by itself; more places than the language model has learnt.
    """
    _check_side(lm, attention_mask, generates=True)
    changed = {}
    given = generate_kwargs.pop("generation_config", None)
    if _generation_field("guidance_scale", generate_kwargs, given, lm) not in (None, 1.0):
        raise ValueError("guidance_scale needs a second text without pictures, which is not supported: leave it out.")
    _check_places(_reader(lm), inputs_embeds, attention_mask)
    names = ("pad_token_id", "eos_token_id", "repetition_penalty")
    pad, eos, penalty = (_generation_field(name, generate_kwargs, given, lm) for name in names)
    if pad is None and eos is not None:
        changed["pad_token_id"] = eos[0] if isinstance(eos, (list, tuple)) else eos
    if not lm.config.is_encoder_decoder and penalty not in (None, 1.0):
        # The one that generate makes passes over as many new ids of a row as it has padding.
        changed["repetition_penalty"] = 1.0
        processors = [*(generate_kwargs.get("logits_processor") or ()), RepetitionPenaltyLogitsProcessor(penalty)]
        generate_kwargs["logits_processor"] = LogitsProcessorList(processors)
    if given is None:
        generate_kwargs.update(changed)
    else:
        generate_kwargs["generation_config"] = copy.deepcopy(given)
        generate_kwargs["generation_config"].update(**changed)
        generate_kwargs = {name: value for name, value in generate_kwargs.items() if name not in changed}
    return lm.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **generate_kwargs)


def takes(lm: PreTrainedModel, name: str) -> bool:
    """Whether a language model's ``forward`` has an argument of this name."""
    return name in _arguments(_unadapted(lm).forward)


def has_rows(cache: Cache | None) -> bool:
    """Whether a cache is one of keys and values, whose rows can be chosen and repeated; the states of Mamba cannot."""
    return type(cache) is DynamicCache and all(hasattr(layer, "batch_select_indices") for layer in cache.layers)


def is_expanded(tensor: torch.Tensor | None) -> bool:
    """Whether a batch is one row, expanded (`torch.Tensor.expand`), so that what is computed of it can be, too."""
    return tensor is not None and len(tensor) > 1 and tensor.stride(0) == 0 and not torch.compiler.is_compiling()


def read_once(
    lm: PreTrainedModel, inputs_embeds: torch.Tensor, shared: int, one_picture: bool = False
) -> tuple[torch.Tensor, dict]:
    """Reads what all rows begin with, once.

    Args:
        inputs_embeds: ``(B, T, D)``.
        shared: places at which all rows begin alike, see `shared_start`.
        one_picture: whether a picture is among them, which gets gradients; words alone get none.

    Returns:
        The embeddings that are left, and by which arguments `read_embeds` goes on to them; all embeddings and none where
        nothing is shared, or the language model keeps something else than keys and values.
    """
    if not shared:
        return inputs_embeds, {}
    start = inputs_embeds[:1, :shared]
    last = {"logits_to_keep": 1} if takes(lm, "logits_to_keep") else {}
    start = start if one_picture else start.detach()
    kept = lm(inputs_embeds=start, use_cache=True, return_dict=True, **last).get("cache")
    if not has_rows(kept):
        return inputs_embeds, {}
    kept.batch_repeat_interleave(len(inputs_embeds))
    return inputs_embeds[:, shared:], {"cache": kept, "use_cache": True}


def _auto_class(config: PreTrainedConfig) -> type:
    auto_class, known = AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder:
        auto_class, known = AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    if type(config) not in known and auto_class.__name__ not in (getattr(config, "auto_map", None) or {}):
        raise ValueError(
            f"{config.model_type} is no language model that {auto_class.__name__} opens: give the config of one that is."
        )
    return auto_class


def _reading_embeddings(lm: PreTrainedModel) -> PreTrainedModel:
    """The language model, if it generates from embeddings."""
    if not lm.config.is_encoder_decoder and "inputs_embeds" not in _arguments(lm.prepare_inputs_for_generation):
        raise ValueError(
            f"{lm.config.model_type} cannot generate from embeddings, as soft tokens are: take another language model."
        )
    return lm


def _embedding_layer(lm: PreTrainedModel) -> nn.Embedding:
    """The embedding itself, within what adapts it."""
    return next(module for module in lm.get_input_embeddings().modules() if isinstance(module, nn.Embedding))


def _scale_outside(lm: PreTrainedModel) -> float:
    """By what an encoder multiplies the embeddings of ids, but not embeddings that it is given: Marian, Pegasus and MVP,
    for instance. Others do it in the embedding module, or to both."""
    if not lm.config.is_encoder_decoder or hasattr(_embedding_layer(lm), "embed_scale"):
        return 1.0
    return getattr(lm.get_encoder(), "embed_scale", 1.0)


def _check_slots(lm: PreTrainedModel, input_ids: torch.Tensor, slots: torch.Tensor, soft_tokens: torch.Tensor) -> None:
    count, size = soft_tokens.shape[0] * soft_tokens.shape[1], _embedding_layer(lm).num_embeddings
    if torch.compiler.is_compiling():
        torch._assert_async(slots.sum() == count, "the text has not as many slots as there are soft tokens.")
        return
    if (found := int(slots.sum())) != count:
        raise ValueError(f"the text has {found} slots for {count} soft tokens: give as many of both.")
    outside = ~slots & ((input_ids < 0) | (input_ids >= size))
    if outside.any():
        raise ValueError(
            f"id {int(input_ids[outside][0])} of the text is not in the language model's vocabulary, which has {size}: "
            "prepare the text with its own tokenizer."
        )


def _reader(lm: PreTrainedModel) -> nn.Module:
    """What reads embeddings: the whole of a decoder-only language model, or an encoder."""
    return lm.get_encoder() if lm.config.is_encoder_decoder else lm


def _check_places(reader: nn.Module, given: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
    """Refuses texts ``(B, T, ...)`` of more places than were learnt. Angles and waves of any place can be computed."""
    limit = getattr(reader.config.get_text_config(), "max_position_embeddings", None)
    if torch.compiler.is_compiling() or limit is None or given.shape[1] <= limit:
        return
    if not any(_is_table_of_places(name, module) for name, module in reader.named_modules()):
        return
    padded = attention_mask is not None and not reader.config.is_encoder_decoder
    longest = int(attention_mask.sum(dim=1).max()) if padded else given.shape[1]
    if longest > limit:
        raise ValueError(
            f"a text has {longest} places, pictures included, but {reader.config.model_type} has learnt {limit}: shorten it."
        )


def _is_table_of_places(name: str, module: nn.Module) -> bool:
    named = name.rpartition(".")[2] in ("wpe", "embed_positions", "position_embeddings")
    return named and isinstance(module, nn.Embedding) and "Sinusoidal" not in type(module).__name__


def _check_side(lm: PreTrainedModel, attention_mask: torch.Tensor | None, generates: bool = False) -> None:
    if attention_mask is None or torch.compiler.is_compiling():
        return
    if not lm.config.is_encoder_decoder:
        if generates and not attention_mask[:, -1].all():
            raise ValueError(
                "texts are padded on the right, where new words would follow padding: set padding_side='left'."
            )
    elif not hasattr(lm.config, "relative_attention_num_buckets") and not attention_mask[:, 0].all():
        raise ValueError(
            f"texts are padded on the left, where {lm.config.model_type} counts padding as places: set "
            "padding_side='right'."
        )


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """``(B, T)``: places counted from the first that is no padding, as ``generate`` counts them."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _takes_positions(lm: PreTrainedModel) -> bool:
    """Whether a language model can be told the positions. RoBERTa and its like begin at another than 0, and count them
    by themselves, padding on the left included."""
    counts = hasattr(getattr(lm.base_model, "embeddings", None), "create_position_ids_from_inputs_embeds")
    return not counts and takes(lm, "position_ids")


def _selects_places(lm: PreTrainedModel) -> bool:
    """Whether a language model computes the logits of chosen places alone.

    Code that comes with a checkpoint may know only a number of last places, and a language model spread over devices has
    the places on another device than what is chosen of them.
    """
    if not takes(lm, "logits_to_keep") or type(_unadapted(lm)).__module__.startswith("transformers_modules."):
        return False
    return len({parameter.device for parameter in lm.parameters() if parameter.device.type not in ("cpu", "meta")}) < 2


def _unadapted(lm: PreTrainedModel) -> PreTrainedModel:
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm  # PEFT's forward takes anything


def _arguments(function) -> set[str]:
    return set(inspect.signature(function).parameters)


def _generation_field(name: str, generate_kwargs: dict, given: GenerationConfig | None, lm: PreTrainedModel):
    """A field of the generation config that ``lm.generate`` will use: the first that says something."""
    values = (generate_kwargs.get(name), getattr(given, name, None), getattr(lm.generation_config, name, None))
    return next((value for value in values if value is not None), None)
