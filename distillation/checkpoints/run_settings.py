"""What must be equal for a run to go on: its settings, and the texts and models that it reads, by what they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from data_processing.batching import Collator
from data_processing.cache import digest
from data_processing.features import Features
from data_processing.tasks import Task
from distillation.runtime.device import Process
from distillation.teacher.cached_states import CachedStates

_EXAMPLES_IN_A_SAMPLE = 64
# Flags that do not change the weights, and those whose content is compared in their place.
_FREE = {
    *("data_dir", "teacher_model", "student_model", "output_dir", "fps_acc_dir", "cache", "data_url", "do_lower_case"),
    *("workers", "device", "device_list", "addr", "port", "output_txt_step", "predict_file", "overwrite_output_dir"),
    *("resume", "save_steps", "addresses", "downloads", "fetched_from"),
}


def compared(process: Process, precision: str, task: Task, digests: Mapping[str, str]) -> dict[str, Any]:
    """What changes a run's weights beside its flags, by the names that a message gives it.

    Args:
        precision: the name of the one that is used, which the device has chosen too.
        task: its name alone is a flag; a file may say something else of it now.
        digests: of the data and the models, by what they are.
    """
    device = {"the device": process.device.type, "the number of processes": process.world_size}
    metric = {"the metric that chooses": task.metric.chosen_by}
    row = {name: value for name, value in vars(task).items() if name != "metric"}
    return {**device, "the precision": precision, **metric, "the task's description": digest(**row), **digests}


def digest_of_states(kept: CachedStates, features: Features, collator: Collator) -> str:
    """A digest of what is kept of some examples all over the training set: all of it may be many gigabytes."""
    examples = np.unique(np.linspace(0, len(features) - 1, _EXAMPLES_IN_A_SAMPLE).astype(np.int64))
    batch = kept.fetch(replace(collator, to_maximum=False, bucketed_lengths=False).collate(features, examples))
    parts = {"states": batch.teacher_states, "scores": batch.teacher_scores}
    return digest(**{name: part.view(torch.uint8).numpy() for name, part in parts.items() if part is not None})


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs in the settings of two runs, by what run.json says of them, in words."""
    known, now = _settings(before), _settings(after)
    return [
        _change(name, known.get(name), now.get(name)) for name in {**known, **now} if known.get(name) != now.get(name)
    ]


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What may change the weights' last bits, though no setting has."""
    changed = [
        f"{name} was {known}, is {after.get(part, {}).get(name)}"
        for part in ("versions", "machine")
        for name, known in before.get(part, {}).items()
        if after.get(part, {}).get(name) != known
    ]
    if before.get("revision") != after.get("revision"):
        changed.append(f"this project's revision was {before.get('revision')}, is {after.get('revision')}")
    return [f"the weights may differ in their last bits: {', '.join(changed)}"] if changed else []


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    flags = {f"--{name}": value for name, value in run["flags"].items() if name not in _FREE}
    return {"the stage": run.get("stage"), **flags, **run["compared"]}


def _change(name: str, before: Any, now: Any) -> str:
    if any(isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) for value in (before, now)):  # a digest
        return f"{name} has changed"
    return f"{name} was {_shown(before)}, is {_shown(now)}"


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
