"""Load a checkpoint's tensors into a model, and report missing and unexpected keys."""

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
    """A context in which modules are built without initialising their weights, because a checkpoint's follow.

    It saves seconds: to initialise a model on the meta device, torch would import its compiler.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:  # its functions return the tensor they are given
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class LoadReport:
    """Keys of the model that the checkpoint lacks, and keys of the checkpoint that the model lacks."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def lacks(self, prefix: str) -> bool:
        """Return whether a key with this prefix is missing."""
        return any(key.startswith(prefix) for key in self.missing)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> LoadReport:
    """Copy a checkpoint's tensors into the model's parameters of the same name.

    The keys of a bare encoder get the prefix `bert.`. The encoder must be complete. A head that the checkpoint lacks
    keeps its values: the caller decides by the report whether to accept that.

    Raises:
        UserError: part of the encoder is missing, or a tensor's shape differs from the config's.
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
    """Check that a checkpoint's tensors fit a model, which may be on the meta device and so takes no memory.

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
        raise UserError(f"{source}: the weights lack {summarise(lost)}; they do not belong to the model of config.json")
    for key, tensor in weights.items():
        if key in own and own[key].shape != tensor.shape:
            raise UserError(
                f"{source}: {key} has the shape {list(tensor.shape)}, expected {list(own[key].shape)}; "
                "the weights do not belong to the model of config.json"
            )
    return missing


def _tied_keys(own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return for each key the other keys of the same parameter: a file needs only one of them."""
    sharing: dict[int, list[str]] = {}
    for key, tensor in own.items():
        sharing.setdefault(id(tensor), []).append(key)
    return {key: [other for other in sharing[id(tensor)] if other != key] for key, tensor in own.items()}


def with_encoder_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the prefix `bert.` that a bare encoder's keys lack."""
    if any(key.startswith(ENCODER_PREFIX) for key in weights):
        return dict(weights)
    parts = ("embeddings.", "encoder.", "pooler.")
    return {ENCODER_PREFIX + key if key.startswith(parts) else key: tensor for key, tensor in weights.items()}


def num_labels_of(weights: Mapping[str, Tensor]) -> int | None:
    """Return the number of labels of the checkpoint's classifier; None if it has no classifier."""
    return _rows(weights, "classifier.weight") if "classifier.weight" in weights else None


def has_layer_projections(weights: Mapping[str, Tensor]) -> bool:
    """Return whether the checkpoint has a projection for each layer, as TinyBERT's second release does."""
    return "fit_denses.0.weight" in weights


def projection_size(weights: Mapping[str, Tensor]) -> int:
    """Return the hidden size that the checkpoint projects to; 0 if it has no projection."""
    for key in ("fit_denses.0.weight", "fit_dense.weight"):
        if key in weights:
            return _rows(weights, key)
    return 0


def _rows(weights: Mapping[str, Tensor], key: str) -> int:
    if weights[key].dim() != 2:
        raise UserError(f"the weights' {key} has the shape {list(weights[key].shape)}, expected a matrix")
    return weights[key].shape[0]


def summarise(keys: Iterable[str], most: int = 3) -> str:
    """Return the first keys and the number of the others, for a message."""
    keys = list(keys)
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest
