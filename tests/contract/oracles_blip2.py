"""BLIP-2 equation by equation (Li et al. 2023, arXiv 2301.12597): sample by sample, without padding, batch or mask builder.

Picture towers and language models are transformers' own, fed by hand.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from .oracles import ACTIVATIONS, Oracle, common_fields, eva_vit_oracle, from_peer, same_name

DRAWS = 7
"""Seed of the hard negatives, for the model and its oracle."""


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(DRAWS)


class QFormerEquations:
    """Section 3.1 and figure 2, on copies of what trains in a model.

    Args:
        model: the Q-Former, or what contains it.
        config: of the Q-Former.
        prefix: of its parameters' names.
        hidden_act: another activation than the config's.
    """

    def __init__(self, model: nn.Module, config, prefix: str = "", hidden_act: str | None = None):
        self.parameters = {
            name: nn.Parameter(value.detach().clone())
            for name, value in model.named_parameters()
            if value.requires_grad
        }
        self.config, self.prefix = config, prefix
        self.activation = ACTIVATIONS[hidden_act or config.hidden_act]

    def norm(self, x: torch.Tensor, name: str, eps: float | None = None) -> torch.Tensor:
        weight, bias = (self.parameters[f"{name}.{kind}"] for kind in ("weight", "bias"))
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + (self.config.layer_norm_eps if eps is None else eps)).sqrt()
        return centred / scale * weight + bias

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.parameters[f"{name}.weight"].T + self.parameters[f"{name}.bias"]

    def attention(self, x: torch.Tensor, source: torch.Tensor, name: str, sees: torch.Tensor | None) -> torch.Tensor:
        """``(S, d)`` looks at ``(N, e)``; `sees` ``(S, N)`` says who sees whom."""
        width = self.config.hidden_size // self.config.num_attention_heads
        query, key, value = (
            self.linear(states, f"{name}.{letter}_proj").split(width, dim=1)
            for states, letter in ((x, "q"), (source, "k"), (source, "v"))
        )
        mixed = []
        for q, k, v in zip(query, key, value, strict=True):
            scores = q @ k.T / math.sqrt(width)
            scores = scores if sees is None else scores.masked_fill(~sees, -math.inf)
            mixed.append(scores.softmax(-1) @ v)
        return self.linear(torch.cat(mixed, dim=1), f"{name}.out_proj")

    def mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.linear(self.activation(self.linear(x, f"{name}.fc1")), f"{name}.fc2")

    def read(
        self, picture: torch.Tensor | None = None, ids: torch.Tensor | None = None, causal: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries ``(Nq, d)`` that read a picture ``(N, e)``, and a text ``(T, d)``: each may be left out.

        Together they see each other; with `causal` the queries see themselves alone, and a word what stands before it.
        """
        embeddings, rows = f"{self.prefix}embeddings", []
        number = 0 if picture is None else self.config.num_query_tokens
        if number:
            rows.append(self.parameters[f"{embeddings}.query_tokens"][0])
        if ids is not None:
            words = self.parameters[f"{embeddings}.word_embeddings.weight"][ids]
            rows.append(words + self.parameters[f"{embeddings}.position_embeddings.weight"][: len(ids)])
        x = self.norm(torch.cat(rows), f"{embeddings}.layer_norm")
        sees = torch.ones(len(x), len(x), dtype=torch.bool)
        if causal:
            sees[:, number:] = sees[:, number:].tril(-number)
        for index in range(self.config.num_hidden_layers):
            layer = f"{self.prefix}layers.{index}"
            x = self.norm(x + self.attention(x, x, f"{layer}.self_attn", sees), f"{layer}.self_attn_layer_norm")
            queries, text = x[:number], x[number:]
            if number and index % self.config.cross_attention_frequency == 0:
                attended = self.attention(queries, picture, f"{layer}.cross_attn", None)
                queries = self.norm(queries + attended, f"{layer}.cross_attn_layer_norm")
            if number:
                queries = self.norm(queries + self.mlp(queries, f"{layer}.query_mlp"), f"{layer}.query_layer_norm")
            if len(text):
                text = self.norm(text + self.mlp(text, f"{layer}.text_mlp"), f"{layer}.text_layer_norm")
            x = torch.cat([queries, text])
        return x[:number], x[number:]


def pictures_of(model, equations: QFormerEquations, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """What the Q-Former reads of each picture: a layer of transformers' tower, normed."""
    config, tower = model.config, model.vision_tower
    if tower.config.model_type == "eva_vit":
        oracle = eva_vit_oracle(tower)
    else:
        peer = CLIPVisionModel(CLIPVisionConfig(**common_fields(tower.config, CLIPVisionConfig)))
        oracle = from_peer(peer, tower, same_name, dict)
    with torch.no_grad():
        outputs = oracle.run(pixel_values=pixel_values, output_hidden_states=True)
    layer = config.vision_feature_layer
    states = outputs["last_hidden_state"] if layer == -1 else outputs["hidden_states"][layer]
    return list(equations.norm(states.detach(), "vision_norm", config.vision_norm_eps))


def rows_of(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[torch.Tensor]:
    """The texts without padding."""
    return [ids[kept.bool()] for ids, kept in zip(input_ids, attention_mask, strict=True)]


def qformer_oracle(model, hidden_act: str | None = None) -> Oracle:
    equations = QFormerEquations(model, model.config, hidden_act=hidden_act)

    def run(encoder_hidden_states, input_ids, attention_mask):
        both = [
            equations.read(picture, ids)
            for picture, ids in zip(encoder_hidden_states, rows_of(input_ids, attention_mask), strict=True)
        ]
        queries, texts = zip(*both, strict=True)
        return {"last_hidden_state": torch.stack(queries), "text_hidden_state": padded(texts, input_ids.shape[1])}

    return Oracle(run, equations.parameters)


def padded(rows, length: int, value: float = 0.0) -> torch.Tensor:
    return torch.stack([F.pad(row, (0, 0) * (row.ndim - 1) + (0, length - len(row)), value=value) for row in rows])


def blip2_oracle(model, hidden_act: str | None = None) -> Oracle:
    equations = QFormerEquations(model, model.config.qformer_config, "qformer.", hidden_act)

    def run(pixel_values):
        pictures = pictures_of(model, equations, pixel_values)
        return {"last_hidden_state": torch.stack([equations.read(picture)[0] for picture in pictures])}

    return Oracle(run, equations.parameters)


def smoothed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -(logits.log_softmax(-1) * targets).sum(-1).mean()


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """For each row a column off the diagonal, from the softmax of what is there, by the Gumbel-max trick."""
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    noisy = logits.detach().double() - (-uniform.log()).log()
    return noisy.masked_fill(torch.eye(len(logits), dtype=torch.bool), -math.inf).argmax(1)


def stage1_oracle(model, hidden_act: str | None = None) -> Oracle:
    """Section 3.2: the contrastive, the matching and, where the model has a head for words, the generation loss."""
    config = model.config
    equations = QFormerEquations(model, config.qformer_config, "qformer.", hidden_act)
    smoothing, generates = config.label_smoothing, hasattr(model, "lm_head")

    def embedded(states, name):
        projected = equations.linear(states, name)
        return projected / projected.norm(dim=-1, keepdim=True)

    def says(picture, ids):
        """Scores of the vocabulary for each next word."""
        begun = torch.cat([ids.new_tensor([config.qformer_config.bos_token_id]), ids[1:]])
        _, text = equations.read(picture, begun, causal=True)
        hidden = equations.activation(equations.linear(text[:-1], "lm_head.transform"))
        words = equations.parameters["qformer.embeddings.word_embeddings.weight"]
        return equations.norm(hidden, "lm_head.layer_norm") @ words.T + equations.parameters["lm_head.decoder.bias"]

    def run(pixel_values, input_ids, attention_mask):
        pictures, texts = pictures_of(model, equations, pixel_values), rows_of(input_ids, attention_mask)
        number = len(pictures)
        image = torch.stack([embedded(equations.read(picture)[0], "vision_projection") for picture in pictures])
        text = torch.stack([embedded(equations.read(ids=ids)[1][0], "text_projection") for ids in texts])
        logits = (image[:, None] * text[None, :, None]).sum(-1).amax(-1) / equations.parameters["temperature"]
        targets = (1 - smoothing) * torch.eye(number).to(logits) + smoothing / number
        losses = {"loss_itc": sum(smoothed_cross_entropy(scores, targets) for scores in (logits, logits.T)) / 2}

        generator = draws()
        drawn_pictures, drawn_texts = draw(logits.T, generator), draw(logits, generator)
        pairs = [(row, row) for row in range(number)]
        pairs += [(int(other), row) for row, other in enumerate(drawn_pictures)]
        pairs += [(row, int(other)) for row, other in enumerate(drawn_texts)]
        matching = torch.stack(
            [equations.linear(equations.read(pictures[i], texts[t])[0], "itm_head").mean(0) for i, t in pairs]
        )
        labels = torch.tensor([1] * number + [0] * (2 * number))
        losses["loss_itm"] = -matching.log_softmax(1)[range(3 * number), labels].mean()
        if generates:
            scores = torch.cat([says(*pair) for pair in zip(pictures, texts, strict=True)])
            words = F.one_hot(torch.cat([ids[1:] for ids in texts]), scores.shape[1])
            targets = (1 - smoothing) * words.to(scores) + smoothing / scores.shape[1]
            losses["loss_itg"] = smoothed_cross_entropy(scores, targets)
        return {
            **losses,
            "loss": sum(losses.values()),
            "logits_per_image": logits,
            "logits_per_text": logits.T,
            "image_embeds": image,
            "text_embeds": text,
        }

    return Oracle(run, equations.parameters)


def stage2_oracle(model, hidden_act: str | None = None) -> Oracle:
    """Section 3.3: transformers' language model, row by row, given words and soft tokens in their places."""
    config = model.config
    equations = QFormerEquations(model, config.qformer_config, "qformer.", hidden_act)
    language_model = copy.deepcopy(model.language_model)

    def run(pixel_values, input_ids, attention_mask, labels):
        pictures = pictures_of(model, equations, pixel_values)
        soft = [equations.linear(equations.read(picture)[0], "language_projection") for picture in pictures]
        flat, table = iter(torch.cat(soft)), language_model.get_input_embeddings().weight
        scores, told = [], []
        for ids, said in zip(rows_of(input_ids, attention_mask), labels, strict=True):
            row = torch.stack([next(flat) if int(one) == config.image_token_id else table[one] for one in ids])
            if config.is_encoder_decoder:
                said = said[said != -100]
                start = said.new_tensor([language_model.config.decoder_start_token_id])
                begun = torch.cat([start, said[:-1]])[None]
                logits = language_model(inputs_embeds=row[None], decoder_input_ids=begun).logits[0]
                scores.append(logits)
            else:
                said = said[: len(ids)]
                logits = language_model(inputs_embeds=row[None]).logits[0]
                scores.append(logits)
                logits, said = logits[:-1], said[1:]
            told.append(logits.log_softmax(-1)[said != -100, said[said != -100]])
        return {
            "loss": -torch.cat(told).mean(),
            "logits": padded(scores, labels.shape[1]),
            "soft_tokens": torch.stack(soft),
        }

    return Oracle(run, equations.parameters)
