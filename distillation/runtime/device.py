"""The device, rank, seeds and threads of a process. `launch.py` starts the processes.

torch_npu is imported when a run looks for an NPU, not before.
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

_TORCH_NAMES = {"npu": "npu", "gpu": "cuda", "cpu": "cpu"}  # value of --device -> device type of torch
_REQUIREMENTS = {
    "npu": "an Ascend NPU with its toolkit and torch_npu (requirements-npu.txt)",
    "cuda": "a GPU and a build of torch for it",
}
_MALLOC_SETTINGS = {  # parameters of mallopt
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD
    -2: 64 * 2**20,  # M_TOP_PAD
    -4: 0,  # M_MMAP_MAX
}
BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}


@dataclass(frozen=True)
class Process:
    """One process of a run: its device and its rank.

    local_rank: the rank among the processes of the same machine; None if it equals `rank`.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the outputs and the log."""
        return self.rank == 0

    @property
    def is_local_rank_zero(self) -> bool:
        """Whether this process fills the cache for all processes of its machine."""
        return (self.rank if self.local_rank is None else self.local_rank) == 0

    @property
    def label(self) -> str:
        """The name of the device in the fps logs, for example NPU:0."""
        kind = next(name for name, torch_name in _TORCH_NAMES.items() if torch_name == self.device.type)
        return f"{kind.upper()}:{self.rank if self.device.index is None else self.device.index}"

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, ordered by rank, in every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the main process's value in every process."""
        if self.world_size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raise a UserError of any process in all processes, at the end of the `with` block."""
        message = None
        try:
            yield
        except UserError as error:
            message = str(error)
        first = next((text for text in self.gather(message) if text is not None), None)
        if first is not None:
            raise UserError(first)


def local_rank_zero_first(process: Process, read: Callable[[], Result]) -> Result:
    """Call `read` in local rank 0, which fills the machine's cache, then in the other processes; return its result.

    Raises:
        UserError: `read` raised it in one of the processes.
    """
    results = []
    for local_rank_zero in (True, False):
        with process.raise_on_all_ranks():
            if process.is_local_rank_zero is local_rank_zero:
                results.append(read())
    return results[0]


def choose_device(name: str) -> str:
    """Return the torch device type for --device: npu, cuda or cpu.

    Raises:
        UserError: the machine has no such device.
    """
    if name == "auto":
        return next(kind for kind in ("npu", "cuda", "cpu") if _device_count(kind))
    kind = _TORCH_NAMES[name]
    if not _device_count(kind):
        raise UserError(f"--device {name}: there is none here; it needs {_REQUIREMENTS[kind]}")
    return kind


def check_ids(kind: str, ids: tuple[int, ...]) -> None:
    """Check that the machine has devices with these ids. On a CPU they only count processes.

    Raises:
        UserError: it has fewer devices.
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
    """Make an accelerator the current device of this process and return it; `index` is ignored on a CPU."""
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
    """Return torch.cpu, torch.cuda or torch.npu, which exists after torch_npu is imported."""
    if kind == "npu" and not hasattr(torch, "npu"):
        importlib.import_module("torch_npu")
    return getattr(torch, kind)


def seed_process(seed: int, rank: int) -> None:
    """Seed Python, NumPy and torch, with another seed for each rank."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def device_random(device: torch.device, state: torch.Tensor | None = None) -> torch.Tensor | None:
    """Set the state of an accelerator's random number generator if given; return its state, or None on a CPU."""
    if device.type == "cpu":
        return None
    backend = _backend(device.type)
    if state is not None:
        backend.set_rng_state(state, device)
    return backend.get_rng_state(device)


def choose_deterministic() -> None:
    """Make torch use only deterministic algorithms. Call it before a device is opened.

    On a CPU all algorithms used are deterministic. On a GPU some are slower.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def prepare_process() -> None:
    """Configure memory and floating point for this process; call it before the first operation and the first thread."""
    keep_freed_memory()
    # Denormal numbers become 0: the optimizer's moments of a word that is absent for hundreds of steps would become
    # denormal, and processors compute with those many times slower.
    torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the system.

    glibc returns every freed block above 32 MB at once, which costs page faults in every step. Settings of malloc in
    the environment take precedence; with another C library this does nothing.
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
    """Wait until the device has finished its work, for correct timings."""
    _backend(device.type).synchronize()


def share_cores(processes: int, ignored: str = "") -> int:
    """Return the number of threads for each of `processes` processes on this machine.

    OMP_NUM_THREADS takes precedence, unless it is `ignored`, the value that torchrun sets by itself.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) and given != ignored:
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)
