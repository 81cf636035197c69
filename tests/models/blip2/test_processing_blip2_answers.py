"""What a language model said, as BLIP-2's processor reads it: by itself, in chats and in pipelines."""

import base64

import numpy as np
import pytest
import torch
from small_processors import CHAT, IGNORED, QUERIES, SLOT, A, B, pieces, rows
from transformers import ImageTextToTextPipeline, OPTConfig, OPTForCausalLM

from hf_mm.models.blip2.processing_blip2 import MMBlip2Processor

# Texts of what was generated


def test_decoding(opt_processor, opt):
    batch = opt_processor(images=[A, B], text=["a photo of", "a"])
    new = [pieces(opt, text, "\n") for text in (" a cat", " photo")]
    new = [ids + [opt.pad_token_id] * (8 - len(ids)) for ids in new]
    generated = torch.cat([batch.input_ids, torch.tensor(new)], dim=1)
    assert opt_processor.batch_decode(generated, skip_special_tokens=True) == ["a photo of a cat", "a photo"]
    assert opt_processor.post_process_image_text_to_text(generated) == ["a photo of a cat", "a photo"]
    assert opt_processor.post_process_image_text_to_text(generated, input_ids=batch.input_ids) == ["a cat", "photo"]
    assert opt_processor.decode(generated[0], skip_special_tokens=True, input_ids=batch.input_ids[0]) == "a cat"
    assert opt_processor.decode(generated[0].tolist(), skip_special_tokens=True) == "a photo of a cat"
    assert opt_processor.decode(SLOT) == ""
    assert opt_processor.decode([]) == ""
    assert opt_processor.batch_decode(np.array(generated)[:1], skip_special_tokens=True) == ["a photo of a cat"]
    assert opt_processor.batch_decode([]) == []


def test_decoding_an_encoder_decoder(t5_processor, t5):
    batch = t5_processor(images=A, text="a photo of")
    generated = torch.tensor([[t5.pad_token_id, *pieces(t5, "a cat"), t5.eos_token_id, t5.pad_token_id]])
    assert t5_processor.post_process_image_text_to_text(generated) == ["a cat"]
    assert t5_processor.post_process_image_text_to_text(generated, input_ids=batch.input_ids) == ["a cat"]


# Chats

RENDERED = "<|im_start|>system\na<|im_end|>\n<|im_start|>user\n<image>what is it?<|im_end|>\n<|im_start|>assistant\n"


def test_chats_by_the_template_of_the_language_model(image_processor, chat):
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES)
    options = {"add_generation_prompt": True}
    assert processor.apply_chat_template(CHAT, **options) == RENDERED
    assert processor.apply_chat_template([CHAT, CHAT], **options) == [RENDERED] * 2
    options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template(CHAT, **options)
    before, after = RENDERED.split("<image>")
    assert batch.input_ids.tolist() == [pieces(chat, before, None, after)]
    assert batch.pixel_values.shape == (1, 3, 8, 8)
    two = processor.apply_chat_template([CHAT, CHAT[:1]], **options)
    assert rows(two)[0] == batch.input_ids[0].tolist()
    assert rows(two)[1] == pieces(chat, "<|im_start|>system\na<|im_end|>\n<|im_start|>assistant\n")
    assert two.pixel_values.shape[0] == 1
    without = processor.apply_chat_template(CHAT[:1], **options)
    assert set(without) == {"input_ids", "attention_mask"}
    assert CHAT[1]["content"][0] == {"type": "image", "image": A}


def test_features_in_chats(image_processor, chat):
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES)
    message = {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "image"}]}
    options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"num_images": 1}}
    batch = processor.apply_chat_template([message], **options)
    assert rows(batch) == [pieces(chat, "<|im_start|>user\na ", None, "<|im_end|>\n")]


def test_chats_by_a_template_of_its_own(image_processor, chat):
    template = (
        "{% for message in messages %}{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}[<image>]{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES, chat_template=template)
    assert processor.apply_chat_template(CHAT[1:]) == "[<image>]what is it?"
    batch = processor.apply_chat_template(CHAT[1:], tokenize=True, return_dict=True)
    assert rows(batch) == [pieces(chat, "[", None, "]what is it?")]


def test_pictures_of_chats_in_any_form(image_processor, chat, tmp_path):
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES)
    A.save(tmp_path / "a.png")
    code = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    url = f"data:image/png;base64,{code}"
    items = [
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image", "base64": code},
        {"type": "image", "base64": url},
        {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    batch = processor.apply_chat_template([{"role": "user", "content": items}], tokenize=True, return_dict=True)
    assert torch.equal(batch.pixel_values, processor(images=[A] * 5, text=["a"] * 5).pixel_values)
    assert (batch.input_ids == SLOT).sum() == 5 * QUERIES


def test_an_answer_in_a_chat_is_learnt(image_processor, chat):
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES)
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    batch = processor.apply_chat_template(CHAT, processor_kwargs={"suffix": "a cat"}, **options)
    given = processor.apply_chat_template(CHAT, **options).input_ids[0].tolist()
    learnt = [*pieces(chat, "a cat"), chat.eos_token_id]
    assert batch.input_ids.tolist() == [given + learnt]
    assert batch.labels.tolist() == [[IGNORED] * len(given) + learnt]


def test_wrong_chats(image_processor, chat, opt):
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES)
    with pytest.raises(ValueError, match="text or an image, not 'video'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "url": "a"}]}])
    with pytest.raises(ValueError, match="chat_template"):
        MMBlip2Processor(image_processor, opt, num_query_tokens=QUERIES).apply_chat_template(CHAT)


# Pipeline


class Parrot(OPTForCausalLM):
    """Says the same after every prompt, and knows what it was given."""

    def generate(self, input_ids, attention_mask, pixel_values=None, generation_config=None, **kwargs):
        self.given = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        return torch.cat([input_ids, self.words.expand(len(input_ids), -1)], dim=1)


def parrot(processor, text: str, dtype=torch.float32):
    tokenizer = processor.tokenizer
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        ffn_dim=8,
        word_embed_proj_dim=8,
    )
    model = Parrot(config).to(dtype)
    model.words = torch.tensor([[*pieces(tokenizer, text), processor.eos_token_id, tokenizer.pad_token_id]])
    return ImageTextToTextPipeline(model=model, processor=processor)


@pytest.mark.parametrize("text", ["a photo of", "<image>a photo of"])
def test_pipeline(opt_processor, opt, text, tmp_path):
    pipe = parrot(opt_processor, " a cat", torch.bfloat16)
    (answer,) = pipe(A, text=text)
    assert answer == {"input_text": text, "generated_text": f"{text} a cat"}
    assert pipe.model.given["input_ids"].tolist() == [pieces(opt, None, "</s>", "a photo of")]
    assert pipe.model.given["pixel_values"].dtype == torch.bfloat16
    (answer,) = pipe(A, text=text, return_full_text=False)
    assert answer["generated_text"].strip() == "a cat"
    A.save(tmp_path / "a.png")
    assert pipe(str(tmp_path / "a.png"), text=text) == pipe(A, text=text)
    several = pipe([A, B], text=[text, "a"], return_full_text=False)
    assert [answer["generated_text"].strip() for answer in several] == ["a cat"] * 2
    assert rows(pipe.model.given) == [pieces(opt, None, "</s>", "a photo of"), pieces(opt, None, "</s>", "a")]
    assert pipe.model.given["attention_mask"][1, 0] == 0


def test_questions_by_pipeline(opt_processor, opt):
    pipe = parrot(opt_processor, " red")
    (answer,) = pipe(A, text="what color is it?", mode="vqa", return_full_text=False)
    assert answer["generated_text"].strip() == "red"
    asked = "Question: what color is it? Answer:"
    assert pipe.model.given["input_ids"].tolist() == [pieces(opt, None, "</s>", asked)]


def test_chats_by_pipeline(image_processor, chat):
    pipe = parrot(MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES), "a cat")
    messages = [{"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "what is it?"}]}]
    (answer,) = pipe(text=messages)
    assert answer["generated_text"] == [*messages, {"role": "assistant", "content": "a cat"}]
    expected = pieces(chat, "<|im_start|>user\n", None, "what is it?<|im_end|>\n<|im_start|>assistant\n")
    assert pipe.model.given["input_ids"].tolist() == [expected]
    (answer,) = pipe(text=[*messages, {"role": "assistant", "content": [{"type": "text", "text": "it is "}]}])
    assert answer["generated_text"][-1]["content"] == [{"type": "text", "text": "it is a cat"}]


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "user"}, "A message needs a content, .* but one is {'role': 'user'}"),
        ({"role": "user", "content": [{"type": "text"}]}, "An item of type text needs its text, but one is"),
    ],
)
def test_messages_that_say_nothing_are_refused(image_processor, chat, message, sentence):
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES)
    with pytest.raises(ValueError, match=sentence):
        processor.apply_chat_template([message], tokenize=True)


def test_a_call_of_a_tool_needs_no_content(image_processor, chat):
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES)
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    for message in (call, {**call, "content": None}):
        template = "{% for message in messages %}{{ message.tool_calls[0].function.name }}{% endfor %}"
        assert processor.apply_chat_template([message], template) == "f"


def test_a_mask_of_the_assistants_tokens_is_refused(image_processor, chat):
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES)
    with pytest.raises(ValueError, match="return_assistant_tokens_mask is not for texts with pictures"):
        processor.apply_chat_template([], tokenize=True, return_assistant_tokens_mask=True)
