"""Independent models that ours must equal: transformers' own CLIP, ViT and BLIP-2, and models written out as equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

POOLED = ("last_hidden_state", "pooler_output")
COMPARED = ("loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
COMPOSED = ("composed_embeds", "pseudo_words")
BLIP2 = ("loss_itc", "loss_itm", "loss_itg", "text_hidden_state", "soft_tokens")


@dataclass
class Oracle:
    """`run` gives the outputs for the same inputs, `parameters` what it computes with, under the names of our model."""

    run: Callable[..., dict[str, torch.Tensor]]
    parameters: dict[str, nn.Parameter]


def pick(*names: str) -> Callable[[object], dict[str, torch.Tensor]]:
    """Reads the named fields of a model's output."""
    return lambda outputs: {name: outputs[name] for name in names if outputs[name] is not None}


def from_peer(peer: nn.Module, model: nn.Module, rename: Callable[[str], str], read: Callable) -> Oracle:
    """Gives `peer` the weights of `model`; a name that only one of the two has is an error."""
    peer = peer.to(next(model.parameters()).dtype).train(model.training)
    theirs = dict(peer.named_parameters())
    ours = {name: theirs.pop(rename(name)) for name, _ in model.named_parameters()}
    assert not theirs, f"the oracle alone has {sorted(theirs)}"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ours[name].copy_(parameter.reshape(ours[name].shape))
    return Oracle(lambda **inputs: read(peer(**inputs)), ours)


def same_name(name: str) -> str:
    return name


def common_fields(config, config_class: type, **changes) -> dict:
    """The fields of our config that `config_class` of transformers has too."""
    own = {"model_type", "transformers_version", "architectures"}
    known = set(config_class().to_dict()) - own
    return {**{key: value for key, value in config.to_dict().items() if key in known}, **changes}


def clip_text_oracle(model, **changes) -> Oracle:
    config = CLIPTextConfig(**common_fields(model.config, CLIPTextConfig, **changes))
    return from_peer(CLIPTextModel(config), model, same_name, pick(*POOLED))


def clip_vision_oracle(model, **changes) -> Oracle:
    config = CLIPVisionConfig(**common_fields(model.config, CLIPVisionConfig, **changes))
    return from_peer(CLIPVisionModel(config), model, same_name, pick(*POOLED))


def clip_oracle(model, **changes) -> Oracle:
    config = CLIPConfig(
        text_config=common_fields(model.config.text_config, CLIPTextConfig, **changes),
        vision_config=common_fields(model.config.vision_config, CLIPVisionConfig, **changes),
        projection_dim=model.config.projection_dim,
    )
    oracle = from_peer(CLIPModel(config), model, same_name, pick(*COMPARED))
    return Oracle(lambda **inputs: oracle.run(**inputs, return_loss=True), oracle.parameters)


def vit_name(name: str) -> str:
    """Our name of a ViT parameter to that of transformers."""
    for ours, theirs in (
        ("encoder.layers.", "layers."),
        ("self_attn.out_proj", "attention.o_proj"),
        ("self_attn", "attention"),
        ("layer_norm1", "layernorm_before"),
        ("layer_norm2", "layernorm_after"),
        ("patch_embeddings.", "patch_embeddings.projection."),
        ("pre_logits", "pooler.dense"),
    ):
        name = name.replace(ours, theirs)
    return name


def vit_config(config, **changes) -> ViTConfig:
    dropouts = {
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
    }
    return ViTConfig(**common_fields(config, ViTConfig, **dropouts, **changes))


def vit_classifier_oracle(model, **changes) -> Oracle:
    peer = ViTForImageClassification(vit_config(model.config, **changes))
    return from_peer(peer, model, vit_name, pick("loss", "logits"))


def vit_trunk_oracle(model, **changes) -> Oracle:
    return from_peer(ViTModel(vit_config(model.config, **changes)), model, vit_name, pick(*POOLED))


def blip2_vision_state(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of an EVA ViT of ours as transformers' BLIP-2 has them: fused, with a bias of zeros for the keys."""
    state = {}
    for name, value in parameters.items():
        module, _, kind = name.rpartition(".")
        if not module.endswith(("q_proj", "k_proj", "v_proj")):
            state[blip2_vision_name(name)] = value
        elif module.endswith("q_proj"):
            attention = module.removesuffix(".q_proj")
            parts = [parameters.get(f"{attention}.{part}_proj.{kind}", torch.zeros_like(value)) for part in "qkv"]
            state[f"{attention}.qkv.{kind}"] = torch.cat(parts)
    return state


def blip2_vision_name(name: str) -> str:
    """Our name of an EVA ViT's parameter to that of transformers."""
    for ours, theirs in (
        ("out_proj", "projection"),
        ("cls_token", "class_embedding"),
        ("position_embeddings", "position_embedding"),
        ("patch_embeddings", "patch_embedding"),
    ):
        name = name.replace(ours, theirs)
    return name


def eva_vit_oracle(model, **changes) -> Oracle:
    """The tower of transformers' BLIP-2, without the norm after it."""
    peer = Blip2VisionModel(Blip2VisionConfig(**common_fields(model.config, Blip2VisionConfig, **changes)))
    peer.post_layernorm = nn.Identity()
    peer.train(model.training)
    parameters = {name: nn.Parameter(value.detach().clone()) for name, value in model.named_parameters()}

    def run(**inputs) -> dict[str, torch.Tensor]:
        outputs = functional_call(peer, blip2_vision_state(parameters), kwargs=inputs, strict=True)
        return {name: outputs[name] for name in (*POOLED, "hidden_states") if outputs.get(name) is not None}

    return Oracle(run, parameters)


class ClipWithViT(nn.Module):
    """CLIP's equations over the towers of transformers' ViT and CLIP text model."""

    def __init__(self, config, **changes):
        super().__init__()
        self.vision_model = ViTModel(vit_config(config.vision_config, **changes), add_pooling_layer=False)
        text = CLIPTextConfig(**common_fields(config.text_config, CLIPTextConfig, **changes))
        self.text_model = CLIPTextModel(text)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, attention_mask, pixel_values):
        image = self.visual_projection(self.vision_model(pixel_values).last_hidden_state[:, 0])
        text = self.text_projection(self.text_model(input_ids, attention_mask).pooler_output)
        return compared(image, text, self.logit_scale)


def compared(image: torch.Tensor, text: torch.Tensor, logit_scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """CLIP's figure 3."""
    image, text = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    logits = logit_scale.exp() * image @ text.T
    own = logits.diagonal()
    loss = (logits.logsumexp(1) - own).mean() / 2 + (logits.logsumexp(0) - own).mean() / 2
    return dict(zip(COMPARED, (loss, logits, logits.T, text, image), strict=True))


def clip_with_vit_oracle(model, **changes) -> Oracle:
    def rename(name: str) -> str:
        return vit_name(name) if name.startswith("vision_model.") else name

    return from_peer(ClipWithViT(model.config, **changes), model, rename, dict)


ACTIVATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_pytorch_tanh": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def equations_oracle(model, hidden_act: str | None = None) -> Oracle:
    """ViT with a convolutional stem and mean pooling, equation by equation, on copies of the model's parameters."""
    config = model.config
    parameters = {name: nn.Parameter(value.detach().clone()) for name, value in model.named_parameters()}
    activation = ACTIVATIONS[hidden_act or config.hidden_act]
    eps = config.layer_norm_eps

    def weights(prefix: str) -> list[torch.Tensor]:
        return [parameters[f"{prefix}.{name}"] for name in ("weight", "bias")]

    def standardise(x, dims):
        centred = x - x.mean(dims, keepdim=True)
        return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()

    def layer_norm(x, prefix):
        weight, bias = weights(prefix)
        return standardise(x, -1) * weight + bias

    def linear(x, prefix):
        weight, bias = weights(prefix)
        return torch.einsum("bti,oi->bto", x, weight) + bias

    def stem(pixels):
        features = pixels
        for number in range(len(config.stem_channels)):
            convolution, norm = f"vit.embeddings.patch_embeddings.layers.{3 * number}", 3 * number + 1
            features = F.conv2d(features, parameters[f"{convolution}.weight"], stride=2, padding=1)
            weight, bias = weights(f"vit.embeddings.patch_embeddings.layers.{norm}")
            groups = features.unflatten(1, (config.stem_num_groups, -1))
            features = standardise(groups, (2, 3, 4)).flatten(1, 2)
            features = features * weight[:, None, None] + bias[:, None, None]
            features = ACTIVATIONS["gelu"](features)
        weight, bias = weights("vit.embeddings.patch_embeddings.projection")
        return torch.einsum("bchw,oc->bhwo", features, weight[:, :, 0, 0]).flatten(1, 2) + bias

    def attention(x, prefix):
        width = config.hidden_size // config.num_attention_heads
        heads = [linear(x, f"{prefix}.{name}_proj").split(width, dim=2) for name in "qkv"]
        mixed = [((q @ k.mT) / math.sqrt(width)).softmax(-1) @ v for q, k, v in zip(*heads, strict=True)]
        return linear(torch.cat(mixed, dim=2), f"{prefix}.out_proj")

    def run(pixel_values, labels):
        x = stem(pixel_values) + parameters["vit.embeddings.position_embeddings"]
        for number in range(config.num_hidden_layers):
            layer = f"vit.encoder.layers.{number}"
            x = x + attention(layer_norm(x, f"{layer}.layer_norm1"), f"{layer}.self_attn")
            hidden = activation(linear(layer_norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1"))
            x = x + linear(hidden, f"{layer}.mlp.fc2")
        pooled = layer_norm(x, "vit.layernorm").mean(dim=1)
        weight, bias = weights("classifier")
        logits = pooled @ weight.T + bias
        return {"loss": -logits.log_softmax(1)[range(len(labels)), labels].mean(), "logits": logits}

    return Oracle(run, parameters)


def resnet_oracle(model, hidden_act: str = "relu") -> Oracle:
    """CLIP's ResNet tower, equation by equation, on copies of the model's parameters and statistics."""
    config = model.config
    parameters = {name: nn.Parameter(value.detach().clone()) for name, value in model.named_parameters()}
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    activation = ACTIVATIONS[hidden_act]

    def channels(values):
        return values[:, None, None]

    def conv_norm(x, convolution, norm, **options):
        x = F.conv2d(x, parameters[f"{convolution}.weight"], **options)
        deviation = (statistics[f"{norm}.running_var"] + config.batch_norm_eps).sqrt()
        x = (x - channels(statistics[f"{norm}.running_mean"])) / channels(deviation)
        return x * channels(parameters[f"{norm}.weight"]) + channels(parameters[f"{norm}.bias"])

    def means(x, side):
        """Of squares that do not overlap."""
        return x.unflatten(3, (-1, side)).mean(4).unflatten(2, (-1, side)).mean(3)

    def block(x, name, stride):
        main = activation(conv_norm(x, f"{name}.conv1", f"{name}.bn1"))
        main = activation(conv_norm(main, f"{name}.conv2", f"{name}.bn2", padding=1))
        main = conv_norm(means(main, stride), f"{name}.conv3", f"{name}.bn3")
        if f"{name}.downsample.0.weight" in parameters:
            x = conv_norm(means(x, stride), f"{name}.downsample.0", f"{name}.downsample.1")
        return activation(main + x)

    def linear(x, name):
        return x @ parameters[f"attnpool.{name}_proj.weight"].T + parameters[f"attnpool.{name}_proj.bias"]

    def attention_pool(x):
        x = x.flatten(2).mT
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + parameters["attnpool.positional_embedding"]
        width = x.shape[2] // config.num_attention_heads
        heads = [linear(x, name).split(width, dim=2) for name in "qkv"]
        mixed = [((q @ k.mT) / math.sqrt(width)).softmax(-1) @ v for q, k, v in zip(*heads, strict=True)]
        return linear(torch.cat(mixed, dim=2), "c")[:, 0]

    def run(pixel_values):
        x = activation(conv_norm(pixel_values, "conv1", "bn1", stride=2, padding=1))
        x = activation(conv_norm(x, "conv2", "bn2", padding=1))
        x = means(activation(conv_norm(x, "conv3", "bn3", padding=1)), 2)
        for stage, depth in enumerate(config.depths, start=1):
            for number in range(depth):
                x = block(x, f"layer{stage}.{number}", stride=2 if stage > 1 and number == 0 else 1)
        return {"last_hidden_state": x, "pooler_output": attention_pool(x)}

    return Oracle(run, parameters)


def clip_with_resnet_oracle(model, hidden_act: str | None = None) -> Oracle:
    vision = resnet_oracle(model.vision_model, hidden_act or "relu")
    text = clip_text_oracle(model.text_model, **({"hidden_act": hidden_act} if hidden_act else {}))
    own = (model.text_projection.weight, model.logit_scale)
    projection, scale = (nn.Parameter(value.detach().clone()) for value in own)

    def run(input_ids, attention_mask, pixel_values):
        texts = text.run(input_ids=input_ids, attention_mask=attention_mask)["pooler_output"] @ projection.T
        return compared(vision.run(pixel_values)["pooler_output"], texts, scale)

    parameters = {f"vision_model.{name}": value for name, value in vision.parameters.items()}
    parameters |= {f"text_model.{name}": value for name, value in text.parameters.items()}
    return Oracle(run, parameters | {"text_projection.weight": projection, "logit_scale": scale})


def mapper_equations(
    parameters: dict[str, torch.Tensor], embeds: torch.Tensor, activation: str = "relu"
) -> torch.Tensor:
    """Pic2Word's mapping network: x to W x + b, hidden layer by hidden layer; the last without activation."""
    number = len([name for name in parameters if name.startswith("layers.") and name.endswith(".weight")])
    hidden = embeds
    for name in (f"layers.{layer}" for layer in range(number)):
        hidden = hidden @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]
        hidden = ACTIVATIONS[activation](hidden)
    return hidden @ parameters["fc_out.weight"].T + parameters["fc_out.bias"]


def mapper_oracle(model, hidden_act: str = "relu") -> Oracle:
    parameters = {name: nn.Parameter(value.detach().clone()) for name, value in model.named_parameters()}
    return Oracle(
        lambda image_embeds: {"pseudo_words": mapper_equations(parameters, image_embeds, hidden_act)}, parameters
    )


def with_words(table: nn.Module, encode: Callable, words, input_ids, attention_mask, placeholder_mask) -> torch.Tensor:
    """Texts encoded one by one and unpadded; a hook on the table of tokens puts the words in their places."""
    composed, words = [], iter(words)
    for ids, kept, places in zip(input_ids, attention_mask, placeholder_mask, strict=True):
        own = {int(place): next(words) for place in places.nonzero()}

        def put(module, args, embeds, own=own):
            rows = [own.get(position, row) for position, row in enumerate(embeds[0])]
            return torch.stack(rows)[None]

        hook = table.register_forward_hook(put)
        composed.append(encode(ids[: kept.sum()][None]))
        hook.remove()
    return torch.cat(composed)


def composed_oracle(model, pictures: Callable, table: nn.Module, encode: Callable) -> Oracle:
    """Pic2Word around any two towers. Only its mapping network trains."""
    mapper = {name: nn.Parameter(value.detach().clone()) for name, value in model.mapper.named_parameters()}

    def run(input_ids, attention_mask, placeholder_mask, pixel_values):
        image = pictures(pixel_values).detach()
        words = mapper_equations(mapper, image)
        text = with_words(table, encode, words, input_ids, attention_mask, placeholder_mask)
        outputs = compared(image, text, model.clip.logit_scale.detach())
        composed = outputs.pop("text_embeds")
        return {**outputs, "composed_embeds": composed, "pseudo_words": words}

    return Oracle(run, {f"mapper.{name}": value for name, value in mapper.items()})


def pic2word_oracle(model, **changes) -> Oracle:
    """Over transformers' CLIP."""
    config = model.config.clip_config
    peer = CLIPModel(
        CLIPConfig(
            text_config=common_fields(config.text_config, CLIPTextConfig, **changes),
            vision_config=common_fields(config.vision_config, CLIPVisionConfig, **changes),
            projection_dim=config.projection_dim,
        )
    )
    from_peer(peer, model.clip, same_name, dict)
    return composed_oracle(
        model,
        lambda pixels: peer.get_image_features(pixels).pooler_output,
        peer.text_model.embeddings.token_embedding,
        lambda ids: peer.get_text_features(ids).pooler_output,
    )


def pic2word_with_resnet_oracle(model, **changes) -> Oracle:
    """Over the equations of CLIP's ResNet tower and transformers' text tower."""
    clip = model.clip
    vision = resnet_oracle(clip.vision_model, **changes)
    peer = CLIPTextModel(CLIPTextConfig(**common_fields(clip.config.text_config, CLIPTextConfig, **changes)))
    from_peer(peer, clip.text_model, same_name, dict)
    return composed_oracle(
        model,
        lambda pixels: vision.run(pixels)["pooler_output"],
        peer.embeddings.token_embedding,
        lambda ids: peer(ids).pooler_output @ clip.text_projection.weight.detach().T,
    )
