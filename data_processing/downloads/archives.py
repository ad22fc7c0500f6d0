"""Unpacks .zip, .tar, .tar.gz and .tgz files that come from strangers, into a folder of their own.

What an archive holds is planned before anything is written: files and folders only, each below the target, within
limits on their number, their size and how far they expand. Links, devices and names that lead elsewhere refuse the
whole archive. While it is unpacked each entry is held to the size that the plan gave it.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from transformer.errors import UserError
from transformer.untrusted import directory_size

_PIECE = 2**20
_MOST_ZEROS = 100  # pieces behind a tar's end
_MEASURED_FROM = 100 * 2**20  # bytes; below this no archive expands too far
_LONGEST_PART, _LONGEST_NAME = 255, 1000  # bytes of a name between slashes, and of a whole one
# Names that Windows gives a meaning of their own.
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_DRIVE = re.compile("[A-Za-z]:")  # which, with or without a slash, is another place on Windows
_ONLY = "only files and folders are taken"
_STRAY = ("__MACOSX", ".DS_Store")  # what a Mac adds to archives
_BROKEN = (
    gzip.BadGzipFile,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    EOFError,
    struct.error,
    NotImplementedError,
    RuntimeError,  # zipfile's for an encrypted entry
    ValueError,
    IndexError,
    OverflowError,
    MemoryError,
)


class BeyondLimits(UserError):
    """A download or an archive is larger than is allowed, or than the disk has room for; nothing is wrong with it."""


@dataclass(frozen=True)
class Limits:
    """How much an archive, or a download, may take.

    gigabytes: of a download, and of all that an archive holds. ratio: how many times its own size an archive may
    expand to, where that is more than 100 MB. entries: files and folders in it.
    """

    gigabytes: float = 50.0
    ratio: float = 100.0
    entries: int = 10_000

    @property
    def bytes(self) -> int:
        """The most bytes."""
        return round(self.gigabytes * 1e9)


@dataclass(frozen=True)
class _Entry:
    """A file of the archive: its name, the parts of that, its size, and what opens it."""

    name: str
    parts: tuple[str, ...]
    size: int
    open: Callable[[], IO[bytes]]

    @property
    def has_name(self) -> bool:
        """Whether it is named as a file is, not as a folder with a slash or a dot at the end."""
        return self.name.replace("\\", "/").rpartition("/")[2] not in ("", ".")


def is_archive(path: Path) -> bool:
    """Whether a file begins as the archives do that can be unpacked here; names do not count."""
    return _kind(path) is not None


def unpack(path: Path, folder: Path, limits: Limits | None = None, what: str = "") -> None:
    """Unpacks an archive into a new folder, whole or not at all.

    Args:
        path: the archive.
        folder: is made; it is not there yet, its parent is.
        limits: the defaults where there are none.
        what: the archive's name in messages; the path where it is empty.

    Raises:
        UserError: it is no archive, is broken, is beyond the limits or the disk's room, or holds what is no file or
            folder below the target; nothing is left of it.
    """
    limits, what = limits or Limits(), what or str(path)
    temporary = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        with _opened(path, limits, what) as archive:
            entries = _planned(archive, path, limits, what)
            for entry in entries:
                _write(entry, temporary, what)
        os.chmod(temporary, folder.parent.stat().st_mode & 0o777)  # mkdtemp lets only its owner in
        os.rename(temporary, folder)
    except _BROKEN as error:
        raise UserError(f"{what}: the archive is broken ({_reason(error)}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{what}: cannot be unpacked into {folder} ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find_folder(root: Path, is_wanted: Callable[[Path], bool], what: str, wanted: str) -> Path:
    """The one folder of an unpacked archive, at any depth, that is wanted.

    Args:
        root: where it was unpacked.
        is_wanted: tells such a folder.
        what: the archive's name in messages.
        wanted: what it is to hold, for messages.

    Raises:
        UserError: there is none, or more than one.
    """
    folders = [Path(folder) for folder, _, _ in os.walk(root)]
    found = sorted(folder for folder in folders if not _is_stray(folder.relative_to(root)) and is_wanted(folder))
    if len(found) == 1:
        return found[0]
    if not found:
        there = sorted(path.name for path in root.iterdir() if not _is_stray(path.relative_to(root)))[:5]
        raise UserError(f"{what}: no folder in it holds {wanted}; at its top are {', '.join(there) or 'no files'}")
    names = ", ".join(str(folder.relative_to(root)) for folder in found[:5])
    raise UserError(f"{what}: several folders in it hold {wanted} ({names}); unpack it and name one of them")


def only_top_folder(root: Path) -> Path:
    """The folder that all of an unpacked archive is in: its top, where that holds files or several folders."""
    while True:
        inside = [path for path in root.iterdir() if path.name not in _STRAY]
        if len(inside) != 1 or not inside[0].is_dir():
            return root
        root = inside[0]


def _is_stray(path: Path) -> bool:
    return any(part in _STRAY for part in path.parts)


def _kind(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(b"\x1f\x8b"):
        return "tar.gz" if _begins_as_tar(path) else None
    return "tar" if head[257:262] == b"ustar" else None


def _begins_as_tar(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = zlib.decompressobj(wbits=31).decompress(file.read(2**16), 512)
    except zlib.error:
        return False
    return head[257:262] == b"ustar"


@contextmanager
def _opened(path: Path, limits: Limits, what: str) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    kind = _kind(path)
    if kind is None:
        raise UserError(f"{what}: is no .zip, .tar, .tar.gz or .tgz file")
    if kind == "zip":
        if directory_size(path) > limits.entries * (46 + 2 * _LONGEST_NAME):  # it is read as a whole
            raise BeyondLimits(f"{what}: holds more than {limits.entries} files and folders (--most_entries)")
        with zipfile.ZipFile(path) as archive:
            yield archive
    else:
        with (
            gzip.open(path) if kind == "tar.gz" else path.open("rb") as content,
            tarfile.open(fileobj=_InPieces(content), mode="r:") as tar,
        ):
            yield tar


class _InPieces(io.RawIOBase):
    """A file of which no more than a piece is read at once: a tar's long names would be read whole, of any length."""

    def __init__(self, content: Any) -> None:
        self._content = content

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _PIECE:
            raise tarfile.ReadError("a name or header in it is too long")
        return self._content.read(size)

    def seek(self, place: int, whence: int = 0) -> int:
        return self._content.seek(place, whence)

    def tell(self) -> int:
        return self._content.tell()


def _planned(archive: zipfile.ZipFile | tarfile.TarFile, path: Path, limits: Limits, what: str) -> list[_Entry]:
    """All files of an archive, in its order, after every check that needs no writing. Raises UserError."""
    room = min(limits.bytes, max(_MEASURED_FROM, round(limits.ratio * path.stat().st_size)))
    entries: list[_Entry] = []
    count = total = 0
    seen: dict[str, bool] = {}
    listed = _zip_entries(archive, what) if isinstance(archive, zipfile.ZipFile) else _tar_entries(archive, what)
    for entry, is_folder in listed:
        count += 1
        total += entry.size
        if count > limits.entries:
            raise BeyondLimits(f"{what}: holds more than {limits.entries} files and folders (--most_entries)")
        if total > room:
            raise BeyondLimits(
                f"{what}: expands to more than {room / 1e9:.3g} GB, {limits.ratio:g} times its own size or all that "
                "is allowed (--most_ratio, --most_gigabytes)"
            )
        if not is_folder and not entry.has_name:
            if entry.size:
                raise UserError(f"{what}: {'/'.join(entry.parts)!r} in it is a file under a folder's name")
            is_folder = True  # as some programs write it
        if not entry.parts:
            continue
        # On a disk that takes capitals and small letters for the same, two files would be one.
        for depth in range(1, len(entry.parts)):
            if seen.setdefault("/".join(entry.parts[:depth]).casefold(), True) is False:
                raise UserError(f"{what}: {'/'.join(entry.parts[:depth])!r} is both a file and a folder in it")
        name = "/".join(entry.parts).casefold()
        if seen.get(name, is_folder) is not is_folder or (name in seen and not is_folder):
            raise UserError(f"{what}: holds {'/'.join(entry.parts)!r} twice")
        seen[name] = is_folder
        if not is_folder:
            entries.append(entry)
    free = shutil.disk_usage(path.parent).free
    if total > free:
        raise BeyondLimits(
            f"{what}: needs {total / 1e9:.3g} GB to be unpacked, there are {free / 1e9:.3g} GB free on the disk"
        )
    return entries


def _zip_entries(archive: zipfile.ZipFile, what: str) -> Iterator[tuple[_Entry, bool]]:
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            is_a = "a link" if kind == stat.S_IFLNK else "a device, a pipe or a socket"
            raise UserError(f"{what}: {info.filename[:100]!r} in it is {is_a}; {_ONLY}")
        if info.is_dir() and kind == stat.S_IFREG:
            raise UserError(f"{what}: {info.filename[:100]!r} in it is a file under a folder's name; {_ONLY}")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{what}: {info.filename!r} in it is encrypted or packed in a rare way; unpack it yourself")
        is_folder = info.is_dir() or kind == stat.S_IFDIR
        entry = _Entry(
            info.filename, _parts(info.filename, what), 0 if is_folder else info.file_size, partial(archive.open, info)
        )
        yield entry, is_folder


def _tar_entries(archive: tarfile.TarFile, what: str) -> Iterator[tuple[_Entry, bool]]:
    for info in archive:
        if not (info.isreg() or info.isdir()) or info.issparse():
            raise UserError(f"{what}: {info.name[:100]!r} in it is {_kind_of(info)}; {_ONLY}")
        if info.size < 0:
            raise tarfile.ReadError("a size below 0")
        entry = _Entry(
            info.name, _parts(info.name, what), 0 if info.isdir() else info.size, partial(_content, archive, info)
        )
        yield entry, info.isdir()
    # tarfile takes whatever follows the last good header for the end; the real one is a block of zeros.
    content = archive.fileobj
    assert content is not None
    content.seek(archive.offset)
    if content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")
    for _ in range(_MOST_ZEROS):  # to the checksum, where there is one
        if not content.read(_PIECE):
            return
    raise tarfile.ReadError("it does not end")


def _kind_of(info: tarfile.TarInfo) -> str:
    """What an entry is that is not taken, and how to make an archive without it where that is easy."""
    if info.islnk():  # of a file that is there under two names, the second
        return f"a hard link to {info.linkname[:100]!r} (tar --hard-dereference packs a copy)"
    if info.issym():
        return f"a link to {info.linkname[:100]!r} (tar --dereference packs what it leads to)"
    return "a file with holes (a sparse one)" if info.issparse() else "a device, a pipe or of an unknown kind"


def _content(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(info)
    assert file is not None  # only files are opened
    return file


def _parts(name: str, what: str) -> tuple[str, ...]:
    """The parts of an entry's name; empty for the top itself. Raises UserError where it leads out of the target."""
    name = name.replace("\\", "/")  # as some programs write it on Windows
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    shown = name[:100]
    if name.startswith("/") or ".." in parts or _DRIVE.match(name):
        raise UserError(f"{what}: {shown!r} in it leads out of the folder that it is unpacked into; it is not taken")
    lengths = [len(part.encode("utf-8", errors="surrogateescape")) for part in parts]
    if max(lengths, default=0) > _LONGEST_PART or sum(lengths) > _LONGEST_NAME:
        raise UserError(f"{what}: a name in it is too long ({name[:60]!r}…)")
    if any(re.search(r"[\0-\x1f\x7f]", part) for part in parts):
        raise UserError(f"{what}: {shown!r} in it is no name for a file: it has a control character")
    # Wherever it is unpacked: an archive is taken on all systems or on none.
    if any(":" in part for part in parts):
        raise UserError(f"{what}: {shown!r} in it is no name for a file on Windows, because of its ':'; rename it")
    if any(_DEVICE.fullmatch(part) for part in parts):
        raise UserError(f"{what}: {shown!r} in it is a device's name on Windows, and not taken; rename it")
    return parts


def _write(entry: _Entry, root: Path, what: str) -> None:
    path = root.joinpath(*entry.parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    left = entry.size
    with entry.open() as source, path.open("xb") as target:
        while piece := source.read(_PIECE):
            left -= len(piece)
            if left < 0:
                break
            target.write(piece)
    if left:
        raise UserError(f"{what}: the archive is broken ({'/'.join(entry.parts)!r} is not as long as it says)")


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".") or type(error).__name__
