"""Vocabularies of vocab.txt and tokenizer.json, and how the files of a folder tell whether text is lower-cased."""

import json
from collections.abc import Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import transformers
from small_models import bert_base_uncased

from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.tokenization import BertTokenizer
from transformer.vocabulary import Case, stated_case, tokenizer_config

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Each word of TEXTS, as a cased and as a lower-casing tokenizer split it.
WORDS = "film ##s Film FILM re ##watch ##able Re cafe café Café 北 京 東 ， ! , ' it It ß москва Москва"
VOCABULARY = [*SPECIAL, *WORDS.split()]
TEXTS = [
    "Rewatchable films, it's FILM!",
    "Café CAFE café Москва",
    "It films 北京，東film; covid, it's москва!",
    "[MASK] Films \t unknown\u200b word ß",
    "",
]


def write_vocabulary(folder: Path, tokens: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return folder


def save_by_transformers(folder: Path, lower: bool, added: Sequence[str] = ()) -> Any:
    """Write FOLDER/tokenizer.json and FOLDER/tokenizer_config.json for VOCABULARY; return the tokenizer."""
    write_vocabulary(folder, VOCABULARY)
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder, do_lower_case=lower)
    tokenizer.add_tokens(added[:-1])
    tokenizer.add_special_tokens({"additional_special_tokens": added[-1:]})
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").unlink()
    return tokenizer


def encode(tokenizer: Any) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


def stated(folder: Path) -> tuple[bool, str]:
    """Return whether a model lower-cases text, and the file that states it."""
    case = stated_case(folder)
    assert case is not None
    return case.lower, case.evidence.partition(":")[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """The tokenizer.json that `transformers` saves for VOCABULARY, lower-casing."""
    folder = tmp_path_factory.mktemp("saved")
    save_by_transformers(folder, lower=True)
    return (folder / "tokenizer.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("lower", [True, False], ids=["uncased", "cased"])
def test_ids_from_tokenizer_json_equal_those_of_transformers(tmp_path, lower):
    added = ["covid", "new york", "[E1]"]
    reference = save_by_transformers(tmp_path, lower, added)
    tokenizer = BertTokenizer.from_pretrained(tmp_path, lower)
    assert tokenizer.encode_batch(TEXTS) == encode(reference)
    assert tokenizer.encode_batch(TEXTS) != BertTokenizer.from_pretrained(tmp_path, not lower).encode_batch(TEXTS)
    assert list(tokenizer.vocab.items()) == [(token, index) for index, token in enumerate(VOCABULARY + added)]
    assert tokenizer.vocabulary_file.decode().splitlines() == VOCABULARY + added
    assert stated(tmp_path) == (lower, "tokenizer_config.json")


def test_the_tokenizer_json_of_the_hub_has_the_tokens_of_its_vocab_txt(tmp_path):
    """Both of bert-base-uncased. What is saved as vocab.txt is the original file, byte for byte."""
    from_json, from_text = (BertTokenizer(bert_base_uncased(name)) for name in ("tokenizer.json", "vocab.txt"))
    assert len(from_json) == 30522
    assert stated_case(bert_base_uncased("vocab.txt").parent).lower
    assert list(from_json.vocab.items()) == list(from_text.vocab.items())
    saved = from_json.save_vocabulary(tmp_path / "new" / "folder")
    assert [path.name for path in saved.parent.iterdir()] == ["vocab.txt"]
    assert saved.read_bytes() == bert_base_uncased("vocab.txt").read_bytes()


def test_vocab_txt_has_priority_over_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"{not json")
    assert list(BertTokenizer.from_pretrained(write_vocabulary(tmp_path, VOCABULARY)).vocab) == VOCABULARY


def test_a_folder_without_a_vocabulary_is_refused_naming_both_files(tmp_path):
    for read in (BertTokenizer.from_pretrained, stated_case):
        with pytest.raises(UserError, match=r"/vocab\.txt \(No such file.*tokenizer\.json"):
            read(tmp_path)


ABSENT = object()


def write_tokenizer(folder: Path, saved: str, changes: dict[str, Any]) -> None:
    """Write FOLDER/tokenizer.json with new values by their path, such as "model/type"; ABSENT removes one."""
    values = json.loads(saved)
    for path, value in changes.items():
        *parents, name = path.split("/")
        part = reduce(getitem, parents, values)
        part.pop(name, None)
        if value is not ABSENT:
            part[name] = value
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")


def film_as(token: str) -> dict[str, Any]:
    """Replace the token "film", whose id is 5."""
    return {"model/vocab/film": ABSENT, f"model/vocab/{token}": 5}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model/max_input_chars_per_word": ABSENT},
        {"model/type": ABSENT},
        {"normalizer/strip_accents": True},
        {"normalizer/strip_accents": False, "normalizer/lowercase": False},
        {"added_tokens": ABSENT},
        film_as("film"),  # the last of the file
        {"truncation": {"max_length": 128}, "padding": {"pad_id": 0}},
    ],
)
def test_equivalent_forms_of_tokenizer_json_are_read(saved, tmp_path, changes):
    write_tokenizer(tmp_path, saved, changes)
    assert list(BertTokenizer.from_pretrained(tmp_path).vocab) == VOCABULARY


@pytest.mark.parametrize("token", ["", "\ufefffilm", "new york", "\u200b", "##film"])
def test_odd_tokens_survive_saving_as_vocab_txt(saved, tmp_path, token):
    write_tokenizer(tmp_path, saved, film_as(token))
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab[token] == 5
    tokenizer.save_vocabulary(tmp_path)
    assert BertTokenizer(tmp_path / "vocab.txt").vocab == tokenizer.vocab


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": ABSENT}, "the model is None"),
        ({"model/type": "BPE", "model/merges": []}, "type is 'BPE'"),
        ({"model/type": ABSENT, "model/merges": []}, "type is None"),
        ({"model/continuing_subword_prefix": ABSENT}, "continuing_subword_prefix is None"),
        ({"model/unk_token": "<unk>"}, "unk_token is '<unk>'"),
        ({"model/max_input_chars_per_word": 200}, "max_input_chars_per_word is 200"),
        ({"model/vocab": ["film"]}, "vocab"),
        ({"model/vocab/[UNK]": True}, "vocab"),
        ({"model/vocab/films": 99}, "'films' has the id 99, expected 28"),
        ({"model/vocab/films": 6}, "'films' has the id 6, expected 7"),
        ({"added_tokens": {"film": 5}}, "added_tokens"),
        ({"added_tokens": [{"content": "film"}]}, "added_tokens"),
        ({"added_tokens": [{"id": 9, "content": "film"}]}, "the token 'film' has the id 5"),
        ({"normalizer/type": "Lowercase"}, "type is 'Lowercase'"),
        ({"normalizer/clean_text": False}, "clean_text is False"),
        ({"normalizer/handle_chinese_chars": 1}, "handle_chinese_chars is 1"),
        ({"normalizer/lowercase": ABSENT}, "lowercase is None"),
        ({"normalizer/strip_accents": False}, "strip_accents is False"),
        ({"pre_tokenizer/type": "Whitespace"}, "type is 'Whitespace'"),
        (film_as("two\nlines"), r"'two\nlines'"),
        (film_as("film "), "'film '"),
        (film_as("\ud800"), r"'\ud800'"),
        ({"added_tokens": [], "model/vocab": {"\ufeff": 0, "[PAD]": 1}}, r"'\ufeff'"),
        ({"added_tokens": [], "model/vocab": {"[PAD]": 0, "[UNK]": 1}}, "has no [CLS] [SEP]"),
    ],
)
def test_a_tokenizer_unlike_berts_is_refused(saved, tmp_path, changes, named):
    write_tokenizer(tmp_path, saved, changes)
    with pytest.raises(UserError) as caught:
        BertTokenizer.from_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer.json"))
    assert named in str(caught.value)


@pytest.mark.parametrize("content", [b'{"model": {', b'{"model": "\xff"}', b'{"model": ' + b"[" * 200_000, b"[]"])
def test_a_file_that_is_not_a_json_object_is_refused(tmp_path, content):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder = write_vocabulary(tmp_path / name, VOCABULARY)
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"/{name}: .*JSON"):
            stated_case(folder)
    (tmp_path / "tokenizer.json" / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"/tokenizer\.json: .*JSON"):
        BertTokenizer.from_pretrained(tmp_path / "tokenizer.json")


def lower_case(count: int) -> list[str]:
    """Return so many tokens of lower-case Latin letters."""
    return [f"word{chr(ord('a') + number // 26)}{chr(ord('a') + number % 26)}" for number in range(count)]


NO_CAPITALS = Case(True, "its vocabulary has no capitals")
HARDLY_ANY = Case(True, "its vocabulary has next to no capitals")
CAPITALS = Case(False, "its vocabulary has capitals")
IDEOGRAPHS = [chr(code) for code in range(0x4E00, 0x4E00 + 500)]
CYRILLIC = [f"{chr(0x430 + number % 32)}{chr(0x430 + number // 32)}" for number in range(200)]
CASES = {
    "lower-case words": (lower_case(20), NO_CAPITALS),
    "too few of them": (lower_case(19), None),
    "one capital in a hundred": ([*lower_case(99), "Word"], HARDLY_ANY),
    "two in a hundred": ([*lower_case(98), "Word", "worD"], CAPITALS),
    "accented capitals": ([*lower_case(98), "Éa", "##Ж"], CAPITALS),
    "tokens without letters are not counted": ([*map(str, range(200)), *lower_case(30), "Word"], CAPITALS),
    "nor are special tokens": ([f"[UNUSED{number}]" for number in range(50)] + lower_case(20), NO_CAPITALS),
    "nor as lower-case ones": ([f"[unused{number}]" for number in range(50)] + lower_case(19), None),
    "ideographs": (IDEOGRAPHS, None),
    "ideographs and capital letters": ([*IDEOGRAPHS, "A", "B"], CAPITALS),
    "another script and a stray capital": ([*CYRILLIC, *lower_case(19), "Word"], None),
}


@pytest.mark.parametrize(("words", "expected"), CASES.values(), ids=CASES)
def test_the_vocabulary_tells_the_case_if_no_other_file_does(tmp_path, words, expected):
    assert stated_case(write_vocabulary(tmp_path, SPECIAL + words)) == expected


@pytest.mark.parametrize("lower", [True, False])
def test_tokenizer_config_has_priority_over_the_normalizer_and_both_over_the_vocabulary(saved, tmp_path, lower):
    """Each of the three contradicts the next."""
    folder = write_vocabulary(tmp_path, SPECIAL + (["Word", "WORD"] if lower else lower_case(50)))
    assert stated_case(folder) == (CAPITALS if lower else NO_CAPITALS)
    write_tokenizer(folder, saved, {"normalizer/lowercase": lower})
    assert stated(folder) == (lower, "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": not lower}), encoding="utf-8")
    assert stated(folder) == (not lower, "tokenizer_config.json")


@pytest.mark.parametrize("value", ["false", 0, None])
def test_a_setting_that_is_not_a_boolean_is_ignored(tmp_path, value):
    folder = write_vocabulary(tmp_path, SPECIAL + lower_case(20))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": value}), encoding="utf-8")
    for normalizer in ({"type": "BertNormalizer", "lowercase": value}, {"type": "NFC"}, value):
        (folder / "tokenizer.json").write_text(json.dumps({"normalizer": normalizer}), encoding="utf-8")
        assert stated_case(folder) == NO_CAPITALS


def test_an_unreadable_tokenizer_config_is_refused(tmp_path):
    (write_vocabulary(tmp_path, VOCABULARY) / "tokenizer_config.json").mkdir()
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot be read \(Is a directory\)$"):
        stated_case(tmp_path)


@pytest.mark.parametrize("lower", [True, False], ids=["uncased", "cased"])
def test_transformers_reads_the_case_and_special_tokens_of_a_written_tokenizer_config(tmp_path, lower):
    write_vocabulary(tmp_path, VOCABULARY)
    (tmp_path / "config.json").write_bytes(BertConfig(vocab_size=len(VOCABULARY)).to_json())
    (tmp_path / "tokenizer_config.json").write_bytes(tokenizer_config(lower))
    assert stated(tmp_path) == (lower, "tokenizer_config.json")
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours, other = (BertTokenizer.from_pretrained(tmp_path, case) for case in (lower, not lower))
    assert encode(read) == ours.encode_batch(TEXTS) != other.encode_batch(TEXTS)
    special = [read.pad_token_id, read.unk_token_id, read.cls_token_id, read.sep_token_id, read.mask_token_id]
    assert special == [0, 1, 2, 3, 4]
    assert len(read) == len(ours)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("tokenizer_config.json", {"do_lower_case": True, "strip_accents": False}, "strip_accents is false while"),
        ("tokenizer_config.json", {"do_lower_case": False, "strip_accents": True}, "strip_accents is true while"),
        ("tokenizer_config.json", {"do_lower_case": True, "tokenize_chinese_chars": False}, "tokenize_chinese_chars"),
        ("tokenizer.json", {"normalizer": {"lowercase": True, "handle_chinese_chars": False}}, "handle_chinese_chars"),
    ],
)
def test_a_tokenizer_that_treats_accents_or_ideographs_unlike_bert_is_refused(tmp_path, file, content, named):
    """Even beside a vocab.txt: its ids would not be those that the model was trained with."""
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nfilm\n")
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=named):
        stated_case(tmp_path)
