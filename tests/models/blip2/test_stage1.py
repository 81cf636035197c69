"""Stage 1 of BLIP-2: three losses and their gradients against transformers' Q-Former, one process against two, retrieval."""

import math
import multiprocessing
import traceback

import pytest
import torch
import torch.distributed as dist
from qformer_oracle import (
    SEP,
    Stage1Oracle,
    assert_same_gradients,
    blip2_config,
    features_of,
    perturbed,
    relative_error,
    texts_of,
)
from torch import nn

from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config, MMBlip2QFormerConfig
from hf_mm.models.blip2.modeling_blip2 import MMBlip2ForImageTextRetrieval, MMBlip2ForPreTraining, MMBlip2Model

LENGTHS = (7, 3, 5, 6, 4)
IMAGE_IDS = torch.tensor([4, 9, 4, 2, 9])
ACCURACIES = ("itc_image_to_text", "itc_text_to_image", "itm_right_pair", "itm_drawn_image", "itm_drawn_text", "itg")


def stage1(dtype=torch.float64, attention="eager", kind=MMBlip2ForPreTraining, qformer=None, **fields):
    torch.manual_seed(0)
    model = kind(blip2_config(qformer, **fields))
    model.set_attn_implementation(attention)
    return perturbed(model, dtype)


def pairs(dtype=torch.float64, side="right", width=None, lengths=LENGTHS):
    ids, mask = texts_of(*lengths, side=side, width=width)
    return {"vision_features": features_of(len(lengths), dtype=dtype), "input_ids": ids, "attention_mask": mask}


def pictures(number=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(number, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def expected(model, out, batch, image_ids=None, detached=False):
    """The three losses by the oracle, with the negatives that the model drew."""
    oracle = Stage1Oracle(model)
    features, ids, mask = (batch[name] for name in ("vision_features", "input_ids", "attention_mask"))
    features, smoothing = features.double(), model.config.label_smoothing
    itc, logits = oracle.itc(features, ids, mask, image_ids, smoothing, detached)
    itm, blocks = oracle.itm(features, ids, mask, out.negatives)
    itg, right_words = oracle.itg(features, ids, mask, smoothing)
    return oracle, {"itc": itc, "itm": itm, "itg": itg}, logits, blocks, right_words


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("image_ids", [None, IMAGE_IDS], ids=["no ids", "ids"])
def test_losses_are_those_of_one_pass_an_objective(image_ids, side, attention, dtype):
    model, batch = stage1(dtype, attention), pairs(dtype, side, width=8)
    out = model(**batch, image_ids=image_ids, generator=seeded())
    _, losses, logits, blocks, right_words = expected(model, out, batch, image_ids)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6
    for name, reference in losses.items():
        assert out[f"loss_{name}"].shape == ()
        assert out[f"loss_{name}"].item() == pytest.approx(reference.item(), rel=tolerance), name
    assert out.loss.item() == pytest.approx(sum(losses.values()).item(), rel=tolerance)
    logit_tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert relative_error(out.logits_per_image, logits) < logit_tolerance
    assert relative_error(out.logits_per_text, logits.T) < logit_tolerance
    same = torch.eye(5, dtype=torch.bool) if image_ids is None else image_ids[:, None] == image_ids
    hits = [
        same[torch.arange(5), logits.argmax(1)].double().mean(),
        same[torch.arange(5), logits.argmax(0)].double().mean(),
        blocks[0].argmax(-1).double().mean(),
        *((block.argmax(-1) == 0).double().mean() for block in blocks[1:]),
        right_words,
    ]
    assert out.accuracies.shape == (6,)
    for name, ours, theirs in zip(ACCURACIES, out.accuracies.tolist(), hits, strict=True):
        assert ours == pytest.approx(theirs.item(), abs=1e-6), name


@pytest.mark.parametrize("fields", [{}, {"gather_with_grad": False}, {"label_smoothing": 0.0}], ids=str)
@pytest.mark.parametrize("image_ids", [None, IMAGE_IDS], ids=["no ids", "ids"])
def test_gradients_are_those_of_one_pass_an_objective(image_ids, fields):
    """Of every parameter: the temperature, the vision norm, queries and words among them."""
    model, batch = stage1(**fields), pairs(width=8)
    model.train()
    out = model(**batch, image_ids=image_ids, generator=seeded())
    out.loss.backward()
    oracle, losses, *_ = expected(model, out, batch, image_ids, detached=not model.config.gather_with_grad)
    sum(losses.values()).backward()
    assert out.loss.item() == pytest.approx(sum(losses.values()).item(), rel=1e-9)
    assert_same_gradients(model, oracle)
    for name, value in model.named_parameters():
        assert (value.grad is None) == name.startswith("vision_tower."), name
    for name in ("temperature", "vision_norm.weight", "vision_norm.bias", "qformer.embeddings.query_tokens"):
        assert model.get_parameter(name).grad.abs().max() > 0.0, name


@pytest.mark.parametrize("objective", ["itc", "itm", "itg"])
def test_gradients_of_each_loss(objective):
    model, batch = stage1(), pairs()
    out = model.train()(**batch, generator=seeded())
    out[f"loss_{objective}"].backward()
    oracle, losses, *_ = expected(model, out, batch)
    losses[objective].backward()
    assert_same_gradients(model, oracle)
    assert model.vision_norm.weight.grad.abs().max() > 0.0


def test_detached_columns_change_the_gradient():
    gradients = []
    for gather_with_grad in (True, False):
        model = stage1(gather_with_grad=gather_with_grad).train()
        model(**pairs(), generator=seeded()).loss_itc.backward()
        gradients.append(model.text_projection.weight.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "quick_gelu"])
def test_another_gelu_is_another_loss(activation):
    model, batch = stage1(), pairs()
    other = stage1(qformer={"hidden_act": activation})
    out = other(**batch, generator=seeded())
    _, losses, *_ = expected(model, out, batch)
    for name, reference in losses.items():
        assert abs(out[f"loss_{name}"].item() - reference.item()) > 1e-7 * reference.item(), name


class TestNegatives:
    def test_are_reported_and_never_right(self):
        model, batch = stage1(qformer={"num_hidden_layers": 1}), pairs()
        model.temperature.data.fill_(2.0)
        seen = [set(), set()]
        for seed in range(12):
            drawn = model(**batch, image_ids=IMAGE_IDS, generator=seeded(seed)).negatives
            for side, columns in enumerate(drawn):
                assert (IMAGE_IDS[columns] != IMAGE_IDS).all()
                seen[side] |= set(enumerate(columns.tolist()))
        assert min(len(each) for each in seen) > 9  # of 16 pairs that could be

    def test_are_those_of_their_own_direction(self):
        """As the temperature falls, of each text the likest wrong picture and of each picture the likest wrong text."""
        model, batch = stage1(), pairs()
        model.temperature.data.fill_(1e-5)
        eye = torch.eye(5, dtype=torch.bool)
        out = model(**batch, generator=seeded())
        logits = (out.logits_per_text, out.logits_per_image)
        wanted = [each.masked_fill(eye, -torch.inf).argmax(1) for each in logits]
        assert not torch.equal(*wanted)
        assert torch.equal(out.negatives[0], wanted[0])
        assert torch.equal(out.negatives[1], wanted[1])

    def test_a_seed_repeats_them(self):
        model, batch = stage1(), pairs()
        draws = [torch.stack(model(**batch, generator=seeded(seed)).negatives) for seed in (3, 3, 4)]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])

    @pytest.mark.parametrize("number", [1, 4])
    def test_none_where_all_show_the_same(self, number):
        """The right pairs alone are told apart; every loss is a number with gradients."""
        model, batch = stage1().train(), pairs(lengths=LENGTHS[:number])
        image_ids = None if number == 1 else torch.zeros(number, dtype=torch.long)
        out = model(**batch, image_ids=image_ids, generator=seeded())
        oracle = Stage1Oracle(model)
        features, ids, mask = batch.values()
        nothing = (torch.zeros(number, dtype=torch.bool),) * 2
        itm = oracle.itm(features, ids, mask, (torch.arange(number),) * 2, valid=nothing)[0]
        losses = {
            "itc": oracle.itc(features, ids, mask, image_ids)[0],
            "itm": itm,
            "itg": oracle.itg(features, ids, mask)[0],
        }
        for name, reference in losses.items():
            assert out[f"loss_{name}"].item() == pytest.approx(reference.item(), rel=1e-9, abs=1e-12), name
        out.loss.backward()
        sum(losses.values()).backward()
        assert_same_gradients(model, oracle)
        assert out.accuracies[3].isnan() and out.accuracies[4].isnan()
        assert not out.accuracies[[0, 1, 2, 5]].isnan().any()


def test_evaluation_draws_the_same_each_time_and_leaves_torch_alone():
    model, batch = stage1(), pairs()
    state = torch.get_rng_state()
    first, second = model(**batch), model(**batch)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(*drawn) for drawn in zip(first.negatives, second.negatives, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


class TestClosedForms:
    def test_a_constant_matcher(self):
        model = stage1()
        nn.init.zeros_(model.itm_head.weight)
        model.itm_head.bias.data = torch.tensor([math.log(2 / 3), math.log(1 / 3)], dtype=torch.float64)
        out = model(**pairs(), generator=seeded())
        assert out.loss_itm.item() == pytest.approx(0.6365, abs=5e-5)
        assert out.accuracies[2:5].tolist() == [0.0, 1.0, 1.0]

    def test_a_guess_of_words(self):
        """No word likelier than another: the logarithm of the vocabulary, smoothed or not."""
        model = stage1()
        nn.init.zeros_(model.lm_head.layer_norm.weight)
        nn.init.zeros_(model.lm_head.layer_norm.bias)
        nn.init.zeros_(model.lm_head.decoder.bias)
        assert model(**pairs(), generator=seeded()).loss_itg.item() == pytest.approx(math.log(31), rel=1e-12)

    def test_a_guess_of_pairs(self):
        model = stage1()
        nn.init.zeros_(model.vision_projection.weight)
        assert model(**pairs(), generator=seeded()).loss_itc.item() == pytest.approx(
            math.log(5), rel=0.5
        )  # texts differ
        nn.init.zeros_(model.text_projection.weight)
        out = model(**pairs(), generator=seeded())
        assert out.loss_itc.item() == pytest.approx(math.log(5), rel=1e-9)

    def test_the_last_word_is_sep(self):
        """A head that says [SEP] alone is right once a text."""
        model = stage1()
        nn.init.zeros_(model.lm_head.layer_norm.weight)
        nn.init.zeros_(model.lm_head.layer_norm.bias)
        model.lm_head.decoder.bias.data = 50.0 * nn.functional.one_hot(torch.tensor(SEP), 31).double()
        share = model(**pairs(), generator=seeded()).accuracies[5].item()
        assert share == pytest.approx(len(LENGTHS) / sum(length - 1 for length in LENGTHS), abs=1e-6)


def test_padding_and_others_do_not_reach_the_losses():
    model = stage1()
    batch, wide = pairs(), pairs(width=9)
    wide["input_ids"] = torch.where(wide["attention_mask"].bool(), wide["input_ids"], 13)
    one, two = (model(**each, generator=seeded()) for each in (batch, wide))
    for name in ("loss_itc", "loss_itm", "loss_itg"):
        assert one[name].item() == pytest.approx(two[name].item(), rel=1e-12)


@pytest.mark.parametrize("queries", [1, 2])
def test_few_queries(queries):
    model, batch = stage1(qformer={"num_query_tokens": queries}), pairs()
    out = model.train()(**batch, generator=seeded())
    _, losses, *_ = expected(model, out, batch)
    for name, reference in losses.items():
        assert out[f"loss_{name}"].item() == pytest.approx(reference.item(), rel=1e-9)


class TestPicturesOrFeatures:
    @pytest.mark.parametrize("kind", [MMBlip2ForPreTraining, MMBlip2ForImageTextRetrieval])
    def test_features_are_the_pictures(self, kind):
        model, batch = stage1(torch.float32, kind=kind), pairs(torch.float32)
        del batch["vision_features"]
        live = model(pixel_values=pictures(dtype=torch.float32), **batch, generator=seeded())
        features = model.vision_features(pictures(dtype=torch.float32))
        assert features.shape == (5, 5, 20) and not features.requires_grad
        kept = model(vision_features=features, **batch, generator=seeded())
        for name in ("loss", "logits_per_image", "image_embeds", "text_embeds"):
            assert torch.equal(live[name], kept[name]), name

    def test_features_stand_before_the_norm(self):
        """So that the norm goes on learning from features that were kept."""
        model = stage1()
        features = model.vision_features(pictures())
        tower = model.vision_tower(pixel_values=pictures()).last_hidden_state
        torch.testing.assert_close(features, tower, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("kind", [MMBlip2Model, MMBlip2ForPreTraining])
    def test_both_or_neither_is_refused(self, kind):
        model, batch = stage1(kind=kind), pairs()
        with pytest.raises(ValueError):
            model(pixel_values=pictures(), **batch)
        del batch["vision_features"]
        with pytest.raises(ValueError):
            model(**batch)

    def test_the_tower_stays_as_it_is(self):
        model = stage1().train()
        assert not model.vision_tower.training and model.qformer.training
        assert not any(value.requires_grad for value in model.vision_tower.parameters())
        batch = pairs()
        del batch["vision_features"]
        model(pixel_values=pictures(), **batch, generator=seeded()).loss.backward()
        assert all(value.grad is None for value in model.vision_tower.parameters())
        assert model.vision_norm.weight.grad.abs().max() > 0.0


class TestRetrieval:
    @pytest.fixture(scope="class")
    def model(self):
        return stage1(kind=MMBlip2ForImageTextRetrieval)

    def test_has_no_head_of_words(self, model):
        whole = stage1()
        gone = set(whole.state_dict()) - set(model.state_dict())
        assert gone == {name for name in whole.state_dict() if name.startswith("lm_head.")}
        assert not set(model.state_dict()) - set(whole.state_dict())

    def test_has_the_losses_but_of_words(self, model):
        out = model(**pairs(), generator=seeded())
        whole = stage1()
        whole.load_state_dict(model.state_dict(), strict=False)
        reference = whole(**pairs(), generator=seeded())
        for name in ("loss_itc", "loss_itm"):
            assert out[name].item() == pytest.approx(reference[name].item(), rel=1e-10)
        assert out.loss_itg is None
        assert out.loss.item() == pytest.approx((out.loss_itc + out.loss_itm).item(), rel=1e-12)
        assert out.accuracies[5].isnan()

    @pytest.mark.parametrize("texts", [1, 3, 5, 8])
    def test_as_many_pictures_and_texts_as_there_are(self, model, texts):
        ids, mask = texts_of(*(LENGTHS * 2)[:texts])
        features = features_of(5)
        out = model(ids, vision_features=features, attention_mask=mask)
        assert out.logits_per_image.shape == (5, texts)
        assert (out.loss is None) == (texts != 5)
        images = model.get_image_features(vision_features=features).pooler_output
        words = model.get_text_features(ids, mask).pooler_output
        best = torch.einsum("ikd,jd->ijk", images, words).amax(-1) / model.temperature
        torch.testing.assert_close(out.logits_per_image, best, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(out.logits_per_text, best.T, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_embeddings_are_forwards_and_the_oracles(self, side):
        model, batch = stage1(), pairs(side=side, width=8)
        features, ids, mask = batch.values()
        images, texts = Stage1Oracle(model).embeds(features, ids, mask)
        out = model(**batch, generator=seeded())
        ours = (
            (out.image_embeds, out.text_embeds),
            (
                model.get_image_features(vision_features=features).pooler_output,
                model.get_text_features(ids, mask).pooler_output,
            ),
        )
        for image_embeds, text_embeds in ours:
            assert relative_error(image_embeds, images) < 1e-9
            assert relative_error(text_embeds, texts) < 1e-9

    @pytest.mark.parametrize("size", [1, 4, 64])
    def test_all_pairs_are_each_pair(self, size):
        model = stage1()
        ids, mask = texts_of(*LENGTHS[:4])
        features = features_of(3)
        table = model.get_matching_logits(ids, mask, vision_features=features, batch_size=size)
        assert table.shape == (3, 4, 2)
        oracle = Stage1Oracle(model)
        for i in range(3):
            for j, length in enumerate(LENGTHS[:4]):
                single = model.get_matching_logits(ids[j : j + 1, :length], None, vision_features=features[i : i + 1])[
                    0, 0
                ]
                torch.testing.assert_close(table[i, j], single, rtol=1e-9, atol=1e-10)
                reference = oracle.matching_logits(features[i : i + 1], ids[j : j + 1], mask[j : j + 1])[0]
                torch.testing.assert_close(table[i, j], reference, rtol=1e-9, atol=1e-10)
        chosen = torch.tensor([[2, 0], [0, 3], [0, 3], [1, 1]])
        some = model.get_matching_logits(ids, mask, vision_features=features, pairs=chosen, batch_size=size)
        torch.testing.assert_close(some, table[chosen[:, 0], chosen[:, 1]], rtol=1e-10, atol=1e-10)

    def test_no_pairs(self, model):
        ids, mask = texts_of(*LENGTHS)
        none = torch.zeros(0, 2, dtype=torch.long)
        assert model.get_matching_logits(ids, mask, vision_features=features_of(5), pairs=none).shape == (0, 2)

    def test_pairs_of_pictures(self, model):
        ids, mask = texts_of(*LENGTHS[:2])
        live = model.get_matching_logits(ids, mask, pixel_values=pictures(3))
        kept = model.get_matching_logits(ids, mask, vision_features=model.vision_features(pictures(3)))
        assert torch.equal(live, kept)

    def test_pairs_that_are_not_there(self, model):
        batch = pairs()
        for wrong, message in (
            ([[0, 5]], "beyond the 5 pictures and 5 texts"),
            ([0, 1], r"pairs must be \(pairs, 2\)"),
        ):
            with pytest.raises(ValueError, match=message):
                model.get_matching_logits(**batch, pairs=torch.tensor(wrong))
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            model.get_matching_logits(**batch, batch_size=0)

    def test_a_mask_of_booleans(self, model):
        batch = pairs()
        boolean = {**batch, "attention_mask": batch["attention_mask"].bool()}
        out, expected = (model(**given, generator=seeded()) for given in (boolean, batch))
        assert out.loss.equal(expected.loss) and out.logits_per_image.equal(expected.logits_per_image)

    def test_matching_loss_is_of_these_logits(self):
        """What a pair scores in retrieval is what the loss trained."""
        model, batch = stage1(), pairs()
        out = model(**batch, generator=seeded())
        features, ids, mask = batch.values()
        own = torch.arange(5)
        drawn_pictures, drawn_texts = out.negatives
        wanted = torch.cat([torch.stack(each, 1) for each in ((own, own), (drawn_pictures, own), (own, drawn_texts))])
        logits = model.get_matching_logits(ids, mask, vision_features=features, pairs=wanted)
        labels = torch.tensor([1] * 5 + [0] * 10)
        loss = nn.functional.cross_entropy(logits, labels)
        assert out.loss_itm.item() == pytest.approx(loss.item(), rel=1e-10)

    def test_without_a_loss(self, model):
        out = model.train()(**pairs(), return_loss=False)
        model.eval()
        assert out.loss is None and out.loss_itm is None and out.negatives is None
        assert out.logits_per_image.shape == (5, 5)

    def test_training_needs_pairs(self, model):
        ids, mask = texts_of(*LENGTHS[:3])
        try:
            with pytest.raises(ValueError, match=r"5 pictures and 3 texts"):
                model.train()(ids, vision_features=features_of(5), attention_mask=mask)
        finally:
            model.eval()

    def test_ids_are_one_a_picture(self, model):
        with pytest.raises(ValueError, match="image_ids"):
            model(**pairs(), image_ids=torch.arange(4))

    def test_opens_a_checkpoint_of_pretraining(self, tmp_path):
        whole = stage1()
        whole.save_pretrained(tmp_path)
        opened = MMBlip2ForImageTextRetrieval.from_pretrained(tmp_path, attn_implementation="eager")
        for name, value in opened.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), name


class TestPublished:
    @pytest.fixture(scope="class")
    def model(self):
        with torch.device("meta"):
            return MMBlip2ForPreTraining(
                MMBlip2Config(
                    vision_config={"model_type": "mm_vit", "hidden_size": 1408, "num_attention_heads": 16},
                    qformer_config=MMBlip2QFormerConfig(),
                )
            )

    def test_number_of_trained_parameters(self, model):
        """The number that a public log of LAVIS' training prints."""
        assert sum(value.numel() for value in model.parameters() if value.requires_grad) == 186_705_470

    def test_words_are_tied(self):
        model = stage1()
        assert model.lm_head.decoder.weight is model.qformer.embeddings.word_embeddings.weight

    def test_init(self):
        torch.manual_seed(0)
        model = MMBlip2ForPreTraining(blip2_config({"hidden_size": 128, "num_query_tokens": 32}, joint_dim=128))
        assert model.temperature.shape == (1,)
        assert model.temperature.item() == pytest.approx(0.07)
        assert model.vision_norm.eps == 1e-5
        assert (model.vision_norm.weight == 1.0).all() and (model.vision_norm.bias == 0.0).all()
        assert model.qformer.embeddings.query_tokens.std().item() == pytest.approx(0.02, rel=0.05)
        for layer in model.qformer.layers:
            assert torch.equal(layer.query_mlp.fc1.weight, layer.text_mlp.fc1.weight)
            assert torch.equal(layer.query_mlp.fc2.weight, layer.text_mlp.fc2.weight)
        bound = 128**-0.5
        for module in (model.vision_projection, model.text_projection, model.itm_head):
            assert module.weight.abs().max() <= bound and module.weight.abs().max() > 0.8 * bound
            assert module.bias.abs().max() <= bound and module.bias.abs().max() > 0.0
        assert model.lm_head.transform.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (model.lm_head.transform.bias == 0.0).all() and (model.lm_head.decoder.bias == 0.0).all()


RANKS = {"plain": {}, "image ids": {"image_ids": True}, "detached": {"gather_with_grad": False}}
GLOBAL_LENGTHS = (4, 3, 5, 7, 6, 3)
GLOBAL_IDS = torch.tensor([4, 9, 4, 2, 9, 4])


def global_batch(scheme):
    batch = pairs(lengths=GLOBAL_LENGTHS)
    return {**batch, "image_ids": GLOBAL_IDS} if RANKS[scheme].get("image_ids") else batch


def answers_of(scheme, batch):
    fields = {name: value for name, value in RANKS[scheme].items() if name != "image_ids"}
    model = stage1(**fields).train()
    out = model(**batch, generator=seeded(6))
    out.loss.backward()
    losses = torch.stack([out.loss, out.loss_itc, out.loss_itm, out.loss_itg]).detach()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {
        "losses": losses,
        "gradients": gradients,
        "negatives": torch.stack(out.negatives),
        "logits": out.logits_per_image.detach(),
        "accuracies": out.accuracies,
    }


def on_one_rank(rank, folder):
    """Half of the pairs, no longer than their own longest text."""
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
        answers = {}
        for scheme in RANKS:
            batch = {name: value[3 * rank : 3 * rank + 3] for name, value in global_batch(scheme).items()}
            longest = batch["attention_mask"].sum(1).max()
            assert longest == (5, 7)[rank]
            batch |= {name: batch[name][:, :longest] for name in ("input_ids", "attention_mask")}
            answers[scheme] = answers_of(scheme, batch)
        torch.save(answers, folder / f"{rank}.pt")
        dist.barrier()
    except Exception:
        (folder / f"{rank}.error").write_text(traceback.format_exc())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=on_one_rank, args=(rank, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        if process.is_alive():
            process.kill()
    errors = [path.read_text() for path in folder.glob("*.error")]
    assert not errors, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("scheme", RANKS)
def test_two_processes_are_one(two_ranks, scheme):
    """The mean over ranks of losses and gradients, though their texts differ in length and number of words."""
    ranks = [answers[scheme] for answers in two_ranks]
    alone = answers_of(scheme, global_batch(scheme))
    assert torch.equal(torch.cat([each["negatives"] for each in ranks], 1), alone["negatives"])
    logits = torch.cat([each["logits"] for each in ranks])
    if logits.shape == alone["logits"].shape:
        torch.testing.assert_close(logits, alone["logits"], rtol=1e-10, atol=1e-10)
    mean = torch.stack([each["losses"] for each in ranks]).mean(0)
    torch.testing.assert_close(mean, alone["losses"], rtol=1e-10, atol=1e-12)
    for name, gradient in alone["gradients"].items():
        ours = torch.stack([each["gradients"][name] for each in ranks]).mean(0)
        atol = 1e-8 * gradient.abs().max().item()
        torch.testing.assert_close(ours, gradient, rtol=1e-8, atol=atol + 1e-13, msg=name)


def test_it_learns():
    """24 pairs: contrast near the floor that smoothing leaves, every picture finds its text, words get likelier."""
    torch.manual_seed(0)
    number = 24
    wide = {"num_query_tokens": 4, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
    model = MMBlip2ForPreTraining(blip2_config(wide, joint_dim=32)).train()
    ids, mask = texts_of(*(5 + row % 3 for row in range(number)))
    batch = {"vision_features": features_of(number, dtype=torch.float32), "input_ids": ids, "attention_mask": mask}
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer, generator = torch.optim.AdamW(trained, lr=5e-4), seeded()
    wrong = 0.1 / number
    floor = -(0.9 + wrong) * math.log(0.9 + wrong) - (number - 1) * wrong * math.log(wrong)
    assert floor == pytest.approx(0.616, abs=1e-3)
    steps = []
    while len(steps) < 400 and not (steps and steps[-1].loss_itc < floor + 0.04 and steps[-1].loss_itg < 2.0):
        steps.append(model(**batch, generator=generator))
        optimizer.zero_grad()
        steps[-1].loss.backward()
        optimizer.step()
    first, last = steps[0], steps[-1]
    assert first.loss_itc.item() == pytest.approx(math.log(number), abs=0.1)
    assert first.loss_itg.item() == pytest.approx(math.log(31), abs=0.1)
    assert floor < last.loss_itc.item() < floor + 0.04
    assert last.accuracies[:2].tolist() == [1.0, 1.0]
    assert last.loss_itg.item() < 2.0
