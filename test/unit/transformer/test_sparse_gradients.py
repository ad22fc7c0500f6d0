"""BertAdam with the sparse gradient of an embedding: the same steps as with the dense one."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import Workplace, assert_close, next_run, read_bin
from torch import nn

from data_processing.batching import Collator, TrainingPlan
from distillation.training.trainer import Trainer, _meets_few
from transformer import optimization
from transformer.optimization import BertAdam

SETTINGS = {"lr": 0.1, "weight_decay": 0.3}
# Each step's micro-batches of ids: repeated ones, padding (0), rows of the step before and others.
STEPS = ([[3, 3, 5, 0]], [[5, 7], [7, 3, 0]], [[1]], [[0, 0]], [[2, 2, 2], [2]], [[8, 5, 1]])


def twins() -> tuple[nn.Embedding, nn.Embedding]:
    torch.manual_seed(1)
    dense = nn.Embedding(9, 4, padding_idx=0)
    sparse = copy.deepcopy(dense)
    sparse.sparse = True
    return dense, sparse


def learn(embedding: nn.Embedding, optimizer: BertAdam, batches: list[list[int]], scale: float) -> None:
    """Adds the gradients of a loss that differs from id to id, and from one place to another of the same id."""
    optimizer.zero_grad()
    for ids in batches:
        states = embedding(torch.tensor(ids))
        (states * torch.arange(1.0, 1 + states.numel()).view_as(states)).square().sum().mul(scale).backward()


@pytest.mark.parametrize("fuses", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("scale", [1e-5, 1.0], ids=["below the clip", "above the clip"])
@pytest.mark.parametrize("max_grad_norm", [1.0, -1.0])
def test_each_step_equals_the_dense_gradients(monkeypatch, fuses, scale, max_grad_norm):
    if not fuses:
        monkeypatch.setattr(optimization, "_can_fuse", lambda part: False)
    embeddings = twins()
    optimizers = [BertAdam(e.parameters(), max_grad_norm=max_grad_norm, **SETTINGS) for e in embeddings]
    for batches in STEPS:
        for embedding, optimizer in zip(embeddings, optimizers, strict=True):
            learn(embedding, optimizer, batches, scale)
            optimizer.step()
        assert embeddings[1].weight.grad.is_sparse
        assert_close(embeddings[1].weight.detach(), embeddings[0].weight.detach(), rtol=1e-6, atol=1e-7)


def test_known_norms_a_loss_scale_and_a_skipped_step_are_as_with_a_dense_gradient():
    embeddings = twins()
    optimizers = [BertAdam(e.parameters(), **SETTINGS) for e in embeddings]
    for number, batches in enumerate(STEPS):
        norms = []
        for embedding, optimizer in zip(embeddings, optimizers, strict=True):
            learn(embedding, optimizer, batches, 128.0)
            norms.append([gradient.norm() for gradient in optimizer.gradients()])
            skip = torch.tensor(float(number == 2))
            optimizer.step(norms=norms[-1], grad_scale=128.0, skip=skip)
        assert_close(norms[1][0], norms[0][0], rtol=1e-6)
        assert_close(embeddings[1].weight.detach(), embeddings[0].weight.detach(), rtol=1e-6, atol=1e-7)


def test_what_is_saved_of_the_optimizer_is_the_same():
    states = []
    for embedding in twins():
        optimizer = BertAdam(embedding.parameters(), **SETTINGS)
        learn(embedding, optimizer, STEPS[0], 1.0)
        optimizer.step()
        states.append(optimizer.state_dict()["state"][0])
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert_close(torch.as_tensor(states[1][name]), torch.as_tensor(value), rtol=1e-6)


@pytest.mark.parametrize("stage", [{}, {"pred_distill": True}], ids=["intermediate", "prediction"])
def test_a_single_process_on_a_cpu_has_one_and_learns_the_same(sst2: Workplace, monkeypatch, stage):
    learn_step = Trainer._learn
    makes_dense, seen = False, []

    def noted(self, *arguments):
        words = self.model.bert.embeddings.word_embeddings
        if makes_dense:
            words.sparse = False
        parts = learn_step(self, *arguments)
        seen.append(words.weight.grad.is_sparse)
        return parts

    monkeypatch.setattr(Trainer, "_learn", noted)
    flags = {"train_batch_size": 3, "num_train_epochs": 3, "gradient_accumulation_steps": 2, **stage}
    sst2.run(**flags)
    makes_dense = True
    other = next_run(sst2, "dense")
    other.run(**flags)
    assert seen == [True] * 9 + [False] * 9
    weights, expected = read_bin(sst2.model), read_bin(other.model)
    for name, tensor in expected.items():
        assert_close(weights[name], tensor, atol=1e-6)


def test_processes_exchange_rows_only_where_a_step_meets_few():
    plan = TrainingPlan(np.array([10, 30]), batch_size=50, collator=Collator(False, 64), seed=0, world_size=2)
    assert _meets_few(plan, 1001)
    assert not _meets_few(plan, 1000)
    assert _meets_few(replace(plan, world_size=1), 10), "one process exchanges nothing"
