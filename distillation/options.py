"""What a run is told: the flags (`flags.py`) and the task's defaults, checked, as one typed `Options`.

A mistake in a flag is a UserError, raised before any file is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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

_MOST_EPOCHS = 10_000_000
LOSSES = ("attention", "hidden", "embedding")
LAYER_MAPS = ("uniform", "top", "bottom")


class Stage(Enum):
    """What a run does, by the name that logs and messages give it."""

    INTERMEDIATE = "intermediate-layer distillation"
    PREDICTION = "prediction-layer distillation"
    FINETUNE = "fine-tuning"
    EVALUATION = "evaluation"
    PREDICTIONS = "predictions"


@dataclass(frozen=True)
class Options:
    """A run's settings, checked. Fields are named as their flags.

    addresses: what is to be fetched before the run, by the field that names its folder then; until then that field
        shows the address. It is empty once `fetch_addresses` has replaced them.
    downloads: the cache folder in which it is kept.
    fetched_from: the addresses, without credentials, of what has been fetched, by the same fields.
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
    do_lower_case: bool | None  # None: the models' folders tell
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
    loss_scale: float | None  # None is dynamic
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
    layer_map: str | tuple[int, ...]  # one of LAYER_MAPS, or the teacher's layer for each student layer
    losses: tuple[str, ...]  # of LOSSES
    regression_target: str
    no_teacher_cache: bool
    cache_teacher_states: bool
    predict_file: str | None
    overwrite_output_dir: bool
    resume: bool
    save_steps: int | None  # None: where there is time
    deterministic: bool
    addresses: Mapping[str, Address] = field(default_factory=dict)
    downloads: Path | None = None
    fetched_from: Mapping[str, str] = field(default_factory=dict)

    def log_name(self, world_size: int) -> str:
        """The name of the log in fps_acc_dir of a run with so many processes, without .txt."""
        processes = f"{world_size}p"
        if self.stage is Stage.PREDICTIONS:
            return f"predict_{processes}"
        if self.stage is Stage.EVALUATION:
            return f"train_eval_{processes}"
        if self.stage is Stage.FINETUNE:
            return f"train_teacher_{processes}"
        kind = "performance" if self.performance else "finetune" if self.transfer_learning else "full"
        return f"train_{kind}_{processes}_{2 if self.stage is Stage.PREDICTION else 1}"


def parse_options(arguments: Sequence[str], entry: Entry) -> Options:
    """Parses and checks an entry's flags.

    Args:
        arguments: the command line without the program's name.
        entry: which flags there are, and the defaults.

    Raises:
        UserError: a flag is unknown, missing, or its value is of no use.
    """
    values = vars(build_parser(entry).parse_args(list(arguments)))
    task = _task(values.pop("task_name"), values.pop("task_file", None), values, entry)
    stages = {flag: values.pop(flag) for flag in ("do_eval", "do_predict", "do_finetune", "pred_distill")}
    stage = _stage(stages)
    _require_models(stage, values["teacher_model"], values["student_model"])
    with_defaults = entry.tasks_with_defaults is None or task.name in entry.tasks_with_defaults
    if values["max_seq_length"] is None:
        values["max_seq_length"] = (task.max_seq_length if with_defaults else None) or entry.max_seq_length
    if values["num_train_epochs"] is None:
        intermediate = with_defaults and stage is Stage.INTERMEDIATE
        values["num_train_epochs"] = (task.intermediate_epochs if intermediate else None) or 3.0
    if values["fps_acc_dir"] is None:
        assert entry.fps_acc_dir is not None  # the parser requires the flag elsewhere
        values["fps_acc_dir"] = entry.fps_acc_dir / task.name
    if values["group_by_length"] is None:  # the same order as the original's where its arithmetic is asked for
        values["group_by_length"] = values["padding"] == "longest"
    if values["predict_file"] is not None and stage is not Stage.PREDICTIONS:
        raise UserError("--predict_file names what --do_predict reads; give both")
    values["cache"] = _cache(values["cache_dir"], values["cache_limit"])
    values |= _addresses(values)
    if entry.tasks is not None:
        values["data_url"] = ""  # of the original main.py, which did nothing with it
    values["do_lower_case"] = _lower_case(values["do_lower_case"], task)
    values["device"] = _device(values["device"], values.pop("no_cuda", False))
    values["device_list"] = _device_list(values["device_list"])
    values["loss_scale"] = _loss_scale(values["loss_scale"])
    values["layer_map"] = _layer_map(values["layer_map"])
    values["losses"] = _losses(values["losses"])
    _check_numbers(values)
    if values["save_steps"] is not None and values["save_steps"] < 1:
        raise UserError(f"--save_steps {values['save_steps']}: expected 1 or more")
    if values["cache_teacher_states"] and stage is Stage.INTERMEDIATE:
        _check_can_keep_states(values)
    known = {field.name for field in fields(Options)}
    return Options(task=task, stage=stage, **{name: value for name, value in values.items() if name in known})


def _task(name: str | None, file: Path | None, values: dict[str, Any], entry: Entry) -> Task:
    """The task that the flags name; a task file's folder is where its data is unless --data_dir says otherwise."""
    if (name is None) == (file is None):
        raise UserError("give either --task_name, a task of GLUE, or --task_file, a task of your own")
    if file is not None:
        task = read_task_file(file)
        if values["data_dir"] is None:
            values["data_dir"] = file.parent
        return task
    task = find_task(name or "", entry.tasks)
    if entry.tasks is not None and task.name not in entry.tasks:
        raise UserError(
            f"--task_name {name}: {entry.prog} is for {' and '.join(entry.tasks)}; "
            "task_distill.py takes all of GLUE and tasks of your own"
        )
    if values["data_dir"] is None:
        raise UserError("--data_dir is required: the folder of the task's files")
    return task


def _cache(folder: str, gigabytes: float) -> Cache:
    if not 0 <= gigabytes < 1e6:
        raise UserError(f"--cache_limit {gigabytes}: expected a number of gigabytes, 0 or more")
    if gigabytes == 0:
        return Cache(None, 0)
    return Cache(path(folder) if folder else default_folder(), round(gigabytes * 1e9))


def _addresses(values: Mapping[str, Any]) -> dict[str, Any]:
    """The addresses among the folders, what stands in their fields meanwhile, and where they are kept."""
    names = ("data_dir", "teacher_model", "student_model")
    addresses = {name: values[name] for name in names if isinstance(values[name], Address)}
    if not addresses:
        return {}
    folder = path(values["cache_dir"]) if values["cache_dir"] else default_folder()
    if folder is None:
        name, address = next(iter(addresses.items()))
        raise UserError(f"--{name} {address.redacted}: there is no home folder to keep it in; give --cache_dir")
    shown = {name: Path(address.redacted) for name, address in addresses.items()}
    return {**shown, "addresses": addresses, "downloads": folder}


def _lower_case(flag: bool, task: Task) -> bool | None:
    if flag and task.lower_case is False:
        raise UserError(f"--do_lower_case: the file of {task.name} says that its models are cased")
    return True if flag else task.lower_case


def _device(device: str, no_cuda: bool) -> str:
    if no_cuda and device not in ("auto", "cpu"):
        raise UserError(f"--no_cuda and --device {device}: give one of them")
    return "cpu" if no_cuda else device


def _layer_map(text: str) -> str | tuple[int, ...]:
    if text in LAYER_MAPS:
        return text
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError:
        layers = (0,)
    if min(layers) < 1:
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


def _check_can_keep_states(values: dict[str, Any]) -> None:
    if values["padding"] == "max_length":
        raise UserError(
            "--cache_teacher_states: caches states of real tokens only, and --padding max_length compares padding too; "
            "leave out one of them"
        )
    if values["no_teacher_cache"]:
        raise UserError("--cache_teacher_states and --no_teacher_cache: give one of them")


def _stage(given: dict[str, bool]) -> Stage:
    stages = {
        "do_eval": Stage.EVALUATION,
        "do_predict": Stage.PREDICTIONS,
        "do_finetune": Stage.FINETUNE,
        "pred_distill": Stage.PREDICTION,
    }
    named = [flag for flag, value in given.items() if value]
    if len(named) > 1:
        raise UserError(f"give only one of {' and '.join(f'--{flag}' for flag in named)}")
    return stages[named[0]] if named else Stage.INTERMEDIATE


def _require_models(stage: Stage, teacher: Path | None, student: Path | None) -> None:
    if teacher is None and stage not in (Stage.EVALUATION, Stage.PREDICTIONS):
        raise UserError(f"--teacher_model is required for {stage.value}")
    if student is None and stage is not Stage.FINETUNE:
        raise UserError(f"--student_model is required for {stage.value}")


def _device_list(text: str) -> tuple[int, ...]:
    try:
        ids = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--device_list {text}: expected device ids split by commas, as 0,1,2") from None
    if min(ids) < 0 or len(set(ids)) < len(ids):
        raise UserError(f"--device_list {text}: expected different ids from 0 on")
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
    if not (math.isfinite(scale) and scale > 0):
        raise UserError(f"--loss_scale {text}: expected a number above 0, dynamic, or -1 for dynamic")
    return scale


def _check_numbers(values: dict) -> None:
    at_least = {
        "max_seq_length": 8,
        "train_batch_size": 1,
        "eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "eval_step": 1,
        "output_txt_step": 1,
        "workers": 0,
        "weight_decay": 0,
        "warmup_proportion": 0,
    }
    for name, least in at_least.items():
        if not values[name] >= least:
            raise UserError(f"--{name} {values[name]}: expected {least} or more")
    for name in ("learning_rate", "num_train_epochs", "temperature"):
        if not (math.isfinite(values[name]) and values[name] > 0):
            raise UserError(f"--{name} {values[name]}: expected a number above 0")
    if values["num_train_epochs"] > _MOST_EPOCHS:
        raise UserError(f"--num_train_epochs {values['num_train_epochs']:g}: expected {_MOST_EPOCHS} at most")
    if not math.isfinite(values["weight_decay"]):
        raise UserError(f"--weight_decay {values['weight_decay']}: expected a number")
    if values["warmup_proportion"] >= 1:
        raise UserError(f"--warmup_proportion {values['warmup_proportion']}: expected a share below 1")
    check_seed(values["seed"])
    if values["train_batch_size"] < values["gradient_accumulation_steps"]:
        raise UserError(
            f"--train_batch_size {values['train_batch_size']} is less than "
            f"--gradient_accumulation_steps {values['gradient_accumulation_steps']}: no example would be left for some"
        )
    if values["port"] is not None and not 0 < values["port"] < 65536:
        raise UserError(f"--port {values['port']}: expected 1 to 65535")


def check_seed(seed: int) -> None:
    """Checks a --seed.

    Raises:
        UserError: NumPy or torch could not take it.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: expected {'0 or more' if seed < 0 else 'a number below 2**32'}")
