"""Run a model over whole datasets: logits, metrics, and the task's dev sets. Nothing here trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_processing.batching import Collator
from data_processing.features import Features, load_features
from data_processing.tasks import Task
from distillation.options import Options
from distillation.runtime.device import Process, synchronize
from distillation.runtime.logs import Progress
from distillation.runtime.precision import Precision, choose_precision
from transformer.errors import UserError
from transformer.heads import TinyBertForSequenceClassification
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """An evaluation ended early, in every process, because its caller asked for that; it has no result."""


def never() -> bool:
    """Return False: the evaluation is not to be interrupted."""
    return False


@dataclass(frozen=True)
class EvaluationResult:
    """A model's result on one file.

    metrics: the task's, and `eval_loss`, the mean cross-entropy or, for a regression, the mean squared error.
    examples: in the file. seconds: of the forward passes; None where the logits came from the cache.
    """

    metrics: dict[str, float]
    examples: int
    seconds: float | None

    @property
    def examples_per_second(self) -> float:
        """Examples per second of the forward passes; 0 where the logits came from the cache."""
        return self.examples / self.seconds if self.seconds else 0.0

    def summary(self, name: str) -> str:
        """Return one line for people about the result on the file of this name."""
        metrics = ", ".join(f"{key} {value:.4f}" for key, value in self.metrics.items())
        speed = "cached" if self.seconds is None else f"{self.examples_per_second:.0f} a second"
        return f"{name}: {metrics} ({self.examples} examples, {speed})"


@dataclass(frozen=True)
class Predictor:
    """How models run over whole datasets.

    batch_size: examples in a batch; it changes speed and last bits, not the result.
    """

    collator: Collator
    batch_size: int
    process: Process
    precision: Precision

    def logits(
        self,
        model: TinyBertForSequenceClassification,
        features: Features,
        title: str = "evaluation",
        should_stop: Callable[[], bool] = never,
    ) -> np.ndarray:
        """Return the model's logits [examples, outputs] in the order of the features, in every process.

        Examples of similar length share a batch, so that little is padded. The processes take turns at the batches,
        so that the batches do not depend on their number. The model is left in the mode that it had.

        Args:
            title: of the progress bar.
            should_stop: called before each batch; all processes stop where it is true in one.

        Raises:
            Interrupted: `should_stop` was true.
            UserError: a logit is not finite.
        """
        was_training = model.training
        model.eval()
        # The longest first: if memory suffices for them, it suffices for all.
        order = np.argsort(-features.lengths, kind="stable")
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        own = batches[self.process.rank :: self.process.world_size]
        progress = Progress(title, len(own), self.process.is_main, unit="batch")
        computed: list[Tensor] = []
        stopped = False
        with torch.no_grad(), self.precision.autocast():
            for examples in own:
                stopped = should_stop()
                if stopped:
                    break
                batch = self.collator.collate(features, examples).to(self.process.device)
                computed.append(model(*batch.inputs, hidden_layers=(), attention_layers=()).logits.float())
                progress.advance()
        progress.close()
        model.train(was_training)
        # Through this exchange a process learns that another one stops.
        gathered = self.process.gather(None if stopped else [part.cpu().numpy() for part in computed])
        if any(parts is None for parts in gathered):
            raise Interrupted
        logits = np.empty((len(order), model.num_labels), dtype=np.float32)
        for rank, parts in enumerate(gathered):
            for examples, part in zip(batches[rank :: self.process.world_size], parts, strict=True):
                logits[examples] = part
        wrong = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if wrong.size:  # in all processes, which have the same logits
            with self.process.raise_on_all_ranks():
                raise UserError(
                    f"{title}: the model's outputs of {wrong.size} of {len(logits)} texts are not finite, first text "
                    f"{wrong[0] + 1}; the model diverged, or its values are too large for {self.precision.name}"
                )
        return logits

    def evaluate(
        self,
        model: TinyBertForSequenceClassification,
        features: Features,
        task: Task,
        should_stop: Callable[[], bool] = never,
    ) -> EvaluationResult:
        """Predict every example and compute the task's metrics.

        Raises:
            Interrupted: as `logits`.
        """
        synchronize(self.process.device)
        begin = time.perf_counter()
        logits = self.logits(model, features, should_stop=should_stop)
        return evaluate_logits(logits, features, task, time.perf_counter() - begin)


def evaluate_logits(logits: np.ndarray, features: Features, task: Task, seconds: float | None) -> EvaluationResult:
    """Compute the metrics of logits [examples, outputs] that took so many seconds."""
    metrics = task.metric(predictions(logits, task), features.labels)
    outputs, labels = torch.from_numpy(logits), torch.tensor(features.labels)  # from_numpy refuses read-only arrays
    loss = (
        functional.mse_loss(outputs[:, 0], labels) if task.is_regression else functional.cross_entropy(outputs, labels)
    )
    return EvaluationResult({**metrics, "eval_loss": loss.item()}, len(features), seconds)


def warn_of_chance(model: str, name: str, value: float, features: Features, task: Task, advice: str) -> None:
    """Warn if a model's metric on the file of this name is no better than one and the same output for all texts."""
    chance = task.metric.chance_level(np.asarray(features.labels))
    if value <= chance:
        message = "%s has %s %.4f on %s, no better than the same output for every text (%.4f): %s"
        logger.warning(message, model, task.metric.chosen_by, value, name, chance, advice)


def predictions(logits: np.ndarray, task: Task) -> np.ndarray:
    """Return the predicted label ids [examples] of logits [examples, outputs]; for a regression, the scores."""
    return logits[:, 0] if task.is_regression else logits.argmax(axis=1)


@dataclass(frozen=True)
class DevSets:
    """The task's dev files, tokenized, by file name."""

    task: Task
    features: dict[str, Features]

    @classmethod
    def read(cls, options: Options, tokenizer: BertTokenizer) -> DevSets:
        """Read and tokenize every dev file of the task.

        Raises:
            UserError: a file is missing or broken.
        """
        features = {
            name: load_features(options.data_dir / name, options.task, tokenizer, options.max_seq_length, options.cache)
            for name in options.task.dev_files
        }
        return cls(options.task, features)

    def evaluate(
        self,
        model: TinyBertForSequenceClassification,
        predictor: Predictor,
        should_stop: Callable[[], bool] = never,
    ) -> dict[str, EvaluationResult]:
        """Evaluate a model on each file.

        Raises:
            Interrupted: as `Predictor.logits`.
        """
        return {
            name: predictor.evaluate(model, features, self.task, should_stop)
            for name, features in self.features.items()
        }


def make_predictor(options: Options, pad_token_id: int, process: Process) -> Predictor:
    """Return the predictor that the flags describe, with its precision, on this process's device.

    Raises:
        UserError: the device cannot compute in the precision that the flags name.
    """
    precision = choose_precision(process.device, options.amp, options.opt_level, options.loss_scale, options.amp_dtype)
    to_maximum = options.padding == "max_length"
    collator = Collator(to_maximum, options.max_seq_length, pad_token_id, precision.bucketed_lengths)
    return Predictor(collator, options.eval_batch_size, process, precision)
