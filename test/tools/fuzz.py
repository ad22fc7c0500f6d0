"""Command: feed broken files to every reader of the project.

    python test/tools/fuzz.py --seconds 300                    # all readers in turn
    python test/tools/fuzz.py --seconds 60 --readers weights archive --seed 7

Each file is a good one with changes: bytes flipped, removed, repeated, inserted; in JSON also absurd values. A reader
may read it or refuse it with a UserError. Anything else is a fault: another exception, more than two gigabytes of
additional memory, more than ten seconds, a file outside the target, or files left by a refused archive. The input of a
fault is kept in --keep, and the exit status is then 1. A seed reproduces a run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import importlib.util
import io
import json
import logging
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save

from data_processing.downloads.addresses import parse_address, redact
from data_processing.downloads.archives import unpack
from data_processing.examples import read_examples, read_unlabelled
from data_processing.task_files import read_task_file
from data_processing.tasks import find_task
from distillation.models import load_complete
from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.file_utils import read_weights
from transformer.heads import TinyBertForSequenceClassification
from transformer.vocabulary import read_vocabulary, stated_case

SECONDS_A_FILE, BYTES_MORE = 10, 2 * 2**30
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "##s", "!", "good", "bad"]
CONFIG = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
    "type_vocab_size": 2,
    "id2label": {"0": "0", "1": "1"},
    "architectures": ["TinyBertForSequenceClassification"],
}
TASK = {
    "name": "reviews",
    "train": "train.tsv",
    "dev": ["dev.tsv", "more.tsv"],
    "test": "test.tsv",
    "text": ["a", "b"],
    "label": "label",
    "labels": ["0", "1"],
    "meanings": ["bad", "good"],
    "metric": "f1",
    "max_seq_length": 64,
    "intermediate_epochs": 2.5,
    "lower_case": True,
}
ABSURD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, -(10**9), 1e308, 1e-320, float("nan"), float("inf"), "", "a" * 5000,
    "\ud800", "\0", "\x1b[31m", "../..", "/etc/passwd", [], {}, [[]], [1, "a", None], {"a": {"b": []}}, "0", "１２",
]  # fmt: skip
WORDS = [b"\0", b"\n", b"\r", b"\t", b'"', b"\xff\xff", b"\xef\xbb\xbf", b"PK\x05\x06", b"../", b"{", b"[" * 5000]
WORDS += [b"1" * 5000]


class Reader(NamedTuple):
    """A reader under test. good: the names and contents of valid files. read: reads one from its folder."""

    good: Callable[[], list[tuple[str, bytes]]]
    read: Callable[[Path], object]


def _tables() -> list[tuple[str, bytes]]:
    rows = [["sentence", "label"], *([f"a good film {n}", str(n % 2)] for n in range(30))]
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    lines = "".join(json.dumps({"sentence": a, "label": b}) + "\n" for a, b in rows[1:])
    tabs = "".join("\t".join(row) + "\n" for row in rows)
    return [("train.tsv", tabs.encode()), ("train.csv", text.getvalue().encode()), ("train.jsonl", lines.encode())]


def _read_table(path: Path) -> None:
    task = replace(find_task("sst-2"), form=path.suffix[1:], text_columns=("sentence",), label_column="label")
    with contextlib.suppress(UserError):
        read_unlabelled(path, task)
    read_examples(path, task)


def _vocabularies() -> list[tuple[str, bytes]]:
    tokenizer = {
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": {token: n for n, token in enumerate(VOCABULARY)}},
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "added_tokens": [{"id": 0, "content": "[PAD]"}],
    }  # fmt: skip
    case = {"do_lower_case": True, "strip_accents": None}
    return [
        ("vocab.txt", "\n".join(VOCABULARY).encode() + b"\n"),
        ("tokenizer.json", json.dumps(tokenizer).encode()),
        ("tokenizer_config.json", json.dumps(case).encode()),
    ]


def _read_vocabulary(path: Path) -> None:
    if path.name != "tokenizer_config.json":
        read_vocabulary(path)
    stated_case(path.parent)


def _read_config(path: Path) -> None:
    config = BertConfig.from_pretrained(path.parent)
    config.to_json()
    assert BertConfig.from_dict(json.loads(config.to_json()), str(path)) is not None


def _model() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return TinyBertForSequenceClassification(BertConfig.from_dict(dict(CONFIG)), 2).state_dict()


def _weights() -> list[tuple[str, bytes]]:
    files = []
    for new in (True, False):
        content = io.BytesIO()
        torch.save(_model(), content, _use_new_zipfile_serialization=new)
        files.append(("pytorch_model.bin", content.getvalue()))
    return [*files, ("model.safetensors", save({key: tensor.clone() for key, tensor in _model().items()}))]


def _read_model(path: Path) -> None:
    """Load a whole model, of which one file is broken."""
    others = {"config.json": json.dumps(CONFIG).encode(), "vocab.txt": "\n".join(VOCABULARY).encode() + b"\n"}
    others["pytorch_model.bin"] = _weights()[0][1]
    for name, content in others.items():
        if name != path.name:
            (path.parent / name).write_bytes(content)
    load_complete(path.parent, find_task("sst-2"), True)


def _archives() -> list[tuple[str, bytes]]:
    files = {"top/config.json": json.dumps(CONFIG).encode(), "top/deep/vocab.txt": b"a\nb\n" * 200, "top/é": b""}
    packed = []
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    packed.append(content.getvalue())
    for mode in ("w", "w:gz"):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode=mode, format=tarfile.PAX_FORMAT) as tar:
            for name, text in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
        packed.append(content.getvalue())
    return [("archive", content) for content in packed]


def _read_archive(path: Path) -> None:
    above = sorted(path.parent.parent.iterdir())
    try:
        unpack(path, path.parent / "target")
    except UserError:
        assert sorted(p.name for p in path.parent.iterdir()) == [path.name], "something was left behind"
        raise
    finally:
        assert sorted(path.parent.parent.iterdir()) == above, "something was written outside"
    assert all(p.is_dir() or p.is_file() for p in (path.parent / "target").rglob("*") if not p.is_symlink())
    assert not any(p.is_symlink() for p in (path.parent / "target").rglob("*"))


def _addresses() -> list[tuple[str, bytes]]:
    return [("address", b"https:" + b"//me:secret@127.0.0.1:80/a%20b/c.zip?x=1&token=y#sha256=" + b"0" * 64)]


def _read_address(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", errors="surrogateescape")
    address = parse_address(text)
    assert address.key
    assert "/" not in address.name
    assert len(redact(text)) <= 4 * len(text) + 10


def _vectors() -> list[tuple[str, bytes]]:
    plain = b"".join(f"word{n} {n / 7:.4f} {-n / 3:.4f} 0.5\n".encode() for n in range(50))
    return [("glove.txt", plain), ("glove.txt", gzip.compress(plain))]


def _read_vectors(path: Path) -> None:
    glove = importlib.import_module("data_processing.augmentation.glove")
    vectors = glove.read_vectors(path)
    vectors.neighbours(vectors.words[:3], 5)


READERS: dict[str, Reader] = {
    "table": Reader(_tables, _read_table),
    "task": Reader(lambda: [("task.json", json.dumps(TASK).encode())], read_task_file),
    "config": Reader(lambda: [("config.json", json.dumps(CONFIG).encode())], _read_config),
    "vocabulary": Reader(_vocabularies, _read_vocabulary),
    "weights": Reader(_weights, lambda path: read_weights(path.parent)),
    "model": Reader(
        lambda: [("config.json", json.dumps(CONFIG).encode()), ("pytorch_model.bin", _weights()[0][1])], _read_model
    ),
    "archive": Reader(_archives, _read_archive),
    "address": Reader(_addresses, _read_address),
}


def spoiled(content: bytes, chance: random.Random, json_like: bool) -> bytes:
    """Return a good file with one or more faults."""
    if json_like and chance.random() < 0.6:
        try:
            values = json.loads(content)
        except ValueError:
            values = {}
        for _ in range(chance.randint(1, 3)):
            values = _absurd(values, chance)
        with contextlib.suppress(ValueError, RecursionError):
            return json.dumps(values).encode()
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 5, 20))):
        at = chance.randrange(len(data) + 1)
        far = min(len(data), at + chance.choice((1, 4, 100, 10_000)))
        match chance.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(data):
                data[at] = chance.randrange(256)
            case 2:
                del data[at:]
            case 3:
                del data[at:far]
            case 4:
                data[at:at] = data[at:far] * chance.choice((1, 3))
            case 5:
                data[at:at] = chance.choice(WORDS)
            case 6 if at + 8 <= len(data):
                width = chance.choice((1, 2, 4, 8))
                data[at : at + width] = chance.choice((b"\xff", b"\0", b"\x7f")) * width
    return bytes(data)


def _absurd(values: Any, chance: random.Random) -> Any:
    """Return JSON with one value, at any depth, replaced by an absurd one or removed."""
    if isinstance(values, (dict, list)) and values and chance.random() < 0.8:
        key = chance.choice(list(values)) if isinstance(values, dict) else chance.randrange(len(values))
        values = dict(values) if isinstance(values, dict) else list(values)
        if chance.random() < 0.2:
            del values[key]
        else:
            values[key] = _absurd(values[key], chance)
        return values
    return chance.choice(ABSURD)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raise MemoryError above BYTES_MORE of additional memory, TimeoutError after SECONDS_A_FILE."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS_A_FILE} s")

    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS_A_FILE)
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES_MORE, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def try_one(reader: Reader, name: str, content: bytes, folder: Path) -> tuple[str, str]:
    """Read a file in a folder of its own. Return `read`, `refused` or `fault`, and a description of the fault."""
    place = folder / "place" / "inner"
    shutil.rmtree(folder / "place", ignore_errors=True)
    place.mkdir(parents=True)
    path = place / name
    path.write_bytes(content)
    try:
        with _bounded():
            reader.read(path)
    except UserError as error:
        text = str(error)
        broken = not text.isprintable() and any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)
        return ("fault", f"a message with control characters: {text!r}") if broken else ("refused", "")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "fault", "".join(traceback.format_exception(error))
    return "read", ""


def main() -> int:
    """Fuzz, print the counts, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of the whole run (%(default)s)")
    parser.add_argument("--readers", nargs="+", choices=[*READERS, "glove"], help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz_faults"), help="folder for the inputs of faults")
    flags = parser.parse_args()
    readers = dict(READERS)
    if importlib.util.find_spec("data_processing.augmentation.glove") is not None:
        readers["glove"] = Reader(_vectors, _read_vectors)
    names = flags.readers or list(readers)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    faults: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as made:
        for number, name in enumerate(names):
            chance = random.Random(f"{flags.seed} {name}")
            good = readers[name].good()
            for file, content in good:
                outcome = try_one(readers[name], file, content, Path(made))
                assert outcome[0] == "read", f"{file}: the good file is not read: {outcome[1]}"
            end = time.monotonic() + flags.seconds / len(names)
            while time.monotonic() < end:
                file, content = chance.choice(good)
                bad = spoiled(content, chance, json_like=file.endswith(".json"))
                result, fault = try_one(readers[name], file, bad, Path(made))
                counts[name][result] += 1
                if result == "fault":
                    kind = f"{name}: {fault.strip().splitlines()[-1][:150]}"
                    faults[kind] += 1
                    if faults[kind] == 1:
                        flags.keep.mkdir(parents=True, exist_ok=True)
                        kept = flags.keep / f"{name}-{len(faults)}-{file}"
                        kept.write_bytes(bad)
                        print(f"{kept}\n{fault}", flush=True)
            shown = ", ".join(f"{counts[name][kind]} {kind}" for kind in ("read", "refused", "fault"))
            print(f"{number + 1} of {len(names)}, {name}: {sum(counts[name].values())} files, {shown}", flush=True)
    total = sum((count for count in counts.values()), Counter())
    print(
        f"in all {sum(total.values())} files: {total['read']} read, {total['refused']} refused, {total['fault']} faults"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
