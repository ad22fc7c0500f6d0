"""Read a task of the user's own from a JSON file:

    {
      "name": "reviews",
      "train": "train.csv", "dev": "dev.csv", "test": "new.csv",
      "text": "review", "label": "stars",
      "labels": ["bad", "good"],
      "metric": "macro_f1"
    }

README explains each key. `text` is one column or a list of two; a column is given by its name, or its number from 0
(-1 is the last). `"regression": true` replaces `labels`.
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

_REQUIRED = ("name", "train", "dev", "text", "label")
_READING = ("test", "format", "header", "test_text", "test_id")
_TRAINING = ("labels", "meanings", "regression", "metric", "lower_case", "max_seq_length", "intermediate_epochs")
_KEYS = (*_REQUIRED, *_READING, *_TRAINING)
_COLUMN = "its name, or its number: from 0, or -1 for the last"
_MAX_BYTES = 16 * 2**20  # of a task file
_MAX_NAME = 120  # bytes of a file's name: folders and predictions are named after it, and a disk allows 255


def read_task_file(path: Path) -> Task:
    """Read the task that a file describes.

    Raises:
        UserError: the file is missing or not a JSON object, a key is unknown or missing, or a value cannot be used; the
            message names the file and the key.
    """
    try:
        values = json.loads(read_limited(path, _MAX_BYTES).decode("utf-8-sig"), object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise UserError(f"--task_file {path}: not found") from None
    except OSError as error:
        raise UserError(f"--task_file {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({shortened(str(error))})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, as README shows")
    unknown = [key for key in values if key not in _KEYS]
    if unknown:
        raise UserError(f"{path}: unknown key {shortened(unknown[0])!r}; the keys are {', '.join(_KEYS)}")
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise UserError(f"{path}: has no {missing[0]!r}; needed are {', '.join(_REQUIRED)}, and labels or regression")
    return _Parser(path, values).task()


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key!r} is given twice")
        values[key] = value
    return values


class _Parser:
    """Checks the values of a task file, and makes the task of them. Methods raise UserErrors that name the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def error(self, key: str, expected: str) -> UserError:
        try:
            value = shortened(json.dumps(self.values.get(key), ensure_ascii=False))
        except RecursionError:
            value = "a list of lists of lists"
        return UserError(f"{self.path}: {key} is {value}, expected {expected}")

    def take(self, key: str, default: Value, check: Callable[[Any], bool], expected: str) -> Value:
        """Return a key's value, or the default if it is not given."""
        value = self.values.get(key, default)
        if key in self.values and not check(value):
            raise self.error(key, expected)
        return value

    def task(self) -> Task:
        name = self.take("name", "", _is_name, "1 to 100 letters, digits, - _ and ., the first a letter or digit")
        (train,), dev, test = self.files("train", single=True), self.files("dev"), self.files("test")
        if not dev:
            raise self.error("dev", "at least one file's name: the first one selects the checkpoint")
        form = self.form({PurePath(file).suffix.lower() for file in (train, *dev, *test)})
        has_header = self.take("header", True, _is_bool, "true or false")
        text, test_text = self.columns("text", form, has_header), self.columns("test_text", form, has_header)
        if test_text is not None and len(test_text) != len(text or ()):
            raise self.error("test_text", f"as many columns as text has, {len(text or ())}")
        labels = self.labels()
        return Task(
            name=name,
            text_columns=text or (),
            label_column=(self.columns("label", form, has_header, most=1) or (0,))[0],
            labels=labels,
            meanings=self.meanings(labels),
            metric=self.metric(labels),
            form=form,
            has_header=has_header,
            test_has_header=has_header,
            train_file=train,
            augmented_file=str(PurePath(train).with_name(f"{PurePath(train).stem}_aug{PurePath(train).suffix}")),
            dev_files=dev,
            dev_suffixes=("", *(f"-{PurePath(file).stem}" for file in dev[1:])),
            test_files=test,
            test_text_columns=test_text,
            id_column=(self.columns("test_id", form, has_header, most=1) or (None,))[0],
            submissions=tuple(f"{name}-{PurePath(file).stem}.tsv" if len(test) > 1 else f"{name}.tsv" for file in test),
            intermediate_epochs=self.take(
                "intermediate_epochs", None, _is_positive, "a number above 0 and below a million"
            ),
            max_seq_length=self.take(
                "max_seq_length", None, _is_length, "a whole number of WordPieces, 8 or more and below a million"
            ),
            lower_case=self.take("lower_case", None, _is_bool, "true or false"),
        )

    def files(self, key: str, single: bool = False) -> tuple[str, ...]:
        """Return one or several names of files in the data folder."""
        names = self.values.get(key, [])
        names = names if isinstance(names, list) and not single else [names]
        if not all(map(_is_file, names)):
            several = "" if single else ", or a list of names"
            raise self.error(key, f"a file's name in the data folder, of {_MAX_NAME} bytes at most{several}")
        if len({PurePath(name).stem for name in names}) < len(names):
            raise self.error(key, "names that differ before the dot")
        return tuple(names)

    def columns(self, key: str, form: str, has_header: bool, most: int = 2) -> tuple[Column, ...] | None:
        """Return the one or two columns of a key; None if it is not given."""
        if key not in self.values:
            return None
        value = self.values[key]
        columns = value if isinstance(value, list) and most > 1 else [value]
        if not 1 <= len(columns) <= most or not all(map(_is_column, columns)):
            several = "a column, or a list of two; a column is " if most > 1 else "a column: "
            raise self.error(key, several + _COLUMN)
        if form == "jsonl" and not all(isinstance(column, str) for column in columns):
            raise self.error(key, "a key's name, since the files are JSON lines")
        if form != "jsonl" and not has_header and not all(isinstance(column, int) for column in columns):
            raise self.error(key, "a number, since the files have no row of column names (header is false)")
        return tuple(columns)

    def form(self, endings: set[str]) -> str:
        """Return the form of files with these endings."""
        if "format" in self.values:
            return self.take("format", "", lambda form: form in FORMS, f"one of {', '.join(FORMS)}")
        for form in FORMS:
            if endings == {f".{form}"}:
                return form
        found = shortened(", ".join(sorted(ending or "no ending" for ending in endings)))
        raise UserError(
            f"{self.path}: train, dev and test have {found}, expected the same one of .{', .'.join(FORMS)} for all, "
            "or a format that names their form"
        )

    def labels(self) -> tuple[str, ...]:
        """Return the labels as cells of the label column read; none for a regression."""
        regression = self.take("regression", False, _is_bool, "true or false")
        given = self.values.get("labels")
        if regression == (given is not None):
            raise UserError(f"{self.path}: needs either labels, a list, or regression, true")
        if regression:
            return ()
        labels = [(as_text(value) or "").strip() for value in given] if isinstance(given, list) else []
        # A prediction is one cell of a .tsv file.
        writable = all(len(label.splitlines()) == 1 and "\t" not in label for label in labels)
        if len(labels) < 2 or not writable or len(set(labels)) < len(labels):
            raise self.error("labels", "a list of two or more different labels, each one line as in the label column")
        return tuple(labels)

    def metric(self, labels: tuple[str, ...]) -> Metric:
        """Return the metric, which must fit the labels."""
        fitting = {
            name: metric
            for name, metric in METRICS.items()
            if metric.regression == (not labels) and (len(labels) == 2 or not metric.two_labels)
        }
        default = "accuracy" if labels else "correlation"
        name = self.take(
            "metric", default, lambda name: isinstance(name, str) and name in METRICS, f"one of {', '.join(METRICS)}"
        )
        if name not in fitting:
            raise UserError(
                f"{self.path}: the metric {name} does not fit the labels; those that do are {', '.join(fitting)}"
            )
        return fitting[name]

    def meanings(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Return a word for each label, none of which is another label; or none at all."""

        def fits(words: Any) -> bool:
            are_words = isinstance(words, list) and all(isinstance(word, str) and word for word in words)
            return are_words and len(words) == len(set(words)) == len(labels)

        no_words: list[str] = []
        words = self.take("meanings", no_words, fits, "a different word for each of the labels")
        for word, own in zip(words, labels, strict=False):
            if any(word.lower() == label.lower() != own.lower() for label in labels):
                raise self.error("meanings", "no label's word to be another label")
        return tuple(words)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value))


def _is_file(value: object) -> bool:
    if not isinstance(value, str) or re.search(r"[\0\ud800-\udfff]", value):  # a file's name cannot have these
        return False
    return 0 < len(PurePath(value).name.encode()) <= _MAX_NAME  # "." and "/" have no name


def _is_column(value: object) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, int) and not isinstance(value, bool) and -1000 <= value < 100_000


def _is_metric(value: object) -> bool:
    return isinstance(value, str) and value in METRICS


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6


def _is_length(value: object) -> bool:
    return isinstance(value, int) and _is_positive(value) and value >= 8
