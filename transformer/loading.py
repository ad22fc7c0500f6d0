"""From a checkpoint's tensors into a model: which fit, which are missing, which are not used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from transformer.errors import UserError

ENCODER_PREFIX = "bert."
_POOLER_PREFIX = "bert.pooler."


class NoNewWeights(TorchFunctionMode):
    """A context in which modules are made without drawing their weights: a checkpoint's follow.

    It saves seconds: for a model on the meta device torch would even import its compiler to draw them.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:  # its functions are given a tensor, and return it
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class LoadReport:
    """Keys of the model that the file lacked, and keys of the file that the model has no use for."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def lacks(self, prefix: str) -> bool:
        """Whether any tensor under this prefix was missing."""
        return any(key.startswith(prefix) for key in self.missing)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> LoadReport:
    """Copies a checkpoint's tensors into the model's parameters of the same name.

    A bare encoder's keys get the prefix `bert.`. A head that the file lacks keeps the values it has:
    whether that may be is for the caller to say, from the report. An encoder must be whole.

    Raises:
        UserError: part of the encoder is missing, or a tensor has another shape than the config says.
    """
    weights = with_encoder_prefix(weights)
    missing = check_weights(model, weights, source)
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, parameter in own.items():
            if key in weights:
                parameter.copy_(weights[key])
    return LoadReport(missing, tuple(key for key in weights if key not in own))


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> tuple[str, ...]:
    """Checks that a checkpoint's tensors fit a model, which may be on the meta device and so take no memory.

    Returns:
        The keys of the model that the checkpoint lacks.

    Raises:
        UserError: as for `load_weights`.
    """
    own = model.state_dict(keep_vars=True)
    tied = _tied_keys(own)
    missing = tuple(key for key in own if key not in weights and not any(k in weights for k in tied[key]))
    lost = [key for key in missing if key.startswith(ENCODER_PREFIX) and not key.startswith(_POOLER_PREFIX)]
    if lost:
        raise UserError(
            f"{source}: the weights lack {summarise(lost)}; they are of another model than config.json says"
        )
    for key, tensor in weights.items():
        if key in own and own[key].shape != tensor.shape:
            raise UserError(
                f"{source}: {key} has the shape {list(tensor.shape)}, expected {list(own[key].shape)}; "
                "the weights are of another model than config.json says"
            )
    return missing


def _tied_keys(own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For each key the other keys of the same parameter: a file needs to hold only one of them."""
    sharing: dict[int, list[str]] = {}
    for key, tensor in own.items():
        sharing.setdefault(id(tensor), []).append(key)
    return {key: [other for other in sharing[id(tensor)] if other != key] for key, tensor in own.items()}


def with_encoder_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a bare encoder under the keys that a model with a head has."""
    if any(key.startswith(ENCODER_PREFIX) for key in weights):
        return dict(weights)
    parts = ("embeddings.", "encoder.", "pooler.")
    return {ENCODER_PREFIX + key if key.startswith(parts) else key: tensor for key, tensor in weights.items()}


def num_labels_of(weights: Mapping[str, Tensor]) -> int | None:
    """How many labels the checkpoint's classifier has; None where it has no classifier."""
    return _rows(weights, "classifier.weight") if "classifier.weight" in weights else None


def has_layer_projections(weights: Mapping[str, Tensor]) -> bool:
    """Whether the checkpoint has a projection for each layer, as TinyBERT's second release."""
    return "fit_denses.0.weight" in weights


def projection_size(weights: Mapping[str, Tensor]) -> int:
    """The teacher's hidden size that the checkpoint projects to; 0 where it has no projection."""
    for key in ("fit_denses.0.weight", "fit_dense.weight"):
        if key in weights:
            return _rows(weights, key)
    return 0


def _rows(weights: Mapping[str, Tensor], key: str) -> int:
    if weights[key].dim() != 2:
        raise UserError(f"the weights' {key} has the shape {list(weights[key].shape)}, expected a matrix")
    return weights[key].shape[0]


def summarise(keys: Iterable[str], most: int = 3) -> str:
    """The first few keys and how many there are more, for one line of a message."""
    keys = list(keys)
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest
