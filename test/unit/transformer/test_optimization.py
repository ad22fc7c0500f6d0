"""BertAdam: equal to the obvious implementation, step by step, and able to solve a small problem."""

import math

import pytest
import torch
from cases import assert_close
from torch import Tensor, nn

from transformer.modeling import LayerNorm
from transformer.optimization import SCHEDULES, BertAdam, decay_groups, gradient_norms, warmup_linear


class Reference:
    """BertAdam as its papers and its first users describe it, in doubles, one tensor at a time."""

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


# The middle one crosses the pieces that a large tensor is moved in: 2**16 numbers each.
SHAPES = ((3, 5), (70_001,), (2**16,), (1,), (7, 2, 3))


@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.3}, {"max_grad_norm": -1}, {"b1": 0.5, "b2": 0.9, "e": 1e-3}]
)
@pytest.mark.parametrize("scale", [1e-3, 10.0], ids=["below the clip", "above the clip"])
def test_steps_equal_the_plain_implementation(settings, scale):
    """Tensors are clipped one by one: a norm over all of them would shrink the small ones too."""
    start = random_tensors(*SHAPES)
    steps = [random_tensors(*SHAPES, scale=scale * 10**-n, seed=n + 1) for n in range(4)]
    own = parameters(*start)
    run(BertAdam(own, lr=0.1, schedule="none", **{"weight_decay": 0.0, **settings}), own, steps)
    reference = Reference(start, lambda _: 0.1, **settings)
    for gradients in steps:
        reference.step(gradients)
    for parameter, expected in zip(own, reference.values, strict=True):
        assert_close(parameter.detach(), expected, atol=2e-6, rtol=2e-6)


def test_the_clip_divides_by_the_norm_plus_1e_6():
    """Part of the original's figures. Where e is large, Adam's update shows the gradient's scale."""
    own = parameters(torch.zeros(2))
    optimizer = BertAdam(own, lr=1.0, schedule="none", weight_decay=0.0, e=1.0, max_grad_norm=2e-6)
    run(optimizer, own, [[torch.tensor([3e-6, 4e-6])]])  # of norm 5e-6: scaled by 2 / (5 + 1)
    assert_close(own[0].detach(), torch.tensor([-1e-7, -4e-7 / 3]), rtol=1e-4)


@pytest.mark.parametrize("large", [(5, 7), (400, 300)], ids=["small", "several pieces"])
def test_tensors_that_do_not_lie_in_one_piece_move_too(large):
    columns = random_tensors(large)[0].t()
    gradient = random_tensors(large, seed=1)[0].t()
    for own_gradient in (gradient, gradient.contiguous()):
        for start in (columns, columns.contiguous()):
            own = parameters(start)
            assert own[0].is_contiguous() == start.is_contiguous()
            run(BertAdam(own, lr=0.1, schedule="none"), own, [[own_gradient]] * 2)
            reference = Reference([columns], lambda _: 0.1, weight_decay=0.01)
            for _ in range(2):
                reference.step([gradient])
            assert_close(own[0].detach(), reference.values[0], atol=2e-6)


def test_a_tensor_without_a_gradient_is_neither_stepped_nor_decayed():
    """Nor does its share of the schedule pass: its first step has the first rate."""
    start = random_tensors((4,), (4,))
    gradient = torch.ones(4)
    own = parameters(*start)
    optimizer = BertAdam(own, lr=0.1, warmup=0.5, t_total=10, weight_decay=0.5)
    run(optimizer, own, [[gradient, None]] * 3)
    assert torch.equal(own[1].detach(), start[1])
    assert own[1] not in optimizer.state
    assert not torch.equal(own[0].detach(), start[0])
    run(optimizer, own, [[gradient, gradient]])
    assert torch.equal(own[1].detach(), start[1])  # the first step of a warm-up has rate 0
    run(optimizer, own, [[gradient, gradient]])
    assert not torch.equal(own[1].detach(), start[1])


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
def test_the_rate_of_each_step(schedule, warmup, expected):
    own = parameters(torch.zeros(1))
    optimizer = BertAdam(
        own, lr=2.0, warmup=warmup, t_total=8, schedule=schedule, weight_decay=0.0, b1=0.0, b2=0.0, e=0.0
    )
    for step, share in enumerate(expected):
        assert optimizer.rate(optimizer.param_groups[0], step) == pytest.approx(2.0 * share)
        before = own[0].item()
        run(optimizer, own, [[torch.full((1,), 0.5)]])
        assert before - own[0].item() == pytest.approx(2.0 * share, abs=1e-6)  # the update is g / |g|


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_never_turns_negative_after_the_last_step(schedule):
    own = parameters(torch.zeros(1))
    optimizer = BertAdam(own, lr=1.0, warmup=0.1, t_total=10, schedule=schedule)
    assert all(optimizer.rate(optimizer.param_groups[0], step) >= 0 for step in range(30))


def test_a_rate_without_a_total_stays():
    optimizer = BertAdam(parameters(torch.zeros(1)), lr=0.3, warmup=0.1, schedule="warmup_linear")
    assert {optimizer.rate(optimizer.param_groups[0], step) for step in range(50)} == {0.3}


def test_a_loss_scale_and_known_norms_change_nothing():
    start = random_tensors(*SHAPES)
    steps = [random_tensors(*SHAPES, scale=10.0 ** (n - 2), seed=n + 1) for n in range(4)]
    plain, scaled = parameters(*start), parameters(*start)
    run(BertAdam(plain, lr=0.1, schedule="none"), plain, steps)
    optimizer = BertAdam(scaled, lr=0.1, schedule="none")
    for gradients in steps:
        larger = [gradient * 128 for gradient in gradients]
        run(optimizer, scaled, [larger], norms=gradient_norms(larger), grad_scale=128.0)
    assert optimizer.steps_taken == 4
    for parameter, expected in zip(scaled, plain, strict=True):
        assert_close(parameter.detach(), expected.detach(), atol=1e-6)


def test_norms_are_summed_in_fp32():
    halves = [torch.full((100_000,), 8.0, dtype=torch.float16), torch.tensor([3.0, 4.0])]
    norms = gradient_norms(halves)
    assert [norm.dtype for norm in norms] == [torch.float32] * 2
    assert_close([norm.item() for norm in norms], [8 * math.sqrt(100_000), 5.0], rtol=1e-5)


def test_a_closures_loss_comes_back_and_its_gradients_are_used():
    own = parameters(torch.tensor([3.0]))
    optimizer = BertAdam(own, lr=0.1, schedule="none", weight_decay=0.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (own[0] ** 2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 9.0
    assert own[0].item() < 3.0


def test_biases_and_layer_norms_do_not_decay():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(2, 2)
            self.LayerNorm = LayerNorm(2)
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    groups = decay_groups(model, 0.5)
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    both = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in both} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(both) == 4
    optimizer = BertAdam(groups, lr=0.1, schedule="none")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    values = {name: parameter.unique().tolist() for name, parameter in model.named_parameters()}
    assert values == {
        "dense.weight": [pytest.approx(1 - 0.1 * 0.5)],
        "dense.bias": [1.0],
        "LayerNorm.weight": [1.0],
        "LayerNorm.bias": [1.0],
        "frozen.weight": [1.0],
        "frozen.bias": [1.0],
    }


def test_it_goes_on_from_a_saved_state():
    """A state dict holds all that the next step depends on."""
    start = random_tensors((4, 3), (5,))
    steps = [random_tensors((4, 3), (5,), seed=n + 1) for n in range(4)]
    own = parameters(*start)
    run(BertAdam(own, lr=0.1, warmup=0.5, t_total=6), own, steps)

    first = parameters(*start)
    optimizer = BertAdam(first, lr=0.1, warmup=0.5, t_total=6)
    run(optimizer, first, steps[:2])
    second = parameters(*(parameter.detach() for parameter in first))
    resumed = BertAdam(second, lr=0.1, warmup=0.5, t_total=6)
    resumed.load_state_dict(optimizer.state_dict())
    run(resumed, second, steps[2:])
    for parameter, expected in zip(second, own, strict=True):
        assert torch.equal(parameter, expected)


def test_it_solves_a_least_squares_problem():
    """Three numbers, two hundred steps."""
    target, weights = torch.tensor([0.4, -0.5, 0.2]), nn.Parameter(torch.tensor([0.1, -0.2, -0.1]))
    optimizer = BertAdam([weights], lr=0.2, warmup=0.1, t_total=200, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        (weights - target).square().mean().backward()
        optimizer.step()
    assert_close(weights.detach(), target, atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"schedule": "linear"}, "schedule is 'linear', expected one of none, warmup_constant"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"warmup": -0.5}, "warmup is -0.5"),
        ({"b1": 1.0}, "b1 and b2 are 1.0 and 0.999"),
        ({"b2": -0.1}, "b1 and b2 are 0.9 and -0.1"),
        ({"e": -1e-6}, "e is -1e-06"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BertAdam(parameters(torch.zeros(1)), **{"lr": 0.1, **settings})


@pytest.mark.parametrize("scale", [1e-3, 10.0], ids=["below the clip", "above the clip"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("sees", [True, False], ids=["cpu", "as on a gpu"])
def test_the_fused_step_equals_the_plain_one(monkeypatch, scale, decay, sees):
    monkeypatch.setattr("transformer.optimization._sees_values", lambda _: sees)
    start = random_tensors((300, 40), (7,), ())
    steps = [random_tensors((300, 40), (7,), (), scale=scale * 10**-n, seed=n + 1) for n in range(5)]
    fused, plain = parameters(*start), parameters(*start)
    run(BertAdam(fused, lr=0.1, schedule="none", weight_decay=decay), fused, steps, grad_scale=4.0)
    monkeypatch.setattr("transformer.optimization._can_fuse", lambda _: False)
    run(BertAdam(plain, lr=0.1, schedule="none", weight_decay=decay), plain, steps, grad_scale=4.0)
    for one, other in zip(fused, plain, strict=True):
        assert_close(one.detach(), other.detach(), atol=1e-6, rtol=1e-6)


def test_tensors_of_any_norm_and_age_move_together():
    """Some are clipped and some not; one has its first gradient late, so that its rate is another."""
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
def test_a_step_that_is_skipped_moves_nothing(dtype):
    own = parameters(*random_tensors((4, 3)))
    own[0].data = own[0].data.to(dtype)
    optimizer = BertAdam(own, lr=0.1, schedule="none")
    own[0].grad = torch.ones(4, 3, dtype=dtype)
    optimizer.step(skip=torch.zeros(()))
    moved, state = own[0].detach().clone(), {k: torch.as_tensor(v).clone() for k, v in optimizer.state[own[0]].items()}
    own[0].grad = torch.full((4, 3), torch.nan, dtype=dtype)
    optimizer.step(skip=torch.ones(()))
    assert torch.equal(own[0].detach(), moved)
    for name in ("next_m", "next_v"):
        assert torch.equal(optimizer.state[own[0]][name], state[name])
    own[0].grad = torch.ones(4, 3, dtype=dtype)
    optimizer.step(skip=torch.zeros(()))
    assert not torch.equal(own[0].detach(), moved)


def test_groups_are_checked_as_torch_does():
    first, second = parameters(torch.zeros(2), torch.zeros(2))
    for wrong in ([{"params": [first]}, {"params": [first]}], [first, first], [first * 2], [{"params": [first, 3]}]):
        with pytest.raises(ValueError, match=r"parameter stands|no results of others"):
            BertAdam(wrong, lr=0.1)
    optimizer = BertAdam([{"params": first, "weight_decay": 0.5}, {"params": [second]}], lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.01]
    first.grad, second.grad = torch.ones(2), None
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(first.grad, torch.zeros(2))
    optimizer.zero_grad()
    assert first.grad is None
