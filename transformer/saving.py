"""Writing a model's folder: every file whole, and all files of one model or all of the one before it.

A file is written beside the old one, and takes its name once it is on the disk. A model is several files, which no
rename can exchange at once: they are written under names of their own, and become the folder's model when a manifest
takes its name. What a kill leaves undone after that is done by `settle`, which readers call too.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from transformer.errors import UserError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "pytorch_model.bin"
SAFETENSORS_NAME = "model.safetensors"
VOCAB_NAME = "vocab.txt"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
MANIFEST_NAME = "model_manifest.json"
# In the order in which they take their names: the weights last.
MODEL_FILES = (VOCAB_NAME, TOKENIZER_CONFIG_NAME, CONFIG_NAME, WEIGHTS_NAME)
_LEFT_BEHIND = re.compile(r"\.(?P<name>.+)\.([0-9a-f]{16}\.new|[a-z0-9_]{8}\.tmp)")


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
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor], others: Mapping[str, bytes] | None = None) -> None:
    """Replaces a model: pytorch_model.bin and, by name, the other files that belong to it (`write_model`).

    Raises:
        OSError: a file cannot be written; all older ones are untouched.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    writers = {name: partial(_write_bytes, content) for name, content in (others or {}).items()}
    write_model(folder, {**writers, WEIGHTS_NAME: partial(save_tensors, tensors)})


def write_model(folder: Path, writers: Mapping[str, Callable[[BinaryIO], object]]) -> None:
    """Replaces the files of a model, all or none.

    They are written beside the old ones first. The manifest, which has their sizes and SHA-256, then takes its name
    by one rename: from that moment the new model is the folder's, and what a kill leaves undone `settle` does. A
    model.safetensors of an older model is taken away: were it left there it would be read first.

    Args:
        folder: exists.
        writers: names among `MODEL_FILES`, and what is called with each one's open file.

    Raises:
        OSError: a file cannot be written; all older ones are untouched.
    """
    settle(folder)
    remove_leftovers(folder, (*MODEL_FILES, MANIFEST_NAME))
    identity = secrets.token_hex(8)
    staged: list[Path] = []

    def stage(name: str, write: Callable[[BinaryIO], object]) -> dict[str, Any]:
        staged.append(_staged(folder, name, identity))
        with staged[-1].open("xb") as file:
            hashed = Hashed(file)
            write(hashed)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        return {"size": hashed.size, "sha256": hashed.digest.hexdigest()}

    try:
        files = {name: stage(name, write) for name, write in writers.items()}
        manifest = json.dumps({"id": identity, "files": files}, indent=2).encode() + b"\n"
        stage(MANIFEST_NAME, partial(_write_bytes, manifest))
        _sync_folder(folder)
        os.replace(staged[-1], folder / MANIFEST_NAME)
    except BaseException:
        for path in staged:
            path.unlink(missing_ok=True)
        raise
    _sync_folder(folder)
    settle(folder)


def settle(folder: Path) -> None:
    """Ends the replacing of a model that a kill has broken off after its manifest took its name. Mostly there is none.

    Raises:
        OSError: a file cannot be renamed.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    staged = {name: _staged(folder, name, manifest["id"]) for name in MODEL_FILES if name in manifest["files"]}
    waiting = {name: path for name, path in staged.items() if path.exists()}
    if not waiting:
        return
    if WEIGHTS_NAME in waiting:
        (folder / SAFETENSORS_NAME).unlink(missing_ok=True)
    for name, path in waiting.items():
        try:
            os.replace(path, folder / name)
        except FileNotFoundError:  # another process has done it meanwhile
            continue
    _sync_folder(folder)


def settle_to_read(folder: Path) -> None:
    """`settle`, for those who read a model.

    Raises:
        UserError: the model was being replaced when that was broken off, and this user may not end it.
    """
    try:
        settle(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: the saving of this model was broken off and cannot be ended "
            f"({error.strerror}); the folder must be writable once"
        ) from None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the model that was last saved into a folder; None where there is none, or not one of ours."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
        identity, files = str(manifest["id"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return {"id": identity, "files": files} if re.fullmatch("[0-9a-f]{16}", identity) else None


def changed_files(folder: Path, hash_weights: bool = True) -> list[str]:
    """The files that are not, any more or yet, those of the folder's manifest: none of a model that is whole.

    A model.safetensors beside weights of the manifest counts too: it would be read in their place.

    Args:
        hash_weights: otherwise weights are told by their size alone, which takes no time.
    """
    saved = _saved_files(folder)
    changed = [
        name
        for name, known in saved.items()
        if name != WEIGHTS_NAME and not _is_as_saved(folder / name, known, hashes=True)
    ]
    if WEIGHTS_NAME in saved:
        beside = (folder / SAFETENSORS_NAME).is_file()
        if beside and (folder / WEIGHTS_NAME).is_file():
            changed.append(SAFETENSORS_NAME)
        elif not beside and not _is_as_saved(folder / WEIGHTS_NAME, saved[WEIGHTS_NAME], hash_weights):
            changed.append(WEIGHTS_NAME)
    return changed


def has_changed_content(path: Path, sha256: str) -> bool:
    """Whether a model's file has the size that the manifest beside it says, and another content.

    Args:
        sha256: of its content, as it is.
    """
    known = _saved_files(path.parent).get(path.name)
    return known is not None and _is_as_saved(path, known, hashes=False) and sha256 != known["sha256"]


def _saved_files(folder: Path) -> dict[str, dict[str, Any]]:
    """What the folder's manifest says of each file, in the order of `MODEL_FILES`; it may come from anybody."""
    manifest = read_manifest(folder)
    files = {} if manifest is None else manifest["files"]
    known = {name: files[name] for name in MODEL_FILES if isinstance(files.get(name), dict)}
    return {name: entry for name, entry in known.items() if {"size", "sha256"} <= set(entry)}


def _is_as_saved(path: Path, known: Mapping[str, Any], hashes: bool) -> bool:
    if not path.is_file() or path.stat().st_size != known["size"]:
        return False
    return not hashes or _sha256(path) == known["sha256"]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Removes what a kill has left of the writing of these files, where nobody else writes there."""
    for path in leftovers(folder, names):
        path.unlink(missing_ok=True)


def leftovers(folder: Path, names: Iterable[str]) -> list[Path]:
    """What a kill has left of the writing of these files, and nothing that `settle` still needs."""
    manifest, names = read_manifest(folder), set(names)
    needed = set() if manifest is None else {_staged(folder, name, manifest["id"]) for name in manifest["files"]}
    return [
        path
        for path in folder.glob(".*")
        if path not in needed and (match := _LEFT_BEHIND.fullmatch(path.name)) and match["name"] in names
    ]


def _staged(folder: Path, name: str, identity: str) -> Path:
    return folder / f".{name}.{identity}.new"


class Hashed(io.RawIOBase):
    """Passes on what is written, and knows its size and SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, content: Any) -> int:
        self._file.write(content)
        self.digest.update(content)
        self.size += len(content)
        return len(content)


def _write_bytes(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def save_tensors(content: Any, file: BinaryIO) -> None:
    """torch.save, with the OSError of a disk that fills up told as such.

    Raises:
        OSError: the file cannot be written.
    """
    told = _Told(file)
    try:
        torch.save(content, told)  # type: ignore[arg-type]
    except RuntimeError:  # of torch's writer, which only knows that its file did not grow
        if told.error is None:
            raise
    if told.error is not None:
        raise told.error


class _Told(io.RawIOBase):
    """Passes on what is written, and remembers how that failed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise
