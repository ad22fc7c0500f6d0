"""The vocabulary of a model folder, from vocab.txt or tokenizer.json, and whether it is lower-cased.

`tokenization.py` splits text into the tokens of the vocabulary.
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

# The settings of a tokenizer.json with which its ids equal BertTokenizer's.
_MODEL = {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": LONGEST_WORD}
_NORMALIZER = {"clean_text": True, "handle_chinese_chars": True}

_LOWER_CASE_LATIN = re.compile("[a-z]")
_FEWEST_LATIN_TOKENS = 20  # a vocabulary with fewer, such as a Chinese one, may lack capitals and still be cased
_MOST_STRAY_CAPITALS = 0.01  # as a share of the tokens with letters that have a case

_MOST_BYTES = 128 * 2**20  # of each file here; the largest known have about 20 MB
_LONGEST_TOKEN = 1000  # characters


class Vocabulary(NamedTuple):
    """The tokens of a model with their ids, 0 to n-1 in this order, and the content of vocab.txt."""

    ids: dict[str, int]
    file: bytes


class Case(NamedTuple):
    """Whether a model lower-cases text, and the evidence for it, for messages."""

    lower: bool
    evidence: str


def vocabulary_path(folder: str | Path) -> Path:
    """Return the path of a folder's vocabulary: vocab.txt, or tokenizer.json if only that exists."""
    text, tokenizer = Path(folder) / VOCAB_NAME, Path(folder) / TOKENIZER_NAME
    # os.path.exists is False for a folder that may not be read; reading then raises an error with the reason.
    return tokenizer if os.path.exists(tokenizer) and not os.path.exists(text) else text


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a vocabulary: a tokenizer.json if the file is named *.json, else one token a line.

    A tokenizer.json's added_tokens are included and keep their ids, but are found in text like other tokens: between
    spaces and punctuation, not inside words.

    Raises:
        UserError: the file cannot be read, is empty, is not UTF-8, repeats a token, or lacks [PAD], [UNK], [CLS] or
            [SEP]; or a tokenizer.json works differently from BERT's, has other ids than 0 to n-1, or has a token that
            cannot be a line of vocab.txt.
    """
    try:
        content = read_limited(path, _MOST_BYTES)
    except OSError as error:
        raise UserError(
            f"cannot read the vocabulary {path} ({error.strerror}); "
            f"give a model folder that has {VOCAB_NAME} or {TOKENIZER_NAME}"
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
    """Parse a vocab.txt: one token a line, ids from 0 on."""
    try:
        # Any line ending is accepted, as in text mode; a byte order mark is dropped.
        lines = list(io.StringIO(content.decode("utf-8-sig"), newline=None))
    except UnicodeDecodeError as error:
        line_number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}: line {line_number} is not UTF-8; save the vocabulary as UTF-8") from None
    vocab: dict[str, int] = {}
    for index, line in enumerate(lines):
        token = line.strip()
        if len(token) > _LONGEST_TOKEN:
            raise UserError(
                f"{where}: line {index + 1} has {len(token)} characters; a token has at most {_LONGEST_TOKEN}"
            )
        if token in vocab:
            raise UserError(
                f"{where}: line {index + 1} repeats the token {reprlib.repr(token)} of line {vocab[token] + 1}; "
                "each token may occur only once, or ids and embeddings disagree"
            )
        vocab[token] = index
    if not vocab:
        raise UserError(f"{where} is empty; it must list the model's vocabulary, one token a line")
    return vocab


def _from_tokenizer(values: dict[str, Any], where: Path) -> Vocabulary:
    """Build the vocabulary from the content of a tokenizer.json."""
    _check_works_like_bert(values, where)
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
                "give the vocabulary of a BERT model, whose tokens have no line breaks and no spaces around them"
            )
    lines = "".join(f"{token}\n" for token in tokens)
    return Vocabulary({token: index for index, token in enumerate(tokens)}, lines.encode("utf-8"))


def _check_works_like_bert(values: dict[str, Any], where: Path) -> None:
    model = _part("model", "WordPiece", values, where)
    # A tokenizer.json may leave out max_input_chars_per_word; other libraries then use BERT's.
    _check_settings("model", {"max_input_chars_per_word": LONGEST_WORD, **model}, _MODEL, where)
    normalizer = _part("normalizer", "BertNormalizer", values, where)
    _check_settings("normalizer", normalizer, _NORMALIZER, where)
    lowercase = normalizer.get("lowercase")
    if not isinstance(lowercase, bool):
        raise UserError(f"{where}: the normalizer's lowercase is {reprlib.repr(lowercase)}, expected true or false")
    if normalizer.get("strip_accents") not in (None, lowercase):
        raise _other_setting("normalizer", "strip_accents", normalizer["strip_accents"], lowercase, where)
    _part("pre_tokenizer", "BertPreTokenizer", values, where)


def _part(name: str, expected: str, values: dict[str, Any], where: Path) -> dict[str, Any]:
    """Return a part of a tokenizer.json, after checking its type."""
    part = values.get(name)
    if not isinstance(part, dict):
        raise UserError(f"{where}: the {name} is {reprlib.repr(part)}; only BERT's {expected} is supported")
    found = part.get("type")
    if found is None and name == "model" and "merges" not in part:
        return part  # old files do not name the type; only byte-pair encoding has merges
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
        "only tokenizers that work like BERT's are supported"
    )


def _model_ids(vocab: object, where: Path) -> dict[str, int]:
    if not isinstance(vocab, dict) or not all(type(index) is int for index in vocab.values()):
        raise UserError(f"{where}: the model's vocab is not a map of tokens to whole numbers; save the tokenizer again")
    return vocab


def _added_ids(added: object, where: Path) -> dict[str, int]:
    added = [] if added is None else added
    ids: dict[str, int] = {}
    for entry in added if isinstance(added, list) else [added]:
        token, index = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(token, str) or type(index) is not int:
            raise UserError(
                f"{where}: added_tokens is not a list of tokens with content and id; save the tokenizer again"
            )
        ids[token] = index
    return ids


def _in_order(ids: dict[str, int], where: Path) -> list[str]:
    """Return the tokens in the order of their ids, after checking that those are 0 to n-1."""
    tokens = sorted(ids, key=lambda token: ids[token])
    for index, token in enumerate(tokens):
        if ids[token] != index:
            raise UserError(
                f"{where}: the token {reprlib.repr(token)} has the id {ids[token]}, expected {index}; "
                "ids must be 0 to n-1, one for each token"
            )
    return tokens


def _fits_a_line(token: str, first: bool) -> bool:
    """Return whether a token survives being written to vocab.txt and read again."""
    if first and token.startswith("\ufeff"):  # would be read as a byte order mark
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
        raise UserError(f"{where}: is not valid JSON; save the tokenizer again") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a JSON object; save the tokenizer again")
    return values


def stated_case(folder: str | Path) -> Case | None:
    """Return whether a model lower-cases text, by the files of its folder; None if that is unknown.

    tokenizer_config.json's do_lower_case has priority, then the normalizer of tokenizer.json, then the vocabulary: a
    lower-cased one has no capitals.

    Raises:
        UserError: one of the two files is not a JSON object, or treats accents or ideographs differently from
            BertTokenizer; or neither has the setting and the vocabulary cannot be read.
    """
    folder = Path(folder)
    config = _read_object(folder / TOKENIZER_CONFIG_NAME)
    stated = config.get("do_lower_case")
    if isinstance(stated, bool):
        _check_characters(folder / TOKENIZER_CONFIG_NAME, config, stated)
        return Case(stated, f"{TOKENIZER_CONFIG_NAME}: do_lower_case is {json.dumps(stated)}")
    normalizer = _read_object(folder / TOKENIZER_NAME).get("normalizer")
    stated = normalizer.get("lowercase") if isinstance(normalizer, dict) else None
    if isinstance(normalizer, dict) and isinstance(stated, bool):
        _check_characters(folder / TOKENIZER_NAME, normalizer, stated)
        return Case(stated, f"{TOKENIZER_NAME}: lowercase is {json.dumps(stated)}")
    return _case_of_tokens(read_vocabulary(vocabulary_path(folder)).ids)


def _check_characters(where: Path, settings: Mapping[str, Any], lower: bool) -> None:
    """Raise UserError unless accents are stripped exactly with lower-casing and ideographs are split, as BERT does."""
    if isinstance(settings.get("strip_accents"), bool) and settings["strip_accents"] is not lower:
        raise UserError(
            f"{where}: strip_accents is {str(not lower).lower()} while lower-casing is {str(lower).lower()}; "
            "only tokenizers that strip accents exactly if they lower-case are supported"
        )
    for name in ("tokenize_chinese_chars", "handle_chinese_chars"):
        if settings.get(name) is False:
            raise UserError(f"{where}: {name} is false; only tokenizers that split ideographs are supported")


def _read_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file, {} if the file does not exist."""
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
    """Return a tokenizer_config.json with the case and the special tokens, for other libraries."""
    values = {"do_lower_case": do_lower_case, "tokenizer_class": "BertTokenizer", **SPECIAL_TOKENS}
    return (json.dumps(values, indent=2) + "\n").encode("utf-8")
