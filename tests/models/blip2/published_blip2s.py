"""Tiny BLIP-2 checkpoints as LAVIS and transformers publish them, and what a conversion of them must equal."""

import re

import torch
from contract.published import Drawn, openai_vit
from contract.published import eva_state as published_eva_state
from contract.published_blip2 import lavis_content
from contract.published_blip2 import lavis_state as published_lavis_state
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
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

from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config
from hf_mm.models.clip.configuration_clip import MMClipVisionConfig
from hf_mm.models.eva_vit.configuration_eva_vit import EvaViTConfig

QUERIES, WIDTH, LAYERS, MLP, JOINT, PLACES = 5, 64, 4, 96, 24, 16
TOWER = {"width": 64, "mlp": 80, "side": 28, "patch": 14}
WORDS = ["a", "red", "blue", "cat", "dog", "photo", "of", "the", "on", "left"]
VOCABULARY = 5 + len(WORDS) + 1  # with [DEC]
LM_WIDTH = 40


# Tokenizers


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


def tower_config(side=TOWER["side"]):
    """EVA's, with a head of 64."""
    return EvaViTConfig(
        hidden_size=TOWER["width"],
        intermediate_size=TOWER["mlp"],
        num_hidden_layers=3,
        num_attention_heads=1,
        image_size=side,
        patch_size=TOWER["patch"],
    )


def eva_state(prefix="", side=TOWER["side"]):
    return published_eva_state(tower_config(side), prefix=prefix)


def clip_state(prefix="", blocks=24):
    """``clip_vit_L.pth``: CLIP's picture tower in OpenAI's names; after all blocks, norm and projection."""
    config = MMClipVisionConfig(
        hidden_size=TOWER["width"],
        intermediate_size=TOWER["mlp"],
        num_hidden_layers=blocks,
        num_attention_heads=1,
        image_size=TOWER["side"],
        patch_size=TOWER["patch"],
    )
    state = Drawn()
    openai_vit(state, config, 32)
    left_out = () if blocks == 24 else ("visual.ln_post.weight", "visual.ln_post.bias", "visual.proj")
    return {prefix + name.removeprefix("visual."): tensor for name, tensor in state.items() if name not in left_out}


def lavis_state(projection=""):
    """The trained part of stage 1, or of stage 2 where a projection is named."""
    qformer = {
        "num_query_tokens": QUERIES,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 1,
        "intermediate_size": MLP,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": PLACES,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": VOCABULARY - 1,
    }
    config = MMBlip2Config(vision_config=tower_config(), qformer_config=qformer, joint_dim=JOINT)
    return published_lavis_state(config, projection, LM_WIDTH)


def lavis_file(path, state):
    """What LAVIS's runner saves."""
    torch.save(lavis_content(state), path)
    return path


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


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


def read_tensors(folder):
    return load_file(folder / "model.safetensors")
