"""BertAdam and its learning-rate schedules.

BERT's own Adam differs from torch's: no bias correction, weight decay apart from the gradient
(decoupled), and each tensor's gradient clipped to a norm of its own. It does not unscale
gradients, skip steps or look for infinities: that is mixed precision's work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Schedule = Callable[[float, float], float]

_LATE = 1e9  # a step: b1 and b2 to this power are 0


def constant(progress: float, warmup: float) -> float:
    """The rate itself, from the first step to the last."""
    return 1.0


def warmup_constant(progress: float, warmup: float) -> float:
    """Rises linearly over the first `warmup` of all steps, then stays."""
    return progress / warmup if progress < warmup else 1.0


def warmup_linear(progress: float, warmup: float) -> float:
    """Rises linearly over the first `warmup` of all steps, then falls linearly to 0 at the end."""
    return progress / warmup if progress < warmup else max((progress - 1.0) / (warmup - 1.0), 0.0)


def warmup_cosine(progress: float, warmup: float) -> float:
    """Rises linearly over the first `warmup` of all steps, then follows the half cosine of the progress."""
    return progress / warmup if progress < warmup else 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


SCHEDULES: dict[str, Schedule] = {
    "none": constant,
    "warmup_constant": warmup_constant,
    "warmup_linear": warmup_linear,
    "warmup_cosine": warmup_cosine,
}


class BertAdam(Optimizer):
    """Adam as BERT was trained with.

    For each tensor g with a gradient: g is scaled to a norm of at most `max_grad_norm`,
    m = b1·m + (1 - b1)·g, v = b2·v + (1 - b2)·g², and the tensor moves by
    -rate · (m / (√v + e) + weight_decay · tensor). Tensors without a gradient are left alone.
    The rate is taken before the step is counted: the first step of a warm-up has rate 0.

    Args:
        params: tensors or parameter groups; a group may set any of the following for itself.
        lr: the peak learning rate.
        warmup: the share of all steps in which the rate rises; needs t_total.
        t_total: the number of optimizer steps of the whole training; -1 for a rate that stays.
        schedule: a name of `SCHEDULES`.
        b1, b2, e: Adam's decay rates and epsilon.
        weight_decay: decoupled, in units of the rate.
        max_grad_norm: the clip of each tensor's own gradient; -1 for none.

    Raises:
        ValueError: a value is out of its range.
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
        self._rows: dict[Tensor, _KeptRows] = {}
        super().__init__(
            params,
            {
                "lr": lr,
                "warmup": warmup,
                "t_total": t_total,
                "schedule": schedule,
                "b1": b1,
                "b2": b2,
                "e": e,
                "weight_decay": weight_decay,
                "max_grad_norm": max_grad_norm,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters that share settings; what a group leaves open is as for the whole.

        torch's own does the same, and the first time imports its compiler, which takes seconds.
        """
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        known = {parameter for group in self.param_groups for parameter in group["params"]}
        if not all(isinstance(parameter, Tensor) and parameter.is_leaf for parameter in params):
            raise ValueError("expected tensors that are no results of others")
        if len(set(params)) < len(params) or not known.isdisjoint(params):
            raise ValueError("a parameter stands in several groups, or twice in one")
        self.param_groups.append({**self.defaults, **param_group, "params": params})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients. Like `add_param_group`, this is torch's without its compiler."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad = parameter.grad.detach().zero_()

    def export_state(self) -> dict[str, Any]:
        """What the steps so far have made, as plain numbers and tensors: `import_state` takes it.

        torch's own `state_dict` would be read back in the parameters' type, and imports its compiler.
        """
        states = [self.state.get(parameter, {}) for group in self.param_groups for parameter in group["params"]]
        return {"steps_taken": self.steps_taken, "parameters": [dict(state) for state in states]}

    @torch.no_grad()
    def import_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `export_state` gave, of an optimizer of the same parameters in the same order.

        Raises:
            ValueError: it is of others.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if len(parameters) != len(state["parameters"]):
            raise ValueError(f"a state of {len(state['parameters'])} parameters, expected {len(parameters)}")
        for parameter, known in zip(parameters, state["parameters"], strict=True):
            if known:
                own = self._state_of(parameter)
                own["step"] = known["step"]
                for name in ("next_m", "next_v"):
                    if own[name].shape != known[name].shape:
                        raise ValueError(
                            f"a state of shape {list(known[name].shape)}, expected {list(own[name].shape)}"
                        )
                    own[name].copy_(known[name])
        self.steps_taken = state["steps_taken"]

    def rate(self, group: dict[str, Any], step: int) -> float:
        """The learning rate of the step after `step` counted ones."""
        if group["t_total"] == -1:
            return group["lr"]
        return group["lr"] * SCHEDULES[group["schedule"]](step / group["t_total"], max(group["warmup"], 0.0))

    def gradients(self) -> list[Tensor]:
        """The gradients of all parameters that have one, in the groups' order; of a sparse one the rows it has."""
        return [_rows_of(p) for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        norms: Sequence[Tensor] | None = None,
        grad_scale: float = 1.0,
        skip: Tensor | None = None,
    ) -> float | None:
        """Moves every tensor that has a gradient by one step.

        Args:
            closure: evaluates the model anew and returns the loss; its gradients are then used.
            norms: the L2 norm of each of `gradients()`, where they are known already.
            grad_scale: what the gradients were multiplied by (a loss scale). They may be divided in place.
            skip: a scalar in fp32 on the parameters' device; where it is 1 no tensor moves, though the step
                is counted. So the device need not be waited for to know whether a gradient is finite.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        known = iter(norms if norms is not None else gradient_norms(self.gradients()))
        for group in self.param_groups:
            raise_on_all_ranks: dict[tuple[int, torch.device], list[_Part]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self._state_of(parameter)
                    gradient, rows = _rows_of(parameter), self._kept_rows(parameter)
                    part = _Part(parameter, gradient, state["next_m"], state["next_v"], next(known), rows)
                    raise_on_all_ranks.setdefault((state["step"], parameter.device), []).append(part)
                    state["step"] += 1
            for (step, _), parts in raise_on_all_ranks.items():
                _move(parts, self.rate(group, step), group, grad_scale, skip)
        self.steps_taken += 1
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            # fp32 also where the weights are not: in fp16 both g² and e are next to nothing.
            exact = torch.promote_types(parameter.dtype, torch.float32)
            state["next_m"] = torch.zeros_like(parameter, dtype=exact, memory_format=torch.contiguous_format)
            state["next_v"] = torch.zeros_like(parameter, dtype=exact, memory_format=torch.contiguous_format)
        return state

    def _kept_rows(self, parameter: Tensor) -> _KeptRows | None:
        """Where a sparse gradient is made dense; not part of the state, for between steps it is 0."""
        assert parameter.grad is not None  # the caller has looked
        if not parameter.grad.is_sparse:
            return None
        return self._rows.setdefault(parameter, _KeptRows(parameter))


def _rows_of(parameter: Tensor) -> Tensor:
    """A parameter's gradient; of a sparse one the rows it has, each once."""
    gradient = parameter.grad
    assert gradient is not None  # the caller has looked
    if not gradient.is_sparse:
        return gradient
    parameter.grad = gradient.coalesce()
    return parameter.grad.values()


class _KeptRows:
    """Some rows of a gradient in a dense tensor that is kept from step to step and is 0 elsewhere.

    A step of a vocabulary's embeddings meets a few hundred of its 30,522 rows: so neither zeros are written
    for all, nor is their norm looked for among them.
    """

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter
        self._dense: Tensor | None = None

    def dense(self, rows: Tensor) -> Tensor:
        """The gradient, whose own rows are these; to be cleared before the next."""
        if self._dense is None:
            self._dense = torch.zeros_like(self._parameter, memory_format=torch.contiguous_format)
        return self._dense.index_copy_(0, self._numbers, rows)

    def clear(self) -> None:
        """Makes the rows 0 again."""
        if self._dense is not None:
            self._dense.index_fill_(0, self._numbers, 0.0)

    @property
    def _numbers(self) -> Tensor:
        gradient = self._parameter.grad
        assert gradient is not None  # it is moved by it
        return gradient.indices()[0]


class _Part(NamedTuple):
    """A tensor that moves, and what it moves by."""

    weights: Tensor
    gradient: Tensor
    mean: Tensor
    variance: Tensor
    norm: Tensor  # the gradient's, a scalar
    rows: _KeptRows | None = None  # where the gradient is but some of its rows

    def dense(self) -> Tensor:
        """The gradient of all of the weights."""
        return self.gradient if self.rows is None else self.rows.dense(self.gradient)


def _move(
    parts: Sequence[_Part], rate: float, group: Mapping[str, Any], grad_scale: float, skip: Tensor | None
) -> None:
    """A step of tensors that share a device and a rate."""
    norms = torch.stack([part.norm for part in parts])
    divisors = torch.full_like(norms, grad_scale)
    if group["max_grad_norm"] > 0:
        # torch's clip_grad_norm_ of a single tensor: the 1e-6 is part of the known figures.
        divisors *= ((norms / grad_scale + 1e-6) / group["max_grad_norm"]).clamp(min=1.0)
    fused: list[tuple[_Part, Tensor]] = []
    for part, divisor in zip(parts, divisors.unbind(), strict=True):
        if _can_fuse(part):
            fused.append((part, divisor))
        else:
            _move_plainly(part, divisor, rate, group, skip)
    if fused:
        _move_fused(fused, rate, group, skip)
    for part in parts:
        if part.rows is not None:
            part.rows.clear()


def gradient_norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The L2 norm of each tensor, a scalar each, summed in fp32."""
    return list(torch._foreach_norm(list(gradients), 2, dtype=torch.float32))


def _move_plainly(part: _Part, divisor: Tensor, rate: float, group: Mapping[str, Any], skip: Tensor | None) -> None:
    """One tensor's step, in torch's own operations: for any device and type, and what `_move_fused` must equal."""
    if skip is not None and bool(skip):
        return
    weights, mean, variance = part.weights, part.mean, part.variance
    gradient = part.dense().to(mean.dtype) / divisor
    mean.mul_(group["b1"]).add_(gradient, alpha=1 - group["b1"])
    variance.mul_(group["b2"]).addcmul_(gradient, gradient, value=1 - group["b2"])
    update = mean / variance.sqrt().add_(group["e"])
    if group["weight_decay"] > 0:
        update.add_(weights, alpha=group["weight_decay"])
    weights.add_(update, alpha=-rate)


def _can_fuse(part: _Part) -> bool:
    """Whether torch's fused AdamW takes these: fp32, in one piece, on a CPU or a GPU."""
    return part.weights.device.type in ("cpu", "cuda") and all(
        tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in part[:4]
    )


def _sees_values(device: torch.device) -> bool:
    """Whether a number on the device can be looked at without waiting for it."""
    return device.type == "cpu"


def _move_fused(
    divided: Sequence[tuple[_Part, Tensor]], rate: float, group: Mapping[str, Any], skip: Tensor | None
) -> None:
    """A step of all of them in a single pass: torch's AdamW at a step so late that it corrects no bias."""
    device = divided[0][0].weights.device
    clipped = list(divided)
    if _sees_values(device):  # most need no clipping, and all are looked at at once
        values = torch.stack([divisor for _, divisor in divided]).tolist()
        clipped = [pair for pair, value in zip(divided, values, strict=True) if value != 1.0]
    if clipped:
        torch._foreach_div_([part.gradient for part, _ in clipped], [divisor for _, divisor in clipped])
    late = torch.full((), _LATE, device=device)
    torch._fused_adamw_(
        [part.weights for part, _ in divided],
        [part.dense() for part, _ in divided],
        [part.mean for part, _ in divided],
        [part.variance for part, _ in divided],
        [],
        [late] * len(divided),
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
    """The trainable parameters in two groups: biases and LayerNorms, which do not decay, and the others."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    exempt = [p for name, p in trainable if name.endswith("bias") or "LayerNorm" in name]
    decayed = [p for name, p in trainable if not (name.endswith("bias") or "LayerNorm" in name)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
