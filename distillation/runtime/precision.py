"""Mixed precision: what runs in half precision, the loss scale, and steps that overflow.

Levels mean what apex's mean. O0: fp32. O1: the model's matrix products in half precision, its
weights in fp32. O2: weights in half precision too, with an fp32 copy that the optimizer moves.
O3: half precision only. LayerNorm, softmax and losses are fp32 at every level.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from transformer import packed_inference
from transformer.errors import UserError
from transformer.heads import TinyBertForSequenceClassification, TinyBertOutput
from transformer.optimization import BertAdam, gradient_norms

logger = logging.getLogger(__name__)

_FIRST_DYNAMIC_SCALE = 2.0**16
_GROW_AFTER = 2000  # steps without an overflow
_MOST_SKIPPED_IN_A_ROW = 50


class Precision:
    """fp32, and what the mixed precisions share. One object serves one optimizer.

    name: what tells its numbers from another's.
    dynamic: whether an overflow lowers the loss scale, so that a loss that is not finite may pass.
    skipped: how many steps were skipped because a gradient was not finite.
    bucket_views: whether gradients may be views of the buffers in which processes exchange them.
    waits: whether a step must see at once if a gradient is finite (`step`), since one that is not only means
        another loss scale; otherwise the device need not be waited for (`step_unseen`).
    takes_sparse_gradients: whether a gradient may hold some rows of its parameter only.
    few_lengths: whether a batch of a new length costs kernels of its own, more than some padding does.
    """

    name = "fp32"
    dynamic = False
    bucket_views = True
    synchronizes = False
    takes_sparse_gradients = True
    bucketed_lengths = False

    def __init__(self) -> None:
        self.skipped = 0
        self._skipped_in_a_row = 0

    @property
    def scale(self) -> float:
        """What the loss is multiplied by."""
        return 1.0

    def prepare(self, model: nn.Module, optimizer: BertAdam) -> nn.Module:
        """Readies a model, on its device, for training; returns what is to be called in its place."""
        return model

    def prepare_for_inference(self, model: nn.Module) -> None:
        """Readies a model that is asked only; its parameters may be in another form then."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the loss's gradients; `last` is false for a micro-batch that does not end a step."""
        loss.backward()

    def step(self, optimizer: BertAdam) -> bool:
        """Moves the weights unless a gradient is not finite; returns whether it did."""
        norms = gradient_norms(optimizer.gradients())
        moved = _all_finite(norms)
        if moved:
            optimizer.step(norms=norms)
        return self._counted(moved)

    def step_async(self, optimizer: BertAdam) -> Tensor:
        """Moves the weights unless a gradient is not finite; returns a scalar on the device, 1 where it did not."""
        norms = gradient_norms(optimizer.gradients())
        skipped = (~torch.stack(norms).isfinite().all()).float()
        optimizer.step(norms=norms, grad_scale=self.scale, skip=skipped)
        return skipped

    def _counted(self, moved: bool) -> bool:
        """Counts a step; an overflow that will not end is an error, whoever lowers the scale."""
        self._skipped_in_a_row = 0 if moved else self._skipped_in_a_row + 1
        self.skipped += not moved
        if self._skipped_in_a_row > _MOST_SKIPPED_IN_A_ROW:
            raise UserError(
                f"the gradients overflowed in {self._skipped_in_a_row} steps in a row, "
                f"the loss scale is {self.scale:g}; "
                "try a lower --loss_scale, --loss_scale dynamic, or another --opt_level"
            )
        return moved

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's weights in the best precision that there is."""
        return model.state_dict()

    @torch.no_grad()
    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Puts back what `weights` gave, into the model and into what stands beside its parameters."""
        exact = self._exact()
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(weights[name])
            if tensor in exact:
                exact[tensor].copy_(weights[name])

    def _exact(self) -> Mapping[Tensor, Tensor]:
        """The parameters that are rounded, and their exact values."""
        return {}

    def export_state(self) -> dict[str, Any]:
        """What the steps so far have changed, as plain values: `import_state` takes it."""
        return {"skipped": self.skipped, "skipped_in_a_row": self._skipped_in_a_row}

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `export_state` gave; after `prepare`."""
        self.skipped, self._skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]


class TorchMixedPrecision(Precision):
    """Half precision by torch's own means: autocast (O1), or weights that are cast (O2, O3).

    Args:
        dtype: torch.float16 or torch.bfloat16.
        level: O1, O2 or O3.
        loss_scale: a static scale; None for one that halves at an overflow and doubles after 2000 steps
            without one.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, level: str, loss_scale: float | None) -> None:
        super().__init__()
        self._device, self._dtype, self._level = device, dtype, level
        self.name = f"{str(dtype).removeprefix('torch.')}-{level}"
        # bf16 has fp32's range: a static loss scale would change nothing but cost a pass over all gradients, and
        # what overflows is no overflow of half precision.
        self.synchronizes = loss_scale is None or dtype == torch.float16
        self.takes_sparse_gradients = level == "O1" or dtype != torch.float16  # torch adds none up in fp16
        self.bucketed_lengths = device.type == "cpu"
        self.dynamic = loss_scale is None
        self._scale = _FIRST_DYNAMIC_SCALE if loss_scale is None else loss_scale if self.synchronizes else 1.0
        self._steps_since_overflow = 0
        self._masters: dict[Tensor, Tensor] = {}  # parameter in half precision -> its value in fp32

    @property
    def scale(self) -> float:
        return self._scale

    def prepare(self, model: nn.Module, optimizer: BertAdam) -> nn.Module:
        if self._level == "O2":
            # Frozen weights too: what is saved at the end must not have been rounded.
            self._masters = {p: p.detach().clone().requires_grad_(p.requires_grad) for p in model.parameters()}
            for group in optimizer.param_groups:
                group["params"] = [self._masters[p] for p in group["params"]]
        if self._level in ("O2", "O3"):
            model.to(self._dtype)
        return model

    def prepare_for_inference(self, model: nn.Module) -> None:
        if self._level in ("O2", "O3"):
            model.to(self._dtype)
            return
        if self._device.type == "cpu" and self._dtype == torch.bfloat16 and packed_inference.can_pack():
            packed_inference.pack_linear_layers(model)
            return
        for module in model.modules():
            if isinstance(module, nn.Linear):  # autocast would cast these anew for every batch
                module.to(self._dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, self._dtype, enabled=self._level == "O1")

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self._scale).backward()

    def step(self, optimizer: BertAdam) -> bool:
        self._move_gradients()
        norms = gradient_norms(optimizer.gradients())
        moved = _all_finite(norms)
        if moved:
            optimizer.step(norms=norms, grad_scale=self._scale)
            self._copy_masters()
        self._adapt(moved)
        return self._counted(moved)

    def step_async(self, optimizer: BertAdam) -> Tensor:
        self._move_gradients()
        skipped = super().step_async(optimizer)
        self._copy_masters()
        return skipped

    def _move_gradients(self) -> None:
        for parameter, master in self._masters.items():
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
            parameter.grad = None

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for parameter, master in self._masters.items():
            if master.grad is not None:
                parameter.copy_(master)

    def _adapt(self, moved: bool) -> None:
        self._steps_since_overflow = self._steps_since_overflow + 1 if moved else 0
        if self.dynamic and not moved:
            self._scale /= 2
        elif self.dynamic and self._steps_since_overflow == _GROW_AFTER:
            self._scale, self._steps_since_overflow = self._scale * 2, 0

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        return _fp32_weights(model, self._masters)

    def _exact(self) -> Mapping[Tensor, Tensor]:
        return self._masters

    def export_state(self) -> dict[str, Any]:
        own = {"scale": self._scale, "steps_since_overflow": self._steps_since_overflow}
        return {**super().export_state(), **own}

    def import_state(self, state: Mapping[str, Any]) -> None:
        super().import_state(state)
        self._scale, self._steps_since_overflow = state["scale"], state["steps_since_overflow"]


class _PlainOutputs(nn.Module):
    """A model that gives out a plain tuple: apex (O2, O3) rebuilds outputs in a way that named ones refuse."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return tuple(self.model(*args, **kwargs))


class _NamedOutputs(nn.Module):
    """Gives the outputs of a `_PlainOutputs` their names again."""

    def __init__(self, plain: nn.Module, name: Callable[..., Any]) -> None:
        super().__init__()
        self.plain, self.name = plain, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.name(*self.plain(*args, **kwargs))


class ApexMixedPrecision(Precision):
    """Half precision by apex, where it is installed for the device."""

    synchronizes = True
    bucket_views = False  # apex detaches gradients in place, which views refuse
    takes_sparse_gradients = False

    def __init__(self, amp: ModuleType, level: str, loss_scale: float | None) -> None:
        super().__init__()
        self._amp, self._level = amp, level
        self.name = f"apex-{level}"
        self.dynamic = loss_scale is None
        self._loss_scale: float | str = "dynamic" if loss_scale is None else loss_scale
        self._optimizer: BertAdam | None = None
        self._parameters: list[Tensor] = []
        self._frozen: dict[Tensor, Tensor] = {}

    @property
    def scale(self) -> float:
        if not self.dynamic:
            return float(self._loss_scale)
        states = self._amp.state_dict() if hasattr(self._amp, "state_dict") else {}
        return float(states.get("loss_scaler0", {}).get("loss_scale", math.nan))

    def prepare_for_inference(self, model: nn.Module) -> None:
        if self._level in ("O2", "O3"):
            model.half()

    def prepare(self, model: nn.Module, optimizer: BertAdam) -> nn.Module:
        settings: dict[str, Any] = {"opt_level": self._level, "loss_scale": self._loss_scale, "verbosity": 0}
        accepted = inspect.signature(self._amp.initialize).parameters
        if "combine_grad" in accepted:  # Ascend's apex alone has it: gradients of one buffer, one all-reduce
            settings["combine_grad"] = True
        self._parameters = _parameters(optimizer)
        self._frozen = {p: p.detach().clone() for p in model.parameters() if not p.requires_grad}
        if self._level in ("O2", "O3") and isinstance(model, TinyBertForSequenceClassification):
            plain, self._optimizer = self._amp.initialize(_PlainOutputs(model), optimizer, **settings)
            return _NamedOutputs(plain, TinyBertOutput)
        model, self._optimizer = self._amp.initialize(model, optimizer, **settings)
        return model

    def backward(self, loss: Tensor, last: bool) -> None:
        with self._amp.scale_loss(loss, self._optimizer, delay_unscale=not last) as scaled:
            scaled.backward()

    def step(self, optimizer: BertAdam) -> bool:
        # Under a dynamic scale apex puts, at an overflow, a function that does nothing once in the place of
        # optimizer.step. Under a static scale it does not look at the gradients.
        before = optimizer.steps_taken
        norms = None if self.dynamic else gradient_norms(optimizer.gradients())
        if norms is None or _all_finite(norms):
            optimizer.step()
        return self._counted(optimizer.steps_taken > before)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        return _fp32_weights(model, self._exact())

    def _exact(self) -> Mapping[Tensor, Tensor]:
        # At O2 apex puts fp32 copies in the places of the optimizer's parameters.
        exact = dict(self._frozen)
        if self._optimizer is not None:
            exact |= dict(zip(self._parameters, _parameters(self._optimizer), strict=True))
        return exact

    def export_state(self) -> dict[str, Any]:
        own = {name: dict(values) for name, values in self._amp.state_dict().items()} if self._has_state() else {}
        return {**super().export_state(), "apex": own}

    def import_state(self, state: Mapping[str, Any]) -> None:
        super().import_state(state)
        if state["apex"] and self._has_state():
            self._amp.load_state_dict(state["apex"])

    def _has_state(self) -> bool:
        return hasattr(self._amp, "state_dict") and hasattr(self._amp, "load_state_dict")


def choose_precision(
    device: torch.device, amp: bool, level: str, loss_scale: float | None, dtype: str = "auto"
) -> Precision:
    """The precision that the flags ask for, as far as the device has it.

    apex serves where it is installed, the device is gpu or npu and no type is asked for; else torch
    does. A CPU without bf16 instructions stays in fp32, and a line says so.

    Args:
        device: the process's.
        amp, level, loss_scale: the flags; a loss scale of None is dynamic.
        dtype: auto, bf16 or fp16.
    """
    if not amp or level == "O0":
        return Precision()
    if device.type != "cpu" and dtype == "auto":
        apex = _apex()
        if apex is not None:
            return ApexMixedPrecision(apex, level, loss_scale)
    if device.type == "cpu" and dtype == "auto" and not cpu_has_bf16():
        logger.info("--amp: this processor has no bf16 instructions, training stays in fp32")
        return Precision()
    if device.type == "npu" and dtype != "bf16" and not _overflow_gives_inf():
        raise UserError(
            "--amp: on this NPU an fp16 overflow does not show in the numbers, so that torch could not skip the step; "
            "install Ascend's apex, or give --amp_dtype bf16"
        )
    half = {"auto": _good_half(device), "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    return TorchMixedPrecision(device, half, level, loss_scale)


def cpu_has_bf16(capabilities: Mapping[str, Any] | None = None) -> bool:
    """Return whether torch multiplies matrices in bf16 by instructions of the processor for it.

    oneDNN does these products; a user may hold it back from what the processor has (ONEDNN_MAX_CPU_ISA).

    Args:
        capabilities: the processor's, where another one is asked about.
    """
    if capabilities is None:
        return packed_inference.can_pack() and cpu_has_bf16(torch.cpu.get_capabilities())
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _good_half(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.bfloat16
    backend = getattr(torch, device.type)
    return torch.bfloat16 if backend.is_bf16_supported(including_emulation=False) else torch.float16


def _overflow_gives_inf() -> bool:
    """Whether the NPU computes with inf and NaN; those before Ascend 910B saturate instead."""
    utils = getattr(torch.npu, "utils", None)  # type: ignore[attr-defined]
    return getattr(utils, "is_support_inf_nan", lambda: True)()


def _apex() -> ModuleType | None:
    try:
        amp = importlib.import_module("apex.amp")
    except ImportError:
        return None
    # PyPI's package of that name is another project.
    return amp if hasattr(amp, "initialize") and hasattr(amp, "scale_loss") else None


def _parameters(optimizer: BertAdam) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _fp32_weights(model: nn.Module, exact: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
    """A state dict in fp32, each parameter with its exact value where there is one."""
    values = {name: exact.get(parameter, parameter) for name, parameter in model.named_parameters()}
    return {
        name: values.get(name, tensor).detach().float() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }


def _all_finite(norms: list[Tensor]) -> bool:
    """Whether every norm is a number; asks the device once."""
    return bool(torch.stack(norms).isfinite().all())
