"""Where a process runs: its device, its place among the processes, its seeds, its threads.

Devices are chosen when a run starts: torch_npu is imported only where an NPU is asked for, or by
torch itself. Nothing here starts processes (`launch.py`).
"""

from __future__ import annotations

import ctypes
import importlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed

from transformer.errors import UserError

Result = TypeVar("Result")

# The names of flags and logs, and torch's.
_TORCH_NAMES = {"npu": "npu", "gpu": "cuda", "cpu": "cpu"}
# mallopt's numbers of M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_MAX, and what they are set to.
_MALLOC_SETTINGS = {-1: 2**31 - 1, -2: 64 * 2**20, -4: 0}
BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}


@dataclass(frozen=True)
class Process:
    """One process of a run: its number among `world_size`, and the device it computes on.

    local_rank: its number among the processes of its machine; None where that is `rank`.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def is_local_rank_zero(self) -> bool:
        """Whether this process works out what all of its machine find in the cache."""
        return (self.rank if self.local_rank is None else self.local_rank) == 0

    @property
    def label(self) -> str:
        """The name that the fps logs give it, as NPU:0."""
        kind = next(name for name, torch_name in _TORCH_NAMES.items() if torch_name == self.device.type)
        return f"{kind.upper()}:{self.rank if self.device.index is None else self.device.index}"

    def gather(self, value: Any) -> list[Any]:
        """The value that each process gives, in the order of their ranks; every process gets them all."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The value that the main process gives, in every process."""
        if self.world_size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """A part of the run that all processes pass, or none: a UserError in one is raised in all."""
        message = None
        try:
            yield
        except UserError as error:
            message = str(error)
        first = next((text for text in self.gather(message) if text is not None), None)
        if first is not None:
            raise UserError(first)


def local_rank_zero_first(process: Process, read: Callable[[], Result]) -> Result:
    """What `read` gives, in every process; the others of a machine find in the cache what its first has worked out.

    Raises:
        UserError: in all processes, where it is raised in one.
    """
    results = []
    for turn in (True, False):
        with process.raise_on_all_ranks():
            if process.is_local_rank_zero is turn:
                results.append(read())
    return results[0]


def choose_device(name: str) -> str:
    """The torch device type for --device: npu, cuda or cpu.

    Raises:
        UserError: the machine has no such device.
    """
    if name == "auto":
        return next(kind for kind in ("npu", "cuda", "cpu") if kind == "cpu" or _device_count(kind))
    kind = _TORCH_NAMES[name]
    if kind != "cpu" and not _device_count(kind):
        needs = {
            "npu": "an Ascend NPU with its toolkit and torch_npu (requirements-npu.txt)",
            "cuda": "a GPU and a build of torch for it",
        }[kind]
        raise UserError(f"--device {name}: there is none here; it needs {needs}")
    return kind


def check_ids(kind: str, ids: tuple[int, ...]) -> None:
    """Checks that the machine has the devices of these ids; on a CPU they only count processes.

    Raises:
        UserError: it has fewer.
    """
    if kind == "cpu":
        return
    count = _device_count(kind)
    if max(ids) >= count:
        raise UserError(
            f"--device_list {','.join(map(str, ids))}: this machine has {count} of these devices, "
            f"numbered from 0; give ids below {count}"
        )


def open_device(kind: str, index: int) -> torch.device:
    """Makes a device this process's own and returns it; of an accelerator, the one with that id."""
    if kind == "cpu":
        return torch.device("cpu")
    _backend(kind).set_device(index)
    return torch.device(kind, index)


def _device_count(kind: str) -> int:
    try:
        backend = _backend(kind)
    except (AttributeError, ImportError):
        return 0
    return backend.device_count() if backend.is_available() else 0


def _backend(kind: str) -> ModuleType:
    """torch.cuda or torch.npu; the latter is torch_npu's, which is imported if torch has not done so."""
    if kind == "npu" and not hasattr(torch, "npu"):
        importlib.import_module("torch_npu")
    return getattr(torch, kind)


def seed_process(seed: int, rank: int) -> None:
    """Seeds Python, NumPy and torch: new weights and dropout repeat, and processes draw different masks."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def device_random(device: torch.device, state: torch.Tensor | None = None) -> torch.Tensor | None:
    """The state of an accelerator's generator of random numbers, after setting it where one is given; None on a CPU."""
    if device.type == "cpu":
        return None
    backend = _backend(device.type)
    if state is not None:
        backend.set_rng_state(state, device)
    return backend.get_rng_state(device)


def choose_deterministic() -> None:
    """Lets torch use only operations that give the same bits every time; before a device is opened.

    On a CPU they are so anyway. On a GPU some gradients are then summed in a fixed order, and convolutions and matrix
    products do not choose their fastest way by trying.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def prepare_process() -> None:
    """What a process sets before its first operation, for that and all threads to come."""
    keep_freed_memory()
    # Results below 1e-38 (Python's and NumPy's below 2e-308) are 0. The optimizer's mean for a word that is absent from
    # hundreds of steps falls below that and never reaches 0 by itself; a processor takes many times as long for such.
    torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """Lets the C library keep what tensors free for the next ones, instead of giving it back to the system.

    glibc returns every piece beyond 32 MB at once, and a student's step then spends a tenth of its time in
    page faults. A user's own settings of malloc go first; with another C library nothing happens.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in _MALLOC_SETTINGS.items():
        mallopt(parameter, value)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told, so that a clock read next is right."""
    if device.type != "cpu":
        _backend(device.type).synchronize()


def share_cores(processes: int, ignored: str = "") -> int:
    """The threads that each of so many processes on this machine may use.

    A user's OMP_NUM_THREADS goes first; `ignored` is a value of it that is not the user's.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) and given != ignored:
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)
