import pytest
import torch
from evaluation.toys import noise, small_clip
from torch.nn.functional import normalize

from hf_mm.evaluation.composed import PROTOCOLS, cirr, domain_conversion, fashioniq, object_composition
from hf_mm.evaluation.composed.protocol import (
    CHUNK,
    answer_ranks,
    cumulative_hits,
    embed_queries,
    encode_once,
    mean_rows,
    similarities,
    write_json,
)
from hf_mm.evaluation.composed.published import PUBLISHED
from hf_mm.evaluation.composed.table import format_table
from hf_mm.evaluation.metrics import TIE, retrieval_ranks


def random_directions(count):
    return normalize(torch.randn(count, 8), dim=-1)


def test_ranks_in_chunks_are_those_of_the_whole():
    queries, gallery = random_directions(2 * CHUNK + 3), random_directions(20)
    answers, removed = torch.randint(10, (len(queries),)), torch.randint(10, 20, (len(queries),))
    positives = torch.nn.functional.one_hot(answers, 20).bool()
    whole = retrieval_ranks(queries @ gallery.T, positives)
    assert answer_ranks(queries, gallery, answers).equal(whole)
    ahead = (queries @ gallery.T).gather(1, removed[:, None]) > (queries @ gallery.T).gather(1, answers[:, None])
    assert answer_ranks(queries, gallery, answers, removed).equal(whole - ahead[:, 0].long())


def test_ties_count_against_the_model():
    constant = normalize(torch.ones(6, 3), dim=-1)
    assert answer_ranks(constant, constant, torch.arange(6)).tolist() == [6] * 6
    assert answer_ranks(constant, constant, torch.arange(6), removed=torch.arange(6).roll(1)).tolist() == [5] * 6
    positives = torch.tensor([[True, False, True, False, False]])
    assert cumulative_hits(torch.full((1, 5), 0.5), positives, 5).tolist() == [[0, 0, 0, 1, 2]]
    near = torch.tensor([[0.5, 0.5 - 5e-7, 0.2, 0.3, 0.1]])
    assert cumulative_hits(near, positives, 5).tolist() == [[0, 1, 1, 2, 2]]
    edge = torch.stack([torch.tensor(0.5), torch.tensor(0.5) - TIE])[None]
    assert cumulative_hits(edge, torch.tensor([[True, False]]), 2).tolist() == [[0, 1]]
    clear = torch.tensor([[0.5, 0.5 - 5e-6, 0.2, 0.3, 0.1]])
    assert cumulative_hits(clear, positives, 7).tolist() == [[1, 1, 1, 2, 2, 2, 2]]


def test_the_first_hit_is_at_the_rank_of_retrieval():
    similarity, positives = (torch.rand(50, 30) * 8).round() / 8, torch.rand(50, 30) < 0.2  # many ties
    positives[:, 3] = True
    first = (cumulative_hits(similarity, positives, 30) == 0).sum(dim=1) + 1
    assert first.equal(retrieval_ranks(similarity, positives))


def test_a_broken_model_is_not_given_a_score():
    queries = random_directions(3)
    queries[1, 2] = torch.nan
    with pytest.raises(ValueError, match="embeddings are broken"):
        similarities(queries, random_directions(4))


def test_the_methods_come_from_one_encoding(pic2word):
    model, processor = pic2word
    features, texts = torch.randn(2, 8), ["a red cat", "a dog"]
    asked = embed_queries(model, processor, features, ["* , a red cat", "* , a dog"], texts, progress=False)
    assert asked["image_only"].equal(normalize(features, dim=-1))
    torch.testing.assert_close(asked["image_text"], normalize(asked["image_only"] + asked["text_only"], dim=-1))
    for embeddings in asked.values():
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_pictures_are_encoded_once_and_keep_their_length(pic2word, tmp_path):
    model, processor = pic2word
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, picture in zip(paths, noise(3), strict=True):
        picture.save(path)
    features_of = encode_once(model, processor, [*paths, paths[0]], progress=False)
    wanted = [paths[2], paths[0], paths[0]]
    expected = model.vision_features(processor(images=wanted, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(features_of(wanted), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_model_without_composed_queries_is_refused(protocol, tmp_path, pic2word):
    for model, processor in ((small_clip()[0], pic2word[1]), (pic2word[0], small_clip()[1])):
        with pytest.raises(ValueError, match="MMClip.* cannot put a picture into a sentence"):
            PROTOCOLS[protocol](model, processor, tmp_path)


def test_the_mean_row():
    groups = ({"ours": {"r1": 1.0}, "chance": {"r1": 0.0}}, {"ours": {"r1": 2.0}, "chance": {"r1": 1.0}})
    assert mean_rows(groups) == {"ours": {"r1": 1.5}, "chance": {"r1": 0.5}}


def test_published_lines_fit_the_protocols():
    assert PUBLISHED.keys() == PROTOCOLS.keys()
    known = {
        "domain-conversion": ({*domain_conversion.DOMAINS, "mean"}, domain_conversion.RECALLS),
        "object-composition": (set(object_composition.PROMPTS), object_composition.RECALLS),
        "cirr": (set(cirr.SPLITS), cirr.RECALLS),
        "fashioniq": ({*fashioniq.CATEGORIES, "mean"}, fashioniq.RECALLS),
    }
    for protocol, groups in PUBLISHED.items():
        names, ks = known[protocol]
        assert groups.keys() <= names
        for line in (line for group in groups.values() for line in group.values()):
            assert (
                line["metrics"].keys() <= {f"r{k}" for k in ks}
                and line["source"]
                and line["verified"] in (True, False)
            )
            assert list(line["metrics"].values()) == sorted(line["metrics"].values())


@pytest.mark.parametrize("protocol", ["domain-conversion", "fashioniq"])
def test_published_means_are_those_of_the_groups(protocol):
    groups = dict(PUBLISHED[protocol])
    name = "Pic2Word, ViT-L/14"
    mean = groups.pop("mean")[name]["metrics"]
    for metric, value in mean.items():
        values = [group[name]["metrics"][metric] for group in groups.values()]
        assert sum(values) / len(values) == pytest.approx(value, abs=0.051)


def test_a_table_has_every_row_and_says_what_is_not_verified():
    row = {"r1": 12.34, "r50": 99.0}
    result = {
        "protocol": "ours",
        "queries": {"dress": 3, "shirt": 4},
        "answerable": {"toy": 76.54},
        "results": {"val": {"composed": row, "chance": {"r1": 0.043, "r50": 2.0}}},
        "published": {"test1": {"Theirs": {"metrics": {"r1": 7.0}, "source": "A paper", "verified": False}}},
    }
    head, *lines = format_table(result).splitlines()
    assert (head, *lines[:2]) == ("protocol: ours", "queries: dress 3, shirt 4", "answerable: toy 76.5")
    lines = lines[3:]
    assert lines[0].split() == ["val", "r1", "r50"]
    assert lines[1].split()[-2:] == ["12.3", "99.0"] and lines[2].split() == ["chance", "0.04", "2.0"]
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[4].split() == ["test1", "r1"] and lines[5].split() == ["published:", "Theirs", "(?)", "7.0"]
    assert lines[-1].startswith("Published: A paper.")


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "new/one.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "new/one.json", {"a": object()})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["one.json"]
    assert (tmp_path / "new/one.json").read_text() == '{\n  "a": 1\n}\n'
