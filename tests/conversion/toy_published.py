"""A toy model in two layouts of names, with one rule of every kind between them."""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers import initialization as init

from hf_mm.conversion.rules import Rule, drop, rename, reshape, split, transpose
from hf_mm.nn.pretrained import MMPreTrainedModel


@strict
class ToyConfig(PreTrainedConfig):
    model_type = "toy_published"

    hidden_size: int = 6
    num_hidden_layers: int = 2
    vocab_size: int = 11
    tie_word_embeddings: bool = True


class ToyMixer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.low, self.middle, self.high = (nn.Parameter(torch.empty(2, width)) for _ in range(3))


class ToyLayer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.mixer = ToyMixer(width)


class ToyModel(MMPreTrainedModel):
    config_class = ToyConfig
    _tied_weights_keys = {"lm_head.weight": "embeddings.weight"}

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ToyLayer(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.projection = nn.Linear(config.hidden_size, 4, bias=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("frequencies", self.make_frequencies(), persistent=False)
        self.post_init()

    def make_frequencies(self) -> torch.Tensor:
        return 0.5 ** torch.arange(self.config.hidden_size)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ToyModel):
            init.ones_(module.logit_scale)
            init.zeros_(module.steps)
            init.copy_(module.frequencies, module.make_frequencies())
        elif isinstance(module, ToyMixer):
            for parameter in module.parameters():
                init.normal_(parameter)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(input_ids) * self.frequencies
        for layer in self.layers:
            mixed = (layer.mixer.low * layer.mixer.middle).sum(0) + layer.mixer.high.mean(0)
            hidden = hidden + layer.out_proj(layer.q_proj(layer.norm(hidden)) * layer.k_proj(hidden) * mixed)
            hidden = hidden + layer.v_proj(hidden)
        return self.logit_scale * (self.lm_head(hidden) + self.projection(hidden).sum(-1, keepdim=True) + self.steps)


AutoConfig.register(ToyConfig.model_type, ToyConfig)
AutoModel.register(ToyConfig, ToyModel)

# The published mixer is two triples, ours is three pairs.
MIXER = Rule(
    ("blocks.{i}.mixer.even", "blocks.{i}.mixer.odd"),
    tuple(f"layers.{{i}}.mixer.{part}" for part in ("low", "middle", "high")),
    lambda triples: list(torch.stack(triples, dim=1).unbind(0)),
    lambda pairs: list(torch.stack(pairs, dim=1).unbind(0)),
)
RULES = [
    rename("token_embedding", "embeddings.weight"),
    rename("blocks.{i}.ln.{p}", "layers.{i}.norm.{p}"),
    split("blocks.{i}.in_proj_{p}", [f"layers.{{i}}.{part}_proj.{{p}}" for part in "qkv"]),
    rename("blocks.{i}.out.{rest*}", "layers.{i}.out_proj.{rest*}"),
    MIXER,
    transpose("proj", "projection.weight"),
    reshape("logit_scale", "logit_scale", (1,), ()),
    rename("num_batches", "steps"),
    *drop("input_resolution", "attn_mask"),
]
DROPPED = {"input_resolution", "attn_mask"}


def published_tensors(config: ToyConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights in the published layout, written out without the rules."""
    width = config.hidden_size
    shapes = {"token_embedding": (config.vocab_size, width), "proj": (width, 4), "logit_scale": ()}
    for i in range(config.num_hidden_layers):
        shapes |= {
            f"blocks.{i}.ln.weight": (width,),
            f"blocks.{i}.ln.bias": (width,),
            f"blocks.{i}.in_proj_weight": (3 * width, width),
            f"blocks.{i}.in_proj_bias": (3 * width,),
            f"blocks.{i}.out.weight": (width, width),
            f"blocks.{i}.out.bias": (width,),
            f"blocks.{i}.mixer.even": (3, width),
            f"blocks.{i}.mixer.odd": (3, width),
        }
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    integers = {"num_batches": torch.tensor(7), "input_resolution": torch.tensor(224)}
    return tensors | integers | {"attn_mask": torch.zeros(3, 3)}


def expected_tensors(published: dict[str, torch.Tensor], config: ToyConfig) -> dict[str, torch.Tensor]:
    """What the model should hold, written out by hand."""
    width = config.hidden_size
    expected = {
        "embeddings.weight": published["token_embedding"],
        "projection.weight": published["proj"].T,
        "logit_scale": published["logit_scale"][None],
        "steps": published["num_batches"],
    }
    for i in range(config.num_hidden_layers):
        theirs, ours = f"blocks.{i}", f"layers.{i}"
        for p in ("weight", "bias"):
            expected[f"{ours}.norm.{p}"] = published[f"{theirs}.ln.{p}"]
            expected[f"{ours}.out_proj.{p}"] = published[f"{theirs}.out.{p}"]
            for k, part in enumerate("qkv"):
                fused = published[f"{theirs}.in_proj_{p}"]
                expected[f"{ours}.{part}_proj.{p}"] = fused[k * width : (k + 1) * width]
        even, odd = published[f"{theirs}.mixer.even"], published[f"{theirs}.mixer.odd"]
        for k, part in enumerate(("low", "middle", "high")):
            expected[f"{ours}.mixer.{part}"] = torch.cat([even[k : k + 1], odd[k : k + 1]])
    return expected
