"""Mixed precision by torch or by apex: half-precision arithmetic, loss scaling, skipped steps.

Levels have the meaning of apex's. O0: fp32. O1: matrix products in half precision, weights in fp32. O2: weights in half
precision too, with fp32 master copies that the optimizer updates. O3: half precision only. LayerNorm, softmax and
losses are fp32 at every level.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from distillation.runtime.full_precision import Precision, all_finite
from transformer import packed_inference
from transformer.heads import TinyBertForSequenceClassification, TinyBertOutput
from transformer.optimization import BertAdam, gradient_norms


class TorchMixedPrecision(Precision):
    """Half precision by torch: autocast (O1), or weights that are cast (O2, O3).

    A dynamic loss scale starts at `initial_scale`, halves at an overflow, and doubles after `growth_interval` steps
    without one.

    Args:
        dtype: torch.float16 or torch.bfloat16.
        level: O1, O2 or O3.
        loss_scale: a static scale; None for a dynamic one.
    """

    initial_scale = 2.0**16
    growth_interval = 2000

    def __init__(self, device: torch.device, dtype: torch.dtype, level: str, loss_scale: float | None) -> None:
        super().__init__()
        self._device, self._dtype, self._level = device, dtype, level
        self.name = f"{str(dtype).removeprefix('torch.')}-{level}"
        # bf16 has the range of fp32: a static scale would only cost a pass over all gradients, and a gradient that is
        # not finite is not the scale's fault.
        self.synchronizes = loss_scale is None or dtype == torch.float16
        self.takes_sparse_gradients = level == "O1" or dtype != torch.float16  # torch cannot add sparse fp16 gradients
        self.bucketed_lengths = device.type == "cpu"
        self.dynamic = loss_scale is None
        self._scale = self.initial_scale if loss_scale is None else loss_scale if self.synchronizes else 1.0
        self._steps_since_overflow = 0
        self._masters: dict[Tensor, Tensor] = {}  # parameter in half precision -> its fp32 copy

    @property
    def scale(self) -> float:
        return self._scale

    def prepare(self, model: nn.Module, optimizer: BertAdam) -> nn.Module:
        if self._level == "O2":
            # Weights that are not trained need copies too: they are saved at the end without rounding.
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
            if isinstance(module, nn.Linear):  # autocast would cast them again for every batch
                module.to(self._dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, self._dtype, enabled=self._level == "O1")

    def step(self, optimizer: BertAdam) -> bool:
        self._copy_gradients_to_masters()
        updated = super().step(optimizer)
        if updated:
            self._copy_masters_to_model()
        self._update_scale(updated)
        return updated

    def step_async(self, optimizer: BertAdam) -> Tensor:
        self._copy_gradients_to_masters()
        skipped = super().step_async(optimizer)
        self._copy_masters_to_model()
        return skipped

    def _copy_gradients_to_masters(self) -> None:
        for parameter, master in self._masters.items():
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
            parameter.grad = None

    @torch.no_grad()
    def _copy_masters_to_model(self) -> None:
        for parameter, master in self._masters.items():
            if master.grad is not None:
                parameter.copy_(master)

    def _update_scale(self, updated: bool) -> None:
        self._steps_since_overflow = self._steps_since_overflow + 1 if updated else 0
        if self.dynamic and not updated:
            self._scale /= 2
        elif self.dynamic and self._steps_since_overflow == self.growth_interval:
            self._scale, self._steps_since_overflow = self._scale * 2, 0

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        return _fp32_weights(model, self._masters)

    def _master_weights(self) -> Mapping[Tensor, Tensor]:
        return self._masters

    def export_state(self) -> dict[str, Any]:
        own = {"scale": self._scale, "steps_since_overflow": self._steps_since_overflow}
        return {**super().export_state(), **own}

    def import_state(self, state: Mapping[str, Any]) -> None:
        super().import_state(state)
        self._scale, self._steps_since_overflow = state["scale"], state["steps_since_overflow"]


class ApexMixedPrecision(Precision):
    """Half precision by apex, which is built for the device.

    Args:
        amp: the module apex.amp.
        level: O1, O2 or O3.
        loss_scale: a static scale; None for a dynamic one.
    """

    synchronizes = True
    bucket_views = False  # apex detaches gradients in place, which views do not allow
    takes_sparse_gradients = False

    def __init__(self, amp: ModuleType, level: str, loss_scale: float | None) -> None:
        super().__init__()
        self._amp, self._level = amp, level
        self.name = f"apex-{level}"
        self.dynamic = loss_scale is None
        self._loss_scale: float | str = "dynamic" if loss_scale is None else loss_scale
        self._optimizer: BertAdam | None = None
        self._parameters: list[Tensor] = []
        self._untrained: dict[Tensor, Tensor] = {}  # parameter that is not trained -> its value before the cast

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
        if "combine_grad" in accepted:  # only in Ascend's apex: all gradients in one buffer, one all-reduce
            settings["combine_grad"] = True
        self._parameters = _parameters(optimizer)
        self._untrained = {p: p.detach().clone() for p in model.parameters() if not p.requires_grad}
        if self._level in ("O2", "O3") and isinstance(model, TinyBertForSequenceClassification):
            as_tuple, self._optimizer = self._amp.initialize(_TupleOutputs(model), optimizer, **settings)
            return _NamedOutputs(as_tuple, TinyBertOutput)
        model, self._optimizer = self._amp.initialize(model, optimizer, **settings)
        return model

    def backward(self, loss: Tensor, last: bool) -> None:
        with self._amp.scale_loss(loss, self._optimizer, delay_unscale=not last) as scaled:
            scaled.backward()

    def step(self, optimizer: BertAdam) -> bool:
        # With a dynamic scale, apex replaces optimizer.step for one call by a function that does nothing when a
        # gradient overflows. With a static scale it does not check the gradients.
        steps_before = optimizer.steps_taken
        if self.dynamic or all_finite(gradient_norms(optimizer.gradients())):
            optimizer.step()
        return self._count_step(optimizer.steps_taken > steps_before)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        return _fp32_weights(model, self._master_weights())

    def _master_weights(self) -> Mapping[Tensor, Tensor]:
        masters = dict(self._untrained)
        if self._optimizer is not None:  # at O2 apex replaces the optimizer's parameters by fp32 copies
            masters |= dict(zip(self._parameters, _parameters(self._optimizer), strict=True))
        return masters

    def export_state(self) -> dict[str, Any]:
        own = {name: dict(values) for name, values in self._amp.state_dict().items()} if self._has_state() else {}
        return {**super().export_state(), "apex": own}

    def import_state(self, state: Mapping[str, Any]) -> None:
        super().import_state(state)
        if state["apex"] and self._has_state():
            self._amp.load_state_dict(state["apex"])

    def _has_state(self) -> bool:
        return hasattr(self._amp, "state_dict") and hasattr(self._amp, "load_state_dict")


class _TupleOutputs(nn.Module):
    """Returns a model's outputs as a plain tuple: apex (O2, O3) rebuilds outputs in a way that named tuples refuse."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return tuple(self.model(*args, **kwargs))


class _NamedOutputs(nn.Module):
    """Returns the outputs of a `_TupleOutputs` as a named tuple again."""

    def __init__(self, as_tuple: nn.Module, output_type: Callable[..., Any]) -> None:
        super().__init__()
        self.as_tuple, self.output_type = as_tuple, output_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output_type(*self.as_tuple(*args, **kwargs))


def _parameters(optimizer: BertAdam) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _fp32_weights(model: nn.Module, masters: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
    values = {name: masters.get(parameter, parameter) for name, parameter in model.named_parameters()}
    return {
        name: values.get(name, tensor).detach().float() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
