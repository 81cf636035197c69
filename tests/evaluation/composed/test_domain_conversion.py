import pytest
import torch
from composed_toys import ColorModel, ColorProcessor, save

from hf_mm.evaluation.composed.domain_conversion import (
    DOMAINS,
    REAL,
    domain_metrics,
    evaluate_domain_conversion,
    read_domain_conversion,
)
from hf_mm.evaluation.composed.published import PUBLISHED

CLASSES = {"n01": "cat", "n02": "dog"}


def copy(folder):
    """Both folders as published: a rendition in each domain, two cartoons of a cat and no origami dog."""
    for name, word in CLASSES.items():
        for number in range(2):
            save(folder / f"real/{name}/ILSVRC2012_val_0000{number}.JPEG", word, "real")
        for domain in DOMAINS:
            if (name, domain) != ("n02", "origami"):
                save(folder / f"imagenet-r/{name}/{domain}_0.jpg", word, domain)
        save(folder / f"imagenet-r/{name}/sketch_0.jpg", word, "long")  # a domain that is not asked for
    save(folder / "imagenet-r/n01/cartoon_7.jpg", "cat", "cartoon")
    save(folder / "real/n03/ILSVRC2012_val_00009.JPEG", "bird", "real")  # a class that has no renditions
    (folder / "imagenet-r/README.txt").write_text("as published")
    return folder


def write_lists(folder, root="imgnet/"):
    queries, gallery, _ = read_domain_conversion(folder)
    line = "{}{} {} \n".format
    (folder / "imgnet_targets.txt").write_text(
        "".join(
            line(root, picture.path.relative_to(folder), picture.label + 1000 * picture.domain) for picture in gallery
        )
    )
    (folder / "imgnet_real_query.txt").write_text(
        "".join(line(root, picture.path.relative_to(folder), picture.label) for picture in queries)
    )
    return queries, gallery


def evaluate(folder):
    processor = ColorProcessor()
    return evaluate_domain_conversion(ColorModel(), processor, folder, progress=False), processor


def test_folders_and_lists_say_the_same(tmp_path):
    folder = copy(tmp_path / "imgnet")
    queries, gallery, source = read_domain_conversion(folder)
    assert source == "folders" and len(queries) == 4 and len(gallery) == 8 + 4
    assert {(picture.label, picture.domain) for picture in queries} == {(0, REAL), (1, REAL)}
    assert sum((picture.label, picture.domain) == (0, 0) for picture in gallery) == 2
    assert {picture.path.name.partition("_")[0] for picture in gallery} == {*DOMAINS, "ILSVRC2012"}
    for root in ("imgnet/", ""):
        write_lists(folder, root)
        assert read_domain_conversion(folder) == (queries, gallery, "lists")
        for name in ("imgnet_targets.txt", "imgnet_real_query.txt"):
            (folder / name).unlink()


def test_labels_of_the_lists_are_class_and_thousands_of_domain(tmp_path):
    folder = tmp_path / "imgnet"
    for name in ("real/n01/a.JPEG", "imagenet-r/n01/toy_0.jpg", "imagenet-r/n01/sculpture_3.jpg"):
        save(folder / name, "cat", "real")
    (folder / "imgnet_real_query.txt").write_text("imgnet/real/n01/a.JPEG 2 \n")
    lines = ("imagenet-r/n01/toy_0.jpg 2002", "real/n01/a.JPEG 6002", "imagenet-r/n01/sculpture_3.jpg 3998")
    (folder / "imgnet_targets.txt").write_text("".join(f"imgnet/{line} \n" for line in lines))
    queries, gallery, _ = read_domain_conversion(folder)
    assert [(picture.path, picture.label) for picture in queries] == [(folder / "real/n01/a.JPEG", 2)]
    assert [(picture.label, picture.domain) for picture in gallery] == [(2, 2), (2, REAL), (998, 3)]


def test_the_right_model_finds_everything_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mm.evaluation.composed.domain_conversion.domain_metrics.__defaults__", ((1, 2),))
    result, processor = evaluate(copy(tmp_path))
    rows = result["results"]
    assert rows["cartoon"]["composed"] == {"r1": 75, "r2": 100, "p1": 100, "p2": 75}  # the cat has two cartoons
    assert rows["toy"]["composed"] == {"r1": 100, "r2": 100, "p1": 100, "p2": 50}
    # a dog as origami does not exist: as published, those two queries of four score 0
    assert rows["origami"]["composed"] == {"r1": 50, "r2": 50, "p1": 50, "p2": 25}
    assert result["answerable"] == {"cartoon": 100, "origami": 50, "toy": 100, "sculpture": 100}
    assert rows["mean"]["composed"]["r2"] == pytest.approx(350 / 4)
    for domain in DOMAINS:  # photos of the class, the query among them, come first
        assert set(rows[domain]["image_only"].values()) == {0}
    assert rows["toy"]["text_only"] == {"r1": 0, "r2": 100, "p1": 0, "p2": 50}  # ties with the other class
    assert result["queries"] == 4 and result["gallery"] == 12
    assert len(processor.pictures) == 12  # queries are in the gallery: each picture once
    assert result["published"] is PUBLISHED["domain-conversion"]
    assert {"a toy of *", "a toy of"} <= set(processor.texts)


def test_chance_is_what_random_orders_score(tmp_path):
    rows = evaluate(copy(tmp_path))[0]["results"]
    assert rows["toy"]["chance"]["r10"] == pytest.approx(1000 / 12) and rows["toy"]["chance"]["r50"] == 100
    assert rows["origami"]["chance"]["r10"] == pytest.approx(500 / 12)
    assert rows["cartoon"]["chance"]["p10"] == pytest.approx(100 * 1.5 / 12)
    assert rows["cartoon"]["chance"]["p50"] == pytest.approx(100 * 1.5 / 50)


def test_metrics_are_those_of_sorting():
    queries = torch.nn.functional.normalize(torch.randn(300, 6), dim=-1)  # more than one chunk
    gallery = torch.nn.functional.normalize(torch.randn(90, 6), dim=-1)
    asked, classes = torch.randint(5, (300,)), torch.randint(-1, 4, (90,))  # class 4 has no picture
    found = domain_metrics(queries, gallery, asked, classes, ks=(3, 20, 100))
    for k in (3, 20, 100):
        recalls, precisions = [], []
        for query, label in zip(queries, asked, strict=True):
            order = (gallery @ query).argsort(descending=True)[:k]
            hits = (classes[order] == label).sum().item()
            recalls.append(hits / max(1, (classes == label).sum().item()))
            precisions.append(hits / k)
        assert found[f"r{k}"] == pytest.approx(100 * sum(recalls) / 300)
        assert found[f"p{k}"] == pytest.approx(100 * sum(precisions) / 300)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="imagenet-r is missing, and so is imgnet_real_query.txt.*hendrycks"):
        evaluate(tmp_path)
    folder = copy(tmp_path / "imgnet")
    write_lists(folder)
    (folder / "imagenet-r/n01/toy_0.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 12 pictures are missing, such as .*toy_0.jpg"):
        evaluate(folder)
    for bad in ("a.jpg", "a.jpg 4001", "a.jpg x"):
        (folder / "imgnet_targets.txt").write_text(f"imgnet/imagenet-r/n01/cartoon_0.jpg 0\n{bad}\n")
        with pytest.raises(ValueError, match=f"line 2 of .* is '{bad}'"):
            evaluate(folder)
    (folder / "imgnet_targets.txt").write_text("")
    with pytest.raises(ValueError, match="4 queries and no pictures in other domains"):
        evaluate(folder)
