"""Row 2: a model that is not loaded starts with the statistics of its paper."""

import math
import re
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config
from hf_mm.models.blip2.modeling_blip2_stage1 import MMBlip2ForPreTraining
from hf_mm.models.clip.configuration_clip import MMClipConfig, MMClipResNetConfig
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.models.clip.modeling_clip_resnet import MMClipResNetModel
from hf_mm.models.eva_vit.configuration_eva_vit import EvaViTConfig
from hf_mm.models.eva_vit.modeling_eva_vit import EvaViTModel
from hf_mm.models.pic2word.configuration_pic2word import Pic2WordConfig
from hf_mm.models.pic2word.modeling_pic2word import Pic2WordModel
from hf_mm.models.vit.configuration_vit import MMViTConfig
from hf_mm.models.vit.modeling_vit import MMViTForImageClassification

WIDTH, MLP, LAYERS, PATCH = 128, 320, 3, 8
TEXT_WIDTH = 96


@dataclass(frozen=True)
class Law:
    """A distribution around zero by its standard deviation, fourth moment / variance^2, and bound / deviation."""

    std: float
    kurtosis: float
    bound: float

    def check(self, values: torch.Tensor):
        """Within six standard errors."""
        values, number = values.double().flatten(), values.numel()
        spread = values.square().mean().sqrt().item()
        assert spread == pytest.approx(self.std, rel=6 * math.sqrt((self.kurtosis - 1) / (4 * number)))
        assert abs(values.mean()) <= 6 * self.std / math.sqrt(number)
        assert values.abs().max() <= self.bound * self.std * (1 + 1e-5)
        if number > 4000:
            assert (values**4).mean() / spread**4 == pytest.approx(self.kurtosis, abs=6 * math.sqrt(24 / number))


def normal(std: float) -> Law:
    return Law(std, kurtosis=3.0, bound=7.0)


def uniform(bound: float) -> Law:
    return Law(bound / math.sqrt(3), kurtosis=1.8, bound=math.sqrt(3))


def truncated(std: float) -> Law:
    """Normal cut at two deviations and widened until `std` is right again."""
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    inside = math.erf(math.sqrt(2))
    variance = 1 - 4 * density / inside
    fourth = 3 - (12 + 16) * density / inside
    return Law(std, kurtosis=fourth / variance**2, bound=2 / math.sqrt(variance))


def constant(value: float):
    return value


NORMS = {r"(norm\w*|layrnorm)\.weight": constant(1.0), r"(norm\w*|layrnorm)\.bias": constant(0.0)}
RESIDUAL = (2 * LAYERS) ** -0.5
VIT = {
    r"vit\.embeddings\.patch_embeddings\.weight": truncated((3 * PATCH**2) ** -0.5),
    r"vit\.embeddings\.(patch_embeddings\.bias|cls_token)": constant(0.0),
    r"vit\.embeddings\.position_embeddings": normal(0.02),
    r"self_attn\.\w+_proj\.weight": uniform((6 / (2 * WIDTH)) ** 0.5),
    r"self_attn\.\w+_proj\.bias": constant(0.0),
    r"mlp\.fc[12]\.weight": uniform((6 / (WIDTH + MLP)) ** 0.5),
    r"mlp\.fc[12]\.bias": normal(1e-6),
    r"vit\.pre_logits\.weight": truncated(WIDTH**-0.5),
    r"vit\.pre_logits\.bias": constant(0.0),
    r"classifier\.(weight|bias)": constant(0.0),
    **NORMS,
}
CLIP = {
    r"vision_model\.embeddings\.(class_embedding|position_embedding\.weight)": normal(WIDTH**-0.5),
    r"vision_model\.embeddings\.patch_embedding\.weight": uniform((3 * PATCH**2) ** -0.5),
    r"vision_model.*self_attn\.[qkv]_proj\.weight": uniform((6 / (3 * WIDTH + WIDTH)) ** 0.5),
    r"vision_model.*self_attn\.out_proj\.weight": uniform(WIDTH**-0.5),
    r"vision_model.*mlp\.fc1\.(weight|bias)": uniform(WIDTH**-0.5),
    r"vision_model.*mlp\.fc2\.(weight|bias)": uniform(MLP**-0.5),
    r"text_model\.embeddings\.token_embedding\.weight": normal(0.02),
    r"text_model\.embeddings\.position_embedding\.weight": normal(0.01),
    r"text_model.*self_attn\.[qkv]_proj\.weight": normal(TEXT_WIDTH**-0.5),
    r"text_model.*self_attn\.out_proj\.weight": normal(TEXT_WIDTH**-0.5 * RESIDUAL),
    r"text_model.*mlp\.fc1\.weight": normal((2 * TEXT_WIDTH) ** -0.5),
    r"text_model.*mlp\.fc2\.weight": normal(TEXT_WIDTH**-0.5 * RESIDUAL),
    r"text_model.*mlp\.fc1\.bias": uniform(TEXT_WIDTH**-0.5),
    r"text_model.*mlp\.fc2\.bias": uniform(MLP**-0.5),
    r"self_attn\.\w+_proj\.bias": constant(0.0),
    r"visual_projection\.weight": normal(WIDTH**-0.5),
    r"text_projection\.weight": normal(TEXT_WIDTH**-0.5),
    r"^logit_scale": constant(2.659260036932778),
    **NORMS,
}
EVA = {
    r"embeddings\.patch_embeddings\.(weight|bias)": uniform((3 * PATCH**2) ** -0.5),
    r"embeddings\.(cls_token|position_embeddings)": normal(0.02),
    r"self_attn\.[qkv]_proj\.weight|mlp\.fc1\.weight": normal(0.02),
    **{
        rf"layers\.{layer}\.(self_attn\.out_proj|mlp\.fc2)\.weight": normal(0.02 * (2 * layer + 2) ** -0.5)
        for layer in range(LAYERS)
    },
    r"(self_attn\.\w+_proj|mlp\.fc[12])\.bias": constant(0.0),
    **NORMS,
}
# Of a tower of width 8: 4 channels in the stem, 8 to 64 within the blocks, 256 at the end.
RESNET = {
    r"^conv1\.weight": uniform((3 * 9) ** -0.5),
    r"^conv[23]\.weight": uniform((4 * 9) ** -0.5),
    r"layer1\.0\.(conv1|downsample\.0)\.weight": uniform(8**-0.5),
    r"layer1\.1\.conv1\.weight|layer2\.0\.(conv1|downsample\.0)\.weight": uniform(32**-0.5),
    r"layer3\.0\.(conv1|downsample\.0)\.weight": uniform(64**-0.5),
    r"layer4\.0\.(conv1|downsample\.0)\.weight": uniform(128**-0.5),
    **{rf"layer{stage}\.\d\.conv2\.weight": uniform((2 ** (stage + 2) * 9) ** -0.5) for stage in range(1, 5)},
    **{rf"layer{stage}\.\d\.conv3\.weight": uniform((2 ** (stage + 2)) ** -0.5) for stage in range(1, 5)},
    r"layer\d\.\d\.bn3\.weight": constant(0.0),
    r"(^bn[123]|bn[12]|downsample\.1)\.weight": constant(1.0),
    r"(bn[123]|downsample\.1)\.bias": constant(0.0),
    r"attnpool\.positional_embedding": normal(256**-0.5),
    r"attnpool\.[qkvc]_proj\.weight": normal(256**-0.5),
    r"attnpool\.[qkvc]_proj\.bias": uniform(256**-0.5),
}


HIDDEN = 200
PIC2WORD = {
    **{rf"^clip\..*({pattern.removeprefix('^')})": law for pattern, law in CLIP.items()},
    r"^mapper\.layers\.0\.(weight|bias)": uniform(64**-0.5),
    r"^mapper\.layers\.1\.(weight|bias)": uniform(HIDDEN**-0.5),
    r"^mapper\.fc_out\.(weight|bias)": uniform(HIDDEN**-0.5),
}


QUERY_WIDTH, QUERY_STD = 96, 0.03
BLIP2 = {
    **{rf"^vision_tower\..*({pattern})": law for pattern, law in EVA.items()},
    r"^qformer\.embeddings\.query_tokens": normal(QUERY_STD),
    r"^qformer\.embeddings\.word_embeddings\.weight": normal(QUERY_STD),
    r"^qformer\.embeddings\.position_embeddings\.weight": normal(QUERY_STD),
    **{
        rf"^qformer\.layers\..*{module}\.weight": normal(QUERY_STD)
        for module in (r"self_attn\.\w+_proj", r"cross_attn\.\w+_proj", r"query_mlp\.fc[12]", r"text_mlp\.fc[12]")
    },
    r"^lm_head\.transform\.weight": normal(QUERY_STD),
    **{
        rf"^(qformer|lm_head).*{module}\.bias": constant(0.0)
        for module in ("_proj", r"query_mlp\.fc[12]", r"text_mlp\.fc[12]", "transform", "decoder")
    },
    r"^(vision_projection|text_projection|itm_head)\.(weight|bias)": uniform(QUERY_WIDTH**-0.5),
    r"^(?!vision_tower).*norm\.weight": constant(1.0),
    r"^(?!vision_tower).*norm\.bias": constant(0.0),
    r"^temperature": constant(0.07),
}


def resnet():
    return MMClipResNetModel(
        MMClipResNetConfig(depths=(2, 1, 1, 1), width=8, num_attention_heads=4, image_size=128, projection_dim=64)
    )


def vit():
    config = MMViTConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=64,
        patch_size=PATCH,
        pre_logits=True,
        num_labels=10,
    )
    return MMViTForImageClassification(config)


def eva():
    config = EvaViTConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=64,
        patch_size=PATCH,
    )
    return EvaViTModel(config)


def blip2():
    """Stage 1. The queries' MLPs begin as those of the text, which a file may lack together with them."""
    qformer = {
        "hidden_size": QUERY_WIDTH,
        "intermediate_size": 160,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_query_tokens": 16,
        "initializer_range": QUERY_STD,
        "vocab_size": 400,
        "max_position_embeddings": 48,
        "bos_token_id": 399,
    }
    return MMBlip2ForPreTraining(
        MMBlip2Config(vision_config=eva().config.to_dict(), qformer_config=qformer, joint_dim=64)
    )


def pic2word():
    """What a file lacks is drawn by the class that has it: the frozen CLIP's by CLIP."""
    return Pic2WordModel(Pic2WordConfig(clip_config=clip_config(), mapper_config={"hidden_dim": HIDDEN}))


def clip():
    return MMClipModel(clip_config())


def clip_config():
    tower = {"intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    vision = {**tower, "hidden_size": WIDTH, "image_size": 64, "patch_size": PATCH}
    text = {**tower, "hidden_size": TEXT_WIDTH, "vocab_size": 1000, "eos_token_id": 999, "max_position_embeddings": 48}
    return MMClipConfig(vision_config=vision, text_config=text, projection_dim=64)


MODELS = {
    "mm_vit": (vit, VIT),
    "mm_clip": (clip, CLIP),
    "mm_clip_resnet": (resnet, RESNET),
    "eva_vit": (eva, EVA),
    "pic2word": (pic2word, PIC2WORD),
    "mm_blip2": (blip2, BLIP2),
}
EVERY = pytest.mark.parametrize(("build", "laws"), MODELS.values(), ids=MODELS)


def check_law(name: str, parameter: torch.Tensor, laws: dict):
    matching = [law for pattern, law in laws.items() if re.search(pattern, name)]
    assert len(matching) == 1, f"{len(matching)} laws for {name}"
    law = matching[0]
    if isinstance(law, float):
        assert parameter.unique().item() == pytest.approx(law, rel=1e-7), name
        return
    try:
        law.check(parameter.detach())
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error


@EVERY
def test_every_parameter_follows_the_law_of_the_paper(build, laws):
    for name, parameter in build().named_parameters():
        check_law(name, parameter, laws)


@EVERY
def test_what_a_file_lacks_follows_its_law_and_nothing_else_is_touched(build, laws, tmp_path):
    """The first parameter of every law is taken out of the file."""
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.7)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lacking = {next(name for name in weights if re.search(pattern, name)) for pattern in laws}
    kept = {name: value for name, value in weights.items() if name not in lacking}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) - set(model.all_tied_weights_keys) == lacking
    for name, parameter in opened.named_parameters():
        if name in lacking:
            check_law(name, parameter, laws)
        else:
            assert (parameter == 0.7).all(), name


@pytest.mark.parametrize("build", [build for build, _ in MODELS.values()], ids=MODELS)
def test_a_seed_gives_the_same_weights_and_another_seed_others(build):
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(build().state_dict())
    first, again, other = models
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_factor_scales_every_law_of_clip():
    torch.manual_seed(0)
    plain = clip()
    fields = plain.config.to_dict()
    for section in (fields, fields["vision_config"], fields["text_config"]):
        section["initializer_factor"] = 0.5
    torch.manual_seed(0)
    halved = MMClipModel(MMClipConfig(**fields))
    for name in (
        "text_model.embeddings.token_embedding.weight",
        "text_model.encoder.layers.0.self_attn.out_proj.weight",
        "text_model.encoder.layers.0.mlp.fc2.weight",
        "vision_model.embeddings.class_embedding",
        "vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "visual_projection.weight",
    ):
        torch.testing.assert_close(halved.get_parameter(name), plain.get_parameter(name) / 2)
    assert torch.equal(halved.logit_scale, plain.logit_scale)
