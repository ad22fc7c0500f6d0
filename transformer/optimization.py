"""BertAdam and its learning-rate schedules.

BERT's Adam differs from torch's: no bias correction, decoupled weight decay (Loshchilov and Hutter 2019), and each
tensor's gradient clipped to a norm of its own. Unscaling gradients, skipping steps and finding infinities are mixed
precision's work, not done here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Schedule = Callable[[float, float], float]

_LATE_STEP = 1e9  # b1 and b2 to this power are 0, so AdamW's bias correction does nothing


def constant(progress: float, warmup: float) -> float:
    """Return 1 at every step."""
    return 1.0


def warmup_constant(progress: float, warmup: float) -> float:
    """Rise linearly over the share `warmup` of all steps, then stay at 1."""
    return progress / warmup if progress < warmup else 1.0


def warmup_linear(progress: float, warmup: float) -> float:
    """Rise linearly over the share `warmup` of all steps, then fall linearly to 0 at the end."""
    return progress / warmup if progress < warmup else max((progress - 1.0) / (warmup - 1.0), 0.0)


def warmup_cosine(progress: float, warmup: float) -> float:
    """Rise linearly over the share `warmup` of all steps, then follow 0.5 · (1 + cos(π · progress))."""
    return progress / warmup if progress < warmup else 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


SCHEDULES: dict[str, Schedule] = {
    "none": constant,
    "warmup_constant": warmup_constant,
    "warmup_linear": warmup_linear,
    "warmup_cosine": warmup_cosine,
}


class BertAdam(Optimizer):
    """The Adam that BERT was trained with.

    For each tensor with a gradient g: g is scaled to a norm of at most `max_grad_norm`,
    m = b1·m + (1 - b1)·g, v = b2·v + (1 - b2)·g², and the tensor changes by
    -rate · (m / (√v + e) + weight_decay · tensor). Tensors without a gradient do not change.
    The rate is read before the step is counted: the first step of a warm-up has rate 0.

    Args:
        params: tensors or parameter groups; a group may override each of the following.
        lr: the peak learning rate.
        warmup: the share of all steps in which the rate rises; needs t_total. -1 for none.
        t_total: the number of optimizer steps of the whole training; -1 for a constant rate.
        schedule: a name of `SCHEDULES`.
        b1, b2, e: Adam's decay rates and epsilon.
        weight_decay: decoupled, multiplied by the rate.
        max_grad_norm: the largest norm of each tensor's gradient; -1 for no clipping.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        warmup: float = -1,
        t_total: int = -1,
        schedule: str = "warmup_linear",
        b1: float = 0.9,
        b2: float = 0.999,
        e: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr is {lr}, expected 0 or more")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if warmup != -1 and not 0 <= warmup < 1:
            raise ValueError(f"warmup is {warmup}, expected 0 to below 1, or -1 for none")
        if not (0 <= b1 < 1 and 0 <= b2 < 1):
            raise ValueError(f"b1 and b2 are {b1} and {b2}, expected 0 to below 1")
        if e < 0:
            raise ValueError(f"e is {e}, expected 0 or more")
        self.steps_taken = 0
        self._buffers: dict[Tensor, Tensor] = {}  # 0 between steps, so no part of the state
        defaults = {"lr": lr, "warmup": warmup, "t_total": t_total, "schedule": schedule, "b1": b1, "b2": b2, "e": e}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters that share settings; the optimizer's defaults hold for those not given.

        torch's own method does the same, but its first call imports torch's compiler, which takes seconds.

        Raises:
            ValueError: a parameter is given twice, or is no leaf tensor.
        """
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        known = {parameter for group in self.param_groups for parameter in group["params"]}
        if not all(isinstance(parameter, Tensor) and parameter.is_leaf for parameter in params):
            raise ValueError("expected leaf tensors as parameters")
        if len(set(params)) < len(params) or not known.isdisjoint(params):
            raise ValueError("a parameter is given twice, in one group or in several")
        self.param_groups.append({**self.defaults, **param_group, "params": params})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as torch's own method does, without importing torch's compiler."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad = parameter.grad.detach().zero_()

    def export_state(self) -> dict[str, Any]:
        """Return the state of the steps so far as numbers and tensors, for `import_state`.

        torch's `load_state_dict` would convert it to the parameters' type, and imports torch's compiler.
        """
        states = [self.state.get(parameter, {}) for group in self.param_groups for parameter in group["params"]]
        return {"steps_taken": self.steps_taken, "parameters": [dict(state) for state in states]}

    @torch.no_grad()
    def import_state(self, state: Mapping[str, Any]) -> None:
        """Load what `export_state` returned for an optimizer of the same parameters in the same order.

        Raises:
            ValueError: the number or the shapes of the parameters differ, or a number of steps cannot be.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if len(parameters) != len(state["parameters"]):
            raise ValueError(f"the state has {len(state['parameters'])} parameters, expected {len(parameters)}")
        steps = [state["steps_taken"], *(saved["step"] for saved in state["parameters"] if saved)]
        if not all(isinstance(step, int) and 0 <= step <= steps[0] for step in steps):
            raise ValueError("the optimizer's numbers of steps are wrong")
        for parameter, saved in zip(parameters, state["parameters"], strict=True):
            if saved:
                own = self._state_of(parameter)
                own["step"] = saved["step"]
                for name in ("next_m", "next_v"):
                    found, expected = list(saved[name].shape), list(own[name].shape)
                    if found != expected:
                        raise ValueError(f"{name} has shape {found}, expected {expected}")
                    own[name].copy_(saved[name])
        self.steps_taken = state["steps_taken"]

    def rate(self, group: dict[str, Any], step: int) -> float:
        """Return the learning rate of a group's step number `step`, counted from 0."""
        if group["t_total"] == -1:
            return group["lr"]
        return group["lr"] * SCHEDULES[group["schedule"]](step / group["t_total"], max(group["warmup"], 0.0))

    def gradients(self) -> list[Tensor]:
        """Return all gradients that exist, in the order of the groups; of a sparse one only its rows."""
        return [_values_of_gradient(p) for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        norms: Sequence[Tensor] | None = None,
        grad_scale: float = 1.0,
        skip: Tensor | None = None,
    ) -> float | None:
        """Update every tensor that has a gradient.

        Args:
            closure: computes the loss and its gradients again, before the update.
            norms: the L2 norm of each of `gradients()`; computed by default.
            grad_scale: the loss scale that the gradients were multiplied by. They may be divided in place.
            skip: an fp32 scalar on the parameters' device. If it is 1 no tensor changes, though the step is counted:
                so a device need not be synchronized to learn whether the gradients are finite.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        all_norms = iter(norms if norms is not None else gradient_norms(self.gradients()))
        for group in self.param_groups:
            by_step: dict[tuple[int, torch.device], list[_Update]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self._state_of(parameter)
                    update = self._make_update(parameter, state, next(all_norms))
                    by_step.setdefault((state["step"], parameter.device), []).append(update)
                    state["step"] += 1
            for (step, _), updates in by_step.items():
                _apply(updates, self.rate(group, step), group, grad_scale, skip)
        self.steps_taken += 1
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            # fp32 for half-precision weights too: in fp16 g² and e underflow.
            exact = torch.promote_types(parameter.dtype, torch.float32)
            state["next_m"] = torch.zeros_like(parameter, dtype=exact, memory_format=torch.contiguous_format)
            state["next_v"] = torch.zeros_like(parameter, dtype=exact, memory_format=torch.contiguous_format)
        return state

    def _make_update(self, parameter: Tensor, state: Mapping[str, Any], norm: Tensor) -> _Update:
        values = _values_of_gradient(parameter)
        update = _Update(parameter, values, state["next_m"], state["next_v"], norm)
        gradient = parameter.grad
        if gradient is None or not gradient.is_sparse:
            return update
        if parameter not in self._buffers:
            self._buffers[parameter] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return update._replace(rows=gradient.indices()[0], buffer=self._buffers[parameter])


def _values_of_gradient(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient; if it is sparse, add up repeated rows and return the rows."""
    gradient = parameter.grad
    assert gradient is not None  # checked by the caller
    if not gradient.is_sparse:
        return gradient
    parameter.grad = gradient.coalesce()
    return parameter.grad.values()


class _Update(NamedTuple):
    """A tensor to update, its gradient and its Adam state.

    norm: of the gradient, a scalar.
    rows, buffer: if the gradient is sparse, the numbers of its rows, and a tensor in which it becomes dense. A step of
        the word embeddings has a few hundred of 30,522 rows: so zeros are not written for all rows in each step, nor
        read for the norm.
    """

    weights: Tensor
    gradient: Tensor
    mean: Tensor
    variance: Tensor
    norm: Tensor
    rows: Tensor | None = None
    buffer: Tensor | None = None

    def dense_gradient(self) -> Tensor:
        """Return the gradient in the shape of the weights."""
        if self.rows is None or self.buffer is None:
            return self.gradient
        return self.buffer.index_copy_(0, self.rows, self.gradient)

    def clear_buffer(self) -> None:
        """Set the gradient's rows of the buffer to 0 again."""
        if self.rows is not None and self.buffer is not None:
            self.buffer.index_fill_(0, self.rows, 0.0)


def _apply(
    updates: Sequence[_Update], rate: float, group: Mapping[str, Any], grad_scale: float, skip: Tensor | None
) -> None:
    """Update tensors that share a device and a rate."""
    norms = torch.stack([update.norm for update in updates])
    divisors = torch.full_like(norms, grad_scale)
    if group["max_grad_norm"] > 0:
        # The 1e-6 of torch's clip_grad_norm_ is part of the original's figures.
        divisors *= ((norms / grad_scale + 1e-6) / group["max_grad_norm"]).clamp(min=1.0)
    fused: list[tuple[_Update, Tensor]] = []
    for update, divisor in zip(updates, divisors.unbind(), strict=True):
        if can_fuse(update.weights, update.gradient):
            fused.append((update, divisor))
        else:
            _apply_plain(update, divisor, rate, group, skip)
    if fused:
        _apply_fused(fused, rate, group, skip)
    for update in updates:
        update.clear_buffer()


def gradient_norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the L2 norm of each tensor, summed in fp32: scalars."""
    return list(torch._foreach_norm(list(gradients), 2, dtype=torch.float32))


def reads_without_synchronizing(device: torch.device) -> bool:
    """Return whether a number on the device can be read without waiting for the device."""
    return device.type == "cpu"


def can_fuse(weights: Tensor, gradient: Tensor) -> bool:
    """Return whether torch's fused AdamW accepts these: fp32, contiguous, on a CPU or a GPU."""
    return weights.device.type in ("cpu", "cuda") and all(
        tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in (weights, gradient)
    )


def _apply_plain(update: _Update, divisor: Tensor, rate: float, group: Mapping[str, Any], skip: Tensor | None) -> None:
    """Update one tensor by torch's basic operations, on any device and in any type."""
    if skip is not None and bool(skip):
        return
    weights, mean, variance = update.weights, update.mean, update.variance
    gradient = update.dense_gradient().to(mean.dtype) / divisor
    mean.mul_(group["b1"]).add_(gradient, alpha=1 - group["b1"])
    variance.mul_(group["b2"]).addcmul_(gradient, gradient, value=1 - group["b2"])
    change = mean / variance.sqrt().add_(group["e"])
    if group["weight_decay"] > 0:
        change.add_(weights, alpha=group["weight_decay"])
    weights.add_(change, alpha=-rate)


def _apply_fused(
    updates: Sequence[tuple[_Update, Tensor]], rate: float, group: Mapping[str, Any], skip: Tensor | None
) -> None:
    """Update tensors in one pass of torch's fused AdamW, at a step so late that it corrects no bias.

    Args:
        updates: each with the divisor of its gradient.
    """
    device = updates[0][0].weights.device
    scaled = list(updates)
    if reads_without_synchronizing(device):  # most divisors are 1
        values = torch.stack([divisor for _, divisor in updates]).tolist()
        scaled = [pair for pair, value in zip(updates, values, strict=True) if value != 1.0]
    if scaled:
        torch._foreach_div_([update.gradient for update, _ in scaled], [divisor for _, divisor in scaled])
    late = torch.full((), _LATE_STEP, device=device)
    torch._fused_adamw_(
        [update.weights for update, _ in updates],
        [update.dense_gradient() for update, _ in updates],
        [update.mean for update, _ in updates],
        [update.variance for update, _ in updates],
        [],
        [late] * len(updates),
        lr=rate,
        beta1=group["b1"],
        beta2=group["b2"],
        weight_decay=max(group["weight_decay"], 0.0),
        eps=group["e"],
        amsgrad=False,
        maximize=False,
        found_inf=skip,
    )


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups; biases and LayerNorms, the second one, do not decay."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    exempt = [p for name, p in trainable if name.endswith("bias") or "LayerNorm" in name]
    decayed = [p for name, p in trainable if not (name.endswith("bias") or "LayerNorm" in name)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
