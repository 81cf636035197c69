"""CLIP's tokenizer against open_clip's, both with the published vocabulary."""

import random
import unicodedata

import pytest

pytest.importorskip("open_clip")

from open_clip.tokenizer import SimpleTokenizer, default_bpe

from hf_mm.models.clip.tokenization_clip import MMClipTokenizer

CONTEXT = 77
PROBES = [
    # Plain
    "a photo of a cat",
    "A  Photo\tof\na CAT ",
    "file_name_3d",
    "__ _ _a_",
    "1234567890 3.14 10km 2nd",
    "...!?!... #hash @you a/b\\c <tag> a*b * , (*)",
    "it's they're we've i'm he'll she'd don't",
    "''s 's' !'t 'S 'LL 'rex",
    "½ Ⅳ ² ①",
    "",
    "   \n\t ",
    # Accents and scripts
    "naïve résumé",
    "nai\u0308ve re\u0301sume\u0301 g\u0303",
    "İstanbul ISTANBUL ıi",
    "ΟΔΟΣ ΣΑΣ ſ ẞ",
    "日本語のテスト、漢字 한국어",
    "Привет Ελλάδα हिन्दी ไทย",
    "שלום مرحبا \u200fabc\u200e ١٢٣",
    "🐶🐱 dog👩‍👩‍👧cat 🇩🇪 👍🏽 ❤️ 1️⃣",
    "𝒻𝒶𝓃𝒸𝓎 𐍈 𝟙𝟚",
    # What ftfy, HTML unescaping and white-space cleaning change
    "the “quoted” ‘word’ it’s — …",
    "fish &amp; chips &lt;b&gt; caf&#233; &nbsp; x &euro;&#x20AC;",
    "&amp;lt;i&amp;gt; &amp;amp; &amp;amp;amp;",
    "cafÃ© â€œmojibakeâ€\x9d naÃ¯ve",
    "ﬁne ﬂow oﬀer ŉ",
    "ＦＵＬＬ ｗｉｄｔｈ １２３　！",
    "bell\x07 null\x00 escape\x1b[31mred\x1b[0m tab\x0b",
    "unit\x1fgroup\x1drecord\x1e file\x1c next\x85line",
    "soft\u00adhyphen zero\u200bwidth line\u2028break bom\ufeff",
    "no\u00a0break\u2003em\u3000wide \r\n return",
    "e&#769; combined after unescaping",
    "\ud83d\ude00 surrogates \ud83d alone",
    # Longer than the context
    "a very long caption about a cat and a dog, " * 20,
    "🐶" * 100,
    "supercalifragilisticexpialidocious" * 30,
]


@pytest.fixture(scope="module")
def ours():
    return MMClipTokenizer.from_bpe_file(default_bpe())


@pytest.fixture(scope="module")
def theirs():
    return SimpleTokenizer()


def their_ids(theirs, text: str) -> list[int]:
    """Without their padding, which is the id of "!"."""
    row = theirs(text)[0].tolist()
    return row[: row.index(theirs.eot_token_id) + 1]


def test_vocabularies_are_equal(ours, theirs):
    published = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    assert ours.get_vocab() == {published.get(token, token): index for token, index in theirs.encoder.items()}
    assert len(ours) == theirs.vocab_size == 49408
    assert ours.model_max_length == theirs.context_length == CONTEXT


@pytest.mark.parametrize("text", PROBES, ids=ascii)
def test_ids(ours, theirs, text):
    ids = their_ids(theirs, text)
    assert ours(text)["input_ids"] == ids
    assert len(ids) <= CONTEXT


def test_the_long_probes_are_cut(ours):
    assert [len(ours(text)["input_ids"]) for text in PROBES[-3:]] == [CONTEXT] * 3
    assert all(len(ours(text)["input_ids"]) < CONTEXT for text in PROBES[:-3])


def test_a_padded_batch_is_theirs_up_to_the_first_end_token(ours, theirs):
    """Theirs pads with 0, ours with the end token: the text tower sees neither."""
    batch = ours(PROBES, padding="max_length", return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    reference = theirs(PROBES)
    assert ids.shape == reference.shape == (len(PROBES), CONTEXT)
    assert (ids == reference)[mask.bool()].all()
    assert (reference[~mask.bool()] == 0).all()
    assert (ids[~mask.bool()] == theirs.eot_token_id).all()


def test_ids_of_random_text(ours, theirs):
    ranges = [(0, 0x500), (0x5D0, 0x700), (0x1E00, 0x2C00), (0x3000, 0x3200), (0xFB00, 0xFB07), (0xFF00, 0xFF80)]
    letters = [chr(code) for low, high in [*ranges, (0x1F300, 0x1F700)] for code in range(low, high)]
    # Code points that Unicode versions disagree on; and U+0345, see below.
    letters = [letter for letter in letters if unicodedata.category(letter) != "Cn" and letter != "\u0345"]
    letters += ["'s", "'ll", "&amp;", "&amp;lt;", "&#233;", "é", "“", "’", " ", " the ", "1", "_"] * 50
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices(letters, k=draw.randint(1, 12)))
        assert ours(text)["input_ids"] == their_ids(theirs, text), ascii(text)


# Differences that are meant


def test_each_has_its_own_spelling_of_the_special_tokens(ours, theirs):
    """open_clip spells them <start_of_text> and <end_of_text>; ours keeps OpenAI's <|startoftext|> and <|endoftext|>.

    It matters only where a caption contains the literal string.
    """
    openai, renamed = "a <|startoftext|> b <|endoftext|> c", "a <start_of_text> b <end_of_text> c"
    start, end = theirs.sot_token_id, theirs.eot_token_id
    ids = ours(openai)["input_ids"]
    assert ids[1:-1] == theirs.encode(renamed)
    assert [ids[0], ids[2], ids[4], ids[6]] == [start, start, end, end]
    # Each reads the other's spelling as words and signs.
    for read in (theirs.encode(openai), ours(renamed)["input_ids"][1:-1]):
        assert len(read) > 5 and not {start, end} & set(read)


def test_a_character_that_their_case_folding_loses_is_kept(ours, theirs):
    """U+0345 is a mark whose upper case is a letter: none of their pieces matches it."""
    assert theirs.encode("x\u0345y") == theirs.encode("x y")
    ids = ours("x\u0345y")["input_ids"]
    assert ours.decode(ids, skip_special_tokens=True).replace(" ", "") == "x\u0345y"
