"""Trains Pic2Word's mapping network on pictures alone, over a frozen CLIP, and saves both as a Hub repository folder.

    python training/train_pic2word.py training/recipes/pic2word_emoji.yaml
    python training/train_pic2word.py RECIPE.yaml --source PATH_TO_MY_PICTURES --output_dir outputs/mine
    torchrun --nproc_per_node 2 training/train_pic2word.py RECIPE.yaml

CLIP's embeddings of the pictures are computed once and kept beside the run (``--cache_features false`` computes them in
every step, from pictures that are augmented anew). The same command resumes a run that was stopped.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from train_clip import MAX_HELD_OUT, Data, write_results
from transformers import AutoModel, AutoProcessor, set_seed
from transformers.trainer_callback import ProgressCallback

import hf_mm  # noqa: F401  registers the models
from hf_mm.composite.fingerprint import fingerprint
from hf_mm.data.augment import AugmentArguments, ImageAugmentation
from hf_mm.data.collators import ImageTextDraws, PromptCollator, at_model_size
from hf_mm.data.features import FeatureRows, compute_features, feature_spec, row_keys, view_key
from hf_mm.data.image_text import PictureArguments, fill_prompt, no_text, prompt_columns, prompted
from hf_mm.data.sampling import Draw, GroupBatchSampler
from hf_mm.evaluation.emoji_composed import (
    EmojiPictures,
    embed_emoji,
    evaluate_attribute_edit,
    evaluate_style_conversion,
)
from hf_mm.evaluation.pseudo_words import evaluate_pseudo_words
from hf_mm.models.pic2word.modeling_pic2word import Pic2WordModel, check_dual_encoder
from hf_mm.models.pic2word.processing_pic2word import Pic2WordProcessor
from hf_mm.trainers.callbacks import LiveProgress
from hf_mm.trainers.contrastive import ContrastiveTrainer, ContrastiveTrainingArguments
from hf_mm.trainers.recipes import decisive_settings, is_finished, parse_recipe, refuse_other_sampling, starting_point

FEATURES = "features"  # folder of the run that keeps them
SPLITS = ("cell", "concept")  # of the bundled pictures: known emoji in a new drawing, new emoji


@dataclass
class ModelArguments:
    """The frozen CLIP, and the mapping network on it."""

    model_name_or_path: str = field(
        default="openai/clip-vit-large-patch14",
        metadata={"help": "A dual encoder, of hf_mm or of transformers; or a Pic2Word to go on from."},
    )
    prompt: str = field(
        default="a photo of *",
        metadata={
            "help": "The sentence in which a picture is a word. Columns of the data may stand in braces: "
            "'* in the style of {style}'. The published objective names none."
        },
    )
    placeholder: str = field(default="*", metadata={"help": "What stands for the picture, one token."})
    hidden_dim: int = field(default=512, metadata={"help": "Width of a new mapping network."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Hidden layers of a new mapping network."})
    dropout: float = field(default=0.1, metadata={"help": "In the hidden layers of a new mapping network."})


@dataclass
class FeatureArguments:
    """Whether CLIP's embeddings of the pictures are computed once or in every step."""

    cache_features: bool = field(
        default=True, metadata={"help": "Compute them once; False computes them in every step, augmented anew."}
    )
    features_dir: str | None = field(
        default=None,
        metadata={"help": "Where they are kept, for several runs and models to share (by default the output folder)."},
    )
    views: int = field(
        default=1,
        metadata={"help": "Embeddings kept of each picture, augmented differently; an epoch sees one of them."},
    )
    features_batch_size: int = field(default=256, metadata={"help": "Pictures a forward pass when computing them."})

    def __post_init__(self):
        if self.views < 1:
            raise ValueError(f"views must be at least 1, not {self.views}.")


def build(args: ModelArguments) -> tuple[Pic2WordModel, Pic2WordProcessor]:
    """The model and its processor: as saved, or a new mapping network on a dual encoder."""
    base = AutoModel.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    if not isinstance(base, Pic2WordModel):
        check_dual_encoder(base)
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    if isinstance(base, Pic2WordModel):
        return base, processor
    processor = Pic2WordProcessor(processor.image_processor, processor.tokenizer, args.placeholder)
    fields = {name: getattr(args, name) for name in ("hidden_dim", "num_hidden_layers", "dropout")}
    return Pic2WordModel.from_clip_pretrained(base, processor.placeholder_token_id, **fields), processor


@dataclass
class Pictures(Data):
    """A source of which the pictures are read, and the columns that the prompt names."""

    prompt: str = ""

    @property
    def text_of(self):
        return partial(prompted, self.prompt)

    def texts(self, rows: list[int]) -> list[str] | None:
        """The sentences of training rows, where they have sentences of their own."""
        if not prompt_columns(self.prompt):
            return None
        light = self.train.dataset.remove_columns([self.train.columns.image])
        return [fill_prompt(self.prompt, row) for row in light.select(rows)]


@dataclass
class Views:
    """Every picture in each of its views, prepared for the tower one at a time: what `compute_features` encodes."""

    draws: ImageTextDraws
    views: int

    def __len__(self) -> int:
        return len(self.draws) * self.views

    def __getitem__(self, number: int) -> dict:
        view, index = divmod(number, len(self.draws))
        return self.draws[Draw(view, index)]


def cached(
    model: Pic2WordModel,
    processor: Pic2WordProcessor,
    data: Pictures,
    args: FeatureArguments,
    augment_args: AugmentArguments,
    training_args: ContrastiveTrainingArguments,
) -> tuple[FeatureRows, GroupBatchSampler, dict[str, str]]:
    """The pictures' embeddings as a training set, the sampler of its batches, and the pictures that cannot be read."""
    augmented = args.views > 1
    collator = PromptCollator(processor, processor.placeholder, ImageAugmentation(augment_args) if augmented else None)
    rows = data.train
    keys = row_keys(rows)
    stored = [[view_key(key, view) for view in range(args.views)] if augmented else [key] for key in keys]
    spec = feature_spec(
        model.clip,
        processor.image_processor,
        fingerprint(model.clip),
        "image_embeds",
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
    dataset = FeatureRows(
        store,
        [keys[row] for row in kept],
        args.views if augmented else 0,
        [groups[row] for row in kept],
        data.texts(kept),
    )
    # The store may be shared with runs on other pictures, whose broken ones are none of this run's.
    skipped = [store.skipped[name] for names in stored for name in names if name in store.skipped]
    return dataset, data.sampler(kept, training_args), dict(reason.partition(": ")[::2] for reason in skipped)


def evaluate(
    model: Pic2WordModel,
    processor: Pic2WordProcessor,
    data: Pictures,
    skipped: dict[str, str],
    pictures: EmojiPictures | None = None,
) -> dict:
    """Composed retrieval on the bundled pictures; on a user's, whether the words of held-out pictures mean these."""
    if data.args.source == "emoji":
        pictures = pictures or embed_emoji(model, processor)
        return {
            name: {split: evaluate_task(model, processor, pictures, split) for split in SPLITS}
            for name, evaluate_task in (
                ("style_conversion", evaluate_style_conversion),
                ("attribute_edit", evaluate_attribute_edit),
            )
        }
    if not data.held_out:
        print("No pictures were held out, so nothing is evaluated: set validation_split or validation_fraction.")
        return {}
    if len(data.held_out) > MAX_HELD_OUT:
        print(f"Evaluating on the first {MAX_HELD_OUT:,} of {len(data.held_out):,} held-out pictures.")
    rows = data.held_out.readable(skipped, data.args.strict, desc="Reading held-out pictures")
    kept = [
        (at_model_size(row.image, processor.image_processor), row.group, fill_prompt(data.prompt, row.row))
        for row in islice(rows, MAX_HELD_OUT)
    ]
    if not kept:
        return {}
    images, groups, prompts = zip(*kept, strict=True)
    return {"held_out": evaluate_pseudo_words(model, processor, images, prompts, ids=groups)}


def train(argv: list[str] | None = None, pictures: EmojiPictures | None = None) -> Path:
    """Runs a recipe to its end, or finds that it has been run.

    Args:
        argv: the recipe and flags; by default those of the command.
        pictures: the bundled ones to evaluate on, through the same CLIP, where several runs share them.

    Returns:
        The folder of the trained model.
    """
    model_args, data_args, feature_args, augment_args, args = parse_recipe(
        (ModelArguments, PictureArguments, FeatureArguments, AugmentArguments, ContrastiveTrainingArguments), argv
    )
    refuse_other_sampling(args)
    if feature_args.cache_features and data_args.streaming:
        raise ValueError("a stream has no end to keep features of: set cache_features to false.")
    if feature_args.cache_features and feature_args.views == 1 and augment_args != AugmentArguments():
        raise ValueError(
            "of 1 view, pictures are embedded as they are and no augmentation would act: set views to 2 or more, "
            "cache_features to false, or the augmentation to zero."
        )
    output_dir = Path(args.output_dir)
    settings = decisive_settings(model_args, data_args, feature_args, augment_args, args)
    if is_finished(args, settings):
        print(f"{output_dir} holds a finished run of this recipe.")
        return output_dir

    set_seed(args.seed)
    data = replace(Pictures.open(data_args), prompt=model_args.prompt)
    model, processor = build(model_args)
    model.to(args.device)
    collator = PromptCollator(processor, model_args.prompt, ImageAugmentation(augment_args))
    if feature_args.cache_features:
        dataset, sampler, unreadable = cached(model, processor, data, feature_args, augment_args, args)
    else:
        (dataset, sampler), unreadable = data.draws(processor.image_processor, args), {}
    trainer = ContrastiveTrainer(
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
    trainer.save_whole_model(output_dir)

    skipped = trainer.gather_skipped() | unreadable
    metrics = evaluate(model, processor, data, skipped, pictures)
    if trainer.is_world_process_zero():
        write_results("pic2word", trainer, metrics, skipped, data, model_args.model_name_or_path, settings)
    return output_dir


if __name__ == "__main__":
    try:
        print(f"The model is in {train()}.")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
