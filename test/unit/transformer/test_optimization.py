"""BertAdam: each step equals a plain implementation in double precision."""

import math

import pytest
import torch
from cases import assert_close
from torch import Tensor, nn

from transformer.layers import LayerNorm
from transformer.optimization import SCHEDULES, BertAdam, decay_groups, gradient_norms, warmup_linear


class Reference:
    """BertAdam as its papers describe it, in double precision, one tensor at a time."""

    def __init__(self, tensors, rate, weight_decay=0.0, max_grad_norm=1.0, b1=0.9, b2=0.999, e=1e-6) -> None:
        self.values = [tensor.detach().double().clone() for tensor in tensors]
        self.means = [torch.zeros_like(value) for value in self.values]
        self.squares = [torch.zeros_like(value) for value in self.values]
        self.rate, self.weight_decay, self.max_grad_norm = rate, weight_decay, max_grad_norm
        self.b1, self.b2, self.e = b1, b2, e
        self.counts = [0] * len(self.values)

    def step(self, gradients: list[Tensor | None]) -> None:
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            gradient = gradient.double()
            if self.max_grad_norm > 0:
                gradient = gradient * min(1.0, self.max_grad_norm / (gradient.norm().item() + 1e-6))
            self.means[i] = self.b1 * self.means[i] + (1 - self.b1) * gradient
            self.squares[i] = self.b2 * self.squares[i] + (1 - self.b2) * gradient**2
            update = self.means[i] / (self.squares[i].sqrt() + self.e) + self.weight_decay * self.values[i]
            self.values[i] = self.values[i] - self.rate(self.counts[i]) * update
            self.counts[i] += 1


def parameters(*tensors: Tensor) -> list[nn.Parameter]:
    return [nn.Parameter(tensor.clone(memory_format=torch.preserve_format)) for tensor in tensors]


def run(optimizer: BertAdam, own: list[nn.Parameter], gradients: list[list[Tensor | None]], **how) -> None:
    for step in gradients:
        for parameter, gradient in zip(own, step, strict=True):
            parameter.grad = None if gradient is None else gradient.clone(memory_format=torch.preserve_format)
        optimizer.step(**how)


def random_tensors(*shapes: tuple[int, ...], scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in shapes]


SHAPES = ((3, 5), (70_001,), (2**16,), (), (7, 2, 3))


@pytest.fixture(params=["fused", "as on a GPU", "plain"])
def path(request, monkeypatch) -> None:
    """Each of the ways that a step is computed in."""
    if request.param == "plain":
        monkeypatch.setattr("transformer.optimization.can_fuse", lambda *_: False)
    if request.param == "as on a GPU":
        monkeypatch.setattr("transformer.optimization.reads_without_synchronizing", lambda _: False)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.3}, {"max_grad_norm": -1}, {"b1": 0.5, "b2": 0.9, "e": 1e-3}]
)
@pytest.mark.parametrize("scale", [1e-3, 10.0], ids=["below the clip", "above the clip"])
def test_steps_equal_the_plain_implementation(settings, scale):
    """Each tensor is clipped by its own norm. A loss scale and given norms do not change the steps."""
    start = random_tensors(*SHAPES)
    steps = [random_tensors(*SHAPES, scale=scale * 10**-n, seed=n + 1) for n in range(4)]
    own, scaled = parameters(*start), parameters(*start)
    settings = {"weight_decay": 0.0, **settings}
    run(BertAdam(own, lr=0.1, schedule="none", **settings), own, steps)
    optimizer = BertAdam(scaled, lr=0.1, schedule="none", **settings)
    reference = Reference(start, lambda _: 0.1, **settings)
    for gradients in steps:
        reference.step(gradients)
        larger = [gradient * 128 for gradient in gradients]
        run(optimizer, scaled, [larger], norms=gradient_norms(larger), grad_scale=128.0)
    for one, other, expected in zip(own, scaled, reference.values, strict=True):
        assert_close(one.detach(), expected, atol=2e-6, rtol=2e-6)
        assert_close(other.detach(), expected, atol=2e-6, rtol=2e-6)
    assert optimizer.steps_taken == 4


def test_the_clip_divides_by_the_norm_plus_1e_6():
    """As in the original. With a large e, Adam's update shows the scale of the gradient."""
    own = parameters(torch.zeros(2))
    optimizer = BertAdam(own, lr=1.0, schedule="none", weight_decay=0.0, e=1.0, max_grad_norm=2e-6)
    run(optimizer, own, [[torch.tensor([3e-6, 4e-6])]])  # of norm 5e-6: scaled by 2 / (5 + 1)
    assert_close(own[0].detach(), torch.tensor([-1e-7, -4e-7 / 3]), rtol=1e-4)


@pytest.mark.parametrize("contiguous", [(False, False), (False, True), (True, False)])
def test_tensors_and_gradients_that_are_not_contiguous_are_updated(contiguous):
    start, gradient = (random_tensors((5, 7), seed=seed)[0].t() for seed in range(2))
    reference = Reference([start], lambda _: 0.1, weight_decay=0.01)
    start, gradient = (t.contiguous() if c else t for t, c in zip((start, gradient), contiguous, strict=True))
    own = parameters(start)
    assert own[0].is_contiguous() == contiguous[0]
    optimizer = BertAdam(own, lr=0.1, schedule="none")
    for _ in range(2):
        run(optimizer, own, [[gradient]])
        reference.step([gradient])
    assert_close(own[0].detach(), reference.values[0], atol=2e-6)


def test_a_tensor_without_a_gradient_is_neither_stepped_nor_decayed():
    start = random_tensors((4,), (4,))
    own = parameters(*start)
    optimizer = BertAdam(own, lr=0.1, schedule="none", weight_decay=0.5)
    run(optimizer, own, [[torch.ones(4), None]] * 3)
    assert torch.equal(own[1].detach(), start[1])
    assert own[1] not in optimizer.state
    assert not torch.equal(own[0].detach(), start[0])


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("none", 0.25, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("warmup_constant", 0.25, [0, 0.5, 1, 1, 1, 1, 1, 1]),
        # (progress - 1) / (warmup - 1); the last step's rate is not 0
        ("warmup_linear", 0.25, [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("warmup_linear", 0, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("warmup_linear", -1, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("warmup_cosine", 0.25, [0, 0.5, *(0.5 * (1 + math.cos(math.pi * n / 8)) for n in range(2, 8))]),
    ],
)
def test_each_schedule_gives_the_known_rates(schedule, warmup, expected):
    optimizer = BertAdam(parameters(torch.zeros(1)), lr=2.0, warmup=warmup, t_total=8, schedule=schedule)
    rates = [optimizer.rate(optimizer.param_groups[0], step) for step in range(8)]
    assert rates == pytest.approx([2.0 * share for share in expected])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_is_never_negative_and_without_a_total_constant(schedule):
    optimizer = BertAdam(parameters(torch.zeros(1)), lr=1.0, warmup=0.1, t_total=10, schedule=schedule)
    assert all(optimizer.rate(optimizer.param_groups[0], step) >= 0 for step in range(30))
    optimizer = BertAdam(parameters(torch.zeros(1)), lr=0.3, warmup=0.1, schedule=schedule)
    assert {optimizer.rate(optimizer.param_groups[0], step) for step in range(50)} == {0.3}


def test_norms_are_summed_in_fp32():
    halves = [torch.full((100_000,), 8.0, dtype=torch.float16), torch.tensor([3.0, 4.0])]
    norms = gradient_norms(halves)
    assert [norm.dtype for norm in norms] == [torch.float32] * 2
    assert_close([norm.item() for norm in norms], [8 * math.sqrt(100_000), 5.0], rtol=1e-5)


def test_step_returns_the_loss_of_its_closure_and_uses_its_gradients():
    own = parameters(torch.tensor([3.0]))
    optimizer = BertAdam(own, lr=0.1, schedule="none", weight_decay=0.0)

    def closure() -> float:
        loss = (own[0] ** 2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 9.0
    assert own[0].item() < 3.0


def test_biases_and_layer_norms_do_not_decay():
    model = nn.ModuleDict({"dense": nn.Linear(2, 2), "LayerNorm": LayerNorm(2), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    groups = decay_groups(model, 0.5)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    BertAdam(groups, lr=0.1, schedule="none").step()
    values = {name: parameter.mean().item() for name, parameter in model.named_parameters()}
    assert values.pop("dense.weight") == pytest.approx(1 - 0.1 * 0.5)
    assert values == dict.fromkeys(values, 1.0)


@pytest.mark.parametrize(
    ("save", "load"),
    [(BertAdam.export_state, BertAdam.import_state), (BertAdam.state_dict, BertAdam.load_state_dict)],
    ids=["ours", "torch's"],
)
def test_training_resumes_exactly_from_a_saved_state(save, load):
    start = random_tensors((4, 3), (5,))
    steps = [random_tensors((4, 3), (5,), seed=n + 1) for n in range(4)]
    own = parameters(*start)
    run(BertAdam(own, lr=0.1, warmup=0.5, t_total=6), own, steps)

    first = parameters(*start)
    optimizer = BertAdam(first, lr=0.1, warmup=0.5, t_total=6)
    run(optimizer, first, steps[:2])
    second = parameters(*(parameter.detach() for parameter in first))
    resumed = BertAdam(second, lr=0.1, warmup=0.5, t_total=6)
    load(resumed, save(optimizer))
    run(resumed, second, steps[2:])
    for parameter, expected in zip(second, own, strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize(("shapes", "named"), [([(4, 3)], "2 parameters, expected 1"), ([(3, 4), (5,)], r"\[4, 3\]")])
def test_the_state_of_other_parameters_is_refused(shapes, named):
    own, other = parameters(*random_tensors((4, 3), (5,))), parameters(*random_tensors(*shapes))
    optimizer = BertAdam(own, lr=0.1)
    run(optimizer, own, [random_tensors((4, 3), (5,))])
    with pytest.raises(ValueError, match=named):
        BertAdam(other, lr=0.1).import_state(optimizer.export_state())


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("schedule", "linear"), ("warmup", 1.0), ("warmup", -0.5), ("b1", 1.0), ("b2", -0.1), ("e", -1e-6)],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} .*{value}"):
        BertAdam(parameters(torch.zeros(1)), **{"lr": 0.1, name: value})


def test_tensors_of_different_norms_and_step_counts_are_updated_together():
    """Some are clipped and some not; one has its first gradient late, so that its rate differs."""
    tensors = random_tensors(*SHAPES)
    rates = [0.05 * warmup_linear(step / 6, 0.5) for step in range(6)]
    reference = Reference(tensors, lambda count: rates[count], weight_decay=0.1)
    own = parameters(*tensors)
    optimizer = BertAdam(own, lr=0.05, warmup=0.5, t_total=6, weight_decay=0.1)
    scales = (1e-4, 10.0, 1e-3, 1e-3, 3.0)
    for number in range(5):
        gradients = [random_tensors(shape, scale=s, seed=number)[0] for shape, s in zip(SHAPES, scales, strict=True)]
        if number < 2:
            gradients[2] = None
        reference.step(gradients)
        run(optimizer, own, [gradients])
    for one, value in zip(own, reference.values, strict=True):
        assert_close(one.detach(), value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fused", "plain"])
def test_a_skipped_step_changes_no_weights_and_no_state(dtype):
    own = parameters(random_tensors((4, 3))[0].to(dtype))
    optimizer = BertAdam(own, lr=0.1, schedule="none")
    ones, nans = torch.ones(4, 3, dtype=dtype), torch.full((4, 3), torch.nan, dtype=dtype)
    run(optimizer, own, [[ones]], skip=torch.zeros(()))
    state = optimizer.state[own[0]]
    before = [tensor.detach().clone() for tensor in (own[0], state["next_m"], state["next_v"])]
    run(optimizer, own, [[nans]], skip=torch.ones(()))
    assert all(map(torch.equal, before, (own[0], state["next_m"], state["next_v"])))
    run(optimizer, own, [[ones]], skip=torch.zeros(()))
    assert not torch.equal(own[0], before[0])


def test_parameter_groups_and_gradients_are_as_in_torch():
    first, second = parameters(torch.zeros(2), torch.zeros(2))
    for wrong in ([{"params": [first]}, {"params": [first]}], [first, first], [first * 2], [{"params": [first, 3]}]):
        with pytest.raises(ValueError, match=r"given twice|leaf tensors"):
            BertAdam(wrong, lr=0.1)
    optimizer = BertAdam([{"params": first, "weight_decay": 0.5}, {"params": [second]}], lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.01]
    first.grad = torch.ones(2)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(first.grad, torch.zeros(2))
    optimizer.zero_grad()
    assert first.grad is None
