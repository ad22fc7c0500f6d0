"""How good a model is: predictions for every example, once and in order, and the task's metrics.

Chooses no checkpoint and writes no file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_processing.batching import Collator
from data_processing.features import Features
from data_processing.tasks import Task
from distillation.runtime.device import Process, synchronize
from distillation.runtime.logs import Progress
from distillation.runtime.precision import Precision
from transformer.heads import TinyBertForSequenceClassification


@dataclass(frozen=True)
class EvaluationResult:
    """A model judged on one file.

    metrics: the task's, and `eval_loss`, the mean cross-entropy or, of a regression, squared error.
    examples, seconds: of its forwards; None where its predictions were remembered.
    """

    metrics: dict[str, float]
    examples: int
    seconds: float | None

    @property
    def examples_per_second(self) -> float:
        assert self.seconds is not None  # nobody asks how fast something was remembered
        return self.examples / self.seconds


class Interrupted(Exception):
    """An evaluation was given up, in every process, as its caller asked for; nothing has come of it."""


def never() -> bool:
    """Of what is not to be given up."""
    return False


def predict(
    model: TinyBertForSequenceClassification,
    features: Features,
    collator: Collator,
    batch_size: int,
    process: Process,
    precision: Precision,
    title: str = "evaluation",
    stops: Callable[[], bool] = never,
) -> np.ndarray:
    """The model's logits [examples, outputs], in the features' order, in every process.

    Examples of like length are asked about together, which pads little; the processes take turns at the
    batches, so that these are the same however many there are. The model is left in the mode it had.

    Args:
        title: what the progress of a long one is called.
        stops: asked before each batch whether to give up; all processes do where one does.

    Raises:
        Interrupted: it was given up.
    """
    was_training = model.training
    model.eval()
    # The longest first: memory that suffices for them always does.
    order = np.argsort(-features.lengths, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    own = batches[process.rank :: process.world_size]
    progress = Progress(title, len(own), process.is_main, unit="batch")
    logits: list[Tensor] = []
    gives_up = False
    with torch.no_grad(), precision.autocast():
        for examples in own:
            gives_up = stops()
            if gives_up:
                break
            batch = collator.collate(features, examples).to(process.device)
            logits.append(model(*batch.inputs, hidden_layers=(), attention_layers=()).logits.float())
            progress.advance()
    progress.close()
    model.train(was_training)
    # A process that was not asked to give up learns of it here, where it waits for the others anyway.
    gathered = process.gather(None if gives_up else [part.cpu().numpy() for part in logits])
    if any(parts is None for parts in gathered):
        raise Interrupted
    values = np.empty((len(order), model.num_labels), dtype=np.float32)
    for rank, parts in enumerate(gathered):
        for examples, part in zip(batches[rank :: process.world_size], parts, strict=True):
            values[examples] = part
    return values


def evaluate(
    model: TinyBertForSequenceClassification,
    features: Features,
    task: Task,
    collator: Collator,
    batch_size: int,
    process: Process,
    precision: Precision,
    stops: Callable[[], bool] = never,
) -> EvaluationResult:
    """Predicts every example and judges the predictions.

    Raises:
        Interrupted: as for `predict`.
    """
    synchronize(process.device)
    begin = time.perf_counter()
    logits = predict(model, features, collator, batch_size, process, precision, stops=stops)
    return evaluate_logits(logits, features, task, time.perf_counter() - begin)


def evaluate_logits(logits: np.ndarray, features: Features, task: Task, seconds: float | None) -> EvaluationResult:
    """Judges predictions, logits [examples, outputs], that took so long."""
    metrics = task.metric(predictions(logits, task), features.labels)
    ours, theirs = torch.from_numpy(logits), torch.tensor(features.labels)  # which may be read-only
    loss = functional.mse_loss(ours[:, 0], theirs) if task.is_regression else functional.cross_entropy(ours, theirs)
    return EvaluationResult({**metrics, "eval_loss": loss.item()}, len(features), seconds)


def predictions(logits: np.ndarray, task: Task) -> np.ndarray:
    """What logits [examples, outputs] say: [examples] label ids, or scores where the task is a regression."""
    return logits[:, 0] if task.is_regression else logits.argmax(axis=1)
