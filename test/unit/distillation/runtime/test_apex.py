"""apex, stood in for: it serves where it is installed, and what it skips is counted."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from cases import assert_close, read_bin
from test_precision import CPU, Learner, fp32_after, same

from distillation.runtime.precision import ApexMixedPrecision, TorchMixedPrecision, choose_precision
from transformer.errors import UserError

# Stands in for apex: the same functions and arguments; a scale that acts on the gradients; at O2 fp32 copies
# in the places of the optimizer's parameters, at O2 and O3 a model whose inputs and outputs are cast.
APEX = """
import contextlib
import torch

calls = []
loss_scalers = []
overflow_at = set()  # numbers of unscalings, from 1, before which a test wants an infinite gradient
unscaled = 0

class Scaler:
    def __init__(self, loss_scale):
        self.dynamic = loss_scale == "dynamic"
        self.scale = 2.0 ** 16 if self.dynamic else float(loss_scale)
        self.copies = []  # pairs: a parameter in half precision, its copy in fp32

def state_dict(destination=None):
    return {f"loss_scaler{n}": {"loss_scale": scaler.scale, "unskipped": 0} for n, scaler in enumerate(loss_scalers)}

def cast(value, dtype):
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: cast(part, dtype) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(cast(part, dtype) for part in value)
    return value

def initialize(models, optimizers=None, enabled=True, opt_level="O1", cast_model_type=None,
               patch_torch_functions=None, keep_batchnorm_fp32=None, master_weights=None, loss_scale=None,
               cast_model_outputs=None, num_losses=1, verbosity=1, min_loss_scale=None,
               max_loss_scale=2.0 ** 24{further}):
    calls.append(dict(locals()))
    scaler = Scaler(loss_scale)
    loss_scalers[:] = [scaler]
    if opt_level in ("O2", "O3"):
        models.half()
        forward = models.forward
        models.forward = lambda *given, **named: cast(
            forward(*cast(given, torch.half), **cast(named, torch.half)), torch.float32
        )
    if opt_level == "O2":
        for group in optimizers.param_groups:
            halves = group["params"]
            group["params"] = [half.detach().clone().float().requires_grad_() for half in halves]
            scaler.copies += zip(halves, group["params"])
    step, zero_grad = optimizers.step, optimizers.zero_grad

    def step_and_copy(*given, **named):
        step(*given, **named)
        for half, copy in scaler.copies:
            half.data.copy_(copy)

    def clear(*given, **named):
        zero_grad(*given, **named)
        for half, _ in scaler.copies:
            half.grad = None

    optimizers.step, optimizers.zero_grad = step_and_copy, clear
    return models, optimizers

@contextlib.contextmanager
def scale_loss(loss, optimizers, loss_id=0, model=None, delay_unscale=False, delay_overflow_check=False):
    (scaler,) = loss_scalers
    yield loss.float() * scaler.scale
    if delay_unscale:
        return
    global unscaled
    unscaled += 1
    for half, copy in scaler.copies:
        copy.grad = half.grad.float()
    gradients = [p.grad for group in optimizers.param_groups for p in group["params"] if p.grad is not None]
    if unscaled in overflow_at:
        gradients[0].fill_(torch.inf)
    overflow = any(not gradient.isfinite().all() for gradient in gradients)
    for gradient in gradients:
        gradient.div_(scaler.scale)
    if overflow and scaler.dynamic:  # a static scale is never checked by apex
        scaler.scale /= 2
        step = optimizers.step
        def skip(closure=None):
            optimizers.step = step
        optimizers.step = skip
"""


@pytest.fixture(params=["NVIDIA's", "Ascend's"])
def apex(request, tmp_path, monkeypatch) -> Path:
    """A package `apex` that can be imported, in the form of either vendor."""
    further = ", combine_grad=None" if request.param == "Ascend's" else ""
    package = tmp_path / "packages" / "apex"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "amp.py").write_text(APEX.replace("{further}", further), encoding="utf-8")
    monkeypatch.syspath_prepend(package.parent)
    forget_apex()
    yield request.param
    forget_apex()


def forget_apex() -> None:
    for name in ("apex", "apex.amp"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", ["cuda", "npu"])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_apex_serves_where_it_is_installed(apex, kind, level):
    """Trap 39: combine_grad exists only in Ascend's."""
    chosen = choose_precision(torch.device(kind) if kind == "cuda" else _Npu(), True, level, 128.0)
    assert type(chosen) is ApexMixedPrecision
    learner = Learner(chosen)
    (settings,) = sys.modules["apex.amp"].calls
    assert settings["models"] is learner.linear
    assert settings["optimizers"] is learner.optimizer
    assert (settings["opt_level"], settings["loss_scale"], settings["verbosity"]) == (level, 128.0, 0)
    assert settings.get("combine_grad") == (True if apex == "Ascend's" else None)
    steps = ((1.0,), (0.5, 0.25), (2.0, 1.0, 0.5))  # micro-batches: unscaled once, at the end
    for factors in steps:
        assert learner.step(*factors)
    for name, expected in fp32_after(*steps).items():
        assert_close(learner.weights()[name], expected, atol=1e-6 if level == "O1" else 2e-2)


class _Npu:
    """torch.device("npu") needs torch_npu."""

    type = "npu"


def test_steps_that_apex_skips_are_counted(apex):
    learner = Learner(choose_precision(torch.device("cuda"), True, "O1", None))
    (settings,) = sys.modules["apex.amp"].calls
    assert settings["loss_scale"] == "dynamic"
    assert learner.precision.dynamic
    before = learner.weights()
    for skipped in range(1, 4):
        assert not learner.step(math.inf)
        assert learner.precision.skipped == skipped
        assert same(learner.weights(), before)
    assert learner.step(1.0)
    for name, expected in fp32_after((1.0,)).items():
        assert_close(learner.weights()[name], expected, atol=1e-6)


def test_a_gradient_that_overflows_under_a_static_scale_of_apex_moves_nothing(apex):
    """Trap 10, in the setting of the seed's own scripts: apex, O2, --loss_scale 128."""
    learner = Learner(choose_precision(torch.device("cuda"), True, "O2", 128.0))
    before = learner.weights()
    assert not learner.step(math.inf)
    assert same(learner.weights(), before)
    assert learner.precision.skipped == 1


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("loss_scale", ["128", "dynamic"])
def test_a_run_with_apex_goes_on_after_an_overflow(sst2, apex, monkeypatch, level, loss_scale):
    """Trap 10: while the loss is finite it is the loss scale's doing, static or dynamic, as with torch's own.

    What the stage does not train is saved unrounded, what it trains as the fp32 copies have it.
    """
    amp = importlib.import_module("apex.amp")
    amp.overflow_at.add(2)
    scale = None if loss_scale == "dynamic" else float(loss_scale)
    monkeypatch.setattr("distillation.runs.predict.choose_precision", lambda *_: ApexMixedPrecision(amp, level, scale))
    words = sst2.run(num_train_epochs=4, learning_rate=1e-3).out
    left = 2.0**15 if scale is None else scale
    assert f"step 2: skipped, a gradient overflowed; 1 skipped so far, the loss scale is {left:g}" in words
    assert sst2.events("end")[0]["skipped"] == 1
    losses = [event["loss"] for event in sst2.events("train")]
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


def test_overflows_without_end_are_an_error_with_apex_too(apex):
    """Trap 10: apex halves its scale for ever."""
    learner = Learner(choose_precision(torch.device("cuda"), True, "O1", None))
    for _ in range(50):
        assert not learner.step(math.inf)
    with pytest.raises(UserError, match="51 steps in a row"):
        learner.step(math.inf)


def test_another_package_of_the_name_apex_is_not_used(tmp_path, monkeypatch):
    """PyPI's has nothing to do with this."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    forget_apex()
    assert type(choose_precision(torch.device("cuda"), True, "O1", 128.0)) is TorchMixedPrecision
    (tmp_path / "apex" / "amp.py").write_text("", encoding="utf-8")
    forget_apex()
    assert type(choose_precision(torch.device("cuda"), True, "O1", 128.0)) is TorchMixedPrecision
    forget_apex()


def test_a_type_that_is_asked_for_leaves_apex_aside(apex):
    assert type(choose_precision(torch.device("cuda"), True, "O1", 128.0, "fp16")) is TorchMixedPrecision
    assert type(choose_precision(CPU, True, "O1", 128.0, "fp16")) is TorchMixedPrecision
