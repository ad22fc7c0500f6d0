"""Unpack .zip, .tar, .tar.gz and .tgz files from untrusted sources into a new folder.

The names, kinds and sizes of all entries are checked before anything is written. Only the contents of regular files
are read, and links are refused: this is stricter than tarfile's data filter, and works on Python releases without it.
"""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from transformer.errors import UserError
from transformer.untrusted import directory_size

MODEL_FILES = (("config.json",), ("pytorch_model.bin", "model.safetensors"))  # for `find_folder`
_PIECE = 2**20
_LONGEST_NAME = 1000
_MEASURED_FROM = 100 * 2**20  # bytes; smaller content is no bomb, whatever its ratio
_STRAY = ("__MACOSX", ".DS_Store")  # macOS adds them to archives
_BROKEN: tuple[type[Exception], ...] = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError)
_BROKEN += (struct.error, RuntimeError, ValueError, IndexError, OverflowError, MemoryError)  # from zipfile


class BeyondLimits(UserError):
    """A download or an archive is larger than the limits or the disk allow."""


@dataclass(frozen=True)
class Limits:
    """Limits on a download and on an archive.

    gigabytes: of a download, and of an archive's content. ratio: of content to archive, for content above 100 MB.
    entries: files and folders in an archive.
    """

    gigabytes: float = 50.0
    ratio: float = 100.0
    entries: int = 10_000

    @property
    def bytes(self) -> int:
        """`gigabytes` in bytes."""
        return round(self.gigabytes * 1e9)


class _Entry(NamedTuple):
    """A file or folder of an archive; `info` is the archive's own record of it."""

    name: str
    size: int
    info: Any
    is_folder: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the folders and of the file."""
        return PureWindowsPath(self.name).parts  # separates at / and \ on every system


def is_archive(path: Path) -> bool:
    """Return whether a file's first bytes are those of an archive that `unpack` can read."""
    return _kind(path) is not None


def unpack(path: Path, folder: Path, limits: Limits | None = None, what: str = "") -> None:
    """Unpack an archive into a new folder, completely or not at all.

    Args:
        path: the archive.
        folder: does not exist yet; its parent does.
        limits: None applies the defaults.
        what: the archive's name in messages; default: its path.

    Raises:
        UserError: the file is no archive or is broken; it exceeds the limits or the free space (BeyondLimits); or an
            entry is no regular file or folder inside the target. Nothing is left behind.
    """
    limits, what = limits or Limits(), what or str(path)
    temporary = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        with _open(path, limits, what) as archive:
            read: Any = archive.open if isinstance(archive, zipfile.ZipFile) else archive.extractfile
            for entry in _checked_files(archive, path, limits, what):
                target = temporary.joinpath(*entry.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with read(entry.info) as source, target.open("xb") as copy:  # x refuses a second file of this name
                    shutil.copyfileobj(source, copy, _PIECE)
                    if copy.tell() != entry.size:
                        raise EOFError(f"{entry.name!r} is shorter than stated")
        os.chmod(temporary, folder.parent.stat().st_mode & 0o777)  # mkdtemp denies access to all but the owner
        os.rename(temporary, folder)
    except _BROKEN as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
        raise UserError(f"{what}: the archive is broken ({reason}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{what}: cannot be unpacked into {folder} ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find_folder(root: Path, files: Sequence[Sequence[str]], what: str) -> Path:
    """Return the one folder of an unpacked archive, at any depth, that holds certain files.

    Args:
        root: where the archive was unpacked.
        files: groups of names; the folder holds at least one file of each group.
        what: the archive's name in messages.

    Raises:
        UserError: no folder holds them, or several do.
    """
    folders = [Path(folder) for folder, _, _ in os.walk(root)]
    found = sorted(
        folder
        for folder in folders
        if not {*_STRAY} & {*folder.relative_to(root).parts}
        and all(any((folder / name).is_file() for name in group) for group in files)
    )
    if len(found) == 1:
        return found[0]
    wanted = " and ".join(" or ".join(group) for group in files)
    if not found:
        top = sorted(path.name for path in root.iterdir() if path.name not in _STRAY)[:5]
        raise UserError(f"{what}: no folder in it holds {wanted}; at its top are {', '.join(top) or 'no files'}")
    names = ", ".join(str(folder.relative_to(root)) for folder in found[:5])
    raise UserError(f"{what}: several folders in it hold {wanted} ({names}); unpack it and name one of them")


def only_top_folder(root: Path) -> Path:
    """Return the deepest folder that contains everything in an unpacked archive."""
    while True:
        inside = [path for path in root.iterdir() if path.name not in _STRAY]
        if len(inside) != 1 or not inside[0].is_dir():
            return root
        root = inside[0]


def _kind(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    kind = "tar"
    if head.startswith(b"\x1f\x8b"):
        kind = "tar.gz"
        with suppress(OSError, EOFError, zlib.error), gzip.open(path) as content:
            head = content.read(512)
    return kind if head[257:262] == b"ustar" else None


class _BoundedReads(gzip.GzipFile):
    """A .gz file that refuses large reads: tarfile reads a long name as a whole, and that may be gigabytes."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _PIECE:
            raise tarfile.ReadError("a name or header in it is too long")
        return super().read(size)


@contextmanager
def _open(path: Path, limits: Limits, what: str) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    kind = _kind(path)
    if kind == "zip":
        if directory_size(path) > limits.entries * (46 + 2 * _LONGEST_NAME):  # zipfile reads it as a whole
            raise BeyondLimits(f"{what}: holds more than {limits.entries} files and folders (--most_entries)")
        with zipfile.ZipFile(path) as archive:
            yield archive
    elif kind is not None:
        with (
            _BoundedReads(path) if kind == "tar.gz" else path.open("rb") as content,
            tarfile.open(fileobj=content, mode="r:") as tar,
        ):
            yield tar
    else:
        raise UserError(f"{what}: is no .zip, .tar, .tar.gz or .tgz file")


def _checked_files(archive: Any, path: Path, limits: Limits, what: str) -> list[_Entry]:
    """Return an archive's files, after every check that needs no writing. Raises UserError."""
    room = min(limits.bytes, max(_MEASURED_FROM, round(limits.ratio * path.stat().st_size)))
    files = []
    total = 0
    entries = _zip_entries if isinstance(archive, zipfile.ZipFile) else _tar_entries
    for number, entry in enumerate(entries(archive, what), start=1):
        total += entry.size
        if number > limits.entries:
            raise BeyondLimits(f"{what}: holds more than {limits.entries} files and folders (--most_entries)")
        if total > room:
            most = f"{room / 1e9:.3g} GB, {limits.ratio:g} times its own size or the most that is allowed"
            raise BeyondLimits(f"{what}: expands to more than {most} (--most_ratio, --most_gigabytes)")
        leads_out = bool(PureWindowsPath(entry.name).anchor) or ".." in entry.parts
        if leads_out or "\0" in entry.name or len(entry.name) > _LONGEST_NAME:
            raise UserError(f"{what}: {entry.name[:100]!r} in it leads out of the target folder, or is no valid name")
        if not entry.is_folder:
            files.append(entry)
    free = shutil.disk_usage(path.parent).free
    if total > free:
        raise BeyondLimits(f"{what}: unpacking needs {total / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB free")
    return files


def _zip_entries(archive: zipfile.ZipFile, what: str) -> Iterator[_Entry]:
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _special(info.filename, what)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise zipfile.BadZipFile("a rare compression")  # such as one that reserves gigabytes of memory
        is_folder = info.filename.endswith(("/", "\\")) or kind == stat.S_IFDIR
        yield _Entry(info.filename, info.file_size, info, is_folder)


def _tar_entries(archive: tarfile.TarFile, what: str) -> Iterator[_Entry]:
    for info in archive:
        if not (info.isreg() or info.isdir()) or info.issparse() or info.size < 0:
            raise _special(info.name, what)
        yield _Entry(info.name, info.size, info, info.isdir() or info.name.endswith(("/", "\\")))
    # tarfile takes a bad header for the end; the real end is a block of zeros.
    content: Any = archive.fileobj
    content.seek(archive.offset)
    if content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")
    while content.read(_PIECE):  # gzip compares its checksum at the end
        pass


def _special(name: str, what: str) -> UserError:
    return UserError(f"{what}: {name[:100]!r} in it is a link, a device or of another special kind; unpack it yourself")
