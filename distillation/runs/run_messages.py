"""What a training run tells of itself on the screen, when it begins and when it has ended."""

from __future__ import annotations

import logging

from data_processing.features import Features
from distillation.options import Options
from distillation.runtime.device import Process
from distillation.runtime.logs import RunLog, clock
from distillation.training.trainer import Outcome
from transformer.heads import TinyBertForSequenceClassification

logger = logging.getLogger(__name__)


def say_settings(
    options: Options, process: Process, features: Features, model: TinyBertForSequenceClassification
) -> None:
    """At its beginning, what is trained on what."""
    processes = f" in {process.world_size} processes" if process.world_size > 1 else ""
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        "%s of %s on %s%s: %d examples of %.1f tokens, batch %d, %g epochs, %.1f million parameters",
        options.stage.value,
        options.task.name,
        process.device,
        processes,
        len(features),
        features.lengths.mean(),
        options.train_batch_size,
        options.num_train_epochs,
        parameters / 1e6,
    )


def say_outcome(options: Options, outcome: Outcome, log: RunLog) -> None:
    """At its end, the best metric, steps and speed; to the log too."""
    chooser = options.task.dev_files[0]
    best = outcome.best if outcome.best_step else None
    if best is not None:
        step = outcome.best_step
        logger.info(
            "best %s %.4f (%s chose the checkpoint of step %d)", options.task.metric.chosen_by, best, chooser, step
        )
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
