"""What a process does: train a model, or evaluate one. Here flags become the parts that do it.

Everything that the user gave is read and checked first; only then is anything written.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from data_processing.batching import Padding, TrainingPlan
from data_processing.features import Features, make_features, read_examples
from data_processing.tasks import Task
from distillation.checkpoint import check_can_make, check_output_dir, make_folder, save_model
from distillation.device import Process, seed_process
from distillation.evaluation import Evaluation, evaluate
from distillation.logs import RunLog, check_logs, clock
from distillation.losses import uniform_layer_map
from distillation.models import (
    LoadedModel,
    check_lengths,
    check_same_heads,
    check_same_vocabulary,
    load_complete,
    load_learner,
)
from distillation.options import Options, Stage
from distillation.precision import Precision, choose_precision
from distillation.stages import FineTuning, IntermediateStage, PredictionStage, TrainingStage, freeze_unused
from distillation.trainer import Outcome, Schedule, Trainer
from transformer.errors import UserError
from transformer.heads import TinyBertForSequenceClassification
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)


def run(options: Options, process: Process) -> None:
    """Does what the flags ask for, as one process of the run.

    Raises:
        UserError: what the flags name cannot be used.
    """
    seed_process(options.seed, 0)  # new weights are the same in every process
    if options.stage is Stage.EVALUATION:
        _evaluate_only(options, process)
    else:
        _train(options, process)


def _train(options: Options, process: Process) -> None:
    with process.together():
        parts = TrainingParts.read(options, process)
    with process.together():
        if process.is_main:
            make_folder(options.output_dir, "--output_dir")
        log = RunLog(options.fps_acc_dir, options.log_name(process.world_size), process)
    with log:
        _teach(options, process, parts, log)
    if options.performance:
        logger.info("End performance testing. Ready to exit.")


@dataclass(frozen=True)
class TrainingParts:
    """What a training run reads: the models, the stage's loss, the training and dev sets."""

    teacher: LoadedModel | None
    learner: LoadedModel
    stage: TrainingStage
    features: Features
    dev: DevSets

    @classmethod
    def read(cls, options: Options, process: Process) -> TrainingParts:
        """Reads and checks all that the flags name; writes nothing.

        Raises:
            UserError: part of it is missing, broken, or does not fit the rest.
        """
        if process.is_main:  # alone: to the others the folder may already be this run's own
            sources = options.teacher_model, options.student_model, options.data_dir
            check_output_dir(options.output_dir, options.overwrite_output_dir, sources)
            check_can_make(options.output_dir, "--output_dir")
            check_results(options.output_dir, options.task)
            check_logs(options.fps_acc_dir, options.log_name(process.world_size))
        teacher, learner = _models(options)
        stage = _stage(options, teacher, learner)
        check_lengths(learner.model.config, learner.folder, options.task, options.max_seq_length)
        examples = read_examples(_training_file(options), options.task)
        dev = DevSets.read(options, learner.tokenizer)
        features = make_features(examples, learner.tokenizer, options.max_seq_length)
        return cls(teacher, learner, stage, features, dev)


def _teach(options: Options, process: Process, parts: TrainingParts, log: RunLog) -> None:
    learner, stage, dev = parts.learner, parts.stage, parts.dev
    precision = _precision(options, process)
    padding = _padding(options, learner)
    learner.model.to(process.device)
    freeze_unused(learner.model, stage.unused)
    _say_settings(options, process, parts)
    if parts.teacher is not None:
        teacher = parts.teacher.model.to(process.device)
        precision.prepare_frozen(teacher)
        for name, judged in dev.judge(teacher, padding, process, precision).items():
            logger.info("the teacher's own %s", _shown(name, judged))
            log.record("teacher", file=name, **judged.metrics)

    def judge(step: int) -> float:
        results = dev.judge(learner.model, padding, process, precision)
        for name, judged in results.items():
            logger.info("step %d: %s", step, _shown(name, judged))
            log.record("eval", file=name, step=step, **judged.metrics)
        if process.is_main:
            write_results(options.output_dir, options.task, results, global_step=step)
        return results[options.task.dev_files[0]].metrics[options.task.chosen_by]

    def save() -> None:
        if process.is_main:
            weights = precision.weights(learner.model)
            save_model(options.output_dir, learner.model.config, weights, learner.tokenizer)

    plan = TrainingPlan(
        parts.features.lengths,
        options.train_batch_size,
        padding,
        options.seed,
        options.gradient_accumulation_steps,
        process.rank,
        process.world_size,
        options.group_by_length,
    )
    seed_process(options.seed, process.rank)  # from here on each process draws its own dropout
    trainer = Trainer(
        learner.model,
        stage,
        parts.features,
        plan,
        _schedule(options),
        process,
        precision,
        log,
        judge,
        save,
        title=options.stage.value,
    )
    _say_outcome(options, trainer.run(), log)


def _say_outcome(options: Options, outcome: Outcome, log: RunLog) -> None:
    chooser = options.task.dev_files[0]
    best = outcome.best if outcome.best_step else None
    if best is not None:
        step = outcome.best_step
        logger.info("best %s %.4f (%s chose the checkpoint of step %d)", options.task.chosen_by, best, chooser, step)
    if outcome.skipped:
        logger.info("%d steps were skipped because a gradient overflowed", outcome.skipped)
    aside = ", ".join(f"{name} {clock(seconds)}" for name, seconds in outcome.seconds.items())
    logger.info("%d steps, FPS %.2f; beside training: %s", outcome.steps, outcome.fps, aside)
    log.record(
        "end",
        steps=outcome.steps,
        fps=outcome.fps,
        fps_examples=outcome.examples,
        best=best,
        seconds_aside=outcome.seconds,
        skipped=outcome.skipped,
    )
    logger.info("the model is in %s", options.output_dir)


def _evaluate_only(options: Options, process: Process) -> None:
    assert options.student_model is not None  # the options' own check
    with process.together():
        if process.is_main:
            check_can_make(options.output_dir, "--output_dir")
            check_results(options.output_dir, options.task)
            check_logs(options.fps_acc_dir, options.log_name(process.world_size))
        loaded = load_complete(options.student_model, options.task, options.do_lower_case)
        check_lengths(loaded.model.config, loaded.folder, options.task, options.max_seq_length)
        dev = DevSets.read(options, loaded.tokenizer)
    precision = _precision(options, process)
    loaded.model.to(process.device)
    precision.prepare_frozen(loaded.model)
    with RunLog(options.fps_acc_dir, options.log_name(process.world_size), process) as log:
        results = dev.judge(loaded.model, _padding(options, loaded), process, precision)
        parameters = sum(p.numel() for p in loaded.model.parameters())
        for name, judged in results.items():
            logger.info("%s: %s", options.student_model, _shown(name, judged))
            log.line(0, 0, judged.examples_per_second, judged.metrics[options.task.chosen_by])
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


@dataclass(frozen=True)
class DevSets:
    """The task's dev files, tokenized, by name."""

    task: Task
    batch_size: int
    features: dict[str, Features]

    @classmethod
    def read(cls, options: Options, tokenizer: BertTokenizer) -> DevSets:
        """Reads and tokenizes every dev file of the task."""
        examples = {name: read_examples(options.data_dir / name, options.task) for name in options.task.dev_files}
        features = {name: make_features(rows, tokenizer, options.max_seq_length) for name, rows in examples.items()}
        return cls(options.task, options.eval_batch_size, features)

    def judge(
        self, model: TinyBertForSequenceClassification, padding: Padding, process: Process, precision: Precision
    ) -> dict[str, Evaluation]:
        """Evaluates a model on each file."""
        return {
            name: evaluate(model, features, self.task, padding, self.batch_size, process, precision)
            for name, features in self.features.items()
        }


def _models(options: Options) -> tuple[LoadedModel | None, LoadedModel]:
    """The teacher, where there is one, and the model that is trained."""
    assert options.teacher_model is not None  # the options' own check
    if options.stage is Stage.FINETUNE:
        learner = load_learner(
            options.teacher_model,
            options.task,
            options.do_lower_case,
            transfer_learning=options.transfer_learning,
            head=options.teacher_head,
        )
        return None, learner
    assert options.student_model is not None
    teacher = load_complete(
        options.teacher_model, options.task, options.do_lower_case, options.teacher_head, "the teacher"
    )
    learner = load_learner(
        options.student_model,
        options.task,
        options.do_lower_case,
        teacher_size=teacher.model.config.hidden_size if options.stage is Stage.INTERMEDIATE else 0,
        transfer_learning=options.transfer_learning,
    )
    check_same_vocabulary(teacher, learner)
    check_lengths(teacher.model.config, teacher.folder, options.task, options.max_seq_length)
    return teacher, learner


def _stage(options: Options, teacher: LoadedModel | None, learner: LoadedModel) -> TrainingStage:
    if teacher is None:
        return FineTuning()
    teacher.model.eval().requires_grad_(False)
    if options.stage is Stage.PREDICTION:
        return PredictionStage(teacher.model, options.temperature)
    check_same_heads(teacher, learner)
    layers = learner.model.config.num_hidden_layers, teacher.model.config.num_hidden_layers
    return IntermediateStage(teacher.model, uniform_layer_map(*layers), options.padding == "max_length")


def _training_file(options: Options) -> Path:
    name = options.task.augmented_file if options.aug_train else options.task.train_file
    path = options.data_dir / name
    if not options.data_dir.is_dir():
        raise UserError(f"{options.data_dir}: no such folder; --data_dir holds {name} and the task's dev file")
    if options.aug_train and not path.is_file():
        raise UserError(f"{path}: not found; leave out --aug_train (with the scripts: AUG_TRAIN=0) to use train.tsv")
    return path


def _padding(options: Options, loaded: LoadedModel) -> Padding:
    return Padding(options.padding == "max_length", options.max_seq_length, loaded.tokenizer.pad_token_id)


def _precision(options: Options, process: Process) -> Precision:
    return choose_precision(process.device, options.amp, options.opt_level, options.loss_scale, options.amp_dtype)


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


def _say_settings(options: Options, process: Process, parts: TrainingParts) -> None:
    processes = f" in {process.world_size} processes" if process.world_size > 1 else ""
    parameters = sum(p.numel() for p in parts.learner.model.parameters())
    logger.info(
        "%s of %s on %s%s: %d examples of %.1f tokens, batch %d, %g epochs, %.1f million parameters",
        options.stage.value,
        options.task.name,
        process.device,
        processes,
        len(parts.features),
        parts.features.lengths.mean(),
        options.train_batch_size,
        options.num_train_epochs,
        parameters / 1e6,
    )


def _shown(name: str, judged: Evaluation) -> str:
    metrics = ", ".join(f"{key} {value:.4f}" for key, value in judged.metrics.items())
    return f"{name}: {metrics} ({judged.examples} examples, {judged.examples_per_second:.0f} a second)"


def _results_files(output_dir: Path, task: Task) -> dict[str, Path]:
    """Where the metrics of each dev file go: OUTPUT/eval_results.txt, of a second one OUTPUT-MM/eval_results.txt."""
    output_dir = output_dir.resolve()  # "." has no name that could be added to
    folders = [output_dir, output_dir.with_name(output_dir.name + "-MM")]
    return {name: folder / "eval_results.txt" for folder, name in zip(folders, task.dev_files, strict=False)}


def check_results(output_dir: Path, task: Task) -> None:
    """Checks, and makes nothing, that the metrics can be written.

    Raises:
        UserError: a folder cannot be made, or a file cannot be appended to.
    """
    for path in _results_files(output_dir, task).values():
        check_can_make(path.parent, "--output_dir")
        if path.is_dir():
            raise UserError(f"{path}: is a folder where the metrics are to be written")


def write_results(output_dir: Path, task: Task, results: dict[str, Evaluation], **also: int) -> None:
    """Appends the metrics of each dev file to its eval_results.txt.

    Raises:
        UserError: a file cannot be written.
    """
    for name, path in _results_files(output_dir, task).items():
        values = {**results[name].metrics, **also}
        make_folder(path.parent, "--output_dir")
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(f"{key} = {values[key]}\n" for key in sorted(values))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
