"""The losses equal the original's figures and plain loops over examples, and add up over any partition of a step."""

import itertools

import numpy as np
import pytest
import torch
from cases import assert_close

from data_processing.batching import LossDenominators
from distillation.training.losses import (
    all_tokens,
    attention_loss,
    hidden_loss,
    label_loss,
    prediction_loss,
    squared_error,
    uniform_layer_map,
)
from transformer.errors import UserError

LENGTHS = (7, 2, 5, 4, 1)
WIDTH, HEADS, HIDDEN, CLASSES = 8, 3, 4, 3
MASK = (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).long()


def denominators(padded: bool) -> LossDenominators:
    lengths = [WIDTH if padded else length for length in LENGTHS]
    return LossDenominators(len(lengths), sum(lengths), sum(length**2 for length in lengths))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scores(seed: int) -> list[torch.Tensor]:
    """Return attention scores of two layers, about -10000 for masked keys, as a model returns them."""
    masked = (1 - MASK)[:, None, None, :] * -10000.0
    return [random(len(LENGTHS), HEADS, WIDTH, WIDTH, seed=seed + layer) + masked for layer in range(2)]


def states(seed: int) -> list[torch.Tensor]:
    return [random(len(LENGTHS), WIDTH, HIDDEN, seed=seed + layer) for layer in range(3)]


STUDENT_SCORES, TEACHER_SCORES = scores(0), scores(10)
STUDENT_STATES, TEACHER_STATES = states(20), states(30)
STUDENT_LOGITS, TEACHER_LOGITS = random(5, CLASSES, seed=40) * 3, random(5, CLASSES, seed=41) * 3
LABELS = torch.tensor([0, 2, 1, 1, 0])


def losses_of(part: slice, padded: bool) -> dict[str, torch.Tensor]:
    """Return every loss of some of the examples, with the denominators of the whole step."""
    mask, whole = MASK[part], denominators(padded)
    tokens = all_tokens(mask) if padded else mask
    return {
        "attention": attention_loss(
            [layer[part] for layer in STUDENT_SCORES], [layer[part] for layer in TEACHER_SCORES], mask, tokens, whole
        ),
        "hidden": hidden_loss(
            [layer[part] for layer in STUDENT_STATES], [layer[part] for layer in TEACHER_STATES], tokens, whole
        ),
        "prediction": prediction_loss(STUDENT_LOGITS[part], TEACHER_LOGITS[part], 2.0, whole),
        "label": label_loss(STUDENT_LOGITS[part], LABELS[part], whole),
    }


def test_the_losses_before_the_first_step_equal_the_originals(golden):
    rows, width = golden.inputs()[0].shape
    mask, whole = golden.inputs()[2], LossDenominators(rows, rows * width, rows * width**2)
    count, depth = golden.case["student"]["num_hidden_layers"], golden.case["teacher"]["num_hidden_layers"]
    layers = uniform_layer_map(count, depth)
    teacher_scores, teacher_states = golden.tensor("teacher_atts"), golden.tensor("teacher_reps")
    attention = attention_loss(
        golden.tensor("student_atts"), [teacher_scores[n - 1] for n in layers], mask, all_tokens(mask), whole
    )
    hidden = hidden_loss(
        golden.tensor("student_reps"), [teacher_states[n] for n in (0, *layers)], all_tokens(mask), whole
    )
    assert_close(attention.item(), golden.figures["inter_att_loss"][0], rtol=1e-5)
    assert_close(hidden.item(), golden.figures["inter_rep_loss"][0], rtol=1e-5)
    logits = golden.tensor("inter_final_logits"), golden.tensor("teacher_logits")
    for temperature in (1.0, 2.0):
        loss = prediction_loss(*logits, temperature, whole).item()
        assert_close(loss, golden.figures[f"pred_loss_T{temperature}"], rtol=1e-5)


def test_losses_are_means_over_real_tokens():
    """Trap 13: compared with a loop over the examples, each without its padding."""
    attention = hidden = 0.0
    for ours, theirs in zip(STUDENT_SCORES, TEACHER_SCORES, strict=True):
        errors = [
            (ours[row, head, query, key] - theirs[row, head, query, key]).item() ** 2
            for row, length in enumerate(LENGTHS)
            for head, query, key in itertools.product(range(HEADS), range(length), range(length))
        ]
        attention += np.mean(errors)
    for ours, theirs in zip(STUDENT_STATES, TEACHER_STATES, strict=True):
        errors = [
            (ours[row, token, i] - theirs[row, token, i]).item() ** 2
            for row, length in enumerate(LENGTHS)
            for token, i in itertools.product(range(length), range(HIDDEN))
        ]
        hidden += np.mean(errors)
    whole = losses_of(slice(None), padded=False)
    assert_close(whole["attention"].item(), attention, rtol=1e-5)
    assert_close(whole["hidden"].item(), hidden, rtol=1e-5)


def test_values_of_padding_change_neither_losses_nor_gradients():
    """Trap 13."""
    before = losses_of(slice(None), padded=False)
    padding = (1 - MASK)[:, :, None] * 77.0
    queries_and_keys = (1 - MASK[:, None, :, None] * MASK[:, None, None, :]) * 77.0
    noisy_states = [(layer + padding).requires_grad_() for layer in STUDENT_STATES]
    noisy_scores = [(layer + queries_and_keys).requires_grad_() for layer in STUDENT_SCORES]
    hidden = hidden_loss(noisy_states, TEACHER_STATES, MASK, denominators(False))
    attention = attention_loss(noisy_scores, TEACHER_SCORES, MASK, MASK, denominators(False))
    assert_close(hidden.item(), before["hidden"].item(), rtol=1e-6)
    assert_close(attention.item(), before["attention"].item(), rtol=1e-6)
    (hidden + attention).backward()
    for layer in noisy_states:
        assert not layer.grad[MASK == 0].any()
    for layer in noisy_scores:
        assert not layer.grad[(queries_and_keys > 0).expand_as(layer)].any()


def test_with_max_length_padding_counts_and_masked_keys_are_zero():
    whole = losses_of(slice(None), padded=True)
    attention = hidden = 0.0
    for ours, theirs in zip(STUDENT_SCORES, TEACHER_SCORES, strict=True):
        zeroed = [torch.where(layer <= -100.0, 0.0, layer) for layer in (ours, theirs)]
        attention += torch.nn.functional.mse_loss(*zeroed).item()
    for ours, theirs in zip(STUDENT_STATES, TEACHER_STATES, strict=True):
        hidden += torch.nn.functional.mse_loss(ours, theirs).item()
    assert_close(whole["attention"].item(), attention, rtol=1e-5)
    assert_close(whole["hidden"].item(), hidden, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_prediction_loss_is_a_mean_over_examples_and_classes(temperature):
    expected = []
    for ours, theirs in zip(STUDENT_LOGITS.double().numpy(), TEACHER_LOGITS.double().numpy(), strict=True):
        target = np.exp(theirs / temperature) / np.exp(theirs / temperature).sum()
        predicted = np.exp(ours / temperature) / np.exp(ours / temperature).sum()
        expected += [-target[c] * np.log(predicted[c]) for c in range(CLASSES)]
    loss = prediction_loss(STUDENT_LOGITS, TEACHER_LOGITS, temperature, denominators(False))
    assert_close(loss.item(), np.mean(expected), rtol=1e-5)


def test_the_label_loss_is_the_mean_cross_entropy():
    loss = label_loss(STUDENT_LOGITS, LABELS, denominators(False)).item()
    assert_close(loss, torch.nn.functional.cross_entropy(STUDENT_LOGITS, LABELS).item(), rtol=1e-6)


@pytest.mark.parametrize("padded", [False, True], ids=["longest", "max_length"])
@pytest.mark.parametrize("cuts", [(1,), (2, 3), (1, 2, 3, 4), (0, 5), (3, 3)], ids=str)
def test_losses_of_the_pieces_of_a_step_add_up_to_the_whole(cuts, padded):
    """For any partition, with empty pieces too: so accumulation and processes do not change a step."""
    edges = (0, *cuts, len(LENGTHS))
    whole = losses_of(slice(None), padded)
    pieces = [losses_of(slice(first, last), padded) for first, last in itertools.pairwise(edges)]
    for name, loss in whole.items():
        assert_close(sum(piece[name].item() for piece in pieces), loss.item(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_computed_in_fp32(dtype):
    """fp16 can hold neither the square of a masked score, 1e8, nor a sum over many tokens."""
    big = [torch.full((1, 1, 40, 40), 200.0, dtype=dtype)], [torch.full((1, 1, 40, 40), -100.0, dtype=dtype)]
    mask = torch.ones(1, 40)
    assert attention_loss(*big, mask, mask, LossDenominators(1, 40, 1600)).item() == 300.0**2
    states = [big[0][0][0]], [big[1][0][0]]
    assert hidden_loss(*states, mask, LossDenominators(1, 40, 1600)).item() == 300.0**2
    assert (
        prediction_loss(big[0][0][0, 0, :2, :2], big[0][0][0, 0, :2, :2], 1.0, LossDenominators(2, 2, 2)).dtype
        == torch.float32
    )


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [(4, 12, (3, 6, 9, 12)), (3, 6, (2, 4, 6)), (6, 12, (2, 4, 6, 8, 10, 12)), (1, 5, (5,)), (2, 2, (1, 2))],
)
def test_the_uniform_layer_map_has_equal_distances_and_ends_with_the_last_layer(student, teacher, expected):
    assert uniform_layer_map(student, teacher) == expected


@pytest.mark.parametrize(("student", "teacher"), [(4, 6), (5, 12), (3, 2)])
def test_a_teacher_depth_that_is_no_multiple_is_refused(student, teacher):
    with pytest.raises(UserError, match=f"the teacher has {teacher} layers and the student {student}: "):
        uniform_layer_map(student, teacher)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_squared_error_and_its_gradient_are_those_of_plain_operations(dtype):
    ours = random(2, 3, 4, 5, seed=1).to(dtype).requires_grad_()
    theirs, counted = random(2, 3, 4, 5, seed=2).bfloat16(), (random(2, 1, 4, 1, seed=3) > 0).float()
    assert 0 < counted.sum() < counted.numel()
    same = ours.detach().clone().requires_grad_()
    found = 0.3 * squared_error(ours, theirs, counted)
    plain = 0.3 * ((same.float() - theirs.float()) * counted).square().sum()
    found.backward()
    plain.backward()
    assert torch.equal(found, plain)
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, same.grad)
