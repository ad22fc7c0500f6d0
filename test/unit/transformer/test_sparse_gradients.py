"""BertAdam with the sparse gradient of an embedding: the same steps as with the dense gradient."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import Workplace, assert_close, next_run, read_bin
from torch import nn

from data_processing.batching import Collator, TrainingPlan
from distillation.training.trainer import has_few_words_per_step
from transformer.optimization import BertAdam

SETTINGS = {"lr": 0.1, "weight_decay": 0.3}
# The ids of each step's micro-batches: repeated ones, padding (0), rows of the step before and others.
STEPS = ([[3, 3, 5, 0]], [[5, 7], [7, 3, 0]], [[1]], [[0, 0]], [[2, 2, 2], [2]], [[8, 5, 1]])


def twins(contiguous: bool = True) -> tuple[nn.Embedding, nn.Embedding]:
    """Two equal embeddings, with dense and with sparse gradients; torch's fused step needs contiguous weights."""
    torch.manual_seed(1)
    dense = nn.Embedding(9, 4, padding_idx=0)
    if not contiguous:
        dense.weight = nn.Parameter(dense.weight.detach().t().contiguous().t())
    sparse = copy.deepcopy(dense)
    sparse.sparse = True
    return dense, sparse


def backward(embedding: nn.Embedding, optimizer: BertAdam, batches: list[list[int]], scale: float) -> None:
    """Accumulate the gradients of a loss that differs between ids and between places of one id."""
    optimizer.zero_grad()
    for ids in batches:
        states = embedding(torch.tensor(ids))
        (states * torch.arange(1.0, 1 + states.numel()).view_as(states)).square().sum().mul(scale).backward()


@pytest.mark.parametrize("contiguous", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("scale", [1e-5, 1.0], ids=["below the clip", "above the clip"])
@pytest.mark.parametrize("max_grad_norm", [1.0, -1.0])
@pytest.mark.parametrize("mixed", [False, True], ids=["default", "norms, loss scale and a skipped step"])
def test_each_step_equals_that_of_a_dense_gradient(contiguous, scale, max_grad_norm, mixed):
    embeddings = twins(contiguous)
    optimizers = [BertAdam(e.parameters(), max_grad_norm=max_grad_norm, **SETTINGS) for e in embeddings]
    for number, batches in enumerate(STEPS):
        for embedding, optimizer in zip(embeddings, optimizers, strict=True):
            backward(embedding, optimizer, batches, scale)
            if mixed:
                norms = [gradient.norm() for gradient in optimizer.gradients()]
                optimizer.step(norms=norms, grad_scale=128.0, skip=torch.tensor(float(number == 2)))
            else:
                optimizer.step()
        assert embeddings[1].weight.grad.is_sparse
        assert_close(embeddings[1].weight.detach(), embeddings[0].weight.detach(), rtol=1e-6, atol=1e-7)
    saved, expected = (optimizer.export_state()["parameters"][0] for optimizer in reversed(optimizers))
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(torch.as_tensor(saved[name]), torch.as_tensor(value), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("stage", [{}, {"pred_distill": True}], ids=["intermediate", "prediction"])
def test_a_run_of_one_process_on_a_cpu_trains_with_sparse_gradients(sst2: Workplace, monkeypatch, stage):
    """The weights equal those of a run with dense gradients."""
    step, has_sparse = BertAdam.step, []

    def recording_step(self, *arguments, **settings):
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        has_sparse.append(any(gradient is not None and gradient.is_sparse for gradient in gradients))
        return step(self, *arguments, **settings)

    monkeypatch.setattr(BertAdam, "step", recording_step)
    flags = {"train_batch_size": 3, "num_train_epochs": 3, "gradient_accumulation_steps": 2, **stage}
    sst2.run(**flags)
    monkeypatch.setattr("distillation.runtime.precision.Precision.takes_sparse_gradients", False)
    dense = next_run(sst2, "dense")
    dense.run(**flags)
    assert has_sparse == [True] * 9 + [False] * 9
    weights = read_bin(sst2.model)
    for name, tensor in read_bin(dense.model).items():
        assert_close(weights[name], tensor, atol=1e-6)


def test_processes_exchange_rows_only_if_a_step_has_few_words():
    plan = TrainingPlan(np.array([10, 30]), batch_size=50, collator=Collator(False, 64), seed=0, world_size=2)
    assert has_few_words_per_step(plan, 1001)
    assert not has_few_words_per_step(plan, 1000)
    assert has_few_words_per_step(replace(plan, world_size=1), 10), "one process exchanges nothing"
