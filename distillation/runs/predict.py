"""What uses a model as it stands: evaluating it, and writing what it predicts. Nothing here trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from data_processing.batching import Collator
from data_processing.examples import Examples, read_examples, read_unlabelled
from data_processing.features import Features, load_features, make_features
from data_processing.tasks import Task
from distillation.checkpoints.outputs import check_can_make
from distillation.checkpoints.results import (
    check_copy,
    check_predictions,
    check_results,
    prediction_names,
    write_predictions,
    write_results,
)
from distillation.evaluation import EvaluationResult, evaluate, evaluate_logits, never, predict, predictions
from distillation.models import LoadedModel, check_lengths, choose_case, load_complete
from distillation.options import Options
from distillation.runtime.device import Process, local_rank_zero_first
from distillation.runtime.logs import RunLog, check_logs
from distillation.runtime.precision import Precision, choose_precision
from distillation.teacher.teacher import recall
from transformer.errors import UserError
from transformer.heads import TinyBertForSequenceClassification
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DevSets:
    """The task's dev files, tokenized, by name."""

    task: Task
    batch_size: int
    features: dict[str, Features]

    @classmethod
    def read(cls, options: Options, tokenizer: BertTokenizer) -> DevSets:
        """Reads and tokenizes every dev file of the task."""
        features = {
            name: load_features(options.data_dir / name, options.task, tokenizer, options.max_seq_length, options.cache)
            for name in options.task.dev_files
        }
        return cls(options.task, options.eval_batch_size, features)

    def judge(
        self,
        model: TinyBertForSequenceClassification,
        collator: Collator,
        process: Process,
        precision: Precision,
        stops: Callable[[], bool] = never,
    ) -> dict[str, EvaluationResult]:
        """Evaluates a model on each file; `stops` as for `predict`."""
        return {
            name: evaluate(model, features, self.task, collator, self.batch_size, process, precision, stops)
            for name, features in self.features.items()
        }

    def evaluate_teacher(
        self,
        model: TinyBertForSequenceClassification,
        weights: str,
        collator: Collator,
        options: Options,
        process: Process,
        precision: Precision,
    ) -> dict[str, EvaluationResult]:
        """Evaluates a teacher on each file, by what it said in an earlier run where that is kept (`teacher.recall`)."""
        results = {}
        for name, features in self.features.items():
            logits, seconds = recall(model, weights, features, collator, options, process, precision)
            results[name] = evaluate_logits(logits, features, self.task, seconds)
        return results


def run_evaluation(options: Options, process: Process) -> None:
    """Evaluates --student_model on the task's dev files.

    Raises:
        UserError: what the flags name cannot be used.
    """
    with process.raise_on_all_ranks():
        if process.is_main:
            check_can_make(options.output_dir, "--output_dir")
            check_results(options.output_dir, options.task)
            check_copy(options)
            check_logs(options.fps_acc_dir, options.log_name(process.world_size))
        loaded = _load(options)
    dev = local_rank_zero_first(process, lambda: DevSets.read(options, loaded.tokenizer))
    precision = precision_of(options, process)
    loaded.model.to(process.device)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    precision.prepare_for_inference(loaded.model)
    with RunLog(options.fps_acc_dir, options.log_name(process.world_size), process) as log:
        results = dev.judge(loaded.model, make_collator(options, loaded, precision), process, precision)
        for name, judged in results.items():
            logger.info("%s: %s", options.student_model, shown(name, judged))
            log.line(0, 0, judged.examples_per_second, judged.metrics[options.task.metric.chosen_by])
            log.record(
                "eval",
                file=name,
                model=str(options.student_model),
                parameters=parameters,
                fps=judged.examples_per_second,
                **judged.metrics,
            )
        if process.is_main:
            write_results(options.output_dir, options.task, results)


def run_predictions(options: Options, process: Process) -> None:
    """Writes what --student_model predicts for the task's test files, or for --predict_file.

    Raises:
        UserError: what the flags name cannot be used.
    """
    task = options.task
    with process.raise_on_all_ranks():
        names = prediction_names(task, options.predict_file)
        if process.is_main:
            check_can_make(options.output_dir, "--output_dir")
            check_predictions(options.output_dir, names.values(), options.overwrite_output_dir)
            check_copy(options)
            check_logs(options.fps_acc_dir, options.log_name(process.world_size))
        loaded = _load(options)
        examples = {file: _read_for_prediction(options, file) for file in names}
    precision = precision_of(options, process)
    collator = make_collator(options, loaded, precision)
    loaded.model.to(process.device)
    precision.prepare_for_inference(loaded.model)
    predicted: dict[str, tuple[list[str], list[str]]] = {}
    with RunLog(options.fps_acc_dir, options.log_name(process.world_size), process) as log:
        for file, rows in examples.items():
            features = make_features(rows, loaded.tokenizer, options.max_seq_length)
            begin = time.perf_counter()
            logits = predict(loaded.model, features, collator, options.eval_batch_size, process, precision)
            fps = len(rows) / (time.perf_counter() - begin)
            ids = rows.ids or [str(number) for number in range(len(rows))]
            predicted[names[file]] = ids, task.format_predictions(predictions(logits, task))
            logger.info("%s: predicted %d rows, %.0f a second", file, len(rows), fps)
            log.record("predict", file=file, model=str(options.student_model), examples=len(rows), fps=fps)
        if process.is_main:
            write_predictions(options.output_dir, predicted)
            for name in predicted:
                logger.info("the predictions are in %s", options.output_dir / name)


def _load(options: Options) -> LoadedModel:
    assert options.student_model is not None  # the options' own check
    lower = choose_case(options.do_lower_case, (options.student_model,))
    loaded = load_complete(options.student_model, options.task, lower)
    check_lengths(loaded.model.config, loaded.folder, options.task, options.max_seq_length)
    return loaded


def _read_for_prediction(options: Options, name: str) -> Examples:
    """A train or dev file, whose labels are left aside, or one without labels."""
    task, path = options.task, options.data_dir / name
    if not options.data_dir.is_dir():
        raise UserError(f"{options.data_dir}: no such folder; --data_dir holds the task's files")
    if not path.exists():
        raise UserError(f"{path}: not found; --predict_file names another file to predict")
    labelled = (options.data_dir / file for file in (task.train_file, task.augmented_file, *task.dev_files))
    if path.resolve() in (file.resolve() for file in labelled):
        return read_examples(path, task)
    if name not in task.test_files:
        logger.info(
            "%s: none of the task's own files: read in the form of %s's test files, without labels", path, task.name
        )
    return read_unlabelled(path, task)


def make_collator(options: Options, loaded: LoadedModel, precision: Precision) -> Collator:
    """How batches for this model are padded."""
    maximum = options.padding == "max_length"
    return Collator(maximum, options.max_seq_length, loaded.tokenizer.pad_token_id, precision.bucketed_lengths)


def precision_of(options: Options, process: Process) -> Precision:
    """The precision that the flags ask for, on this process's device."""
    return choose_precision(process.device, options.amp, options.opt_level, options.loss_scale, options.amp_dtype)


def shown(name: str, judged: EvaluationResult) -> str:
    """A dev file's result as messages tell it."""
    metrics = ", ".join(f"{key} {value:.4f}" for key, value in judged.metrics.items())
    speed = "remembered" if judged.seconds is None else f"{judged.examples_per_second:.0f} a second"
    return f"{name}: {metrics} ({judged.examples} examples, {speed})"
