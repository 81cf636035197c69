"""Published BLIP-2 checkpoints: the state dict of LAVIS key by key, and the config of transformers field by field, as the
specification lists them."""

from __future__ import annotations

from typing import Any

import torch

from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config

from .published import Drawn

BERT = "Qformer.bert"
HEAD = "Qformer.cls.predictions"


def lavis_state(config: MMBlip2Config, projection: str = "", word_dim: int = 0) -> dict[str, torch.Tensor]:
    """What LAVIS trains of a model of the config's sizes: of stage 1, or of stage 2 where a projection is named.

    Args:
        config: the sizes.
        projection: ``"opt_proj"`` or ``"t5_proj"``.
        word_dim: width of the language model's words.
    """
    state, qformer, tower = Drawn(), config.qformer_config, config.vision_config.hidden_size
    width, has_text = qformer.hidden_size, not projection
    state.draw("query_tokens", 1, qformer.num_query_tokens, width)
    state.draw_norm("ln_vision", tower)
    if has_text:
        state.draw(f"{BERT}.embeddings.word_embeddings.weight", qformer.vocab_size, width)
        state.draw(f"{BERT}.embeddings.position_embeddings.weight", qformer.max_position_embeddings, width)
        state[f"{BERT}.embeddings.position_ids"] = torch.arange(qformer.max_position_embeddings)[None]
    state.draw_norm(f"{BERT}.embeddings.LayerNorm", width)
    for number in range(qformer.num_hidden_layers):
        layer = f"{BERT}.encoder.layer.{number}"
        _attention(state, f"{layer}.attention", width, width)
        if number % qformer.cross_attention_frequency == 0:
            _attention(state, f"{layer}.crossattention", width, tower)
        for kind in ("_query", "") if has_text else ("_query",):
            _linear(state, f"{layer}.intermediate{kind}.dense", qformer.intermediate_size, width)
            _linear(state, f"{layer}.output{kind}.dense", width, qformer.intermediate_size)
            state.draw_norm(f"{layer}.output{kind}.LayerNorm", width)
    if projection:
        _linear(state, projection, word_dim, width)
        return dict(state)
    _linear(state, f"{HEAD}.transform.dense", width, width)
    state.draw_norm(f"{HEAD}.transform.LayerNorm", width)
    state.draw(f"{HEAD}.bias", qformer.vocab_size)
    state[f"{HEAD}.decoder.weight"] = state[f"{BERT}.embeddings.word_embeddings.weight"]
    state[f"{HEAD}.decoder.bias"] = state[f"{HEAD}.bias"]
    for name, size in (("vision_proj", config.joint_dim), ("text_proj", config.joint_dim), ("itm_head", 2)):
        _linear(state, name, size, width)
    state["temp"] = torch.tensor(0.083)
    return dict(state)


def _linear(state: Drawn, name: str, rows: int, columns: int) -> None:
    state.draw(f"{name}.weight", rows, columns)
    state.draw(f"{name}.bias", rows)


def _attention(state: Drawn, name: str, width: int, source_width: int) -> None:
    _linear(state, f"{name}.self.query", width, width)
    _linear(state, f"{name}.self.key", width, source_width)
    _linear(state, f"{name}.self.value", width, source_width)
    _linear(state, f"{name}.output.dense", width, width)
    state.draw_norm(f"{name}.output.LayerNorm", width)


def lavis_content(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What LAVIS's runner saves by ``torch.save``."""
    return {
        "model": state,
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
            "param_groups": [{"lr": 1e-4}],
        },
        "config": {"model": {"arch": "blip2", "vit_precision": "fp16"}, "run": {"max_epoch": 10}},
        "scaler": {"scale": 65536.0},
        "epoch": 9,
    }


def blip2_json(config: MMBlip2Config) -> dict[str, Any]:
    """The ``config.json`` of transformers' BLIP-2 of these sizes over an EVA ViT."""
    tower, qformer, text = config.vision_config, config.qformer_config, config.text_config
    return {
        "model_type": "blip-2",
        "architectures": ["Blip2ForImageTextRetrieval" if text is None else "Blip2ForConditionalGeneration"],
        "num_query_tokens": qformer.num_query_tokens,
        "image_text_hidden_size": config.joint_dim,
        "image_token_index": None if text is None else config.image_token_id,
        "text_config": None if text is None else text.to_dict(),
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": tower.hidden_size,
            "intermediate_size": tower.intermediate_size,
            "num_hidden_layers": tower.num_hidden_layers,
            "num_attention_heads": tower.num_attention_heads,
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
            "hidden_act": tower.hidden_act,
            "layer_norm_eps": tower.layer_norm_eps,
            "attention_dropout": tower.attention_dropout,
            "qkv_bias": True,
            "initializer_range": 0.02,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "vocab_size": qformer.vocab_size,
            "hidden_size": qformer.hidden_size,
            "num_hidden_layers": qformer.num_hidden_layers,
            "num_attention_heads": qformer.num_attention_heads,
            "intermediate_size": qformer.intermediate_size,
            "hidden_act": qformer.hidden_act,
            "hidden_dropout_prob": qformer.dropout,
            "attention_probs_dropout_prob": qformer.attention_dropout,
            "max_position_embeddings": qformer.max_position_embeddings,
            "initializer_range": qformer.initializer_range,
            "layer_norm_eps": qformer.layer_norm_eps,
            "cross_attention_frequency": qformer.cross_attention_frequency,
            "encoder_hidden_size": qformer.encoder_hidden_size,
            "use_qformer_text_input": qformer.use_text,
        },
    }
