"""Check files from strangers before they are read: their size, and the memory that reading them would take.

A few bytes can make a reader allocate any amount of memory: a size in a pickle, a compressed zip entry, a tensor whose
values all share one place of the file. The checks here allocate little themselves.
"""

from __future__ import annotations

import mmap
import os
import pickletools
import re
import stat
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformer.errors import UserError

_MOST_PICKLE = 64 * 2**20  # bytes, without tensors' values; BERT-large has 60 thousand
_MOST_ENTRIES = 100_000
_LEGACY_PICKLES = 5  # in torch's old format: magic number, version, system, tensors, storage keys
# The names that a dictionary of tensors needs. Others that torch allows make objects of any size from a number.
_ALLOWED = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils (_rebuild_tensor|_rebuild_tensor_v2|_rebuild_sparse_tensor)"
    r"|torch\._utils (_rebuild_parameter|_rebuild_parameter_with_state)"
    r"|torch\.serialization _get_layout|torch Size"
    r"|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool|ComplexFloat|ComplexDouble)Storage"
)
_WITH_NAMES = ("GLOBAL", "INST")
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
_SMALL = 2**16  # numbers up to this are harmless in a file of any size
_MAGIC = 0x1950A86A20F9469CFC6C  # the old format's magic number


class OtherObjects(ValueError):
    """A pickle would create other objects than a dictionary of tensors needs."""


def read_limited(path: Path, most: int) -> bytes:
    """Return the content of a file of at most `most` bytes.

    Raises:
        OSError: the file cannot be read.
        UserError: it is a pipe or a device, which may have no end, or is larger.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise UserError(f"{path}: is not a regular file")
        content = file.read(status.st_size + 1) if status.st_size <= most else b""
    if status.st_size > most:
        raise UserError(
            f"{path}: has {status.st_size / 1e6:.1f} MB, more than the {most / 1e6:.0f} MB allowed for such a file"
        )
    return content


def directory_size(path: Path) -> int:
    """Return the size in bytes of a zip file's central directory; only the end of the file is read.

    Raises:
        OSError: the file cannot be read.
        zipfile.BadZipFile: it has no end-of-directory record.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 2**16 - 100))
        tail = file.read()
        place = tail.rfind(b"PK\x05\x06")
        if place < 0 or len(tail) - place < 22:
            raise zipfile.BadZipFile("its end is missing")
        (stated,) = struct.unpack("<I", tail[place + 12 : place + 16])
        if place >= 20 and tail[place - 20 : place - 16] == b"PK\x06\x07":
            (wide,) = struct.unpack("<Q", tail[place - 12 : place - 4])
            file.seek(min(wide, size))
            record = file.read(56)
            stated = struct.unpack("<Q", record[40:48])[0] if len(record) == 56 else stated
    return min(stated, size)


def check_pickled(path: Path) -> None:
    """Check a file that torch.save wrote, in the zip or the legacy format, before torch reads it.

    Raises:
        OtherObjects: reading it would create other objects than tensors.
        ValueError: reading it would take more memory than the file's size; or it is broken.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            _check_zip(path, size)
            return
        if size == 0:
            raise ValueError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for _ in range(_LEGACY_PICKLES):
                if content.tell() < size:
                    _check_opcodes(content, size)


def _check_zip(path: Path, size: int) -> None:
    if directory_size(path) > _MOST_ENTRIES * 200:
        raise ValueError("it has too many entries")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("its entries are compressed, which torch never does")
            if len({entry.filename for entry in entries}) < len(entries):
                raise ValueError("it has an entry twice")
            if sum(entry.file_size for entry in entries) > size:
                raise ValueError("its entries together are larger than the file")
            pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _MOST_PICKLE:
                raise ValueError("it has no pickle of tensors, or one that is too large")
            with archive.open(pickles[0]) as file:
                _check_opcodes(file, size)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise ValueError(str(error)) from None


def _check_opcodes(file: Any, size: int) -> None:
    """Read a pickle's opcodes without executing them; raise the errors of `check_pickled`."""
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in _WITH_NAMES and not _ALLOWED.fullmatch(str(argument)):
            raise OtherObjects(f"it names {str(argument)[:80].replace(' ', '.')}")
        if opcode.name == "STACK_GLOBAL":
            raise OtherObjects("it computes the names of its objects")
        if opcode.name in _NUMBERS and abs(int(argument)) > max(size, _SMALL) and argument != _MAGIC:
            raise ValueError("it states a larger size than the file can hold")


def check_tensors(weights: Mapping[Any, Any], size: int) -> None:
    """Check tensors on the meta device, before their values are read.

    Args:
        weights: the unpickled dictionary; values that are not tensors are ignored.
        size: of the file in bytes.

    Raises:
        ValueError: the tensors have more values than the file; several may share values, as tied weights do.
    """
    # Without isinstance(..., torch.Tensor), so that this module need not import torch.
    tensors = [t for t in weights.values() if str(getattr(t, "layout", "")) == "torch.strided"]
    if any(tensor.numel() * tensor.itemsize > size for tensor in tensors):
        raise ValueError("one of its tensors has more values than the file")
    if sum(tensor.numel() * tensor.itemsize for tensor in tensors) > 4 * size:
        raise ValueError("its tensors have more values than the file")
