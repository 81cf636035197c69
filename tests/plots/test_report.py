import base64
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from hf_mm.plots.figures import plot_losses
from hf_mm.plots.report import Picture, Section, Table, write_report


class Page(HTMLParser):
    """What a page is made of: tags with attributes, and the text in each kind of tag."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open = [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.text[tag][-1] += data


def figure():
    return plot_losses([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])


def sections():
    return [
        Section("One & two", "A <b>bold</b> claim.\n\nAnother.", [Picture(figure(), 'a "falling" line', "5 < 6")]),
        Section("Numbers", tables=[Table(["%", "R@1\nknown"], [["cat", "1.0\n2.0"], ["dog & co", "–"]], "a < b")]),
    ]


def test_a_page_holds_all_that_was_given(tmp_path):
    path = write_report(tmp_path / "new" / "report.html", "Title <1>", "Lead.", sections())
    page = Page(path.read_text(encoding="utf-8"))
    assert page.text["h1"] == page.text["title"] == ["Title <1>"]
    assert page.text["h2"] == ["One & two", "Numbers"]
    assert page.text["p"] == ["Lead.", "A <b>bold</b> claim.", "Another."]
    assert page.text["figcaption"] == ["5 < 6", "a < b"]
    assert page.text["th"] == ["%", "R@1known", "cat", "dog & co"]
    assert page.text["td"] == ["1.02.0", "–"] and page.text["small"] == ["known", "2.0"]
    assert [attributes["scope"] for tag, attributes in page.tags if tag == "th"] == ["col", "col", "row", "row"]


def test_a_page_needs_nothing_beside_it(tmp_path):
    page = Page(write_report(tmp_path / "report.html", "Title", "Lead.", sections()).read_text(encoding="utf-8"))
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    assert "url(" not in page.text["style"][0] and "@import" not in page.text["style"][0]
    addresses = [attributes[key] for _, attributes in page.tags for key in ("src", "href") if key in attributes]
    (source,) = addresses
    head, data = source.split(",")
    assert head == "data:image/svg+xml;base64"
    assert ElementTree.fromstring(base64.b64decode(data)).tag == "{http://www.w3.org/2000/svg}svg"
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"] == ['a "falling" line']
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_equal_sections_give_equal_bytes_and_no_other_file(tmp_path):
    paths = [write_report(tmp_path / f"{number}.html", "Title", "Lead.", sections()) for number in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths


def test_a_table_with_a_ragged_row_is_refused():
    with pytest.raises(ValueError, match="row 1 of the table has 1 cells but its header has 2"):
        Table(["a", "b"], [["1", "2"], ["3"]])
