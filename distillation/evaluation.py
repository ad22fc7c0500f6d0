"""How good a model is: predictions for every example, once and in order, and the task's metrics.

Chooses no checkpoint and writes no file.
"""

from __future__ import annotations

import math
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

    metrics: the task's, and `eval_loss`, the mean cross-entropy. examples, seconds: of its forwards.
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
    """Predicts every example and judges the predictions. A metric that is not a number counts as 0."""
    synchronize(process.device)
    begin = time.perf_counter()
    logits = predict(model, features, padding, batch_size, process, precision)
    seconds = time.perf_counter() - begin
    metrics = task.metric(logits.argmax(axis=1), features.labels)
    loss = functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(features.labels)).item()
    numbers = {name: 0.0 if math.isnan(value) else value for name, value in metrics.items()}
    return Evaluation({**numbers, "eval_loss": loss}, len(features), seconds)
