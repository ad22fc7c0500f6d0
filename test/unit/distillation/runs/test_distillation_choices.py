"""--layer_map chooses the teacher's layer for each student layer, and --losses the terms of the intermediate stage."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cases import (
    Golden,
    Workplace,
    assert_same_weights,
    edit_config,
    edit_weights,
    encoder_shapes,
    linear,
    read_bin,
    weights_of,
    write_model,
    write_rows,
)
from test_processes import run_in_processes
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

import task_distill
from transformer.heads import TinyBertForSequenceClassification

TERMS = ("attention", "hidden", "embedding")
SUBSETS = [subset for count in (1, 2, 3) for subset in itertools.combinations(TERMS, count)]
# With a projection for each layer, a subset of one term is enough: the terms share no projection.
IN_TWO_PROCESSES = [
    (per_layer, subset) for per_layer in (False, True) for subset in SUBSETS if not per_layer or len(subset) == 1
]
LAYERS = 2  # of the teacher and of the student in the tests of --losses

Outcomes = dict[tuple[bool, int, tuple[str, ...]], "Outcome"]


@pytest.fixture
def place(sst2: Workplace) -> Workplace:
    """The golden SST-2 case with task_distill.py."""
    sst2.entry = task_distill
    return sst2


def give_layers(place: Workplace, role: str, layers: int) -> None:
    """Replace the teacher or the student by a model with this number of layers."""
    golden, folder = Golden("sst2_small"), place.folder / role
    config = golden.config(role) | {"num_hidden_layers": layers}
    heads = linear("classifier", config["hidden_size"], 2) | linear("fit_dense", config["hidden_size"], 48)
    shutil.rmtree(folder)
    write_model(folder, config, weights_of(encoder_shapes(config) | heads), golden.case["vocab"])


@pytest.mark.parametrize(
    ("layers", "given", "expected"),
    [
        (3, None, (2, 4, 6)),
        (3, "uniform", (2, 4, 6)),
        (3, "top", (4, 5, 6)),
        (3, "bottom", (1, 2, 3)),
        (3, "6,1,3", (6, 1, 3)),
        (3, "5,5,6", (5, 5, 6)),
        (4, "1,3,4,6", (1, 3, 4, 6)),
        (4, "top", (3, 4, 5, 6)),
        (4, "bottom", (1, 2, 3, 4)),
        (6, "uniform", (1, 2, 3, 4, 5, 6)),
        (6, "top", (1, 2, 3, 4, 5, 6)),
    ],
)
def test_the_loss_compares_each_student_layer_with_its_teacher_layer(
    place: Workplace, layers: int, given: str | None, expected: tuple[int, ...]
) -> None:
    """The first step has one sentence: the losses are sums over layers of plain means; embeddings match embeddings."""
    give_layers(place, "student", layers)
    header, row, *_ = Golden("sst2_small").case["rows"]
    write_rows(place.data / "train.tsv", [header, row])
    place.run(layer_map=given, padding="longest")

    models = [TinyBertForSequenceClassification.from_pretrained(f).eval() for f in (place.teacher, place.student)]
    length = int(Golden("sst2_small").tensor("feat_input_mask")[0].sum())
    inputs = [tensor[:1, :length] for tensor in Golden("sst2_small").inputs()]
    with torch.no_grad():
        expected_outputs, outputs = models[0](*inputs), models[1](*inputs, is_student=True)
    attention = sum(
        float(mse_loss(ours, expected_outputs.attention_scores[layer - 1]))
        for ours, layer in zip(outputs.attention_scores, expected, strict=True)
    )
    hidden = sum(
        float(mse_loss(ours, expected_outputs.hidden_states[layer]))
        for ours, layer in zip(outputs.hidden_states, (0, *expected), strict=True)
    )
    assert place.series("att_loss") == [pytest.approx(attention, rel=1e-4)]
    assert place.series("rep_loss") == [pytest.approx(hidden, rel=1e-4)]


@pytest.mark.parametrize(
    ("layers", "given", "message"),
    [
        (3, "1,2", "--layer_map 1,2: names 2 layers, the student has 3"),
        (3, "1,2,3,4", "--layer_map 1,2,3,4: names 4 layers, the student has 3"),
        (3, "1,2,7", "--layer_map 1,2,7: the teacher has 6 layers, numbered from 1"),
        (3, "0,2,4", "--layer_map 0,2,4: expected the teacher's layers, from 1, split by commas"),
        (3, "2,-4,6", "--layer_map 2,-4,6: expected the teacher's layers"),
        (3, "a,b,c", "--layer_map a,b,c: expected the teacher's layers"),
        (3, "1,,2", "--layer_map 1,,2: expected the teacher's layers"),
        (3, "1.0,2,3", "--layer_map 1.0,2,3: expected the teacher's layers"),
        (3, "Top", "or one of uniform, top, bottom"),
        (3, " ", "expected the teacher's layers"),
        (4, None, "the teacher has 6 layers and the student 4: the uniform layer map needs"),
        (4, "uniform", "--layer_map 2,3,5,6"),
        (7, "top", "--layer_map top: the student has 7 layers, the teacher 6"),
        (7, "bottom", "--layer_map bottom: the student has 7 layers, the teacher 6"),
    ],
)
def test_a_layer_map_that_does_not_fit_is_refused(
    place: Workplace, layers: int, given: str | None, message: str
) -> None:
    give_layers(place, "student", layers)
    assert message in place.fails(layer_map=given)


@pytest.mark.parametrize("given", ["attention,logits", "attention,attention", "attention,", "", "Hidden", "all"])
def test_unknown_or_repeated_losses_are_refused(place: Workplace, given: str) -> None:
    assert f"--losses {given}: expected one or more of attention, hidden, embedding" in place.fails(losses=given)


def test_the_order_of_the_losses_does_not_matter(place: Workplace) -> None:
    saved = []
    for given in (None, "embedding,attention,hidden"):
        place.run(losses=given, overwrite_output_dir=True)
        saved.append(read_bin(place.model))
    assert_same_weights(*saved)


class Outcome(NamedTuple):
    """The result of two steps: the student's weights, the first step's gradients, each step's event."""

    weights: dict[str, Tensor]
    gradients: list[Tensor | None]
    steps: list[dict[str, Any]]


def give_layer_projections(weights: dict[str, Tensor]) -> None:
    """Replace the projection as in TinyBERT's second release: one for the embeddings, one for each layer."""
    for key in ("fit_dense.weight", "fit_dense.bias"):
        del weights[key]
    shapes = [linear(f"fit_denses.{number}", 32, 48) for number in range(LAYERS + 1)]
    weights |= weights_of({key: shape for part in shapes for key, shape in part.items()})


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Return outcomes by (a projection for each layer, processes, subset); 0 processes: the student before training."""
    folder, found = tmp_path_factory.mktemp("losses"), {}
    places = {per_layer: Golden("sst2_small").workplace(folder / str(per_layer)) for per_layer in (False, True)}
    for place, role in itertools.product(places.values(), ("teacher", "student")):
        give_layers(place, role, LAYERS)
    edit_weights(places[True].student, give_layer_projections)
    for per_layer, subset in itertools.product(places, SUBSETS):
        place = places[per_layer]
        with recorded_gradients() as first:
            place.run(**flags_of(place, 1, subset))
        found[per_layer, 0, subset] = Outcome(read_bin(place.student), [], [])
        found[per_layer, 1, subset] = Outcome(read_bin(place.model), first, place.events("train"))
    flags_of_two = [
        places[per_layer].flags(**flags_of(places[per_layer], 2, subset)) for per_layer, subset in IN_TWO_PROCESSES
    ]
    run_in_processes([{"flags": flags, "gradients": str(folder / "of_two.pt")} for flags in flags_of_two], folder, 2)
    for per_layer, subset in IN_TWO_PROCESSES:
        place, _ = places[per_layer], flags_of(places[per_layer], 2, subset)
        found[per_layer, 2, subset] = Outcome(read_bin(place.model), [], place.events("train"))
    return found


def flags_of(place: Workplace, processes: int, subset: tuple[str, ...]) -> dict[str, Any]:
    """Return a run's flags, and set the output folders of the place to that run's."""
    name = "_".join((str(processes), *subset))
    place.model, place.output = place.folder / name, place.folder / f"{name}_log"
    # Weight decay changes every trained parameter, so that an unchanged one is frozen.
    return {"losses": ",".join(subset), "train_batch_size": 5, "num_train_epochs": 1, "weight_decay": 0.5}


@contextlib.contextmanager
def recorded_gradients() -> Iterator[list[Tensor | None]]:
    """Record the gradients of the first step that runs in this context; None for a parameter without one."""
    first: list[Tensor | None] = []

    def keep(optimizer: Optimizer, *_: object) -> None:
        if not first:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            first.extend(None if p.grad is None else p.grad.clone() for p in parameters)

    hook = register_optimizer_step_pre_hook(keep)
    try:
        yield first
    finally:
        hook.remove()


def is_trained(key: str, subset: tuple[str, ...]) -> bool:
    """Whether a loss of this subset depends on the parameter."""
    if key.startswith("bert.embeddings."):
        return True
    if key.startswith("fit_dense."):
        return "hidden" in subset or "embedding" in subset
    if key.startswith("fit_denses."):
        return ("embedding" if key.startswith("fit_denses.0.") else "hidden") in subset
    if not key.startswith("bert.encoder."):
        return False  # pooler and classifier
    makes_last_scores = "self.query." in key or "self.key." in key
    is_below = not key.startswith(f"bert.encoder.layer.{LAYERS - 1}.")
    return "hidden" in subset or ("attention" in subset and (is_below or makes_last_scores))


PROJECTIONS = pytest.mark.parametrize("per_layer", [False, True], ids=["one projection", "a projection for each layer"])


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
@PROJECTIONS
def test_each_subset_trains_the_parameters_that_its_losses_depend_on(
    outcomes: Outcomes, per_layer: bool, subset: tuple[str, ...]
) -> None:
    """Other parameters keep their bits in spite of weight decay, and the optimizer has none without a gradient."""
    before, outcome = outcomes[per_layer, 0, subset].weights, outcomes[per_layer, 1, subset]
    assert before.keys() == outcome.weights.keys()
    changed = {key for key in before if not torch.equal(before[key], outcome.weights[key])}
    expected = {key for key in before if is_trained(key, subset)}
    # A key's bias does not change the softmax over keys: only the attention loss has a gradient for it.
    without_effect = {key for key in expected if "self.key.bias" in key and "attention" not in subset}
    assert changed | without_effect == expected
    assert len(outcome.gradients) == len(expected)
    zero = sum(gradient is None or not gradient.any() for gradient in outcome.gradients)
    assert zero <= len(without_effect)


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
@PROJECTIONS
def test_each_subset_logs_its_own_terms(outcomes: Outcomes, per_layer: bool, subset: tuple[str, ...]) -> None:
    """att_loss and rep_loss are logged if their terms are chosen, and are sums of the terms' values alone."""
    steps = outcomes[per_layer, 1, subset].steps
    assert len(steps) == 2
    terms = {"att_loss": {"attention"} & {*subset}, "rep_loss": {"hidden", "embedding"} & {*subset}}
    for step in steps:
        assert {name for name in terms if name in step} == {name for name, parts in terms.items() if parts}
        assert step["loss"] == pytest.approx(sum(step.get(name, 0) for name in terms))
    for name, parts in terms.items():
        alone = [outcomes[per_layer, 1, (part,)].steps[0][name] for part in parts]
        assert steps[0].get(name, 0) == pytest.approx(sum(alone), rel=1e-5)


@pytest.mark.parametrize(("per_layer", "subset"), IN_TWO_PROCESSES, ids=str)
def test_two_processes_give_the_weights_of_one_for_each_subset(
    outcomes: Outcomes, per_layer: bool, subset: tuple[str, ...]
) -> None:
    one, two = outcomes[per_layer, 1, subset], outcomes[per_layer, 2, subset]
    for key in one.weights:
        torch.testing.assert_close(two.weights[key], one.weights[key], atol=1e-6, rtol=0)
    assert [step["loss"] for step in two.steps] == pytest.approx([step["loss"] for step in one.steps], rel=1e-5)


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_numbers_of_attention_heads_may_differ_without_the_attention_loss(
    place: Workplace, subset: tuple[str, ...]
) -> None:
    edit_config(place.student, num_attention_heads=8)
    if "attention" in subset:
        assert "the teacher has 4 attention heads and the student 8" in place.fails(losses=",".join(subset))
    else:
        place.run(losses=",".join(subset))
        assert [name for name in ("att_loss", "rep_loss") if name in place.events("train")[0]] == ["rep_loss"]


def test_a_student_of_one_loss_can_be_trained_in_the_prediction_stage(place: Workplace) -> None:
    place.run(losses="embedding")
    place.student, place.model = place.model, place.folder / "second"
    place.run(pred_distill=True, losses="embedding")  # has no effect in this stage
    assert read_bin(place.model).keys() == read_bin(place.student).keys()
