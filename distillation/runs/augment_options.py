"""The flags of data_augmentation.py, checked, as one typed `AugmentOptions`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_processing.augmentation.augmenter import Settings
from data_processing.task_files import read_task_file
from data_processing.tasks import Task, find_task
from distillation.flags import HelpFormatter, OneLineParser, path
from distillation.options import check_seed
from transformer.errors import UserError

PROG = "data_augmentation.py"
_LARGEST = 10_000  # value of --N and --M


@dataclass(frozen=True)
class AugmentOptions:
    """The settings of an augmentation, checked; most fields are named as their flags.

    folder: holds the task's train.tsv. do_lower_case: None leaves it to the models' folders. glove_embs: None for
    --no_glove. train_mlm_head: steps; None trains none. teacher_model: None without --relabel.
    """

    task: Task
    folder: Path
    settings: Settings
    pretrained_bert_model: Path
    glove_embs: Path | None
    do_lower_case: bool | None
    mlm_context: str
    train_mlm_head: int | None
    teacher_model: Path | None
    resume: bool
    overwrite_output_file: bool
    device: str
    device_list: tuple[int, ...]
    precision: str


def parse_augment_options(arguments: Sequence[str]) -> AugmentOptions:
    """Return the flags of the command line, checked as far as that is possible without the models.

    Raises:
        UserError: a flag is unknown, missing or has a value that cannot be used.
    """
    flags = build_augment_parser().parse_args(list(arguments))
    if (flags.task_name is None) == (flags.task_file is None):
        raise UserError("give one of --task_name and --task_file (see --help)")
    task = find_task(flags.task_name) if flags.task_name is not None else read_task_file(flags.task_file)
    n = task.augmentation_n if flags.N is None else flags.N
    if n is None:
        raise UserError(f"--N: {task.name} has no default number of new texts; give one, as --N 20")
    _check_numbers(flags, n)
    if (flags.glove_embs is None) == (not flags.no_glove):
        raise UserError("give --glove_embs FILE, or --no_glove to leave words of several WordPieces as they are")
    if bool(flags.relabel) != (flags.teacher_model is not None):
        raise UserError("give both or neither of --relabel teacher and --teacher_model DIR")
    if flags.relabel and task.is_regression:
        raise UserError(f"--relabel teacher: {task.name} is a regression, which has no classes")
    return AugmentOptions(
        task=task,
        folder=_data_folder(flags.data_dir, flags.glue_dir, flags.task_file, task),
        settings=Settings(n, flags.M, flags.p, flags.seed),
        pretrained_bert_model=flags.pretrained_bert_model,
        glove_embs=flags.glove_embs,
        do_lower_case=True if flags.do_lower_case else task.lower_case,
        mlm_context=flags.mlm_context,
        train_mlm_head=flags.train_mlm_head,
        teacher_model=flags.teacher_model,
        resume=flags.resume,
        overwrite_output_file=flags.overwrite_output_file,
        device=flags.device,
        device_list=_device_list(flags.device_list),
        precision=flags.precision,
    )


def build_augment_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = OneLineParser(
        prog=PROG,
        description="Augment a task's training file: train.tsv becomes train_aug.tsv.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    _add_inputs(parser.add_argument_group("inputs"))
    _add_method(parser.add_argument_group("method"))
    group = parser.add_argument_group("the run")
    group.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    group.add_argument(
        "--overwrite_output_file", action="store_true", help="replace an augmented file, or an unfinished one"
    )
    group.add_argument("--device", choices=("npu", "gpu", "cpu", "auto"), default="auto", help="kind of device")
    group.add_argument("--device_list", default="0", help="device ids, as 0,1,2: one process each")
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the models' matrix products; auto: bf16 where the device supports it in hardware, else fp32",
    )
    return parser


def _add_inputs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pretrained_bert_model", type=path, required=True, help="folder of a BERT with its masked-LM head"
    )
    group.add_argument(
        "--glove_embs",
        type=path,
        help="GloVe vectors, text or gzip: neighbours replace words of several WordPieces",
    )
    group.add_argument("--no_glove", action="store_true", help="use no vectors: such words stay as they are")
    group.add_argument("--glue_dir", type=path, help="holds the tasks' folders, as SST-2 or MNLI")
    group.add_argument("--data_dir", type=path, help="the task's own folder, instead of --glue_dir")
    group.add_argument("--task_name", help="a task of GLUE, in any case")
    group.add_argument("--task_file", type=path, help="a JSON file that describes a task of your own (README)")
    group.add_argument(
        "--do_lower_case",
        action="store_true",
        help="the model is uncased; without this flag its folder and vocabulary decide",
    )


def _add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--N", type=int, help="largest number of new texts per text (default: the task's)")
    group.add_argument("--M", type=int, default=15, help="largest number of candidates per word")
    group.add_argument("--p", type=float, default=0.4, help="probability that a word is replaced in a new text")
    group.add_argument(
        "--mlm_context",
        choices=("original", "masked"),
        default="original",
        help="input of the masked LM. original: the masked text and, as second segment, the unmasked text, as in the "
        "original code; masked: the masked text alone, as in the paper, and twice as fast",
    )
    group.add_argument(
        "--train_mlm_head",
        type=int,
        metavar="STEPS",
        help="for an encoder without a masked-LM head: first train one on the task's text, for so many steps",
    )
    group.add_argument(
        "--relabel",
        choices=("teacher",),
        help="teacher: leave out new texts that --teacher_model assigns to another class than the original text",
    )
    group.add_argument("--teacher_model", type=path, help="folder of a classifier of this task, for --relabel")
    group.add_argument(
        "--seed",
        type=int,
        default=42,
        help="of all random draws. On one machine and in one --precision a seed gives the same file, whatever the "
        "number of processes and interruptions; and whatever the number of threads, unless a head is trained",
    )


def _check_numbers(flags: argparse.Namespace, n: int) -> None:
    for name, value in (("N", n), ("M", flags.M)):
        if not 1 <= value <= _LARGEST:
            raise UserError(f"--{name} {value}: expected 1 to {_LARGEST}")
    if not (math.isfinite(flags.p) and 0 < flags.p <= 1):
        raise UserError(f"--p {flags.p}: expected a probability above 0 and at most 1")
    if flags.train_mlm_head is not None and flags.train_mlm_head < 1:
        raise UserError(f"--train_mlm_head {flags.train_mlm_head}: expected 1 step or more")
    check_seed(flags.seed)


def _data_folder(data_dir: Path | None, glue_dir: Path | None, task_file: Path | None, task: Task) -> Path:
    """Return the folder of the task's train.tsv; in --glue_dir its name may be in any case."""
    if glue_dir is None or data_dir is not None or task_file is not None:
        if glue_dir is not None:
            raise UserError("--glue_dir: give it with --task_name alone; --data_dir is a task's own folder")
        folder = data_dir or (task_file and task_file.parent)
        if folder is None:
            raise UserError("give --glue_dir, which holds the tasks' folders, or --data_dir, the task's own")
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; --data_dir holds {task.train_file}")
        return folder
    if not glue_dir.is_dir():
        raise UserError(f"{glue_dir}: no such folder; --glue_dir holds the tasks' folders, as {task.name}")
    try:
        children = sorted(glue_dir.iterdir(), reverse=True)
    except OSError as error:
        raise UserError(f"--glue_dir {glue_dir}: cannot be read ({error.strerror})") from None
    folders = {child.name.lower(): child for child in children if child.is_dir()}
    for name in (task.name, task.name.rpartition("-")[0]):  # MNLI and MNLI-mm share a folder
        if name.lower() in folders:
            return folders[name.lower()]
    raise UserError(f"{glue_dir / task.name}: no such folder; it holds the task's {task.train_file}")


def _device_list(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise UserError(f"--device_list {text}: expected different device ids split by commas, as 0,1,2")
    return tuple(int(part) for part in parts)
