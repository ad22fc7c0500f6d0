"""Mixed precision: every level trains, overflows are skipped and counted, saved weights are not rounded."""

import math

import pytest
import torch
from cases import Golden, Workplace, assert_close, call, edit_weights, next_run, read_bin
from torch import nn

import main
from distillation.runtime.mixed_precision import TorchMixedPrecision
from distillation.runtime.precision import Precision, choose_precision
from transformer import packed_inference
from transformer.errors import UserError
from transformer.optimization import BertAdam

CPU = torch.device("cpu")
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
SCALES = pytest.mark.parametrize("loss_scale", [None, 128.0], ids=["dynamic", "static"])


class LinearTraining:
    """A linear layer of four inputs and two outputs, all weights 1, and its optimizer."""

    def __init__(self, precision: Precision, rate: float = 0.1) -> None:
        self.linear = nn.Linear(4, 2)
        with torch.no_grad():
            self.linear.weight.fill_(1.0)
            self.linear.bias.fill_(0.5)
        self.precision = precision
        self.optimizer = BertAdam(self.linear.parameters(), lr=rate, schedule="none")
        self.model = precision.prepare(self.linear, self.optimizer)

    def step(self, *factors: float) -> bool:
        """Do an optimizer step; each factor multiplies the loss of a micro-batch."""
        self.optimizer.zero_grad()
        for number, factor in enumerate(factors, start=1):
            with self.precision.autocast():
                out = self.model(torch.tensor([[0.1, 0.2, 0.3, 0.4]]).to(self.linear.weight.dtype))
            loss = (out.float() * torch.tensor([1.0, 2.0])).sum() * factor
            self.precision.backward(loss, last=number == len(factors))
        return self.precision.step(self.optimizer)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.precision.weights(self.linear).items()}

    def assert_unchanged_by(self, *factors: float) -> None:
        before = self.weights()
        assert not self.step(*factors)
        assert all(torch.equal(tensor, before[name]) for name, tensor in self.weights().items())

    def assert_as_fp32_after(self, *steps: tuple[float, ...], atol: float) -> None:
        reference = LinearTraining(Precision())
        for factors in steps:
            assert reference.step(*factors)
        for name, expected in reference.weights().items():
            assert_close(self.weights()[name], expected, atol=atol)


def losses_of_a_run(place: Workplace, pred_distill: bool, **flags: object) -> list[float]:
    """Train with a teacher whose predictions are far from the student's; return the losses."""
    edit_weights(place.teacher, lambda w: w["classifier.weight"].mul_(100))
    place.run(pred_distill=pred_distill, num_train_epochs=6, learning_rate=3e-3, **flags)
    return place.series("loss")


@pytest.fixture(scope="module")
def losses_in_fp32(tmp_path_factory) -> list[list[float]]:
    """Return the losses of both stages."""
    places = [Golden("sst2_small").workplace(tmp_path_factory.mktemp("fp32")) for _ in range(2)]
    return [losses_of_a_run(place, pred_distill) for place, pred_distill in zip(places, (False, True), strict=True)]


@pytest.mark.parametrize(
    ("level", "dtype", "pred_distill"),
    [(level, dtype, (level == "O2") == (dtype == "bf16")) for level in ("O1", "O2", "O3") for dtype in TYPES],
)
def test_losses_fall_as_in_fp32_and_o2_saves_unrounded_weights(sst2, losses_in_fp32, level, dtype, pred_distill):
    """With fp16 optimizer states g² and e would underflow at O3."""
    losses = losses_of_a_run(sst2, pred_distill, amp=True, opt_level=level, amp_dtype=dtype)
    assert losses != losses_in_fp32[pred_distill]
    assert losses[-1] < losses[0]
    if level != "O3":  # which loses small steps to rounding
        assert_close(losses, losses_in_fp32[pred_distill], rtol=0.08)
    assert sst2.events("end")[0]["skipped"] == 0
    before, after = read_bin(sst2.student), read_bin(sst2.model)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in after.values())
    if level == "O2":
        untrained = "fit_dense.weight" if pred_distill else "bert.pooler.dense.weight"
        assert torch.equal(before[untrained], after[untrained])
        assert not torch.equal(after[untrained], after[untrained].to(TYPES[dtype]).float())


@DTYPES
def test_o2_updates_and_saves_weights_in_fp32(dtype):
    """Steps of 1e-5 beside 1.0 are lost in half precision; the fp32 master copies keep them."""
    half = LinearTraining(TorchMixedPrecision(CPU, dtype, "O2", 128.0), rate=1e-5)
    reference = LinearTraining(Precision(), rate=1e-5)
    for _ in range(20):
        assert half.step(1.0)
        assert reference.step(1.0)
    assert half.linear.weight.dtype == dtype
    for name, expected in reference.weights().items():
        saved = half.weights()[name]
        assert saved.dtype == torch.float32
        assert_close(saved, expected, atol=5e-6)
        assert not torch.equal(saved, saved.to(dtype).float())


@pytest.mark.parametrize("level", ["O1", "O2"])
@DTYPES
@SCALES
def test_loss_scale_and_micro_batches_leave_steps_as_in_fp32(level, dtype, loss_scale):
    training = LinearTraining(TorchMixedPrecision(CPU, dtype, level, loss_scale))
    steps = ((0.1,), (0.05, 0.025), (0.2, 0.1, 0.05))  # twice 0.2 at the first dynamic scale, 65536, just fits in fp16
    for factors in steps:
        assert training.step(*factors)
    training.assert_as_fp32_after(*steps, atol=2e-2)


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_a_dynamic_scale_halves_until_the_gradients_fit(level):
    """The gradient is 8 x 2 x scale, and fp16 ends at 65504."""
    training = LinearTraining(TorchMixedPrecision(CPU, torch.float16, level, None))
    assert training.precision.scale == 2.0**16
    for skipped in range(1, 4):
        training.assert_unchanged_by(8.0)
        assert (training.precision.skipped, training.precision.scale) == (skipped, 2.0 ** (16 - skipped))
        assert not any(training.optimizer.state.values())
    while not training.step(8.0):
        pass
    assert training.precision.scale == 2.0**11
    training.assert_as_fp32_after((8.0,), atol=2e-3)


def test_a_dynamic_scale_doubles_after_steps_without_overflow(monkeypatch):
    monkeypatch.setattr(TorchMixedPrecision, "growth_interval", 3)
    training = LinearTraining(TorchMixedPrecision(CPU, torch.float16, "O1", None))
    exponents = []
    for factor in (1e-3, 1e-3, 1e3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3):
        assert training.step(factor) == (factor < 1)
        exponents.append(math.log2(training.precision.scale))
    assert exponents == [16, 16, 15, 15, 15, 16, 16, 16, 17]


@SCALES
def test_overflows_are_skipped_and_counted_and_51_in_a_row_are_an_error(loss_scale):
    """Trap 10."""
    training = LinearTraining(TorchMixedPrecision(CPU, torch.float16, "O1", loss_scale))
    training.assert_unchanged_by(1e6)
    assert training.step(0.5)
    assert (training.precision.skipped, training.precision.scale) == (1, loss_scale or 2.0**15)
    training.assert_as_fp32_after((0.5,), atol=2e-3)
    for _ in range(50):
        assert not training.step(math.inf)
    with pytest.raises(UserError, match=r"51 steps.*--loss_scale"):
        training.step(math.inf)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_fp32_skips_a_gradient_that_is_not_finite(bad):
    """Trap 10."""
    LinearTraining(Precision()).assert_unchanged_by(bad)


def test_a_run_recovers_from_overflows(sst2, monkeypatch):
    """Trap 10: the log names and counts the skipped steps."""
    monkeypatch.setattr(TorchMixedPrecision, "initial_scale", 2.0**24)
    flags = {"amp": True, "opt_level": "O2", "amp_dtype": "fp16", "loss_scale": "dynamic"}
    out = sst2.run(num_train_epochs=25, learning_rate=1e-3, **flags).out
    (end,) = sst2.events("end")
    assert 5 < end["skipped"] < 20
    (fifth,) = [line for line in out.splitlines() if line.startswith("step 5: skipped")]
    assert f"{2**19}" in fifth  # the scale after five overflows
    losses = sst2.series("loss")
    assert losses[5] == pytest.approx(losses[0], rel=1e-5)  # the weights are the same; the rows' order is another
    assert losses[-1] < losses[0]


def test_a_static_scale_that_is_too_high_ends_the_run(sst2, monkeypatch):
    monkeypatch.setattr(Precision, "max_consecutive_skips", 5)
    flags = {"amp": True, "amp_dtype": "fp16", "loss_scale": 1e30, "num_train_epochs": 8}
    done = call(main.main, sst2.flags(**flags))
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "6 steps in a row" in done.err
    assert "1e+30" in done.err


@pytest.mark.parametrize("flags", [{}, {"amp": True, "amp_dtype": "fp16"}], ids=str)
def test_a_loss_that_is_nan_ends_the_run(sst2, flags):
    """Trap 10: a lower loss scale would not help."""
    edit_weights(sst2.student, lambda w: w["bert.embeddings.LayerNorm.bias"].fill_(3e38))  # its products overflow
    done = call(main.main, sst2.flags(num_train_epochs=5, **flags))
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "step 1: " in done.err
    assert "att_loss nan" in done.err
    assert not list(sst2.model.iterdir())


@pytest.mark.parametrize(("amp", "level"), [(False, "O1"), (True, "O0")])
def test_without_amp_and_at_o0_a_run_is_in_fp32_without_a_log_line(caplog, amp, level):
    with caplog.at_level("INFO"):
        assert type(choose_precision(CPU, amp, level, 128.0)) is Precision
    assert not caplog.records


@pytest.mark.parametrize(
    ("capabilities", "onednn", "expected"),
    [
        ({"avx512_bf16": True}, True, TorchMixedPrecision),
        ({"amx_bf16": True, "avx512_bf16": False}, True, TorchMixedPrecision),
        ({"bf16": True}, True, TorchMixedPrecision),  # ARM
        ({"amx_bf16": True}, False, Precision),  # ONEDNN_MAX_CPU_ISA
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, True, Precision),
        ({}, True, Precision),
    ],
    ids=str,
)
def test_amp_on_a_cpu_needs_bf16_instructions_unless_amp_dtype_is_given(monkeypatch, capabilities, onednn, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(packed_inference, "can_pack", lambda: onednn)
    assert type(choose_precision(CPU, True, "O1", 128.0)) is expected
    for dtype in TYPES:
        assert type(choose_precision(CPU, True, "O1", 128.0, dtype)) is TorchMixedPrecision


def test_amp_on_a_cpu_without_bf16_trains_in_fp32_and_logs_it_once(sst2, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert sst2.run(amp=True, num_train_epochs=3).out.count("--amp: ") == 1
    without_amp = next_run(sst2, "without_amp")
    without_amp.run(num_train_epochs=3)
    assert sst2.series("loss") == without_amp.series("loss")


@pytest.mark.parametrize(
    ("dtype", "given", "scale"),
    [(torch.bfloat16, 128.0, 1.0), (torch.bfloat16, None, 2.0**16), (torch.float16, 128.0, 128.0)],
)
def test_a_static_loss_scale_applies_to_fp16_only(dtype, given, scale):
    """bf16 has the range of fp32: there the scale would only cost a pass over all gradients."""
    assert TorchMixedPrecision(CPU, dtype, "O1", given).scale == scale
