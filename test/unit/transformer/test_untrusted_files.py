"""Model folders from strangers: code, bombs and absurd sizes are refused before memory is allocated."""

import collections
import copy
import io
import json
import logging
import os
import pickle
import re
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from augmentation_cases import head_shapes
from cases import assert_same_weights, edit_weights, encoder_shapes, linear, weights_of, write_model
from safetensors.torch import save
from small_models import CONFIG, VOCAB

from data_processing.tasks import find_task
from distillation.models import load_complete
from distillation.runs.mlm_head import load_masked_lm
from distillation.runtime.console import MessageFormatter
from transformer.errors import UserError, printable
from transformer.file_utils import read_weights
from transformer.heads import BertForMaskedLM, TinyBertForSequenceClassification
from transformer.vocabulary import stated_case

WEIGHTS = weights_of(encoder_shapes(CONFIG) | linear("classifier", 8, 2))
LITTLE = 256 * 2**20  # bytes: more than any of these files needs


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_model(tmp_path / "model", CONFIG, WEIGHTS, VOCAB)


@pytest.fixture
def little_memory():
    """Limit the memory that can be allocated to LITTLE; a larger allocation raises MemoryError."""
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + LITTLE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_complete(folder, find_task("sst-2"), True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def zip_of(pickled: bytes, values: bytes = b"\0" * 64, method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a file in torch's zip format with this pickle and one storage."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, part in {"data.pkl": pickled, "byteorder": b"little", "data/0": values, "version": b"3\n"}.items():
            archive.writestr(f"model/{name}", part)
    return content.getvalue()


def pickled_tensor(size: tuple[int, ...], stride: tuple[int, ...], stored: int) -> bytes:
    """Return a pickle of {"classifier.weight": a tensor of this size and stride over a storage of `stored` floats}."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            storage = Storage()
            return torch._utils._rebuild_tensor_v2, (storage, 0, size, stride, False, collections.OrderedDict())

    class Pickler(pickle._Pickler):  # type: ignore[name-defined]
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", stored) if isinstance(value, Storage) else None

    content = io.BytesIO()
    Pickler(content, protocol=2).dump({"classifier.weight": Tensor()})
    return content.getvalue()


class Calls:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


FORMS = {
    "zip": lambda content, path: torch.save(content, path),
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "protocol 0": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=0)),
    "protocol 1 in zip": lambda content, path: path.write_bytes(zip_of(pickle.dumps(content, protocol=1))),
    "protocol 4": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=4)),
    "protocol 4 in zip": lambda content, path: path.write_bytes(zip_of(pickle.dumps(content, protocol=4))),
}
ATTACKS = {
    "mkdir": Calls(os.mkdir, "attacked"),
    "eval": Calls(eval, "open('attacked', 'w')"),
    "getattr": Calls(getattr, "text", "upper"),
    "bytearray": Calls(bytearray, 10**11),
    "tensor": Calls(torch.FloatTensor, 10**6, 10**6),
    "storage": Calls(torch.storage.UntypedStorage, 10**12),
    "nested": {"a": {"b": (Calls(os.mkdir, "attacked"),)}},
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_pickle_that_calls_a_function_is_refused_without_calling_it(
    folder, tmp_path, monkeypatch, little_memory, write, attack
):
    """Trap 24."""
    monkeypatch.chdir(tmp_path)
    write({"classifier.weight": attack}, folder / "pytorch_model.bin")
    assert "could run code" in refusal(folder)
    assert not (tmp_path / "attacked").exists()


def test_the_attacks_work_on_a_reader_without_checks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(ATTACKS["nested"]))
    assert (tmp_path / "attacked").exists()


def test_a_correct_pickle_of_the_same_form_is_read(folder):
    (folder / "pytorch_model.bin").write_bytes(zip_of(pickled_tensor((2, 8), (8, 1), 16)))
    assert read_weights(folder)["classifier.weight"].shape == (2, 8)


@pytest.mark.parametrize("write", [FORMS["zip"], FORMS["legacy"]], ids=["zip", "legacy"])
def test_a_parameter_with_attributes_is_read_as_a_tensor(folder, write):
    """Some frameworks set attributes; one cannot replace a method."""
    marked = torch.nn.Parameter(WEIGHTS["classifier.weight"].clone())
    for name in ("tensor_model_parallel", "numel", "is_complex", "dim", "copy_", "detach"):
        setattr(marked, name, "mine")
    write({**WEIGHTS, "classifier.weight": marked}, folder / "pytorch_model.bin")
    assert_same_weights(read_weights(folder), WEIGHTS)
    assert vars(read_weights(folder)["classifier.weight"]) == {}


@pytest.mark.parametrize("hidden", ["values", "items", "keys"])
def test_an_attribute_of_a_dictionary_cannot_replace_a_method(folder, hidden):
    class Hiding:
        def __init__(self, content: dict[str, object]) -> None:
            self._content = content

        def __reduce__(self) -> tuple[object, ...]:
            return collections.OrderedDict, (), {hidden: collections.OrderedDict}, None, iter(self._content.items())

    torch.save(Hiding(WEIGHTS), folder / "pytorch_model.bin")
    assert_same_weights(read_weights(folder), WEIGHTS)
    for foreign in (5, [1], Hiding({"classifier.weight": torch.ones(2)})):
        torch.save(Hiding({**WEIGHTS, "foreign": foreign}), folder / "pytorch_model.bin")
        assert "dictionary of tensors" in refusal(folder)


@pytest.mark.parametrize(
    ("size", "stride", "stored"),
    [((10**6, 10**6), (10**6, 1), 16), ((60_000, 60_000), (0, 0), 16), ((2, 8), (8, 1), 10**12)],
    ids=["beyond its storage", "all values in one place", "storage beyond the file"],
)
def test_a_tensor_larger_than_its_file_is_refused(folder, little_memory, size, stride, stored):
    (folder / "pytorch_model.bin").write_bytes(zip_of(pickled_tensor(size, stride, stored)))
    assert "pytorch_model.bin: cannot be read" in refusal(folder)


def test_many_tensors_that_share_values_are_refused(folder):
    """Each is as large as the file, and all would be copied into the model."""
    torch.save(dict.fromkeys(map(str, range(2000)), torch.zeros(1000)), folder / "pytorch_model.bin")
    assert "more values than the file" in refusal(folder)


def test_a_zip_bomb_is_refused(folder, little_memory):
    bomb = zip_of(pickled_tensor((2, 8), (8, 1), 16), bytes(2**26), zipfile.ZIP_DEFLATED)
    assert len(bomb) < 10**6
    (folder / "pytorch_model.bin").write_bytes(bomb)
    assert "compressed" in refusal(folder)


def test_overlapping_zip_entries_are_refused(folder):
    """Each entry of the directory names the same large data."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("model/data.pkl", pickled_tensor((2, 8), (8, 1), 16))
        archive.writestr("model/data/0", bytes(10**6))
        for number in range(1, 50):
            entry = copy.copy(archive.getinfo("model/data/0"))
            entry.filename = f"model/data/{number}"
            archive.filelist.append(entry)
    (folder / "pytorch_model.bin").write_bytes(content.getvalue())
    assert "larger than the file" in refusal(folder)


@pytest.mark.parametrize("shape", [[2, 8], [10**6, 10**6]])
@pytest.mark.parametrize("stated", [None, 0, 10**9, 2**64 - 1])
def test_a_safetensors_header_with_absurd_sizes_is_refused(folder, little_memory, shape, stated):
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 64]}}).encode()
    length = struct.pack("<Q", len(header) if stated is None else stated)
    (folder / "model.safetensors").write_bytes(length + header + bytes(64))
    if (shape, stated) == ([2, 8], None):
        assert read_weights(folder)["a"].shape == (2, 8)
    else:
        assert "model.safetensors: cannot be read" in refusal(folder)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_damaged_file_is_read_or_refused(folder, form):
    """A truncated file is refused. A flipped bit in a name or a number may go unnoticed."""
    path = folder / ("model.safetensors" if form == "safetensors" else "pytorch_model.bin")
    torch.save(WEIGHTS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    whole = save(WEIGHTS) if form == "safetensors" else path.read_bytes()
    for length in (0, 1, 13, 150, *range(200, len(whole), len(whole) // 8), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"{path.name}: cannot be read"):
            read_weights(folder)
    refused = 0
    for at in {*range(0, min(3000, len(whole)), 61), *range(len(whole) - 1500, len(whole), 61)}:  # sizes and offsets
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << (at % 8)]) + whole[at + 1 :])
        try:
            read_weights(folder)
        except UserError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("load", [BertForMaskedLM, TinyBertForSequenceClassification, load_masked_lm])
@pytest.mark.parametrize("head", [True, False])
def test_sizes_beyond_those_of_the_weights_are_refused_before_memory_is_allocated(folder, little_memory, load, head):
    edit_weights(folder, lambda weights: weights.update(weights_of(head_shapes(CONFIG)) if head else {}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"intermediate_size": 10_000_000}), encoding="utf-8")
    with pytest.raises(UserError, match=r"has the shape \[12, 8\], expected \[10000000, 8\]"):
        load(folder, True) if load is load_masked_lm else load.from_pretrained(folder)


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no disk space


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), huge])
@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "pytorch_model.bin"])
def test_an_endless_or_huge_file_is_refused_unread(folder, little_memory, name, make):
    (folder / name).unlink()
    make(folder / name)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_an_endless_or_huge_file_of_the_tokenizer_is_refused_unread(folder, little_memory, name):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), huge):
        make(folder / name)
        with pytest.raises(UserError, match=f"{name}: (is not a regular file|.* more than the 134 MB)"):
            stated_case(folder)
        (folder / name).unlink()


def test_messages_cannot_control_a_terminal():
    quoted = "\x1b]0;title\x07\x1b[2J \x9b31m \u202edlrow \ud800 \x7f é 日本 👩‍👧"
    shown = printable(quoted)
    assert shown == r"\x1b]0;title\x07\x1b[2J \x9b31m \u202edlrow \ud800 \x7f é 日本 👩‍👧"
    assert str(UserError(f"a\n{quoted}\tb")) == f"a {shown} b"
    shown.encode("utf-8")
    record = logging.LogRecord("x", logging.INFO, "", 0, "read %s", ("a\x1b[2J\nb",), None)
    assert MessageFormatter("%(message)s").format(record) == r"read a\x1b[2J\nb"


def test_a_very_long_message_keeps_its_beginning_and_its_end():
    assert re.fullmatch("begin x{900,1100} … x{900,1100} end", str(UserError("begin " + "x" * 10**6 + " end")))
