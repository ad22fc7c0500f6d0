"""Data augmentation: train.tsv becomes train_aug.tsv, each text followed by up to N new ones (paper, algorithm 1).

    python data_processing/data_augmentation.py --pretrained_bert_model bert_base_uncased \
        --glove_embs glove.6B.300d.txt --glue_dir glue_dir --task_name SST-2

A command like main.py, which uses the project's devices and models; the files beside it know the method alone.
"""

from __future__ import annotations

import logging
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

if __package__ in (None, ""):  # python data_processing/data_augmentation.py: the root is not where it looks
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_processing.augmentation.augmenter import BLOCK, Settings
from data_processing.augmentation.resumable_file import UnfinishedFile
from data_processing.examples import TextRows
from data_processing.files import file_digest
from data_processing.tables import ENCODING
from data_processing.task_files import read_task_file
from data_processing.tasks import Task, find_task
from distillation.checkpoints.outputs import save_model
from distillation.flags import HelpFormatter, OneLineParser, path
from distillation.launch import run_entry
from distillation.models import choose_case, load_complete
from distillation.options import check_seed
from distillation.runs.augment import AugmentationPlan, Augmented, Block, word_vectors
from distillation.runs.mlm_head import load_masked_lm, pieces_of, train
from distillation.runtime.device import check_ids, choose_device, open_device
from distillation.runtime.logs import Progress
from distillation.runtime.precision import cpu_has_bf16
from distillation.runtime.worker_pool import in_order
from transformer.errors import UserError
from transformer.file_utils import CONFIG_NAME, SAFETENSORS_NAME, WEIGHTS_NAME
from transformer.vocabulary import vocabulary_path

logger = logging.getLogger(__name__)

PROG = "data_augmentation.py"
_MOST_TEXTS_LEARNED = 2_000_000  # by --train_mlm_head; bounds memory
_DEFAULT_LENGTH = 128
_METHOD = 4  # raised when the same flags come to give another file
_MOST = 10_000  # new texts, candidates


def build_parser() -> OneLineParser:
    """The parser of the flags."""
    parser = OneLineParser(
        prog=PROG, description=(__doc__ or "").splitlines()[0], allow_abbrev=False, formatter_class=HelpFormatter
    )
    group = parser.add_argument_group("what is read")
    group.add_argument(
        "--pretrained_bert_model", type=path, required=True, help="folder of a BERT with its masked-LM head"
    )
    group.add_argument(
        "--glove_embs", type=path, help="GloVe's vectors, text or gzip: neighbours of words of several WordPieces"
    )
    group.add_argument("--no_glove", action="store_true", help="do without them: such words stay as they are")
    group.add_argument("--glue_dir", type=path, help="holds the tasks' folders, as SST-2 or MNLI")
    group.add_argument("--data_dir", type=path, help="the task's own folder, in place of --glue_dir")
    group.add_argument("--task_name", help="a task of GLUE, in any case")
    group.add_argument("--task_file", type=path, help="a JSON file that describes a task of your own (README)")
    group.add_argument(
        "--do_lower_case",
        action="store_true",
        help="the model is uncased; without this flag its folder and vocabulary tell",
    )
    group = parser.add_argument_group("what is made of it")
    group.add_argument("--N", type=int, help="new texts made of one, at most (default: the task's)")
    group.add_argument("--M", type=int, default=15, help="candidates of a word, at most")
    group.add_argument("--p", type=float, default=0.4, help="how probably a word is replaced in a new text")
    group.add_argument(
        "--mlm_context",
        choices=("original", "masked"),
        default="original",
        help="what the masked LM sees. original: the masked text and, as second segment, the text itself, as in the "
        "original code; masked: the masked text alone, as in the paper, and twice as fast",
    )
    group.add_argument(
        "--train_mlm_head",
        type=int,
        metavar="STEPS",
        help="for an encoder without a masked-LM head: train one on the task's own text first, for so many steps",
    )
    group.add_argument(
        "--relabel",
        choices=("teacher",),
        help="teacher: leave out the new texts that --teacher_model puts into another class than the original",
    )
    group.add_argument("--teacher_model", type=path, help="folder of a classifier of this task, for --relabel")
    group.add_argument(
        "--seed",
        type=int,
        default=42,
        help="of all draws. On one machine and in one --precision a seed gives the same file, however many processes "
        "and stops there are, and however many threads unless a head is trained",
    )
    group = parser.add_argument_group("how")
    group.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    group.add_argument(
        "--overwrite_output_file", action="store_true", help="replace an augmented file, or an unfinished one"
    )
    group.add_argument("--device", choices=("npu", "gpu", "cpu", "auto"), default="auto", help="what to run on")
    group.add_argument("--device_list", default="0", help="device ids, as 0,1,2: one process each")
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the models' matrix products; auto: bf16 where the device multiplies in it, else fp32",
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    """Parses the flags and makes the file."""
    flags = build_parser().parse_args(list(arguments))
    task = _check(flags)
    folder = _data_folder(flags, task)
    kind = choose_device(flags.device)
    ids = _device_ids(flags.device_list)
    check_ids(kind, ids)
    with _stoppable():
        output = UnfinishedFile(folder / task.augmented_file)
        try:
            output.open(flags.resume, flags.overwrite_output_file)
            _make(flags, task, folder, kind, ids, output)
        except _Stopped as stop:
            output.close()
            kept = output.folder.exists()
            how = f"--resume goes on with {output.folder}" if kept else "nothing was done yet"
            print(f"{PROG}: stopped; {how}", file=sys.stderr)
            raise SystemExit(128 + stop.number) from None
        finally:
            output.close()


def _make(flags: Any, task: Task, folder: Path, kind: str, ids: tuple[int, ...], output: UnfinishedFile) -> None:
    source = folder / task.train_file
    rows = TextRows(source, task)
    count = sum(1 for _ in rows)
    asked_case = True if flags.do_lower_case else task.lower_case
    lower = choose_case(asked_case, (flags.pretrained_bert_model, flags.teacher_model))
    half = _half(flags.precision, kind)
    vectors = None if flags.no_glove else word_vectors(flags.glove_embs)
    masked_lm = load_masked_lm(flags.pretrained_bert_model, lower, flags.seed)
    if not masked_lm.has_head and flags.train_mlm_head is None:
        raise UserError(
            f"{flags.pretrained_bert_model}: this model has no masked-LM head (cls.predictions), so it cannot predict "
            "words; --train_mlm_head 1000 trains one on the task's text first, or give a BERT as it was pre-trained"
        )
    _check_fits(flags, masked_lm.model.config)
    if flags.relabel:
        load_complete(flags.teacher_model, task, lower, use="the teacher")
    identity = {
        "the method": f"{_METHOD}, blocks of {BLOCK} rows, torch {torch.__version__}",
        "--task": task.name,
        "--N": flags.N,
        "--M": flags.M,
        "--p": flags.p,
        "--seed": flags.seed,
        "--mlm_context": flags.mlm_context,
        "--train_mlm_head": flags.train_mlm_head,
        "--relabel": flags.relabel,
        "precision": f"{'fp32' if half is None else str(half).removeprefix('torch.')} on {kind}",
        "lower-casing": lower,
        "the content of train.tsv": file_digest(source),
        "the model": _model_digest(flags.pretrained_bert_model),
        "the word vectors": None if vectors is None else vectors.digest(),
        "the teacher": _model_digest(flags.teacher_model) if flags.relabel else None,
    }
    if not output.begin(identity, flags.resume, flags.overwrite_output_file):
        logger.info("%s: is done already; the run was stopped after its last row", output.path)
        return
    asked = flags.pretrained_bert_model
    if flags.train_mlm_head is not None:
        asked = output.folder / "masked_lm"
        if not (asked / WEIGHTS_NAME).exists():
            masked_lm.model.to(open_device(kind, ids[0]))
            texts = _texts(rows, masked_lm.tokenizer, count)
            right = train(masked_lm, texts, flags.train_mlm_head, flags.seed, half)
            logger.info("the masked-LM head predicts %.1f %% of held-out masked tokens rightly", 100 * right)
            save_model(asked, masked_lm.model.config, masked_lm.model.state_dict(), masked_lm.tokenizer)
    del masked_lm
    plan = AugmentationPlan(
        rows=rows,
        task=task,
        settings=Settings(flags.N, flags.M, flags.p, flags.seed),
        masked_lm=asked,
        do_lower_case=lower,
        with_original=flags.mlm_context == "original",
        vectors=None if flags.no_glove else flags.glove_embs,
        half=half,
        teacher=flags.teacher_model if flags.relabel else None,
        max_seq_length=task.max_seq_length or _DEFAULT_LENGTH,
    )
    _write(plan, rows, count, kind, ids, output)


def _write(
    plan: AugmentationPlan, rows: TextRows, count: int, kind: str, ids: tuple[int, ...], output: UnfinishedFile
) -> None:
    total = -(-count // BLOCK)
    if output.blocks:
        logger.info("%s: %d of %d blocks are done already", output.folder, output.blocks, total)
    progress = Progress("augmentation", total - output.blocks, unit="block")
    blocks = islice(_blocks(rows), output.blocks, None)
    done: Augmented
    for done in in_order(plan, kind, ids, blocks):
        head = b"" if output.blocks else rows.head.encode(*ENCODING)
        output.add(head + done.content, rows=done.rows, dropped=done.dropped)
        progress.advance()
    progress.close()
    output.finish()
    dropped = output.tally["dropped"]
    logger.info(
        "%s: %d rows became %d%s",
        output.path,
        count,
        output.tally["rows"],
        f"; {dropped} more were left out, since the teacher puts them into another class" if plan.teacher else "",
    )


def _blocks(rows: TextRows) -> Iterator[Block]:
    source, first = iter(rows), 0
    while block := list(islice(source, BLOCK)):
        yield Block(first, block)
        first += len(block)


def _texts(rows: TextRows, tokenizer: Any, count: int) -> list[list[int]]:
    """The file's texts as a head learns them; of a very long file every second, or third row, and so on."""
    step = -(-count // _MOST_TEXTS_LEARNED)
    texts = [text for row in islice(rows, 0, None, step) for text in row.texts]
    return pieces_of([text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for text in texts], tokenizer)


def _check(flags: Any) -> Task:
    """Checks what can be checked without the models; returns the task. Fills in its N."""
    if (flags.task_name is None) == (flags.task_file is None):
        raise UserError("give one of --task_name and --task_file (see --help)")
    task = find_task(flags.task_name) if flags.task_name is not None else read_task_file(flags.task_file)
    if flags.N is None:
        flags.N = task.augmentation_n
    if flags.N is None:
        raise UserError(f"--N: {task.name} has no number of its own; give one, as --N 20")
    for name in ("N", "M"):
        if not 1 <= getattr(flags, name) <= _MOST:
            raise UserError(f"--{name} {getattr(flags, name)}: expected 1 to {_MOST}")
    if not (math.isfinite(flags.p) and 0 < flags.p <= 1):
        raise UserError(f"--p {flags.p}: expected a probability above 0, 1 at most")
    if flags.train_mlm_head is not None and flags.train_mlm_head < 1:
        raise UserError(f"--train_mlm_head {flags.train_mlm_head}: expected 1 step or more")
    if (flags.glove_embs is None) == (not flags.no_glove):
        raise UserError("give --glove_embs FILE, or --no_glove to leave words of several WordPieces as they are")
    if bool(flags.relabel) != (flags.teacher_model is not None):
        raise UserError("--relabel teacher and --teacher_model DIR belong together; give both or neither")
    if flags.relabel and task.is_regression:
        raise UserError(f"--relabel teacher: {task.name} is a regression, it has no classes that could change")
    check_seed(flags.seed)
    return task


def _data_folder(flags: Any, task: Task) -> Path:
    if flags.glue_dir is not None and (flags.data_dir is not None or flags.task_file is not None):
        raise UserError("--glue_dir: give it with --task_name alone; --data_dir is a task's own folder")
    if flags.data_dir is not None or flags.task_file is not None:
        folder = flags.data_dir or flags.task_file.parent
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; --data_dir holds {task.train_file}")
        return folder
    if flags.glue_dir is None:
        raise UserError("give --glue_dir, which holds the tasks' folders, or --data_dir, the task's own")
    if not flags.glue_dir.is_dir():
        raise UserError(f"{flags.glue_dir}: no such folder; --glue_dir holds the tasks' folders, as {task.name}")
    try:
        there = {
            child.name.lower(): child for child in sorted(flags.glue_dir.iterdir(), reverse=True) if child.is_dir()
        }
    except OSError as error:
        raise UserError(f"--glue_dir {flags.glue_dir}: cannot be read ({error.strerror})") from None
    for name in (task.name, task.name.rpartition("-")[0]):  # both of MNLI's sets lie in one folder
        if name.lower() in there:
            return there[name.lower()]
    raise UserError(f"{flags.glue_dir / task.name}: no such folder; it holds the task's {task.train_file}")


def _check_fits(flags: Any, config: Any) -> None:
    if flags.mlm_context == "original" and config.type_vocab_size < 2:
        raise UserError(
            f"{flags.pretrained_bert_model}: the model has one segment; --mlm_context masked needs no second one"
        )
    if config.max_position_embeddings < 8:
        raise UserError(f"{flags.pretrained_bert_model}: the model has {config.max_position_embeddings} positions only")


def _device_ids(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise UserError(f"--device_list {text}: expected different device ids split by commas, as 0,1,2")
    return tuple(int(part) for part in parts)


def _half(precision: str, kind: str) -> torch.dtype | None:
    if precision == "auto":
        fast = cpu_has_bf16() if kind == "cpu" else _has_bf16(kind)
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if precision == "bf16" else None


def _has_bf16(kind: str) -> bool:
    return bool(getattr(torch, kind).is_bf16_supported(including_emulation=False))


def _model_digest(folder: Path) -> str:
    weights = next(name for name in (SAFETENSORS_NAME, WEIGHTS_NAME) if (folder / name).is_file())
    files = folder / weights, folder / CONFIG_NAME, vocabulary_path(folder)
    return " ".join(file_digest(file)[:16] for file in files)


class _Stopped(BaseException):
    """A signal has asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """Within it SIGINT and SIGTERM raise _Stopped."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        raise _Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(run_entry(PROG, main))
