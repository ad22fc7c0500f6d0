"""The file of a run's state: tensors and plain values as torch writes them, with their SHA-256 behind them.

torch reads back a file in which bits have changed without a word, and a run would go on from them.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch

from transformer.saving import Hashed, save_tensors

_DIGITS = 64
_PIECE = 2**20


def write_checked(content: Any, file: BinaryIO) -> None:
    """Writes what `read_checked` reads.

    Raises:
        OSError: the file cannot be written.
    """
    hashed = Hashed(file)
    save_tensors(content, hashed)  # type: ignore[arg-type]
    file.write(hashed.digest.hexdigest().encode())


def read_checked(path: Path) -> Any:
    """Reads what `write_checked` has written, onto the CPU; no code in it is run.

    Raises:
        ValueError: it is not, to the bit, what was written.
        Exception: of torch, which does not say which.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size - _DIGITS
        while left > 0 and (piece := file.read(min(left, _PIECE))):
            digest.update(piece)
            left -= len(piece)
        if left or file.read() != digest.hexdigest().encode():
            raise ValueError("it is not what was saved: its SHA-256 is another one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong with a file is told by the error
        return torch.load(path, map_location="cpu", weights_only=True)
