"""The training loop: one for both stages of distillation and for fine-tuning.

It calls verbs and knows no file names: what a batch teaches is the stage's, how a model is judged
and saved is told by its caller.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_processing.batching import Batch, LossDenominators, Step, TrainingPlan, prefetch
from data_processing.features import Features
from distillation.evaluation import Interrupted
from distillation.runtime.device import Process
from distillation.runtime.logs import FpsMeter, Progress, RunLog
from distillation.runtime.precision import Precision
from distillation.runtime.signals import Stopped
from distillation.training import training_state
from distillation.training.stages import TrainingStage
from distillation.training.training_state import State
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

    def stage_steps(self, steps_per_epoch: int) -> int:
        """The optimizer steps of the whole stage, which the rate's schedule spans."""
        return max(1, round(steps_per_epoch * self.num_train_epochs))

    def total_steps(self, steps_per_epoch: int) -> int:
        """The steps that are taken: a performance run leaves its stage early."""
        steps = self.stage_steps(steps_per_epoch)
        return min(steps, PERFORMANCE_STEPS) if self.performance else steps


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


class Keeper(Protocol):
    """Who keeps what a run can be resumed from."""

    def wants(self, step: int, rests: bool) -> tuple[bool, int]:
        """Whether the state is to be saved after this step, and the signal that ends the run, 0 where there is none.

        All processes call this after the same steps and get the same answer. rests: an evaluation or an epoch ends.
        """
        ...

    def save(self, state: State) -> None:
        """Saves the state, of which the main process's is whole."""
        ...


def _meets_few(plan: TrainingPlan, words: int) -> bool:
    """Whether a step's tokens are so few that processes exchange the rows of the words they meet, not those of all.

    Each then gets the others' rows beside its own, which pays while they are few beside all words. A step's tokens are
    an upper bound of them: in text many repeat.
    """
    return plan.world_size == 1 or plan.batch_size * float(plan.lengths.mean()) < words


class Trainer:
    """Trains a model on a plan of batches.

    Args:
        model: on the process's device, what the stage does not train frozen.
        stage: the loss and the schedule.
        features, plan: the training set and the order in which it is learned.
        schedule: how long and how often.
        precision: has not been prepared yet.
        judge: evaluates the model and returns the metric that chooses; called where the stage has one. It raises
            Interrupted where a signal has come, which the keeper then tells of.
        save: writes the model, of which so much is known.
        keeper: keeps the state; None keeps nothing.
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
        save: Callable[[Outcome], None],
        title: str,
        keeper: Keeper | None = None,
    ) -> None:
        self.stage, self.features, self.plan, self.schedule = stage, features, plan, schedule
        self.process, self.precision, self.log, self.title = process, precision, log, title
        self.judge, self.save, self.keeper = judge, save, keeper
        self.total_steps = schedule.total_steps(plan.steps_per_epoch)
        self.optimizer = BertAdam(
            decay_groups(model, schedule.weight_decay),
            lr=schedule.learning_rate,
            warmup=schedule.warmup_proportion,
            t_total=schedule.stage_steps(plan.steps_per_epoch),
            schedule=stage.schedule,
        )
        words = model.bert.embeddings.word_embeddings
        # An accelerator would be waited for to count the rows.
        words.sparse = (
            process.device.type == "cpu" and precision.takes_sparse_gradients and _meets_few(plan, len(words.weight))
        )
        self.bare_model, self.model = model, self._distributed(precision.prepare(model, self.optimizer))
        self.outcome = Outcome()
        self.metric: float | None = None  # of the latest evaluation
        self._first_bad: tuple[Tensor, tuple[str, ...]] | None = None  # [step, terms of its loss]; step 0 is none
        self._saved_at = time.monotonic()

    def run(self, state: State | None = None) -> Outcome:
        """Trains to the end; returns what came of it. The model that stays is on the disk.

        Args:
            state: of a run that was stopped; this one goes on from there.

        Raises:
            UserError: the loss is not finite; what was saved before stays.
            Stopped: a signal ended the run; its state is saved.
        """
        meter = self.meter = FpsMeter(self.process, self.total_steps - (state["step"] if state else 0))
        self.model.train()
        if state is not None:
            self._rehearse()
            training_state.restore(self, state)
        progress = Progress(self.title, self.total_steps, self.process.is_main, done=self.outcome.steps)
        if state is not None and state.get("unjudged") is not None:
            epoch, number = divmod(self.outcome.steps - 1, self.plan.steps_per_epoch)
            self._after_step(epoch, number, state["unjudged"][self.process.rank])
        for epoch, number, batches, denominators in self._steps():
            parts = self._learn(batches, denominators)
            self.outcome.steps += 1
            meter.count(denominators.examples)
            progress.advance(partial(self._shown, parts, meter))
            self._after_step(epoch, number, parts)
        progress.close()
        self.outcome.fps, self.outcome.examples, self.outcome.seconds = meter.fps(), meter.examples, meter.paused
        self.outcome.skipped = self.precision.skipped
        return self.outcome

    def _after_step(self, epoch: int, number: int, parts: Mapping[str, float | Tensor]) -> None:
        """What is due after a step: a look at its loss, an evaluation, a line, a saving; or the run's end by a signal.

        Args:
            epoch, number: the step's, as of `_steps`.
            parts: this process's, of its loss.
        """
        last = self.outcome.steps == self.total_steps
        looks = last or self.outcome.steps % self.schedule.eval_step == 0
        tells = last or self.outcome.steps % self.schedule.output_txt_step == 0
        if looks or tells or self.process.device.type == "cpu":
            self._stop_if_not_finite()
        if looks:
            try:
                self._look(self.meter, last)
            except Interrupted:
                self._keep(self.meter, rests=True, unjudged=parts)
        if tells:
            self._write_line(epoch, number, parts, self.meter.fps())
        if not last:
            self._keep(self.meter, rests=looks or number + 1 == self.plan.steps_per_epoch)

    def _rehearse(self) -> None:
        """Of a resumed run of several processes, a step that moves nothing.

        After its first step the wrapper orders gradients anew in the buffers that are exchanged, and their place there
        decides in which order more than two processes' are summed.
        """
        if not isinstance(self.model, DistributedDataParallel):
            return
        step = next(self.plan.epoch(0))
        batch = self.stage.fetch(self.plan.collator.collate(self.features, step.micro_batches[-1]))
        with self.precision.autocast():
            terms = self.stage.losses(self.model, batch.to(self.process.device), step.denominators)
        torch.stack(list(terms.values())).sum().backward()
        self.bare_model.zero_grad()

    def _steps(self) -> Iterator[tuple[int, int, list[Batch], LossDenominators]]:
        """Every step of the run: its epoch, its number in the epoch, its batches, the totals of its losses."""

        def collate(step: Step) -> tuple[list[Batch], LossDenominators]:
            collated = (self.plan.collator.collate(self.features, part) for part in step.micro_batches)
            batches = [self.stage.fetch(batch) for batch in collated]
            return [batch.pinned() for batch in batches] if pins else batches, step.denominators

        pins = self.process.device.type == "cuda"

        left = self.total_steps - self.outcome.steps
        epoch, done = divmod(self.outcome.steps, self.plan.steps_per_epoch)
        while left:
            steps = islice(self.plan.epoch(epoch), done, None)
            for number, (batches, denominators) in enumerate(
                prefetch(collate, steps, self.schedule.workers), start=done
            ):
                yield epoch, number, batches, denominators
                left -= 1
                if not left:
                    return
            epoch, done = epoch + 1, 0

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

    def _learn(self, batches: list[Batch], denominators: LossDenominators) -> dict[str, Tensor]:
        """One optimizer step over its micro-batches; returns this process's part of each term of its loss.

        They stay on the device, which is not waited for: only who reads them waits.
        """
        self.optimizer.zero_grad()
        parts: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else self._without_sync():
                with self.precision.autocast():
                    terms = self.stage.losses(self.model, batch.to(self.process.device), denominators)
                    loss = torch.stack(list(terms.values())).sum()
                # The wrapper divides the sum of the processes' gradients by their number.
                self.precision.backward(loss * self.process.world_size, last)
            for name, term in terms.items():
                parts[name] = parts[name] + term.detach() if name in parts else term.detach()
        if not self.precision.synchronizes:
            self._note_first_bad(self.precision.step_async(self.optimizer), parts)
        elif not self.precision.step(self.optimizer):
            self._stop_unless_overflow(parts)
        return parts

    def _shown(self, parts: dict[str, Tensor], meter: FpsMeter) -> dict[str, str]:
        # Of the other processes' parts no more is known here than that they are alike.
        loss = self.process.world_size * sum(map(float, parts.values()))
        return {"loss": f"{loss:.4f}", "FPS": f"{meter.fps():.1f}"}

    def _note_first_bad(self, skipped: Tensor, parts: dict[str, Tensor]) -> None:
        """Remembers, on the device, the first step that moved nothing and its loss; `_stop_if_not_finite` reads it."""
        noted = torch.stack([skipped * (self.outcome.steps + 1), *parts.values()])
        if self._first_bad is None:
            self._first_bad = noted, tuple(parts)
        else:
            known, names = self._first_bad
            self._first_bad = torch.where(known[0] > 0, known, noted), names

    def _stop_if_not_finite(self) -> None:
        """Ends the run, in every process, if since the last look a step was found to have no finite gradient."""
        if self._first_bad is None:
            return
        (step, *values), names = self._first_bad[0].cpu().tolist(), self._first_bad[1]
        self._first_bad = None
        if step > 0:
            self._stop(int(step), self._over_all_processes(dict(zip(names, values, strict=True))))

    def _without_sync(self) -> AbstractContextManager[None]:
        """A micro-batch that does not end a step keeps its gradients to this process."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else contextlib.nullcontext()

    def _over_all_processes(self, parts: Mapping[str, float | Tensor]) -> dict[str, float]:
        gathered = self.process.gather({name: float(part) for name, part in parts.items()})
        return {name: sum(part[name] for part in gathered) for name in parts}

    def _stop_unless_overflow(self, own_parts: dict[str, Tensor]) -> None:
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
        self._stop(self.outcome.steps + 1, parts)

    def _stop(self, step: int, parts: dict[str, float]) -> NoReturn:
        finite = math.isfinite(sum(parts.values()))
        terms = ", ".join(f"{name} {value:g}" for name, value in parts.items())
        raise UserError(
            f"step {step}: {'a gradient' if finite else 'the loss'} is not finite ({terms}); "
            "what was saved before stays. A lower --learning_rate may help"
        )

    def _look(self, meter: FpsMeter, last: bool) -> None:
        """Judges the model where the stage has a metric, and saves it where it is to stay."""
        if self.stage.by_metric:
            with meter.pause("evaluation"):
                self.metric = self.judge(self.outcome.steps)
            keep = self.metric > self.outcome.best
            if keep:
                self.outcome.best, self.outcome.best_step = self.metric, self.outcome.steps
        else:
            keep = last or time.monotonic() - self._saved_at > SECONDS_BETWEEN_SAVES
        if keep:
            with meter.pause("saving"):
                self.save(self.outcome)
            self._saved_at = time.monotonic()

    def _keep(self, meter: FpsMeter, rests: bool, unjudged: Mapping[str, float | Tensor] | None = None) -> None:
        """Saves the state where it is time to, or a signal ends the run.

        Args:
            unjudged: the parts of the step's loss, where a signal has broken off the evaluation after it: then it ends
                the run, and the one that goes on from there makes that evaluation.
        """
        if self.keeper is None:
            return
        wanted, signal = self.keeper.wants(self.outcome.steps, rests)
        if wanted or signal:
            self._stop_if_not_finite()
            seconds = meter.seconds()
            with meter.pause("saving"):
                self.keeper.save(training_state.gather(self, seconds, unjudged))
        if signal:
            raise Stopped(signal, f"after step {self.outcome.steps} of {self.total_steps}")

    def _write_line(self, epoch: int, number: int, own_parts: Mapping[str, float | Tensor], fps: float) -> None:
        parts = self._over_all_processes(own_parts)
        self.log.line(epoch, number, fps, self.metric)
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
