"""A classifier from elsewhere, its labels in another order: which of its outputs is which label of the task.

A model names its labels in config.json (`id2label`). Where the names are the task's own, they are matched
by name; where they are none, or `transformers`' LABEL_0, LABEL_1, …, its order is taken for the task's.
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
    """For each label id of the task the output of the classifier that is meant; None where names tell nothing.

    Raises:
        ValueError: the names are not the task's.
    """
    if task.is_regression or not config.id2label:
        return None
    count = len(task.labels)
    given = [config.id2label.get(number, "") for number in range(count)]
    for spelling in (str, _plain):  # as they are first: labels of a user's own may differ in their case alone
        names = [spelling(name) for name in given]
        for expected in (task.labels, task.meanings):
            wanted = [spelling(label) for label in expected]
            if len(config.id2label) == len(set(names)) == count and sorted(names) == sorted(wanted):
                return tuple(names.index(label) for label in wanted)
    if _are_numbered(names):
        return None
    raise ValueError


def names_the_task(config: BertConfig, task: Task) -> bool:
    """Whether the model's names for its labels are the task's own, in any order."""
    try:
        return output_order(config, task) is not None
    except ValueError:
        return False


def in_task_order(weights: Mapping[str, Tensor], config: BertConfig, task: Task, folder: Path) -> dict[str, Tensor]:
    """The tensors with the classifier's outputs in the order of the task's label ids.

    Raises:
        UserError: the model's names for its labels cannot be matched with the task's.
    """
    try:
        order = output_order(config, task)
    except ValueError:
        raise UserError(
            f"{folder}: config.json names the labels {_listed(config.id2label.values())}; {task.name}'s are "
            f"{_listed(task.labels)}{f' ({_listed(task.meanings)})' if task.meanings else ''}: they cannot be matched, "
            "so its predictions could be taken for others. If the model is of this task, put its names into id2label"
        ) from None
    if order is None:
        if not task.is_regression and (config.id2label or not config.relu_head):
            names = f"its labels {_listed(config.id2label.values())}" if config.id2label else "no labels"
            expected = _listed(task.meanings or task.labels)
            logger.info("%s: config.json names %s: taken as %s, in this order", folder, names, expected)
        return dict(weights)
    if order != tuple(range(len(order))):
        logger.info("%s: its labels are in the order %s: matched by name", folder, _listed(config.id2label.values()))
    return reordered(weights, order)


def reordered(weights: Mapping[str, Tensor], order: Sequence[int]) -> dict[str, Tensor]:
    """The tensors with output order[i] of the classifier as output i."""
    index = torch.tensor(order)
    return {key: tensor[index] if key.startswith("classifier.") else tensor for key, tensor in weights.items()}


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _are_numbered(names: Sequence[str]) -> bool:
    return list(names) == [f"label_{number}" for number in range(len(names))]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
