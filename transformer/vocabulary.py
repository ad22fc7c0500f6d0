"""The vocabulary of a model's folder, from vocab.txt or tokenizer.json, and whether it is lower-cased.

Not here: cutting text into the tokens of the vocabulary (transformer/tokenization.py).
"""

from __future__ import annotations

import io
import json
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformer.errors import UserError
from transformer.file_utils import TOKENIZER_CONFIG_NAME, VOCAB_NAME
from transformer.saving import settle_to_read
from transformer.untrusted import read_limited

TOKENIZER_NAME = "tokenizer.json"

SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
LONGEST_WORD = 100  # characters; a longer basic token is [UNK]
_REQUIRED_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")

# What a tokenizer.json has to say for its ids to be those of BertTokenizer.
_MODEL = {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": LONGEST_WORD}
_NORMALIZER = {"clean_text": True, "handle_chinese_chars": True}

_LOWER_CASE_LATIN = re.compile("[a-z]")
_FEWEST_LATIN_TOKENS = 20  # fewer of them, as in a Chinese vocabulary, and a lack of capitals tells nothing
_MOST_STRAY_CAPITALS = 0.01  # of the tokens with letters that have a case


_MOST_BYTES = 128 * 2**20  # of a file of the vocabulary: the largest known take some 20 MB
_LONGEST_TOKEN = 1000  # characters of a line


class Vocabulary(NamedTuple):
    """The tokens of a model: their ids, 0 to n-1 in this order, and the vocab.txt that lists them."""

    ids: dict[str, int]
    file: bytes


class Case(NamedTuple):
    """Whether a model lower-cases text, and what says so, for messages."""

    lower: bool
    evidence: str


def vocabulary_path(folder: str | Path) -> Path:
    """The file that holds a folder's vocabulary: vocab.txt, or tokenizer.json where that alone is there."""
    settle_to_read(Path(folder))
    text, tokenizer = Path(folder) / VOCAB_NAME, Path(folder) / TOKENIZER_NAME
    # os.path's answer for a folder that may not be looked into is no; reading then says what is wrong.
    return tokenizer if os.path.exists(tokenizer) and not os.path.exists(text) else text


def read_vocabulary(path: Path) -> Vocabulary:
    """Reads a vocabulary: a tokenizer.json if the file is named *.json, else one token a line.

    The tokens that a tokenizer.json adds to its model's are included. They hold their ids here, but
    are found in text as other tokens are: between spaces and punctuation, not wherever they occur.

    Raises:
        UserError: the file cannot be read, is empty, is not UTF-8, repeats a token, or lacks [PAD],
            [UNK], [CLS] or [SEP]; or a tokenizer.json works in another way than BERT's, has other
            ids than 0 to n-1, or has a token that no line of vocab.txt can hold.
    """
    try:
        content = read_limited(path, _MOST_BYTES)
    except OSError as error:
        raise UserError(
            f"cannot read the vocabulary {path} ({error.strerror}); "
            f"give a model folder that holds {VOCAB_NAME} or {TOKENIZER_NAME}"
        ) from None
    if path.suffix == ".json":
        vocabulary = _from_tokenizer(_parse_object(content, path), path)
    else:
        vocabulary = Vocabulary(_from_lines(content, path), content)
    missing = [token for token in _REQUIRED_TOKENS if token not in vocabulary.ids]
    if missing:
        raise UserError(f"{path} has no {' '.join(missing)}; give the vocabulary of a BERT model")
    return vocabulary


def _from_lines(content: bytes, where: Path) -> dict[str, int]:
    """The tokens of a vocab.txt, one a line, numbered from 0. Raises UserError."""
    try:
        # Any line ending will do, as in text mode; a byte order mark is no part of the first token.
        lines = list(io.StringIO(content.decode("utf-8-sig"), newline=None))
    except UnicodeDecodeError as error:
        line_number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}: line {line_number} is not UTF-8; save the vocabulary as UTF-8") from None
    vocab: dict[str, int] = {}
    for index, line in enumerate(lines):
        token = line.strip()
        if len(token) > _LONGEST_TOKEN:
            raise UserError(
                f"{where}: line {index + 1} has {len(token)} characters; a vocabulary has one token a line, of "
                f"{_LONGEST_TOKEN} characters at most"
            )
        if token in vocab:
            raise UserError(
                f"{where}: line {index + 1} repeats the token {reprlib.repr(token)} of line {vocab[token] + 1}; "
                "each token must stand once, or ids and embeddings disagree"
            )
        vocab[token] = index
    if not vocab:
        raise UserError(f"{where} is empty; put the vocabulary of the model there, one token a line")
    return vocab


def _from_tokenizer(values: dict[str, Any], where: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json's content. Raises UserError."""
    _check_works_as_bert(values, where)
    ids = dict(_model_ids(values["model"].get("vocab"), where))
    for token, index in _added_ids(values.get("added_tokens"), where).items():
        if ids.setdefault(token, index) != index:
            raise UserError(
                f"{where}: the token {reprlib.repr(token)} has the id {ids[token]} in the model's vocabulary "
                f"and {index} among added_tokens; save the tokenizer again"
            )
    tokens = _in_order(ids, where)
    for index, token in enumerate(tokens):
        if not _fits_a_line(token, first=index == 0):
            raise UserError(
                f"{where}: the token {reprlib.repr(token)} cannot be a line of {VOCAB_NAME}; "
                "give the vocabulary of a BERT model, whose tokens hold no line breaks and no spaces around them"
            )
    return Vocabulary(
        {token: index for index, token in enumerate(tokens)},
        "".join(f"{token}\n" for token in tokens).encode("utf-8"),
    )


def _check_works_as_bert(values: dict[str, Any], where: Path) -> None:
    model = _part("model", "WordPiece", values, where)
    # A tokenizer.json may leave out the longest word; other readers then take BERT's.
    _check_settings("model", {"max_input_chars_per_word": LONGEST_WORD, **model}, _MODEL, where)
    normalizer = _part("normalizer", "BertNormalizer", values, where)
    _check_settings("normalizer", normalizer, _NORMALIZER, where)
    lowercase, strip_accents = normalizer.get("lowercase"), normalizer.get("strip_accents")
    if not isinstance(lowercase, bool):
        raise UserError(f"{where}: the normalizer's lowercase is {reprlib.repr(lowercase)}, expected true or false")
    if strip_accents is not None and strip_accents is not lowercase:
        raise _other_setting("normalizer", "strip_accents", strip_accents, lowercase, where)
    _part("pre_tokenizer", "BertPreTokenizer", values, where)


def _part(name: str, expected: str, values: dict[str, Any], where: Path) -> dict[str, Any]:
    """A part of a tokenizer.json, of the type expected. Raises UserError."""
    part = values.get(name)
    if not isinstance(part, dict):
        raise UserError(f"{where}: the {name} is {reprlib.repr(part)}; only a {expected}, as BERT's is, can be used")
    found = part.get("type")
    if found is None and name == "model" and "merges" not in part:
        return part  # files of the first versions do not name the type; only a byte-pair encoding has merges
    if found != expected:
        raise _other_setting(name, "type", found, expected, where)
    return part


def _check_settings(part: str, found: dict[str, Any], expected: Mapping[str, object], where: Path) -> None:
    for name, value in expected.items():
        if type(found.get(name)) is not type(value) or found[name] != value:  # 1 == True
            raise _other_setting(part, name, found.get(name), value, where)


def _other_setting(part: str, name: str, found: object, expected: object, where: Path) -> UserError:
    return UserError(
        f"{where}: the {part}'s {name} is {reprlib.repr(found)}, BERT's is {expected!r}; "
        "only tokenizers that work as BERT's can be used"
    )


def _model_ids(vocab: object, where: Path) -> dict[str, int]:
    if not isinstance(vocab, dict) or not all(type(index) is int for index in vocab.values()):
        raise UserError(f"{where}: the model's vocab is no map of tokens to whole numbers; save the tokenizer again")
    return vocab


def _added_ids(added: object, where: Path) -> dict[str, int]:
    added = [] if added is None else added
    ids: dict[str, int] = {}
    for entry in added if isinstance(added, list) else [added]:
        token, index = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(token, str) or type(index) is not int:
            raise UserError(
                f"{where}: added_tokens is no list of tokens, each with content and id; save the tokenizer again"
            )
        ids[token] = index
    return ids


def _in_order(ids: dict[str, int], where: Path) -> list[str]:
    """The tokens by their ids, which are 0 to n-1. Raises UserError."""
    tokens: dict[int, str] = {}
    for token, index in ids.items():
        other = tokens.setdefault(index, token)
        if other != token:
            raise UserError(
                f"{where}: the tokens {reprlib.repr(other)} and {reprlib.repr(token)} both have the id {index}; "
                "each needs its own, from 0 on without a gap"
            )
    absent = next((index for index in range(len(tokens)) if index not in tokens), None)
    if absent is not None:
        raise UserError(
            f"{where}: no token has the id {absent}, though there are {len(tokens)} tokens; "
            "each needs its own id, from 0 on without a gap"
        )
    return [tokens[index] for index in range(len(tokens))]


def _fits_a_line(token: str, first: bool) -> bool:
    """Whether a token is read from a vocab.txt as it was written there."""
    if first and token.startswith("\ufeff"):  # would be taken for a byte order mark
        return False
    try:
        token.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        return False
    return token == token.strip() and not set("\r\n") & set(token)


def _parse_object(content: bytes, where: Path) -> dict[str, Any]:
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{where}: is no valid JSON; save the tokenizer again") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a JSON object; save the tokenizer again")
    return values


def stated_case(folder: str | Path) -> Case | None:
    """Whether a model lower-cases text, as its folder tells, or None where nothing there does.

    tokenizer_config.json's do_lower_case goes first, then the normalizer of tokenizer.json, then the
    vocabulary: a lower-cased one has no capitals.

    Raises:
        UserError: one of the two files is no JSON object, or says that accents or ideographs are treated
            otherwise than here; or, where neither of them tells, the vocabulary cannot be read.
    """
    folder = Path(folder)
    config = _read_object(folder / TOKENIZER_CONFIG_NAME)
    stated = config.get("do_lower_case")
    if isinstance(stated, bool):
        _check_characters(folder / TOKENIZER_CONFIG_NAME, config, stated)
        return Case(stated, f"{TOKENIZER_CONFIG_NAME} says so")
    normalizer = _read_object(folder / TOKENIZER_NAME).get("normalizer")
    stated = normalizer.get("lowercase") if isinstance(normalizer, dict) else None
    if isinstance(normalizer, dict) and isinstance(stated, bool):
        _check_characters(folder / TOKENIZER_NAME, normalizer, stated)
        return Case(stated, f"{TOKENIZER_NAME} says so")
    return _case_of_tokens(read_vocabulary(vocabulary_path(folder)).ids)


def _check_characters(where: Path, settings: Mapping[str, Any], lower: bool) -> None:
    """Accents go exactly where text is lower-cased, and ideographs are words of their own: other ids otherwise."""
    if isinstance(settings.get("strip_accents"), bool) and settings["strip_accents"] is not lower:
        raise UserError(
            f"{where}: strip_accents is {str(not lower).lower()} while lower-casing is {str(lower).lower()}; "
            "only tokenizers that strip accents exactly where they lower-case can be used"
        )
    for name in ("tokenize_chinese_chars", "handle_chinese_chars"):
        if settings.get(name) is False:
            raise UserError(f"{where}: {name} is false; only tokenizers that part ideographs can be used")


def _read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file, empty where there is no such file. Raises UserError."""
    try:
        content = read_limited(path, _MOST_BYTES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return _parse_object(content, path)


def _case_of_tokens(tokens: Mapping[str, int]) -> Case | None:
    words = [token for token in tokens if not (token.startswith("[") and token.endswith("]"))]
    with_case = [word for word in words if word.lower() != word.upper()]
    capitals = sum(word != word.lower() for word in with_case)
    if capitals > _MOST_STRAY_CAPITALS * len(with_case):
        return Case(False, "its vocabulary has capitals")
    latin = sum(word == word.lower() and bool(_LOWER_CASE_LATIN.search(word)) for word in with_case)
    if latin < _FEWEST_LATIN_TOKENS:
        return None
    return Case(True, "its vocabulary has next to no capitals" if capitals else "its vocabulary has no capitals")


def tokenizer_config(do_lower_case: bool) -> bytes:
    """A tokenizer_config.json, from which other libraries learn what vocab.txt does not say."""
    values = {"do_lower_case": do_lower_case, "tokenizer_class": "BertTokenizer", **SPECIAL_TOKENS}
    return (json.dumps(values, indent=2) + "\n").encode("utf-8")
