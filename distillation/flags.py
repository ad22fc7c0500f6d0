"""The flags' names, kinds, defaults and help: the parser that the entries share.

What values may be, and what follows from them, is for `options.py`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from data_processing.downloads.addresses import Address, is_address, parse_address, redact
from transformer.errors import UserError


@dataclass(frozen=True)
class Entry:
    """What main.py and task_distill.py differ in.

    tasks: the tasks that it offers; None is all, and the user's own.
    tasks_with_defaults: those whose own epochs and length apply where no flag gives them; None is all.
    fps_acc_dir: without --fps_acc_dir logs go to the task's folder in it; None where the flag is required.
    max_seq_length, eval_step: what applies where neither flag nor task says.
    """

    prog: str
    description: str
    tasks: tuple[str, ...] | None
    tasks_with_defaults: tuple[str, ...] | None
    fps_acc_dir: Path | None
    max_seq_length: int
    eval_step: int


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


def place(text: str) -> Path | Address:
    """A folder that a flag names, or the address of an archive of it.

    Raises:
        UserError: it can be neither.
    """
    return parse_address(text) if is_address(text) else path(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose mistakes are UserErrors, so that they are told as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{redact(message)} (see --help)")


def build_parser(entry: Entry) -> argparse.ArgumentParser:
    """The parser of an entry's flags; defaults that depend on the task are None here."""
    parser = OneLineParser(
        prog=entry.prog, description=entry.description, allow_abbrev=False, formatter_class=HelpFormatter
    )
    group = parser.add_argument_group("what to do")
    if entry.tasks is None:
        group.add_argument("--task_name", help="a task of GLUE, in any case")
        group.add_argument("--task_file", type=path, help="a JSON file that describes a task of your own (README)")
    else:
        group.add_argument("--task_name", required=True, help=f"{' or '.join(entry.tasks)}, in any case")
    group.add_argument(
        "--pred_distill",
        action="store_true",
        help="prediction-layer distillation; without this flag, intermediate-layer distillation",
    )
    group.add_argument("--do_eval", action="store_true", help="evaluate the model in --student_model, train nothing")
    group.add_argument(
        "--do_predict",
        action="store_true",
        help="write what the model in --student_model predicts, in the form that GLUE takes",
    )
    group.add_argument("--predict_file", help="the file in --data_dir to predict (default: the task's test files)")
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

    _add_folders(parser, entry)
    _add_data(parser, entry)
    _add_training(parser, entry)
    _add_devices(parser, entry)
    return parser


def _add_folders(parser: argparse.ArgumentParser, entry: Entry) -> None:
    group = parser.add_argument_group("folders")
    if entry.tasks is None:
        group.add_argument("--data_dir", type=place, help="folder of the task's files (default: that of --task_file)")
    else:
        group.add_argument("--data_dir", required=True, type=place, help="folder of the task's .tsv files")
    group.add_argument(
        "--teacher_model",
        type=place,
        help="folder of config.json, weights, and vocab.txt or tokenizer.json; this and the other two may also be the "
        "http://, https:// or s3:// address of an archive, which is kept in --cache_dir",
    )
    group.add_argument("--student_model", type=place, help="likewise; not needed with --do_finetune")
    group.add_argument("--output_dir", required=True, type=path, help="where the trained model is written")
    group.add_argument(
        "--fps_acc_dir",
        required=entry.fps_acc_dir is None,
        type=path,
        help="folder of the fps and accuracy logs"
        + (f" (default: {entry.fps_acc_dir / 'TASK'})" if entry.fps_acc_dir else ""),
    )
    group.add_argument("--overwrite_output_dir", action="store_true", help="write into a folder that is not empty")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the training that was stopped in --output_dir, to the same weights as if it had not been; "
        "where there is none, begin",
    )
    group.add_argument(
        "--save_steps",
        type=int,
        help="optimizer steps between savings of what --resume goes on from (default: at evaluations and ends of "
        "epochs, at most once a minute)",
    )
    group.add_argument(
        "--cache_dir",
        default="",
        help="where downloads, tokenized files and the teacher's answers are kept for the next run "
        "(default: ~/.cache/tinybert)",
    )
    group.add_argument(
        "--cache_limit",
        type=float,
        default=20.0,
        help="its most gigabytes, downloads not counted; 0 keeps nothing else",
    )
    if entry.tasks is None:
        group.add_argument("--data_url", default="", help="another folder that what was made is copied to at the end")
    else:
        group.add_argument("--data_url", default="", help="of the original scripts; has no effect here")


def _add_data(parser: argparse.ArgumentParser, entry: Entry) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--max_seq_length",
        type=int,
        help=f"in WordPieces, specials included (default: the task's, else {entry.max_seq_length})",
    )
    group.add_argument(
        "--do_lower_case",
        action="store_true",
        help="the models are uncased; without this flag their folders and vocabularies tell",
    )
    group.add_argument("--aug_train", action="store_true", help="train on train_aug.tsv instead of train.tsv")
    group.add_argument(
        "--padding",
        choices=("longest", "max_length"),
        default="longest",
        help="longest: pad a batch to its longest example (with --amp on a CPU up to an eighth more), padding counts "
        "in no loss; max_length: pad to --max_seq_length and count padding, as the original does",
    )
    group.add_argument(
        "--group_by_length",
        action=argparse.BooleanOptionalAction,
        help="put examples of like length into a batch, which is faster (default: with --padding longest)",
    )
    group.add_argument("-j", "--workers", type=int, default=4, help="threads that prepare batches ahead")


def _add_training(parser: argparse.ArgumentParser, entry: Entry) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--train_batch_size", type=int, default=32, help="in all, over devices and accumulation steps")
    group.add_argument("--eval_batch_size", type=int, default=32, help="examples an evaluation batch")
    group.add_argument("--learning_rate", type=float, default=5e-5, help="the peak rate")
    group.add_argument("--weight_decay", "--wd", type=float, default=0.01, help="decoupled; not on biases, LayerNorms")
    group.add_argument("--num_train_epochs", type=float, help="may be a fraction (default: the task's, else 3)")
    group.add_argument("--warmup_proportion", type=float, default=0.1, help="share of steps in which the rate rises")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches an optimizer step")
    group.add_argument("--seed", type=int, default=42, help="of shuffling, dropout and new weights")
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="only operations that give the same bits every time: slower on a GPU, nothing new on a CPU, where they do",
    )
    group.add_argument("--eval_step", type=int, default=entry.eval_step, help="optimizer steps between evaluations")
    group.add_argument("--output_txt_step", type=int, default=100, help="steps between lines of the fps log")

    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--layer_map",
        default="uniform",
        help="the teacher's layer, from 1, that each student layer learns from, as 1,3,4,6; or uniform, top, bottom",
    )
    group.add_argument(
        "--losses",
        default="attention,hidden,embedding",
        help="what the intermediate stage learns, for ablations: any of these, split by commas",
    )
    group.add_argument(
        "--no_teacher_cache",
        action="store_true",
        help="ask the teacher in every step; otherwise the prediction stage asks it once for each example",
    )
    group.add_argument(
        "--cache_teacher_states",
        action="store_true",
        help="the intermediate stage asks the teacher once for each example and keeps its hidden states and attention "
        "scores in --cache_dir, for all epochs and later runs; gigabytes, of which a line tells beforehand",
    )
    group.add_argument("--temperature", type=float, default=1.0, help="of the prediction loss")
    group.add_argument(
        "--regression_target",
        choices=("labels", "teacher"),
        default="labels",
        help="what the prediction stage of a regression (STS-B) learns: the labels, as the original, or the teacher's",
    )
    group.add_argument(
        "--teacher_head",
        choices=("relu", "linear"),
        help="whether --teacher_model's classifier reads relu(pooled) or pooled (default: what its config says)",
    )


def _add_devices(parser: argparse.ArgumentParser, entry: Entry) -> None:
    group = parser.add_argument_group("devices and precision")
    group.add_argument("--device", choices=("npu", "gpu", "cpu", "auto"), default="auto", help="what to run on")
    if entry.tasks is None:
        group.add_argument("--no_cuda", action="store_true", help="of the original scripts: the same as --device cpu")
    group.add_argument("--device_list", default="0", help="device ids, as 0,1,2: one process each")
    group.add_argument("--addr", default="127.0.0.1", help="address of the first process")
    group.add_argument("--port", type=int, help="its port (default: a free one)")
    group.add_argument("--amp", action="store_true", help="mixed precision")
    group.add_argument("--opt_level", choices=("O0", "O1", "O2", "O3"), default="O1", help="of mixed precision")
    group.add_argument("--loss_scale", default="128", help="of fp16: a number; dynamic or -1 for dynamic scaling")
    group.add_argument(
        "--amp_dtype",
        choices=("auto", "bf16", "fp16"),
        default="auto",
        help="the half precision; auto: apex's where it is installed, else bf16 where the device has it",
    )
