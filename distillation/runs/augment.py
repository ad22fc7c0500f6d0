"""Data augmentation as a run: a task's training file becomes a larger one, in blocks of rows shared among processes.

The method is in `data_processing/augmentation/`. This module loads the models, starts or resumes the output file, and
distributes the blocks to the devices.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data_processing.augmentation.augmenter import BLOCK, Augmenter, Settings
from data_processing.augmentation.glove import WordVectors, read_vectors
from data_processing.augmentation.masked_words import MaskedWords, equal_length_batches, map_batches
from data_processing.augmentation.resumable_file import ResumableFile
from data_processing.examples import Row, TextRows, unlabelled
from data_processing.features import Features, make_features
from data_processing.files import file_digest
from data_processing.tables import ENCODING
from data_processing.tasks import Task
from distillation.checkpoints.outputs import save_model
from distillation.models import LoadedModel, choose_case, load_complete
from distillation.runs.augment_options import AugmentOptions
from distillation.runs.mlm_head import MaskedLM, encode_texts, load_masked_lm, train_masked_lm
from distillation.runtime.device import check_ids, choose_device, open_device
from distillation.runtime.logs import Progress
from distillation.runtime.precision import cpu_has_bf16
from distillation.runtime.signals import Stopped
from distillation.runtime.worker_pool import map_in_order
from transformer import packed_inference
from transformer.errors import UserError
from transformer.file_utils import CONFIG_NAME, MODEL_FILES, SAFETENSORS_NAME, WEIGHTS_NAME
from transformer.vocabulary import vocabulary_path

logger = logging.getLogger(__name__)

_METHOD = 4  # to be raised by a change after which the same flags give another file
_MOST_TRAINING_TEXTS = 2_000_000  # for a masked-LM head; bounds memory
_MIN_POSITIONS = 8
_HEAD_FOLDER = "masked_lm"  # in the folder of the unfinished file: the model with the trained head
_DEFAULT_LENGTH = 128  # of the teacher's inputs, in tokens
_TOKENS_PER_BATCH = {"cpu": 3200, "cuda": 32768, "npu": 32768}  # of the teacher; not a flag: it could change classes


def augment(options: AugmentOptions) -> None:
    """Write the augmented file, or continue writing it.

    Raises:
        UserError: a flag names something that cannot be used, or the file cannot be written.
        RunFailed: a process died; the finished blocks stay.
        Stopped: a signal arrived; the finished blocks stay.
    """
    kind = choose_device(options.device)
    check_ids(kind, options.device_list)
    path = options.folder / options.task.augmented_file
    kept = {_HEAD_FOLDER: MODEL_FILES}
    with ResumableFile(path, options.resume, options.overwrite_output_file, kept) as output:
        try:
            rows = TextRows(options.folder / options.task.train_file, options.task)
            count = sum(1 for _ in rows)
            plan, masked_lm = _load(options, rows, kind)
            if not output.start(_identity(options, plan, kind)):
                logger.info("%s: is complete already; there is nothing left to do", path)
                return
            if options.train_mlm_head is not None:
                head_folder = _train_head(options, plan, masked_lm, kind, count, output.folder)
                plan = replace(plan, masked_lm=head_folder)
            del masked_lm  # each process loads its own
            _write_blocks(plan, count, kind, options.device_list, output)
        except Stopped as error:
            resumable = output.is_worth_resuming()
            where = f"after {output.blocks} blocks of rows; --resume continues" if resumable else "before the first row"
            raise Stopped(error.number, where) from None


class Block(NamedTuple):
    """Successive rows of the training file, and the number of the first of them, from 0."""

    first: int
    rows: list[Row]


class AugmentedBlock(NamedTuple):
    """The lines of a block's augmented rows, their number, and how many new rows the teacher filtered out."""

    content: bytes
    rows: int
    dropped: int


@dataclass(frozen=True)
class AugmentationPlan:
    """Everything that a process needs to augment blocks of rows.

    masked_lm: folder of a model with its head. vectors: None for no word vectors. half: dtype of matrix products, None
    for fp32. teacher: classifier that filters new texts, None for none. max_seq_length: of the teacher's inputs.
    """

    rows: TextRows
    task: Task
    settings: Settings
    masked_lm: Path
    do_lower_case: bool
    with_original: bool
    vectors: Path | None
    half: torch.dtype | None
    teacher: Path | None
    max_seq_length: int

    def build(self, device: torch.device, threads: int) -> Callable[[Block], AugmentedBlock]:
        """Load the models onto a device; return the function that augments a block there."""
        model, tokenizer, _ = load_masked_lm(self.masked_lm, self.do_lower_case)
        masked = MaskedWords(model.to(device), tokenizer, self.with_original, self.half, threads)
        vectors = None if self.vectors is None else _word_vectors(self.vectors)
        teacher = None
        if self.teacher is not None:
            loaded = load_complete(self.teacher, self.task, self.do_lower_case, use="the teacher")
            teacher = TeacherFilter(loaded, self.task, self.max_seq_length, device, self.half, threads)
        augmenter = Augmenter(self.settings, tokenizer, masked, vectors)

        def augment_block(block: Block) -> AugmentedBlock:
            with _without_onednn(device, self.half):
                augmented = augmenter.augment(block.rows, block.first)
                count = sum(map(len, augmented))
                if teacher is not None:
                    augmented = teacher.filter(augmented)
            pairs = zip(block.rows, augmented, strict=True)
            lines = [self.rows.format_row(row, texts) for row, of_row in pairs for texts in of_row]
            return AugmentedBlock("".join(lines).encode(*ENCODING), len(lines), count - len(lines))

        return augment_block


class TeacherFilter:
    """Leaves out the new texts that a teacher assigns to another class than the original.

    All inputs of a batch have one length, and batches depend on the texts alone, as those of `MaskedWords`.
    """

    def __init__(
        self,
        teacher: LoadedModel,
        task: Task,
        max_seq_length: int,
        device: torch.device,
        half: torch.dtype | None = None,
        threads: int = 1,
    ) -> None:
        self._model, self._tokenizer = teacher.model.to(device).eval(), teacher.tokenizer
        self._task, self._length = task, min(max_seq_length, teacher.model.config.max_position_embeddings)
        self._device, self._half, self._threads = device, half, threads
        if device.type == "cpu" and half == torch.bfloat16 and packed_inference.can_pack():
            packed_inference.pack_linear_layers(self._model, bucket_rows=True)

    def filter(self, augmented: Sequence[Sequence[tuple[str, ...]]]) -> list[list[tuple[str, ...]]]:
        """Return the texts of each row, the first of which is the original, that have the original's class."""
        sides = list(zip(*(map(_readable, texts) for row in augmented for texts in row), strict=True))
        examples = unlabelled(sides[0], self._task, sides[1] if len(sides) > 1 else None)
        classes = iter(self._classes(make_features(examples, self._tokenizer, self._length)))
        result = []
        for row in augmented:
            of_row = [next(classes) for _ in row]
            result.append([texts for texts, label in zip(row, of_row, strict=True) if label == of_row[0]])
        return result

    def _classes(self, features: Features) -> list[int]:
        batches = equal_length_batches(features.lengths.tolist(), _TOKENS_PER_BATCH[self._device.type])
        threads = self._threads if self._device.type == "cpu" else 1
        predicted = map_batches(partial(self._predict, features), batches, threads)
        classes = np.empty(len(features), dtype=np.int64)
        for batch, of_batch in zip(batches, predicted, strict=True):
            classes[batch] = of_batch
        return classes.tolist()

    @torch.inference_mode()
    def _predict(self, features: Features, batch: list[int]) -> np.ndarray:
        """Return the classes [batch] of inputs of one length."""
        starts = features.offsets[batch][:, None]
        positions = np.arange(features.lengths[batch[0]])[None, :]
        ids = torch.from_numpy(features.tokens[starts + positions].astype(np.int64)).to(self._device)
        segments = torch.from_numpy((positions >= features.first_lengths[batch][:, None]).astype(np.int64))
        with torch.autocast(self._device.type, self._half, enabled=self._half is not None):
            output = self._model(ids, segments.to(self._device), hidden_layers=(), attention_layers=())
        assert output.logits is not None
        return output.logits.float().argmax(dim=1).cpu().numpy()


@lru_cache(maxsize=1)
def _word_vectors(path: Path) -> WordVectors:
    return read_vectors(path)


@contextmanager
def _without_onednn(device: torch.device, half: torch.dtype | None) -> Iterator[None]:
    """Disable oneDNN in fp32 on an x86 CPU, in all threads of the process.

    There torch uses it for gelu alone. Batches have ever new shapes, for each of which it builds a kernel; it keeps the
    last thousand, and memory grows. `packed_inference.py` avoids that in half precision.
    """
    if device.type != "cpu" or half is not None or platform.machine() not in ("x86_64", "AMD64"):
        yield
        return
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # a property of the module's class
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def _load(options: AugmentOptions, rows: TextRows, kind: str) -> tuple[AugmentationPlan, MaskedLM]:
    """Read and check all models and vectors; return the plan for the processes, and the masked LM."""
    folder, task = options.pretrained_bert_model, options.task
    lower = choose_case(options.do_lower_case, (folder, options.teacher_model))
    half = _half(options.precision, kind)
    if options.glove_embs is not None:
        _word_vectors(options.glove_embs)
    masked_lm = load_masked_lm(folder, lower, options.settings.seed)
    if not masked_lm.has_head and options.train_mlm_head is None:
        raise UserError(
            f"{folder}: this model has no masked-LM head (cls.predictions), so it cannot predict words; "
            "--train_mlm_head 1000 trains one on the task's text first, or give a pre-trained BERT with its head"
        )
    config = masked_lm.model.config
    if options.mlm_context == "original" and config.type_vocab_size < 2:
        raise UserError(f"{folder}: the model has one segment; --mlm_context masked needs no second one")
    if config.max_position_embeddings < _MIN_POSITIONS:
        raise UserError(f"{folder}: the model has only {config.max_position_embeddings} positions")
    if options.teacher_model is not None:
        load_complete(options.teacher_model, task, lower, use="the teacher")
    plan = AugmentationPlan(
        rows=rows,
        task=task,
        settings=options.settings,
        masked_lm=folder,
        do_lower_case=lower,
        with_original=options.mlm_context == "original",
        vectors=options.glove_embs,
        half=half,
        teacher=options.teacher_model,
        max_seq_length=task.max_seq_length or _DEFAULT_LENGTH,
    )
    return plan, masked_lm


def _identity(options: AugmentOptions, plan: AugmentationPlan, kind: str) -> dict[str, Any]:
    """Return everything that the content of the file depends on, by the names that messages use."""
    return {
        "the method": f"{_METHOD}, blocks of {BLOCK} rows, torch {torch.__version__}",
        "--task": plan.task.name,
        "--N": plan.settings.n,
        "--M": plan.settings.m,
        "--p": plan.settings.p,
        "--seed": plan.settings.seed,
        "--mlm_context": options.mlm_context,
        "--train_mlm_head": options.train_mlm_head,
        "--relabel": None if plan.teacher is None else "teacher",
        "precision": f"{'fp32' if plan.half is None else str(plan.half).removeprefix('torch.')} on {kind}",
        "lower-casing": plan.do_lower_case,
        "the content of train.tsv": file_digest(options.folder / plan.task.train_file),
        "the model": _model_digest(plan.masked_lm),
        "the word vectors": None if plan.vectors is None else _word_vectors(plan.vectors).digest(),
        "the teacher": None if plan.teacher is None else _model_digest(plan.teacher),
    }


def _train_head(
    options: AugmentOptions, plan: AugmentationPlan, masked_lm: MaskedLM, kind: str, count: int, parent: Path
) -> Path:
    """Train a masked-LM head, unless an earlier part of this run has; return the folder of the trained model."""
    folder = parent / _HEAD_FOLDER
    if (folder / WEIGHTS_NAME).exists():
        return folder
    assert options.train_mlm_head is not None
    masked_lm.model.to(open_device(kind, options.device_list[0]))
    step = -(-count // _MOST_TRAINING_TEXTS)  # of a very long file every second row, or every third, and so on
    texts = [_readable(text) for row in islice(plan.rows, 0, None, step) for text in row.texts]
    encoded = encode_texts(texts, masked_lm.tokenizer, masked_lm.model.config.max_position_embeddings)
    accuracy = train_masked_lm(masked_lm, encoded, options.train_mlm_head, plan.settings.seed, plan.half)
    logger.info("the masked-LM head predicts %.1f %% of held-out masked tokens correctly", 100 * accuracy)
    save_model(folder, masked_lm.model.config, masked_lm.model.state_dict(), masked_lm.tokenizer)
    return folder


def _write_blocks(plan: AugmentationPlan, count: int, kind: str, ids: tuple[int, ...], output: ResumableFile) -> None:
    """Augment the blocks that are missing, and finish the file. `count` is the number of rows."""
    total = -(-count // BLOCK)
    if output.blocks > total:
        raise UserError(
            f"{output.folder}: is damaged, it counts {output.blocks} blocks of {total}; --overwrite_output_file starts "
            "from scratch"
        )
    if output.blocks:
        logger.info("%s: %d of %d blocks are done already", output.folder, output.blocks, total)
    progress = Progress("augmentation", total - output.blocks, unit="block")
    missing = islice(_blocks(plan.rows), output.blocks, None)
    block: AugmentedBlock
    for block in map_in_order(plan.build, kind, ids, missing):
        head = b"" if output.blocks else plan.rows.head.encode(*ENCODING)
        output.add(head + block.content, rows=block.rows, dropped=block.dropped)
        progress.advance()
    progress.close()
    output.finish()
    written, dropped = output.tally["rows"], output.tally["dropped"]
    filtered = f"; {dropped} more were left out: the teacher assigns them to another class" if plan.teacher else ""
    logger.info("%s: %d rows became %d%s", output.path, count, written, filtered)


def _blocks(rows: TextRows) -> Iterator[Block]:
    source, first = iter(rows), 0
    while block := list(islice(source, BLOCK)):
        yield Block(first, block)
        first += len(block)


def _half(precision: str, kind: str) -> torch.dtype | None:
    """Return the dtype of matrix products for --precision; None is fp32."""
    if precision == "auto" and kind == "cpu":
        supported = cpu_has_bf16() and packed_inference.can_pack()
    elif precision == "auto":
        supported = bool(getattr(torch, kind).is_bf16_supported(including_emulation=False))
    else:
        supported = precision == "bf16"
    return torch.bfloat16 if supported else None


def _model_digest(folder: Path) -> str:
    weights = next(name for name in (SAFETENSORS_NAME, WEIGHTS_NAME) if (folder / name).is_file())
    files = folder / weights, folder / CONFIG_NAME, vocabulary_path(folder)
    return " ".join(file_digest(file)[:16] for file in files)


def _readable(text: str) -> str:
    """Return a text as training reads it: bytes that are not UTF-8 are U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
