"""The command-line flags of main.py and task_distill.py: names, types, defaults and help.

`options.py` checks the values.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from data_processing.downloads.addresses import Address, is_address, parse_address, redact
from transformer.errors import UserError


@dataclass(frozen=True)
class Entry:
    """The differences between main.py and task_distill.py.

    tasks: the tasks that --task_name accepts; None for all of GLUE and --task_file.
    tasks_with_defaults: the tasks whose own epochs and length are the defaults; None for all.
    fps_acc_dir: the parent of the default log folder, which is named after the task; None if --fps_acc_dir is required.
    max_seq_length, eval_step: the defaults where the task has none.
    """

    prog: str
    description: str
    tasks: tuple[str, ...] | None
    tasks_with_defaults: tuple[str, ...] | None
    fps_acc_dir: Path | None
    max_seq_length: int
    eval_step: int


def path(text: str) -> Path:
    """Return a flag's path, which need not exist; a leading ~ is the user's home folder.

    Raises:
        UserError: no file can have this name.
    """
    if not text:
        raise UserError("a folder's name is empty; . is the current folder")
    text = os.path.expanduser(text)  # a shell leaves --output_dir=~/x as it is
    try:
        Path(text).exists()
    except (OSError, ValueError) as error:
        raise UserError(f"{text}: no file can have this name ({getattr(error, 'strerror', error)})") from None
    return Path(text)


def path_or_address(text: str) -> Path | Address:
    """Return a flag's path, or its address of an archive.

    Raises:
        UserError: the text is neither.
    """
    return parse_address(text) if is_address(text) else path(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises UserError instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{redact(message)} (see --help)")


def build_parser(entry: Entry) -> argparse.ArgumentParser:
    """Return the parser of an entry's flags. Defaults that depend on the task are None here."""
    parser = OneLineParser(
        prog=entry.prog, description=entry.description, allow_abbrev=False, formatter_class=HelpFormatter
    )
    _add_run_kind(parser, entry)
    _add_folders(parser, entry)
    _add_data(parser, entry)
    _add_training(parser, entry)
    _add_distillation(parser)
    _add_devices(parser, entry)
    return parser


def _add_group(parser: argparse.ArgumentParser, title: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Add a group of flags; return the functions that add a flag with a value and one without."""
    add = parser.add_argument_group(title).add_argument
    return add, partial(add, action="store_true")


def _add_run_kind(parser: argparse.ArgumentParser, entry: Entry) -> None:
    add, switch = _add_group(parser, "task and kind of run")
    if entry.tasks is None:
        add("--task_name", help="a GLUE task; upper or lower case")
        add("--task_file", type=path, help="JSON file that describes your own task (README)")
    else:
        add("--task_name", required=True, help=f"{' or '.join(entry.tasks)}; upper or lower case")
    switch("--pred_distill", help="prediction-layer distillation; without it, intermediate-layer distillation")
    switch("--do_eval", help="evaluate the model in --student_model; train nothing")
    switch("--do_predict", help="write the predictions of the model in --student_model in GLUE's submission format")
    add(
        "--predict_file", type=os.path.expanduser, help="file in --data_dir to predict (default: the task's test files)"
    )
    switch("--do_finetune", help="fine-tune the model in --teacher_model on the labels, to make a teacher")
    switch(
        "--transfer_learning", help="give a student of another task a new classifier if its labels are more or fewer"
    )
    switch("--performance", help="measure speed: stop after 1000 steps")


def _add_folders(parser: argparse.ArgumentParser, entry: Entry) -> None:
    add, switch = _add_group(parser, "files and folders")
    if entry.tasks is None:
        add("--data_dir", type=path_or_address, help="folder of the task's files (default: the folder of --task_file)")
    else:
        add("--data_dir", required=True, type=path_or_address, help="folder of the task's .tsv files")
    add(
        "--teacher_model",
        type=path_or_address,
        help="folder with config.json, weights, and vocab.txt or tokenizer.json. --teacher_model, --student_model and "
        "--data_dir also take the http://, https:// or s3:// address of an archive, which is stored in --cache_dir",
    )
    add("--student_model", type=path_or_address, help="folder of the student model; not needed with --do_finetune")
    add("--output_dir", required=True, type=path, help="folder for the trained model or the results")
    default = f" (default: {entry.fps_acc_dir / 'TASK'})" if entry.fps_acc_dir else ""
    add(
        "--fps_acc_dir",
        required=entry.fps_acc_dir is None,
        type=path,
        help=f"folder for the logs of speed (fps) and accuracy{default}",
    )
    switch("--overwrite_output_dir", help="allow an --output_dir that is not empty")
    switch(
        "--resume",
        help="continue the interrupted run in --output_dir; the weights will be those of a run without interruption. "
        "Start a new run if there is none",
    )
    add(
        "--save_steps",
        type=int,
        help="optimizer steps between checkpoints (default: at evaluations and ends of epochs, at most one a minute)",
    )
    add(
        "--cache_dir",
        default="",
        help="folder of downloads, tokenized files and teacher outputs for later runs (default: ~/.cache/tinybert)",
    )
    add(
        "--cache_limit",
        type=float,
        default=20.0,
        help="maximum size of the cache in gigabytes, without downloads; 0 caches nothing but downloads",
    )
    if entry.tasks is None:
        add(
            "--data_url",
            type=os.path.expanduser,
            default="",
            help="folder to which the outputs are copied at the end of the run",
        )
    else:
        add("--data_url", default="", help="accepted for compatibility with the original scripts; has no effect")


def _add_data(parser: argparse.ArgumentParser, entry: Entry) -> None:
    add, switch = _add_group(parser, "data")
    add(
        "--max_seq_length",
        type=int,
        help="maximum number of WordPieces per example, including special tokens; longer texts are cut "
        f"(default: the task's, otherwise {entry.max_seq_length})",
    )
    switch("--do_lower_case", help="the models are uncased; without it, the models' own files decide")
    switch("--aug_train", help="train on train_aug.tsv instead of train.tsv")
    add(
        "--padding",
        choices=("longest", "max_length"),
        default="longest",
        help="longest: pad a batch to its longest example (with --amp on a CPU, up to an eighth more) and exclude the "
        "padding from the losses; max_length: pad to --max_seq_length and include the padding, as the original does",
    )
    add(
        "--group_by_length",
        action=argparse.BooleanOptionalAction,
        help="make batches of examples of similar length, which is faster (default: only with --padding longest)",
    )
    add("-j", "--workers", type=int, default=4, help="threads that prepare batches in advance")


def _add_training(parser: argparse.ArgumentParser, entry: Entry) -> None:
    add, switch = _add_group(parser, "training")
    add("--train_batch_size", type=int, default=32, help="examples per optimizer step, over all devices")
    add("--eval_batch_size", type=int, default=32, help="examples per evaluation batch")
    add("--learning_rate", type=float, default=5e-5, help="peak learning rate")
    add("--weight_decay", "--wd", type=float, default=0.01, help="decoupled; not for biases and LayerNorm")
    add("--num_train_epochs", type=float, help="epochs, may be a fraction (default: the task's, otherwise 3)")
    add("--warmup_proportion", type=float, default=0.1, help="share of the steps in which the learning rate rises")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per optimizer step")
    add("--seed", type=int, default=42, help="random seed of shuffling, dropout and new weights")
    switch("--deterministic", help="use only deterministic algorithms, which are slower on a GPU; a CPU always does")
    add(
        "--eval_step",
        type=int,
        default=entry.eval_step,
        help="optimizer steps between evaluations; a shorter epoch is evaluated at its end",
    )
    add("--output_txt_step", type=int, default=100, help="optimizer steps between lines of the speed log")


def _add_distillation(parser: argparse.ArgumentParser) -> None:
    add, switch = _add_group(parser, "distillation")
    add(
        "--layer_map",
        default="uniform",
        help="the teacher layer, counted from 1, for each student layer, for example 1,3,4,6; or uniform, top, bottom",
    )
    add("--losses", default="attention,hidden,embedding", help="losses of the intermediate stage, split by commas")
    switch("--no_teacher_cache", help="run the teacher in every step, also in the prediction stage")
    switch(
        "--cache_teacher_states",
        help="in the intermediate stage, run the teacher once per example and store its hidden states and attention "
        "scores in --cache_dir for all epochs and later runs; takes gigabytes, the log says how many",
    )
    add("--temperature", type=float, default=1.0, help="softmax temperature of the prediction loss")
    add(
        "--regression_target",
        choices=("labels", "teacher"),
        default="labels",
        help="target of the prediction stage in a regression task (STS-B): the labels, as in the original, or the "
        "teacher's scores",
    )
    add(
        "--teacher_head",
        choices=("relu", "linear"),
        help="whether the classifier of --teacher_model has a relu before it (default: according to its config.json)",
    )


def _add_devices(parser: argparse.ArgumentParser, entry: Entry) -> None:
    add, switch = _add_group(parser, "devices and precision")
    add(
        "--device",
        choices=("npu", "gpu", "cpu", "auto"),
        default="auto",
        help="device type; auto: npu if there is one, otherwise gpu, otherwise cpu",
    )
    if entry.tasks is None:
        switch("--no_cuda", help="the original scripts' name for --device cpu")
    add("--device_list", default="0", help="device ids separated by commas, for example 0,1,2; one process per device")
    add("--addr", default="127.0.0.1", help="address of the first process")
    add("--port", type=int, help="port of the first process (default: a free one)")
    switch("--amp", help="mixed precision")
    add(
        "--opt_level",
        choices=("O0", "O1", "O2", "O3"),
        default="O1",
        help="with --amp. O0: fp32; O1: matrix products in half precision; O2: weights too, with fp32 copies; "
        "O3: half precision only",
    )
    add("--loss_scale", default="128", help="loss scale of fp16: a number, or dynamic (also -1)")
    add(
        "--amp_dtype",
        choices=("auto", "bf16", "fp16"),
        default="auto",
        help="half-precision type; auto: apex's if it is installed, otherwise bf16 if supported, otherwise fp16",
    )
