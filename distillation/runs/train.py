"""Train a model: fine-tuning, and both stages of distillation. `train` reads from the flags to the finished run."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from data_processing.cache import digest
from data_processing.features import load_features
from data_processing.tasks import augmentation_command
from distillation.checkpoints.checkpoint import Checkpointer
from distillation.checkpoints.folder_state import check_writable
from distillation.checkpoints.outputs import copy_outputs
from distillation.checkpoints.run_record import describe_run
from distillation.evaluation import DevSets, Predictor, evaluate_logits, make_predictor, warn_of_chance
from distillation.models import (
    LoadedModel,
    check_lengths,
    check_same_heads,
    check_same_vocabulary,
    choose_case,
    load_complete,
    load_for_training,
    warn_of_changed_weights,
)
from distillation.options import Options, Stage
from distillation.runtime.device import Process, local_rank_zero_first, seed_process
from distillation.runtime.logs import RunLog, clock
from distillation.runtime.signals import Signals, Stopped
from distillation.runtime.timings import Timings
from distillation.teacher.cached_states import load_or_compute_states
from distillation.teacher.query import TeacherQuery, weights_digest
from distillation.teacher.teacher import Teacher, load_or_compute_logits, load_or_compute_training_logits
from distillation.training.losses import choose_layer_map
from distillation.training.stages import FineTuning, IntermediateStage, PredictionStage, TrainingStage
from distillation.training.trainer import Datasets, Outcome, Trainer, steps_of_run
from transformer.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """The models of a run.

    teacher: None in fine-tuning. trained: the model being trained: the student, or in fine-tuning the later teacher.
    """

    teacher: LoadedModel | None
    trained: LoadedModel

    @cached_property
    def teacher_digest(self) -> str:
        """A digest of the teacher's weights; read it before a precision casts them."""
        return "" if self.teacher is None else weights_digest(self.teacher.model)


def train(options: Options, process: Process, signals: Signals | None = None, timings: Timings | None = None) -> None:
    """Train a model as one process of the run.

    Everything that the user gave is read and checked first; only then is anything written.

    Args:
        signals: those sent to this process.
        timings: collects the seconds of each part of the run.

    Raises:
        UserError: something that the flags name cannot be used.
        Stopped: a signal ended the run, which can be resumed.
    """
    signals, timings = signals or Signals(), timings or Timings()
    seed_process(options.seed, 0)  # new weights are the same in every process
    with process.raise_on_all_ranks(), timings.part("models"):
        if process.is_main:
            check_writable(options, process.world_size)
        models = load_models(options)
    with timings.part("tokenizing"):
        data = local_rank_zero_first(process, partial(load_datasets, options, models))
    predictor = make_predictor(options, models.trained.tokenizer.pad_token_id, process)
    with process.raise_on_all_ranks():
        record = _describe(options, process, models, data, predictor.precision.name) if process.is_main else {}
    with Checkpointer(options, process, signals, record) as checkpointer:
        if checkpointer.is_finished:
            logger.info("%s: this run has ended already; there is nothing left to train", options.output_dir)
        else:
            with RunLog(options.fps_acc_dir, options.log_name(process.world_size), process, checkpointer.run_id) as log:
                _log_settings(options, process, models, data, predictor.precision.name)
                models.trained.model.to(process.device)
                teacher = prepare_teacher(models, data, options, predictor, checkpointer, log, timings)
                stage = make_stage(options, models, teacher)
                seed_process(options.seed, process.rank)  # each process draws its own dropout
                trainer = Trainer(models.trained, stage, data, options, predictor, log, timings)
                trainer.load_state_dict(checkpointer.state)
                if checkpointer.state is not None:
                    log.record("resume", step=checkpointer.state["step"])
                with signals.held(_announce_stop if process.is_main else lambda: None):
                    outcome = trainer.fit(checkpointer)
                    _log_outcome(options, outcome, data.dev, log)
                    best = outcome.best_record(options.task)
                    checkpointer.finish(steps=outcome.steps, skipped=outcome.skipped, best=best)
    if signals.received:  # too late to stop a step; but whatever follows this command must not start
        copies = "; the same command with --resume copies it to --data_url" if options.data_url else ""
        raise Stopped(signals.received, f"when the run had ended{copies}")
    if options.performance:
        logger.info("End performance testing. Ready to exit.")
    if options.data_url and process.is_main:
        copy_outputs(options.output_dir, options.data_url, options.task)
        logger.info("%s: copied to --data_url %s", options.output_dir, options.data_url)


def load_models(options: Options) -> Models:
    """Load the teacher, where the stage has one, and the model to train; check that they fit each other and the task.

    Raises:
        UserError: a file is missing or broken, or they do not fit.
    """
    assert options.teacher_model is not None  # the options check this
    task, lower = options.task, choose_case(options.do_lower_case, (options.student_model, options.teacher_model))
    transfer = options.transfer_learning
    if options.stage is Stage.FINETUNE:
        trained = load_for_training(
            options.teacher_model, task, lower, transfer_learning=transfer, head=options.teacher_head
        )
        models = Models(None, trained)
    else:
        assert options.student_model is not None
        teacher = load_complete(options.teacher_model, task, lower, options.teacher_head, "the teacher")
        size = teacher.model.config.hidden_size if options.stage is Stage.INTERMEDIATE else 0
        trained = load_for_training(options.student_model, task, lower, teacher_size=size, transfer_learning=transfer)
        models = Models(teacher, trained)
        check_same_vocabulary(teacher, trained)
        check_lengths(teacher.model.config, teacher.folder, task, options.max_seq_length)
        if options.stage is Stage.INTERMEDIATE:
            if "attention" in options.losses:
                check_same_heads(teacher, trained)
            _layer_map(options, models)
        teacher.model.eval().requires_grad_(False)
    check_lengths(trained.model.config, trained.folder, task, options.max_seq_length)
    return models


def load_datasets(options: Options, models: Models) -> Datasets:
    """Read and tokenize the training set and the dev sets, or load them from the cache.

    Raises:
        UserError: a file is missing or broken.
    """
    tokenizer = models.trained.tokenizer
    path = _training_file(options)
    training_set = load_features(path, options.task, tokenizer, options.max_seq_length, options.cache)
    return Datasets(training_set, DevSets.read(options, tokenizer))


def prepare_teacher(
    models: Models,
    data: Datasets,
    options: Options,
    predictor: Predictor,
    checkpointer: Checkpointer,
    log: RunLog,
    timings: Timings,
) -> Teacher | None:
    """Move the teacher to its device, evaluate it, and cache the outputs that training would compute repeatedly.

    A resumed run does not evaluate it again: the log has the result.
    """
    if models.teacher is None:
        return None
    begins = checkpointer.state is None
    steps_per_epoch = -(-len(data.train) // options.train_batch_size)
    caches_logits = (
        options.stage is Stage.PREDICTION
        and not (options.task.is_regression and options.regression_target == "labels")
        and not options.no_teacher_cache
        and steps_of_run(options, steps_per_epoch) > steps_per_epoch  # otherwise each example is read once
    )
    caches_states = options.stage is Stage.INTERMEDIATE and options.cache_teacher_states
    uses_cache = options.cache.folder is not None and (caches_logits or caches_states or not options.performance)
    weights = models.teacher_digest if uses_cache else ""
    model = models.teacher.model.to(predictor.process.device)
    predictor.precision.prepare_for_inference(model)
    query = TeacherQuery(model, weights, data.train, predictor, options.cache)
    if begins and not options.performance:
        with timings.part("evaluation"):
            _evaluate_teacher(query, data.dev, options, log)
    teacher = Teacher(model, timings=timings)
    begin = time.monotonic()
    with timings.part("teacher cache"):
        if caches_logits:
            teacher = replace(teacher, cached_logits=load_or_compute_training_logits(query))
        if caches_states:
            layers = make_intermediate_stage(options, models, teacher).teacher_layers
            teacher = replace(teacher, cached_states=load_or_compute_states(query, layers))
    if begins and teacher.is_cached:
        log.record("teacher_cache", examples=len(data.train), seconds=time.monotonic() - begin)
    checkpointer.check_teacher(teacher.digest_of_cache())
    return teacher


def make_stage(options: Options, models: Models, teacher: Teacher | None) -> TrainingStage:
    """Return what the flags ask to be trained."""
    regression = options.task.is_regression
    if teacher is None:
        return FineTuning(regression)
    if options.stage is Stage.PREDICTION:
        return PredictionStage(teacher, options.temperature, options.regression_target if regression else None)
    return make_intermediate_stage(options, models, teacher)


def make_intermediate_stage(options: Options, models: Models, teacher: Teacher) -> IntermediateStage:
    """Return the stage of attention scores, hidden states and embeddings that the flags describe."""
    return IntermediateStage(teacher, _layer_map(options, models), options.padding == "max_length", options.losses)


def _layer_map(options: Options, models: Models) -> tuple[int, ...]:
    assert models.teacher is not None  # the stage has one
    layers = models.trained.model.config.num_hidden_layers, models.teacher.model.config.num_hidden_layers
    return choose_layer_map(options.layer_map, *layers)


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


def _describe(options: Options, process: Process, models: Models, data: Datasets, precision: str) -> dict[str, Any]:
    """Return the run's record, with digests of all that it reads; warn of models that changed since they were saved."""
    digests = {"the training set": digest(**vars(data.train))}
    digests |= {name: digest(**vars(features)) for name, features in data.dev.features.items()}
    trained = models.trained
    if models.teacher is not None:
        digests["the teacher"] = digest(config=models.teacher.model.config.to_json(), weights=models.teacher_digest)
    digests["the model that is trained"] = digest(
        config=trained.model.config.to_json(), weights=weights_digest(trained.model)
    )
    record = describe_run(options, process, digests, precision)
    for loaded in (models.teacher, trained):
        if loaded is not None:
            warn_of_changed_weights(loaded.folder, record["sha256"])
    return record


def _evaluate_teacher(query: TeacherQuery, dev: DevSets, options: Options, log: RunLog) -> None:
    """Log the teacher's result on each dev file, from cached logits unless --no_teacher_cache."""
    if options.no_teacher_cache:
        results = dev.evaluate(query.model, query.predictor)
    else:
        results = {}
        for name, features in dev.features.items():
            logits, seconds = load_or_compute_logits(query.on(features))
            results[name] = evaluate_logits(logits, features, options.task, seconds)
    for name, result in results.items():
        logger.info("the teacher's own %s", result.summary(name))
        log.record("teacher", file=name, **result.metrics)
        value = result.metrics[options.task.metric.chosen_by]
        advice = (
            f"is it a model of {options.task.name}? If its outputs are in another order, name them in id2label of its "
            "config.json (README, Teachers from elsewhere)"
        )
        warn_of_chance(f"{options.teacher_model}: the teacher", name, value, dev.features[name], options.task, advice)


def _log_settings(options: Options, process: Process, models: Models, data: Datasets, precision: str) -> None:
    logger.info(
        "%s of %s on %s in %s%s: %d examples of %.1f tokens, batch %d, %g epoch%s",
        options.stage.value,
        options.task.name,
        process.device,
        precision,
        f" in {process.world_size} processes" if process.world_size > 1 else "",
        len(data.train),
        data.train.lengths.mean(),
        options.train_batch_size,
        options.num_train_epochs,
        "" if options.num_train_epochs == 1 else "s",
    )
    for name, loaded in (("the teacher", models.teacher), ("the model that is trained", models.trained)):
        if loaded is not None:
            config, parameters = loaded.model.config, sum(tensor.numel() for tensor in loaded.model.parameters())
            shape = config.num_hidden_layers, config.hidden_size, parameters / 1e6
            logger.info("%s: %d layers, hidden %d, %.3g million parameters", name, *shape)


def _log_outcome(options: Options, outcome: Outcome, dev: DevSets, log: RunLog) -> None:
    best = outcome.best_record(options.task)
    if best is not None:
        logger.info(
            "best %s %.4f (%s chose the checkpoint of step %d)",
            best["metric"],
            best["value"],
            best["chosen_on"],
            best["step"],
        )
        if options.stage is Stage.FINETUNE:
            name, advice = (
                best["chosen_on"],
                "train longer, or with another --learning_rate; compare the labels of the files",
            )
            warn_of_chance("the fine-tuned model", name, best["value"], dev.features[name], options.task, advice)
    if outcome.skipped:
        logger.info("%d steps were skipped because a gradient overflowed", outcome.skipped)
    paused = ", ".join(f"{name} {clock(seconds)}" for name, seconds in outcome.seconds.items() if seconds >= 1)
    aside = paused and f"; not counted as training: {paused}"
    logger.info("%d steps, FPS %.2f%s", outcome.steps, outcome.fps, aside)
    log.record(
        "end",
        steps=outcome.steps,
        fps=outcome.fps,
        fps_examples=outcome.examples,
        best=None if best is None else best["value"],
        seconds_aside=outcome.seconds,
        skipped=outcome.skipped,
    )
    logger.info("the model is in %s", options.output_dir)


def _announce_stop() -> None:
    with contextlib.suppress(OSError):  # nobody reads the output any more
        clear = b"\r\x1b[2K" if os.isatty(1) else b""  # of the progress bar
        os.write(1, clear + b"stopping after this step; a second signal ends the run at once\n")  # print may be locked
