"""A language model of two million parameters, trained here on what the bundled pictures are called.

    python training/tiny_language_model.py [FOLDER]

It stands in where no pre-trained one can be had: it knows names, tags and groups of emoji, and nothing else.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_mm.data.emoji import load_emoji

FOLDER = Path("outputs/tiny-language-model")
STEPS = 400
START, END, PAD = "<s>", "</s>", "<pad>"


def texts_of_emoji() -> list[str]:
    """What the emoji of training are called, and what else is said of them, a sentence each. Held-out names are in none."""
    emoji = load_emoji("train").select_columns(["hexcode", "caption", "tags", "subgroup"])
    rows = {row["hexcode"]: row for row in emoji}.values()
    texts = []
    for row in rows:
        texts.append(f" {row['caption']}.")
        texts += [f" {row['caption']}: {tag}." for tag in row["tags"]]
        texts.append(f" {row['subgroup'].replace('-', ' ')}: {row['caption']}.")
    return texts


def learn_tokenizer(texts: list[str], vocab_size: int = 2000) -> PreTrainedTokenizerFast:
    """Byte pairs, as GPT-2 has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, START, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=START, eos_token=END, model_max_length=128
    )


def open_tiny_language_model(folder: str | Path = FOLDER) -> Path:
    """The folder of the model, trained where it is not there yet."""
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    set_seed(0)
    texts = texts_of_emoji()
    tokenizer = learn_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    print(
        f"Training a language model of {model.num_parameters() / 1e6:.1f} million parameters on {len(texts):,} names …"
    )
    rows = [{"input_ids": [tokenizer.bos_token_id, *ids]} for ids in tokenizer(texts)["input_ids"]]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=aside,
                max_steps=STEPS,
                per_device_train_batch_size=64,
                learning_rate=2e-3,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                weight_decay=0.05,
                optim="adamw_torch_fused",
                logging_steps=50,
                save_strategy="no",
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                seed=0,
            ),
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train()
        whole = Path(aside, folder.name)
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        os.replace(whole, folder)
    return folder


if __name__ == "__main__":
    print(open_tiny_language_model(*sys.argv[1:2]))
