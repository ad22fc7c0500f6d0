"""Model folders from strangers: code, bombs and absurd sizes are one line, before memory is taken."""

import collections
import io
import json
import os
import pickle
import resource
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from augmentation_cases import head_shapes
from cases import assert_same_weights, edit_weights, encoder_shapes, linear, weights_of, write_model
from safetensors.torch import save

from data_processing.tasks import find_task
from distillation.models import load_complete
from distillation.runs.mlm_head import load_masked_lm
from distillation.runtime.logs import MessageFormatter
from transformer.configuration import BertConfig
from transformer.errors import UserError, one_line, printable
from transformer.file_utils import read_weights
from transformer.heads import BertForMaskedLM, TinyBertForSequenceClassification
from transformer.vocabulary import read_vocabulary, stated_case

CONFIG = {
    "vocab_size": 6,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
    "type_vocab_size": 2,
}
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film"]
WEIGHTS = weights_of(encoder_shapes(CONFIG) | linear("classifier", 8, 2))
LITTLE = 256 * 2**20  # bytes: more than any of these files needs


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_model(tmp_path / "model", CONFIG, WEIGHTS, VOCAB)


@pytest.fixture
def little_memory():
    """Whoever asks for more than LITTLE at once does not get it, and would end in a MemoryError of its own words."""
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
    """A file as torch writes it, of this pickle and one storage."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, part in {"data.pkl": pickled, "byteorder": b"little", "data/0": values, "version": b"3\n"}.items():
            archive.writestr(f"model/{name}", part)
    return content.getvalue()


def pickled_tensor(size: tuple[int, ...], stride: tuple[int, ...], stored: int) -> bytes:
    """The pickle of {"classifier.weight": a tensor of this form over one storage of so many floats}."""

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
    """Unpickled by a careless reader, it calls something."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize(
    "attack",
    [
        Calls(os.system, "touch attacked"),
        Calls(eval, "open('attacked', 'w')"),
        Calls(exec, "open('attacked', 'w')"),
        Calls(io.open, "attacked", "w"),
        Calls(getattr, "text", "upper"),
        Calls(__import__, "antigravity"),
        Calls(bytearray, 10**11),
        Calls(torch.Tensor, 10**6, 10**6),
        Calls(torch.FloatTensor, 10**6, 10**6),
        Calls(torch.storage.UntypedStorage, 10**12),
        Calls(set, [1]),
        [Calls(os.mkdir, "attacked")] * 2,
        {"a": {"b": (Calls(os.mkdir, "attacked"),)}},
    ],
    ids=lambda attack: attack.made[0].__name__ if isinstance(attack, Calls) else type(attack).__name__,
)
def test_a_pickle_that_calls_anything_is_refused_uncalled(folder, tmp_path, monkeypatch, little_memory, form, attack):
    monkeypatch.chdir(tmp_path)
    torch.save(
        {**WEIGHTS, "classifier.weight": attack},
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=form == "zip",
    )
    told = refusal(folder)
    assert "a file that holds other objects is refused, since loading it could run code; where you trust it, " in told
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("in_zip", [True, False])
def test_every_protocol_of_pickles_is_refused(folder, tmp_path, monkeypatch, protocol, in_zip):
    monkeypatch.chdir(tmp_path)
    attack = pickle.dumps({"a": Calls(os.mkdir, "attacked")}, protocol=protocol)
    (folder / "pytorch_model.bin").write_bytes(zip_of(attack) if in_zip else attack)
    assert "since loading it could run code" in refusal(folder)
    assert not (tmp_path / "attacked").exists()
    pickle.loads(attack)
    assert (tmp_path / "attacked").exists(), "the attack itself does not work, so the test would show nothing"


def test_the_good_pickle_of_these_tests_is_read(folder):
    (folder / "pytorch_model.bin").write_bytes(zip_of(pickled_tensor((2, 8), (8, 1), 16)))
    assert read_weights(folder)["classifier.weight"].shape == (2, 8)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_parameter_with_attributes_is_read_as_a_tensor(folder, form):
    """As frameworks mark theirs; an attribute cannot take a method's place."""
    marked = torch.nn.Parameter(WEIGHTS["classifier.weight"].clone())
    for name in ("tensor_model_parallel", "numel", "is_complex", "dim", "copy_", "detach"):
        setattr(marked, name, "mine")
    torch.save(
        {**WEIGHTS, "classifier.weight": marked},
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=form == "zip",
    )
    assert_same_weights(read_weights(folder), WEIGHTS)
    assert vars(read_weights(folder)["classifier.weight"]) == {}
    loaded = load_complete(folder, find_task("sst-2"), True)
    assert torch.equal(loaded.model.classifier.weight, WEIGHTS["classifier.weight"])


@pytest.mark.parametrize("hidden", ["values", "items", "keys"])
def test_a_dictionarys_attribute_cannot_take_a_methods_place(folder, hidden):
    """So no object that is no tensor passes for one, and nothing ends in a traceback."""

    class Hiding:
        def __init__(self, content: dict[str, object]) -> None:
            self._content = content

        def __reduce__(self) -> tuple[object, ...]:
            return collections.OrderedDict, (), {hidden: collections.OrderedDict}, None, iter(self._content.items())

    torch.save(Hiding(WEIGHTS), folder / "pytorch_model.bin")
    assert_same_weights(read_weights(folder), WEIGHTS)
    for foreign in (5, [1], Hiding({"classifier.weight": torch.ones(2)})):
        torch.save(Hiding({**WEIGHTS, "foreign": foreign}), folder / "pytorch_model.bin")
        assert "holds no dictionary of tensors" in refusal(folder)


@pytest.mark.parametrize(
    ("size", "stride", "stored"),
    [
        ((10**6, 10**6), (10**6, 1), 10**12),
        ((10**6, 10**6), (10**6, 1), 16),
        ((60_000, 60_000), (0, 0), 16),
        ((2**31, 8), (0, 0), 16),
        ((2, 8), (8, 1), 10**12),
    ],
    ids=["stated", "beyond its storage", "all on one place", "large number", "storage beyond the file"],
)
def test_a_tensor_larger_than_its_file_is_refused(folder, little_memory, size, stride, stored):
    (folder / "pytorch_model.bin").write_bytes(zip_of(pickled_tensor(size, stride, stored)))
    assert "cannot be read as a dictionary of tensors" in refusal(folder)


def test_many_tensors_on_one_place_are_refused(folder):
    """Each is as large as the file, and all of them would be copied into the model."""
    tensor = torch.zeros(1000)
    torch.save({f"{n}": tensor for n in range(2000)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="its tensors have more values than the file"):
        read_weights(folder)


def test_a_zip_bomb_is_refused(folder, little_memory):
    bomb = zip_of(pickled_tensor((2, 8), (8, 1), 16), bytes(2**26), zipfile.ZIP_DEFLATED)
    assert len(bomb) < 10**6
    (folder / "pytorch_model.bin").write_bytes(bomb)
    assert "its tensors are compressed, which torch never does" in refusal(folder)


def test_entries_on_one_place_of_the_file_are_refused(folder):
    """An overlapping bomb: each entry of the directory names the same large data."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("model/data.pkl", pickled_tensor((2, 8), (8, 1), 16))
        archive.writestr("model/data/0", bytes(10**6))
        for number in range(1, 50):
            copied = zipfile.ZipInfo(f"model/data/{number}")
            first = archive.getinfo("model/data/0")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(copied, name, getattr(first, name))
            archive.filelist.append(copied)
            archive.NameToInfo[copied.filename] = copied
    (folder / "pytorch_model.bin").write_bytes(content.getvalue())
    assert "its entries together are larger than itself" in refusal(folder)


@pytest.mark.parametrize("stated", [0, 10**9, 2**40, 2**64 - 1])
def test_an_absurd_header_of_safetensors_is_refused(folder, little_memory, stated):
    content = save(WEIGHTS)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", stated) + content[8:])
    assert "model.safetensors: cannot be read as safetensors" in refusal(folder)


def test_a_safetensors_of_absurd_shapes_is_refused(folder, little_memory):
    header = json.dumps(
        {"classifier.weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 64]}}
    ).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    assert "cannot be read as safetensors" in refusal(folder)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_with_turned_bits_is_read_or_refused(folder, form):
    """At every place of the first and last parts, which hold all names, sizes and offsets."""
    path = folder / ("model.safetensors" if form == "safetensors" else "pytorch_model.bin")
    torch.save(WEIGHTS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    whole = save(WEIGHTS) if form == "safetensors" else path.read_bytes()
    outcomes = collections.Counter()
    for at in {*range(0, min(3000, len(whole)), 61), *range(len(whole) - 1500, len(whole), 61)}:
        spoiled = bytearray(whole)
        spoiled[at] ^= 1 << (at % 8)
        path.write_bytes(spoiled)
        try:
            read_weights(folder)
        except UserError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
    assert outcomes["refused"] > 10


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 10**9}, "hidden_size is 1000000000, expected 1000000 at most"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, expected 1000 at most"),
        ({"vocab_size": 10**30}, "vocab_size is 1000000000000000000000000000000, expected 10000000 at most"),
        ({"vocab_size": -6}, "vocab_size is -6"),
        ({"intermediate_size": 1e3}, "intermediate_size is 1000.0"),
        ({"layer_norm_eps": float("nan")}, "holds NaN, which is no number in JSON"),
        ({"layer_norm_eps": True}, "layer_norm_eps is True"),
        ({"initializer_range": 1e300}, "initializer_range is 1e+300"),
        ({"hidden_act": "x" * 10**6}, "hidden_act is 'xxxxxxxxxxxx...xxxxxxxxxxxxx', expected"),
        ({"id2label": {"0": "\ud800", "1": "b"}}, "holds half of a character"),
        ({"note": [[]] and json.loads("[" * 60 + "]" * 60)}, "holds more than 50 lists and objects in one another"),
        ({"num_hidden_layers": 200}, "the weights lack bert.encoder.layer.1."),
        ({"intermediate_size": 10_000_000}, "has the shape [12, 8], expected [10000000, 8]"),
    ],
)
def test_an_absurd_config_is_refused(folder, little_memory, changes, told):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    assert told in refusal(folder)


@pytest.mark.parametrize("load", [BertForMaskedLM, TinyBertForSequenceClassification, load_masked_lm])
@pytest.mark.parametrize("head", [True, False])
def test_absurd_sizes_are_refused_by_every_reader_before_they_are_made(folder, little_memory, load, head):
    edit_weights(folder, lambda weights: weights.update(weights_of(head_shapes(CONFIG)) if head else {}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"intermediate_size": 10_000_000}), encoding="utf-8")
    with pytest.raises(UserError, match=r"has the shape \[12, 8\], expected \[10000000, 8\]"):
        load(folder, True) if load is load_masked_lm else load.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"vocab_size": 6, "vocab_size": 7}', "'vocab_size' stands twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' stands twice"),
        ('{"layer_norm_eps": 1e999}', "layer_norm_eps is inf"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "is no valid JSON"),
        ("\ufffe", "is no valid JSON"),
        (" " * (17 * 2**20) + "{}", "more than the 17 MB that such a file can need"),
    ],
)
def test_a_config_of_odd_json_is_refused(folder, content, told):
    (folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        BertConfig.from_pretrained(folder)
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "pytorch_model.bin", "tokenizer_config.json"])
def test_a_pipe_or_device_in_a_files_place_is_refused_and_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(folder / name)
        if name == "tokenizer_config.json":
            with pytest.raises(UserError, match="is no ordinary file"):
                stated_case(folder)
        else:
            refusal(folder)
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[PAD]\n" + b"x" * 10**6 + b"\n", "line 2 has 1000000 characters"),
        (b"[PAD]\nfilm\n\nfilm\n", "line 4 repeats the token 'film' of line 2"),
        (b"[PAD]\n\n\nfilm\n", "line 3 repeats the token '' of line 2"),
        (b"[PAD]\n\xff\xfe\n", "line 2 is not UTF-8"),
        (b"\n".join(b"[PAD] %d" % n for n in range(10)), "has no [PAD] [UNK] [CLS] [SEP]"),
        (b"x" * 999 + b"\n" + b"x" * 999 + b"\n", "repeats the token 'xxxxxxxxxxxx...xxxxxxxxxxxxx'"),
    ],
)
def test_an_odd_vocabulary_is_refused(folder, content, told):
    (folder / "vocab.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_vocabulary(folder / "vocab.txt")
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "tokenizer_config.json"])
def test_a_huge_vocabulary_is_not_read(folder, name):
    with open(folder / name, "wb") as file:
        file.truncate(2**40)  # without taking room on the disk
    tracemalloc.start()
    with pytest.raises(UserError, match="more than the 134 MB that such a file can need"):
        stated_case(folder)
    assert tracemalloc.get_traced_memory()[1] < LITTLE
    tracemalloc.stop()


def test_what_is_quoted_does_not_act_on_a_terminal():
    quoted = "\x1b]0;title\x07\x1b[2J \x9b31m \u202edlrow \ud800 \x7f é 日本 👩‍👧"
    shown = printable(quoted)
    assert shown == r"\x1b]0;title\x07\x1b[2J \x9b31m \u202edlrow \ud800 \x7f é 日本 👩‍👧"
    assert str(UserError(f"a\n{quoted}\tb")) == f"a {shown} b"
    shown.encode("utf-8")


def test_a_logged_message_is_one_line_and_harmless():
    import logging

    record = logging.LogRecord("x", logging.INFO, "", 0, "read %s", ("a\x1b[2J\nb",), None)
    assert MessageFormatter("%(message)s").format(record) == r"read a\x1b[2J\nb"


def test_a_very_long_message_shows_its_beginning_and_its_end():
    line = one_line("begin " + "x" * 10**6 + " end")
    assert len(line) < 2100
    assert line.startswith("begin xx")
    assert line.endswith("xx end")
