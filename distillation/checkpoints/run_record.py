"""run.json beside a model: what made it, from which data and weights, where and when, and what it is worth.

No environment is written down, and no address keeps its credentials.
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

from data_processing.downloads.addresses import Address, redact
from data_processing.files import file_digest
from data_processing.tasks import Task
from distillation.options import Options
from distillation.runtime.device import Process
from distillation.training.trainer import Outcome
from transformer.errors import UserError
from transformer.file_utils import CONFIG_NAME, SAFETENSORS_NAME, VOCAB_NAME, WEIGHTS_NAME
from transformer.saving import read_manifest, write_atomically

RUN_NAME = "run.json"
_ROOT = Path(__file__).resolve().parents[2]


def now() -> str:
    """The time, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def describe(options: Options, process: Process) -> dict[str, Any]:
    """What is known of a run when it begins."""
    task = options.task
    names = (task.augmented_file if options.aug_train else task.train_file, *task.dev_files)
    files = [options.data_dir / name for name in names]
    for folder in (options.teacher_model, options.student_model):
        files += [] if folder is None else _files_of(folder)
    return {
        "stage": options.stage.value,
        "flags": flags_of(options),
        "versions": versions(),
        "revision": revision(),
        "machine": machine(process),
        "sha256": digests(files),
        "begun": now(),
    }


def describe_command(name: str, flags: Mapping[str, Any], models: list[Path]) -> dict[str, Any]:
    """What is known of a command that makes a model without training it, from the files of others."""
    return {
        "command": name,
        "flags": {flag: _plain(value) for flag, value in flags.items()},
        "versions": versions(),
        "revision": revision(),
        "sha256": digests([path for folder in models for path in _files_of(folder)]),
        "finished": now(),
    }


def flags_of(options: Options) -> dict[str, Any]:
    """The options as their flags say them."""
    names = {"task": "task_name"}
    return {names.get(f.name, f.name): _plain(getattr(options, f.name)) for f in fields(options) if f.name != "stage"}


def _plain(value: Any) -> Any:
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
    return (
        {key: _plain(part) for key, part in asdict(value).items()} if hasattr(value, "__dataclass_fields__") else value
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute."""
    packages = {"torch": torch, "numpy": numpy, "tokenizers": tokenizers, "safetensors": safetensors}
    return {"python": platform.python_version(), **{name: str(p.__version__) for name, p in packages.items()}}


def revision() -> str | None:
    """The project's revision, `-dirty` where files of it were changed since; None where git cannot tell."""
    if not (_ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def machine(process: Process) -> dict[str, Any]:
    """The processor, and the accelerator where there is one."""
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


def _files_of(folder: Path) -> list[Path]:
    weights = SAFETENSORS_NAME if (folder / SAFETENSORS_NAME).is_file() else WEIGHTS_NAME
    return [folder / name for name in (CONFIG_NAME, VOCAB_NAME, weights)]


def digests(files: list[Path]) -> dict[str, str]:
    """The SHA-256 of each file that is there."""
    return {_plain(path): file_digest(path) for path in files if path.is_file()}


def best_of(outcome: Outcome, task: Task) -> dict[str, Any] | None:
    """The metric that chose the checkpoint; None where none did."""
    if not outcome.best_step:
        return None
    chosen = {"metric": task.metric.chosen_by, "value": outcome.best, "step": outcome.best_step}
    return {**chosen, "chosen_on": task.dev_files[0]}


def write_run(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes FOLDER/run.json, with the hashes of the model that is there.

    Raises:
        UserError: it cannot be written; an older one is whole.
    """
    manifest = read_manifest(folder)
    model = {name: known["sha256"] for name, known in manifest["files"].items()} if manifest else {}
    text = json.dumps({**content, "model": model}, indent=2, ensure_ascii=False)
    try:
        write_atomically(folder / RUN_NAME, lambda file: file.write(text.encode("utf-8") + b"\n"))
    except OSError as error:
        raise UserError(f"{folder / RUN_NAME}: cannot be written ({error.strerror or error})") from None


def read_object(path: Path) -> dict[str, Any] | None:
    """The object of a JSON file; None where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
