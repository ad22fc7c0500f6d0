"""run.json beside a model: the run that made it, its data and weights, the machine, and the model's metric.

No environment is recorded, and no address keeps its credentials. `changed_settings` compares two records: a run is
resumed only with the settings, data and models that it began with.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any

import numpy
import safetensors
import tokenizers
import torch

from data_processing.cache import digest
from data_processing.downloads.addresses import Address, redact
from data_processing.files import file_digest
from data_processing.tasks import Task
from distillation.models import RUN_NAME
from distillation.options import Options, Stage
from distillation.runtime.device import Process
from distillation.runtime.files import read_json_object
from transformer.errors import UserError
from transformer.file_utils import (
    CONFIG_NAME,
    SAFETENSORS_NAME,
    TOKENIZER_CONFIG_NAME,
    VOCAB_NAME,
    WEIGHTS_NAME,
    write_atomically,
)

_TOKENIZER_FILES = ("tokenizer.json", TOKENIZER_CONFIG_NAME, "added_tokens.json", "special_tokens_map.json")
_ROOT = Path(__file__).resolve().parents[2]
# Flags that do not change the weights, and flags of paths, whose content is compared instead.
_NOT_COMPARED = {
    *("data_dir", "teacher_model", "student_model", "output_dir", "fps_acc_dir", "cache", "data_url", "do_lower_case"),
    *("workers", "device", "device_list", "addr", "port", "output_txt_step", "predict_file", "overwrite_output_dir"),
    *("resume", "save_steps", "addresses", "downloads", "fetched_from"),
}


def now() -> str:
    """Return the time in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def describe_run(
    options: Options, process: Process, digests: Mapping[str, str], precision: str, **more: Any
) -> dict[str, Any]:
    """Return the record of a run that begins.

    Args:
        digests: of the datasets and models that the run reads, by the names that messages give them.
        precision: the name of the one in use; the device has a part in that choice.
        more: further entries.
    """
    files = data_files(options)
    for folder in (options.teacher_model, options.student_model):
        files += [] if folder is None else model_files(folder)
    record = {
        "stage": options.stage.value,
        "flags": flags_of(options),
        "versions": _versions(),
        "revision": revision(),
        "machine": _machine(process),
        "sha256": _file_digests(files),
        "compared": {
            "the device": process.device.type,
            "the number of processes": process.world_size,
            "the precision": precision,
            **task_settings(options.task),
            **digests,
        },
        "begun": now(),
        **more,
    }
    return json.loads(json.dumps(record))


def data_files(options: Options) -> list[Path]:
    """Return the files of data that a run reads: the dev files, and the training file if it trains."""
    task = options.task
    trains = options.stage not in (Stage.EVALUATION, Stage.PREDICTIONS)
    training = [task.augmented_file if options.aug_train else task.train_file] if trains else []
    return [options.data_dir / name for name in (*training, *task.dev_files)]


def task_settings(task: Task) -> dict[str, str]:
    """Return what `changed_settings` compares of a task: its name is a flag, the rest may come from a file."""
    description = {name: value for name, value in vars(task).items() if name != "metric"}
    return {"the metric that chooses": task.metric.chosen_by, "the task's description": digest(**description)}


def describe_command(name: str, flags: Mapping[str, Any], models: list[Path]) -> dict[str, Any]:
    """Return the record of a command that makes a model from others without training it."""
    return {
        "command": name,
        "flags": {flag: _plain(value) for flag, value in flags.items()},
        "versions": _versions(),
        "revision": revision(),
        "sha256": _file_digests([path for folder in models for path in model_files(folder)]),
        "finished": now(),
    }


def read_run(folder: Path) -> dict[str, Any] | None:
    """Return the record in a folder's run.json, if it is one of a training run."""
    record = read_json_object(folder / RUN_NAME)
    return record if is_run(record) else None


def is_run(record: Any) -> bool:
    """Return whether a value read from a file has the entries of a run's record that a later run reads."""
    if not (isinstance(record, dict) and isinstance(record.get("resumed", []), list)):
        return False
    parts = ("flags", "compared", "versions", "machine")
    return all(isinstance(record.get(name), dict) for name in parts)


def write_run(folder: Path, record: Mapping[str, Any], model: Mapping[str, str]) -> None:
    """Write FOLDER/run.json.

    Args:
        model: the SHA-256 of the model's files, by name.

    Raises:
        UserError: it cannot be written; an older one is untouched.
    """
    text = json.dumps({**record, "model": model}, indent=2, ensure_ascii=False)
    content = text.encode("utf-8", "backslashreplace")  # JSON's own escapes, for names that are not UTF-8
    try:
        write_atomically(folder / RUN_NAME, lambda file: file.write(content + b"\n"))
    except OSError as error:
        raise UserError(f"{folder / RUN_NAME}: cannot be written ({error.strerror or error})") from None


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each setting, dataset and model that differs between the records of two runs."""
    old, new = _settings(before), _settings(after)
    return [_change(name, old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)]


def changed_surroundings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each version or property of the machine that differs: they may change the last bits."""
    changed = [
        f"{name} was {old}, is {after.get(part, {}).get(name)}"
        for part in ("versions", "machine")
        for name, old in before.get(part, {}).items()
        if after.get(part, {}).get(name) != old
    ]
    if before.get("revision") != after.get("revision"):
        changed.append(f"this project's revision was {before.get('revision')}, is {after.get('revision')}")
    return changed


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    flags = {f"--{name}": value for name, value in record["flags"].items() if name not in _NOT_COMPARED}
    return {"the stage": record.get("stage"), **flags, **record["compared"]}


def _change(name: str, old: Any, new: Any) -> str:
    if any(isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) for value in (old, new)):  # a digest
        return f"{name} has changed"
    return f"{name} was {_readable(old)}, is {_readable(new)}"


def _readable(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def flags_of(options: Options) -> dict[str, Any]:
    """Return the options under the names of their flags."""
    names = {"task": "task_name"}
    return {names.get(f.name, f.name): _plain(getattr(options, f.name)) for f in fields(options) if f.name != "stage"}


def _plain(value: Any) -> Any:
    """Return a flag's value as JSON can hold it, without credentials."""
    if isinstance(value, Task):
        return value.name
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (str, Path)):
        return redact(str(value))
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, Address):
        return value.redacted
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return _plain(asdict(value)) if hasattr(value, "__dataclass_fields__") else value


def _versions() -> dict[str, str]:
    packages = {"torch": torch, "numpy": numpy, "tokenizers": tokenizers, "safetensors": safetensors}
    return {"python": platform.python_version(), **{name: str(p.__version__) for name, p in packages.items()}}


def revision() -> str | None:
    """Return the project's git revision, with `-dirty` where its files were changed; None without git."""
    if not (_ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _machine(process: Process) -> dict[str, Any]:
    found = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": process.device.type,
        "processes": process.world_size,
    }
    if process.device.type != "cpu":
        backend = getattr(torch, process.device.type)
        name = getattr(backend, "get_device_name", lambda device: "unknown")
        found["accelerator"] = str(name(process.device))
    return found


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def model_files(folder: Path) -> list[Path]:
    """Return the paths of a model's files, whether or not they exist."""
    weights = SAFETENSORS_NAME if (folder / SAFETENSORS_NAME).is_file() else WEIGHTS_NAME
    return [folder / name for name in (CONFIG_NAME, VOCAB_NAME, *_TOKENIZER_FILES, weights)]


def _file_digests(files: list[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file that exists."""
    return {_plain(path): file_digest(path) for path in files if path.is_file()}
