"""How good a model is: predictions for every example, once and in order, and the task's metrics.

Chooses no checkpoint and writes no file.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from data_processing.batching import Padding
from data_processing.features import Features
from data_processing.tasks import Task
from distillation.device import Process, synchronize
from distillation.precision import Precision
from transformer.heads import TinyBertForSequenceClassification


@dataclass(frozen=True)
class Evaluation:
    """A model judged on one file.

    metrics: the task's, and `eval_loss`, the mean cross-entropy or, of a regression, squared error.
    examples, seconds: of its forwards.
    """

    metrics: dict[str, float]
    examples: int
    seconds: float

    @property
    def examples_per_second(self) -> float:
        return self.examples / self.seconds


def predict(
    model: TinyBertForSequenceClassification,
    features: Features,
    padding: Padding,
    batch_size: int,
    process: Process,
    precision: Precision,
) -> np.ndarray:
    """The model's logits [examples, labels], in the features' order, in every process.

    Each process asks the model about its own share of the examples. The model is left in the mode it had.
    """
    was_training = model.training
    model.eval()
    share = np.array_split(np.arange(len(features)), process.world_size)[process.rank]
    logits = [np.empty((0, model.num_labels), dtype=np.float32)]
    with torch.no_grad(), precision.autocast():
        for start in range(0, len(share), batch_size):
            examples = share[start : start + batch_size]
            batch = padding.collate(features, examples).to(process.device)
            output = model(
                batch.input_ids, batch.token_type_ids, batch.attention_mask, hidden_layers=(), attention_layers=()
            )
            logits.append(output.logits.float().cpu().numpy())
    model.train(was_training)
    return np.concatenate(process.gather(np.concatenate(logits)))


def evaluate(
    model: TinyBertForSequenceClassification,
    features: Features,
    task: Task,
    padding: Padding,
    batch_size: int,
    process: Process,
    precision: Precision,
) -> Evaluation:
    """Predicts every example and judges the predictions."""
    synchronize(process.device)
    begin = time.perf_counter()
    logits = predict(model, features, padding, batch_size, process, precision)
    seconds = time.perf_counter() - begin
    metrics = task.metric(predictions(logits, task), features.labels)
    ours, theirs = torch.from_numpy(logits), torch.from_numpy(features.labels)
    loss = functional.mse_loss(ours[:, 0], theirs) if task.is_regression else functional.cross_entropy(ours, theirs)
    return Evaluation({**metrics, "eval_loss": loss.item()}, len(features), seconds)


def predictions(logits: np.ndarray, task: Task) -> np.ndarray:
    """What logits [examples, outputs] say: [examples] label ids, or scores where the task is a regression."""
    return logits[:, 0] if task.is_regression else logits.argmax(axis=1)
