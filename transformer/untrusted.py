"""Looks at a file from a stranger before it is read: how large it is, and what reading it would take.

A few bytes can ask for any amount of memory: a size in a pickle, a zip entry that expands, a tensor whose numbers all
lie on one place of the file. That is checked here from the file's outside, before a reader allocates what it asks for.
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

_MOST_PICKLE = 64 * 2**20  # bytes; of BERT-large it has 60 thousand
_MOST_ENTRIES = 100_000
_LEGACY_PICKLES = 5  # in torch's old format: a mark, a version, the machine, the tensors, the keys of their values
# What a dictionary of tensors is made of. Others that torch allows make objects of any size from a number alone.
_ALLOWED = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils (_rebuild_tensor|_rebuild_tensor_v2|_rebuild_sparse_tensor)"
    r"|torch\._utils (_rebuild_parameter|_rebuild_parameter_with_state)"
    r"|torch\.serialization _get_layout|torch Size"
    r"|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool|ComplexFloat|ComplexDouble)Storage"
)
_WITH_NAMES = ("GLOBAL", "INST")
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
_SMALL = 2**16  # a number of which nothing large comes
_MAGIC = 0x1950A86A20F9469CFC6C  # the old format's mark


class OtherObjects(ValueError):
    """A pickle makes other objects than a dictionary of tensors needs."""


def read_limited(path: Path, most: int) -> bytes:
    """The content of a file that is small by its nature.

    Raises:
        OSError: it cannot be read.
        UserError: it is no file (a pipe or a device has no end), or is larger than `most` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise UserError(f"{path}: is no ordinary file")
        content = file.read(status.st_size + 1) if status.st_size <= most else b""
    if status.st_size > most:
        raise UserError(
            f"{path}: has {status.st_size / 1e6:.1f} MB, more than the {most / 1e6:.0f} MB that such a file can need"
        )
    return content


def directory_size(path: Path) -> int:
    """The bytes that a zip file's directory takes, by its end, which is all that is read.

    Raises:
        OSError: it cannot be read.
        zipfile.BadZipFile: it has no such end.
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
    """Checks a file of torch's, of either format, before torch reads it.

    Raises:
        OtherObjects: reading it would make other objects than tensors.
        ValueError: it would take more memory than the file's size; or it is broken.
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
        raise ValueError("it holds too many entries")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("its tensors are compressed, which torch never does")
            if len({entry.filename for entry in entries}) < len(entries):
                raise ValueError("it holds an entry twice")
            if sum(entry.file_size for entry in entries) > size:
                raise ValueError("its entries together are larger than itself")
            pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _MOST_PICKLE:
                raise ValueError("it holds no pickle of tensors, or too large a one")
            with archive.open(pickles[0]) as file:
                _check_opcodes(file, size)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise ValueError(str(error)) from None


def _check_opcodes(file: Any, size: int) -> None:
    """Reads a pickle's instructions without following them. Raises as `check_pickled`."""
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in _WITH_NAMES and not _ALLOWED.fullmatch(str(argument)):
            raise OtherObjects(f"it names {str(argument)[:80].replace(' ', '.')}")
        if opcode.name == "STACK_GLOBAL":
            raise OtherObjects("it names what its instructions make up")
        if opcode.name in _NUMBERS and abs(int(argument)) > max(size, _SMALL) and argument != _MAGIC:
            raise ValueError("it speaks of more numbers than the file can hold")


def check_tensors(weights: Mapping[Any, Any], size: int) -> None:
    """Checks tensors that were read without their values, on the meta device, before those are read.

    Args:
        weights: what the pickle holds, if it is a dictionary of tensors at all.
        size: of the file in bytes.

    Raises:
        ValueError: the tensors have more values than the file; several may share theirs, as tied weights do.
    """
    # Known by what they have: whoever reads no weights does not wait for torch.
    tensors = [t for t in weights.values() if str(getattr(t, "layout", "")) == "torch.strided"]
    if any(tensor.numel() * tensor.itemsize > size for tensor in tensors):
        raise ValueError("a tensor in it has more values than the file")
    if sum(tensor.numel() * tensor.itemsize for tensor in tensors) > 4 * size:
        raise ValueError("its tensors have more values than the file")
