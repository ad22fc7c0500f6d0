"""The benchmarks' count of operations against torch's own, and the matrix rate."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.operations import forward_operations, matrix_rate, step_operations
from data_processing.batching import Batch, LossDenominators
from distillation.training.stages import IntermediateStage, PredictionStage, freeze_unused
from transformer.configuration import BertConfig
from transformer.heads import TinyBertForSequenceClassification

SMALL = {"vocab_size": 50, "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEACHER = BertConfig(**SMALL, num_hidden_layers=4, hidden_size=32, intermediate_size=128)
STUDENT = BertConfig(**SMALL, num_hidden_layers=2, hidden_size=16, intermediate_size=48)
LENGTHS = [7] * 5


def batch() -> Batch:
    ids = torch.randint(1, 50, (len(LENGTHS), LENGTHS[0]))
    return Batch(ids, torch.zeros_like(ids), torch.ones_like(ids), torch.zeros(5, dtype=torch.long), torch.arange(5))


@pytest.mark.parametrize("stage", ["intermediate", "prediction"])
def test_the_operations_of_a_step_are_those_that_torch_counts(stage):
    teacher = TinyBertForSequenceClassification(TEACHER).eval().requires_grad_(False)
    student = TinyBertForSequenceClassification(STUDENT, fit_size=TEACHER.hidden_size, per_layer=True)
    asked = batch()

    def states(batch, hidden_layers, attention_layers):
        return teacher(*batch.inputs, hidden_layers=hidden_layers, attention_layers=attention_layers, with_logits=False)

    def logits(batch):
        return teacher(*batch.inputs, hidden_layers=(), attention_layers=()).logits

    said = SimpleNamespace(states=states, logits=logits)
    kind = IntermediateStage(said, (2, 4), False) if stage == "intermediate" else PredictionStage(said, 1.0)
    freeze_unused(student, kind.unused)
    with FlopCounterMode(display=False) as counter:
        terms = kind.losses(student, asked, LossDenominators(5, 35, 245))
        torch.stack(list(terms.values())).sum().backward()
    counted = step_operations(stage, TEACHER, STUDENT, LENGTHS, asked=True)
    # Torch's count has the heads too: a pooler and a classifier of each, the student's three times.
    heads = sum(
        times * 2 * 5 * (config.hidden_size**2 + 2 * config.hidden_size)
        for config, times in ((TEACHER, 1), (STUDENT, 3))
    )
    assert counted + (heads if stage == "prediction" else 0) == counter.get_total_flops()
    remembered = step_operations(stage, TEACHER, STUDENT, LENGTHS, asked=False)
    assert counted - remembered == forward_operations(TEACHER, LENGTHS, stage == "prediction")


def test_the_operations_of_texts_add_up():
    alone = [forward_operations(TEACHER, [length]) for length in (3, 9)]
    assert forward_operations(TEACHER, [3, 9]) == sum(alone)
    assert alone[1] > 3 * alone[0], "attention grows with the square"


def test_a_matrix_rate_is_a_rate():
    rate = matrix_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15
