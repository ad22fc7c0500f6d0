"""Mixed precision: every level trains, overflows are skipped, counted and recovered from, no weight is rounded."""

import logging
import math

import pytest
import torch
from cases import Golden, Workplace, assert_close, call, edit_weights, read_bin
from torch import nn

import main
from distillation.runtime import precision
from distillation.runtime.precision import Precision, TorchMixedPrecision, choose_precision, cpu_has_bf16
from transformer.errors import UserError
from transformer.optimization import BertAdam

CPU = torch.device("cpu")
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """A linear map of four inputs to two outputs, all ones, and its optimizer: what a precision trains."""

    def __init__(self, kind: Precision) -> None:
        self.linear = nn.Linear(4, 2)
        with torch.no_grad():
            self.linear.weight.fill_(1.0)
            self.linear.bias.fill_(0.5)
        self.precision = kind
        self.optimizer = BertAdam(self.linear.parameters(), lr=0.1, schedule="none")
        self.model = kind.prepare(self.linear, self.optimizer)

    def step(self, *factors: float) -> bool:
        """One optimizer step; each factor is a micro-batch whose loss is multiplied by it."""
        self.optimizer.zero_grad()
        for number, factor in enumerate(factors, start=1):
            with self.precision.autocast():
                out = self.model(torch.tensor([[0.1, 0.2, 0.3, 0.4]]).to(self.linear.weight.dtype))
            loss = (out.float() * torch.tensor([1.0, 2.0])).sum() * factor
            self.precision.backward(loss, last=number == len(factors))
        return self.precision.step(self.optimizer)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.precision.weights(self.linear).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def fp32_after(*steps: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """The weights that fp32 comes to."""
    learner = Learner(Precision())
    for factors in steps:
        assert learner.step(*factors)
    return learner.weights()


def losses_of_a_run(place: Workplace, pred_distill: bool, **flags) -> list[float]:
    """A run whose teacher is sure of itself, so that there is something to learn."""
    edit_weights(place.teacher, lambda w: w["classifier.weight"].mul_(100))
    place.run(pred_distill=pred_distill, num_train_epochs=6, learning_rate=3e-3, **flags)
    return [event["loss"] for event in place.events("train")]


@pytest.fixture(scope="module")
def losses_in_fp32(tmp_path_factory) -> list[list[float]]:
    """The losses of either stage."""
    places = [Golden("sst2_small").workplace(tmp_path_factory.mktemp("fp32")) for _ in range(2)]
    return [losses_of_a_run(place, pred_distill) for pred_distill, place in zip((False, True), places, strict=True)]


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("pred_distill", [False, True], ids=["intermediate", "prediction"])
def test_every_level_trains_as_fp32_does(sst2, losses_in_fp32, pred_distill, level, dtype):
    """The losses fall, and stay near those of fp32. With fp16 states g² and e would underflow at O3."""
    losses = losses_of_a_run(sst2, pred_distill, amp=True, opt_level=level, amp_dtype=dtype)
    assert losses != losses_in_fp32[pred_distill]  # it is in use
    assert losses[-1] < losses[0]
    if level != "O3":  # there small steps are lost to rounding
        assert_close(losses, losses_in_fp32[pred_distill], rtol=0.08)
    assert sst2.events("end")[0]["skipped"] == 0
    saved = read_bin(sst2.model)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("pred_distill", "frozen"), [(False, ("classifier.", "bert.pooler.")), (True, ("fit_dense.",))], ids=str
)
def test_o2_saves_frozen_weights_as_they_were(sst2, dtype, pred_distill, frozen):
    """In half precision they were only used: rounded, they would be worth less to the next stage."""
    sst2.run(pred_distill=pred_distill, amp=True, opt_level="O2", amp_dtype=dtype, num_train_epochs=2)
    before, after = read_bin(sst2.student), read_bin(sst2.model)
    kept = [key for key in before if key.startswith(frozen)]
    assert kept
    for key in kept:
        assert torch.equal(before[key], after[key])
        assert not torch.equal(before[key], before[key].to(TYPES[dtype]).float()) or key.endswith("bias")


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_o2_moves_and_saves_weights_in_fp32(dtype):
    """Steps of 1e-4 beside 1.0 are lost in bf16 and all but lost in fp16; the fp32 copies keep each."""
    learner = Learner(TorchMixedPrecision(CPU, dtype, "O2", 128.0))
    for group in learner.optimizer.param_groups:
        group["lr"] = 1e-5
    reference = Learner(Precision())
    for group in reference.optimizer.param_groups:
        group["lr"] = 1e-5
    for _ in range(20):
        assert learner.step(1.0)
        assert reference.step(1.0)
    assert learner.linear.weight.dtype == dtype
    saved = learner.weights()
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    for name, expected in reference.weights().items():
        assert_close(saved[name], expected, atol=5e-6)
        assert not torch.equal(saved[name], saved[name].to(dtype).float())


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("loss_scale", [None, 128.0], ids=["dynamic", "static"])
def test_the_loss_scale_and_micro_batches_change_no_step(level, dtype, loss_scale):
    learner = Learner(TorchMixedPrecision(CPU, dtype, level, loss_scale))
    steps = ((0.1,), (0.05, 0.025), (0.2, 0.1, 0.05))  # twice 0.2 at the first dynamic scale, 65536, just fits in fp16
    for factors in steps:
        assert learner.step(*factors)
    for name, expected in fp32_after(*steps).items():
        assert_close(learner.weights()[name], expected, atol=2e-2)


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_a_dynamic_scale_is_lowered_until_the_gradients_fit(level):
    """At 65536 the gradient, 1.0 x 2 x 65536, is beyond fp16: skipped, counted, and the weights stay."""
    learner = Learner(TorchMixedPrecision(CPU, torch.float16, level, None))
    assert learner.precision.scale == 2.0**16
    before = learner.weights()
    for skipped in range(1, 4):
        assert not learner.step(8.0)
        assert learner.precision.skipped == skipped
        assert learner.precision.scale == 2.0 ** (16 - skipped)
        assert same(learner.weights(), before)
        assert not learner.optimizer.state or all(not state for state in learner.optimizer.state.values())
    while not learner.step(8.0):
        pass
    assert learner.precision.scale == 2.0**11  # 2 x 8 x 2048 is below 65504
    assert not same(learner.weights(), before)
    for name, expected in fp32_after((8.0,)).items():
        assert_close(learner.weights()[name], expected, atol=2e-3)


def test_a_dynamic_scale_rises_again_after_steps_without_overflow(monkeypatch):
    monkeypatch.setattr(precision, "_GROW_AFTER", 3)
    learner = Learner(TorchMixedPrecision(CPU, torch.float16, "O1", None))
    scales = []
    for factor in (1e-3, 1e-3, 1e3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3):
        assert learner.step(factor) == (factor < 1)
        scales.append(math.log2(learner.precision.scale))
    assert scales == [16, 16, 15, 15, 15, 16, 16, 16, 17]


def test_a_static_scale_skips_and_counts_but_stays():
    learner = Learner(TorchMixedPrecision(CPU, torch.float16, "O1", 128.0))
    before = learner.weights()
    assert not learner.step(1e6)
    assert same(learner.weights(), before)
    assert learner.step(1.0)
    assert (learner.precision.skipped, learner.precision.scale) == (1, 128.0)
    for name, expected in fp32_after((1.0,)).items():
        assert_close(learner.weights()[name], expected, atol=2e-3)


@pytest.mark.parametrize("loss_scale", [None, 128.0], ids=["dynamic", "static"])
def test_overflows_without_end_are_an_error(loss_scale):
    """Trap 10: a run that learns nothing is no run."""
    learner = Learner(TorchMixedPrecision(CPU, torch.float16, "O1", loss_scale))
    for _ in range(50):
        assert not learner.step(math.inf)
    with pytest.raises(UserError, match="the gradients overflowed in 51 steps in a row, the loss scale is "):
        learner.step(math.inf)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_fp32_does_not_step_on_a_gradient_that_is_not_finite(bad):
    """Trap 10."""
    learner = Learner(Precision())
    before = learner.weights()
    assert not learner.step(bad)
    assert same(learner.weights(), before)


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_a_run_recovers_from_forced_overflows(sst2, monkeypatch, level):
    """Trap 10: they are skipped and counted, in the log and at the end."""
    monkeypatch.setattr(precision, "_FIRST_DYNAMIC_SCALE", 2.0**24)
    flags = {"amp": True, "opt_level": level, "amp_dtype": "fp16", "loss_scale": "dynamic"}
    words = sst2.run(num_train_epochs=25, learning_rate=1e-3, **flags).out
    (end,) = sst2.events("end")
    assert 5 < end["skipped"] < 20
    assert words.count(": skipped, a gradient overflowed; ") == end["skipped"]
    assert "step 5: skipped, a gradient overflowed; 5 skipped so far, the loss scale is 524288" in words
    assert f"{end['skipped']} steps were skipped because a gradient overflowed" in words
    losses = [event["loss"] for event in sst2.events("train")]
    assert losses[5] == pytest.approx(losses[0], rel=1e-5)  # nothing moved until then but the order of the rows
    assert level == "O3" or losses[-1] < losses[0]


def test_a_static_scale_too_high_for_any_step_ends_the_run_with_one_line(sst2, monkeypatch):
    monkeypatch.setattr(precision, "_MOST_SKIPPED_IN_A_ROW", 5)
    flags = {"amp": True, "amp_dtype": "fp16", "loss_scale": 1e30, "num_train_epochs": 8}
    done = call(main.main, sst2.flags(**flags))
    assert done.status == 2
    assert done.err.startswith(
        "main.py: error: the gradients overflowed in 6 steps in a row, the loss scale is 1e+30; "
    )
    assert "--loss_scale dynamic" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("flags", [{}, {"amp": True, "amp_dtype": "fp16"}, {"amp": True, "amp_dtype": "bf16"}], ids=str)
def test_a_loss_that_is_no_number_stops_whatever_the_static_scale(sst2, flags):
    """Trap 10: a lower scale would not mend it."""
    edit_weights(sst2.teacher, lambda w: w["bert.embeddings.LayerNorm.bias"].fill_(math.nan))
    done = call(main.main, sst2.flags(num_train_epochs=5, **flags))
    assert done.status == 2
    assert done.err.startswith("main.py: error: step 1: the loss is not finite (att_loss nan, rep_loss nan); ")
    assert not list(sst2.model.iterdir())


def test_o0_and_no_amp_are_fp32():
    assert type(choose_precision(CPU, False, "O1", 128.0)) is Precision
    assert type(choose_precision(CPU, True, "O0", 128.0)) is Precision


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"bf16": True}, True),  # arm
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, False),
        ({}, False),
    ],
)
def test_what_makes_a_processor_fit_for_bf16(capabilities, expected):
    assert cpu_has_bf16(capabilities) is expected


def test_a_cpu_without_bf16_stays_in_fp32_and_says_so_once(sst2, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    words = sst2.run(amp=True, num_train_epochs=3).out.splitlines()
    assert words.count("--amp: this processor has no bf16 instructions, training stays in fp32") == 1
    losses = [event["loss"] for event in sst2.events("train")]
    plain = Workplace(sst2.folder, sst2.task, sst2.max_seq_length)
    plain.model, plain.output = sst2.folder / "model2", sst2.folder / "output2"
    plain.run(num_train_epochs=3)
    assert losses == [event["loss"] for event in plain.events("train")]


def test_a_type_that_is_asked_for_is_used_on_any_cpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    for name in TYPES:
        assert type(choose_precision(CPU, True, "O1", 128.0, name)) is TorchMixedPrecision


def test_fp32_says_nothing_about_precision(caplog):
    with caplog.at_level(logging.INFO):
        choose_precision(CPU, False, "O1", 128.0)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("dtype", "given", "scale"),
    [(torch.bfloat16, 128.0, 1.0), (torch.bfloat16, None, 2.0**16), (torch.float16, 128.0, 128.0)],
)
def test_a_static_loss_scale_is_for_fp16(dtype, given, scale):
    """bf16 has fp32's range: there it would only cost a pass over all gradients."""
    assert TorchMixedPrecision(torch.device("cpu"), dtype, "O1", given).scale == scale
