"""Trains a CLIP on image-text pairs, evaluates it, and saves it as a Hub repository folder.

    python training/train_clip.py training/recipes/clip_emoji.yaml
    python training/train_clip.py training/recipes/clip_emoji.yaml --source PATH_TO_MY_PICTURES --output_dir outputs/mine
    torchrun --nproc_per_node 2 training/train_clip.py RECIPE.yaml
    accelerate launch training/train_clip.py RECIPE.yaml --bf16 true

The same command resumes a run that was stopped, at any moment, and ends with the same weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from datasets.distributed import split_dataset_by_node
from transformers import AutoConfig, AutoModel, PreTrainedModel, set_seed
from transformers.trainer_callback import ProgressCallback

import hf_mm  # noqa: F401  registers the models
from hf_mm.data.augment import AugmentArguments, ImageAugmentation
from hf_mm.data.collators import ContrastiveCollator, ImageTextDraws, ImageTextStream, at_model_size
from hf_mm.data.image_text import (
    STYLED,
    DataArguments,
    ImageTextRows,
    any_caption,
    emoji_artist,
    emoji_corpus,
    emoji_styled_text,
    emoji_text,
    open_rows,
    open_stream,
)
from hf_mm.data.sampling import GroupBatchSampler
from hf_mm.evaluation.retrieval import evaluate_retrieval
from hf_mm.evaluation.style_shift import evaluate_emoji
from hf_mm.files import write_json
from hf_mm.hub.model_card import build_model_card, shown_name
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.models.clip.processing_clip import MMClipProcessor
from hf_mm.models.clip.tokenization_clip import MMClipTokenizer
from hf_mm.nn.patches import to_pair
from hf_mm.trainers.callbacks import LiveProgress
from hf_mm.trainers.contrastive import ContrastiveTrainer, ContrastiveTrainingArguments
from hf_mm.trainers.recipes import (
    RESULT_FILE,
    decisive_settings,
    describe_machine,
    is_finished,
    parse_recipe,
    refuse_other_sampling,
    starting_point,
)

LOG_FILE = "log_history.json"
CAPTIONS_FOR_VOCABULARY = 100_000
MAX_HELD_OUT = 10_000


@dataclass
class ModelArguments:
    """The model: one to start from, or the shape of a new one."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A saved CLIP to go on from, of hf_mm or of transformers, with its own shape and vocabulary: the "
            "settings of a new model are not used then. Without one, a new model is made."
        },
    )
    vision_config: dict | str | None = field(
        default=None, metadata={"help": "Config of a new model's picture tower (in a recipe, or as JSON)."}
    )
    text_config: dict | str | None = field(
        default=None, metadata={"help": "Config of a new model's text tower (in a recipe, or as JSON)."}
    )
    projection_dim: int = field(default=512, metadata={"help": "Width of a new model's joint space."})
    bpe_file: str | None = field(
        default=None,
        metadata={"help": "bpe_simple_vocab_16e6.txt.gz, for the original vocabulary. Without it one is learnt."},
    )
    vocab_size: int = field(default=4096, metadata={"help": "Size of a vocabulary learnt from the captions."})

    def __post_init__(self):
        for name in ("vision_config", "text_config"):
            value = getattr(self, name) or {}
            setattr(self, name, json.loads(value) if isinstance(value, str) else value)


@dataclass
class Data:
    """A source, opened: rows to train on and rows held out, or a stream."""

    args: DataArguments
    train: ImageTextRows | None = None
    held_out: ImageTextRows | None = None

    @classmethod
    def open(cls, args: DataArguments) -> Data:
        if args.streaming:
            return cls(args, held_out=open_rows(args, args.validation_split) if args.validation_split else None)
        train = open_rows(args)
        if args.source == "emoji":
            return cls(args, train)
        if args.validation_split:
            return cls(args, train, open_rows(args, args.validation_split))
        return cls(args, *train.split_off(args.validation_fraction))

    @property
    def text_of(self):
        if self.args.source != "emoji":
            return any_caption
        return emoji_styled_text if self.args.config_name == STYLED else emoji_text

    def corpus(self):
        """Texts to learn a vocabulary from."""
        if self.args.source == "emoji":
            return emoji_corpus(self.train, styled=self.args.config_name == STYLED)
        if self.train is not None:
            return islice(self.train.texts(), CAPTIONS_FOR_VOCABULARY)
        stream, columns = open_stream(self.args)
        return (text for row in stream.take(CAPTIONS_FOR_VOCABULARY) for text in columns.captions(row))

    def _alike(self) -> list[str]:
        """What a batch holds several views of. Of styled emoji, artists and skin tones: the hardest wrong answers."""
        styled = self.args.source == "emoji" and self.args.config_name == STYLED
        return self.train.dataset["base"][:] if styled else self.train.groups()

    def draws(self, image_processor, args: ContrastiveTrainingArguments):
        """The training dataset and the sampler of its batches (a stream has none)."""
        options = {"text_of": self.text_of, "seed": args.seed, "strict": self.args.strict}
        if self.args.config_name == STYLED and self.args.source == "emoji":
            options["label_of"] = emoji_artist
        if self.train is None:
            stream, columns = open_stream(self.args)
            stream = split_dataset_by_node(stream, rank=args.process_index, world_size=args.world_size)
            options["shuffle_buffer"] = self.args.shuffle_buffer
            return ImageTextStream(stream, columns, image_processor, **options), None
        dataset = ImageTextDraws(self.train, image_processor, cache_images=self.args.cache_images, **options)
        return dataset, self.sampler(range(len(self.train)), args)

    def sampler(
        self, rows: Sequence[int], args: ContrastiveTrainingArguments, lengths: Sequence[int] | None = None
    ) -> GroupBatchSampler:
        """Batches of the training rows with these numbers; of similar length, where lengths are given."""
        views = self.args.views_per_group
        alike = self._alike() if views > 1 else range(len(self.train))
        groups = [alike[row] for row in rows]
        sampler = GroupBatchSampler(groups, args.per_device_train_batch_size, views, args.seed, lengths)
        if len(sampler) < args.world_size:
            raise ValueError(
                f"{args.world_size} processes need {args.world_size} batches, but the data makes {len(sampler)}: "
                "make per_device_train_batch_size smaller."
            )
        return sampler


def build_processor(args: ModelArguments, data: Data) -> MMClipProcessor:
    """The processor of the model to start from, or a new one with the published or a learnt vocabulary."""
    if args.model_name_or_path:
        parts = (MMClipImageProcessorPil, MMClipTokenizer)
        return MMClipProcessor(*(part.from_pretrained(args.model_name_or_path) for part in parts))
    context = args.text_config.get("max_position_embeddings", 77)
    tokenizer = (
        MMClipTokenizer.from_bpe_file(args.bpe_file, model_max_length=context)
        if args.bpe_file
        else MMClipTokenizer.train_from_iterator(data.corpus(), args.vocab_size, model_max_length=context)
    )
    height, width = to_pair(args.vision_config.get("image_size", 224))
    size = height if height == width else {"height": height, "width": width}
    return MMClipProcessor(MMClipImageProcessorPil(size=size, crop_size={"height": height, "width": width}), tokenizer)


def build_model(args: ModelArguments, tokenizer: MMClipTokenizer) -> PreTrainedModel:
    """The model to start from, or a new one whose text tower fits the tokenizer."""
    if args.model_name_or_path:
        return MMClipModel.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(
        "mm_clip",
        vision_config=args.vision_config,
        text_config={**args.text_config, "vocab_size": len(tokenizer), **ids},
        projection_dim=args.projection_dim,
    )
    return AutoModel.from_config(config)


def evaluate(model: PreTrainedModel, processor: MMClipProcessor, data: Data, skipped: dict[str, str]) -> dict:
    """Metrics of a trained model on what it was not trained on, with chance beside them.

    For the bundled pictures the nearest-pixel baseline stands beside them too; a user's held-out captions are new, and
    pixels have no answer to those.
    """
    if data.args.source == "emoji":
        return {
            "size_normalized": evaluate_emoji(model, processor, normalize_size=True),
            "original": evaluate_emoji(model, processor, normalize_size=False),
        }
    if not data.held_out:
        print(
            "No pictures were held out, so nothing is evaluated: set validation_split or a larger validation_fraction."
        )
        return {}
    if len(data.held_out) > MAX_HELD_OUT:
        print(f"Evaluating on the first {MAX_HELD_OUT:,} of {len(data.held_out):,} held-out pictures.")
    rows = data.held_out.readable(skipped, data.args.strict, desc="Reading held-out pictures")
    kept = [
        (at_model_size(row.image, processor.image_processor), row.captions, row.group)
        for row in islice(rows, MAX_HELD_OUT)
    ]
    if not kept:
        return {}
    images, captions, groups = zip(*kept, strict=True)
    return {"held_out": evaluate_retrieval(model, processor, images, captions, ids=groups)}


def train(argv: list[str] | None = None) -> Path:
    """Runs a recipe to its end, or finds that it has been run. Returns the folder of the trained model."""
    model_args, data_args, augment_args, args = parse_recipe(
        (ModelArguments, DataArguments, AugmentArguments, ContrastiveTrainingArguments), argv
    )
    refuse_other_sampling(args)
    output_dir = Path(args.output_dir)
    settings = decisive_settings(model_args, data_args, augment_args, args)
    if is_finished(args, settings):
        print(f"{output_dir} holds a finished run of this recipe.")
        return output_dir

    set_seed(args.seed)
    data = Data.open(data_args)
    processor = build_processor(model_args, data)
    model = build_model(model_args, processor.tokenizer).to(memory_format=torch.channels_last)
    dataset, sampler = data.draws(processor.image_processor, args)
    trainer = ContrastiveTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        train_batch_sampler=sampler,
        data_collator=ContrastiveCollator(processor, ImageAugmentation(augment_args)),
        processing_class=processor,
    )
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(LiveProgress())
    trainer.train(resume_from_checkpoint=starting_point(args, settings))
    trainer.save_whole_model(output_dir)

    skipped = trainer.gather_skipped()
    metrics = evaluate(model, processor, data, skipped)
    if trainer.is_world_process_zero():
        write_results("clip", trainer, metrics, skipped, data, model_args.model_name_or_path, settings)
    return output_dir


def write_results(
    template: str,
    trainer: ContrastiveTrainer,
    metrics: dict,
    skipped: dict[str, str],
    data: Data,
    model_name_or_path: str | None,
    settings: dict,
) -> None:
    """Writes log, card and results of a finished run into its folder, the results last, and tells what was skipped."""
    args, model, output_dir = trainer.args, trainer.model, Path(trainer.args.output_dir)
    named = {"source": data.args.source, "model_name_or_path": model_name_or_path}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    results = {
        "metrics": metrics,
        "training": {
            "steps": trainer.state.global_step,
            "seconds": round(trainer.record.seconds, 1),
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "loss": losses[-1] if losses else None,
            "parameters": model.num_parameters(only_trainable=True),
        },
        "data": {
            "source": data.args.source,
            "pictures": len(data.train or []),
            "skipped": skipped,
            "is_local": {name: Path(value).exists() for name, value in named.items() if value},
        },
        "machine": describe_machine(args),
    }
    write_json(output_dir / LOG_FILE, trainer.state.log_history)
    card = build_model_card(
        template, model_name=shown_name(output_dir), model=model, settings=settings, license="other", **results
    )
    card.save(output_dir / "README.md")
    write_json(output_dir / RESULT_FILE, results)
    report_skipped(skipped)


def report_skipped(skipped: dict[str, str], shown: int = 10) -> None:
    if skipped:
        print(f"{len(skipped)} rows were skipped:")
        for row, reason in list(skipped.items())[:shown]:
            print(f"  {row}: {reason}")
        if len(skipped) > shown:
            print(f"  ... all of them are in {RESULT_FILE}")


if __name__ == "__main__":
    try:
        print(f"The model is in {train()}.")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
