"""Mixed precision by apex, with a stand-in for the package."""

import contextlib
import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import read_bin
from test_precision import LinearTraining

from distillation.runtime.mixed_precision import ApexMixedPrecision, TorchMixedPrecision
from distillation.runtime.precision import choose_precision
from transformer.errors import UserError


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: cast(part, dtype) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(cast(part, dtype) for part in value)  # an error for named tuples, as in apex
    return value


class NvidiasApex:
    """A stand-in for the module apex.amp, with one loss scale.

    At O2 fp32 copies replace the optimizer's parameters; at O2 and O3 the model's inputs and outputs are cast.

    calls: the arguments of each call of `initialize`.
    overflow_at: the numbers, from 1, of the steps whose gradient becomes infinite.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.overflow_at: set[int] = set()
        self.steps = 0
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # parameter in half precision, its fp32 copy

    def state_dict(self) -> dict[str, Any]:
        return {"loss_scaler0": {"loss_scale": self.scale, "unskipped": 0}}

    def initialize(self, models, optimizers=None, enabled=True, opt_level="O1", loss_scale=None, verbosity=1):
        self.calls.append({name: value for name, value in locals().items() if name != "self"})
        self.dynamic = loss_scale == "dynamic"
        self.scale = 2.0**16 if self.dynamic else float(loss_scale)
        if opt_level in ("O2", "O3"):
            forward = models.half().forward
            models.forward = lambda *given, **named: cast(
                forward(*cast(given, torch.half), **cast(named, torch.half)), torch.float32
            )
        if opt_level == "O2":
            for group in optimizers.param_groups:
                halves = group["params"]
                group["params"] = [half.detach().clone().float().requires_grad_() for half in halves]
                self.copies += zip(halves, group["params"], strict=True)
        step, zero_grad = optimizers.step, optimizers.zero_grad

        def step_and_copy(*given, **named):
            step(*given, **named)
            for half, copy in self.copies:
                half.data.copy_(copy)

        def clear(*given, **named):
            zero_grad(*given, **named)
            for half, _ in self.copies:
                half.grad = None

        optimizers.step, optimizers.zero_grad = step_and_copy, clear
        return models, optimizers

    @contextlib.contextmanager
    def scale_loss(self, loss, optimizers, delay_unscale=False) -> Iterator[torch.Tensor]:
        yield loss.float() * self.scale
        if delay_unscale:
            return
        self.steps += 1
        for half, copy in self.copies:
            copy.grad = half.grad.float()
        gradients = [p.grad for group in optimizers.param_groups for p in group["params"] if p.grad is not None]
        if self.steps in self.overflow_at:
            gradients[0].fill_(torch.inf)
        overflow = any(not gradient.isfinite().all() for gradient in gradients)
        for gradient in gradients:
            gradient.div_(self.scale)
        if overflow and self.dynamic:  # apex does not check with a static scale
            self.scale /= 2
            step = optimizers.step
            optimizers.step = lambda *_, **__: setattr(optimizers, "step", step)  # skips one step


class AscendsApex(NvidiasApex):
    def initialize(self, models, optimizers=None, enabled=True, combine_grad=None, **settings):
        result = super().initialize(models, optimizers, enabled, **settings)
        self.calls[-1]["combine_grad"] = combine_grad
        return result


@pytest.fixture(params=[NvidiasApex, AscendsApex])
def apex(request, monkeypatch) -> NvidiasApex:
    amp = request.param()
    install(monkeypatch, amp)
    return amp


def install(monkeypatch: pytest.MonkeyPatch, amp: object) -> None:
    """Install a package apex with this amp; None for a package without."""
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.amp", amp)


def cuda_training(level: str, loss_scale: float | None) -> LinearTraining:
    return LinearTraining(choose_precision(torch.device("cuda"), True, level, loss_scale))


class NpuDevice:
    """Replaces torch.device("npu"), which needs torch_npu."""

    type = "npu"


@pytest.mark.parametrize("device", [torch.device("cuda"), NpuDevice()], ids=["cuda", "npu"])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_apex_trains_where_it_is_installed(apex, device, level):
    """Trap 39: only Ascend's apex has combine_grad."""
    chosen = choose_precision(device, True, level, 128.0)
    assert type(chosen) is ApexMixedPrecision
    training = LinearTraining(chosen)
    (settings,) = apex.calls
    assert settings["models"] is training.linear
    assert settings["optimizers"] is training.optimizer
    assert (settings["opt_level"], settings["loss_scale"], settings["verbosity"]) == (level, 128.0, 0)
    assert settings.get("combine_grad") == (True if type(apex) is AscendsApex else None)
    steps = ((1.0,), (0.5, 0.25), (2.0, 1.0, 0.5))  # micro-batches are unscaled once, at the last
    for factors in steps:
        assert training.step(*factors)
    training.assert_as_fp32_after(*steps, atol=1e-6 if level == "O1" else 2e-2)


@pytest.mark.parametrize(("level", "loss_scale"), [("O1", None), ("O2", 128.0)])
def test_overflows_with_apex_are_skipped_and_counted_and_51_in_a_row_are_an_error(apex, level, loss_scale):
    """Trap 10. The original scripts use O2 and 128."""
    training = cuda_training(level, loss_scale)
    assert apex.calls[0]["loss_scale"] == (loss_scale or "dynamic")
    assert training.precision.dynamic == (loss_scale is None)
    for skipped in range(1, 4):
        training.assert_unchanged_by(math.inf)
        assert training.precision.skipped == skipped
    assert training.step(1.0)
    training.assert_as_fp32_after((1.0,), atol=1e-6 if level == "O1" else 2e-2)
    for _ in range(50):
        assert not training.step(math.inf)
    with pytest.raises(UserError, match="51 steps"):
        training.step(math.inf)


@pytest.mark.parametrize(("level", "loss_scale"), [("O1", 128.0), ("O2", None), ("O2", 128.0)])
def test_a_run_with_apex_continues_after_an_overflow(sst2, apex, monkeypatch, level, loss_scale):
    """Trap 10. Untrained weights are saved unrounded, trained ones from their fp32 copies."""
    apex.overflow_at.add(2)
    monkeypatch.setattr(
        "distillation.evaluation.choose_precision", lambda *_: ApexMixedPrecision(apex, level, loss_scale)
    )
    out = sst2.run(num_train_epochs=4, learning_rate=1e-3).out
    (line,) = [line for line in out.splitlines() if line.startswith("step 2: skipped")]
    assert f"{2.0**15 if loss_scale is None else loss_scale:g}" in line
    assert sst2.events("end")[0]["skipped"] == 1
    losses = sst2.series("loss")
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)
    assert losses[3] < losses[2]
    before, after = read_bin(sst2.student), read_bin(sst2.model)
    for key, tensor in after.items():
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()
        if key.startswith(("classifier.", "bert.pooler.")):
            assert torch.equal(tensor, before[key])
        elif key.endswith("dense.weight"):
            assert not torch.equal(tensor, tensor.half().float()), key


@pytest.mark.parametrize("amp", [ModuleType("apex.amp"), None], ids=["another amp", "no amp"])
def test_another_package_named_apex_is_not_used(monkeypatch, amp):
    """The one on PyPI is another project."""
    install(monkeypatch, amp)
    assert type(choose_precision(torch.device("cuda"), True, "O1", 128.0)) is TorchMixedPrecision


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_amp_dtype_selects_torch_instead_of_apex(apex, device):
    assert type(choose_precision(torch.device(device), True, "O1", 128.0, "fp16")) is TorchMixedPrecision
