"""All that the next step of a training run depends on, as plain values and tensors: taken from a trainer, and put back.

Where a run is in its data follows from the number of its steps, since the order is a function of seed and epoch
(`TrainingPlan`). No file is named here (`resume.py`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distillation.runtime.device import Process, device_random

if TYPE_CHECKING:
    from distillation.training.trainer import Trainer

State = dict[str, Any]


def gather(trainer: Trainer, seconds: float, unjudged: Mapping[str, float | Tensor] | None = None) -> State:
    """The state after a step; every process calls this, and the main one's is whole.

    Args:
        seconds: the meter's, before it was paused for this.
        unjudged: this process's part of each term of the step's loss, where the evaluation that belongs to the step
            has not been made.
    """
    parts = None if unjudged is None else {name: float(part) for name, part in unjudged.items()}
    outcome, meter = trainer.outcome, trainer.meter
    state = {
        "step": outcome.steps,
        "best": outcome.best,
        "best_step": outcome.best_step,
        "metric": trainer.metric,
        "unjudged": None if parts is None else trainer.process.gather(parts),
        "examples": meter.examples,
        "seconds": seconds,
        "paused": dict(meter.paused),
        "precision": trainer.precision.export_state(),
        "random": trainer.process.gather(random_state(trainer.process)),
    }
    if trainer.process.is_main:
        state["weights"] = _on_cpu(trainer.precision.weights(trainer.bare_model))
        state["optimizer"] = _on_cpu(trainer.optimizer.export_state())
    return state


def restore(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Puts a trainer, newly made with the same settings, where `gather` found it."""
    outcome, meter = trainer.outcome, trainer.meter
    outcome.steps, outcome.best, outcome.best_step = state["step"], state["best"], state["best_step"]
    trainer.metric = state["metric"]
    meter.go_on_from(state["examples"], state["seconds"], state["paused"])
    trainer.precision.load_weights(trainer.bare_model, state["weights"])
    trainer.precision.import_state(state["precision"])
    trainer.optimizer.import_state(state["optimizer"])
    set_random_state(trainer.process, state["random"][trainer.process.rank])


def random_state(process: Process) -> State:
    """The state of every generator of random numbers that a process draws from."""
    version, words, gauss = random.getstate()
    name, numbers, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(numbers).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "device": device_random(process.device),
    }


def set_random_state(process: Process, state: Mapping[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, numbers, *rest = state["numpy"]
    np.random.set_state((name, numbers.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    device_random(process.device, state["device"])


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous()
    if isinstance(value, Mapping):
        return {key: _on_cpu(part) for key, part in value.items()}
    return [_on_cpu(part) for part in value] if isinstance(value, (list, tuple)) else value
