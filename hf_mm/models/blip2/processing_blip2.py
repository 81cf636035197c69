"""Processor of BLIP-2: pictures, and texts in which a mark stands for the soft tokens of a picture."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import AutoTokenizer
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.utils.generic import to_py_obj

from ...image_utils import deal_out, is_nest
from ..clip.tokenization_clip import check_texts
from .text_blip2 import QUESTION_TEMPLATE, SHORT_ANSWER_TEMPLATE, clean_caption, clean_question, split_prefix

STAGE_1_MODES = ("contrastive", "matching", "generation")
STAGE_2_MODES = ("generation", "caption", "vqa", "prefix_lm")
MATCHING_LENGTH = 35  # of the published retrieval evaluation
QFORMER_FOLDER = "qformer_tokenizer"
IMAGE_TOKEN = "<image>"
IGNORED = -100
PICTURE_KEYS = ("image", "url", "path", "base64")  # of an item of a message


class MMBlip2Processor(ProcessorMixin):
    """Prepares pictures and texts for a BLIP-2 model of either stage.

    Without `num_query_tokens` it serves the Q-Former alone (stage 1) and `tokenizer` is the Q-Former's. With it, it
    serves the model with a language model (stage 2), `tokenizer` is the language model's and stays as it is, and every
    `image_token` in a text becomes the soft tokens of a picture: ``"<image> a photo of"``. A text without any has its
    one picture before it. White space among the pictures that begin a text is dropped; all else is tokenised as it
    stands, each piece between two pictures by itself.

    A decoder-only language model is given ``[pictures][start token][text]``, padded on the left to generate and on the
    right to train; an encoder-decoder ``[pictures][text][end token]``, padded on the right (section 3.2 of the paper).

    Args:
        image_processor: of the vision tower.
        tokenizer: of the Q-Former in stage 1, of the language model in stage 2.
        qformer_tokenizer: of the Q-Former in stage 2, where questions enter it too.
        num_query_tokens: soft tokens a picture, as in the model's config; None in stage 1.
        image_token: what stands for a picture in a text.
        image_token_id: what stands for one soft token in `input_ids`, as in the model's config: an id that no word has.
        is_encoder_decoder: whether the language model is.
        bos_first: whether the tokenizer's start token comes before the pictures that begin a text, for language models
            that need a real token first. The published models have it after them.
        eos: what ends a text, the id or the text of one token: ``"\\n"`` for the published OPT models, ``"."`` for a
            small one that knows no other. The tokenizer's end token by default.
        prompt: the text where none is given.
        question_template: what questions are put into, with ``{}`` for the question. By default ``"Question: {} Short
            answer:"`` for encoder-decoders and ``"Question: {} Answer:"`` for others.
        max_text_length: tokens, start and end included, that what is learnt is cut to in training, and with it the
            prompts of an encoder-decoder. Questions, and what a decoder-only model goes on from, are never cut.
        clean_text: whether captions and questions are cleaned as in the published training. Prompts and answers never
            are.
    """

    text_kwargs = {"padding": True}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        qformer_tokenizer=None,
        num_query_tokens: int | None = None,
        image_token: str = IMAGE_TOKEN,
        image_token_id: int = -200,
        is_encoder_decoder: bool = False,
        bos_first: bool = False,
        eos: str | int | None = None,
        prompt: str = "",
        question_template: str | None = None,
        max_text_length: int = 32,
        clean_text: bool = True,
        chat_template: str | dict[str, str] | None = None,
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        if question_template is None:
            question_template = SHORT_ANSWER_TEMPLATE if is_encoder_decoder else QUESTION_TEMPLATE
        self.qformer_tokenizer = qformer_tokenizer
        self.num_query_tokens = num_query_tokens
        self.image_token = image_token
        self.image_token_id = image_token_id
        self.is_encoder_decoder = is_encoder_decoder
        self.bos_first = bos_first
        self.eos = eos
        self.prompt = prompt
        self.question_template = question_template
        self.max_text_length = max_text_length
        self.clean_text = clean_text
        self._check_settings()

    def _check_settings(self):
        if self.num_query_tokens is None and self.qformer_tokenizer is not None:
            raise ValueError("Without num_query_tokens, tokenizer is the Q-Former's: leave qformer_tokenizer out.")
        if self.num_query_tokens is not None and self.num_query_tokens < 1:
            raise ValueError(f"num_query_tokens must be at least 1, not {self.num_query_tokens}.")
        if not self.image_token:
            raise ValueError("image_token must not be empty: give the text that stands for a picture.")
        if 0 <= self.image_token_id < len(self.tokenizer) and self.num_query_tokens is not None:
            word = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
            if word != self.image_token:
                raise ValueError(
                    f"image_token_id {self.image_token_id} is the word {word!r} of the tokenizer: give the id of "
                    f"{self.image_token!r} or one that no word has, such as -200."
                )
        if self.question_template.count("{}") != 1:
            raise ValueError(f"question_template must have one {{}} for the question: {self.question_template!r}.")
        if self.max_text_length < 3:
            raise ValueError(f"max_text_length must be at least 3, not {self.max_text_length}.")
        if self.eos is not None:
            self.eos_token_id  # noqa: B018 - raises where it is not one token

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that every processor has; a `qformer_tokenizer` is saved and loaded here."""
        return ["image_processor", "tokenizer"]

    @property
    def model_input_names(self) -> list[str]:
        names = [*self.image_processor.model_input_names, "input_ids", "attention_mask"]
        if self.qformer_tokenizer is not None:
            names += ["qformer_input_ids", "qformer_attention_mask"]
        return names

    @property
    def eos_token_id(self) -> int:
        """What ends a text: the id that training learns and generation stops at.

        Raises:
            ValueError: `eos` is not one token, or there is none and the tokenizer has no end token.
        """
        if isinstance(self.eos, int):
            return self.eos
        if self.eos is None:
            # The Q-Former's texts are BERT's.
            end = self.tokenizer.eos_token_id if self.num_query_tokens is not None else self.tokenizer.sep_token_id
            if end is None:
                raise ValueError("The tokenizer has no end token: say what ends a text by eos, a token or its id.")
            return end
        number = self.tokenizer.convert_tokens_to_ids(self.eos)
        if number is not None and number != self.tokenizer.unk_token_id:
            return number
        ids = self._tokens(self.eos)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(
                f"eos must be one token of the tokenizer, but {self.eos!r} is {ids}: give another or an id."
            )
        return ids[0]

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        suffix: Any = None,
        mode: str | None = None,
        num_images: int | Sequence[int] | None = None,
        rng: np.random.Generator | Sequence | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepares a batch.

        Args:
            images: in stage 1 pictures in any nesting; in stage 2 one picture for each text, or for each text a list of
                pictures; a flat list of as many pictures as all texts have marks is dealt out in reading order.
                Pictures are what `hf_mm.image_utils.to_rgb` takes.
            text: one text or several. In stage 2 it is by default the `prompt`, for which an empty text stands too, as
                pipelines cannot leave it out; one prompt goes with all of several suffixes.
            suffix: what the model shall learn to say after each text: a caption or an answer. Makes `labels`.
            mode: in stage 1 ``"contrastive"`` (texts are cut to `max_text_length`, the default), ``"matching"`` (at
                least 35 tokens, as the published retrieval evaluation) or ``"generation"`` (what the Q-Former's captions
                go on from: without an end token, padded on the left); in stage 2

                - ``"generation"``, the default without suffix: the text is what the model shall go on from;
                - ``"caption"``, the default with one: the text is a prompt, the suffix a caption;
                - ``"vqa"``: the text is a question, the suffix, in training, its answer;
                - ``"prefix_lm"``: the text is a caption, of which the model is given a prefix and learns the rest.
            num_images: instead of images, how many pictures each text holds whose features the model will be given.
            rng: where ``"prefix_lm"`` splits: a generator or its seed, or for each text what `numpy.random.default_rng`
                takes, such as (seed, epoch, index).
            **kwargs: options of the image processor and the tokenizer (`padding`, `padding_side`, `pad_to_multiple_of`,
                `truncation`, `max_length`, `add_special_tokens`). In stage 2 `max_length` bounds the whole row,
                pictures included, and texts are cut in training (see `max_text_length`) but not to generate, unless
                `truncation` says otherwise.

        Returns:
            `pixel_values` ``(M, C, H, W)`` of all pictures in reading order; `input_ids` and `attention_mask`
            ``(N, T)``; to train, `labels`: of a decoder-only model ``(N, T)``, -100 but for the suffix, the end token and,
            where pictures come first and there is no prompt, the start token; of an encoder-decoder ``(N, T')``, the
            suffix as its tokenizer frames it; for questions, if there is a `qformer_tokenizer`, `qformer_input_ids` and
            `qformer_attention_mask` ``(M, Q)``, one row a picture.

        Raises:
            ValueError: there is nothing to process; the mode is unknown or does not go with the other arguments; a text
                is missing, no string, or empty where there must be one; a row's marks and pictures are not equally
                many; a picture would be cut off; a row exceeds `max_length` or the tokenizer's
                `model_max_length`.
        """
        if all(given is None for given in (images, text, suffix, num_images)):
            raise ValueError("Give images, text, or both: there is nothing to process.")
        options = self._merge_kwargs(**kwargs)
        tensor_type = kwargs.get("return_tensors", "pt")
        if self.num_query_tokens is None:
            if suffix is not None or num_images is not None or rng is not None:
                raise ValueError("suffix, num_images and rng are of stage 2: give num_query_tokens to the processor.")
            data = {} if text is None else self._encode_for_qformer(text, mode, options["text_kwargs"])
        else:
            data, images = self._encode_for_lm(images, text, suffix, mode, num_images, rng, options["text_kwargs"])
        if images is not None:
            data |= self.image_processor(images, **{**options["images_kwargs"], "return_tensors": tensor_type})
        return BatchFeature(data, tensor_type=tensor_type)

    def _encode_for_qformer(self, text: Any, mode: str | None, options: dict) -> dict[str, list]:
        mode = _known_mode(mode or "contrastive", STAGE_1_MODES, "without num_query_tokens")
        one, texts = isinstance(text, str), check_texts(text)
        texts = [texts] if one else texts
        if self.clean_text:
            texts = [clean_caption(row) for row in texts]
        if mode == "generation":
            return _encode_beginnings(self.tokenizer, texts)
        longest = self.max_text_length if mode == "contrastive" else max(self.max_text_length, MATCHING_LENGTH)
        options = {"truncation": True, "max_length": longest, **options}
        return _encode_texts(self.tokenizer, texts, options)

    def _encode_for_lm(
        self,
        images: Any,
        text: Any,
        suffix: Any,
        mode: str | None,
        num_images: int | Sequence[int] | None,
        rng: np.random.Generator | Sequence | None,
        options: dict,
    ) -> tuple[dict[str, list], list | None]:
        default = "generation" if suffix is None else "caption"
        mode = _known_mode(mode or default, STAGE_2_MODES, "with num_query_tokens")
        self._check_arguments(mode, text, suffix, rng)
        images = list(images) if images is not None and is_nest(images) else images
        one, texts, suffixes = self._rows(images, text, suffix, num_images)
        if mode in ("generation", "caption"):
            texts = [words or self.prompt for words in texts]
        for row, words in enumerate(suffixes or ()):
            if self.image_token in words:
                raise ValueError(f"Suffix {row} has a picture: pictures belong into text, what is learnt is words.")
        marks = [row.count(self.image_token) for row in texts]
        counts, images = deal_out(images, marks, one, num_images)
        texts = [self._marked(row, texts[row], *pair) for row, pair in enumerate(zip(marks, counts, strict=True))]
        data = {}
        if mode == "vqa":
            texts, questions = zip(*map(self._ask, texts, range(len(texts))), strict=True)
            data |= self._encode_questions(questions, counts)
        elif mode == "prefix_lm":
            texts, suffixes = self._split_captions(texts, rng)
        elif mode == "caption" and self.clean_text:
            suffixes = list(map(clean_caption, suffixes))
        for row, words in enumerate(suffixes or ()):
            if not words.strip():
                raise ValueError(f"Suffix {row} is empty: fill the caption or answer in or leave its row out.")
        return self._encode_rows(texts, suffixes, mode, options) | data, images or None

    def _marked(self, row: int, text: str, marks: int, pictures: int) -> str:
        """The text with a mark for each of its pictures: where it has none, the only picture comes first."""
        if (marks, pictures) == (0, 1):
            return self.image_token + text
        if marks != pictures:
            raise ValueError(
                f"Text {row} has {marks} image tokens for {pictures} pictures: write one for each picture, or none where "
                "the only picture comes first."
            )
        return text

    def _check_arguments(self, mode: str, text: Any, suffix: Any, rng: Any) -> None:
        if mode == "caption" and suffix is None:
            raise ValueError("mode 'caption' learns captions: give them as suffix, and a prompt, if any, as text.")
        if mode == "generation" and suffix is not None:
            raise ValueError("mode 'generation' learns nothing: leave suffix out, or say mode='caption' or 'vqa'.")
        if mode == "prefix_lm" and (suffix is not None or rng is None):
            raise ValueError("mode 'prefix_lm' draws the suffix from the text: leave suffix out and give rng.")
        if mode in ("vqa", "prefix_lm") and text is None:
            raise ValueError(f"mode '{mode}' needs text: {'questions' if mode == 'vqa' else 'captions'}.")

    def _rows(
        self, images: Any, text: Any, suffix: Any, num_images: int | Sequence[int] | None
    ) -> tuple[bool, list[str], list[str] | None]:
        """Whether a single text was given, all texts, and their suffixes."""
        suffixes = None if suffix is None else check_texts(suffix)
        if text is None and suffix is None:
            rows = images if images is not None else num_images
            one = isinstance(rows, int) or not is_nest(rows)
            return one, [self.prompt] * (1 if one else len(rows)), None
        text = self.prompt if text is None else check_texts(text)
        one = isinstance(text, str) and not isinstance(suffixes, list)
        if isinstance(suffixes, str):
            suffixes = [suffixes]
        if isinstance(text, str):
            text = [text] * (1 if suffixes is None else len(suffixes))
        if suffixes is not None and len(suffixes) != len(text):
            raise ValueError(f"There are {len(text)} texts but {len(suffixes)} suffixes: give one each.")
        return one, text, suffixes

    def _ask(self, text: str, row: int) -> tuple[str, str]:
        """A question in the template after the pictures that begin it, and the question alone."""
        pieces = text.split(self.image_token)
        if self.clean_text:
            pieces = list(map(clean_question, pieces))
        pictures, pieces = _leading_pictures(pieces)
        question = " ".join(" ".join(pieces).split())
        if not question:
            raise ValueError(f"Question {row} is empty: fill it in or leave its row out.")
        asked = self.question_template.replace("{}", self.image_token.join(pieces).strip(" "))
        return self.image_token * pictures + asked, question

    def _encode_questions(self, questions: Sequence[str], counts: list[int]) -> dict[str, list]:
        asked = list(
            chain.from_iterable([question] * count for question, count in zip(questions, counts, strict=True))
        )
        if self.qformer_tokenizer is None or not asked:
            return {}
        options = {"padding": True, "truncation": True, "max_length": self.max_text_length}
        encoded = _encode_texts(self.qformer_tokenizer, asked, options)
        return {f"qformer_{name}": rows for name, rows in encoded.items()}

    def _split_captions(self, texts: list[str], rng: np.random.Generator | Sequence) -> tuple[list[str], list[str]]:
        if isinstance(rng, int | np.integer):
            rng = np.random.default_rng(rng)
        rngs = [rng] * len(texts) if isinstance(rng, np.random.Generator) else list(rng)
        if len(rngs) != len(texts):
            raise ValueError(f"rng has {len(rngs)} seeds for {len(texts)} texts: give one each, or a numpy Generator.")
        prefixes, suffixes = [], []
        for row, (text, seed) in enumerate(zip(texts, rngs, strict=True)):
            pictures, (caption, *others) = _leading_pictures(text.split(self.image_token))
            if others:
                raise ValueError(
                    f"Caption {row} has a picture within it: only pictures before a caption can be learnt from."
                )
            caption = clean_caption(caption) if self.clean_text else caption
            if not caption.strip():
                raise ValueError(f"Caption {row} is empty: fill it in or leave its row out.")
            prefix, suffix = split_prefix(caption, np.random.default_rng(seed))
            prefixes.append(self.image_token * pictures + prefix)
            suffixes.append(suffix)
        return prefixes, suffixes

    def _encode_rows(
        self, texts: Sequence[str], suffixes: list[str] | None, mode: str, options: dict
    ) -> dict[str, list]:
        training = suffixes is not None
        special = options.get("add_special_tokens", True)
        encoded = {text: self._encode_prompt(text, special) for text in dict.fromkeys(texts)}  # many share theirs
        prompts = [encoded[text] for text in texts]
        cut = options.get("truncation", training) not in (None, False, "do_not_truncate")
        limit = self.max_text_length if cut else None
        if not training:
            limit = options.get("max_length") or self.tokenizer.model_max_length
            rows, labels = [prompt.cut(limit if cut else None, row) for row, prompt in enumerate(prompts)], None
        elif self.is_encoder_decoder:
            longest = None if mode == "vqa" else limit
            rows = [prompt.cut(longest and prompt.num_slots + longest, row) for row, prompt in enumerate(prompts)]
            labels = [self._encode_target(suffix, limit) for suffix in suffixes]
        else:
            pairs = zip(prompts, suffixes, strict=True)
            rows, labels = zip(*(self._encode_continued(*pair, limit) for pair in pairs), strict=True)
        self._refuse_long_rows(rows, options)
        side = options.get("padding_side") or ("right" if training or self.is_encoder_decoder else "left")
        width = _width(rows, options, self.tokenizer.model_max_length)
        data = {
            "input_ids": _padded(rows, width, self._pad_id, side),
            "attention_mask": _padded([[1] * len(row) for row in rows], width, 0, side),
        }
        if labels is not None:
            if self.is_encoder_decoder:
                width = _width(labels, options | {"max_length": self.max_text_length}, self.max_text_length)
            data["labels"] = _padded(labels, width, IGNORED, side)
        return data

    def _encode_prompt(self, text: str, add_special_tokens: bool) -> "_Prompt":
        slots = [self.image_token_id] * self.num_query_tokens
        pictures, (piece, *others) = _leading_pictures(text.split(self.image_token))
        begin, end = self._special_ids if add_special_tokens else ([], [])
        last = self._tokens(piece)
        body = last
        for piece in others:
            last = self._tokens(piece)
            body = body + slots + last
        first = slots * pictures
        ids = begin + first + body if self.bos_first else first + begin + body
        learns_begin = pictures and not body and not self.bos_first
        targets = [IGNORED] * len(first) + begin if learns_begin else [IGNORED] * len(ids)
        # A decoder-only model goes on from its prompt, which an end token would have ended.
        return _Prompt(ids, end if self.is_encoder_decoder else [], targets, self.image_token_id, piece, last)

    def _encode_continued(self, prompt: "_Prompt", suffix: str, limit: int | None) -> tuple[list[int], list[int]]:
        """Ids and labels of a decoder-only model: the prompt and, after it, what is learnt."""
        glue = " " if prompt.last_text and not (prompt.last_text[-1].isspace() or suffix[0].isspace()) else ""
        learnt = self._tokens(prompt.last_text + glue + suffix)
        known = len(prompt.last_ids)
        # What the model sees when it generates is the prompt tokenised alone.
        learnt = learnt[known:] if learnt[:known] == prompt.last_ids else self._tokens(glue + suffix)
        learnt = self._without_end(learnt)
        if limit is not None:
            learnt = learnt[: limit - 1 - sum(target != IGNORED for target in prompt.targets)]
        learnt = [*learnt, self.eos_token_id]
        return prompt.ids + learnt, prompt.targets + learnt

    def _encode_target(self, suffix: str, limit: int | None) -> list[int]:
        """Labels of an encoder-decoder: what is learnt, framed as its tokenizer does."""
        begin, end = self._special_ids
        end = end if end and self.eos is None else [self.eos_token_id]
        learnt = self._without_end(self._tokens(suffix))
        return begin + (learnt if limit is None else learnt[: limit - len(begin) - len(end)]) + end

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids[-1:] == [self.eos_token_id] else ids

    def _refuse_long_rows(self, rows: Sequence[list[int]], options: dict) -> None:
        limit = min(options.get("max_length") or self.tokenizer.model_max_length, self.tokenizer.model_max_length)
        for number, row in enumerate(rows):
            if len(row) > limit:
                raise ValueError(
                    f"Row {number} has {len(row)} tokens, pictures included, for {limit} positions: shorten its text, or "
                    "to generate pass truncation=True."
                )

    def _tokens(self, text: str) -> list[int]:
        if not text:
            return []
        return list(self.tokenizer(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"])

    @property
    def _special_ids(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        encoded = self.tokenizer("a", return_special_tokens_mask=True, truncation=False, padding=False)
        ids, mask = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
        if 0 not in mask:
            raise ValueError("The tokenizer drops the text 'a': give one that has a token for words it does not know.")
        begin, end = mask.index(0), mask[::-1].index(0)
        return ids[:begin], ids[len(ids) - end :]

    @property
    def _pad_id(self) -> int:
        """Any id will do: the attention mask tells what is padding."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(number for number in ids if number is not None)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[dict] | None = None,
        processor_kwargs: dict | None = None,
        **kwargs,
    ) -> Any:
        """Renders conversations by the processor's template or else the language model's, as transformers does.

        Most language models know no pictures: where the template does not write `image_token` for an item
        ``{"type": "image"}``, the items of each message become one text, in which it stands.

        Raises:
            ValueError: there is no template; an item is neither text nor picture; a mask of the assistant's tokens is
                wanted, which pictures would shift.
        """
        if kwargs.get("return_assistant_tokens_mask"):
            raise ValueError("return_assistant_tokens_mask is not for texts with pictures: leave it out.")
        if chat_template is None and self.chat_template is None:
            template = self.tokenizer.get_chat_template(tools=tools)
        else:
            template = self._resolve_chat_template(chat_template)
        processor_kwargs = dict(processor_kwargs or {})
        if not self._writes_pictures(template):
            conversations, several = self._normalize_conversations(conversation)
            images = [self._pictures(messages) for messages in conversations]
            texts = [list(map(self._as_text, messages)) for messages in conversations]
            conversation = texts if several else texts[0]
            if any(images):
                processor_kwargs.setdefault("images", images if several else images[0])
        return super().apply_chat_template(
            conversation, template, tools=tools, processor_kwargs=processor_kwargs, **kwargs
        )

    def _writes_pictures(self, template: str) -> bool:
        content = [{"type": "image"}, {"type": "text", "text": "a"}]
        try:
            rendered, _ = render_jinja_template(
                [[{"role": "user", "content": content}]], chat_template=template, **self.tokenizer.special_tokens_map
            )
        except (jinja2.TemplateError, TypeError):
            return False
        return self.image_token in rendered[0]

    def _pictures(self, messages: list[dict]) -> list:
        for message in messages:
            if message.get("content") is None and not message.get("tool_calls"):
                raise ValueError(f"A message needs a content, a text or a list of items, but one is {message}.")
        contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
        items = [item for item in chain(*contents) if item.get("type") == "image"]
        return [_picture(item[key], key) for item in items for key in PICTURE_KEYS if key in item]

    def _as_text(self, message: dict) -> dict:
        if not isinstance(message.get("content"), list):
            return message
        parts = []
        for item in message["content"]:
            if item.get("type") not in ("image", "text"):
                raise ValueError(f"An item of a message must be a text or an image, not {item.get('type')!r}.")
            if item["type"] == "text" and not isinstance(item.get("text"), str):
                raise ValueError(f"An item of type text needs its text, but one is {item}.")
            parts.append(self.image_token if item["type"] == "image" else item["text"])
        return {**message, "content": "".join(parts)}

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, input_ids: Any = None, **kwargs) -> Any:
        """The text of one sequence, or of each of several, without pictures and white space around it.

        Args:
            token_ids: what the model generated, or any ids.
            skip_special_tokens: leave the tokenizer's special tokens out.
            input_ids: what it was given: then the text is only what it added, up to the end token.
            **kwargs: of the tokenizer's `decode`.
        """
        rows, several = _as_rows(token_ids)
        if input_ids is not None:
            rows = [self._added(row, _as_rows(input_ids)[0][0]) for row in rows]
        texts = [text.strip() for text in self._texts(rows, skip_special_tokens, kwargs)]
        return texts if several else texts[0]

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs) -> list[str]:
        """The text of each sequence, see `decode`."""
        sequences = to_py_obj(sequences)
        return self.decode(sequences, skip_special_tokens, **kwargs) if len(sequences) else []

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, input_ids: Any = None, **kwargs
    ) -> list[str]:
        """The text of each generated sequence, see `decode`.

        Without `input_ids` white space at the end stays, unless it is the end token: by it the pipeline finds a prompt
        that ends in some at the beginning of what was generated.
        """
        if input_ids is not None:
            return self.batch_decode(generated_outputs, skip_special_tokens, input_ids=input_ids, **kwargs)
        texts = [text.lstrip() for text in self._texts(_as_rows(generated_outputs)[0], skip_special_tokens, kwargs)]
        has_end = self.eos is not None or self.tokenizer.eos_token_id is not None
        end = self.tokenizer.decode([self.eos_token_id]) if has_end else ""
        return [text.removesuffix(end) for text in texts] if end.isspace() else texts

    def _texts(self, rows: list[list[int]], skip_special_tokens: bool, options: dict) -> list[str]:
        words = [[number for number in row if number >= 0 and number != self.image_token_id] for row in rows]
        return [self.tokenizer.decode(row, skip_special_tokens=skip_special_tokens, **options) for row in words]

    def _added(self, row: list[int], given: list[int]) -> list[int]:
        added = row[1:] if self.is_encoder_decoder else row[len(given) :]
        return added[: added.index(self.eos_token_id)] if self.eos_token_id in added else added

    def to_dict(self) -> dict[str, Any]:
        """All settings; a `qformer_tokenizer` by the name of its folder."""
        own = self.qformer_tokenizer
        bare = copy.copy(self)
        bare.qformer_tokenizer = None
        settings = super(MMBlip2Processor, bare).to_dict()
        settings["qformer_tokenizer"] = None if own is None else QFORMER_FOLDER
        return settings

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Saves everything, a `qformer_tokenizer` in a folder of its own."""
        files = super().save_pretrained(save_directory)
        if self.qformer_tokenizer is not None:
            self.qformer_tokenizer.save_pretrained(os.path.join(save_directory, QFORMER_FOLDER))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs) -> list:
        arguments = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        folder = processor_dict.pop("qformer_tokenizer", None)
        if folder is None:
            return arguments
        kwargs["subfolder"] = os.path.join(kwargs.get("subfolder", ""), folder)
        return [*arguments, AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)]


@dataclass
class _Prompt:
    """What a language model is given, as ids.

    Args:
        ids: pictures, start token and text.
        end: what ends the encoder's text.
        targets: labels of `ids` for a decoder-only model.
        slot: the id of a soft token.
        last_text: the piece of text after the last picture that is not at the beginning.
        last_ids: its ids.
    """

    ids: list[int]
    end: list[int]
    targets: list[int]
    slot: int
    last_text: str
    last_ids: list[int]

    @property
    def num_slots(self) -> int:
        return self.ids.count(self.slot)

    def cut(self, length: int | None, row: int) -> list[int]:
        """The ids, cut to a length with the end kept.

        Raises:
            ValueError: a picture would be cut off.
        """
        if length is None or len(self.ids) + len(self.end) <= length:
            return self.ids + self.end
        kept = self.ids[: max(length - len(self.end), 0)]
        if self.slot in self.ids[len(kept) :]:
            raise ValueError(
                f"Row {row} was cut to {length} tokens before the end of a picture: give it more, or less text."
            )
        return kept + self.end


def _as_rows(ids: Any) -> tuple[list[list[int]], bool]:
    """Ids of any kind as rows, and whether there were several."""
    ids = to_py_obj(ids)
    ids = list(ids) if isinstance(ids, (list, tuple)) else [ids]
    several = bool(ids) and isinstance(ids[0], (list, tuple))
    return (list(map(list, ids)) if several else [ids]), several


def _known_mode(mode: str, modes: Sequence[str], condition: str) -> str:
    if mode not in modes:
        raise ValueError(f"The mode {condition} must be one of {', '.join(modes)}, not {mode!r}.")
    return mode


def _leading_pictures(pieces: list[str]) -> tuple[int, list[str]]:
    """How many pictures begin a text, given the pieces between its pictures, and the pieces after them."""
    number = 0
    while number < len(pieces) - 1 and not pieces[number].strip():
        number += 1
    return number, pieces[number:]


def _picture(value: Any, key: str) -> Any:
    bare = key == "base64" and not value.startswith("data:")
    return f"data:image/png;base64,{value}" if bare else value


def _encode_texts(tokenizer: Any, texts: list[str], options: dict) -> dict[str, list]:
    """Ids and mask of texts for a Q-Former, start token first.

    Raises:
        ValueError: a text exceeds the tokenizer's `model_max_length`.
    """
    limit = tokenizer.model_max_length
    cut = options["truncation"] not in (None, False, "do_not_truncate")
    longest = min(options.get("max_length") or limit, limit)
    options = {**options, "max_length": longest if cut or options.get("padding") == "max_length" else None}
    fixed = {
        "padding_side": "right",
        "return_token_type_ids": False,
        "return_attention_mask": True,
        "return_tensors": None,
    }
    encoded = tokenizer(texts, **options | fixed)
    longest = max(map(len, encoded["input_ids"]))
    if not cut and longest > limit:
        raise ValueError(
            f"A text of {longest} tokens exceeds the {limit} positions: leave truncation on or shorten it."
        )
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def _encode_beginnings(tokenizer: Any, texts: list[str]) -> dict[str, list]:
    """Ids and mask of what captions go on from: the start token and the text, padded on the left."""
    rows = [[tokenizer.cls_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    if (longest := max(map(len, rows))) >= tokenizer.model_max_length:
        raise ValueError(
            f"A text of {longest} tokens leaves nothing of the {tokenizer.model_max_length} positions: shorten it."
        )
    padded = tokenizer.pad({"input_ids": rows}, padding_side="left", return_attention_mask=True)
    return {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}


def _width(rows: Sequence[list[int]], options: dict, limit: int) -> int | None:
    """How long padding makes rows; None where there is none."""
    padding = options.get("padding")
    if padding in (None, False, "do_not_pad"):
        return None
    width = max(map(len, rows))
    if padding == "max_length":
        width = max(width, options.get("max_length") or limit)
        if width >= VERY_LARGE_INTEGER:
            raise ValueError("padding='max_length' needs max_length: the tokenizer knows no longest text.")
    multiple = options.get("pad_to_multiple_of") or 1
    return -(-width // multiple) * multiple


def _padded(rows: Sequence[list[int]], width: int | None, fill: int, side: str) -> list[list[int]]:
    if width is None:
        return list(rows)
    pads = [[fill] * (width - len(row)) for row in rows]
    return [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]


__all__ = ["MMBlip2Processor"]
