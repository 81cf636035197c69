"""BLIP-2 of LAVIS and of transformers: what is read, from which sources, what is refused, and the ways back.

State dicts of LAVIS are written out from the table of names in the specification. The oracle is transformers' BLIP-2,
which gets them by that table, too.
"""

import json
import logging
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoProcessor,
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    BlipImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_mm.cli import main
from hf_mm.conversion.rules import ConversionError
from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config, MMBlip2QFormerConfig
from hf_mm.models.blip2.conversion_blip2 import qformer_config, read_blip2
from hf_mm.models.blip2.conversion_blip2_export import (
    export_lavis,
    export_transformers,
    save_as_lavis,
    save_as_transformers,
)
from hf_mm.models.blip2.modeling_blip2 import MMBlip2ForConditionalGeneration
from hf_mm.models.blip2.modeling_blip2_captioning import MMBlip2ForQFormerCaptioning
from hf_mm.models.blip2.modeling_blip2_stage1 import MMBlip2ForImageTextRetrieval, MMBlip2ForPreTraining
from hf_mm.models.clip.configuration_clip import MMClipVisionConfig
from hf_mm.models.eva_vit.configuration_eva_vit import EvaViTConfig

QUERIES, WIDTH, LAYERS, MLP, JOINT, PLACES = 5, 64, 4, 96, 24, 16
TOWER = {"width": 64, "mlp": 80, "side": 28, "patch": 14}
WORDS = ["a", "red", "blue", "cat", "dog", "photo", "of", "the", "on", "left"]
LM_WIDTH = 40


# Tokenizers


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A BERT tokenizer without [DEC], as it is published."""
    folder = tmp_path_factory.mktemp("bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n")
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


VOCABULARY = 5 + len(WORDS) + 1  # with [DEC]


def opt_tokenizer():
    """Bytes, one token each, begun by </s>, as OPT's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = {word: number for number, word in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def t5_tokenizer():
    special = ["<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


# Weights


def perturbed(model, seed=0):
    """Every parameter is drawn: queries, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1)
            if name.endswith("qkv.bias"):
                parameter.view(3, -1)[1] = 0
    return model.eval()


def opt_model():
    config = OPTConfig(
        vocab_size=272,
        hidden_size=LM_WIDTH,
        word_embed_proj_dim=LM_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
        dropout=0.0,
    )
    return perturbed(OPTForCausalLM(config), 3)


def t5_model(activation="gelu_new"):
    """A Flan-T5, whose head is not its words: transformers keeps both where it loads both."""
    config = T5Config(
        vocab_size=32,
        d_model=LM_WIDTH,
        d_kv=10,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dense_act_fn=activation,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    tied = perturbed(T5ForConditionalGeneration(config), 3)
    state = {name: tensor for name, tensor in tied.state_dict().items() if "embed_tokens" not in name}
    state["lm_head.weight"] = state["lm_head.weight"].flip(0)
    model = T5ForConditionalGeneration.from_pretrained(None, config=config, state_dict=state)
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    return model


@pytest.fixture(scope="session")
def opt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opt")
    opt_model().save_pretrained(folder)
    opt_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    t5_model().save_pretrained(folder)
    t5_tokenizer().save_pretrained(folder)
    return folder


class Drawn(dict):
    """Tensors by name."""

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, name, *shape):
        self[name] = 0.15 * torch.randn(shape, generator=self.generator)

    def linear(self, name, rows, columns):
        self.draw(f"{name}.weight", rows, columns)
        self.draw(f"{name}.bias", rows)

    def norm(self, name, width):
        self.draw(f"{name}.weight", width)
        self.draw(f"{name}.bias", width)
        self[f"{name}.weight"] += 1


def eva_state(prefix="", blocks=3, side=28):
    state, width = Drawn(1), TOWER["width"]
    state.draw(f"{prefix}cls_token", 1, 1, width)
    state.draw(f"{prefix}pos_embed", 1, 1 + (side // 14) ** 2, width)
    state.draw(f"{prefix}patch_embed.proj.weight", width, 3, 14, 14)
    state.draw(f"{prefix}patch_embed.proj.bias", width)
    for i in range(blocks):
        block = f"{prefix}blocks.{i}"
        state.norm(f"{block}.norm1", width)
        state.norm(f"{block}.norm2", width)
        state.draw(f"{block}.attn.qkv.weight", 3 * width, width)
        state.draw(f"{block}.attn.q_bias", width)
        state.draw(f"{block}.attn.v_bias", width)
        state.linear(f"{block}.attn.proj", width, width)
        state.linear(f"{block}.mlp.fc1", TOWER["mlp"], width)
        state.linear(f"{block}.mlp.fc2", width, TOWER["mlp"])
    return dict(state)


def clip_state(prefix="", blocks=24):
    """``clip_vit_L.pth``: CLIP's picture tower in OpenAI's names; after all blocks, norm and projection."""
    state, width = Drawn(2), TOWER["width"]
    state.draw(f"{prefix}class_embedding", width)
    state.draw(f"{prefix}positional_embedding", 5, width)
    state.draw(f"{prefix}conv1.weight", width, 3, 14, 14)
    state.norm(f"{prefix}ln_pre", width)
    for i in range(blocks):
        block = f"{prefix}transformer.resblocks.{i}"
        state.draw(f"{block}.attn.in_proj_weight", 3 * width, width)
        state.draw(f"{block}.attn.in_proj_bias", 3 * width)
        state.linear(f"{block}.attn.out_proj", width, width)
        state.norm(f"{block}.ln_1", width)
        state.norm(f"{block}.ln_2", width)
        state.linear(f"{block}.mlp.c_fc", TOWER["mlp"], width)
        state.linear(f"{block}.mlp.c_proj", width, TOWER["mlp"])
    if blocks == 24:
        state.norm(f"{prefix}ln_post", width)
        state.draw(f"{prefix}proj", width, 32)
    return dict(state)


def lavis_state(projection=None, text=True):
    """The trained part of stage 1, or of stage 2 where a projection is named."""
    state, bert = Drawn(0), "Qformer.bert"
    state.draw("query_tokens", 1, QUERIES, WIDTH)
    state.norm("ln_vision", TOWER["width"])
    if projection is None:
        state.draw(f"{bert}.embeddings.word_embeddings.weight", VOCABULARY, WIDTH)
        state.draw(f"{bert}.embeddings.position_embeddings.weight", PLACES, WIDTH)
        state[f"{bert}.embeddings.position_ids"] = torch.arange(PLACES)[None]
    state.norm(f"{bert}.embeddings.LayerNorm", WIDTH)
    for i in range(LAYERS):
        layer = f"{bert}.encoder.layer.{i}"
        for attention, width in {"attention": WIDTH, "crossattention": TOWER["width"]}.items():
            if attention == "crossattention" and i % 2:
                continue
            state.linear(f"{layer}.{attention}.self.query", WIDTH, WIDTH)
            state.linear(f"{layer}.{attention}.self.key", WIDTH, width)
            state.linear(f"{layer}.{attention}.self.value", WIDTH, width)
            state.linear(f"{layer}.{attention}.output.dense", WIDTH, WIDTH)
            state.norm(f"{layer}.{attention}.output.LayerNorm", WIDTH)
        for kind in ("_query", "") if projection is None else ("_query",):
            state.linear(f"{layer}.intermediate{kind}.dense", MLP, WIDTH)
            state.linear(f"{layer}.output{kind}.dense", WIDTH, MLP)
            state.norm(f"{layer}.output{kind}.LayerNorm", WIDTH)
    if projection is None:
        head = "Qformer.cls.predictions"
        state.linear(f"{head}.transform.dense", WIDTH, WIDTH)
        state.norm(f"{head}.transform.LayerNorm", WIDTH)
        state.draw(f"{head}.bias", VOCABULARY)
        state[f"{head}.decoder.weight"] = state[f"{bert}.embeddings.word_embeddings.weight"]
        state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
        state.linear("vision_proj", JOINT, WIDTH)
        state.linear("text_proj", JOINT, WIDTH)
        state.linear("itm_head", 2, WIDTH)
        state["temp"] = torch.tensor(0.083)
    else:
        state.linear(projection, LM_WIDTH, WIDTH)
    return dict(state)


def lavis_file(path, state):
    """What LAVIS's runner saves."""
    content = {
        "model": state,
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
            "param_groups": [{"lr": 1e-4}],
        },
        "config": {"model": {"arch": "blip2", "vit_precision": "fp16"}, "run": {"max_epoch": 10}},
        "scaler": {"scale": 65536.0},
        "epoch": 9,
    }
    torch.save(content, path)
    return path


@pytest.fixture
def eva_file(tmp_path):
    torch.save(eva_state(), tmp_path / "eva_vit_g.pth")
    return tmp_path / "eva_vit_g.pth"


@pytest.fixture
def stage1(tmp_path):
    return lavis_file(tmp_path / "blip2_pretrained.pth", lavis_state())


# The oracle


def as_transformers(state):
    """LAVIS's names as the table in the specification gives transformers'; what has none is left out."""
    found = {}
    for name, tensor in state.items():
        if "visual_encoder" in name and re.search(r"attn\.(q_bias|v_bias)", name):
            if name.endswith("v_bias"):
                continue
            bias = [tensor, torch.zeros_like(tensor), state[name.replace("q_bias", "v_bias")]]
            name, tensor = name.replace("q_bias", "qkv.bias"), torch.cat(bias)
        elif re.search(r"Qformer\.cls|position_ids|^temp$", name):
            continue
        for theirs, new in (
            (r"^visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
            (r"^visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
            (r"^visual_encoder\.patch_embed\.proj", "vision_model.embeddings.patch_embedding"),
            (r"^visual_encoder\.blocks", "vision_model.encoder.layers"),
            (r"(layers\.\d+)\.norm", r"\1.layer_norm"),
            (r"attn\.qkv", "self_attn.qkv"),
            (r"attn\.proj", "self_attn.projection"),
            (r"^ln_vision", "vision_model.post_layernorm"),
            (r"^Qformer\.bert\.embeddings\.LayerNorm", "qformer.layernorm"),
            (r"^Qformer\.bert\.embeddings", "embeddings"),
            (r"^Qformer\.bert", "qformer"),
            (r"attention\.self", "attention.attention"),
            (r"^vision_proj", "vision_projection"),
            (r"^text_proj", "text_projection"),
            (r"^(opt|t5)_proj", "language_projection"),
        ):
            name = re.sub(theirs, new, name)
        found[name] = tensor
    return found


def their_config(text_config=None, **fields):
    vision = {
        "hidden_size": TOWER["width"],
        "intermediate_size": TOWER["mlp"],
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
        "initializer_range": 0.02,
    }
    qformer = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 1,
        "intermediate_size": MLP,
        "max_position_embeddings": PLACES,
        "encoder_hidden_size": TOWER["width"],
        "use_qformer_text_input": text_config is None,
    }
    return Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=None if text_config is None else text_config.to_dict(),
        num_query_tokens=QUERIES,
        image_text_hidden_size=JOINT,
        **fields,
    )


def retrieval_peer():
    return perturbed(Blip2ForImageTextRetrieval(their_config()))


def generation_peer(kind):
    lm = opt_model() if kind == "opt" else t5_model("gelu")
    index = 260 if kind == "opt" else 30
    config = their_config(lm.config, image_token_index=index)
    config.text_config.eos_token_id = 7 if kind == "opt" else 1
    model = perturbed(Blip2ForConditionalGeneration(config))
    model.language_model = lm
    model.all_tied_weights_keys = {
        f"language_model.{name}": f"language_model.{of}" for name, of in lm.all_tied_weights_keys.items()
    }
    return model


def save_peer(model, folder, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": 28, "width": 28}
    BlipImageProcessorPil(size=side, image_mean=[0.4] * 3).save_pretrained(folder)
    return folder


def pixels(seed=5, number=3):
    return torch.randn(number, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def texts():
    """Ids of the Q-Former's words: [CLS] words [SEP] [PAD]."""
    ids = torch.tensor([[2, 6, 7, 8, 3], [2, 9, 10, 3, 0], [2, 5, 11, 12, 3]])
    return ids, (ids != 0).long()


def largest_difference(ours, theirs):
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def require_same_retrieval(ours, theirs, bound):
    ours, theirs = ours.double(), theirs.double()
    pictures, (ids, mask) = pixels().double(), texts()
    with torch.no_grad():
        cosines = theirs(pictures, ids, mask).logits_per_image
        matching = theirs(pictures, ids, mask, use_image_text_matching_head=True).logits_per_image
        outputs = ours(pixel_values=pictures, input_ids=ids, attention_mask=mask, return_loss=False)
        pairs = torch.arange(3)[:, None].repeat(1, 2)
        ours_matching = ours.get_matching_logits(ids, mask, pixel_values=pictures, pairs=pairs)
    assert largest_difference(outputs.logits_per_image * ours.temperature, cosines) <= bound
    assert largest_difference(ours_matching, matching) <= bound


def require_same_generation(ours, theirs, bound):
    """Logits of a prompt behind the picture, where the oracle has the picture's tokens in its vocabulary."""
    ours, theirs = ours.double(), theirs.double()
    index, words = theirs.config.image_token_index, torch.tensor([[2, 8, 9], [2, 11, 10], [2, 5, 6]])
    their_ids = torch.cat([torch.full((3, QUERIES), index), words], 1)
    our_ids = torch.cat([torch.full((3, QUERIES), ours.config.image_token_id), words], 1)
    decoder = {"decoder_input_ids": torch.tensor([[0, 4, 5]]).expand(3, 3)} if ours.config.is_encoder_decoder else {}
    with torch.no_grad():
        expected = theirs(pixels().double(), their_ids, attention_mask=torch.ones_like(their_ids), **decoder).logits
        found = ours(input_ids=our_ids, pixel_values=pixels().double(), **decoder).logits
    assert largest_difference(found, expected) <= bound


def require_equal(found, expected):
    """Bit by bit, names and dtypes included."""
    assert found.keys() == expected.keys()
    different = [
        name for name, t in expected.items() if found[name].dtype != t.dtype or not torch.equal(found[name], t)
    ]
    assert not different


# LAVIS, stage 1


def test_stage_1_means_what_the_peer_s_does(stage1, eva_file, bert):
    conversion, processor, notes = read_blip2(stage1, vision=eva_file, tokenizer=bert)
    ours, theirs = conversion.build(), retrieval_peer()
    assert type(ours) is MMBlip2ForPreTraining
    theirs.load_state_dict(as_transformers({**eva_state("visual_encoder."), **lavis_state()}))
    theirs.vision_model.post_layernorm.eps = 1e-5
    require_same_retrieval(ours, theirs, 1e-9)
    assert ours.temperature.shape == (1,) and ours.temperature.item() == pytest.approx(0.083)
    assert notes == []


def test_the_head_that_generates_text_is_kept(stage1, eva_file, bert):
    ours, state = read_blip2(stage1, vision=eva_file, tokenizer=bert)[0].build(), lavis_state()
    head, hidden = "Qformer.cls.predictions", torch.randn(2, 3, WIDTH)
    expected = hidden @ state[f"{head}.transform.dense.weight"].T + state[f"{head}.transform.dense.bias"]
    expected = 0.5 * expected * (1 + torch.erf(expected / 2**0.5))
    expected = (expected - expected.mean(-1, keepdim=True)) / expected.std(-1, correction=0, keepdim=True)
    expected = expected * state[f"{head}.transform.LayerNorm.weight"] + state[f"{head}.transform.LayerNorm.bias"]
    expected = expected @ state["Qformer.bert.embeddings.word_embeddings.weight"].T + state[f"{head}.bias"]
    with torch.no_grad():
        assert torch.allclose(ours.lm_head(hidden), expected, atol=1e-5)
    assert ours.lm_head.decoder.weight is ours.qformer.embeddings.word_embeddings.weight


def test_shapes_and_tokenizer_tell_the_config(stage1, eva_file, bert):
    config = read_blip2(stage1, vision=eva_file, tokenizer=bert)[0].empty.config
    qformer = config.qformer_config
    assert (qformer.num_query_tokens, qformer.hidden_size, qformer.num_hidden_layers) == (QUERIES, WIDTH, LAYERS)
    assert (qformer.num_attention_heads, qformer.intermediate_size) == (1, MLP)
    assert (qformer.cross_attention_frequency, qformer.encoder_hidden_size) == (2, TOWER["width"])
    assert (qformer.vocab_size, qformer.max_position_embeddings) == (VOCABULARY, PLACES)
    ids = (qformer.pad_token_id, qformer.cls_token_id, qformer.sep_token_id, qformer.bos_token_id)
    assert ids == (0, 2, 3, VOCABULARY - 1)
    assert (config.joint_dim, config.vision_norm_eps, config.vision_feature_layer) == (JOINT, 1e-5, -1)
    assert (qformer.hidden_act, qformer.layer_norm_eps, qformer.dropout) == ("gelu", 1e-12, 0.1)
    assert isinstance(config.vision_config, EvaViTConfig) and config.text_config is None
    assert config.base_models == {"vision_tower": {"name": "eva_vit_g.pth", "revision": None}}


def test_a_folder_of_stage_1_opens(tmp_path, stage1, eva_file, bert):
    conversion, processor, _ = read_blip2(stage1, vision=eva_file, tokenizer=bert)
    folder = conversion.save(tmp_path / "out", processor=processor, progress=False)
    model, loading = MMBlip2ForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    require_equal(model.state_dict(), conversion.build().state_dict())
    assert isinstance(AutoModel.from_pretrained(folder).config, MMBlip2Config)
    opened = AutoProcessor.from_pretrained(folder)
    picture = Image.new("RGB", (40, 30), (200, 10, 10))
    batch = opened(images=[picture], text=["a red cat"])
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    assert batch["input_ids"].tolist() == [[2, 5, 6, 8, 3]]
    squashed = torch.tensor([200, 10, 10]) / 255 - torch.tensor([0.48145466, 0.4578275, 0.40821073])
    squashed = squashed / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    assert torch.allclose(batch["pixel_values"][0].mean((1, 2)), squashed, atol=1e-5)
    sources = json.loads((folder / "conversion.json").read_text())["sources"]
    assert [source["name"] for source in sources] == ["blip2_pretrained.pth", "eva_vit_g.pth"]
    assert all(source["sha256"] for source in sources)


def test_a_fine_tuned_file_has_its_tower(tmp_path, bert):
    state = {**lavis_state(), **eva_state("visual_encoder.", side=42)}
    path = lavis_file(tmp_path / "blip2_finetune_coco.pth", state)
    conversion, processor, _ = read_blip2(path, tokenizer=bert)
    assert conversion.empty.config.vision_config.image_size == 42
    assert processor.image_processor.size == {"height": 42, "width": 42}
    require_equal(export_lavis(conversion.build()), state)
    with pytest.raises(ValueError, match="leave --vision out"):
        read_blip2(path, vision=path, tokenizer=bert)


def test_stage_1_back_to_lavis(tmp_path, stage1, eva_file, bert):
    conversion, processor, _ = read_blip2(stage1, vision=eva_file, tokenizer=bert)
    folder = save_as_lavis(conversion.build(), processor, tmp_path / "back")
    content = torch.load(folder / "blip2.pth", weights_only=True)
    require_equal(content["model"], {**lavis_state(), **eva_state("visual_encoder.")})
    again = read_blip2(folder / "blip2.pth", tokenizer=bert)[0].build()
    require_equal(again.state_dict(), conversion.build().state_dict())


# The tower of CLIP


def their_clip(state):
    """The 24 blocks of transformers' CLIP with OpenAI's weights."""
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=80, num_hidden_layers=24, num_attention_heads=1, image_size=28, patch_size=14
    )
    named = {}
    for name, tensor in state.items():
        for theirs, new in (
            (r"^class_embedding", "embeddings.class_embedding"),
            (r"^positional_embedding", "embeddings.position_embedding.weight"),
            (r"^conv1", "embeddings.patch_embedding"),
            (r"^ln_pre", "pre_layrnorm"),
            (r"^ln_post", "post_layernorm"),
            (r"^transformer\.resblocks", "encoder.layers"),
            (r"attn\.out_proj", "self_attn.out_proj"),
            (r"\.ln_", ".layer_norm"),
            (r"c_fc", "fc1"),
            (r"c_proj", "fc2"),
        ):
            name = re.sub(theirs, new, name)
        if "in_proj" in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                named[re.sub(r"attn\.in_proj_", f"self_attn.{part}_proj.", name)] = third
        elif name != "proj":
            named[name] = tensor
    model = CLIPVisionModel(config).eval()
    own = model.state_dict()
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in own) else ""
    model.load_state_dict({f"{prefix}{name}": tensor for name, tensor in named.items()})
    return model


def clip_sources(folder):
    """All forms in which the tower comes."""
    state = clip_state()
    torch.save(state, folder / "clip_vit_L.pth")
    cut = clip_state(blocks=23)
    torch.save({name: state[name] for name in cut}, folder / "23.pth")
    torch.save({f"visual.{name}": tensor for name, tensor in state.items()}, folder / "ViT-L-14.pt")
    their_clip(state).save_pretrained(folder / "transformers")
    return {"flat": "clip_vit_L.pth", "cut": "23.pth", "openai": "ViT-L-14.pt", "transformers": "transformers"}


@pytest.mark.parametrize("form", ["flat", "cut", "openai", "transformers"])
def test_clip_is_read_before_its_last_block(tmp_path, stage1, bert, form):
    source = tmp_path / clip_sources(tmp_path)[form]
    conversion, _, notes = read_blip2(stage1, vision=source, tokenizer=bert)
    ours = conversion.build()
    assert isinstance(ours.config.vision_config, MMClipVisionConfig)
    assert ours.config.vision_feature_layer == (-1 if form == "cut" else -2)
    assert ours.config.vision_config.hidden_act == "quick_gelu"
    with torch.no_grad():
        expected = their_clip(clip_state())(pixels(), output_hidden_states=True).hidden_states[-2]
        assert largest_difference(ours.vision_features(pixels()), expected) <= 1e-5
    assert bool(notes) == (form == "cut")


def test_a_trained_tower_of_clip(tmp_path, bert):
    """Fine-tuned files hold 23 blocks: what comes after them is filled in, and named."""
    state = {**lavis_state(), **clip_state("visual_encoder.", blocks=23)}
    conversion, _, notes = read_blip2(lavis_file(tmp_path / "vitL.pth", state), tokenizer=bert)
    ours = conversion.build()
    require_equal({"w": ours.vision_tower.post_layernorm.weight.data}, {"w": torch.ones(64)})
    assert "norm" in notes[0]
    back = export_lavis(ours)
    filled = {"visual_encoder.ln_post.weight": torch.ones(64), "visual_encoder.ln_post.bias": torch.zeros(64)}
    require_equal(back, state | filled)


def test_another_clip_is_refused(tmp_path, stage1, bert):
    torch.save(clip_state(blocks=12), tmp_path / "B.pth")
    with pytest.raises(ValueError, match="12 blocks: BLIP-2 was trained on ViT-L/14"):
        read_blip2(stage1, vision=tmp_path / "B.pth", tokenizer=bert)


def test_a_tower_of_ours(tmp_path, stage1, eva_file, bert):
    expected = read_blip2(stage1, vision=eva_file, tokenizer=bert)[0].build()
    expected.vision_tower.save_pretrained(tmp_path / "eva")
    conversion, _, _ = read_blip2(stage1, vision=tmp_path / "eva", tokenizer=bert)
    require_equal(conversion.build().state_dict(), expected.state_dict())


# LAVIS, stage 2


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_stage_2_means_what_the_peer_s_does(tmp_path, eva_file, request, kind):
    state = lavis_state(f"{kind}_proj")
    path = lavis_file(tmp_path / f"blip2_pretrained_{kind}.pth", state)
    conversion, processor, notes = read_blip2(path, vision=eva_file, language_model=request.getfixturevalue(kind))
    ours, theirs = conversion.build(), generation_peer(kind)
    assert type(ours) is MMBlip2ForConditionalGeneration
    named = as_transformers({**eva_state("visual_encoder."), **state})
    lm = {name: tensor for name, tensor in theirs.state_dict().items() if name.startswith("language_model.")}
    theirs.load_state_dict(named | lm)
    theirs.vision_model.post_layernorm.eps = 1e-5
    require_same_generation(ours, theirs, 1e-9)
    assert not ours.config.qformer_config.use_text
    assert len(notes) == 1
    if kind == "opt":
        new_line = opt_tokenizer()("\n", add_special_tokens=False)["input_ids"]
        assert [ours.generation_config.eos_token_id] == new_line == [processor.eos_token_id]
        assert conversion.empty.generation_config.eos_token_id == new_line[0]
    else:
        assert ours.config.text_config.dense_act_fn == "gelu"
        assert ours.generation_config.eos_token_id == processor.eos_token_id == 1
    require_equal(export_lavis(conversion.build()), {**state, **eva_state("visual_encoder.")})


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_folder_of_stage_2_opens(tmp_path, eva_file, request, kind):
    path = lavis_file(tmp_path / "stage2.pth", lavis_state(f"{kind}_proj"))
    language_model = request.getfixturevalue(kind)
    conversion, processor, _ = read_blip2(path, vision=eva_file, language_model=language_model)
    folder = conversion.save(tmp_path / "out", processor=processor, progress=False)
    model, loading = MMBlip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    require_equal(model.state_dict(), conversion.build().state_dict())
    batch = AutoProcessor.from_pretrained(folder)(images=[Image.new("RGB", (30, 30))], text=["a red cat"])
    new = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(new, conversion.build().generate(**batch, max_new_tokens=3, do_sample=False))
    if kind == "t5":
        assert model.language_model.encoder.block[0].layer[1].DenseReluDense.act(torch.tensor(1.0)).item() == (
            pytest.approx(0.5 * (1 + torch.erf(torch.tensor(0.5**0.5)).item()), abs=1e-6)
        )
    sources = json.loads((folder / "conversion.json").read_text())["sources"]
    assert [source["name"] for source in sources] == ["stage2.pth", "eva_vit_g.pth", language_model.name]
    assert set(model.config.base_models) == {"vision_tower", "language_model"}


def test_what_the_file_holds_of_the_language_model_must_be_it(tmp_path, eva_file, opt):
    """LAVIS saves tied tensors of the frozen model by their second name."""
    head = opt_model().lm_head.weight.detach()
    state = {**lavis_state("opt_proj"), "opt_model.lm_head.weight": head.half()}
    conversion, _, _ = read_blip2(lavis_file(tmp_path / "a.pth", state), vision=eva_file, language_model=opt)
    require_equal(export_lavis(conversion.build()), {**lavis_state("opt_proj"), **eva_state("visual_encoder.")})
    state["opt_model.lm_head.weight"] = head + 0.1
    with pytest.raises(ConversionError, match="it differs in lm_head.weight"):
        read_blip2(lavis_file(tmp_path / "b.pth", state), vision=eva_file, language_model=opt)


def test_the_wrong_language_model_is_refused(tmp_path, eva_file, opt, t5):
    path = lavis_file(tmp_path / "stage2.pth", lavis_state("opt_proj"))
    with pytest.raises(ValueError, match="opt_proj was trained for a language model of type opt, but .* type t5"):
        read_blip2(path, vision=eva_file, language_model=t5)
    with pytest.raises(ValueError, match="name it with --language-model"):
        read_blip2(path, vision=eva_file)


# transformers


def test_their_retrieval(tmp_path, bert):
    theirs = retrieval_peer()
    tokenizer = BertTokenizer.from_pretrained(bert, bos_token="[DEC]")
    save_peer(theirs, tmp_path / "hub", tokenizer)
    conversion, processor, notes = read_blip2(tmp_path / "hub")
    ours = conversion.build()
    assert type(ours) is MMBlip2ForImageTextRetrieval
    assert ours.config.vision_norm_eps == 1e-6
    assert ours.temperature.tolist() == [pytest.approx(0.07)] and "no temperature" in notes[0]
    require_same_retrieval(ours, theirs, 1e-9)
    assert list(processor.image_processor.image_mean) == [0.4] * 3
    assert not processor.image_processor.do_center_crop


def test_their_retrieval_and_back(tmp_path, bert):
    theirs = retrieval_peer()
    save_peer(theirs, tmp_path / "hub", BertTokenizer.from_pretrained(bert, bos_token="[DEC]"))
    conversion, processor, _ = read_blip2(tmp_path / "hub")
    folder = save_as_transformers(conversion.build(), processor, tmp_path / "back")
    again, loading = Blip2ForImageTextRetrieval.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    require_equal(again.state_dict(), theirs.state_dict())
    for part in ("vision_config", "qformer_config"):
        assert getattr(again.config, part).to_diff_dict() | {
            "initializer_range": 0,
            "dtype": 0,
            "architectures": 0,
        } == (getattr(theirs.config, part).to_diff_dict() | {"initializer_range": 0, "dtype": 0, "architectures": 0})
    their_processor = AutoProcessor.from_pretrained(folder)
    assert type(their_processor).__name__ == "Blip2Processor"


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_their_generation_and_back(tmp_path, kind):
    theirs = generation_peer(kind)
    tokenizer = opt_tokenizer() if kind == "opt" else t5_tokenizer()
    save_peer(theirs, tmp_path / "hub", tokenizer)
    conversion, processor, notes = read_blip2(tmp_path / "hub")
    ours = conversion.build()
    assert notes == []
    assert ours.config.image_token_id == theirs.config.image_token_index == processor.image_token_id
    require_same_generation(ours, theirs, 1e-9)
    assert ours.generation_config.eos_token_id == processor.eos_token_id == (7 if kind == "opt" else 1)
    config, state = export_transformers(conversion.build())
    expected = generation_peer(kind)
    expected.save_pretrained(tmp_path / "plain")
    require_equal(state, read_tensors(tmp_path / "plain"))
    assert config.image_token_index == theirs.config.image_token_index


def read_tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_stage_2_to_transformers(tmp_path, eva_file, request, kind):
    """The picture's tokens become a new word, and the new model says what ours says."""
    path = lavis_file(tmp_path / "stage2.pth", lavis_state(f"{kind}_proj"))
    conversion, processor, _ = read_blip2(path, vision=eva_file, language_model=request.getfixturevalue(kind))
    ours = conversion.build()
    folder = save_as_transformers(ours, processor, tmp_path / "back")
    theirs, loading = Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    theirs.vision_model.post_layernorm.eps = 1e-5  # which is what the warning is about
    require_same_generation(ours.float(), theirs, 1e-9)
    batch = AutoProcessor.from_pretrained(folder)(
        images=[Image.new("RGB", (30, 30))], text=["a red cat"], return_tensors="pt"
    )
    assert int((batch["input_ids"] == theirs.config.image_token_index).sum()) == QUERIES


# What is refused


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    "name",
    [
        "query_tokens",
        "temp",
        "itm_head.bias",
        "ln_vision.weight",
        "Qformer.cls.predictions.transform.dense.weight",
        "Qformer.cls.predictions.decoder.weight",
        "Qformer.bert.encoder.layer.1.output.dense.weight",
        "Qformer.bert.encoder.layer.2.crossattention.self.key.bias",
        "Qformer.bert.embeddings.position_embeddings.weight",
    ],
)
def test_a_missing_key_is_named(tmp_path, eva_file, bert, name):
    path = lavis_file(tmp_path / "cut.pth", without(lavis_state(), name))
    with pytest.raises(ConversionError) as raised:
        read_blip2(path, vision=eva_file, tokenizer=bert)
    ours = {
        "itm_head.bias": "itm_head.bias",
        "Qformer.cls.predictions.transform.dense.weight": "lm_head.transform.weight",
        "Qformer.bert.encoder.layer.1.output.dense.weight": "qformer.layers.1.text_mlp.fc2.weight",
        "Qformer.bert.encoder.layer.2.crossattention.self.key.bias": "qformer.layers.2.cross_attn.k_proj.bias",
        "Qformer.bert.embeddings.position_embeddings.weight": "qformer.embeddings.position_embeddings.weight",
    }
    assert ours.get(name, name) in str(raised.value)


def test_a_key_too_many_is_named(tmp_path, eva_file, bert):
    path = lavis_file(tmp_path / "more.pth", {**lavis_state(), "Qformer.bert.pooler.dense.weight": torch.ones(2)})
    with pytest.raises(ConversionError, match="Qformer.bert.pooler.dense.weight"):
        read_blip2(path, vision=eva_file, tokenizer=bert)


@pytest.mark.parametrize("name", ["Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias"])
def test_a_head_that_is_not_tied_is_refused(tmp_path, eva_file, bert, name):
    state = lavis_state()
    state[name] = state[name] + 1
    with pytest.raises(ConversionError, match=f"{name} are one tensor"):
        read_blip2(lavis_file(tmp_path / "untied.pth", state), vision=eva_file, tokenizer=bert)


def test_a_file_that_is_cut_short(tmp_path, stage1, eva_file, bert):
    (tmp_path / "half.pth").write_bytes(stage1.read_bytes()[:20000])
    with pytest.raises(ConversionError, match="half.pth is no whole file"):
        read_blip2(tmp_path / "half.pth", vision=eva_file, tokenizer=bert)


def test_code_in_the_file_is_not_run(tmp_path, eva_file, bert):
    content = {"model": lavis_state(), "config": bytearray, "epoch": 0}
    torch.save({**content, "config": print}, tmp_path / "bad.pth")
    with pytest.raises(ConversionError, match="only plain tensors"):
        read_blip2(tmp_path / "bad.pth", vision=eva_file, tokenizer=bert)


def test_the_tower_must_fit_and_be_named(tmp_path, stage1, bert):
    with pytest.raises(ValueError, match="name it with --vision"):
        read_blip2(stage1, tokenizer=bert)
    with pytest.raises(ConversionError, match="no EVA ViT"):
        read_blip2(stage1, vision=stage1, tokenizer=bert)
    wide = Drawn()
    for name, tensor in eva_state().items():
        wide.draw(name, *(128 * size // 64 if size in (64, 192) else size for size in tensor.shape))
    torch.save(dict(wide), tmp_path / "wide.pth")
    with pytest.raises(ConversionError, match="ln_vision.weight is for features of 64, but the tower's have 128"):
        read_blip2(stage1, vision=tmp_path / "wide.pth", tokenizer=bert)


def test_options_that_say_nothing_are_refused(tmp_path, stage1, eva_file, bert, opt):
    with pytest.raises(ValueError, match="leave --language-model out"):
        read_blip2(stage1, vision=eva_file, language_model=opt, tokenizer=bert)
    save_peer(retrieval_peer(), tmp_path / "hub", BertTokenizer.from_pretrained(bert, bos_token="[DEC]"))
    with pytest.raises(ValueError, match="leave --vision out"):
        read_blip2(tmp_path / "hub", vision=eva_file)


def test_another_vocabulary_is_refused(tmp_path, stage1, eva_file):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nx\n")
    BertTokenizer.from_pretrained(tmp_path / "words").save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match="7 words with .DEC., .* but the Q-Former 16"):
        read_blip2(stage1, vision=eva_file, tokenizer=tmp_path / "words")
    with pytest.raises(ValueError, match="has no tokenizer that opens"):
        read_blip2(stage1, vision=eva_file, tokenizer=tmp_path / "nothing")


def test_other_models_are_named(tmp_path, eva_file, bert):
    for key, other in (("llm_proj.weight", "InstructBLIP"), ("text_encoder.x", "BLIP, the first")):
        path = lavis_file(tmp_path / f"{key}.pth", {**lavis_state(), key: torch.ones(2)})
        with pytest.raises(ValueError, match=other):
            read_blip2(path, vision=eva_file, tokenizer=bert)


def test_keys_with_a_bias_are_refused(tmp_path, bert):
    theirs = retrieval_peer()
    with torch.no_grad():
        theirs.vision_model.encoder.layers[1].self_attn.qkv.bias += 0.1
    save_peer(theirs, tmp_path / "hub", BertTokenizer.from_pretrained(bert, bos_token="[DEC]"))
    with pytest.raises(ConversionError, match="encoder.layers.1.self_attn.qkv.bias"):
        read_blip2(tmp_path / "hub")


# Precision


def test_numbers_keep_the_widest_dtype_or_the_one_asked(tmp_path, bert):
    half = {name: t.half() if t.is_floating_point() else t for name, t in lavis_state().items()}
    tower = {name: t.half() for name, t in eva_state().items()}
    torch.save(tower, tmp_path / "eva.pth")
    path = lavis_file(tmp_path / "half.pth", half)
    model = read_blip2(path, vision=tmp_path / "eva.pth", tokenizer=bert)[0].build()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    require_equal(export_lavis(model), {**half, **{f"visual_encoder.{name}": t for name, t in tower.items()}})
    mixed = lavis_file(tmp_path / "mixed.pth", lavis_state())
    model = read_blip2(mixed, vision=tmp_path / "eva.pth", tokenizer=bert)[0].build()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model = read_blip2(mixed, vision=tmp_path / "eva.pth", tokenizer=bert, dtype=torch.bfloat16)[0].build()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# Published sizes


def test_the_published_sizes_have_the_published_number_of_parameters():
    """186,705,470 train in stage 1 with ViT-g, as a public log of a training prints."""
    config = MMBlip2Config(vision_config={"model_type": "eva_vit", "num_hidden_layers": 1})
    with torch.device("meta"):
        model = MMBlip2ForPreTraining(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 186_705_470


# From the shell


@pytest.mark.parametrize("kind", ["retrieval", "opt", "t5"])
def test_there_and_back_from_the_shell(tmp_path, bert, kind, capsys):
    theirs = retrieval_peer() if kind == "retrieval" else generation_peer(kind)
    tokenizer = {"opt": opt_tokenizer, "t5": t5_tokenizer}.get(kind)
    tokenizer = tokenizer() if tokenizer else BertTokenizer.from_pretrained(bert, bos_token="[DEC]")
    if kind != "retrieval":  # as Blip2Processor leaves it
        missing = theirs.config.image_token_index - len(tokenizer)
        tokenizer.add_tokens([f"unused{number}" for number in range(missing)])
        tokenizer.add_tokens(["<image>"], special_tokens=True)
    hub, ours, back = save_peer(theirs, tmp_path / "hub", tokenizer), tmp_path / "ours", tmp_path / "back"
    assert main(["convert", "blip2", str(hub), str(ours), "--check"]) == 0
    assert "Largest relative difference from transformers' BLIP-2" in capsys.readouterr().out
    card = (ours / "README.md").read_text()
    assert ("no temperature" in card) == (kind == "retrieval")
    assert main(["convert", "blip2", str(ours), str(back), "--to", "transformers"]) == 0
    require_equal(read_tensors(back), read_tensors(hub))


def test_lavis_from_the_shell(tmp_path, eva_file, opt, capsys):
    state = lavis_state("opt_proj")
    source = str(lavis_file(tmp_path / "blip2_pretrained_opt2.7b.pth", state))
    options = ["--vision", str(eva_file), "--language-model", str(opt)]
    assert main(["convert", "blip2", source, str(tmp_path / "ours"), *options, "--dtype", "float32"]) == 0
    assert main(["convert", "blip2", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "lavis"]) == 0
    content = torch.load(tmp_path / "back" / "blip2.pth", weights_only=True)
    require_equal(content["model"], {**state, **eva_state("visual_encoder.")})
    capsys.readouterr()
    assert main(["convert", "blip2", source, str(tmp_path / "more"), *options, "--check"]) == 1
    assert "does not open LAVIS's files: leave --check out" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


# What else is read, and what has no way back


def test_a_captioner_has_its_tower(tmp_path, t5):
    state = {**lavis_state("t5_proj"), **eva_state("visual_encoder.", side=42)}
    path = lavis_file(tmp_path / "blip2_caption_flant5xl.pth", state)
    conversion, processor, _ = read_blip2(path, language_model=t5)
    assert conversion.empty.config.vision_config.image_size == processor.image_processor.size.height == 42
    assert conversion.empty.config.base_models["vision_tower"]["name"] == "blip2_caption_flant5xl.pth"
    require_equal(export_lavis(conversion.build()), state)


@pytest.mark.parametrize("model_class", [MMBlip2ForImageTextRetrieval, MMBlip2ForQFormerCaptioning])
def test_stage_1_opens_as_each_of_its_uses(tmp_path, stage1, eva_file, bert, model_class):
    conversion, processor, _ = read_blip2(stage1, vision=eva_file, tokenizer=bert)
    folder = conversion.save(tmp_path / "out", processor=processor, progress=False)
    model, loading = model_class.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    assert all(name.startswith("lm_head.") for name in loading["unexpected_keys"])
    whole = conversion.build().state_dict()
    require_equal(model.state_dict(), {name: whole[name] for name in model.state_dict()})


def test_a_frozen_language_model_in_half_precision(tmp_path, eva_file):
    """The whole is float32, which rounds nothing, unless another dtype is asked for."""
    opt_model().half().save_pretrained(tmp_path / "half")
    opt_tokenizer().save_pretrained(tmp_path / "half")
    path = lavis_file(tmp_path / "stage2.pth", lavis_state("opt_proj"))
    for dtype, expected in ((None, torch.float32), (torch.float16, torch.float16)):
        conversion, processor, _ = read_blip2(path, vision=eva_file, language_model=tmp_path / "half", dtype=dtype)
        model = conversion.build()
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        folder = conversion.save(tmp_path / str(expected), processor=processor, progress=False)
        require_equal(MMBlip2ForConditionalGeneration.from_pretrained(folder).state_dict(), model.state_dict())


def test_repeated_tied_tensors_are_read_once(tmp_path):
    """As older folders have them."""
    theirs = generation_peer("opt")
    folder = save_peer(theirs, tmp_path / "hub", opt_tokenizer())
    state, name = read_tensors(folder), "language_model.lm_head.weight"
    state[name] = state["language_model.model.decoder.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors")
    once = read_blip2(folder)[0].build()
    assert once.language_model.lm_head.weight is once.language_model.get_input_embeddings().weight


def test_a_folder_of_theirs_that_is_not_whole(tmp_path, bert):
    folder = save_peer(retrieval_peer(), tmp_path / "hub", BertTokenizer.from_pretrained(bert, bos_token="[DEC]"))
    state = read_tensors(folder)
    save_file(without(state, "qformer.encoder.layer.3.output_query.dense.bias"), folder / "model.safetensors")
    with pytest.raises(ConversionError, match="qformer.layers.3.query_mlp.fc2.bias"):
        read_blip2(folder)
    save_file({**state, "qformer.pooler.weight": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ConversionError, match="qformer.pooler.weight"):
        read_blip2(folder)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json of type blip-2"):
        read_blip2(folder)


def test_the_published_q_former_has_the_default_config():
    """Its shapes as the specification lists them; `[DEC]` is the last of 30,523 words."""
    bert = "Qformer.bert"
    shapes = {
        "query_tokens": (1, 32, 768),
        f"{bert}.embeddings.word_embeddings.weight": (30523, 768),
        f"{bert}.embeddings.position_embeddings.weight": (512, 768),
        **{f"{bert}.encoder.layer.{i}.intermediate_query.dense.weight": (3072, 768) for i in range(12)},
        **{f"{bert}.encoder.layer.{i}.crossattention.self.key.weight": (768, 1408) for i in range(0, 12, 2)},
    }
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert qformer_config(tensors).to_dict() == MMBlip2QFormerConfig().to_dict()


def test_what_lavis_cannot_be(tmp_path, bert, stage1, eva_file):
    folder = save_peer(retrieval_peer(), tmp_path / "hub", BertTokenizer.from_pretrained(bert, bos_token="[DEC]"))
    with pytest.raises(ValueError, match="heads that a MMBlip2ForImageTextRetrieval lacks"):
        export_lavis(read_blip2(folder)[0].build())
    model = read_blip2(stage1, vision=eva_file, tokenizer=bert)[0].build()
    model.config.vision_norm_eps, model.config.vision_class_token = 1e-6, False
    with pytest.raises(ValueError, match="no vision_norm_eps = 1e-06, no features without the class token"):
        export_lavis(model)


def test_what_transformers_cannot_be(tmp_path, bert, stage1, opt, eva_file):
    clip = tmp_path / clip_sources(tmp_path)["flat"]
    conversion, processor, _ = read_blip2(stage1, vision=clip, tokenizer=bert)
    with pytest.raises(ValueError, match="no tower of type mm_clip_vision, no vision_feature_layer = -2"):
        save_as_transformers(conversion.build(), processor, tmp_path / "back")
    path = lavis_file(tmp_path / "stage2.pth", lavis_state("opt_proj"))
    model = read_blip2(path, vision=eva_file, language_model=opt)[0].build()
    with pytest.raises(ValueError, match="no word -200 for a picture in a vocabulary of 272"):
        export_transformers(model)
    assert not (tmp_path / "back").exists()


def test_what_transformers_leaves_out_is_said(tmp_path, bert, stage1, eva_file, caplog, monkeypatch):
    conversion, processor, _ = read_blip2(stage1, vision=eva_file, tokenizer=bert)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = save_as_transformers(conversion.build(), processor, tmp_path / "back")
    assert any("eps, 1e-06, not 1e-05" in message for message in caplog.messages)
    assert any("no lm_head, temperature: left out" in message for message in caplog.messages)
    theirs = Blip2ForImageTextRetrieval.from_pretrained(folder)
    theirs.vision_model.post_layernorm.eps = 1e-5
    require_same_retrieval(conversion.build(), theirs, 1e-9)


def test_an_unwhole_language_model_is_refused(tmp_path, eva_file, opt):
    state = load_file(opt / "model.safetensors")
    opt_model().save_pretrained(tmp_path / "lm")
    opt_tokenizer().save_pretrained(tmp_path / "lm")
    name = "model.decoder.layers.1.fc2.bias"
    save_file(without(state, name), tmp_path / "lm" / "model.safetensors", metadata={"format": "pt"})
    path = lavis_file(tmp_path / "stage2.pth", lavis_state("opt_proj"))
    with pytest.raises(ConversionError, match=name):
        read_blip2(path, vision=eva_file, language_model=tmp_path / "lm")
