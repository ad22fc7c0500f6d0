"""The shape of a BERT model, as its config.json records it.

Keys that this project does not know are kept and written back, so that a folder from elsewhere
loses nothing by passing through here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformer.errors import UserError
from transformer.file_utils import CONFIG_NAME

ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "swish", "tanh")
# A classifier of this architecture reads the pooled output itself; the original TinyBERT's, and so any
# other name or none, reads relu(pooled output).
LINEAR_HEAD_ARCHITECTURE = "BertForSequenceClassification"
RELU_HEAD_ARCHITECTURE = "TinyBertForSequenceClassification"

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)


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
        for name in _POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{self.source}: {name} is {value!r}, expected a whole number above 0")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise UserError(f"{self.source}: {name} is {value!r}, expected a number from 0 to below 1")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or value <= 0:
                raise UserError(f"{self.source}: {name} is {value!r}, expected a number above 0")
        if not isinstance(self.pad_token_id, int) or not 0 <= self.pad_token_id < self.vocab_size:
            raise UserError(f"{self.source}: pad_token_id is {self.pad_token_id!r}, not an id of the vocabulary")
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"{self.source}: hidden_act is {self.hidden_act!r}, expected one of {known}")
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
            raise UserError(f"{source}: position_embedding_type {kind!r} is not supported, only 'absolute' is")
        if values.get("model_type", "bert") != "bert":
            raise UserError(f"{source}: model_type is {values['model_type']!r}; only 'bert' models can be used")
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
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: not found; a model's folder holds {CONFIG_NAME}, weights and vocab.txt") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
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
