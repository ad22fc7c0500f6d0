"""The training loop: one for both stages of distillation and for fine-tuning.

It calls verbs and knows no file names: what a batch teaches is the stage's, how a model is judged
and saved is told by its caller.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data_processing.batching import Batch, Step, Totals, TrainingPlan, prepared
from data_processing.features import Features
from distillation.device import Process
from distillation.logs import FpsMeter, Progress, RunLog
from distillation.precision import Precision
from distillation.stages import TrainingStage
from transformer.errors import UserError
from transformer.heads import TinyBertForSequenceClassification
from transformer.optimization import BertAdam, decay_groups

logger = logging.getLogger(__name__)

PERFORMANCE_STEPS = 1000
# A stage that no metric chooses in keeps its newest weights; writing them more often would only cost time.
SECONDS_BETWEEN_SAVES = 60.0


@dataclass(frozen=True)
class Schedule:
    """How long a run trains and how often it stops to look."""

    learning_rate: float
    weight_decay: float
    warmup_proportion: float
    num_train_epochs: float
    eval_step: int
    output_txt_step: int
    workers: int
    performance: bool


@dataclass
class Outcome:
    """What came of a run.

    best, best_step: the metric that chose the checkpoint, and its step. fps, examples: see `FpsMeter`.
    seconds: spent beside training, by what for. skipped: steps whose gradients overflowed.
    """

    best: float = -math.inf
    best_step: int = 0
    steps: int = 0
    fps: float = 0.0
    examples: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: int = 0


class Trainer:
    """Trains a model on a plan of batches.

    Args:
        model: on the process's device, what the stage does not train frozen.
        stage: the loss and the schedule.
        features, plan: the training set and the order in which it is learned.
        schedule: how long and how often.
        precision: has not been prepared yet.
        judge: evaluates the model and returns the metric that chooses; called where the stage has one.
        save: writes the model.
    """

    def __init__(
        self,
        model: TinyBertForSequenceClassification,
        stage: TrainingStage,
        features: Features,
        plan: TrainingPlan,
        schedule: Schedule,
        process: Process,
        precision: Precision,
        log: RunLog,
        judge: Callable[[int], float],
        save: Callable[[], None],
        title: str,
    ) -> None:
        self.stage, self.features, self.plan, self.schedule = stage, features, plan, schedule
        self.process, self.precision, self.log, self.title = process, precision, log, title
        self.judge, self.save = judge, save
        # The rate's schedule spans the whole stage, also where a performance run leaves it early.
        self.stage_steps = max(1, round(plan.steps_per_epoch * schedule.num_train_epochs))
        self.total_steps = min(self.stage_steps, PERFORMANCE_STEPS) if schedule.performance else self.stage_steps
        self.optimizer = BertAdam(
            decay_groups(model, schedule.weight_decay),
            lr=schedule.learning_rate,
            warmup=schedule.warmup_proportion,
            t_total=self.stage_steps,
            schedule=stage.schedule,
        )
        self.model = self._distributed(precision.prepare(model, self.optimizer))
        self.outcome = Outcome()
        self._metric: float | None = None
        self._saved_at = time.monotonic()

    def run(self) -> Outcome:
        """Trains to the end; returns what came of it. The model that stays is on the disk.

        Raises:
            UserError: the loss is not finite; what was saved before stays.
        """
        meter = FpsMeter(self.process, self.total_steps)
        progress = Progress(self.title, self.total_steps, self.process.is_main)
        self.model.train()
        for epoch, number, batches, totals in self._steps():
            parts = self._learn(batches, totals)
            self.outcome.steps += 1
            meter.count(totals.examples)
            # Of the other processes' parts no more is known here than that they are alike.
            progress.advance(loss=f"{sum(parts.values()) * self.process.world_size:.4f}", FPS=f"{meter.fps():.1f}")
            last = self.outcome.steps == self.total_steps
            if last or self.outcome.steps % self.schedule.eval_step == 0:
                self._look(meter, last)
            if last or self.outcome.steps % self.schedule.output_txt_step == 0:
                self._write_line(epoch, number, parts, meter.fps())
        progress.close()
        self.outcome.fps, self.outcome.examples, self.outcome.seconds = meter.fps(), meter.examples, meter.paused
        self.outcome.skipped = self.precision.skipped
        return self.outcome

    def _steps(self) -> Iterator[tuple[int, int, list[Batch], Totals]]:
        """Every step of the run: its epoch, its number in the epoch, its batches, the totals of its losses."""

        def collate(step: Step) -> tuple[list[Batch], Totals]:
            return [self.plan.padding.collate(self.features, part) for part in step.micro_batches], step.totals

        epoch, left = 0, self.total_steps
        while left:
            for number, (batches, totals) in enumerate(
                prepared(collate, self.plan.epoch(epoch), self.schedule.workers)
            ):
                yield epoch, number, batches, totals
                left -= 1
                if not left:
                    return
            epoch += 1

    def _distributed(self, model: nn.Module) -> nn.Module:
        """The model in a wrapper that averages gradients over the processes, where there are several."""
        if self.process.world_size == 1:
            return model
        index = self.process.device.index
        return DistributedDataParallel(
            model,
            device_ids=None if index is None else [index],
            gradient_as_bucket_view=self.precision.bucket_views,
        )

    def _learn(self, batches: list[Batch], totals: Totals) -> dict[str, float]:
        """One optimizer step over its micro-batches; returns this process's part of each term of its loss."""
        self.optimizer.zero_grad()
        parts: dict[str, float] = {}
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else self._without_sync():
                with self.precision.autocast():
                    terms = self.stage.losses(self.model, batch.to(self.process.device), totals)
                    loss = torch.stack(list(terms.values())).sum()
                # The wrapper divides the sum of the processes' gradients by their number.
                self.precision.backward(loss * self.process.world_size, last)
            for name, term in terms.items():
                parts[name] = parts.get(name, 0.0) + term.item()
        if not self.precision.step(self.optimizer):
            self._stop_unless_overflow(parts)
        return parts

    def _without_sync(self) -> AbstractContextManager[None]:
        """A micro-batch that does not end a step keeps its gradients to this process."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else contextlib.nullcontext()

    def _over_all_processes(self, parts: dict[str, float]) -> dict[str, float]:
        gathered = self.process.gather(parts)
        return {name: sum(part[name] for part in gathered) for name in parts}

    def _stop_unless_overflow(self, own_parts: dict[str, float]) -> None:
        """After a step that was skipped, in every process: goes on only if the loss scale can be what was wrong."""
        parts = self._over_all_processes(own_parts)
        finite = math.isfinite(sum(parts.values()))
        if self.precision.dynamic or (finite and self.precision.scale != 1.0):
            logger.info(
                "step %d: skipped, a gradient overflowed; %d skipped so far, the loss scale is %g",
                self.outcome.steps + 1,
                self.precision.skipped,
                self.precision.scale,
            )
            return
        terms = ", ".join(f"{name} {value:g}" for name, value in parts.items())
        raise UserError(
            f"step {self.outcome.steps + 1}: {'a gradient' if finite else 'the loss'} is not finite ({terms}); "
            "what was saved before stays. A lower --learning_rate may help"
        )

    def _look(self, meter: FpsMeter, last: bool) -> None:
        """Judges the model where the stage has a metric, and saves it where it is to stay."""
        if self.stage.by_metric:
            with meter.pause("evaluation"):
                self._metric = self.judge(self.outcome.steps)
            keep = self._metric > self.outcome.best
            if keep:
                self.outcome.best, self.outcome.best_step = self._metric, self.outcome.steps
        else:
            keep = last or time.monotonic() - self._saved_at > SECONDS_BETWEEN_SAVES
        if keep:
            with meter.pause("saving"):
                self.save()
            self._saved_at = time.monotonic()

    def _write_line(self, epoch: int, number: int, own_parts: dict[str, float], fps: float) -> None:
        parts = self._over_all_processes(own_parts)
        self.log.line(epoch, number, fps, self._metric)
        rate = self.optimizer.rate(self.optimizer.param_groups[0], max(0, self.optimizer.steps_taken - 1))
        self.log.record(
            "train",
            epoch=epoch,
            step=self.outcome.steps,
            loss=sum(parts.values()),
            **parts,
            learning_rate=rate,
            fps=fps,
        )
