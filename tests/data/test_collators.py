"""From rows to batches: pictures stay with their captions, draws are repeatable, broken rows are told."""

import itertools
import pickle
from functools import partial

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from drawn import (
    NAMES,
    SIDE,
    caption,
    colour_of,
    cut_jpeg,
    encoded,
    noise,
    picture,
    save_pictures,
    tiny_clip,
    tiny_processor,
)
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_mm.data.augment import AugmentArguments, ImageAugmentation
from hf_mm.data.collators import (
    ContrastiveCollator,
    ImageTextCollator,
    ImageTextDraws,
    ImageTextStream,
    PromptCollator,
)
from hf_mm.data.image_text import (
    BrokenRow,
    Columns,
    DataArguments,
    ImageTextRows,
    fill_prompt,
    no_text,
    open_rows,
    open_stream,
    prompt_columns,
    prompted,
    stable_id,
)
from hf_mm.data.sampling import Draw, GroupBatchSampler
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.processing_clip import MMClipProcessor
from hf_mm.models.pic2word.processing_pic2word import Pic2WordProcessor
from hf_mm.trainers.contrastive import ContrastiveTrainer, ContrastiveTrainingArguments

COLUMNS = Columns("image", "caption")


def eight_pairs(broken: bool = True) -> datasets.Dataset:
    """Eight pictures in colours; row 3 has no picture, row 5 a JPEG cut at 60 % of its bytes."""
    images = [{"bytes": encoded(picture(name)), "path": None} for name in NAMES]
    if broken:
        images[3], images[5]["bytes"] = None, cut_jpeg()
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "caption": datasets.List(datasets.Value("string"))}
    )
    captions = [[caption(name), f"something {name}"] for name in NAMES]
    return datasets.Dataset.from_dict({"image": images, "caption": captions}, features=features)


def draws_of(broken: bool = False, **options) -> ImageTextDraws:
    return ImageTextDraws(ImageTextRows(eight_pairs(broken), COLUMNS), tiny_processor().image_processor, **options)


def fits(sample) -> bool:
    """Whether the text of a sample names the colour of its picture."""
    return colour_of(sample["pixels"]) in sample["text"]


def same(a, b) -> bool:
    return torch.equal(a["pixels"], b["pixels"]) and all(a[key] == b[key] for key in a.keys() - {"pixels"})


def take(stream, count: int) -> list[dict]:
    return list(itertools.islice(stream, count))


# Draws


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    order = [Draw(epoch, index) for epoch in range(3) for index in range(8)]
    first, second = draws_of(seed=4), pickle.loads(pickle.dumps(draws_of(seed=4)))
    samples = {draw: first[draw] for draw in order}
    assert all(same(second[draw], samples[draw]) for draw in reversed(order))
    loader = DataLoader(draws_of(seed=4), sampler=order, batch_size=5, num_workers=2, collate_fn=list)
    assert all(same(sample, samples[draw]) for draw, sample in zip(order, itertools.chain(*loader), strict=True))


def test_epoch_copy_and_seed_change_what_is_drawn():
    numbers = {
        tuple(draws_of(seed=seed)[Draw(epoch, 2, copy)]["draws"])
        for seed in (0, 1)
        for epoch in (0, 1)
        for copy in (0, 1)
    }
    assert len(numbers) == 8
    dataset = draws_of()
    assert {dataset[Draw(epoch, 2)]["text"] for epoch in range(20)} == {"a blue square", "something blue"}
    assert all(torch.equal(dataset[Draw(e, 2)]["pixels"], dataset[Draw(0, 2)]["pixels"]) for e in range(3))


def test_a_plain_index_is_epoch_0():
    dataset = draws_of()
    assert same(dataset[6], dataset[Draw(0, 6)])
    assert len(dataset) == 8


@pytest.mark.parametrize("cache_images", [False, True])
def test_broken_rows_leave_batches_full_and_captions_with_their_pictures(cache_images):
    """F04: broken rows are replaced, and no caption moves to another picture."""
    dataset = draws_of(broken=True, cache_images=cache_images)
    for epoch in range(2):
        sampler = GroupBatchSampler(range(8), batch_size=4)
        sampler.set_epoch(epoch)
        for batch in sampler:
            samples = [dataset[draw] for draw in batch]
            assert len(samples) == 4
            assert all(map(fits, samples))
            skipped = {row for sample in samples for row, _ in sample["skipped"]}
            assert skipped == {f"row {draw.index}" for draw in batch if draw.index in (3, 5)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_was_skipped_reaches_the_batch(num_workers):
    """F04: the skipped rows are reported, from workers too."""
    sampler = GroupBatchSampler(range(8), batch_size=4)
    loader = DataLoader(
        draws_of(broken=True),
        batch_sampler=sampler,
        collate_fn=ContrastiveCollator(tiny_processor()),
        num_workers=num_workers,
    )
    batches = list(loader)
    assert [len(batch["pixel_values"]) for batch in batches] == [4, 4]
    reasons = dict(row for batch in batches for row in batch["skipped"])
    assert sorted(reasons) == ["row 3", "row 5"]
    assert "missing" in reasons["row 3"]
    assert "truncated" in reasons["row 5"]


@pytest.mark.parametrize("row", [3, 5])
def test_strict_names_the_broken_row(row):
    """F04: strict mode tells which row."""
    dataset = draws_of(broken=True, strict=True)
    for _ in range(2):
        with pytest.raises(BrokenRow, match=f"^row {row}: "):
            dataset[Draw(0, row)]


def test_strict_names_the_broken_row_of_a_worker():
    """F04: a worker tells it too, in one line."""
    loader = DataLoader(draws_of(broken=True, strict=True), sampler=[5], batch_size=None, num_workers=1)
    batches = iter(loader)
    with pytest.raises(BrokenRow, match="^row 5: a picture in memory cannot be read.+$") as caught:
        next(batches)
    assert "\n" not in str(caught.value)
    batches._shutdown_workers()  # the garbage collector would wait for them


def test_a_broken_row_is_opened_once():
    dataset = draws_of(broken=True)
    opened = []
    read = dataset.rows.columns.read

    class Spy:
        def read(self, row, number):
            opened.append(number)
            return read(row, number)

    dataset.rows.columns = Spy()
    for _ in range(3):
        assert dataset[Draw(0, 3)]["skipped"][0][0] == "row 3"
    assert opened == [3, 4, 4, 4]


def test_nothing_readable_is_one_sentence():
    """F04: when all rows are broken, the first is named."""
    rows = ImageTextRows(eight_pairs().select([3, 5]), COLUMNS)
    dataset = ImageTextDraws(rows, tiny_processor().image_processor)
    with pytest.raises(ValueError, match="None of the 2 rows can be read; the first: row 0: The picture is missing"):
        dataset[Draw(0, 0)]


def test_the_cache_gives_equal_samples_and_holds_small_pictures_alone():
    plain, cached = draws_of(), draws_of(cache_images=True)
    for epoch in range(2):
        assert all(same(cached[Draw(epoch, index)], plain[Draw(epoch, index)]) for index in range(8))
    assert len(cached.cache) == 8
    for row, pixels in cached.cache.values():
        assert pixels.untyped_storage().nbytes() == SIDE * SIDE * 3
        assert row.image is None
        assert len(pickle.dumps(row)) < 500


def test_pixels_are_those_of_the_processor():
    """Bytes (3, n, n) of a picture that is resized and cropped."""
    rows = ImageTextRows(datasets.Dataset.from_dict({"image": [encoded(noise(3))], "caption": ["noise"]}), COLUMNS)
    processor = tiny_processor()
    sample = ImageTextDraws(rows, processor.image_processor)[0]
    assert sample["pixels"].dtype == torch.uint8
    expected = processor.image_processor(noise(3), do_normalize=False, return_tensors="pt")["pixel_values"][0] * 255
    torch.testing.assert_close(sample["pixels"].float(), expected, rtol=0, atol=1e-4)


# ContrastiveCollator


def noisy_samples(**columns) -> list[dict]:
    images = [encoded(noise(seed, (30 + seed, 40))) for seed in range(4)]
    table = {"image": images, "caption": [" A red square", "a blue square", "a red square", "green"], **columns}
    rows = ImageTextRows(datasets.Dataset.from_dict(table), COLUMNS)
    dataset = ImageTextDraws(rows, tiny_processor().image_processor)
    return [dataset[index] for index in range(4)]


@pytest.mark.parametrize(
    "options",
    [{"size": SIDE}, {"size": 20, "crop_size": SIDE}, {"size": {"height": 18, "width": 20}, "crop_size": SIDE}],
    ids=["usual", "smaller crop", "squash"],
)
def test_without_augmentation_a_batch_is_what_the_processor_gives(options):
    processor = MMClipProcessor(MMClipImageProcessorPil(**options), tiny_processor().tokenizer)
    images = [noise(seed, (30 + seed, 40)) for seed in range(4)]
    table = {"image": list(map(encoded, images)), "caption": list("abcd")}
    rows = ImageTextRows(datasets.Dataset.from_dict(table), COLUMNS)
    dataset = ImageTextDraws(rows, processor.image_processor)
    samples = [dataset[index] for index in range(4)]
    batch = ContrastiveCollator(processor)(samples)
    expected = processor(images=images, text=[sample["text"] for sample in samples])
    for key in ("pixel_values", "input_ids", "attention_mask"):
        assert torch.equal(batch[key], expected[key]), key


@pytest.mark.parametrize("do_normalize", [True, False])
def test_zero_strengths_change_no_more_than_the_last_bit(do_normalize):
    processor = pickle.loads(pickle.dumps(tiny_processor()))
    processor.image_processor.do_normalize = do_normalize
    samples = noisy_samples()
    plain = ContrastiveCollator(processor)(samples)
    augmented = ContrastiveCollator(processor, ImageAugmentation(AugmentArguments()))(samples)
    torch.testing.assert_close(augmented["pixel_values"], plain["pixel_values"], rtol=0, atol=1e-6)


def test_augmentation_gets_the_numbers_of_each_sample():
    processor, samples = tiny_processor(), noisy_samples()
    collate = ContrastiveCollator(processor, ImageAugmentation(AugmentArguments(shift=0.3, brightness=0.5)))
    batch = collate(samples)["pixel_values"]
    backwards = collate(samples[::-1])["pixel_values"]
    torch.testing.assert_close(backwards.flip(0), batch, rtol=0, atol=1e-5)
    assert (batch - ContrastiveCollator(processor)(samples)["pixel_values"]).abs().mean() > 0.1


def test_pictures_that_must_not_be_mirrored_are_not():
    samples = noisy_samples(flip_ok=[True, False, None, True])
    assert [sample["may_flip"] for sample in samples] == [True, False, True, True]
    for sample in samples:
        sample["draws"] = [0.0] * 8
    processor = tiny_processor()
    flipped = ContrastiveCollator(processor, ImageAugmentation(AugmentArguments(flip=True)))(samples)["pixel_values"]
    expected = ContrastiveCollator(processor)(samples)["pixel_values"]
    expected[[0, 2, 3]] = expected[[0, 2, 3]].flip(-1)
    torch.testing.assert_close(flipped, expected, rtol=0, atol=1e-5)


def test_equal_pictures_and_equal_texts_have_equal_ids():
    batch = ContrastiveCollator(tiny_processor())(noisy_samples())
    assert len(set(batch["image_ids"].tolist())) == 4
    first, second, third, _ = batch["text_ids"].tolist()
    assert first == third == stable_id("a red square") != second
    twice = datasets.Dataset.from_dict({"image": [encoded(noise(0))] * 2, "caption": ["a", "b"]})
    dataset = ImageTextDraws(ImageTextRows(twice, COLUMNS), tiny_processor().image_processor)
    ids = ContrastiveCollator(tiny_processor())([dataset[0], dataset[1]])["image_ids"]
    assert ids[0] == ids[1]
    assert ids.dtype == torch.int64


# Streams


def stream_of(dataset=None, num_shards: int = 1, rank: int = 0, world_size: int = 1, **options) -> ImageTextStream:
    dataset = eight_pairs(broken=False) if dataset is None else dataset
    stream = split_dataset_by_node(dataset.to_iterable_dataset(num_shards), rank=rank, world_size=world_size)
    return ImageTextStream(stream, COLUMNS, tiny_processor().image_processor, **options)


def test_a_stream_is_endless_and_shuffled_anew_each_pass():
    samples = take(stream_of(), 8 * 4)
    assert all(map(fits, samples))
    passes = [[colour_of(sample["pixels"]) for sample in samples[start : start + 8]] for start in range(0, 32, 8)]
    assert all(sorted(colours) == sorted(NAMES) for colours in passes)
    assert len({tuple(colours) for colours in passes}) == 4
    assert len({tuple(sample["draws"]) for sample in samples}) == 32
    assert {sample["text"].split()[0] for sample in samples} == {"a", "something"}


def test_a_stream_is_repeatable_and_depends_on_its_seed():
    first, second = take(stream_of(seed=1), 20), take(pickle.loads(pickle.dumps(stream_of(seed=1))), 20)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    again = stream_of(seed=1)
    take(again, 11)
    assert all(same(a, b) for a, b in zip(first, take(again, 20), strict=True))
    assert not all(same(a, b) for a, b in zip(first, take(stream_of(seed=2), 20), strict=True))


def test_a_stream_leaves_broken_rows_out_and_tells():
    """F04: a stream skips and names, or stops when strict."""
    samples = take(stream_of(eight_pairs()), 13)
    assert all(map(fits, samples))
    told = [row for sample in samples for row in sample["skipped"]]
    assert 4 <= len(told) <= 6  # in two passes of six samples, and at the start of the third
    reasons = {name[:22]: reason for name, reason in told}
    assert sorted(reasons) == ["row with ['a white squ", "row with ['a yellow sq"]
    assert "truncated" in reasons["row with ['a white squ"]
    assert "missing" in reasons["row with ['a yellow sq"]
    with pytest.raises(BrokenRow):
        take(stream_of(eight_pairs(), strict=True), 8)


def test_a_stream_without_captions_tells_its_broken_rows_apart():
    """Neither file nor id nor text names them: their pictures do, the same in every pass, whatever their group."""
    rows = [{"bytes": encoded(picture("red")), "path": None}, *({"bytes": cut_jpeg()[:size]} for size in (300, 310))]
    features = datasets.Features({"image": datasets.Image(decode=False), "kind": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict({"image": [*rows, None], "kind": ["one"] * 3 + ["two"]}, features=features)
    columns = Columns("image", None, group="kind")
    stream = ImageTextStream(dataset.to_iterable_dataset(), columns, tiny_processor().image_processor, no_text)
    told = [name for sample in take(stream, 6) for name, _ in sample["skipped"]]
    with_picture = {name for name in told if name.startswith("row with picture ")}
    assert len(with_picture) == 2 and len(told) > 6
    (without_picture,) = set(told) - with_picture
    assert without_picture.startswith("row with {") and "'two'" in without_picture


def test_a_stream_without_a_readable_row_is_one_sentence():
    """F04: a stream of broken rows does not run for ever."""
    with pytest.raises(ValueError, match="No row of the stream can be read; the first: row with "):
        take(stream_of(eight_pairs().select([3, 5])), 1)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_ranks_share_a_stream(num_shards):
    ranks = [take(stream_of(num_shards=num_shards, rank=rank, world_size=2), 8) for rank in range(2)]
    for start in (0, 4):  # two passes
        parts = [[colour_of(sample["pixels"]) for sample in samples[start : start + 4]] for samples in ranks]
        assert sorted(parts[0] + parts[1]) == sorted(NAMES)
    assert not {tuple(s["draws"]) for s in ranks[0]} & {tuple(s["draws"]) for s in ranks[1]}
    groups = [{sample["group"] for sample in samples[:4]} for samples in ranks]
    assert len(groups[0] | groups[1]) == 8


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_workers_share_a_stream(num_shards):
    """With one shard the second worker has nothing to do."""
    loader = DataLoader(stream_of(num_shards=num_shards), batch_size=4, num_workers=2, collate_fn=list)
    samples = [sample for batch in take(loader, 4) for sample in batch]
    assert all(map(fits, samples))
    colours = [colour_of(sample["pixels"]) for sample in samples]
    assert sorted(colours[:8]) == sorted(colours[8:]) == sorted(NAMES)


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_stream_from_files(tmp_path, kind):
    save_pictures(tmp_path)
    table = datasets.Dataset.from_dict(
        {"image": [f"{name}.png" for name in NAMES], "caption": list(map(caption, NAMES))}
    )
    getattr(table, f"to_{kind}")(tmp_path / f"rows.{kind}")
    stream, columns = open_stream(DataArguments(str(tmp_path / f"rows.{kind}")))
    samples = take(ImageTextStream(stream, columns, tiny_processor().image_processor, shuffle_buffer=3), 16)
    assert all(map(fits, samples))
    assert sorted(colour_of(sample["pixels"]) for sample in samples[:8]) == sorted(NAMES)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def train(output_dir, stop_at=4, resume=None, num_workers=0):
    arguments = ContrastiveTrainingArguments(
        output_dir=str(output_dir),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=3,
        dataloader_num_workers=num_workers,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = ContrastiveTrainer(
        model=tiny_clip(),
        args=arguments,
        train_dataset=stream_of(eight_pairs(), num_shards=2),
        data_collator=ContrastiveCollator(tiny_processor(), ImageAugmentation(AugmentArguments(shift=0.2))),
        callbacks=[Stop(stop_at)],
    )
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == stop_at
    return trainer


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_on_a_stream_goes_on_where_it_stopped(tmp_path, num_workers):
    whole = train(tmp_path / "whole", num_workers=num_workers)
    train(tmp_path / "parts", stop_at=2, num_workers=num_workers)
    resumed = train(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-2"), num_workers=num_workers)
    states = [trainer.model.state_dict() for trainer in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(value, states[0][name]) for name, value in tiny_clip().state_dict().items())
    assert len(whole.gather_skipped()) == 2


# ImageTextCollator


@pytest.mark.parametrize("first", [0, 4])
def test_a_strict_collator_names_the_row(first):
    """F04: by its place in the batch, its caption, or its key."""
    rows = list(eight_pairs().select(range(first, first + 4)))
    name = {0: r"row 3 of this batch \(\['a yellow square", 4: r"row 1 of this batch \(\['a white square"}[first]
    with pytest.raises(ValueError, match=name):
        ImageTextCollator(tiny_processor(), caption_column="caption")(rows)
    with pytest.raises(ValueError, match=f"^key-{3 if first == 0 else 5}: "):
        keyed = [{"__key__": f"key-{first + number}", **row} for number, row in enumerate(rows)]
        ImageTextCollator(tiny_processor(), caption_column="caption")(keyed)


def test_a_lenient_collator_leaves_rows_out():
    """F04: six pairs of eight stay, each caption with its own picture."""
    processor, rows = tiny_processor(), list(eight_pairs())
    collate = ImageTextCollator(processor, caption_column="caption", strict=False)
    batches = [collate(rows[:4]), collate(rows[4:])]
    kept = [name for number, name in enumerate(NAMES) if number not in (3, 5)]
    for batch, names in zip(batches, (kept[:3], kept[3:]), strict=True):
        expected = processor(images=[picture(name) for name in names], text=[caption(name) for name in names])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in batch)
    assert len(collate.skipped) == 2
    assert "missing" in collate.skipped[0][1]
    assert "truncated" in collate.skipped[1][1]


@pytest.mark.parametrize("blank", ["", "   "])
def test_a_blank_caption_is_the_empty_text(blank):
    """F16: start and end token, and a finite embedding of unit norm."""
    batch = ImageTextCollator(tiny_processor())([{"image": picture(name), "text": blank} for name in NAMES[:2]])
    tokenizer = tiny_processor().tokenizer
    assert batch["input_ids"].tolist() == [[tokenizer.bos_token_id, tokenizer.eos_token_id]] * 2
    with torch.no_grad():
        embeds = tiny_clip().eval()(**batch).text_embeds
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(2))


def test_an_empty_batch_is_one_sentence():
    """F16: an empty batch is refused."""
    with pytest.raises(ValueError, match="A batch needs at least one row"):
        ImageTextCollator(tiny_processor())([])


def test_a_long_caption_is_cut_with_its_end_token_last():
    """F15: both collators cut at the context."""
    processor, samples = tiny_processor(), noisy_samples(caption=["red " * 200, "a", "b", "c"])
    batch = ContrastiveCollator(processor)(samples)
    plain = ImageTextCollator(processor)([{"image": picture("red"), "text": "red " * 200}])
    for input_ids in (batch["input_ids"], plain["input_ids"]):
        assert input_ids.shape[1] == processor.tokenizer.model_max_length
        assert input_ids[0, -1] == processor.tokenizer.eos_token_id
        assert (input_ids[0] == processor.tokenizer.eos_token_id).sum() == 1


@pytest.mark.parametrize("captions", [["a dog", None], ["a dog", float("nan")], [[], ["a dog"]]])
def test_missing_captions_are_named(captions):
    """F16: None and NaN are named by their row."""
    rows = [{"image": picture("red"), "text": text} for text in captions]
    with pytest.raises(ValueError, match="row [01] of this batch .*: it has no caption"):
        ImageTextCollator(tiny_processor())(rows)


def test_a_batch_of_broken_rows_is_one_sentence():
    """F04: a batch of which nothing is left names the first row."""
    rows = [{"image": None, "text": "a dog"}] * 2
    with pytest.raises(ValueError, match="None of the 2 rows of this batch can be read; the first: row 0"):
        ImageTextCollator(tiny_processor(), strict=False)(rows)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({}, "no column 'image', only img, caption: set image_column, and remove_unused_columns=False"),
        ({"image_column": "img"}, "no column 'text', only img, caption: set caption_column"),
    ],
)
def test_wrong_columns_are_named_with_those_there_are(columns, sentence):
    """F05: a column of another name is no KeyError."""
    with pytest.raises(ValueError, match=sentence):
        ImageTextCollator(tiny_processor(), **columns)([{"img": picture("red"), "caption": "a"}])


def stock_trainer(output_dir, **arguments) -> Trainer:
    images = {"img": [picture(name) for name in NAMES], "caption": [caption(name) for name in NAMES]}
    dataset = datasets.Dataset.from_dict(images).cast_column("img", datasets.Image())
    return Trainer(
        model=tiny_clip(),
        args=TrainingArguments(
            str(output_dir),
            max_steps=1,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-2,
            **arguments,
        ),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(4)),
        data_collator=ImageTextCollator(tiny_processor(), image_column="img", caption_column="caption"),
    )


def test_the_stock_trainer_trains_and_evaluates(tmp_path):
    """F05: raw columns reach the collator with the documented argument."""
    trainer = stock_trainer(tmp_path, remove_unused_columns=False)
    before = trainer.model.state_dict()["visual_projection.weight"].clone()
    trainer.train()
    assert not torch.equal(trainer.model.state_dict()["visual_projection.weight"], before)
    inputs = tiny_processor()(images=[picture(name) for name in NAMES[:4]], text=list(map(caption, NAMES[:4])))
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_stock_trainer_with_its_defaults_says_what_to_set(tmp_path):
    """F05: without it, one sentence names the argument and the columns."""
    with pytest.raises(ValueError, match="(caption, img|img, caption).*remove_unused_columns=False"):
        stock_trainer(tmp_path).train()


def test_rows_opened_from_files_train(tmp_path):
    """The whole way from a folder to the loss of a step."""
    save_pictures(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,caption\n" + "\n".join(f"{n}.png,{caption(n)}" for n in NAMES))
    rows = open_rows(DataArguments(str(tmp_path)))
    dataset = ImageTextDraws(rows, tiny_processor().image_processor)
    loader = DataLoader(
        dataset,
        batch_sampler=GroupBatchSampler(rows.groups(), 4),
        collate_fn=ContrastiveCollator(tiny_processor()),
    )
    batch = next(iter(loader))
    assert batch.pop("skipped") == []
    loss = tiny_clip()(**batch).loss
    assert loss.item() > 0


def test_labels_are_told_by_the_texts_of_the_batch():
    """Each picture's label stands among the distinct ones, tokenised once each; without `label_of` there are none."""
    names = ["warm", "cold", "warm", "cold", "warm", "none", "warm", "none"]
    draws = draws_of(label_of=lambda row: names[int(row.image_id.split()[1])])
    batch = ContrastiveCollator(tiny_processor())([draws[index] for index in (0, 1, 4, 5)])
    classes = ["cold", "none", "warm"]
    assert [classes[label] for label in batch["labels"]] == ["warm", "cold", "warm", "none"]
    expected = tiny_processor().tokenizer(classes, padding=True, return_tensors="pt")
    assert torch.equal(batch["label_input_ids"], expected["input_ids"])
    assert "labels" not in ContrastiveCollator(tiny_processor())([draws_of()[0]])


def test_a_prompt_may_name_columns():
    """Each picture stands in the sentence of its own row, its pixels or its features alike; a wrong column is named."""
    prompt = "* drawn by {artist}"
    assert prompt_columns(prompt) == ["artist"] and prompt_columns("a photo of *") == []
    artists = [f"hand {number}" for number in range(8)]
    dataset = eight_pairs(broken=False).add_column("artist", artists)
    rows, clip = ImageTextRows(dataset, COLUMNS), tiny_processor()
    processor = Pic2WordProcessor(clip.image_processor, clip.tokenizer)
    draws = ImageTextDraws(rows, processor.image_processor, partial(prompted, prompt))
    samples = [draws[index] for index in (5, 0, 2)]
    batch = PromptCollator(processor, prompt)(samples)
    expected = processor(
        images=[rows[index].image for index in (5, 0, 2)], text=[f"* drawn by {artists[index]}" for index in (5, 0, 2)]
    )
    for name in ("input_ids", "attention_mask", "placeholder_mask", "pixel_values"):
        assert torch.equal(batch[name], expected[name]), name
    features = [{**sample, "vision_features": torch.ones(4)} for sample in samples]
    assert torch.equal(PromptCollator(processor, prompt)(features)["input_ids"], expected["input_ids"])
    with pytest.raises(ValueError, match="'style'.*artist"):
        fill_prompt("* in the style of {style}", rows[0].row)
