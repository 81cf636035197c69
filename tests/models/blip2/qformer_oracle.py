"""Stage 1 of BLIP-2 by transformers' Q-Former under masks written out whole: one pass an objective, nothing shared.

transformers has neither word embeddings in its Q-Former nor heads: both are made of torch's own modules. Weights are
copied by a table of names, in which gradients are looked up too.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config, MMBlip2QFormerConfig

PAD, CLS, SEP, DEC = 0, 28, 29, 30
VOCABULARY = 31
FIRST_WORD, LAST_WORD = 3, 27
QFORMER = {
    "num_query_tokens": 3,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "encoder_hidden_size": 20,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 9,
    "pad_token_id": PAD,
    "cls_token_id": CLS,
    "sep_token_id": SEP,
    "bos_token_id": DEC,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
TOWER = {
    "model_type": "mm_vit",
    "hidden_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}
PICTURE_TOKENS = 5


def qformer_config(**fields) -> MMBlip2QFormerConfig:
    return MMBlip2QFormerConfig(**{**QFORMER, **fields})


def blip2_config(qformer: dict | None = None, **fields) -> MMBlip2Config:
    return MMBlip2Config(
        vision_config=dict(TOWER), qformer_config={**QFORMER, **(qformer or {})}, **{"joint_dim": 8, **fields}
    )


def perturbed(model: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """No weight, bias, norm or query as it was initialised, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
        parameter.data += 0.25 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if hasattr(model, "temperature"):
        model.temperature.data.fill_(0.3)
    return model.to(dtype).eval()


def features_of(number: int, tokens: int = PICTURE_TOKENS, width: int = 20, seed: int = 1, dtype=torch.float64):
    """``(number, tokens, width)``, what a tower could give."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, tokens, width, generator=generator, dtype=torch.float64).to(dtype)


def texts_of(*lengths: int, width: int | None = None, side: str = "right", seed: int = 2):
    """Ids and mask ``(len(lengths), width)``: [CLS], words, [SEP], and padding on one side. Lengths are whole."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        words = torch.randint(FIRST_WORD, LAST_WORD + 1, (length - 2,), generator=generator)
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place] = torch.cat([torch.tensor([CLS]), words, torch.tensor([SEP])])
        mask[row, place] = 1
    return ids, mask


def sees(objective: str, num_queries: int, text_mask: torch.Tensor) -> torch.Tensor:
    """``(B, 1, S, S)`` bool of queries, then text: the row sees the column (figure 2 of the paper)."""
    batch, length = text_mask.shape
    total = num_queries + length
    seen = torch.zeros(batch, total, total, dtype=torch.bool)
    queries, text = slice(0, num_queries), slice(num_queries, total)
    seen[:, queries, queries] = True
    seen[:, queries, text] = objective == "bidirectional"
    seen[:, text, queries] = objective in ("bidirectional", "causal")
    seen[:, text, text] = torch.ones(length, length).tril().bool() if objective == "causal" else True
    seen[:, :, text] &= text_mask.bool()[:, None]
    return seen[:, None]


def additive(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)


def attention_names(ours: str, peers: str) -> dict[str, str]:
    return {
        f"{ours}.q_proj": f"{peers}.attention.query",
        f"{ours}.k_proj": f"{peers}.attention.key",
        f"{ours}.v_proj": f"{peers}.attention.value",
        f"{ours}.out_proj": f"{peers}.output.dense",
        f"{ours}_layer_norm": f"{peers}.output.LayerNorm",
    }


def module_names(config: MMBlip2QFormerConfig) -> dict[str, str]:
    """Our modules with a weight and a bias, and transformers'."""
    names = {"embeddings.layer_norm": "layernorm"}
    for number in range(config.num_hidden_layers):
        ours, peers = f"layers.{number}", f"encoder.layer.{number}"
        names |= attention_names(f"{ours}.self_attn", f"{peers}.attention")
        if number % config.cross_attention_frequency == 0:
            names |= attention_names(f"{ours}.cross_attn", f"{peers}.crossattention")
        for part, suffix in (("query", "_query"), ("text", "")) if config.use_text else (("query", "_query"),):
            names[f"{ours}.{part}_mlp.fc1"] = f"{peers}.intermediate{suffix}.dense"
            names[f"{ours}.{part}_mlp.fc2"] = f"{peers}.output{suffix}.dense"
            names[f"{ours}.{part}_layer_norm"] = f"{peers}.output{suffix}.LayerNorm"
    return names


class QFormerOracle(nn.Module):
    """Reads in float64 what `qformer` holds."""

    def __init__(self, qformer: nn.Module):
        super().__init__()
        config = qformer.config
        self.num_queries, self.use_text = config.num_query_tokens, config.use_text
        width = config.hidden_size
        self.peer = Blip2QFormerModel(
            Blip2QFormerConfig(
                vocab_size=config.vocab_size,
                hidden_size=width,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                hidden_act="gelu",
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                layer_norm_eps=config.layer_norm_eps,
                cross_attention_frequency=config.cross_attention_frequency,
                encoder_hidden_size=config.encoder_hidden_size,
                use_qformer_text_input=config.use_text,
                attn_implementation="eager",
            )
        )
        self.queries = nn.Parameter(torch.empty(1, self.num_queries, width))
        self.names = {"embeddings.query_tokens": "queries"}
        if self.use_text:
            self.words = nn.Embedding(config.vocab_size, width)
            self.positions = nn.Embedding(config.max_position_embeddings, width)
            self.names["embeddings.word_embeddings.weight"] = "words.weight"
            self.names["embeddings.position_embeddings.weight"] = "positions.weight"
        for ours, peers in module_names(config).items():
            self.names |= {f"{ours}.{tensor}": f"peer.{peers}.{tensor}" for tensor in ("weight", "bias")}
        self.to(torch.float64).eval()
        copy_by_names(qformer, self, self.names)

    def read(self, features=None, ids=None, text_mask=None, objective="bidirectional", picture_mask=None, **kwargs):
        """Queries, text and all that transformers gives, in one pass for this objective."""
        batch = len(features if features is not None else ids)
        rows = [] if features is None else [self.queries.expand(batch, -1, -1)]
        num_queries = 0 if features is None else self.num_queries
        if ids is None:
            text_mask = torch.ones(batch, 0)
        else:
            text_mask = torch.ones_like(ids) if text_mask is None else text_mask
            places = (text_mask.cumsum(1) - 1).clamp(min=0)
            rows.append(self.words(ids) + self.positions(places))
        if picture_mask is not None:
            picture_mask = picture_mask.bool()[:, None, None].expand(-1, -1, num_queries, -1)
        out = self.peer(
            query_embeds=torch.cat(rows, 1),
            query_length=num_queries,
            attention_mask=additive(sees(objective, num_queries, text_mask)),
            encoder_hidden_states=features,
            encoder_attention_mask=None if picture_mask is None else additive(picture_mask),
            **kwargs,
        )
        return out.last_hidden_state[:, :num_queries], out.last_hidden_state[:, num_queries:], out


class LMHeadOracle(nn.Module):
    """BERT's head, with the matrix of the words."""

    def __init__(self, words: nn.Embedding, eps: float = 1e-12):
        super().__init__()
        size, width = words.weight.shape
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=eps))
        self.bias = nn.Parameter(torch.zeros(size))
        self.names = {
            "transform.weight": "transform.0.weight",
            "transform.bias": "transform.0.bias",
            "layer_norm.weight": "transform.2.weight",
            "layer_norm.bias": "transform.2.bias",
            "decoder.bias": "bias",
        }
        self.to(torch.float64).eval()

    def forward(self, text: torch.Tensor, words: nn.Embedding) -> torch.Tensor:
        return self.transform(text) @ words.weight.T + self.bias


class Stage1Oracle(nn.Module):
    """The three losses of section 3.2 from features of the tower, by `MMBlip2ForPreTraining`'s weights in float64."""

    def __init__(self, model: nn.Module):
        super().__init__()
        config = model.config
        width = config.qformer_config.hidden_size
        self.vision_norm = nn.LayerNorm(config.qformer_config.encoder_hidden_size, eps=config.vision_norm_eps)
        self.qformer = QFormerOracle(model.qformer)
        self.vision_projection = nn.Linear(width, config.joint_dim)
        self.text_projection = nn.Linear(width, config.joint_dim)
        self.itm_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.empty(1))
        self.lm_head = LMHeadOracle(self.qformer.words)
        self.names = {"temperature": "temperature"}
        for module in ("vision_norm", "vision_projection", "text_projection", "itm_head"):
            self.names |= {f"{module}.{tensor}": f"{module}.{tensor}" for tensor in ("weight", "bias")}
        for module in ("qformer", "lm_head"):
            self.names |= {f"{module}.{a}": f"{module}.{b}" for a, b in getattr(self, module).names.items()}
        self.to(torch.float64).eval()
        copy_by_names(model, self, self.names)

    def embeds(self, features, ids, text_mask):
        """``(B, Nq, joint_dim)`` and ``(B, joint_dim)``."""
        queries, _, _ = self.qformer.read(self.vision_norm(features))
        _, text, _ = self.qformer.read(None, ids, text_mask)
        first = text_mask.argmax(1)
        images = functional.normalize(self.vision_projection(queries), dim=-1)
        texts = functional.normalize(self.text_projection(text[torch.arange(len(text)), first]), dim=-1)
        return images, texts

    def itc(self, features, ids, text_mask, image_ids=None, smoothing=0.1, detached=False):
        images, texts = self.embeds(features, ids, text_mask)
        return contrastive_by_loops(images, texts, self.temperature, image_ids, smoothing, detached)

    def matching_logits(self, features, ids, text_mask):
        """``(P, 2)`` of P pictures with a text each."""
        queries, _, _ = self.qformer.read(self.vision_norm(features), ids, text_mask, "bidirectional")
        return torch.stack([self.itm_head(queries[:, k]) for k in range(queries.shape[1])]).mean(0)

    def itm(self, features, ids, text_mask, negatives, valid=None):
        """Loss and the logits of right pairs, texts with drawn pictures, and pictures with drawn texts."""
        drawn_pictures, drawn_texts = negatives
        blocks = [
            self.matching_logits(features, ids, text_mask),
            self.matching_logits(features[drawn_pictures], ids, text_mask),
            self.matching_logits(features, ids[drawn_texts], text_mask[drawn_texts]),
        ]
        batch = len(features)
        kept = (
            torch.ones(3 * batch, dtype=torch.bool) if valid is None else torch.cat([torch.ones(batch).bool(), *valid])
        )
        answers = torch.cat(blocks).log_softmax(-1)
        terms = torch.cat([-answers[:batch, 1], -answers[batch:, 0]])
        return terms[kept].mean(), blocks

    def generation_logits(self, features, ids, text_mask):
        """``(B, T, V)``: [DEC] in place of the first token."""
        begun = ids.clone()
        begun[torch.arange(len(ids)), text_mask.argmax(1)] = DEC
        _, text, _ = self.qformer.read(self.vision_norm(features), begun, text_mask, "causal")
        return self.lm_head(text, self.qformer.words)

    def itg(self, features, ids, text_mask, smoothing=0.1):
        """Loss, and the share of words that are right."""
        logits = self.generation_logits(features, ids, text_mask)
        terms, right = [], []
        for row in range(len(ids)):
            for place in range(ids.shape[1] - 1):
                if text_mask[row, place] and text_mask[row, place + 1]:
                    target = ids[row, place + 1]
                    log_shares = logits[row, place].log_softmax(-1)
                    terms.append(-(1 - smoothing) * log_shares[target] - smoothing * log_shares.mean())
                    right.append(logits[row, place].argmax() == target)
        return torch.stack(terms).mean(), torch.stack(right).double().mean()


def contrastive_by_loops(images, texts, temperature, image_ids=None, smoothing=0.0, detached=False):
    """Both directions' cross-entropy of the best query's cosines with soft targets, and the logits."""
    batch = len(images)
    columns_of = (lambda rows: rows.detach()) if detached else (lambda rows: rows)

    def table(rows_are_images):
        a, b = (images, columns_of(texts)) if rows_are_images else (columns_of(images), texts)
        best = [[(a[i] @ b[j]).max() / temperature.reshape(()) for j in range(batch)] for i in range(batch)]
        logits = torch.stack([torch.stack(row) for row in best])
        return logits if rows_are_images else logits.T

    ids = torch.arange(batch) if image_ids is None else image_ids
    terms = []
    for logits in (table(True), table(False)):
        for i in range(batch):
            right = (ids == ids[i]).double()
            target = (1 - smoothing) * right / right.sum() + smoothing / batch
            terms.append(-(target * logits[i].log_softmax(-1)).sum())
    return torch.stack(terms).mean(), table(True)


def copy_by_names(source: nn.Module, target: nn.Module, names: dict[str, str]) -> None:
    """Every tensor of both sides, once; a tensor of one shape into the same."""
    theirs = dict(target.named_parameters())
    ours = {name: value for name, value in source.named_parameters() if not name.startswith("vision_tower.")}
    assert set(names) == set(ours), set(names) ^ set(ours)
    assert set(names.values()) == set(theirs), set(names.values()) ^ set(theirs)
    with torch.no_grad():
        for mine, other in names.items():
            assert ours[mine].shape == theirs[other].shape, mine
            theirs[other].copy_(ours[mine])


def assert_same_gradients(model: nn.Module, oracle: nn.Module, rtol: float = 1e-7) -> None:
    """Of every parameter, relative to the largest of its tensor; both None or both numbers."""
    ours, theirs = dict(model.named_parameters()), dict(oracle.named_parameters())
    for mine, other in oracle.names.items():
        one, two = ours[mine].grad, theirs[other].grad
        one = torch.zeros_like(ours[mine]) if one is None else one
        two = torch.zeros_like(theirs[other]) if two is None else two
        torch.testing.assert_close(one.double(), two, rtol=rtol, atol=rtol * two.abs().max().item() + 1e-12, msg=mine)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, over the largest number."""
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs).abs().max() / theirs.abs().max()).item()
