"""Twelve steps of each stage give the original's figures, with and without gradient accumulation."""

import dataclasses
import itertools

import pytest
import torch
from cases import Golden, Workplace, assert_close, edit_config, read_bin, write_rows

from data_processing import tasks
from data_processing.batching import Batch, Collator
from data_processing.tasks import find_task
from distillation.teacher.teacher import Teacher
from distillation.training.losses import prediction_loss, uniform_layer_map
from distillation.training.stages import FineTuning, IntermediateStage, PredictionStage, TrainingStage, freeze_unused
from transformer.configuration import BertConfig
from transformer.heads import TinyBertForSequenceClassification
from transformer.optimization import BertAdam, decay_groups

WEIGHTS, LOSSES, ACTIVATIONS = 2e-6, 1e-5, 1e-5  # absolute, relative, absolute


def load(golden: Golden, role: str) -> TinyBertForSequenceClassification:
    config = BertConfig.from_dict(golden.config(role))
    fit_size = golden.case["teacher"]["hidden_size"]
    model = TinyBertForSequenceClassification(config, golden.case["num_labels"], fit_size)
    report = model.load(golden.weights(role), golden.name)
    assert report.missing == report.unexpected == ()
    return model


def golden_batch(golden: Golden) -> Batch:
    labels = golden.tensor("feat_label_ids")
    return Batch(*golden.inputs(), labels, torch.arange(len(labels)))


def check_weights(golden: Golden, prefix: str, weights: dict[str, torch.Tensor]) -> None:
    names = [name for name in golden.figures if name.startswith(f"{prefix}_w:")]
    assert names
    for name in names:
        assert_close(weights[name.split(":")[1]], golden.figures[name], atol=WEIGHTS)


def logits_of(model: TinyBertForSequenceClassification, golden: Golden) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(*golden.inputs()).logits


def test_stages_and_optimizer_give_the_originals_losses_and_weights(golden):
    """Missing weight decay, decay of biases, a global clip or a bias correction would change the figures."""
    teacher, student = load(golden, "teacher").eval().requires_grad_(False), load(golden, "student")
    batch, steps = golden_batch(golden), golden.case["steps"]
    lengths = batch.attention_mask.sum(dim=1).numpy()
    denominators = Collator(to_maximum=True, max_seq_length=golden.case["max_seq_length"]).denominators(lengths)
    layers = uniform_layer_map(golden.case["student"]["num_hidden_layers"], golden.case["teacher"]["num_hidden_layers"])

    stage = IntermediateStage(Teacher(teacher), layers, padding_counts=True)
    freeze_unused(student, stage.unused)
    optimizer = BertAdam(decay_groups(student, 0.01), lr=golden.case["lr_intermediate"], schedule="none")
    for step in range(steps):
        optimizer.zero_grad()
        terms = stage.losses(student, batch, denominators)
        assert_close(terms["att_loss"].item(), golden.figures["inter_att_loss"][step], rtol=LOSSES)
        assert_close(terms["rep_loss"].item(), golden.figures["inter_rep_loss"][step], rtol=LOSSES)
        sum(terms.values()).backward()
        optimizer.step()
    check_weights(golden, "inter", student.state_dict())
    assert_close(logits_of(student, golden), golden.figures["inter_final_logits"], atol=ACTIVATIONS)

    teacher_logits = logits_of(teacher, golden)
    for temperature in (1.0, 2.0):
        loss = prediction_loss(logits_of(student, golden), teacher_logits, temperature, denominators)
        assert_close(loss.item(), golden.figures[f"pred_loss_T{temperature}"], rtol=LOSSES)

    stage = PredictionStage(Teacher(teacher), temperature=1.0)
    freeze_unused(student, stage.unused)
    optimizer = BertAdam(decay_groups(student, 0.01), lr=golden.case["lr_prediction"], warmup=0.1, t_total=steps)
    for step in range(steps):
        optimizer.zero_grad()
        (loss,) = stage.losses(student, batch, denominators).values()
        assert_close(loss.item(), golden.figures["pred_cls_loss"][step], rtol=LOSSES)
        loss.backward()
        optimizer.step()
    check_weights(golden, "pred", student.state_dict())
    assert_close(logits_of(student, golden), golden.figures["pred_final_logits"], atol=ACTIVATIONS)


def every_stage(teacher: TinyBertForSequenceClassification, layers: tuple[int, ...]) -> list[TrainingStage]:
    frozen = Teacher(teacher)
    return [IntermediateStage(frozen, layers, padding_counts=False), PredictionStage(frozen, 1.0), FineTuning()]


@pytest.mark.parametrize("per_layer", [False, True], ids=["fit_dense", "fit_denses"])
@pytest.mark.parametrize("number", range(3), ids=["intermediate", "prediction", "fine-tuning"])
def test_a_stage_trains_exactly_the_parameters_with_a_gradient(golden, number, per_layer):
    """Trap 8: DDP synchronizes no parameter without a gradient, and no `0 * loss` is needed."""
    teacher = load(golden, "teacher").eval().requires_grad_(False)
    depth = golden.case["student"]["num_hidden_layers"]
    layers = uniform_layer_map(depth, golden.case["teacher"]["num_hidden_layers"])
    stage = every_stage(teacher, layers)[number]
    config = BertConfig.from_dict(golden.config("student"))
    student = TinyBertForSequenceClassification(
        config, golden.case["num_labels"], teacher.config.hidden_size, per_layer
    )
    freeze_unused(student, stage.unused)
    batch = golden_batch(golden)
    denominators = Collator(False, batch.input_ids.shape[1]).denominators(batch.attention_mask.sum(dim=1).numpy())
    sum(stage.losses(student, batch, denominators).values()).backward()
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.requires_grad != name.startswith(stage.unused), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_main_gives_the_originals_losses_weights_and_accuracy(golden, tmp_path, monkeypatch):
    """Trap 1: the teacher's dropout of 0.5 would change every loss if the teacher were in training mode."""
    place = golden.workplace(tmp_path)
    edit_config(place.teacher, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    steps = golden.case["steps"]

    place.run(num_train_epochs=steps, learning_rate=golden.case["lr_intermediate"])
    assert_close(place.series("att_loss"), golden.figures["inter_att_loss"], rtol=LOSSES)
    assert_close(place.series("rep_loss"), golden.figures["inter_rep_loss"], rtol=LOSSES)
    check_weights(golden, "inter", read_bin(place.model))
    reloaded = TinyBertForSequenceClassification.from_pretrained(place.model)
    assert_close(logits_of(reloaded, golden), golden.figures["inter_final_logits"], atol=ACTIVATIONS)

    second = Workplace(tmp_path, place.task, place.max_seq_length)
    second.student, second.model, second.output = place.model, tmp_path / "model2", tmp_path / "output2"
    with monkeypatch.context() as patch:  # the weights of the last step are kept
        rising = itertools.count()
        metric = dataclasses.replace(find_task(place.task).metric, compute=lambda *_: {"acc": float(next(rising))})
        patch.setattr(tasks, "TASKS", tuple(dataclasses.replace(task, metric=metric) for task in tasks.TASKS))
        second.run(pred_distill=True, num_train_epochs=steps, learning_rate=golden.case["lr_prediction"])
    assert_close(second.series("cls_loss"), golden.figures["pred_cls_loss"], rtol=LOSSES)
    check_weights(golden, "pred", read_bin(second.model))
    reloaded = TinyBertForSequenceClassification.from_pretrained(second.model)
    assert_close(logits_of(reloaded, golden), golden.figures["pred_final_logits"], atol=ACTIVATIONS)
    second.run(do_eval=True, student_model=second.model, output_dir=tmp_path / "evaluated")
    evaluated = {event["file"]: event for event in second.events("eval")}  # the last of each file
    assert list(evaluated) == list(find_task(place.task).dev_files)
    right = golden.figures["pred_final_logits"].argmax(axis=1) == golden.figures["feat_label_ids"]
    assert {event["acc"] for event in evaluated.values()} == {right.mean()}


@pytest.mark.parametrize("padding", ["longest", "max_length"])
@pytest.mark.parametrize("pred_distill", [False, True], ids=["intermediate", "prediction"])
def test_gradient_accumulation_gives_the_same_weights(sst2, padding, pred_distill):
    """Lengths differ by a factor of 2 and the last batch is short, so a mean of micro-batches' means would differ.

    Trap 7: a gradient left from the short last batch would change the second epoch.
    """
    short, long = "a warm film .", "the plot is not very good but the acting was fun"
    rows = [["sentence", "label"], *([long if i % 2 else short, str(i % 2)] for i in range(11))]
    write_rows(sst2.data / "train.tsv", rows)
    saved = {}
    for accumulation in (1, 2, 4):
        sst2.model = sst2.folder / f"model{accumulation}"
        sst2.output = sst2.folder / f"output{accumulation}"
        sst2.run(
            pred_distill=pred_distill,
            padding=padding,
            train_batch_size=4,
            num_train_epochs=2,
            learning_rate=5e-4,
            gradient_accumulation_steps=accumulation,
            eval_step=1000,
        )
        saved[accumulation] = read_bin(sst2.model)
        assert len(sst2.events("train")) == 6
    start = read_bin(sst2.student)
    assert any((saved[1][key] - start[key]).abs().max() > 1e-3 for key in start)
    for accumulation in (2, 4):
        for key, tensor in saved[1].items():
            assert_close(saved[accumulation][key], tensor, atol=1e-6)
