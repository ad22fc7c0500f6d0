"""Where a process runs: its device, its place among the processes, its seeds."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Process:
    """One process of a run: its number among `world_size`, and the device it computes on."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def label(self) -> str:
        """The name that the fps logs give it, as NPU:0."""
        kind = {"cuda": "GPU"}.get(self.device.type, self.device.type.upper())
        return f"{kind}:{self.device.index if self.device.index is not None else self.rank}"


def seed_process(seed: int, rank: int) -> None:
    """Seeds Python, NumPy and torch: new weights and dropout repeat, and processes draw different masks."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told, so that a clock read next is right."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
