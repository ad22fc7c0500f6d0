"""The files of a model's folder: their names, reading weights in every known form, writing them whole.

Reading executes nothing: safetensors, or pickles through `weights_only`. Writing goes through a
temporary file that replaces the old one only once it is on the disk.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from transformer.errors import UserError
from transformer.untrusted import check_pickled, check_tensors

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "pytorch_model.bin"
SAFETENSORS_NAME = "model.safetensors"
VOCAB_NAME = "vocab.txt"

# TensorFlow-born files call a LayerNorm's weight and bias gamma and beta.
_OLD_LAYER_NORM_NAMES = ((re.compile(r"\.gamma$"), ".weight"), (re.compile(r"\.beta$"), ".bias"))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that a kill at any moment leaves the old content or the new one, whole.

    Args:
        path: the file to be replaced or made; its folder exists.
        write: is called with the open temporary file.

    Raises:
        OSError: the file cannot be written; the old one is untouched and nothing is left behind.
    """
    write_together(path.parent, {path.name: write})


def write_together(folder: Path, writers: Mapping[str, Callable[[BinaryIO], object]]) -> None:
    """Writes files of one folder so that none is replaced before all are on the disk.

    Then they are renamed, in the order given; each is at every moment the old one or the new one, whole.

    Args:
        folder: exists.
        writers: file names, and what is called with each one's open temporary file.

    Raises:
        OSError: one of them cannot be written; the old ones are untouched and nothing is left behind.
    """
    staged: dict[str, str] = {}
    try:
        for name, write in writers.items():
            descriptor, staged[name] = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(staged[name], 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        for name, temporary in staged.items():
            os.replace(temporary, folder / name)
    except BaseException:
        for temporary in staged.values():
            Path(temporary).unlink(missing_ok=True)
        raise
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """Reads a model's tensors, by today's names: model.safetensors where there is one, else pytorch_model.bin.

    LayerNorm's gamma and beta become weight and bias, and the constant `position_ids` is left out.

    Raises:
        UserError: no weights in the folder, or a file that is broken or holds more than tensors.
    """
    folder = Path(folder)
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
        _current_name(key): tensor for key, tensor in weights.items() if not key.endswith("embeddings.position_ids")
    }


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is told by the error
            check_pickled(path)
            outline = torch.load(path, map_location="meta", weights_only=True)  # without values
            if isinstance(outline, Mapping):
                check_tensors(outline, path.stat().st_size)
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle can raise any
        raise UserError(
            f"{path}: cannot be read as a dictionary of tensors ({_first_line(error)}); "
            "a file that holds other objects is refused, since loading it could run code"
        ) from None
    if not isinstance(weights, Mapping) or not all(isinstance(t, torch.Tensor) for t in weights.values()):
        raise UserError(f"{path}: holds no dictionary of tensors")
    return {str(key): tensor for key, tensor in weights.items()}


def _current_name(key: str) -> str:
    for pattern, replacement in _OLD_LAYER_NORM_NAMES:
        key = pattern.sub(replacement, key)
    return key


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor], others: Mapping[str, bytes] | None = None) -> None:
    """Writes FOLDER/pytorch_model.bin, after other files of the model that belong to it, by name.

    A model.safetensors of an older model is taken away: were it left there it would be read first.

    Raises:
        OSError: a file cannot be written; all older ones are untouched.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}

    def writer(content: bytes) -> Callable[[BinaryIO], object]:
        return lambda file: file.write(content)

    writers = {name: writer(content) for name, content in (others or {}).items()}
    write_together(folder, {**writers, WEIGHTS_NAME: lambda file: torch.save(tensors, file)})
    (folder / SAFETENSORS_NAME).unlink(missing_ok=True)
