"""Trains BLIP-2 stage by stage, evaluates it, and saves it as a Hub repository folder.

    python training/train_blip2.py training/recipes/blip2_stage1_emoji.yaml
    python training/train_blip2.py training/recipes/blip2_stage2_emoji.yaml
    python training/train_blip2.py RECIPE.yaml --source PATH_TO_MY_PICTURES --output_dir outputs/mine
    torchrun --nproc_per_node 2 training/train_blip2.py RECIPE.yaml

The recipe's `stage` says what is trained:

- ``stage1``: a Q-Former on a frozen vision tower, by the contrastive, matching and generation loss;
- ``retrieval``: the same, gone on with, the tower too where `freeze_vision` is false;
- ``words``: soft tokens for a frozen language model, which does not run (`hf_mm.losses.words`; this project's own);
- ``stage2``: soft tokens for a frozen language model, by its own loss; from stage 1 or from ``words``;
- ``captioning`` and ``vqa``: stage 2, gone on with, the tower too where `freeze_vision` is false.

The vision tower's features of the pictures are computed once and kept beside the run (``--cache_features false`` computes
them in every step, from pictures that are augmented anew). The same command resumes a run that was stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from smollm2 import open_smollm2
from tokenizers.processors import TemplateProcessing
from torch import nn
from train_clip import CAPTIONS_FOR_VOCABULARY, MAX_HELD_OUT, Data, write_results
from train_pic2word import FEATURES, FeatureArguments, Views
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback

import hf_mm  # noqa: F401  registers the models
from hf_mm.composite.fingerprint import fingerprint
from hf_mm.composite.language_model import open_language_model
from hf_mm.composite.vision_tower import tower_image_processor
from hf_mm.data.augment import AugmentArguments, ImageAugmentation
from hf_mm.data.collators import (
    CaptionedFeatures,
    ContrastiveCollator,
    ImageTextDraws,
    LanguageCollator,
    QFormerCollator,
    WordCollator,
    at_model_size,
)
from hf_mm.data.emoji import load_emoji
from hf_mm.data.features import FeatureRows, compute_features, feature_spec, row_keys, view_key
from hf_mm.data.image_text import (
    BrokenRow,
    Columns,
    DataArguments,
    ImageText,
    ImageTextRows,
    any_caption,
    is_missing,
    no_text,
)
from hf_mm.data.sampling import GroupBatchSampler
from hf_mm.evaluation.captioning import coco_scorers, evaluate_captioning
from hf_mm.evaluation.embeddings import inference
from hf_mm.evaluation.image_text_matching import evaluate_image_text_matching
from hf_mm.evaluation.picture_gap import CaptionNLL, evaluate_picture_gap, other_rows
from hf_mm.evaluation.vqa import evaluate_vqa
from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config
from hf_mm.models.blip2.initialization_blip2 import DEC, init_from_bert, learn_wordpiece, resize_tower
from hf_mm.models.blip2.modeling_blip2 import MMBlip2ForConditionalGeneration
from hf_mm.models.blip2.modeling_blip2_base import MMBlip2PreTrainedModel
from hf_mm.models.blip2.modeling_blip2_stage1 import MMBlip2ForPreTraining
from hf_mm.models.blip2.processing_blip2 import IMAGE_TOKEN, MMBlip2Processor
from hf_mm.models.blip2.text_blip2 import clean_caption, clean_question
from hf_mm.trainers.blip2 import Blip2Trainer, Blip2TrainingArguments, WordWarmup, refuse_data_parallel
from hf_mm.trainers.callbacks import LiveProgress
from hf_mm.trainers.recipes import decisive_settings, is_finished, parse_recipe, refuse_other_sampling, starting_point

QFORMER_STAGES = ("stage1", "retrieval")
STAGES = (*QFORMER_STAGES, "words", "stage2", "captioning", "vqa")
QFORMER_TEXT = (  # fields of its config that its text brings
    *("use_text", "vocab_size", "max_position_embeddings"),
    *("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id"),
)
QFORMER_SHAPE = (  # and those that must agree
    *("num_query_tokens", "hidden_size", "num_hidden_layers", "intermediate_size", "cross_attention_frequency"),
    "encoder_hidden_size",
)
SPLITS = ("cell", "concept", "style")  # of the bundled pictures: known emoji in a new drawing, new emoji, a new artist
SMOLLM2 = "smollm2"
GROUP_BY_LENGTH = "group_by_length"
EXAMPLES = 20  # captions that the results show


@dataclass
class ModelArguments:
    """What is trained, and from what."""

    stage: str = field(default="stage1", metadata={"help": f"What is trained: {', '.join(STAGES)}."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the stage before, or of this one to go on with."}
    )
    vision_tower: str | None = field(
        default=None,
        metadata={"help": "Of a new stage 1: a vision encoder, or a model that has one; a folder or a Hub id."},
    )
    vision_feature_layer: int = field(
        default=-1, metadata={"help": "Of a new stage 1: whose tokens are read; -2 for the published CLIP ViT-L."}
    )
    qformer_config: dict | str | None = field(
        default=None, metadata={"help": "Config of a new Q-Former (in a recipe, or as JSON)."}
    )
    joint_dim: int = field(
        default=256,
        metadata={"help": "Of a new stage 1: width of the space in which pictures and texts are compared."},
    )
    qformer_tokenizer: str | None = field(
        default=None,
        metadata={"help": "Of a new stage 1: a tokenizer such as bert-base-uncased. Without it one is learnt."},
    )
    vocab_size: int = field(default=4096, metadata={"help": "Size of a vocabulary learnt from the captions."})
    bert: str | None = field(
        default=None, metadata={"help": "What a new Q-Former starts from, as the published one: bert-base-uncased."}
    )
    language_model: str | None = field(
        default=None,
        metadata={
            "help": f"After stage 1: a causal or encoder-decoder language model; a folder, a Hub id, or {SMOLLM2!r} for "
            "SmolLM2-135M-Instruct from its package."
        },
    )
    prompt: str | None = field(
        default=None,
        metadata={"help": "What every caption goes on from, as 'a photo of'. By default the model's own."},
    )
    end: str | None = field(
        default=None,
        metadata={
            "help": "What ends a caption, one token of the language model. By default, or where it is empty, its end token."
        },
    )
    bos_first: bool = field(
        default=False,
        metadata={
            "help": "Whether the language model's start token comes before the pictures, as small language models need. The "
            "published models have it after them."
        },
    )
    question_text: str | None = field(
        default=None,
        metadata={
            "help": "Of vqa: a stage 1 whose text half, which stage 2 dropped, lets questions enter the Q-Former."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Pixels a side, where these are not the tower's own: its table of positions is resized, once."
        },
    )
    freeze_vision: bool = field(default=True, metadata={"help": "Whether the vision tower stays as it is."})
    frozen_dtype: str = field(
        default="float32", metadata={"help": "Of the frozen parts: float32, bfloat16 or float16."}
    )
    blind: bool = field(
        default=False,
        metadata={"help": "Show features of zeros in place of pictures, to learn what can be said without sight."},
    )

    def __post_init__(self):
        value = self.qformer_config or {}
        self.qformer_config = json.loads(value) if isinstance(value, str) else value
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, not {self.stage!r}.")
        if self.frozen_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"frozen_dtype must be float32, bfloat16 or float16, not {self.frozen_dtype!r}.")
        if self.model_name_or_path is None and (self.stage != "stage1" or self.vision_tower is None):
            needed = "vision_tower or model_name_or_path" if self.stage == "stage1" else "model_name_or_path"
            raise ValueError(f"{self.stage} starts from something: set {needed}.")
        if self.blind and self.stage in QFORMER_STAGES:
            raise ValueError(f"{self.stage} compares pictures, which all are alike where blind is set: leave it out.")


@dataclass
class TextArguments:
    """What is read beside a picture."""

    described: bool = field(
        default=False,
        metadata={"help": "Of the bundled pictures: names, tags and groups mixed, in place of names alone."},
    )
    question_column: str = field(default="question", metadata={"help": "Of vqa: column of the questions."})


@dataclass
class EvaluationArguments:
    """How the trained model is evaluated."""

    eval_pictures: int = field(default=MAX_HELD_OUT, metadata={"help": "Pictures of a test set, at most."})
    rerank_candidates: int = field(
        default=128, metadata={"help": "Candidates of each query that the matching head ranks again."}
    )
    num_beams: int = field(default=5, metadata={"help": "Of generation."})
    max_new_tokens: int = field(default=30, metadata={"help": "Of generation."})
    min_new_tokens: int = field(default=0, metadata={"help": "Of generation; 8 for the published COCO captions."})
    length_penalty: float = field(default=1.0, metadata={"help": "Of generation; -1 for the published answers."})

    @property
    def generation(self) -> dict[str, Any]:
        names = ("num_beams", "max_new_tokens", "min_new_tokens", "length_penalty")
        settings = {name: getattr(self, name) for name in names} | {"do_sample": False}
        if self.num_beams == 1:
            del settings["length_penalty"]
        return settings


ARGUMENTS = (
    *(ModelArguments, DataArguments, TextArguments, FeatureArguments, AugmentArguments, EvaluationArguments),
    Blip2TrainingArguments,
)


@dataclass
class Captions(Data):
    """A source whose texts are captions, or answers to questions; where it `needs_words`, none may be empty, cleaned."""

    described: bool = False
    needs_words: bool = False
    question_column: str | None = None
    tokens_of: Callable[[list[str]], list[list[int]]] | None = None

    @property
    def text_of(self):
        return super().text_of if self.described else any_caption

    @property
    def question_of(self):
        return partial(question_of, self.question_column) if self.question_column else None

    def corpus(self) -> Iterable[str]:
        is_own = self.described or self.train is None
        return super().corpus() if is_own else islice(self.train.texts(), CAPTIONS_FOR_VOCABULARY)

    def columns_of(self, columns: Columns) -> Columns:
        """The columns, which now tell of texts that cannot be learnt."""
        return replace(columns, text_fault=partial(text_fault, self.question_column)) if self.needs_words else columns

    def learnable(self) -> tuple[Captions, dict[str, str]]:
        """Without the rows, of those held out too, whose texts cannot be learnt; and why they are left out.

        Told before pictures are read, whose kept features are shared with runs on other texts of theirs. (A stream tells
        of a row when it comes.)

        Raises:
            ValueError: a row is left out (`strict`), or all that were to be trained on.
        """
        skipped = {}
        parts = {name: self._learnable_rows(getattr(self, name), skipped) for name in ("train", "held_out")}
        if self.train and not parts["train"]:
            first, reason = next(iter(skipped.items()))
            raise ValueError(f"None of the {len(self.train)} rows can be trained on; the first: {first}: {reason}.")
        return replace(self, **parts), skipped

    def _learnable_rows(self, rows: ImageTextRows | None, skipped: dict[str, str]) -> ImageTextRows | None:
        if rows is None:
            return None
        columns, kept = self.columns_of(rows.columns), []
        for place, row in enumerate(rows.dataset.remove_columns([columns.image])):
            reason = columns.fault(columns.captions(row), row)
            if reason is None:
                kept.append(place)
                continue
            name = columns.image_id(rows.dataset[place], rows.numbers[place])
            if self.args.strict:
                raise BrokenRow(name, reason)
            skipped[name] = reason
        if len(kept) == len(rows):
            return rows
        return ImageTextRows(rows.dataset.select(kept), columns, [rows.numbers[place] for place in kept])

    def sampler(self, rows: Sequence[int], args: Blip2TrainingArguments) -> GroupBatchSampler:
        lengths = self.lengths(rows) if args.train_sampling_strategy == GROUP_BY_LENGTH else None
        return super().sampler(rows, args, lengths)

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens of the longest caption of each row."""
        columns = self.train.columns
        light = self.train.dataset.remove_columns([columns.image]).select(rows)
        return [max(map(len, self.tokens_of(columns.captions(row))), default=0) for row in light]

    def draws(self, image_processor, args: Blip2TrainingArguments):
        dataset, sampler = super().draws(image_processor, args)
        dataset.samples.label_of = self.question_of
        if self.train is None:
            dataset.columns = self.columns_of(dataset.columns)
        return dataset, sampler


def question_in(column: str, row: dict[str, Any]) -> str:
    """The question of a row, empty where it is missing.

    Raises:
        ValueError: there is no such column.
    """
    if column not in row:
        raise ValueError(f"The data has no column {column!r}, only {', '.join(row)}: set question_column.")
    return "" if is_missing(row[column]) else str(row[column])


def question_of(column: str, sample: ImageText) -> str:
    return question_in(column, sample.row)


def text_fault(question_column: str | None, captions: list[str], row: dict[str, Any]) -> str | None:
    """Why the texts of a row cannot be learnt: what is said holds a picture, or a caption or (of vqa, whose answers stay as
    they are) the question is empty once it is cleaned."""
    if any(IMAGE_TOKEN in text for text in captions):
        return f"a text of it holds {IMAGE_TOKEN}, which stands for a picture"
    if question_column is not None:
        has_word = clean_question(question_in(question_column, row)).strip()
        return None if has_word else "its question has no word"
    return None if all(map(clean_caption, captions)) else "a caption of it has no word"


def build(args: ModelArguments, data: Captions) -> tuple[MMBlip2PreTrainedModel, MMBlip2Processor]:
    """The model and its processor: gone on with, or new on what it starts from."""
    if args.stage in QFORMER_STAGES:
        model, processor = build_stage1(args, data)
    else:
        model, processor = build_stage2(args)
        model.language_model.to(getattr(torch, args.frozen_dtype))
        if processor.eos is not None:
            model.generation_config.eos_token_id = processor.eos_token_id
        if processor.tokenizer.pad_token_id is not None:  # or what fills short rows up could be read as words
            model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    if args.image_size:
        resize_tower(model.vision_tower, args.image_size)
        processor.image_processor = at_size(processor.image_processor, args.image_size)
    if args.freeze_vision:
        model.vision_tower.to(getattr(torch, args.frozen_dtype))
    else:
        model.vision_tower.requires_grad_(True)
    return model, processor


def build_stage1(args: ModelArguments, data: Captions) -> tuple[MMBlip2ForPreTraining, MMBlip2Processor]:
    """A Q-Former with text on a vision tower."""
    if args.model_name_or_path:
        return open_blip2(MMBlip2ForPreTraining, args.model_name_or_path)
    tokenizer = qformer_tokenizer(args, data)
    tokens = ("pad", "cls", "sep", "bos")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in tokens}
    model = MMBlip2ForPreTraining.from_vision_pretrained(
        AutoModel.from_pretrained(args.vision_tower, dtype=torch.float32),
        qformer_config={**args.qformer_config, "vocab_size": len(tokenizer), **ids},
        vision_feature_layer=args.vision_feature_layer,
        joint_dim=args.joint_dim,
    )
    if args.bert:
        bert = AutoModelForMaskedLM.from_pretrained(args.bert, dtype=torch.float32)
        init_from_bert(model.qformer, model.lm_head, bert)
    tokenizer.model_max_length = model.config.qformer_config.max_position_embeddings
    return model, MMBlip2Processor(tower_image_processor(args.vision_tower), tokenizer)


def qformer_tokenizer(args: ModelArguments, data: Captions) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, with ``[DEC]``, or one learnt from the captions."""
    if args.qformer_tokenizer is None:
        return learn_wordpiece(data.corpus(), args.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(args.qformer_tokenizer)
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": DEC})
    return tokenizer


def build_stage2(args: ModelArguments) -> tuple[MMBlip2ForConditionalGeneration, MMBlip2Processor]:
    """A Q-Former before a language model."""
    name = args.model_name_or_path
    config = AutoConfig.from_pretrained(name)
    if not isinstance(config, MMBlip2Config):
        raise ValueError(
            f"{name} is a {config.model_type}: {args.stage} goes on from a stage of BLIP-2, such as stage1."
        )
    if config.text_config is None:
        return put_before_language_model(args)
    if args.language_model:
        raise ValueError(f"{name} has a language model: leave language_model out, or start from a stage 1.")
    model, processor = open_blip2(MMBlip2ForConditionalGeneration, name)
    if args.question_text:
        model, processor.qformer_tokenizer = read_questions(model, args.question_text)
    processor.prompt = processor.prompt if args.prompt is None else args.prompt
    processor.eos = processor.eos if args.end is None else args.end or None
    return model, processor


def put_before_language_model(args: ModelArguments) -> tuple[MMBlip2ForConditionalGeneration, MMBlip2Processor]:
    """Goes on from stage 1, see `MMBlip2ForConditionalGeneration.from_stage1`."""
    if args.language_model is None:
        raise ValueError(f"{args.model_name_or_path} is a stage 1, which has no language model: set language_model.")
    stage1, before = open_blip2(MMBlip2ForPreTraining, args.model_name_or_path)
    name = str(open_smollm2()) if args.language_model == SMOLLM2 else args.language_model
    language_model = open_language_model(name, dtype=torch.float32)
    model = MMBlip2ForConditionalGeneration.from_stage1(stage1, language_model, use_text=args.stage == "vqa")
    tokenizer = AutoTokenizer.from_pretrained(name)
    processor = MMBlip2Processor(
        before.image_processor,
        add_start_token(tokenizer) if args.bos_first else tokenizer,
        qformer_tokenizer=before.tokenizer if args.stage == "vqa" else None,
        num_query_tokens=model.config.num_query_tokens,
        image_token_id=model.config.image_token_id,
        is_encoder_decoder=model.config.is_encoder_decoder,
        bos_first=args.bos_first,
        eos=args.end or None,
        prompt=args.prompt or "",
    )
    return model, processor


def add_start_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that begins every text with its start token, as some that have one do not.

    Raises:
        ValueError: it has none.
    """
    if tokenizer.bos_token is None:
        raise ValueError("the language model has no start token to come first: set bos_first to false.")
    if tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        start = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
        )
    return tokenizer


def read_questions(
    model: MMBlip2ForConditionalGeneration, stage1: str
) -> tuple[MMBlip2ForConditionalGeneration, PreTrainedTokenizerBase]:
    """The model with the Q-Former's text, which stage 2 dropped, as stage 1 had it; and its tokenizer."""
    before, processor = open_blip2(MMBlip2ForPreTraining, stage1)
    own, read = model.config.qformer_config, before.config.qformer_config
    for name, value in read.to_dict().items():
        if name in QFORMER_TEXT:
            setattr(own, name, value)
        elif name in QFORMER_SHAPE and value != getattr(own, name):
            raise ValueError(f"the Q-Former of {stage1} has {name} = {value}, that of the model {getattr(own, name)}.")
    whole = MMBlip2ForConditionalGeneration(model.config, model.vision_tower, model.language_model)
    whole.generation_config = model.generation_config
    whole.vision_norm, whole.language_projection = model.vision_norm, model.language_projection
    whole.qformer.load_state_dict(before.qformer.state_dict() | model.qformer.state_dict())
    return whole.eval(), processor.tokenizer


def at_size(image_processor: Any, image_size: int) -> Any:
    """An image processor that gives pictures of another size."""
    settings = image_processor.to_dict()
    square = {"height": image_size, "width": image_size}
    side = {"shortest_edge": image_size}
    size = side if "shortest_edge" in settings["size"] else square
    crop = {"crop_size": square} if settings.get("crop_size") else {}
    return type(image_processor).from_dict({**settings, "size": size, **crop})


def open_blip2(model_class: type, name: str) -> tuple[Any, MMBlip2Processor]:
    return model_class.from_pretrained(name, dtype=torch.float32), AutoProcessor.from_pretrained(name)


def collator_of(
    args: ModelArguments, processor: MMBlip2Processor, data: Captions, augmentation: ImageAugmentation
) -> ContrastiveCollator:
    """What makes batches for the stage."""
    if args.stage in QFORMER_STAGES:
        return QFormerCollator(processor, augmentation)
    if args.stage == "words":
        corpus = (text for text in data.corpus() if text_fault(None, [text], {}) is None)
        return WordCollator(processor, corpus, augmentation, args.blind)
    # An encoder-decoder learns to go on from the beginning of a caption (section 3.3).
    splits = args.stage == "stage2" and processor.is_encoder_decoder
    mode = "vqa" if args.stage == "vqa" else "prefix_lm" if splits else "caption"
    return LanguageCollator(processor, mode, augmentation, args.blind)


def cached(
    model: MMBlip2PreTrainedModel,
    processor: MMBlip2Processor,
    data: Captions,
    args: FeatureArguments,
    augment_args: AugmentArguments,
    training_args: Blip2TrainingArguments,
) -> tuple[CaptionedFeatures, GroupBatchSampler, dict[str, str]]:
    """The tower's tokens of the pictures as a training set, the sampler of its batches, and the pictures that cannot be
    read."""
    augmented = args.views > 1
    collator = ContrastiveCollator(processor, ImageAugmentation(augment_args) if augmented else None)
    rows = data.train
    keys = row_keys(rows)
    stored = [[view_key(key, view) for view in range(args.views)] if augmented else [key] for key in keys]
    config = model.config
    spec = feature_spec(
        model.vision_tower,
        processor.image_processor,
        fingerprint(model.vision_tower),
        f"tokens of layer {config.vision_feature_layer}{', class token' if config.vision_class_token else ''}",
        view=f"{args.views} views, {augment_args}" if augmented else "center",
    )
    store = compute_features(
        lambda samples: model.vision_features(collator.pixel_values(samples).to(model.device)),
        Views(ImageTextDraws(rows, processor.image_processor, no_text, strict=True), args.views),
        [names[view] for view in range(args.views) for names in stored],
        spec,
        Path(args.features_dir or Path(training_args.output_dir) / FEATURES) / spec.digest,
        batch_size=args.features_batch_size,
        strict=data.args.strict,
    )
    kept = [row for row, names in enumerate(stored) if all(name in store for name in names)]
    groups = rows.groups()
    features = FeatureRows(
        store, [keys[row] for row in kept], args.views if augmented else 0, [groups[row] for row in kept]
    )
    dataset = CaptionedFeatures(features, rows, kept, data.text_of, training_args.seed, data.question_of)
    # The store may be shared with runs on other pictures, whose broken ones are none of this run's.
    skipped = [store.skipped[name] for names in stored for name in names if name in store.skipped]
    return dataset, data.sampler(kept, training_args), dict(reason.partition(": ")[::2] for reason in skipped)


@dataclass
class TestSet:
    """Pictures that were not trained on, or their features, with their texts.

    Attributes:
        pictures: n of them, or None.
        features: ``(n, N, E)``, or None.
        captions: n lists of captions; of vqa the answers.
        groups: what the pictures show.
        questions: n of them, of vqa.
    """

    captions: list[list[str]]
    groups: list[str]
    pictures: list | None = None
    features: torch.Tensor | None = None
    questions: list[str] | None = None

    __test__ = False

    def __len__(self) -> int:
        return len(self.captions)

    def shown(self, rows: list[int]) -> dict[str, Any]:
        """Arguments of the evaluation functions: the pictures of some rows."""
        if self.features is not None:
            return {"pictures": None, "vision_features": self.features[rows]}
        return {"pictures": [self.pictures[row] for row in rows]}

    def encoded(self, model: MMBlip2PreTrainedModel, processor: Any, batch_size: int, blind: bool) -> TestSet:
        """With features in place of pictures; `blind`, with zeros."""
        parts = []
        with inference(model):
            for start in range(0, len(self), batch_size):
                pixels = processor(images=self.pictures[start : start + batch_size], return_tensors="pt")
                parts.append(model.vision_features(pixels["pixel_values"].to(model.device)).cpu().float())
        features = torch.cat(parts)
        return replace(self, pictures=None, features=torch.zeros_like(features) if blind else features)


def test_sets(data: Captions, processor: MMBlip2Processor, skipped: dict[str, str], limit: int) -> dict[str, TestSet]:
    """Of the bundled pictures `SPLITS`; of a user's those held out."""
    if data.args.source == "emoji":
        return {split: emoji_set(split, limit) for split in SPLITS}
    if not data.held_out:
        print(
            "No pictures were held out, so nothing is evaluated: set validation_split or a larger validation_fraction."
        )
        return {}
    if len(data.held_out) > limit:
        print(f"Evaluating on the first {limit:,} of {len(data.held_out):,} held-out pictures.")
    rows = data.held_out.readable(skipped, data.args.strict, desc="Reading held-out pictures")
    question_of = data.question_of or (lambda row: None)
    kept = [
        (row.captions, row.group, at_model_size(row.image, processor.image_processor), question_of(row))
        for row in islice(rows, limit)
    ]
    if not kept:
        return {}
    captions, groups, pictures, questions = map(list, zip(*kept, strict=True))
    return {"held_out": TestSet(captions, groups, pictures, questions=questions if data.question_column else None)}


def emoji_set(split: str, limit: int) -> TestSet:
    """A split of the bundled pictures, or as many of its pictures as the limit, see `emoji_rows`."""
    emoji = load_emoji(split, normalize_size=True)
    emoji = emoji.select(emoji_rows(len(emoji), limit))
    return TestSet([[name] for name in emoji["caption"]], list(emoji["hexcode"]), list(emoji["image"]))


def emoji_rows(count: int, limit: int) -> list[int]:
    """Rows drawn at random, always the same, in random order."""
    return np.random.default_rng(0).permutation(count)[:limit].tolist()


def evaluate(
    stage: str,
    model: MMBlip2PreTrainedModel,
    processor: MMBlip2Processor,
    collator: ContrastiveCollator,
    sets: dict[str, TestSet],
    args: EvaluationArguments,
    batch_size: int,
) -> dict[str, dict[str, Any]]:
    """Metrics of each test set, with what needs no sight beside them.

    Returns:
        By name of the evaluation and of the test set: ``retrieval`` of the stages of the Q-Former (see
        `evaluate_image_text_matching`); ``words`` of the warm-up; ``answers`` of vqa; of all others ``captions`` (see
        `evaluate_captioning`) and ``picture_gap``; these without test sets of `has_others` false.
    """
    if stage in QFORMER_STAGES:
        return {"retrieval": {name: retrieval(model, processor, own, args, batch_size) for name, own in sets.items()}}
    sets = {name: own for name, own in sets.items() if has_others(own)}
    if stage == "words":
        return {"words": {name: word_accuracy(model, collator, own, batch_size) for name, own in sets.items()}}
    if stage == "vqa":
        return {"answers": {name: answers(model, processor, own, args, batch_size) for name, own in sets.items()}}
    return {
        "picture_gap": {
            name: evaluate_picture_gap(
                caption_nll(model, processor, own, batch_size),
                [captions[0] for captions in own.captions],
                groups=own.groups,
            )
            for name, own in sets.items()
        },
        "captions": {name: captions_of(model, processor, own, args, batch_size) for name, own in sets.items()},
    }


def has_others(own: TestSet) -> bool:
    """Whether each picture can be compared with one of another group. Says so where it cannot: the model stays."""
    try:
        other_rows(len(own), groups=own.groups)
    except ValueError as error:
        print(f"Nothing is evaluated: {error} Set validation_split or a larger validation_fraction.")
        return False
    return True


def retrieval(model, processor, own: TestSet, args: EvaluationArguments, batch_size: int) -> dict[str, float]:
    return evaluate_image_text_matching(
        model,
        processor,
        own.pictures,
        own.captions,
        k=args.rerank_candidates,
        ids=own.groups,
        batch_size=batch_size,
        vision_features=own.features,
    ) | {"reranked": args.rerank_candidates}


def captions_of(model, processor, own: TestSet, args: EvaluationArguments, batch_size: int) -> dict[str, Any]:
    result = evaluate_captioning(
        model,
        processor,
        own.pictures,
        own.captions,
        batch_size=batch_size,
        vision_features=own.features,
        groups=own.groups,
        **args.generation,
    )
    written = zip(result.pop("captions"), own.captions, strict=True)
    return result | {"examples": [{"caption": one, "references": right} for one, right in islice(written, EXAMPLES)]}


def answers(model, processor, own: TestSet, args: EvaluationArguments, batch_size: int) -> dict[str, Any]:
    """Answers to questions about the right pictures, and about others (``shuffled_accuracy``)."""
    right = [given if len(given) > 1 else given[0] for given in own.captions]
    other = other_rows(len(own), groups=own.groups).tolist()
    seen, unseen = (
        evaluate_vqa(
            model,
            processor,
            questions=own.questions,
            answers=right,
            batch_size=batch_size,
            **own.shown(rows),
            **args.generation,
        )
        for rows in (list(range(len(own))), other)
    )
    written = zip(own.questions, seen.pop("predictions"), right, strict=True)
    return {
        **seen,
        "shuffled_accuracy": unseen["accuracy"],
        "examples": [
            {"question": question, "answer": answer, "references": references}
            for question, answer, references in islice(written, EXAMPLES)
        ],
    }


def caption_nll(model: nn.Module, processor: MMBlip2Processor, own: TestSet, batch_size: int) -> CaptionNLL:
    """What captions cost under pictures of a test set, as `evaluate_picture_gap` asks for it."""

    def cost(rows: list[int], captions: list[str]) -> torch.Tensor:
        shown = own.shown(rows)
        given = {"images": shown["pictures"]} if own.features is None else {"num_images": [1] * len(rows)}
        inputs = dict(processor(**given, suffix=captions, mode="caption", return_tensors="pt"))
        inputs |= {"vision_features": shown["vision_features"]} if own.features is not None else {}
        with inference(model):
            return model.label_nll(**{name: value.to(model.device) for name, value in inputs.items()}).cpu()

    def nll(rows: torch.Tensor, captions: list[str]) -> torch.Tensor:
        by_length = torch.tensor([len(caption) for caption in captions]).argsort()  # little padding
        costs = torch.empty(len(rows))
        for part in by_length.split(batch_size):
            costs[part] = cost(rows[part].tolist(), [captions[place] for place in part.tolist()])
        return costs

    return nll


def word_accuracy(model: WordWarmup, collator: WordCollator, own: TestSet, batch_size: int) -> dict[str, float]:
    """The loss of the word warm-up and the share of right tokens, with the right pictures and with others (``other_``)."""
    targets = collator.texts([{"text": captions[0]} for captions in own.captions])["word_targets"]
    result = {"captions": len(own)}
    for prefix, rows in (("", torch.arange(len(own))), ("other_", other_rows(len(own), groups=own.groups))):
        sums = {"loss": 0.0, "accuracy": 0.0}
        for part in torch.arange(len(own)).split(batch_size):
            shown = own.shown(rows[part].tolist())
            if own.features is None:
                given = {
                    "pixel_values": collator.processor(images=shown["pictures"], return_tensors="pt").pixel_values
                }
            else:
                given = {"vision_features": shown["vision_features"]}
            with inference(model):
                inputs = {name: value.to(model.device) for name, value in given.items()}
                outputs = model(word_targets=targets[part].to(model.device), **inputs)
            for name in sums:
                sums[name] += outputs[name].item() * len(part)
        result |= {f"{prefix}loss": sums["loss"] / len(own), f"{prefix}accuracy": 100 * sums["accuracy"] / len(own)}
    return result


def check(
    model_args: ModelArguments,
    data_args: DataArguments,
    feature_args: FeatureArguments,
    augment_args: AugmentArguments,
    args: Blip2TrainingArguments,
) -> None:
    """Refuses settings that do not go together, before anything is computed."""
    refuse_other_sampling(args, GROUP_BY_LENGTH)
    refuse_data_parallel(args)
    if data_args.streaming and args.train_sampling_strategy == GROUP_BY_LENGTH:
        raise ValueError("a stream is read in its own order: leave train_sampling_strategy out.")
    if not feature_args.cache_features and model_args.blind:
        raise ValueError("without sight, features are zeros and the tower need not run: set cache_features to true.")
    if not feature_args.cache_features:
        return
    if not model_args.freeze_vision:
        raise ValueError("features of a tower that trains change with every step: set cache_features to false.")
    if data_args.streaming:
        raise ValueError("a stream has no end to keep features of: set cache_features to false.")
    if feature_args.views == 1 and augment_args != AugmentArguments():
        raise ValueError(
            "of 1 view, pictures are encoded as they are and no augmentation would act: set views to 2 or more, "
            "cache_features to false, or the augmentation to zero."
        )


def train(argv: list[str] | None = None) -> Path:
    """Runs a recipe to its end, or finds that it has been run. Returns the folder of the trained model."""
    model_args, data_args, text_args, feature_args, augment_args, eval_args, args = parse_recipe(ARGUMENTS, argv)
    check(model_args, data_args, feature_args, augment_args, args)
    if model_args.stage in ("stage2", "captioning"):
        coco_scorers()
    output_dir = Path(args.output_dir)
    settings = decisive_settings(model_args, data_args, text_args, feature_args, augment_args, eval_args, args)
    if is_finished(args, settings):
        print(f"{output_dir} holds a finished run of this recipe.")
        return output_dir

    set_seed(args.seed)
    question_column = text_args.question_column if model_args.stage == "vqa" else None
    data, unlearnable = replace(
        Captions.open(data_args),
        described=text_args.described,
        needs_words=model_args.stage not in QFORMER_STAGES,
        question_column=question_column,
    ).learnable()
    model, processor = build(model_args, data)
    if model_args.stage not in QFORMER_STAGES:
        model.generation_config.update(**eval_args.generation)
    model.to(args.device)
    data = replace(data, tokens_of=lambda texts: processor.tokenizer(texts)["input_ids"])
    collator = collator_of(model_args, processor, data, ImageAugmentation(augment_args))
    if feature_args.cache_features:
        dataset, sampler, unreadable = cached(model, processor, data, feature_args, augment_args, args)
    else:
        (dataset, sampler), unreadable = data.draws(processor.image_processor, args), {}
    if model_args.stage == "words":
        model = WordWarmup.of(model, collator.word_ids.to(args.device))
    trainer = Blip2Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        train_batch_sampler=sampler,
        data_collator=collator,
        processing_class=processor,
    )
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(LiveProgress())
    trainer.train(resume_from_checkpoint=starting_point(args, settings))
    if model_args.stage == "words":
        trainer.model = model.warmed_up()
    trainer.save_whole_model(output_dir)

    skipped = trainer.gather_skipped() | unreadable | unlearnable
    sets = test_sets(data, processor, skipped, eval_args.eval_pictures)
    if feature_args.cache_features:
        size = feature_args.features_batch_size
        sets = {name: own.encoded(model, processor, size, model_args.blind) for name, own in sets.items()}
    metrics = evaluate(model_args.stage, model, processor, collator, sets, eval_args, args.per_device_eval_batch_size)
    if trainer.is_world_process_zero():
        template = "blip2_stage1" if model_args.stage in QFORMER_STAGES else "blip2"
        write_results(template, trainer, metrics, skipped, data, model_args.model_name_or_path, settings)
    return output_dir


if __name__ == "__main__":
    try:
        print(f"The model is in {train()}.")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
