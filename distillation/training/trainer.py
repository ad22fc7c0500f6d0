"""The training loop: one for both stages of distillation and for fine-tuning.

`Trainer.fit` is the loop; `state_dict` and `load_state_dict` hold everything that the next step depends on. The
position in the data follows from the number of steps, since the order is a function of seed and epoch.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_processing.batching import Batch, LossDenominators, Step, TrainingPlan, prefetch
from data_processing.features import Features
from data_processing.tasks import Task
from distillation.checkpoints.checkpoint import Checkpointer
from distillation.checkpoints.folder_state import CHECKPOINT_NAME, reading_checkpoint
from distillation.checkpoints.outputs import write_results
from distillation.evaluation import DevSets, Interrupted, Predictor
from distillation.models import LoadedModel
from distillation.options import Options
from distillation.runtime.logs import FpsMeter, Progress, RunLog
from distillation.runtime.random_state import get_random_state, set_random_state
from distillation.runtime.signals import Stopped
from distillation.runtime.timings import Timings
from distillation.training.finite_check import FiniteCheck, sum_over_processes
from distillation.training.stages import TrainingStage, freeze_unused
from transformer.optimization import BertAdam, decay_groups

logger = logging.getLogger(__name__)

PERFORMANCE_STEPS = 1000
# A stage without a metric keeps its newest weights; writing them more often would only cost time.
SECONDS_BETWEEN_SAVES = 60.0


@dataclass(frozen=True)
class Datasets:
    """The tokenized training set and dev sets."""

    train: Features
    dev: DevSets


@dataclass
class Outcome:
    """The result of a run.

    best, best_step: the metric that chose the checkpoint, and its step. fps, examples: see `FpsMeter`.
    seconds: spent outside training, by purpose. skipped: steps whose gradients overflowed.
    """

    best: float = -math.inf
    best_step: int = 0
    steps: int = 0
    fps: float = 0.0
    examples: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: int = 0

    def best_record(self, task: Task) -> dict[str, Any] | None:
        """Return the metric that chose the checkpoint, for run.json; None if none did."""
        if not self.best_step:
            return None
        chosen = {"metric": task.metric.chosen_by, "value": self.best, "step": self.best_step}
        return {**chosen, "chosen_on": task.dev_files[0]}


class Trainer:
    """Trains a model on batches of the training set, evaluates it, and saves it.

    Args:
        loaded: its model is on the process's device.
        stage: the loss and the learning-rate schedule.
        predictor: how evaluations run; its precision, not prepared yet, is that of the training.
        timings: collects the seconds of each part of a step.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        stage: TrainingStage,
        data: Datasets,
        options: Options,
        predictor: Predictor,
        log: RunLog,
        timings: Timings | None = None,
    ) -> None:
        self.loaded, self.stage, self.data, self.options, self.log = loaded, stage, data, options, log
        self.predictor, self.process, self.precision = predictor, predictor.process, predictor.precision
        self.timings = timings or Timings()
        self.plan = TrainingPlan(
            data.train.lengths,
            options.train_batch_size,
            predictor.collator,
            options.seed,
            options.gradient_accumulation_steps,
            self.process.rank,
            self.process.world_size,
            options.group_by_length,
        )
        self.total_steps = steps_of_run(options, self.plan.steps_per_epoch)
        model = self.bare_model = loaded.model
        freeze_unused(model, stage.unused)
        self.optimizer = BertAdam(
            decay_groups(model, options.weight_decay),
            lr=options.learning_rate,
            warmup=options.warmup_proportion,
            t_total=steps_of_stage(options, self.plan.steps_per_epoch),
            schedule=stage.schedule,
        )
        words = model.bert.embeddings.word_embeddings
        # An accelerator would have to be synchronized to count the rows.
        words.sparse = (
            self.process.device.type == "cpu"
            and self.precision.takes_sparse_gradients
            and has_few_words_per_step(self.plan, len(words.weight))
        )
        self.model = self._wrap_in_ddp(self.precision.prepare(model, self.optimizer))
        self.finite_check = FiniteCheck(self.process, self.precision)
        self.outcome = Outcome()
        self.meter = FpsMeter(self.process)
        self.metric: float | None = None  # of the latest evaluation
        self._unevaluated: dict[str, float] | None = None  # a resumed step's loss terms, if its evaluation is due
        self._saved_at = time.monotonic()

    def fit(self, checkpointer: Checkpointer) -> Outcome:
        """Train to the end; the model that is kept is on the disk.

        Raises:
            UserError: the loss is not finite; what was saved before stays.
            Stopped: a signal ended the run; its checkpoint is saved.
        """
        self.model.train()
        self.timings.steps_done(self.outcome.steps)
        self.meter.start(self.total_steps - self.outcome.steps)
        progress = Progress(self.options.stage.value, self.total_steps, self.process.is_main, done=self.outcome.steps)
        if self._unevaluated is not None:
            epoch, number = divmod(self.outcome.steps - 1, self.plan.steps_per_epoch)
            self._finish_step(epoch, number, self._unevaluated, checkpointer)
        for epoch, number, batches, denominators in self._steps():
            loss_terms = self.train_step(batches, denominators)
            self.outcome.steps += 1
            self.meter.count(denominators.examples)
            self.timings.steps_done(self.outcome.steps)
            progress.advance(partial(self._progress_values, loss_terms))
            self._finish_step(epoch, number, loss_terms, checkpointer)
        progress.close()
        self.outcome.fps, self.outcome.examples, self.outcome.seconds = (
            self.meter.fps(),
            self.meter.examples,
            self.meter.paused,
        )
        self.outcome.skipped = self.precision.skipped
        return self.outcome

    def train_step(self, batches: list[Batch], denominators: LossDenominators) -> dict[str, Tensor]:
        """Take one optimizer step over its micro-batches; return this process's share of each loss term.

        The terms stay on the device, which is synchronized only when they are read.
        """
        self.optimizer.zero_grad()
        loss_terms: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else self._without_sync():
                with self.timings.part("student"), self.precision.autocast():
                    terms = self.stage.losses(self.model, batch.to(self.process.device), denominators)
                    loss = torch.stack(list(terms.values())).sum()
                # DDP divides the sum of the processes' gradients by their number.
                with self.timings.part("backward"):
                    self.precision.backward(loss * self.process.world_size, last)
            for name, term in terms.items():
                loss_terms[name] = loss_terms[name] + term.detach() if name in loss_terms else term.detach()
        with self.timings.part("optimizer"):
            if not self.precision.synchronizes:
                self.finite_check.note(self.outcome.steps + 1, self.precision.step_async(self.optimizer), loss_terms)
            elif not self.precision.step(self.optimizer):
                self.finite_check.raise_unless_overflow(self.outcome.steps + 1, loss_terms)
        return loss_terms

    def evaluate_and_save(self, last: bool, checkpointer: Checkpointer) -> None:
        """Evaluate the model where the stage has a metric; save the model where it is to be kept.

        Raises:
            Interrupted: a signal came during the evaluation.
        """
        if self.stage.by_metric:
            with self.meter.pause("evaluation"), self.timings.part("evaluation"):
                self.metric = self._evaluate(checkpointer)
            keep = self.metric > self.outcome.best
            if keep:
                self.outcome.best, self.outcome.best_step = self.metric, self.outcome.steps
        else:
            keep = last or time.monotonic() - self._saved_at > SECONDS_BETWEEN_SAVES
        if keep:
            with self.meter.pause("saving"), self.timings.part("saving"):
                if self.process.is_main:
                    weights = self.precision.weights(self.bare_model)
                    best = self.outcome.best_record(self.options.task)
                    checkpointer.save_model(self.loaded, weights, step=self.outcome.steps, best=best)
            self._saved_at = time.monotonic()

    def state_dict(self, seconds: float, loss_terms: Mapping[str, float | Tensor] | None = None) -> dict[str, Any]:
        """Return everything that the next step depends on; every process calls this, the main one's is complete.

        Args:
            seconds: of the meter, read before it was paused for this.
            loss_terms: this process's, if the evaluation that is due after the step has not been done.
        """
        terms = None if loss_terms is None else {name: float(term) for name, term in loss_terms.items()}
        state = {
            "step": self.outcome.steps,
            "best": self.outcome.best,
            "best_step": self.outcome.best_step,
            "metric": self.metric,
            "unevaluated": None if terms is None else self.process.gather(terms),
            "examples": self.meter.examples,
            "seconds": seconds,
            "paused": dict(self.meter.paused),
            "precision": self.precision.export_state(),
            "random": self.process.gather(get_random_state(self.process)),
        }
        if self.process.is_main:
            state["weights"] = _on_cpu(self.precision.weights(self.bare_model))
            state["optimizer"] = _on_cpu(self.optimizer.export_state())
        return state

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue from what `state_dict` returned, in a Trainer with the same settings; None: from scratch.

        Raises:
            UserError: the state is not one of this run.
        """
        if state is None:
            return
        self._warm_up_ddp()
        with reading_checkpoint(self.options.output_dir / CHECKPOINT_NAME):
            step, others = state["step"], (state["best_step"], state["optimizer"]["steps_taken"])
            if not 0 < step <= self.total_steps or max(others) > step or min(others) < 0:
                raise ValueError(f"{step}, {others[0]} and {others[1]} of {self.total_steps} steps")
            self.outcome.steps, self.outcome.best = step, state["best"]
            self.outcome.best_step, self.metric = state["best_step"], state["metric"]
            self.meter.resume(state["examples"], state["seconds"], _floats(state["paused"]))
            self.precision.load_weights(self.bare_model, state["weights"])
            self.precision.import_state(state["precision"])
            self.optimizer.import_state(state["optimizer"])
            set_random_state(self.process, state["random"][self.process.rank])
            if state["unevaluated"] is not None:
                self._unevaluated = _floats(state["unevaluated"][self.process.rank])

    def _steps(self) -> Iterator[tuple[int, int, list[Batch], LossDenominators]]:
        """Yield every step that is left: its epoch, its number in the epoch, its batches, its denominators."""
        epoch, done = divmod(self.outcome.steps, self.plan.steps_per_epoch)
        while self.outcome.steps < self.total_steps:
            steps = islice(self.plan.epoch(epoch), done, done + self.total_steps - self.outcome.steps)
            with contextlib.closing(prefetch(self._collate, steps, self.options.workers)) as prefetched:
                for number, step in enumerate(self.timings.iterate("data", prefetched), start=done):
                    yield epoch, number, *step
            epoch, done = epoch + 1, 0

    def _collate(self, step: Step) -> tuple[list[Batch], LossDenominators]:
        batches = [self.stage.prepare(self.plan.collator.collate(self.data.train, part)) for part in step.micro_batches]
        pins = self.process.device.type == "cuda"
        return [batch.pinned() for batch in batches] if pins else batches, step.denominators

    def _finish_step(
        self, epoch: int, number: int, loss_terms: Mapping[str, float | Tensor], checkpointer: Checkpointer
    ) -> None:
        """Do what is due after a step: evaluation, log line, checkpoint, or the end of the run by a signal."""
        last = self.outcome.steps == self.total_steps
        evaluates = last or self._evaluation_is_due(number)
        logs = last or self.outcome.steps % self.options.output_txt_step == 0
        if evaluates or logs or self.process.device.type == "cpu":
            self.finite_check.raise_if_noted()
        if evaluates:
            try:
                self.evaluate_and_save(last, checkpointer)
            except Interrupted:
                self._save_if_due(checkpointer, pauses=True, loss_terms=loss_terms)
        if logs:
            self._write_line(epoch, number, loss_terms)
        if not last:
            self._save_if_due(checkpointer, pauses=evaluates or number + 1 == self.plan.steps_per_epoch)

    def _evaluation_is_due(self, number: int) -> bool:
        """Return whether --eval_step asks for an evaluation, or an epoch ends in which it asked for none."""
        step, every, steps_per_epoch = self.outcome.steps, self.options.eval_step, self.plan.steps_per_epoch
        ends_without = number + 1 == steps_per_epoch and step // every == (step - steps_per_epoch) // every
        return step % every == 0 or (ends_without and not self.options.performance)

    def _evaluate(self, checkpointer: Checkpointer) -> float:
        """Evaluate the model on every dev file; log the results and return the metric that chooses."""
        task, step = self.options.task, self.outcome.steps
        results = self.data.dev.evaluate(self.bare_model, self.predictor, checkpointer.was_signalled)
        for name, result in results.items():
            logger.info("step %d: %s", step, result.summary(name))
            self.log.record("eval", file=name, step=step, **result.metrics)
        if self.process.is_main:
            checkpointer.check_is_own()
            write_results(self.options.output_dir, task, results, global_step=step)
        return results[task.dev_files[0]].metrics[task.metric.chosen_by]

    def _save_if_due(
        self, checkpointer: Checkpointer, pauses: bool, loss_terms: Mapping[str, float | Tensor] | None = None
    ) -> None:
        """Save a checkpoint if it is time, or if a signal ends the run.

        Args:
            pauses: whether an evaluation or an epoch ends here.
            loss_terms: the step's, if a signal interrupted the evaluation after it: the resumed run then does it.
        """
        due, signal = checkpointer.is_due(self.outcome.steps, pauses)
        if due or signal:
            self.finite_check.raise_if_noted()
            seconds = self.meter.seconds()
            with self.meter.pause("saving"), self.timings.part("saving"):
                checkpointer.save(self.state_dict(seconds, loss_terms))
        if signal:
            raise Stopped(
                signal,
                f"after step {self.outcome.steps} of {self.total_steps}; the same command with --resume continues it",
            )

    def _write_line(self, epoch: int, number: int, loss_terms: Mapping[str, float | Tensor]) -> None:
        fps, terms = self.meter.fps(), sum_over_processes(self.process, loss_terms)
        self.log.line(epoch, number, fps, self.metric)
        rate = self.optimizer.rate(self.optimizer.param_groups[0], max(0, self.optimizer.steps_taken - 1))
        values = {"loss": sum(terms.values()), **terms, "learning_rate": rate, "fps": fps}
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if value or name != "fps")
        logger.info("step %d of %d, epoch %d: %s", self.outcome.steps, self.total_steps, epoch + 1, shown)
        self.log.record("train", epoch=epoch, step=self.outcome.steps, **values)

    def _progress_values(self, loss_terms: dict[str, Tensor]) -> dict[str, str]:
        # The other processes' shares are not known here; they are similar.
        loss = self.process.world_size * sum(map(float, loss_terms.values()))
        fps = self.meter.fps()  # 0 in the first steps, which do not count
        return {"loss": f"{loss:.4f}", **({"FPS": f"{fps:.1f}"} if fps else {})}

    def _wrap_in_ddp(self, model: nn.Module) -> nn.Module:
        if self.process.world_size == 1:
            return model
        index = self.process.device.index
        return DistributedDataParallel(
            model,
            device_ids=None if index is None else [index],
            gradient_as_bucket_view=self.precision.bucket_views,
        )

    def _warm_up_ddp(self) -> None:
        """Run one backward pass without an optimizer step, in a resumed run of several processes.

        After its first step DDP reorders the gradients in its buckets, and their place there decides in which order
        the gradients of more than two processes are summed.
        """
        if not isinstance(self.model, DistributedDataParallel):
            return
        self.model.train()
        step = next(self.plan.epoch(0))
        batch = self.stage.prepare(self.plan.collator.collate(self.data.train, step.micro_batches[-1]))
        with self.precision.autocast():
            terms = self.stage.losses(self.model, batch.to(self.process.device), step.denominators)
        torch.stack(list(terms.values())).sum().backward()
        self.bare_model.zero_grad()

    def _without_sync(self) -> AbstractContextManager[None]:
        """Keep the gradients of a micro-batch that does not end a step to this process."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else contextlib.nullcontext()


def steps_of_stage(options: Options, steps_per_epoch: int) -> int:
    """Return the optimizer steps of the whole stage, which the learning-rate schedule spans."""
    return max(1, round(steps_per_epoch * options.num_train_epochs))


def steps_of_run(options: Options, steps_per_epoch: int) -> int:
    """Return the optimizer steps that a run takes; a performance run ends early."""
    steps = steps_of_stage(options, steps_per_epoch)
    return min(steps, PERFORMANCE_STEPS) if options.performance else steps


def has_few_words_per_step(plan: TrainingPlan, words: int) -> bool:
    """Return whether it pays that processes exchange only the embedding rows of the words in a step.

    Each process then receives the others' rows beside its own. The tokens of a step are an upper bound of its words.
    """
    return plan.world_size == 1 or plan.batch_size * float(plan.lengths.mean()) < words


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous()
    if isinstance(value, Mapping):
        return {key: _on_cpu(part) for key, part in value.items()}
    return [_on_cpu(part) for part in value] if isinstance(value, (list, tuple)) else value
