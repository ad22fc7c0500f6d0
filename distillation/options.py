"""Check the flags (`flags.py`), add the task's defaults, and return one typed `Options`.

A mistake in a flag is a UserError, raised before any file but --task_file is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from data_processing.cache import Cache, default_folder
from data_processing.downloads.addresses import Address
from data_processing.task_files import read_task_file
from data_processing.tasks import Task, find_task
from distillation.flags import Entry, build_parser, path
from transformer.errors import UserError

LOSSES = ("attention", "hidden", "embedding")
LAYER_MAPS = ("uniform", "top", "bottom")

Range = tuple[str, Callable[[float], bool]]  # the text for a message, and whether a number is in the range
_COUNT: Range = "1 or more", lambda number: number >= 1
_ABOVE_0: Range = "a number above 0", lambda number: 0 < number < math.inf
_RANGES: dict[str, Range] = {
    "max_seq_length": ("8 or more", lambda number: number >= 8),
    "train_batch_size": _COUNT,
    "eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "eval_step": _COUNT,
    "output_txt_step": _COUNT,
    "save_steps": _COUNT,
    "workers": ("0 or more", lambda number: number >= 0),
    "learning_rate": _ABOVE_0,
    "temperature": _ABOVE_0,
    "num_train_epochs": ("a number above 0, at most 10000000", lambda number: 0 < number <= 1e7),
    "weight_decay": ("a number, 0 or more", lambda number: 0 <= number < math.inf),
    "warmup_proportion": ("a share from 0 to below 1", lambda number: 0 <= number < 1),
    "seed": ("a number from 0 to below 2**32", lambda number: 0 <= number < 2**32),
    "port": ("1 to 65535", lambda number: 1 <= number <= 65535),
    "cache_limit": ("a number of gigabytes, 0 or more", lambda number: 0 <= number < 1e6),
}


class Stage(Enum):
    """The kind of run, with its name in logs and messages."""

    INTERMEDIATE = "intermediate-layer distillation"
    PREDICTION = "prediction-layer distillation"
    FINETUNE = "fine-tuning"
    EVALUATION = "evaluation"
    PREDICTIONS = "predictions"


_STAGES = {
    "do_eval": Stage.EVALUATION,
    "do_predict": Stage.PREDICTIONS,
    "do_finetune": Stage.FINETUNE,
    "pred_distill": Stage.PREDICTION,
}
_LOG_NAMES = {Stage.PREDICTIONS: "predict", Stage.EVALUATION: "train_eval", Stage.FINETUNE: "train_teacher"}


@dataclass(frozen=True)
class Options:
    """A run's settings, checked. Fields are named as their flags.

    addresses: the addresses among --data_dir, --teacher_model and --student_model, by field. Those fields hold the
        address as text until the download replaces it by a folder and empties this mapping.
    downloads: the cache folder for the downloads.
    fetched_from: the addresses that were downloaded, without credentials, by field.
    """

    task: Task
    stage: Stage
    data_dir: Path
    teacher_model: Path | None
    student_model: Path | None
    output_dir: Path
    fps_acc_dir: Path
    cache: Cache
    data_url: str
    max_seq_length: int
    do_lower_case: bool | None  # None: the models' files decide
    train_batch_size: int
    eval_batch_size: int
    learning_rate: float
    weight_decay: float
    num_train_epochs: float
    warmup_proportion: float
    seed: int
    gradient_accumulation_steps: int
    temperature: float
    amp: bool
    opt_level: str
    loss_scale: float | None  # None: dynamic
    amp_dtype: str
    aug_train: bool
    eval_step: int
    workers: int
    device: str
    device_list: tuple[int, ...]
    addr: str
    port: int | None
    performance: bool
    output_txt_step: int
    transfer_learning: bool
    padding: str
    group_by_length: bool
    teacher_head: str | None
    layer_map: str | tuple[int, ...]  # of LAYER_MAPS, or the teacher layer for each student layer
    losses: tuple[str, ...]  # a subset of LOSSES
    regression_target: str
    no_teacher_cache: bool
    cache_teacher_states: bool
    predict_file: str | None
    overwrite_output_dir: bool
    resume: bool
    save_steps: int | None  # None: at evaluations and ends of epochs
    deterministic: bool
    addresses: Mapping[str, Address] = field(default_factory=dict)
    downloads: Path | None = None
    fetched_from: Mapping[str, str] = field(default_factory=dict)

    def log_name(self, world_size: int) -> str:
        """Return the name of the run's log in fps_acc_dir, without .txt."""
        if self.stage in _LOG_NAMES:
            return f"{_LOG_NAMES[self.stage]}_{world_size}p"
        kind = "performance" if self.performance else "finetune" if self.transfer_learning else "full"
        return f"train_{kind}_{world_size}p_{2 if self.stage is Stage.PREDICTION else 1}"


def parse_options(arguments: Sequence[str], entry: Entry) -> Options:
    """Parse and check an entry's flags.

    Args:
        arguments: the command line without the program's name.
        entry: the flags that exist, and their defaults.

    Raises:
        UserError: a flag is unknown, missing, has an invalid value, or contradicts another.
    """
    values = vars(build_parser(entry).parse_args(list(arguments)))
    values["task"] = task = _find_task(values, entry)
    values["stage"] = stage = _find_stage(values)
    _set_defaults(values, task, stage, entry)
    for name in _RANGES:
        _check_range(name, values[name])
    _check_combinations(values, task, stage)
    values["do_lower_case"] = values["do_lower_case"] or task.lower_case
    values["device"] = "cpu" if values.get("no_cuda") else values["device"]
    values["device_list"] = _device_list(values["device_list"])
    values["loss_scale"] = _loss_scale(values["loss_scale"])
    values["layer_map"] = parse_layer_map(values["layer_map"])
    values["losses"] = _losses(values["losses"])
    folder = path(values["cache_dir"]) if values["cache_dir"] else default_folder()
    limit = round(values["cache_limit"] * 1e9)
    values["cache"] = Cache(folder if limit else None, limit)
    values |= _addresses(values, folder)
    known = {field.name for field in fields(Options)}
    return Options(**{name: value for name, value in values.items() if name in known})


def check_seed(seed: int) -> None:
    """Check a --seed.

    Raises:
        UserError: NumPy or torch do not accept it.
    """
    _check_range("seed", seed)


def _check_range(name: str, number: float | None) -> None:
    """Check the value of a numeric flag; None: it was not given."""
    expected, contains = _RANGES[name]
    if number is not None and not contains(number):
        raise UserError(f"--{name} {number}: expected {expected}")


def _find_task(values: dict[str, Any], entry: Entry) -> Task:
    """Return the task of --task_name or --task_file; the folder of --task_file is the default of --data_dir."""
    name, file = values["task_name"], values.get("task_file")
    if (name is None) == (file is None):
        raise UserError("give either --task_name, a task of GLUE, or --task_file, a task of your own")
    if file is not None:
        task = read_task_file(file)
        if values["data_dir"] is None:
            values["data_dir"] = file.parent
        return task
    task = find_task(name, entry.tasks)
    if entry.tasks is not None and task.name not in entry.tasks:
        raise UserError(
            f"--task_name {name}: {entry.prog} is for {' and '.join(entry.tasks)}; "
            "task_distill.py takes all of GLUE and tasks of your own"
        )
    if values["data_dir"] is None:
        raise UserError("--data_dir is required: the folder of the task's files")
    return task


def _find_stage(values: Mapping[str, Any]) -> Stage:
    given = [flag for flag in _STAGES if values[flag]]
    if len(given) > 1:
        raise UserError(f"give only one of {' and '.join(f'--{flag}' for flag in given)}")
    stage = _STAGES[given[0]] if given else Stage.INTERMEDIATE
    if values["teacher_model"] is None and stage not in (Stage.EVALUATION, Stage.PREDICTIONS):
        raise UserError(f"--teacher_model is required for {stage.value}")
    if values["student_model"] is None and stage is not Stage.FINETUNE:
        raise UserError(f"--student_model is required for {stage.value}")
    return stage


def _set_defaults(values: dict[str, Any], task: Task, stage: Stage, entry: Entry) -> None:
    """Set the flags that were not given and whose default depends on the task or on another flag."""
    with_defaults = entry.tasks_with_defaults is None or task.name in entry.tasks_with_defaults
    if values["max_seq_length"] is None:
        values["max_seq_length"] = (task.max_seq_length if with_defaults else None) or entry.max_seq_length
    if values["num_train_epochs"] is None:
        intermediate = with_defaults and stage is Stage.INTERMEDIATE
        values["num_train_epochs"] = (task.intermediate_epochs if intermediate else None) or 3.0
    if values["fps_acc_dir"] is None:
        assert entry.fps_acc_dir is not None  # otherwise the parser requires the flag
        values["fps_acc_dir"] = entry.fps_acc_dir / task.name
    if values["group_by_length"] is None:  # max_length is for the original's arithmetic, which includes its order
        values["group_by_length"] = values["padding"] == "longest"
    if entry.tasks is not None:
        values["data_url"] = ""  # the original main.py ignored it


def _integers(text: str) -> tuple[int, ...]:
    """Return integers split by commas; none if the text has another form."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        return ()


def _device_list(text: str) -> tuple[int, ...]:
    ids = _integers(text)
    if not ids or min(ids) < 0 or len(set(ids)) < len(ids):
        raise UserError(f"--device_list {text}: expected different device ids, from 0, split by commas, as 0,1,2")
    return ids


def _loss_scale(text: str) -> float | None:
    if text == "dynamic":
        return None
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if scale == -1:
        return None
    if not 0 < scale < math.inf:
        raise UserError(f"--loss_scale {text}: expected a number above 0, dynamic, or -1 for dynamic")
    return scale


def parse_layer_map(text: str) -> str | tuple[int, ...]:
    """Return the name of a layer map, or the teacher's layers that the text lists.

    Raises:
        UserError: it is neither.
    """
    if text in LAYER_MAPS:
        return text
    layers = _integers(text)
    if not layers or min(layers) < 1:
        raise UserError(
            f"--layer_map {text}: expected the teacher's layers, from 1, split by commas, as 3,6,9,12; "
            f"or one of {', '.join(LAYER_MAPS)}"
        )
    return layers


def _losses(text: str) -> tuple[str, ...]:
    names = text.split(",")
    if not set(names) <= set(LOSSES) or len(set(names)) < len(names):
        raise UserError(f"--losses {text}: expected one or more of {', '.join(LOSSES)}, split by commas")
    return tuple(name for name in LOSSES if name in names)


def _check_combinations(values: Mapping[str, Any], task: Task, stage: Stage) -> None:
    examples, micro_batches = values["train_batch_size"], values["gradient_accumulation_steps"]
    if examples < micro_batches:
        raise UserError(
            f"--train_batch_size {examples} is less than --gradient_accumulation_steps {micro_batches}: "
            "some micro-batches would be empty"
        )
    if values["do_lower_case"] and task.lower_case is False:
        raise UserError(f"--do_lower_case: the file of {task.name} says that its models are cased")
    if values.get("no_cuda") and values["device"] not in ("auto", "cpu"):
        raise UserError(f"--no_cuda and --device {values['device']}: give one of them")
    if values["predict_file"] is not None and stage is not Stage.PREDICTIONS:
        raise UserError("--predict_file is for --do_predict; give both")
    if values["cache_teacher_states"] and stage is Stage.INTERMEDIATE:
        if values["padding"] == "max_length":
            raise UserError(
                "--cache_teacher_states stores no states of padding, which --padding max_length compares; "
                "leave out one of them"
            )
        if values["no_teacher_cache"]:
            raise UserError("--cache_teacher_states and --no_teacher_cache: give one of them")


def _addresses(values: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """Return the addresses among the folders, the text that replaces them, and the folder of the downloads."""
    names = ("data_dir", "teacher_model", "student_model")
    addresses = {name: values[name] for name in names if isinstance(values[name], Address)}
    if not addresses:
        return {}
    if folder is None:
        name, address = next(iter(addresses.items()))
        raise UserError(f"--{name} {address.redacted}: there is no home folder to store it in; give --cache_dir")
    texts = {name: Path(address.redacted) for name, address in addresses.items()}
    return {**texts, "addresses": addresses, "downloads": folder}
