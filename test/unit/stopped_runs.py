"""Not a test: runs that are stopped after a step of one's choice, and what must be equal of two runs in the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cases import Golden, Run, Workplace, call, edit_config, write_rows
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from transformer.heads import TinyBertForSequenceClassification

_NOT_EQUAL = ("time", "id", "fps", "seconds", "seconds_aside", "fps_examples")


def dropout_place(folder: Path, copies: int = 1) -> Workplace:
    """The golden SST-2 case, its sentences so many times, with models that draw dropout."""
    place = Golden("sst2_small").workplace(folder)
    train = place.data / "train.tsv"
    header, *rows = [line.split("\t") for line in train.read_text(encoding="utf-8").splitlines()]
    write_rows(train, [header, *rows * copies])
    for role in (place.teacher, place.student):
        edit_config(role, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    return place


@contextlib.contextmanager
def in_step(step: int, action: Callable[[], object]) -> Iterator[None]:
    """Call a function in the so-many-th step from now on, before the weights change."""
    taken = 0

    def count(*_: object) -> None:
        nonlocal taken
        taken += 1
        if taken == step:
            action()

    hook = register_optimizer_step_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()


def signal_in_step(step: int, number: int = signal.SIGTERM) -> contextlib.AbstractContextManager[None]:
    """Send this process a signal in the so-many-th step from now on."""
    return in_step(step, lambda: os.kill(os.getpid(), number))


@contextlib.contextmanager
def signal_in_evaluation(number: int, batch: int = 2) -> Iterator[list[int]]:
    """Sends this process a signal while it evaluates the model that it trains for the so-many-th time from now on.

    Args:
        batch: of that evaluation, the one during which it comes.

    Returns:
        How many batches each evaluation had so far.
    """
    batches: list[int] = []
    evaluates = False

    def count(module: nn.Module, *_: object) -> None:
        nonlocal evaluates
        if not isinstance(module, TinyBertForSequenceClassification):
            return
        if module.training:
            evaluates = False
        elif any(parameter.requires_grad for parameter in module.parameters()):  # no teacher
            if not evaluates:
                batches.append(0)
            evaluates = True
            batches[-1] += 1
            if (len(batches), batches[-1]) == (number, batch):
                os.kill(os.getpid(), signal.SIGTERM)

    hook = register_module_forward_pre_hook(count)
    try:
        yield batches
    finally:
        hook.remove()


def attempt(place: Workplace, **changes: Any) -> Run:
    """The entry in this process, however it ends."""
    return call(place.entry.main, place.flags(**changes), place.entry.ENTRY.prog)


def refused(place: Workplace, **changes: Any) -> str:
    """Run the entry, which must find a user's mistake; return its line."""
    done = attempt(place, **changes)
    assert (done.status, done.err.count("\n")) == (2, 1), done.err
    return done.err


def outcome(model: Path, logs: Path) -> dict[str, Any]:
    """Return what must be equal of two runs: weights, files and logs, without times, speeds and ids."""
    run = json.loads((model / "run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (logs / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (text,) = logs.glob("*.txt")
    results = model / "eval_results.txt"
    return {
        "weights": hashlib.sha256((model / "pytorch_model.bin").read_bytes()).hexdigest(),
        "files": sorted(path.name for path in model.iterdir()),
        "best": run["best"],
        "metrics.jsonl": [
            {key: value for key, value in line.items() if key not in _NOT_EQUAL}
            for line in lines
            if line["event"] != "resume"
        ],
        text.name: re.sub(r"FPS\S+", "FPS", text.read_text(encoding="utf-8")),
        "eval_results.txt": results.read_text(encoding="utf-8") if results.exists() else "",
    }
