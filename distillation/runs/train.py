"""What a process does. Here flags become the parts that train a model; `inference.py` has what uses one.

Everything that the user gave is read and checked first; only then is anything written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from data_processing.batching import TrainingPlan
from data_processing.cache import digest
from data_processing.features import Features, load_features
from data_processing.tasks import augmentation_command
from distillation.checkpoints.outputs import check_can_make, check_output_dir, make_folder, save_model
from distillation.checkpoints.results import check_copy, check_results, copy_outputs, results_files, write_results
from distillation.checkpoints.resume import Found, RunFolder
from distillation.checkpoints.run_record import best_of, describe
from distillation.checkpoints.run_settings import compared, digest_of_states
from distillation.models import (
    LoadedModel,
    check_lengths,
    check_same_heads,
    check_same_vocabulary,
    choose_case,
    load_complete,
    load_learner,
    warn_of_changed_weights,
)
from distillation.options import Options, Stage
from distillation.runs.predict import DevSets, make_collator, precision_of, run_evaluation, run_predictions, shown
from distillation.runs.run_messages import say_outcome, say_settings
from distillation.runtime.device import Process, local_rank_zero_first, seed_process
from distillation.runtime.logs import RunLog, check_logs, log_files
from distillation.runtime.precision import Precision
from distillation.runtime.signals import Signals, Stopped
from distillation.teacher.teacher import Teacher, keep_states, load_or_compute_logits, weights_digest
from distillation.training.losses import choose_layer_map
from distillation.training.stages import FineTuning, IntermediateStage, PredictionStage, TrainingStage, freeze_unused
from distillation.training.trainer import Outcome, Schedule, Trainer
from transformer.errors import UserError

logger = logging.getLogger(__name__)


def run(options: Options, process: Process, signals: Signals | None = None) -> None:
    """Does what the flags ask for, as one process of the run.

    Args:
        signals: those that are sent to this process; None where they are not to end it tidily.

    Raises:
        UserError: what the flags name cannot be used.
        Stopped: a signal ended the run; one that trained can be resumed.
    """
    seed_process(options.seed, 0)  # new weights are the same in every process
    if options.stage is Stage.EVALUATION:
        run_evaluation(options, process)
    elif options.stage is Stage.PREDICTIONS:
        run_predictions(options, process)
    else:
        _train(options, process, signals or Signals())
    if options.data_url and process.is_main:
        copy_outputs(options.output_dir, options.data_url, options.task)


def _train(options: Options, process: Process, signals: Signals) -> None:
    """Trains, where there is something left to do."""
    with process.raise_on_all_ranks():
        found = Found.look(options.output_dir)
        check_places(options, process, found)
        models = _models(options)
    parts = local_rank_zero_first(process, lambda: TrainingParts.read(options, models))
    precision = precision_of(options, process)
    goes_on = options.resume and found.has_run
    run = {}
    with process.raise_on_all_ranks():
        if process.is_main:
            run = describe(options, process) | {
                "compared": compared(process, precision.name, options.task, parts.digests())
            }
            for loaded in models:
                if loaded is not None:
                    warn_of_changed_weights(loaded.folder, run["sha256"])
            if goes_on:
                found.check(run)
    folder = RunFolder(options.output_dir, process, signals, options.save_steps)
    if process.broadcast(goes_on and found.finished is not None):
        logger.info("%s: this run has ended already, there is nothing to go on with", options.output_dir)
        if options.data_url:
            logger.info("%s: all is copied to --data_url %s", options.output_dir, options.data_url)
        folder.remove()  # of a run that was killed in its last moment
        return
    try:
        with process.raise_on_all_ranks():
            if process.is_main:
                make_folder(options.output_dir, "--output_dir")
                words = folder.begin(found, goes_on, run, _logs(options, process))
                if options.resume and not goes_on:
                    words = [f"{options.output_dir}: nothing to go on from, so the run begins"]
                for line in words:
                    logger.info(line)
            log = RunLog(options.fps_acc_dir, options.log_name(process.world_size), process, folder.journal)
        folder.share()
        with log:
            _teach(options, process, parts, log, precision, folder)
    except UserError:
        folder.forget_unless_saved(and_lines=False)  # they may show what went wrong
        raise
    except (Exception, Stopped):
        folder.forget_unless_saved(and_lines=True)
        raise
    finally:
        folder.close()
    if options.performance:
        logger.info("End performance testing. Ready to exit.")


def _logs(options: Options, process: Process) -> tuple[Path, ...]:
    """The files that a run that trains appends its lines to."""
    metrics = results_files(options.output_dir, options.task).values()
    return (*log_files(options.fps_acc_dir, options.log_name(process.world_size)), *metrics)


@dataclass(frozen=True)
class TrainingParts:
    """What a training run reads: the models, the stage's loss, the training and dev sets."""

    teacher: LoadedModel | None
    learner: LoadedModel
    stage: TrainingStage
    features: Features
    dev: DevSets

    @classmethod
    def read(cls, options: Options, models: tuple[LoadedModel | None, LoadedModel]) -> TrainingParts:
        """Reads and checks the data for these models; writes nothing but the cache.

        Raises:
            UserError: part of it is missing, broken, or does not fit the rest.
        """
        teacher, learner = models
        stage = _stage(options, teacher, learner)
        check_lengths(learner.model.config, learner.folder, options.task, options.max_seq_length)
        reading = options.task, learner.tokenizer, options.max_seq_length, options.cache
        features = load_features(_training_file(options), *reading)
        return cls(teacher, learner, stage, features, DevSets.read(options, learner.tokenizer))

    def digests(self) -> dict[str, str]:
        """What the run reads, by what it is: of the texts their tokens and labels, of the models all that counts."""
        texts = {"the training set": self.features, **self.dev.features}
        models = {"the teacher": self.teacher, "the model that is trained": self.learner}
        return {
            **{name: digest(**vars(features)) for name, features in texts.items()},
            **{
                name: digest(config=loaded.model.config.to_json(), weights=weights_digest(loaded.model))
                for name, loaded in models.items()
                if loaded is not None
            },
        }


def check_places(options: Options, process: Process, found: Found | None = None) -> None:
    """Checks, and makes nothing, that the run may write where it is to.

    Args:
        found: what is in the output folder already, where that is known.

    Raises:
        UserError: it may not.
    """
    if not process.is_main:  # to the others the folder may already be this run's own
        return
    found = Found.look(options.output_dir) if found is None else found
    if options.resume and found.finished is not None:  # nothing else will be written
        check_copy(options, has_ended=True)
        return
    sources = options.teacher_model, options.student_model, options.data_dir
    may_write = options.overwrite_output_dir or found.is_empty or (options.resume and found.has_run)
    hint = ""
    if options.resume:
        hint = "; it holds no run that was stopped, for --resume to go on with"
        if found.damaged is not None:
            hint = f"; --resume cannot go on with the run that was stopped there, since {found.damaged} is damaged"
    elif found.record is not None:
        hint = "; --resume (with the scripts: RESUME=1) goes on with the run that was stopped there"
    check_output_dir(options.output_dir, may_write, sources, hint)
    check_can_make(options.output_dir, "--output_dir")
    check_results(options.output_dir, options.task)
    check_copy(options)
    check_logs(options.fps_acc_dir, options.log_name(process.world_size))


def _teach(
    options: Options, process: Process, parts: TrainingParts, log: RunLog, precision: Precision, folder: RunFolder
) -> None:
    learner, stage, dev = parts.learner, parts.stage, parts.dev
    state = folder.state
    collator = make_collator(options, learner, precision)
    plan = TrainingPlan(
        parts.features.lengths,
        options.train_batch_size,
        collator,
        options.seed,
        options.gradient_accumulation_steps,
        process.rank,
        process.world_size,
        options.group_by_length,
    )
    schedule = _schedule(options)
    learner.model.to(process.device)
    freeze_unused(learner.model, stage.unused)
    say_settings(options, process, parts.features, learner.model)
    if parts.teacher is not None:
        asked_once = (
            isinstance(stage, PredictionStage)
            and stage.regression_target != "labels"
            and not options.no_teacher_cache
            and schedule.total_steps(plan.steps_per_epoch) > plan.steps_per_epoch
        )
        keeps_states = isinstance(stage, IntermediateStage) and options.cache_teacher_states
        remembers = options.cache.folder is not None and (asked_once or keeps_states or not options.performance)
        weights = weights_digest(parts.teacher.model) if remembers else ""
        teacher = parts.teacher.model.to(process.device)
        precision.prepare_for_inference(teacher)
        judged_teacher = {}
        judges_teacher = not options.performance and state is None  # otherwise the logs have it
        if options.no_teacher_cache and judges_teacher:
            judged_teacher = dev.judge(teacher, collator, process, precision)
        elif judges_teacher:
            judged_teacher = dev.evaluate_teacher(teacher, weights, collator, options, process, precision)
        for name, judged in judged_teacher.items():
            logger.info("the teacher's own %s", shown(name, judged))
            log.record("teacher", file=name, **judged.metrics)
        if asked_once:
            assert isinstance(stage, PredictionStage)
            begin = time.monotonic()
            logits = load_or_compute_logits(teacher, weights, parts.features, collator, options, process, precision)
            if state is None:
                log.record("teacher_asked_once", examples=len(logits), seconds=time.monotonic() - begin)
            stage = replace(stage, teacher=Teacher(teacher, logits))
            folder.teacher = digest(logits=logits.cpu().numpy())
        if keeps_states:
            assert isinstance(stage, IntermediateStage)
            begin = time.monotonic()
            kept = keep_states(
                teacher, weights, parts.features, collator, stage.taught_layers, options, process, precision
            )
            if kept is not None:
                if state is None:
                    log.record("teacher_asked_once", examples=len(parts.features), seconds=time.monotonic() - begin)
                stage = replace(stage, teacher=Teacher(teacher, kept=kept))
                folder.teacher = digest_of_states(kept, parts.features, collator)

    def judge(step: int) -> float:
        results = dev.judge(learner.model, collator, process, precision, lambda: bool(folder.signals.received))
        for name, judged in results.items():
            logger.info("step %d: %s", step, shown(name, judged))
            log.record("eval", file=name, step=step, **judged.metrics)
        if process.is_main:
            write_results(options.output_dir, options.task, results, folder.journal, global_step=step)
        return results[options.task.dev_files[0]].metrics[options.task.metric.chosen_by]

    def save(so_far: Outcome) -> None:
        if process.is_main:
            folder.check_is_own()
            weights = precision.weights(learner.model)
            save_model(options.output_dir, learner.model.config, weights, learner.tokenizer)
            folder.write_run(step=so_far.steps, best=best_of(so_far, options.task))

    seed_process(options.seed, process.rank)  # from here on each process draws its own dropout
    trainer = Trainer(
        learner.model,
        stage,
        parts.features,
        plan,
        schedule,
        process,
        precision,
        log,
        judge,
        save,
        title=options.stage.value,
        keeper=folder,
    )
    if state is not None:
        if process.is_main and state["teacher"] != folder.teacher:
            logger.warning(
                "the teacher's answers are not those that this run began with; its weights may differ from those of a "
                "run that was not stopped"
            )
        log.record("resume", step=state["step"])
    try:
        with folder.signals.held(_tell_first if process.is_main else lambda: None):
            outcome = trainer.run(state)
            say_outcome(options, outcome, log)
            with process.raise_on_all_ranks():  # one that ends by a signal would end the others too
                if process.is_main:
                    best = best_of(outcome, options.task)
                    folder.end(steps=outcome.steps, skipped=outcome.skipped, best=best)
    except Stopped as error:
        raise Stopped(error.number, f"{error.where}; the same command with --resume goes on from there") from None
    if folder.signals.received:  # too late for a step: what comes after this command is not to begin
        copies = "; the same command with --resume copies it to --data_url" if options.data_url else ""
        raise Stopped(folder.signals.received, f"when the run had ended{copies}")


def _tell_first() -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(1, b"stopping after this step; once more ends at once\n")  # a handler may not wait for print's lock


def _models(options: Options) -> tuple[LoadedModel | None, LoadedModel]:
    """The teacher, where there is one, and the model that is trained."""
    assert options.teacher_model is not None  # the options' own check
    lower = choose_case(options.do_lower_case, (options.student_model, options.teacher_model))
    if options.stage is Stage.FINETUNE:
        learner = load_learner(
            options.teacher_model,
            options.task,
            lower,
            transfer_learning=options.transfer_learning,
            head=options.teacher_head,
        )
        return None, learner
    assert options.student_model is not None
    teacher = load_complete(options.teacher_model, options.task, lower, options.teacher_head, "the teacher")
    learner = load_learner(
        options.student_model,
        options.task,
        lower,
        teacher_size=teacher.model.config.hidden_size if options.stage is Stage.INTERMEDIATE else 0,
        transfer_learning=options.transfer_learning,
    )
    check_same_vocabulary(teacher, learner)
    check_lengths(teacher.model.config, teacher.folder, options.task, options.max_seq_length)
    return teacher, learner


def _stage(options: Options, teacher: LoadedModel | None, learner: LoadedModel) -> TrainingStage:
    regression = options.task.is_regression
    if teacher is None:
        return FineTuning(regression)
    asked = Teacher(teacher.model.eval().requires_grad_(False))
    if options.stage is Stage.PREDICTION:
        return PredictionStage(asked, options.temperature, options.regression_target if regression else None)
    if "attention" in options.losses:
        check_same_heads(teacher, learner)
    layers = learner.model.config.num_hidden_layers, teacher.model.config.num_hidden_layers
    layer_map = choose_layer_map(options.layer_map, *layers)
    return IntermediateStage(asked, layer_map, options.padding == "max_length", options.losses)


def _training_file(options: Options) -> Path:
    name = options.task.augmented_file if options.aug_train else options.task.train_file
    path = options.data_dir / name
    if not options.data_dir.is_dir():
        raise UserError(f"{options.data_dir}: no such folder; --data_dir holds {name} and the task's dev file")
    if options.aug_train and not path.is_file():
        raise UserError(
            f"{path}: not found; leave out --aug_train (with the scripts: AUG_TRAIN=0) to use "
            f"{options.task.train_file}, or make it: {augmentation_command(options.task, options.data_dir)}"
        )
    return path


def _schedule(options: Options) -> Schedule:
    return Schedule(
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_proportion=options.warmup_proportion,
        num_train_epochs=options.num_train_epochs,
        eval_step=options.eval_step,
        output_txt_step=options.output_txt_step,
        workers=options.workers,
        performance=options.performance,
    )
