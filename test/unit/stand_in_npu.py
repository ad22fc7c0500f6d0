"""Not a test: gives torch a device named npu that computes on the CPU, then runs main.py on it.

    python stand_in_npu.py LOG FLAG…

torch's own hooks for backends from outside (PrivateUse1) take the name npu; a tensor there wraps one
on the CPU, and every operator is passed on to it. Operators that mix devices are refused, as on real
ones. `torch.npu` has the calls that torch_npu's has and this project uses. Which of them were made is
written to LOG, a line each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICES = 2


class NpuModule:
    """torch.npu, as far as it is called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._device = 0

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return DEVICES

    def current_device(self) -> int:
        return self._device

    def set_device(self, index: int) -> None:
        self.calls.append(f"set_device {index}")
        self._device = index

    def synchronize(self, device: Any = None) -> None:
        self.calls.append("synchronize")

    def is_bf16_supported(self, including_emulation: bool = False) -> bool:
        return True

    def manual_seed_all(self, seed: int) -> None:
        self.calls.append(f"manual_seed_all {seed}")

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False


class NpuTensor(Tensor):
    """A tensor on the stand-in; `held` is the CPU tensor that it stands for."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, index: int) -> NpuTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("npu", index),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_cpu(function, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"npu({self.held!r})"


def on_cpu(function: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operator on the CPU tensors that its arguments stand for; wraps what comes out."""
    leaves = tree_leaves((args, kwargs))
    wrapped = [leaf for leaf in leaves if isinstance(leaf, NpuTensor)]
    if "copy" not in str(function) and any(
        isinstance(leaf, Tensor) and not isinstance(leaf, NpuTensor) and leaf.dim() for leaf in leaves if wrapped
    ):
        raise RuntimeError(f"{function}: expected all tensors on one device, found npu and cpu")
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    index = wrapped[0].device.index if wrapped else 0
    if target is not None and target.type == "npu":
        index = target.index if target.index is not None else torch.npu.current_device()  # type: ignore[attr-defined]
    held_args, held_kwargs = tree_map(lambda x: x.held if isinstance(x, NpuTensor) else x, (args, kwargs))
    if target is not None:
        held_kwargs["device"] = "cpu"
    result = function(*held_args, **held_kwargs)
    if target is not None and target.type != "npu":
        return result
    by_identity = {id(tensor.held): tensor for tensor in wrapped}  # an in-place operator gives back its argument

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, NpuTensor):
            return value
        return by_identity[id(value)] if id(value) in by_identity else NpuTensor(value, index)

    return tree_map(wrap, result)


def autocast_rule(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.autocast's rule for a matrix product: in the half precision asked for."""

    def in_half_precision(*tensors: Tensor | None) -> Tensor:
        dtype = torch.get_autocast_dtype("npu")
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*(None if tensor is None else tensor.to(dtype) for tensor in tensors))

    return in_half_precision


def install() -> tuple[NpuModule, list[torch.library.Library]]:
    """Gives torch the device; the libraries must be kept as long as it is used."""
    module = NpuModule()
    # A wrapper's memory cannot be exchanged under it, as module.to(dtype) would: it must swap whole tensors.
    torch.__future__.set_swap_module_params_on_conversion(True)
    _setup_privateuseone_for_python_backend("npu", module)
    operators = torch.library.Library("_", "IMPL", "PrivateUse1")
    operators.fallback(lambda function, *args, **kwargs: on_cpu(function, args, kwargs))
    autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    autocast.fallback(torch.library.fallthrough_kernel)
    products = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    products.impl("linear", autocast_rule(functional.linear), "AutocastPrivateUse1")
    products.impl("matmul", autocast_rule(torch.matmul), "AutocastPrivateUse1")
    return module, [operators, autocast, products]


if __name__ == "__main__":
    npu, kept = install()
    import main
    from distillation.launch import run_entry

    log, sys.argv = sys.argv[1], ["main.py", *sys.argv[2:]]
    status = run_entry("main.py", main.main)
    with open(log, "w", encoding="utf-8") as file:
        file.writelines(f"{call}\n" for call in npu.calls)
    sys.exit(status)
