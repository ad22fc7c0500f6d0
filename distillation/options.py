"""The flags, once. `main.py` and the commands beside it share them as one typed `Options`.

A mistake in a flag is a UserError, raised before any file is read.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import NoReturn

from data_processing.tasks import Task, find_task
from transformer.errors import UserError

_MOST_EPOCHS = 10_000_000


class Stage(Enum):
    """What a run does, by the name that logs and messages give it."""

    INTERMEDIATE = "intermediate-layer distillation"
    PREDICTION = "prediction-layer distillation"
    FINETUNE = "fine-tuning"
    EVALUATION = "evaluation"


@dataclass(frozen=True)
class Options:
    """A run's settings, checked. Fields are named as their flags."""

    task: Task
    stage: Stage
    data_dir: Path
    teacher_model: Path | None
    student_model: Path | None
    output_dir: Path
    fps_acc_dir: Path
    cache_dir: str
    data_url: str
    max_seq_length: int
    do_lower_case: bool
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
    overwrite_output_dir: bool

    def log_name(self, world_size: int) -> str:
        """The name of the log in fps_acc_dir of a run with so many processes, without .txt."""
        processes = f"{world_size}p"
        if self.stage is Stage.EVALUATION:
            return f"train_eval_{processes}"
        if self.stage is Stage.FINETUNE:
            return f"train_teacher_{processes}"
        kind = "performance" if self.performance else "finetune" if self.transfer_learning else "full"
        return f"train_{kind}_{processes}_{2 if self.stage is Stage.PREDICTION else 1}"


def path(text: str) -> Path:
    """A path that a flag names; it need not exist.

    Raises:
        UserError: no file can have that name.
    """
    if not text:
        raise UserError("a folder's name is empty; . is the current folder")
    try:
        Path(text).exists()
    except (OSError, ValueError) as error:
        raise UserError(f"{text}: no file can have this name ({getattr(error, 'strerror', error)})") from None
    return Path(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose mistakes are UserErrors, so that they are told as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The parser of the entries' flags; defaults that depend on the task are None here."""
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False, formatter_class=HelpFormatter)
    group = parser.add_argument_group("what to do")
    group.add_argument("--task_name", required=True, help="the task, in any case")
    group.add_argument(
        "--pred_distill",
        action="store_true",
        help="prediction-layer distillation; without this flag, intermediate-layer distillation",
    )
    group.add_argument("--do_eval", action="store_true", help="evaluate the model in --student_model, train nothing")
    group.add_argument(
        "--do_finetune",
        action="store_true",
        help="train the model in --teacher_model on the labels: that makes a teacher",
    )
    group.add_argument(
        "--transfer_learning",
        action="store_true",
        help="start from a student of another task: its classifier begins anew where the number of labels differs",
    )
    group.add_argument("--performance", action="store_true", help="measure speed: stop after 1000 steps")

    group = parser.add_argument_group("folders")
    group.add_argument("--data_dir", required=True, type=path, help="folder of the task's .tsv files")
    group.add_argument("--teacher_model", type=path, help="folder of config.json, weights and vocab.txt")
    group.add_argument("--student_model", type=path, help="likewise; not needed with --do_finetune")
    group.add_argument("--output_dir", required=True, type=path, help="where the trained model is written")
    group.add_argument("--fps_acc_dir", required=True, type=path, help="folder of the fps and accuracy logs")
    group.add_argument("--overwrite_output_dir", action="store_true", help="write into a folder that is not empty")
    group.add_argument("--cache_dir", default="", help="of the original scripts; has no effect here")
    group.add_argument("--data_url", default="", help="of the original scripts; has no effect here")

    group = parser.add_argument_group("data")
    group.add_argument("--max_seq_length", type=int, help="in WordPieces, specials included (default: the task's)")
    group.add_argument("--do_lower_case", action="store_true", help="set for an uncased model")
    group.add_argument("--aug_train", action="store_true", help="train on train_aug.tsv instead of train.tsv")
    group.add_argument(
        "--padding",
        choices=("longest", "max_length"),
        default="longest",
        help="longest: pad a batch to its longest example, padding counts in no loss; "
        "max_length: pad to --max_seq_length and count padding, as the original does",
    )
    group.add_argument(
        "--group_by_length",
        action="store_true",
        help="put examples of like length into a batch: faster with --padding longest",
    )
    group.add_argument("-j", "--workers", type=int, default=4, help="threads that prepare batches ahead")

    group = parser.add_argument_group("training")
    group.add_argument("--train_batch_size", type=int, default=32, help="in all, over devices and accumulation steps")
    group.add_argument("--eval_batch_size", type=int, default=32, help="examples an evaluation batch")
    group.add_argument("--learning_rate", type=float, default=5e-5, help="the peak rate")
    group.add_argument("--weight_decay", "--wd", type=float, default=0.01, help="decoupled; not on biases, LayerNorms")
    group.add_argument("--num_train_epochs", type=float, help="may be a fraction (default: the task's, else 3)")
    group.add_argument("--warmup_proportion", type=float, default=0.1, help="share of steps in which the rate rises")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches an optimizer step")
    group.add_argument("--temperature", type=float, default=1.0, help="of the prediction loss")
    group.add_argument("--seed", type=int, default=42, help="of shuffling, dropout and new weights")
    group.add_argument("--eval_step", type=int, default=100, help="optimizer steps between evaluations")
    group.add_argument("--output_txt_step", type=int, default=100, help="steps between lines of the fps log")
    group.add_argument(
        "--teacher_head",
        choices=("relu", "linear"),
        help="whether the teacher's classifier reads relu(pooled) or pooled (default: what its config says)",
    )

    group = parser.add_argument_group("devices and precision")
    group.add_argument("--device", choices=("npu", "gpu", "cpu", "auto"), default="auto", help="what to run on")
    group.add_argument("--device_list", default="0", help="device ids, as 0,1,2: one process each")
    group.add_argument("--addr", default="127.0.0.1", help="address of the first process")
    group.add_argument("--port", type=int, help="its port (default: a free one)")
    group.add_argument("--amp", action="store_true", help="mixed precision")
    group.add_argument("--opt_level", choices=("O0", "O1", "O2", "O3"), default="O1", help="of mixed precision")
    group.add_argument("--loss_scale", default="128", help="a number; dynamic or -1 for dynamic scaling")
    group.add_argument(
        "--amp_dtype",
        choices=("auto", "bf16", "fp16"),
        default="auto",
        help="the half precision; auto: apex's where it is installed, else bf16 where the device has it",
    )
    return parser


def parse_options(arguments: Sequence[str], prog: str, description: str, default_task: str) -> Options:
    """Parses and checks an entry's flags.

    Args:
        arguments: the command line without the program's name.
        prog, description: for --help.
        default_task: the task whose own defaults apply; for any other they are 3 epochs and length 64.

    Raises:
        UserError: a flag is unknown, missing, or its value is of no use.
    """
    values = vars(build_parser(prog, description).parse_args(list(arguments)))
    task = find_task(values.pop("task_name"))
    stage = _stage(values.pop("do_eval"), values.pop("do_finetune"), values.pop("pred_distill"))
    _require_models(stage, values["teacher_model"], values["student_model"])
    with_defaults = task.name == default_task
    if values["max_seq_length"] is None:
        values["max_seq_length"] = (task.max_seq_length if with_defaults else None) or 64
    if values["num_train_epochs"] is None:
        intermediate = with_defaults and stage is Stage.INTERMEDIATE
        values["num_train_epochs"] = (task.intermediate_epochs if intermediate else None) or 3.0
    values["device_list"] = _device_list(values["device_list"])
    values["loss_scale"] = _loss_scale(values["loss_scale"])
    _check_numbers(values)
    known = {field.name for field in fields(Options)}
    return Options(task=task, stage=stage, **{name: value for name, value in values.items() if name in known})


def _stage(do_eval: bool, do_finetune: bool, pred_distill: bool) -> Stage:
    if do_eval + do_finetune + pred_distill > 1:
        raise UserError("give only one of --do_eval, --do_finetune and --pred_distill")
    if do_eval:
        return Stage.EVALUATION
    if do_finetune:
        return Stage.FINETUNE
    return Stage.PREDICTION if pred_distill else Stage.INTERMEDIATE


def _require_models(stage: Stage, teacher: Path | None, student: Path | None) -> None:
    if teacher is None and stage is not Stage.EVALUATION:
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
