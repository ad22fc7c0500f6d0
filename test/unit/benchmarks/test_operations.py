"""The operations of a step, against torch's count of a real one, and the rate of matrix products."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.operations import forward_operations, matrix_rate, step_operations
from data_processing.batching import Batch, LossDenominators
from distillation.teacher.teacher import Teacher
from distillation.training.stages import IntermediateStage, PredictionStage, freeze_unused
from transformer.configuration import BertConfig
from transformer.heads import TinyBertForSequenceClassification

SMALL = {"vocab_size": 50, "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEACHER = BertConfig(**SMALL, num_hidden_layers=4, hidden_size=32, intermediate_size=128)
STUDENT = BertConfig(**SMALL, num_hidden_layers=2, hidden_size=16, intermediate_size=48)
LENGTHS = np.full(5, 7)


@pytest.mark.parametrize("stage", ["intermediate", "prediction"])
def test_the_operations_of_a_step_are_those_that_torch_counts(stage):
    teacher = TinyBertForSequenceClassification(TEACHER).eval().requires_grad_(False)
    student = TinyBertForSequenceClassification(STUDENT, fit_size=TEACHER.hidden_size, per_layer=True)
    ids = torch.randint(1, 50, (len(LENGTHS), LENGTHS[0]))
    batch = Batch(ids, torch.zeros_like(ids), torch.ones_like(ids), torch.zeros(5, dtype=torch.long), torch.arange(5))
    kind = (
        IntermediateStage(Teacher(teacher), (2, 4), False)
        if stage == "intermediate"
        else PredictionStage(Teacher(teacher), 1.0)
    )
    freeze_unused(student, kind.unused)
    with FlopCounterMode(display=False) as counter:
        terms = kind.losses(student, batch, LossDenominators(5, 35, 245))
        torch.stack(list(terms.values())).sum().backward()
    student.eval()
    assert step_operations(stage, teacher, student, LENGTHS, cached=False) == pytest.approx(counter.get_total_flops())
    student_alone = step_operations(stage, teacher, student, LENGTHS, cached=True)
    assert 0 < student_alone < counter.get_total_flops()


def test_the_operations_of_texts_add_up_and_grow_with_the_square_of_the_length():
    model = TinyBertForSequenceClassification(TEACHER).eval()
    short, long = (forward_operations(model, np.array([length])) for length in (3, 9))
    assert forward_operations(model, np.array([3, 9])) == pytest.approx(short + long)
    assert long > 3 * short


def test_a_matrix_rate_is_a_rate():
    assert 1e8 < matrix_rate(torch.device("cpu"), torch.float32, 1) < 1e15
