"""A task of the user's own, described by a JSON file:

    {
      "name": "reviews",
      "train": "train.csv", "dev": "dev.csv", "test": "new.csv",
      "text": "review", "label": "stars",
      "labels": ["bad", "good"],
      "metric": "macro_f1"
    }

README explains each key. `text` names one column or a list of two; a column is named, or numbered from 0
(-1 is the last). `"regression": true` stands in place of `labels`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeVar

from data_processing.metrics import METRICS, Metric
from data_processing.tables import FORMS, as_text, shortened
from data_processing.tasks import Column, Task
from transformer.errors import UserError
from transformer.untrusted import read_limited

Value = TypeVar("Value")

_KEYS = (
    "name",
    "train",
    "dev",
    "test",
    "format",
    "header",
    "text",
    "label",
    "labels",
    "meanings",
    "regression",
    "test_text",
    "test_id",
    "metric",
    "lower_case",
    "max_seq_length",
    "intermediate_epochs",
)
_REQUIRED = ("name", "train", "dev", "text", "label")
_NAME = "1 to 100 letters, digits, - _ and ., no sign first: files are named after it"
_COLUMN = "its name, or its number: from 0, or -1 for the last"
_MOST_BYTES = 16 * 2**20  # of a task file
_LONGEST_NAME = 120  # of a file: folders and predictions are named after it, and 255 is the most that a disk takes


def read_task_file(path: Path) -> Task:
    """The task that a file describes.

    Raises:
        UserError: the file is missing, is no JSON object, has a key that is not known or lacks one that
            is needed, or a value cannot be used; the message names file and key.
    """
    try:
        values = json.loads(read_limited(path, _MOST_BYTES).decode("utf-8-sig"), object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise UserError(f"--task_file {path}: not found") from None
    except OSError as error:
        raise UserError(f"--task_file {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no valid JSON ({shortened(str(error))})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, as README shows")
    unknown = [key for key in values if key not in _KEYS]
    if unknown:
        raise UserError(f"{path}: unknown key {shortened(unknown[0])!r}; the keys are {', '.join(_KEYS)}")
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise UserError(f"{path}: has no {missing[0]!r}; needed are {', '.join(_REQUIRED)}, and labels or regression")
    return _task(_Reader(path, values))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key!r} stands twice")
        values[key] = value
    return values


class _Reader:
    """Takes checked values out of the object."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def wrong(self, key: str, expected: str) -> UserError:
        try:
            shown = shortened(json.dumps(self.values.get(key), ensure_ascii=False))
        except RecursionError:
            shown = "a list of lists of lists"
        return UserError(f"{self.path}: {key} is {shown}, expected {expected}")

    def take(self, key: str, default: Value, check: Callable[[Any], bool], expected: str) -> Value:
        value = self.values.get(key, default)
        if key in self.values and not check(value):
            raise self.wrong(key, expected)
        return value

    def file(self, key: str) -> str:
        name = self.values[key]
        if not _is_file(name):
            raise self.wrong(key, f"a file's name in the data folder, of {_LONGEST_NAME} bytes at most")
        return name

    def files(self, key: str) -> tuple[str, ...]:
        names = self.values.get(key, [])
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(map(_is_file, names)):
            raise self.wrong(
                key, f"a file's name in the data folder, of {_LONGEST_NAME} bytes at most, or a list of names"
            )
        if len({PurePath(name).stem for name in names}) < len(names):
            raise self.wrong(key, "names that differ before the dot")
        return tuple(names)

    def columns(self, key: str) -> tuple[Column, ...]:
        value = self.values[key]
        columns = value if isinstance(value, list) else [value]
        if not 1 <= len(columns) <= 2 or not all(map(_is_column, columns)):
            raise self.wrong(key, f"a column, or a list of two; a column is {_COLUMN}")
        return tuple(columns)


def _is_file(value: object) -> bool:
    if not isinstance(value, str) or re.search(r"[\0\ud800-\udfff]", value):  # no file can have these in its name
        return False
    return 0 < len(PurePath(value).name.encode()) <= _LONGEST_NAME  # "." and "/" have none


def _is_column(value: object) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, int) and not isinstance(value, bool) and -1000 <= value < 100_000


def _task(reader: _Reader) -> Task:
    name = reader.take("name", "", _is_name, _NAME)
    train, dev, test = reader.file("train"), reader.files("dev"), reader.files("test")
    if not dev:
        raise reader.wrong("dev", "at least one file's name: the first one chooses the checkpoint")
    form = _form(reader, (train, *dev, *test))
    has_header = reader.take("header", True, _is_bool, "true or false")
    text, label = reader.columns("text"), reader.values["label"]
    if not _is_column(label):
        raise reader.wrong("label", f"a column: {_COLUMN}")
    test_text = reader.columns("test_text") if "test_text" in reader.values else None
    if test_text is not None and len(test_text) != len(text):
        raise reader.wrong("test_text", f"as many columns as text has, {len(text)}")
    test_id = reader.take("test_id", None, _is_column, f"a column: {_COLUMN}")
    for key, columns in (("text", text), ("label", (label,)), ("test_text", test_text or ()), ("test_id", (test_id,))):
        named = [column for column in columns if isinstance(column, str)]
        numbered = [column for column in columns if isinstance(column, int)]
        if named and not has_header and form != "jsonl":
            raise reader.wrong(key, "a number, since the files have no row of column names (header is false)")
        if numbered and form == "jsonl":
            raise reader.wrong(key, "a key's name, since the files are JSON lines")
    labels, metric = _labels(reader)
    return Task(
        name=name,
        text_columns=text,
        label_column=label,
        labels=labels,
        meanings=_meanings(reader, labels),
        metric=metric,
        form=form,
        has_header=has_header,
        test_has_header=has_header,
        train_file=train,
        augmented_file=str(PurePath(train).with_name(f"{PurePath(train).stem}_aug{PurePath(train).suffix}")),
        dev_files=dev,
        dev_suffixes=("", *(f"-{PurePath(file).stem}" for file in dev[1:])),
        test_files=test,
        test_text_columns=test_text,
        id_column=test_id,
        submissions=tuple(f"{name}-{PurePath(file).stem}.tsv" if len(test) > 1 else f"{name}.tsv" for file in test),
        intermediate_epochs=reader.take(
            "intermediate_epochs", None, _is_positive, "a number from above 0 to below a million"
        ),
        max_seq_length=reader.take(
            "max_seq_length",
            None,
            lambda v: _is_positive(v) and isinstance(v, int) and v >= 8,
            "a whole number of WordPieces, 8 or more and below a million",
        ),
        lower_case=reader.take("lower_case", None, _is_bool, "true or false"),
    )


def _form(reader: _Reader, files: tuple[str, ...]) -> str:
    if "format" in reader.values:
        return reader.take("format", "", lambda form: form in FORMS, f"one of {', '.join(FORMS)}")
    endings = {PurePath(file).suffix.lower() for file in files}
    for form in FORMS:
        if endings == {f".{form}"}:
            return form
    found = shortened(", ".join(sorted(ending or "no ending" for ending in endings)))
    raise UserError(
        f"{reader.path}: train, dev and test have {found}, expected the same one of .{', .'.join(FORMS)} for all, "
        "or a format that says what they are"
    )


def _labels(reader: _Reader) -> tuple[tuple[str, ...], Metric]:
    regression = reader.take("regression", False, _is_bool, "true or false")
    labels = reader.values.get("labels")
    if regression == (labels is not None):
        raise UserError(f"{reader.path}: needs either labels, a list, or regression, true")
    if not regression:
        labels = [_label(label) for label in labels] if isinstance(labels, list) else []
        if len(labels) < 2 or None in labels or len(set(labels)) < len(labels):
            raise reader.wrong(
                "labels", "a list of two or more different labels, each one line as the label column writes it"
            )
    name = reader.take(
        "metric", "correlation" if regression else "accuracy", _is_metric, f"one of {', '.join(METRICS)}"
    )
    metric = METRICS[name]
    if metric.regression != regression or (metric.two_labels and len(labels or ()) != 2):
        fitting = [
            n
            for n, m in METRICS.items()
            if m.regression == regression and not (m.two_labels and len(labels or ()) != 2)
        ]
        raise UserError(
            f"{reader.path}: the metric {name} does not fit the labels; those that do are {', '.join(fitting)}"
        )
    return tuple(labels or ()), metric


def _label(value: object) -> str | None:
    """A label as a cell of the label column reads; None where predictions could not be written in one."""
    label = (as_text(value) or "").strip()
    return label if len(label.splitlines()) == 1 and "\t" not in label else None


def _meanings(reader: _Reader, labels: tuple[str, ...]) -> tuple[str, ...]:
    def fits(value: Any) -> bool:
        words = isinstance(value, list) and all(isinstance(word, str) and word for word in value)
        return words and len(value) == len(set(value)) == len(labels)

    no_words: list[str] = []
    words = reader.take("meanings", no_words, fits, "a different word for each of the labels")
    for word, own in zip(words, labels, strict=False):
        if any(word.lower() == label.lower() != own.lower() for label in labels):
            raise reader.wrong("meanings", "no label's word to be another label")
    return tuple(words)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value))


def _is_metric(value: object) -> bool:
    return isinstance(value, str) and value in METRICS


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6
