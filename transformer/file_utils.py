"""The files of a model's folder: their names, reading weights in every known form, and atomic writes.

Reading executes no code: safetensors, or pickles through `weights_only`. Writing replaces a file by one rename, so
that a kill at any moment leaves the old content or the new one, whole. Readers never write.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from transformer.errors import UserError
from transformer.untrusted import OtherObjects, check_pickled, check_tensors

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "pytorch_model.bin"
SAFETENSORS_NAME = "model.safetensors"
VOCAB_NAME = "vocab.txt"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
MODEL_FILES = (VOCAB_NAME, TOKENIZER_CONFIG_NAME, CONFIG_NAME, WEIGHTS_NAME)

# TensorFlow-born files name a LayerNorm's weight and bias gamma and beta.
_OLD_LAYER_NORM_NAMES = ((re.compile(r"\.gamma$"), ".weight"), (re.compile(r"\.beta$"), ".bias"))
# What wrappers put before every key: `module.` (DDP), `_orig_mod.` (torch.compile), `model.` (Lightning), or several.
_WRAPPED = re.compile(r"(?P<prefix>(?:[^.]+\.)*?)(?:bert\.)?(?:embeddings\.word_embeddings|encoder\.layer\.0)\..+")
_MODEL_PARTS = ("bert.", "embeddings.", "encoder.", "pooler.", "classifier.", "cls.", "fit_dense.", "fit_denses.")
_CONSTANTS = ("embeddings.position_ids", "embeddings.token_type_ids")  # buffers of `transformers`
_WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LARGEST = torch.finfo(torch.float32).max
_LFS_POINTER = b"git-lfs"  # in the first line of a pointer
_SAVE_FIRST = "load it with the library `transformers` and save it again with save_pretrained"
_OTHER_FORMS = (  # patterns of weight files that are not read, their kind, and what to do
    (
        f"{SAFETENSORS_NAME}.index.json",
        "the index of weights in several files",
        _SAVE_FIRST + ", max_shard_size='100GB'",
    ),
    (f"{WEIGHTS_NAME}.index.json", "the index of weights in several files", _SAVE_FIRST + ", max_shard_size='100GB'"),
    ("*.ckpt.*", "a TensorFlow checkpoint", _SAVE_FIRST + " (from_pretrained with from_tf=True)"),
    ("tf_model.h5", "a TensorFlow model", _SAVE_FIRST + " (from_pretrained with from_tf=True)"),
    ("flax_model.msgpack", "a Flax model", _SAVE_FIRST + " (from_pretrained with from_flax=True)"),
)
_TEMPORARY_NAME = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.tmp")


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """Read a model's tensors under today's names, from model.safetensors if it exists, else pytorch_model.bin.

    LayerNorm's gamma and beta become weight and bias; constants such as `position_ids` are left out, and so is the
    prefix of a wrapper, such as `module.` of DistributedDataParallel.

    Raises:
        UserError: the folder has no weights, or the file is broken or holds more than tensors, or a weight is no
            finite floating point number.
    """
    path = weights_file(Path(folder))
    if path.name == SAFETENSORS_NAME:
        try:
            weights = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as safetensors ({_first_line(error)})") from None
    else:
        weights = _read_pickled(path)
    for key, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized:
            raise UserError(
                f"{path}: {key} is a {str(tensor.layout)[6:]} tensor of type {str(tensor.dtype)[6:]}; weights are "
                "dense and real"
            )
    weights = _without_wrapper(weights, path)
    _check_values(weights, path)
    return {_current_name(key): tensor for key, tensor in weights.items() if not key.endswith(_CONSTANTS)}


def weights_file(folder: Path) -> Path:
    """Return the path of a model's weights: model.safetensors if it exists, else pytorch_model.bin.

    Raises:
        UserError: the folder has neither, or a Git LFS pointer in their place.
    """
    path = next((folder / name for name in (SAFETENSORS_NAME, WEIGHTS_NAME) if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: has no weights; expected {SAFETENSORS_NAME} or {WEIGHTS_NAME}{_other_form(folder)}")
    with contextlib.suppress(OSError), path.open("rb") as file:  # the reader names a file that cannot be read
        if _LFS_POINTER in file.read(40):
            raise UserError(f"{path}: is a Git LFS pointer, not the weights; run git lfs pull in its repository")
    return path


def _other_form(folder: Path) -> str:
    """Return what to do with weights in a form that is not read; otherwise how a folder gets weights."""
    for pattern, kind, advice in _OTHER_FORMS:
        for path in sorted(folder.glob(pattern)):
            return f". {path.name} is {kind}, which is not read: {advice}"
    return ". For a student with new weights: python -m distillation.new_student"


def _without_wrapper(weights: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors without the prefix that a wrapper put before the model's keys; log the prefix.

    Raises:
        UserError: the file has several models under different prefixes.
    """
    prefixes = sorted({match["prefix"] for key in weights if (match := _WRAPPED.fullmatch(key))})
    if not prefixes or not prefixes[0]:
        return dict(weights)
    if len(prefixes) > 1:
        raise UserError(f"{path}: holds several models, {', '.join(prefixes)}; save the state_dict of one of them")
    (prefix,) = prefixes
    stripped = {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
    if len(stripped) < len(weights):
        raise UserError(f"{path}: some keys are there with and without the prefix {prefix}")
    logger.info("%s: the prefix %s of the keys is left out", path, prefix)
    return stripped


def _check_values(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Check in one pass that the model's weights are floating point and finite, in fp32 too.

    Raises:
        UserError: one is not; it is named.
    """
    for key, tensor in weights.items():
        if not key.startswith(_MODEL_PARTS) or key.endswith(_CONSTANTS):
            continue
        if tensor.dtype not in _WEIGHT_TYPES:
            raise UserError(
                f"{path}: {key} has the type {str(tensor.dtype)[6:]}, as in a quantized model; weights are floating "
                "point: save the model without quantization"
            )
        if tensor.numel():
            low, high = torch.aminmax(tensor)  # NaN if one of the values is NaN
            if not (low >= -_LARGEST and high <= _LARGEST):
                raise UserError(f"{path}: {key} has values that are not finite; the model is damaged, or diverged")


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error names what is wrong with the file
            check_pickled(path)
            outline = _plain(torch.load(path, map_location="meta", weights_only=True))  # without values
            if isinstance(outline, Mapping):
                check_tensors(outline, path.stat().st_size)
            weights = _plain(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a broken pickle can raise any exception
        advice = ""
        if isinstance(error, OtherObjects):
            advice = (
                f"; if you trust the file, save only its tensors with safetensors' save_file, as {SAFETENSORS_NAME}"
            )
        raise UserError(
            f"{path}: cannot be read as a dictionary of tensors ({_first_line(error)}); "
            f"a file that holds other objects is refused, since loading it could run code{advice}"
        ) from None
    if not isinstance(weights, Mapping) or not all(isinstance(t, torch.Tensor) for t in weights.values()):
        raise UserError(f"{path}: holds no dictionary of tensors{_inner_dictionary(weights)}")
    return {str(key): tensor for key, tensor in weights.items()}


def _plain(value: Any) -> Any:
    """Return what was pickled without extra attributes, which can hide the methods of dictionaries and tensors."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in dict.items(value)}
    return torch.Tensor.detach(value) if isinstance(value, torch.Tensor) else value


def _inner_dictionary(content: object) -> str:
    """Return advice for a checkpoint whose tensors lie one dictionary deeper; "" for any other content."""
    if not isinstance(content, Mapping):
        return ""
    inner = [str(key) for key, value in content.items() if isinstance(value, Mapping)]
    if not inner:
        return ""
    chosen = next((key for key in ("state_dict", "model_state_dict", "model") if key in inner), inner[0])
    names = ", ".join(repr(str(key)[:60]) for key in islice(content, 8)) + (", …" if len(content) > 8 else "")
    return f" but {names}; save the inner dictionary, {chosen[:60]!r}, alone as {WEIGHTS_NAME}"


def _current_name(key: str) -> str:
    for pattern, replacement in _OLD_LAYER_NORM_NAMES:
        key = pattern.sub(replacement, key)
    return key


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def write_weights(
    folder: Path, weights: Mapping[str, torch.Tensor], others: Mapping[str, bytes] | None = None
) -> dict[str, str]:
    """Write a model's tensors as pytorch_model.bin, and the small files beside it (`write_model`)."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    return write_model(folder, lambda file: save_tensors(tensors, file), others or {})


def write_model(folder: Path, write: Callable[[BinaryIO], object], others: Mapping[str, bytes]) -> dict[str, str]:
    """Write pytorch_model.bin and the small files beside it; return the SHA-256 of each by its name.

    All files are on the disk under temporary names before one of them takes its name; the weights are the last. Small
    files that are the same already, as in every save of a run but its first, are left alone. Where they differ, the
    folder holds another model: its weights are removed before its configuration changes, so that no moment mixes the
    two.

    Args:
        folder: exists; no other process writes there.
        write: is called with the open temporary file of the weights.
        others: the contents of the other `MODEL_FILES`, by name.

    Raises:
        OSError: a file cannot be written; the older model is untouched.
    """

    def remove_old_weights() -> None:
        for name in (WEIGHTS_NAME, SAFETENSORS_NAME):
            (folder / name).unlink(missing_ok=True)
        _sync_folder(folder)

    remove_temporary_files(folder, MODEL_FILES)
    digest = hashlib.sha256()
    changed = {name: content for name, content in others.items() if not _has_content(folder / name, content)}
    writers: dict[str, Callable[[BinaryIO], object]] = {name: _writer(content) for name, content in changed.items()}
    writers[WEIGHTS_NAME] = lambda file: write(HashingWriter(file, digest))  # type: ignore[arg-type]
    write_together(folder, writers, remove_old_weights if changed else lambda: None)
    (folder / SAFETENSORS_NAME).unlink(missing_ok=True)  # readers would prefer it to the new weights
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in others.items()}
    return {**digests, WEIGHTS_NAME: digest.hexdigest()}


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace or make a file so that a kill at any moment leaves the old content or the new one, whole.

    Args:
        path: its folder exists.
        write: is called with the open temporary file.

    Raises:
        OSError: the file cannot be written; the old one is untouched and no temporary file stays.
    """
    write_together(path.parent, {path.name: write})


def write_together(
    folder: Path, writers: Mapping[str, Callable[[BinaryIO], object]], before: Callable[[], object] = lambda: None
) -> None:
    """Write files of one folder; rename them, in the order given, once all of them are on the disk.

    Args:
        folder: exists.
        writers: by file name, the function that is called with the open temporary file.
        before: is called once before the first file is renamed.

    Raises:
        OSError: a file cannot be written; the old ones are untouched and no temporary file stays.
    """
    temporary: dict[str, Path] = {}
    try:
        for name, write in writers.items():
            temporary[name] = _write_temporary(folder / name, write)
        before()
        for name, path in temporary.items():
            os.replace(path, folder / name)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise
    _sync_folder(folder)


def temporary_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return the temporary files that a kill left while one of these files was written."""
    names = set(names)
    return [
        path
        for path in folder.glob(".*.tmp")
        if (match := _TEMPORARY_NAME.fullmatch(path.name)) and match["name"] in names
    ]


def remove_temporary_files(folder: Path, names: Iterable[str]) -> None:
    """Remove the `temporary_files`; only for a folder in which no other process writes."""
    for path in temporary_files(folder, names):
        path.unlink(missing_ok=True)


def save_tensors(content: Any, file: BinaryIO) -> None:
    """Call torch.save; raise a full disk's OSError as it is, which torch turns into a RuntimeError.

    Raises:
        OSError: the file cannot be written.
    """
    recorder = _ErrorRecorder(file)
    try:
        torch.save(content, recorder)  # type: ignore[arg-type]
    except RuntimeError:
        if recorder.error is None:
            raise
    if recorder.error is not None:
        raise recorder.error


def _write_temporary(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Write a temporary file beside `path`, and wait until it is on the disk."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def _has_content(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _writer(content: bytes) -> Callable[[BinaryIO], object]:
    return lambda file: file.write(content)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class HashingWriter(io.RawIOBase):
    """Pass on what is written, and hash it."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest = file, digest

    def write(self, content: Any) -> int:
        self._file.write(content)
        self._digest.update(content)
        return len(content)


class _ErrorRecorder(io.RawIOBase):
    """Pass on what is written, and keep the OSError if that fails."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise
