"""The configuration of a BERT model: config.json, read and written.

Keys that this project does not know are kept and written back.
"""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformer.errors import UserError
from transformer.file_utils import CONFIG_NAME
from transformer.layers import ACTIVATIONS
from transformer.untrusted import read_limited

# A classifier of this architecture reads the pooled output; that of any other or of none reads relu(pooled output), as
# the original TinyBERT's does.
LINEAR_HEAD_ARCHITECTURE = "BertForSequenceClassification"
RELU_HEAD_ARCHITECTURE = "TinyBertForSequenceClassification"

# The largest size allowed: far beyond any BERT's, but small enough that building the model on the meta device, before
# its weights are checked, takes little memory.
_SIZES = {
    "vocab_size": 10_000_000,
    "hidden_size": 1_000_000,
    "num_hidden_layers": 1000,
    "num_attention_heads": 100_000,
    "intermediate_size": 10_000_000,
    "max_position_embeddings": 10_000_000,
    "type_vocab_size": 1_000_000,
}
_MOST_BYTES = 16 * 2**20  # of config.json
_DEEPEST = 50  # levels of nested lists and objects


def _reject_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {reprlib.repr(key)} occurs twice")
        values[key] = value
    return values


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


def _depth(values: Any) -> int:
    """Return how many lists and objects are nested at most."""
    inner = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return isinstance(values, (dict, list)) + max(map(_depth, inner), default=0)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass
class BertConfig:
    """Sizes and dropout rates of a BERT model; the defaults are BERT-base's.

    extra: keys of config.json that are not known here.
    source: the file that messages name.

    Raises:
        UserError: a value is out of range.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    architectures: list[str] = field(default_factory=list)
    id2label: dict[int, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    source: str = "BertConfig"

    def __post_init__(self) -> None:
        for name, most in _SIZES.items():
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise self._error(name, "a whole number above 0")
            if value > most:
                raise self._error(name, f"{most} at most")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise self._error(name, "a number from 0 to below 1")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < 1e6:
                raise self._error(name, "a number above 0")
        if not _is_whole(self.pad_token_id) or not 0 <= self.pad_token_id < self.vocab_size:
            raise self._error("pad_token_id", "an id of the vocabulary")
        if self.hidden_act not in list(ACTIVATIONS):
            raise self._error("hidden_act", f"one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise self._error("hidden_size", f"a multiple of num_attention_heads {self.num_attention_heads}")

    def _error(self, name: str, expected: str) -> UserError:
        return UserError(f"{self.source}: {name} is {reprlib.repr(getattr(self, name))}, expected {expected}")

    @property
    def relu_head(self) -> bool:
        """Return whether the classifier reads relu(pooled output), as the original TinyBERT's does."""
        return LINEAR_HEAD_ARCHITECTURE not in self.architectures

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> BertConfig:
        """Build a config from the content of config.json.

        Raises:
            UserError: a value has the wrong type, or the model is no BERT with absolute positions.
        """
        values = dict(values)
        if values.get("position_embedding_type", "absolute") != "absolute":
            found = reprlib.repr(values["position_embedding_type"])
            raise UserError(f"{source}: position_embedding_type is {found}; only 'absolute' is supported")
        if values.get("model_type", "bert") != "bert":
            found = reprlib.repr(values["model_type"])
            raise UserError(f"{source}: model_type is {found}; only 'bert' is supported")
        values.pop("model_type", None)
        # label2id and the like follow from id2label, which may change. dtype is that of the weights that were read;
        # `transformers` would load the fp32 weights written here in it.
        for name in ("label2id", "num_labels", "finetuning_task", "dtype", "torch_dtype"):
            values.pop(name, None)
        if values.get("pad_token_id", 0) is None:
            values.pop("pad_token_id")
        id2label = values.pop("id2label", None) or {}
        architectures = values.pop("architectures", None) or []
        try:
            id2label = {int(index): str(name) for index, name in id2label.items()}
        except (AttributeError, TypeError, ValueError):
            raise UserError(f"{source}: id2label is not a map of label numbers to names") from None
        if not isinstance(architectures, list):
            raise UserError(f"{source}: architectures is not a list")
        known = {f.name for f in fields(cls)} - {"extra", "source", "id2label", "architectures"}
        return cls(
            **{name: value for name, value in values.items() if name in known},
            architectures=[str(name) for name in architectures],
            id2label=id2label,
            extra={name: value for name, value in values.items() if name not in known},
            source=source,
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> BertConfig:
        """Read FOLDER/config.json.

        Raises:
            UserError: the file is missing or unreadable, or is no JSON object that describes a BERT.
        """
        path = Path(folder) / CONFIG_NAME
        try:
            values = json.loads(
                read_limited(path, _MOST_BYTES).decode("utf-8"),
                object_pairs_hook=_reject_repeated_keys,
                parse_constant=_reject_constant,
            )
            if _depth(values) > _DEEPEST:
                raise ValueError(f"more than {_DEEPEST} lists and objects are nested")
            json.dumps(values, ensure_ascii=False).encode("utf-8")  # the trained model's config.json has these values
        except FileNotFoundError:
            raise UserError(f"{path}: not found; a model folder has {CONFIG_NAME}, weights and vocab.txt") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: is not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected a JSON object")
        return cls.from_dict(values, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json, unknown keys included."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("extra", "source")}
        labels = own.pop("id2label")
        if labels:
            own["id2label"] = {str(index): name for index, name in labels.items()}
            own["label2id"] = {name: index for index, name in labels.items()}
        return {"model_type": "bert", **own, **self.extra}

    def to_json(self) -> bytes:
        """Return config.json as bytes."""
        return (json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n").encode("utf-8")
