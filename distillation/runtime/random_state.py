"""The random number generators of a process, as plain values: saved with a run, restored when it is resumed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from distillation.runtime.device import Process, device_random


def get_random_state(process: Process) -> dict[str, Any]:
    """Return the state of Python's, NumPy's, torch's and the accelerator's generators."""
    version, words, gauss = random.getstate()
    name, numbers, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(numbers).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "device": device_random(process.device),
    }


def set_random_state(process: Process, state: Mapping[str, Any]) -> None:
    """Restore what `get_random_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, numbers, *rest = state["numpy"]
    np.random.set_state((name, numbers.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    device_random(process.device, state["device"])
