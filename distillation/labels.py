"""Match the outputs of a classifier trained elsewhere with the labels of the task.

A model names its outputs in config.json (`id2label`). If they are the task's names, they are matched by name. If there
are none, or only LABEL_0, LABEL_1, … of `transformers`, the outputs are taken to be in the task's order.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_processing.tasks import Task
from transformer.configuration import BertConfig
from transformer.errors import UserError

logger = logging.getLogger(__name__)


def output_order(config: BertConfig, task: Task) -> tuple[int, ...] | None:
    """Return the classifier's output for each label id of the task; None if the outputs have no names.

    Raises:
        ValueError: the names are not the task's.
    """
    if task.is_regression or not config.id2label:
        return None
    count = len(task.labels)
    given = [config.id2label.get(number, "") for number in range(count)]
    for spelling in (str, _normalized):  # exact names first: the labels of a user's task may differ in case only
        names = [spelling(name) for name in given]
        for expected in (task.labels, task.meanings):
            wanted = [spelling(label) for label in expected]
            if len(config.id2label) == len(set(names)) == count and sorted(names) == sorted(wanted):
                return tuple(names.index(label) for label in wanted)
    if names == [f"label_{number}" for number in range(count)]:
        return None
    raise ValueError


def names_the_task(config: BertConfig, task: Task) -> bool:
    """Return whether the model's label names are the task's, in any order."""
    try:
        return output_order(config, task) is not None
    except ValueError:
        return False


def in_task_order(weights: Mapping[str, Tensor], config: BertConfig, task: Task, folder: Path) -> dict[str, Tensor]:
    """Return the weights with the classifier's outputs in the order of the task's label ids.

    Raises:
        UserError: the model's label names cannot be matched with the task's.
    """
    names = _listed(config.id2label.values())
    try:
        order = output_order(config, task)
    except ValueError:
        raise UserError(
            f"{folder}: config.json names the labels {names}; {task.name}'s are "
            f"{_listed(task.labels)}{f' ({_listed(task.meanings)})' if task.meanings else ''}: they cannot be matched. "
            "If the model was trained on this task, put the task's label names into id2label"
        ) from None
    if order is None:
        if not task.is_regression and (names or not config.relu_head):
            given = f"its labels {names}" if names else "no labels"
            expected = _listed(task.meanings or task.labels)
            logger.info("%s: config.json names %s: taken as %s, in this order", folder, given, expected)
        return dict(weights)
    if order != tuple(range(len(order))):
        logger.info("%s: its labels are in the order %s: matched by name", folder, names)
    return reordered(weights, order)


def reordered(weights: Mapping[str, Tensor], order: Sequence[int]) -> dict[str, Tensor]:
    """Return the weights with output order[i] of the classifier as output i."""
    index = torch.tensor(order)
    return {key: tensor[index] if key.startswith("classifier.") else tensor for key, tensor in weights.items()}


def _normalized(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
