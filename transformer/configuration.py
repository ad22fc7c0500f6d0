"""The shape of a BERT model, as its config.json records it.

Keys that this project does not know are kept and written back, so that a folder from elsewhere
loses nothing by passing through here.
"""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformer.errors import UserError
from transformer.file_utils import CONFIG_NAME
from transformer.saving import settle_to_read
from transformer.untrusted import read_limited

ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "swish", "tanh")
# A classifier of this architecture reads the pooled output itself; the original TinyBERT's, and so any
# other name or none, reads relu(pooled output).
LINEAR_HEAD_ARCHITECTURE = "BertForSequenceClassification"
RELU_HEAD_ARCHITECTURE = "TinyBertForSequenceClassification"

# The sizes and the most that they may be: far beyond any BERT's, and little enough that the model's outline, which is
# made before the weights are looked at, takes no memory to speak of.
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
_DEEPEST = 50  # lists and objects in one another


class _Unusable(Exception):
    """What is JSON, and of no use in a config."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = next(key for index, (key, _) in enumerate(pairs) if any(key == k for k, _ in pairs[:index]))
        raise _Unusable(f"{reprlib.repr(repeated)} stands twice in it")
    return values


def _no_number(name: str) -> float:
    raise _Unusable(f"holds {name}, which is no number in JSON")


def _check_can_be_written(values: Any) -> None:
    """A config is written beside the trained model: what could not be is told before the training. Raises _Unusable."""
    level = [values]
    for _ in range(_DEEPEST):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
        ]
    if level:
        raise _Unusable(f"holds more than {_DEEPEST} lists and objects in one another")
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _Unusable("holds half of a character (a lone surrogate)") from None


@dataclass
class BertConfig:
    """Sizes and rates of a BERT model; the defaults are BERT-base's.

    Raises UserError where a value cannot make a model: `source` names the file in the message.
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
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{self.source}: {name} is {reprlib.repr(value)}, expected a whole number above 0")
            if value > most:
                raise UserError(f"{self.source}: {name} is {reprlib.repr(value)}, expected {most} at most")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise UserError(f"{self.source}: {name} is {reprlib.repr(value)}, expected a number from 0 to below 1")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < 1e6:
                raise UserError(f"{self.source}: {name} is {reprlib.repr(value)}, expected a number above 0")
        pad = self.pad_token_id
        if not isinstance(pad, int) or isinstance(pad, bool) or not 0 <= pad < self.vocab_size:
            raise UserError(f"{self.source}: pad_token_id is {reprlib.repr(pad)}, not an id of the vocabulary")
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"{self.source}: hidden_act is {reprlib.repr(self.hidden_act)}, expected one of {known}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"{self.source}: hidden_size {self.hidden_size} is no multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @property
    def relu_head(self) -> bool:
        """Whether the classifier reads relu(pooled output), as the original TinyBERT's does."""
        return LINEAR_HEAD_ARCHITECTURE not in self.architectures

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> BertConfig:
        """Builds a config from a config.json's content.

        Raises:
            UserError: a value is of the wrong kind, or this is no absolute-position BERT.
        """
        values = dict(values)
        if values.get("position_embedding_type", "absolute") != "absolute":
            kind = values["position_embedding_type"]
            raise UserError(
                f"{source}: position_embedding_type {reprlib.repr(kind)} is not supported, only 'absolute' is"
            )
        if values.get("model_type", "bert") != "bert":
            raise UserError(
                f"{source}: model_type is {reprlib.repr(values['model_type'])}; only 'bert' models can be used"
            )
        values.pop("model_type", None)
        # What id2label says, and it may change; and the type of the weights that were read, not of those that are
        # written: `transformers` would load ours in it.
        for name in ("label2id", "num_labels", "finetuning_task", "dtype", "torch_dtype"):
            values.pop(name, None)
        if values.get("pad_token_id", 0) is None:
            values.pop("pad_token_id")
        id2label = values.pop("id2label", None) or {}
        architectures = values.pop("architectures", None) or []
        try:
            id2label = {int(index): str(name) for index, name in id2label.items()}
        except (AttributeError, TypeError, ValueError):
            raise UserError(f"{source}: id2label is no map of label numbers to names") from None
        if not isinstance(architectures, list):
            raise UserError(f"{source}: architectures is no list")
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
        """Reads FOLDER/config.json.

        Raises:
            UserError: there is no such file, or it is no JSON object that describes a BERT.
        """
        path = Path(folder) / CONFIG_NAME
        settle_to_read(path.parent)
        try:
            values = json.loads(
                read_limited(path, _MOST_BYTES).decode("utf-8"),
                object_pairs_hook=_without_repeats,
                parse_constant=_no_number,
            )
            _check_can_be_written(values)
        except FileNotFoundError:
            raise UserError(f"{path}: not found; a model's folder holds {CONFIG_NAME}, weights and vocab.txt") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except _Unusable as error:
            raise UserError(f"{path}: {error}") from None
        except (ValueError, RecursionError):
            raise UserError(f"{path}: is no valid JSON") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected a JSON object")
        return cls.from_dict(values, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json, with the keys that were read and are not known here."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("extra", "source")}
        labels = own.pop("id2label")
        if labels:
            own["id2label"] = {str(index): name for index, name in labels.items()}
            own["label2id"] = {name: index for index, name in labels.items()}
        return {"model_type": "bert", **own, **self.extra}

    def to_json(self) -> bytes:
        """config.json, as a file."""
        return (json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n").encode("utf-8")
