"""Use a model without training it: evaluate it on the dev files, or write its predictions."""

from __future__ import annotations

import logging
import time

from data_processing.examples import Examples, read_examples, read_unlabelled
from data_processing.features import make_features
from distillation.checkpoints.outputs import (
    check_copy,
    check_predictions,
    check_results,
    copy_outputs,
    prediction_names,
    write_predictions,
    write_results,
)
from distillation.evaluation import DevSets, make_predictor, predictions
from distillation.models import LoadedModel, check_lengths, choose_case, load_complete
from distillation.options import Options
from distillation.runtime.device import Process, local_rank_zero_first, seed_process
from distillation.runtime.files import check_can_make
from distillation.runtime.logs import RunLog, check_logs
from distillation.runtime.signals import Signals
from transformer.errors import UserError

logger = logging.getLogger(__name__)


def evaluate(options: Options, process: Process, signals: Signals | None = None) -> None:
    """Evaluate --student_model on the task's dev files, as one process of the run.

    Args:
        signals: not used: a signal ends the run at once.

    Raises:
        UserError: something that the flags name cannot be used.
    """
    seed_process(options.seed, 0)
    with process.raise_on_all_ranks():
        if process.is_main:
            check_can_make(options.output_dir, "--output_dir")
            check_results(options.output_dir, options.task)
            _check_copy_and_logs(options, process)
        loaded = _load(options)
    dev = local_rank_zero_first(process, lambda: DevSets.read(options, loaded.tokenizer))
    predictor = make_predictor(options, loaded.tokenizer.pad_token_id, process)
    loaded.model.to(process.device)
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    predictor.precision.prepare_for_inference(loaded.model)
    with RunLog(options.fps_acc_dir, options.log_name(process.world_size), process) as log:
        results = dev.evaluate(loaded.model, predictor)
        for name, result in results.items():
            fps = result.examples_per_second
            logger.info("%s: %s", options.student_model, result.summary(name))
            log.line(0, 0, fps, result.metrics[options.task.metric.chosen_by])
            model = str(options.student_model)
            log.record("eval", file=name, model=model, parameters=parameters, fps=fps, **result.metrics)
        if process.is_main:
            write_results(options.output_dir, options.task, results)
    _copy(options, process)


def predict(options: Options, process: Process, signals: Signals | None = None) -> None:
    """Write the predictions of --student_model for the task's test files, or for --predict_file.

    Args:
        signals: not used: a signal ends the run at once.

    Raises:
        UserError: something that the flags name cannot be used.
    """
    seed_process(options.seed, 0)
    task = options.task
    with process.raise_on_all_ranks():
        names = prediction_names(task, options.predict_file)
        if process.is_main:
            check_can_make(options.output_dir, "--output_dir")
            check_predictions(options.output_dir, names.values(), options.overwrite_output_dir)
            _check_copy_and_logs(options, process)
        loaded = _load(options)
        examples = {file: _read_for_prediction(options, file) for file in names}
    predictor = make_predictor(options, loaded.tokenizer.pad_token_id, process)
    loaded.model.to(process.device)
    predictor.precision.prepare_for_inference(loaded.model)
    predicted: dict[str, tuple[list[str], list[str]]] = {}
    with RunLog(options.fps_acc_dir, options.log_name(process.world_size), process) as log:
        for file, rows in examples.items():
            features = make_features(rows, loaded.tokenizer, options.max_seq_length)
            begin = time.perf_counter()
            logits = predictor.logits(loaded.model, features)
            fps = len(rows) / (time.perf_counter() - begin)
            ids = rows.ids or [str(number) for number in range(len(rows))]
            predicted[names[file]] = ids, task.format_predictions(predictions(logits, task))
            logger.info("%s: predicted %d rows, %.0f a second", file, len(rows), fps)
            log.record("predict", file=file, model=str(options.student_model), examples=len(rows), fps=fps)
        if process.is_main:
            write_predictions(options.output_dir, predicted)
            for name in predicted:
                logger.info("the predictions are in %s", options.output_dir / name)
    _copy(options, process)


def _check_copy_and_logs(options: Options, process: Process) -> None:
    check_copy(options)
    check_logs(options.fps_acc_dir, options.log_name(process.world_size))


def _copy(options: Options, process: Process) -> None:
    if options.data_url and process.is_main:
        copy_outputs(options.output_dir, options.data_url, options.task)


def _load(options: Options) -> LoadedModel:
    assert options.student_model is not None  # the options check this
    lower = choose_case(options.do_lower_case, (options.student_model,))
    loaded = load_complete(options.student_model, options.task, lower)
    check_lengths(loaded.model.config, loaded.folder, options.task, options.max_seq_length)
    return loaded


def _read_for_prediction(options: Options, name: str) -> Examples:
    """Read a file to predict: one of the task's with labels, which are not used, or one without labels."""
    task, path = options.task, options.data_dir / name
    if not options.data_dir.is_dir():
        raise UserError(f"{options.data_dir}: no such folder; --data_dir holds the task's files")
    if not path.exists():
        raise UserError(f"{path}: not found; --predict_file names another file to predict")
    labelled = (options.data_dir / file for file in (task.train_file, task.augmented_file, *task.dev_files))
    if path.resolve() in (file.resolve() for file in labelled):
        return read_examples(path, task)
    if name not in task.test_files:
        logger.info("%s: not one of the task's files; read like %s's test files, without labels", path, task.name)
    return read_unlabelled(path, task)
