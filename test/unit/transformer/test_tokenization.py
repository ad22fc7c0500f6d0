"""WordPieces equal the original tokenizer's, in Rust and in Python."""

import json
import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from small_models import bert_base_uncased

from transformer.errors import UserError
from transformer.tokenization import _NEEDS_PYTHON, BertTokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "tokenization.json").read_text(encoding="utf-8"))

# Characters of the golden texts that Unicode 14 (Python 3.11, where the ids were made) leaves unassigned.
# The original drops unassigned characters, so its ids for these depend on the Python version.
UNASSIGNED_IN_UNICODE_14 = frozenset(
    "\u0378\u0379\u0380\u0382\u05f5\u05f6\u05f8\u05f9\u05fa\u05fb\u05fd\u0984\u0991\u09b1\u09b4\u09b5"
    "\u09ba\u09c6\u09cf\u09d2\u09d6\u09de\u09e4\u1f16\u1f1e\u1f47\u1f4e\u1f5e\u1f7e\u1f7f\u1fd5\u1ff0"
    "\u1ff1\u2065\u20c1\u20c5\u20cd\u20ce\u20cf\u20f1\u20f4\u20f5\u20fa\u20fb\u20fe\u218c\ud7ff\uffc8"
    "\uffd9\uffdd\uffde\uffe7\U0001fae8"
)


@pytest.fixture(scope="module")
def vocabulary() -> Path:
    return bert_base_uncased("vocab.txt")


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
    """Return the basic tokens of the Rust path."""
    normalized = tokenizer._from_text.normalizer.normalize_str(text)
    return [word for word, _ in tokenizer._from_text.pre_tokenizer.pre_tokenize_str(normalized)]


def golden_texts() -> list[str]:
    """Return the golden texts without characters that were unassigned for Python 3.11 and no longer are."""
    newer = {ord(c): None for c in UNASSIGNED_IN_UNICODE_14 if unicodedata.category(c) != "Cn"}
    return [case["text"].translate(newer) for case in GOLDEN]


def test_ids_equal_the_originals_on_the_golden_texts(tokenizer):
    expected = [case["uncased" if tokenizer.do_lower_case else "cased"] for case in GOLDEN]
    assert len(expected) == 370
    assert tokenizer.encode_batch(golden_texts()) == expected
    for text, ids in zip(golden_texts(), expected, strict=True):
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids


def test_pieces_and_ids_of_an_example(small):
    pieces = small.tokenize("Rewatchable FILMS! rewind [MASK]")
    # "rewind" begins with "re", but no piece continues it: the whole word is unknown.
    assert pieces == ["re", "##watch", "##able", "film", "##s", "!", "[UNK]", "[MASK]"]
    assert small.convert_tokens_to_ids(pieces) == [5, 6, 7, 8, 9, 10, 1, 4]
    assert small.convert_ids_to_tokens([2, 8, 3, 0]) == ["[CLS]", "film", "[SEP]", "[PAD]"]
    assert len(small) == 11
    special = small.pad_token_id, small.unk_token_id, small.cls_token_id, small.sep_token_id, small.mask_token_id
    assert special == (0, 1, 2, 3, 4)


AGREEING = [chr(code) for code in range(sys.maxunicode + 1) if not _NEEDS_PYTHON.search(chr(code))]


def test_rust_and_python_split_every_agreeing_character_alike(tokenizer):
    """Alone and between letters. A change of Unicode tables in Python or `tokenizers` fails here."""
    assert len(AGREEING) > 40_000
    texts = [text for char in AGREEING for text in (char, f"a{char}b")]
    assert [text for text in texts if rust_words(tokenizer, text) != tokenizer.basic_tokenize(text)] == []


def test_agreeing_characters_do_not_depend_on_their_context(tokenizer):
    assert not {"[", "\u03a3"} & set(AGREEING)  # special tokens; the sigma of two lower-case forms
    for char in AGREEING:
        assert char in "\t\n\r" or unicodedata.category(char)[0] not in "CM", ascii(char)
        left = [c for c in unicodedata.normalize("NFD", char) if unicodedata.category(c) != "Mn"]
        assert not any(map(unicodedata.combining, left)), ascii(char)  # nothing that NFD would sort
    generator = random.Random(0)
    for _ in range(1000):
        text = "".join(generator.choices(AGREEING, k=20) + generator.choices("aB -'.", k=10))
        assert rust_words(tokenizer, text) == tokenizer.basic_tokenize(text), ascii(text)


def test_text_is_split_at_punctuation_and_ideographs(vocabulary):
    text = "Don't—ÉTÉ 東京 ΟΔΟΣ\u200b[SEP] [SEP]"
    lower = ["don", "'", "t", "—", "ete", "東", "京", "οδος", "[", "sep", "]", "[SEP]"]
    cased = ["Don", "'", "t", "—", "ÉTÉ", "東", "京", "ΟΔΟΣ", "[", "SEP", "]", "[SEP]"]
    assert BertTokenizer(vocabulary).basic_tokenize(text) == lower
    assert BertTokenizer(vocabulary, do_lower_case=False).basic_tokenize(text) == cased


def test_a_special_token_is_found_only_between_spaces(tokenizer):
    for special in ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"):
        assert tokenizer.tokenize(f"a {special}\tfilm") == ["a", special, "film"]
        assert tokenizer.tokenize(f"東{special}\u3000film")[1] == special  # ideographs are set between spaces
        assert tokenizer.tokenize("[" + "\x00" + special[1:]) == [special]  # a dropped character does not separate
        for text in (f"a{special}", f"{special}!", special.lower()):
            assert special not in tokenizer.basic_tokenize(text)
            assert special == "[UNK]" or special not in tokenizer.tokenize(text)


def test_a_word_of_more_than_100_characters_is_unknown(tokenizer):
    for start in ("", "\u200b"):  # the Rust and the Python path
        assert "[UNK]" not in tokenizer.tokenize(start + "a" * 100)
        assert tokenizer.tokenize(start + "a" * 101) == ["[UNK]"]


def test_characters_that_are_dropped_leave_no_token(tokenizer):
    # A lone surrogate cannot be passed to Rust; it is dropped like the other characters of category C.
    assert tokenizer.tokenize("fi\udfffne \ud800") == ["fine"]
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode_batch(["", " \x00", "\ufeff", "\ud800"]) == [[]] * 4


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
def test_a_million_characters_take_less_than_30_seconds(vocabulary, text):
    tokenizer = BertTokenizer(vocabulary)
    start = time.perf_counter()
    (ids,) = tokenizer.encode_batch([text])
    assert time.perf_counter() - start < 30
    assert len(ids) == (250_002 if " " in text else 1)


def test_a_forked_process_can_tokenize_too(vocabulary):
    """Without a hang or a warning, although the parent's threads do not exist there."""
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
    # Python 3.12 and newer warn of any fork beside threads.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, str(vocabulary)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_line_endings_and_a_byte_order_mark_are_not_part_of_a_token(tmp_path):
    content = "\ufeff[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\nfilm".encode()
    (tmp_path / "vocab.txt").write_bytes(content)
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    assert list(tokenizer.vocab) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "film"]
    assert tokenizer.mask_token_id is None
    assert tokenizer.save_vocabulary(tmp_path / "copy").read_bytes() == content


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is empty"),
        (b"[PAD]\n[UNK]\nfilm\xff\n", "line 3 is not UTF-8"),
        (b"[PAD]\n[UNK]\nfilm\nfilms\nfilm \n", "line 5 repeats the token 'film' of line 3"),
        (b"film\n[SEP]\n[CLS]\n", r"has no \[PAD\] \[UNK\]"),
        (b"[PAD]\n[UNK]\n", r"has no \[CLS\] \[SEP\]"),
        (b"[PAD]\n" + b"x" * 10**6 + b"\n", "line 2 has 1000000 characters"),
        (b"x" * 999 + b"\n" + b"x" * 999 + b"\n", r"repeats the token 'x+\.\.\.x+'"),
    ],
    ids=["empty", "not UTF-8", "duplicate", "no PAD, no UNK", "no CLS, no SEP", "long line", "long duplicate"],
)
def test_a_bad_vocabulary_is_refused_with_its_line(tmp_path, content, named):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"/vocab\.txt:? .*{named}") as caught:
        BertTokenizer.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 1000


def test_tokens_and_ids_outside_the_vocabulary_are_refused_by_name(small):
    with pytest.raises(ValueError, match="'rewind' is not in the vocabulary"):
        small.convert_tokens_to_ids(["film", "rewind"])
    for outside in (11, -1):
        with pytest.raises(ValueError, match=f"id {outside} is outside the vocabulary of 11 tokens"):
            small.convert_ids_to_tokens([8, outside])
