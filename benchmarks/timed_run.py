"""main.py under a stopwatch: the other benchmarks run it to see where a run's time and memory go.

    python -m benchmarks.timed_run ...flags of main.py

It puts a stopwatch around the parts of the product, which does not know of it, and writes timed_run.json beside
the logs:

    start: seconds from the process's start to the end of its first step, by part.
    steps: at the start of training and after each step, the seconds that each part has had so far.
    skipped: how many of the first steps the FPS of the logs leave out.
    memory: bytes; `imports` what the process held after its imports, `peak` its most, `device` the
        accelerator's most in tensors.

An accelerator is waited for at the beginning and the end of each part, which makes its steps slower: FPS of such a run
are not those of main.py. On a CPU the stopwatch costs microseconds a step. Of several processes the first is told of.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

import main
from benchmarks.common import BEGAN, TIMES, peak, resident
from distillation.launch import run_entry
from distillation.options import Options
from distillation.runs import predict, train
from distillation.runs.predict import DevSets
from distillation.runtime import precision
from distillation.runtime.device import Process, synchronize
from distillation.runtime.logs import FpsMeter
from distillation.teacher.teacher import Teacher
from distillation.training import stages, trainer
from distillation.training.trainer import Outcome, Trainer

IMPORTED, AFTER_IMPORTS = time.time(), resident()

# The parts of a step. student: its forward and the loss. data: waiting for batches. What is left is the rest.
STEP_PARTS = ("teacher", "student", "backward", "optimizer", "data", "rest")
# The parts of a start, in their order; `first step` is all of it.
START_PARTS = ("imports", "models", "tokenizing", "evaluation", "asking", "first step", "rest")
_PRECISIONS = (precision.Precision, precision.TorchMixedPrecision, precision.ApexMixedPrecision)
_STAGES = (stages.IntermediateStage, stages.PredictionStage, stages.FineTuning)
# Whose function belongs to which part.
_WATCHED: tuple[tuple[Any, str, str], ...] = (
    (train, "load_complete", "models"),
    (train, "load_learner", "models"),
    (train, "load_features", "tokenizing"),
    (predict, "load_features", "tokenizing"),
    (DevSets, "judge", "evaluation"),
    (DevSets, "evaluate_teacher", "evaluation"),
    (train, "load_or_compute_logits", "asking"),
    (train, "keep_states", "asking"),
    (Teacher, "states", "teacher"),
    (Teacher, "logits", "teacher"),
    *((stage, "losses", "student") for stage in _STAGES),
    *((kind, "backward", "backward") for kind in _PRECISIONS),
    *((kind, name, "optimizer") for kind in _PRECISIONS for name in ("step", "step_async")),
)


class Stopwatch:
    """Seconds by part. While one part runs inside another the inner one has them."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._seconds = now, dict[str, float]()
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context whose time is this part's."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def read(self) -> dict[str, float]:
        """The seconds of every part so far."""
        self._turn()
        return dict(self._seconds)

    def _turn(self) -> None:
        now = self._now()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


class Watched:
    """What is seen of one run."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.stopwatch = Stopwatch(self._now)
        self.start: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []
        self.skipped = 0

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def count(self, meter: FpsMeter) -> None:
        """A step is done."""
        self.steps.append(self.stopwatch.read())
        if not meter.examples:
            self.skipped += 1
        if not self.start:
            self.start = start_by_parts(self.steps, float(os.environ.get(BEGAN, IMPORTED)), IMPORTED, time.time())

    def write(self, options: Options) -> None:
        """Writes timed_run.json."""
        on_device = getattr(torch, self.device.type).max_memory_allocated() if self.device.type != "cpu" else 0
        memory = {"imports": AFTER_IMPORTS, "peak": peak(), "device": on_device}
        content = {"start": self.start, "steps": self.steps, "skipped": self.skipped, "memory": memory}
        (options.fps_acc_dir / TIMES).write_text(json.dumps(content), encoding="utf-8")


def start_by_parts(steps: list[dict[str, float]], began: float, imported: float, now: float) -> dict[str, float]:
    """The seconds from a process's start to the end of its first step, by part.

    Args:
        steps: the seconds by part before the first step and after it.
        began, imported, now: in seconds since 1970, when it started, had its imports, and had done its step.
    """
    before, after = steps
    parts = {name: before.get(name, 0.0) for name in ("models", "tokenizing", "evaluation", "asking")}
    parts["imports"] = imported - began
    parts["first step"] = sum(after.get(name, 0.0) - before.get(name, 0.0) for name in STEP_PARTS)
    parts["rest"] = now - began - sum(parts.values())
    return {name: parts[name] for name in START_PARTS}


def shares(steps: list[dict[str, float]], since: int) -> dict[str, float]:
    """The percentages of the parts in the time of the steps after the first `since`."""
    first, last = steps[since], steps[-1]
    seconds = {name: last.get(name, 0.0) - first.get(name, 0.0) for name in STEP_PARTS}
    total = sum(seconds.values())
    return {name: 100 * value / total for name, value in seconds.items()}


def watch() -> None:
    """Puts the stopwatch around the product's functions, in this process."""
    seen = Watched()
    part = seen.stopwatch.part
    for owner, name, title in _WATCHED:
        if name in vars(owner):  # a subclass has some of its class's functions
            setattr(owner, name, _timed(vars(owner)[name], functools.partial(part, title)))
    prefetch, fit, run, count, pause = trainer.prefetch, Trainer.run, train.run, FpsMeter.count, FpsMeter.pause

    def watched_batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with contextlib.closing(prefetch(*args, **kwargs)) as batches:  # type: ignore[type-var]
            while True:
                with part("data"):
                    try:
                        batch = next(batches)
                    except StopIteration:
                        return
                yield batch

    def watched_training(self: Trainer, *state: Any) -> Outcome:
        with part("rest"):
            seen.steps.append(seen.stopwatch.read())
            return fit(self, *state)

    def watched_count(self: FpsMeter, examples: int) -> None:
        count(self, examples)
        seen.count(self)

    @contextlib.contextmanager
    def watched_pause(self: FpsMeter, reason: str) -> Iterator[None]:
        with part("beside training"), pause(self, reason):
            yield

    def watched_run(options: Options, process: Process, *signals: Any) -> None:
        seen.device = process.device
        run(options, process, *signals)
        if process.is_main:
            seen.write(options)

    replacements: tuple[tuple[Any, str, Any], ...] = (
        (trainer, "prefetch", watched_batches),
        (Trainer, "run", watched_training),
        (FpsMeter, "count", watched_count),
        (FpsMeter, "pause", watched_pause),
        (train, "run", watched_run),
    )
    for owner, name, function in replacements:
        setattr(owner, name, function)


def _timed(function: Callable[..., Any], part: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with part():
            return function(*args, **kwargs)

    return timed


if __name__ in ("__main__", "__mp_main__"):  # the second is its name in the processes that a run spawns
    watch()
if __name__ == "__main__":
    sys.exit(run_entry(main.ENTRY.prog, main.main))
