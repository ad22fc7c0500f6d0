"""The files of a model's folder: their names, and reading weights in every known form; `saving.py` writes them.

Reading executes nothing: safetensors, or pickles through `weights_only`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from transformer.errors import UserError
from transformer.saving import (
    CONFIG_NAME,
    SAFETENSORS_NAME,
    TOKENIZER_CONFIG_NAME,
    VOCAB_NAME,
    WEIGHTS_NAME,
    settle_to_read,
    write_atomically,
    write_together,
    write_weights,
)
from transformer.untrusted import OtherObjects, check_pickled, check_tensors

__all__ = [
    "CONFIG_NAME",
    "SAFETENSORS_NAME",
    "TOKENIZER_CONFIG_NAME",
    "VOCAB_NAME",
    "WEIGHTS_NAME",
    "read_weights",
    "write_atomically",
    "write_together",
    "write_weights",
]

# TensorFlow-born files call a LayerNorm's weight and bias gamma and beta.
_OLD_LAYER_NORM_NAMES = ((re.compile(r"\.gamma$"), ".weight"), (re.compile(r"\.beta$"), ".bias"))

_WRAPPER = "module."


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """Reads a model's tensors, by today's names: model.safetensors where there is one, else pytorch_model.bin.

    LayerNorm's gamma and beta become weight and bias, the constant `position_ids` is left out, and so is `module.`
    in front of every key, from DistributedDataParallel.

    Raises:
        UserError: no weights in the folder, or a file that is broken or holds more than tensors.
    """
    folder = Path(folder)
    settle_to_read(folder)
    safetensors, pickled = folder / SAFETENSORS_NAME, folder / WEIGHTS_NAME
    if safetensors.is_file():
        path = safetensors
        try:
            weights = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as safetensors ({_first_line(error)})") from None
    elif pickled.is_file():
        path = pickled
        weights = _read_pickled(path)
    else:
        raise UserError(f"{folder}: has no weights; expected {SAFETENSORS_NAME} or {WEIGHTS_NAME}")
    for key, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized:
            raise UserError(f"{path}: {key} is a {str(tensor.layout)[6:]} tensor of {str(tensor.dtype)[6:]}, no weight")
    return {
        _current_name(key): tensor
        for key, tensor in _without_wrapper(weights).items()
        if not key.endswith("embeddings.position_ids")
    }


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is told by the error
            check_pickled(path)
            outline = _bare(torch.load(path, map_location="meta", weights_only=True))  # without values
            if isinstance(outline, Mapping):
                check_tensors(outline, path.stat().st_size)
            weights = _bare(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a broken pickle can raise any
        otherwise = ""
        if isinstance(error, OtherObjects):
            otherwise = f"; where you trust it, save its tensors alone by safetensors' save_file, as {SAFETENSORS_NAME}"
        raise UserError(
            f"{path}: cannot be read as a dictionary of tensors ({_first_line(error)}); "
            f"a file that holds other objects is refused, since loading it could run code{otherwise}"
        ) from None
    if not isinstance(weights, Mapping) or not all(isinstance(t, torch.Tensor) for t in weights.values()):
        raise UserError(f"{path}: holds no dictionary of tensors{_inner_dictionary(weights)}")
    return {str(key): tensor for key, tensor in weights.items()}


def _bare(value: Any) -> Any:
    """What was pickled, without attributes that a file may give parameters and dictionaries: they hide methods."""
    if isinstance(value, dict):
        return {key: _bare(part) for key, part in dict.items(value)}
    return torch.Tensor.detach(value) if isinstance(value, torch.Tensor) else value


def _inner_dictionary(content: object) -> str:
    """What to do about a checkpoint that has its tensors one dictionary further in; nothing where it has none."""
    if not isinstance(content, Mapping):
        return ""
    inner = [str(key) for key, value in content.items() if isinstance(value, Mapping)]
    if not inner:
        return ""
    chosen = next((key for key in ("state_dict", "model_state_dict", "model") if key in inner), inner[0])
    names = ", ".join(repr(str(key)[:60]) for key in islice(content, 8)) + (", …" if len(content) > 8 else "")
    return f" but {names}; save the inner dictionary, {chosen[:60]!r}, alone as {WEIGHTS_NAME}"


def _without_wrapper(weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The tensors by the model's own keys, where DistributedDataParallel has put `module.` before all of them."""
    if not all(key.startswith(_WRAPPER) for key in weights):
        return weights
    return {key.removeprefix(_WRAPPER): tensor for key, tensor in weights.items()}


def _current_name(key: str) -> str:
    for pattern, replacement in _OLD_LAYER_NORM_NAMES:
        key = pattern.sub(replacement, key)
    return key


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
