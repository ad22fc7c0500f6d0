"""Properties of the readers on generated files: each is read, or refused in one line that writes nothing.

`pytest --hypothesis-profile=thorough` tries twenty times as many; test/tools/fuzz.py runs for as long as asked.
"""

import io
import json
import random
import re
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from cases import ROOT
from hypothesis import given
from hypothesis import strategies as st

from data_processing.downloads.addresses import parse_address, redact
from data_processing.downloads.archives import unpack
from data_processing.tables import FORMS, open_table
from data_processing.task_files import read_task_file
from transformer.configuration import BertConfig
from transformer.errors import UserError, one_line
from transformer.file_utils import read_weights
from transformer.vocabulary import read_vocabulary, stated_case

sys.path.insert(0, str(ROOT / "test" / "tools"))

import fuzz

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(fuzz.ABSURD),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
CELLS = st.text(st.characters(exclude_characters="\t\r\n\ufeff", exclude_categories=["Cs"]), max_size=20)
SPOILED = st.integers(0, 2**32).map(random.Random)


def read_or_refused(read, name: str, content: bytes) -> object:
    """Return what a reader reads from a file, alone in its folder; None if it refuses the file in one line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            return read(path)
        except UserError as error:
            message = str(error)
            assert message == one_line(message)
            return None
        finally:
            assert [file.name for file in Path(folder).iterdir() if file.name != "target"] == [name]


@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", errors="surrogatepass")), st.sampled_from(FORMS))
def test_any_bytes_are_read_as_a_table_or_refused(content, form):
    read_or_refused(lambda path: list(open_table(path, form)), f"train.{form}", content)


@given(st.lists(st.lists(CELLS, min_size=2, max_size=4), min_size=1, max_size=6))
def test_rows_are_read_as_they_were_written(rows):
    content = "".join("\t".join(row) + "\n" for row in rows).encode()
    read = read_or_refused(lambda path: list(open_table(path, "tsv", has_header=False)), "train.tsv", content)
    assert read == list(enumerate(rows, start=1))


@given(st.dictionaries(st.sampled_from([*fuzz.TASK, "regression", "header", "test_id", "format"]), JSON))
def test_any_values_are_read_as_a_task_or_refused(values):
    read_or_refused(read_task_file, "task.json", json.dumps({**fuzz.TASK, **values}).encode())


@given(st.dictionaries(st.sampled_from([*fuzz.CONFIG, "layer_norm_eps", "hidden_act", "label2id", "note"]), JSON))
def test_any_values_are_read_as_a_config_or_refused(values):
    config = read_or_refused(
        lambda path: BertConfig.from_pretrained(path.parent),
        "config.json",
        json.dumps({**fuzz.CONFIG, **values}).encode(),
    )
    if config is not None:
        again = BertConfig.from_dict(json.loads(config.to_json()), config.source)
        assert again.to_dict() == config.to_dict()


@given(st.lists(st.text() | st.sampled_from(fuzz.VOCABULARY), max_size=20), st.sampled_from(["\n", "\r\n", "\r"]))
def test_any_lines_are_read_as_a_vocabulary_or_refused(lines, end):
    content = end.join([*fuzz.VOCABULARY, *lines]).encode("utf-8", errors="surrogatepass")
    vocabulary = read_or_refused(read_vocabulary, "vocab.txt", content)
    if vocabulary is not None:
        assert list(vocabulary.ids.values()) == list(range(len(vocabulary.ids)))


@given(SPOILED, st.sampled_from(fuzz._vocabularies()))
def test_a_spoiled_vocabulary_is_read_or_refused(chance, good):
    def read(path):
        stated_case(path.parent)
        return path.name == "tokenizer_config.json" or read_vocabulary(path)

    read_or_refused(read, good[0], fuzz.spoiled(good[1], chance, json_like=good[0].endswith(".json")))


@given(SPOILED, st.sampled_from(fuzz._weights()))
def test_spoiled_weights_are_read_or_refused(chance, good):
    spoiled = fuzz.spoiled(good[1], chance, json_like=False)
    weights = read_or_refused(lambda path: read_weights(path.parent), good[0], spoiled)
    if weights is not None:
        assert sum(tensor.nbytes for tensor in weights.values()) <= 4 * len(spoiled)


NAMES = st.text(st.sampled_from("ab./\\:\0\n é"), min_size=1, max_size=12)


def packed(form: str, files: list[tuple[str, bytes]]) -> bytes:
    content = io.BytesIO()
    if form == "zip":
        with zipfile.ZipFile(content, "w") as archive:
            for name, text in files:
                info = zipfile.ZipInfo("x")
                info.filename = name
                archive.writestr(info, text)
    else:
        with tarfile.open(fileobj=content, mode=f"w:{form}", format=tarfile.PAX_FORMAT) as tar:
            for name, text in files:
                info = tarfile.TarInfo(name)
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
    return content.getvalue()


def unpacked(path: Path) -> dict[str, bytes]:
    """Unpack an archive beside it and return its files; a refused archive leaves nothing."""
    target = path.parent / "target"
    try:
        unpack(path, target)
    except UserError:
        assert not target.exists()
        raise
    return {str(file.relative_to(target)): file.read_bytes() for file in target.rglob("*") if file.is_file()}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(st.lists(st.tuples(NAMES, st.binary(max_size=50)), min_size=1, max_size=4), st.sampled_from(["zip", "", "gz"]))
def test_any_names_are_unpacked_below_the_target_or_refused(files, form):
    found = read_or_refused(unpacked, "archive", packed(form, files))
    if found is not None:
        # Both formats end a name at its first zero.
        named = [text for name, text in files if re.split(r"[/\\]", name.partition("\0")[0])[-1] != ""]
        assert sorted(found.values()) == sorted(named)


@given(SPOILED, st.sampled_from(fuzz._archives()))
def test_a_spoiled_archive_is_unpacked_or_refused(chance, good):
    read_or_refused(unpacked, "archive", fuzz.spoiled(good[1], chance, json_like=False))


@given(st.text(max_size=30), st.sampled_from(["http", "https", "s3", "ftp", "file"]), st.text(max_size=12))
def test_messages_never_show_the_password_of_an_address(rest, scheme, word):
    text = f"{scheme}:" + f"//me:geheim@127.0.0.1/{rest}?{word}=geheim"
    if not set(" \t\r\n\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0#") & set(rest + word) and (rest + word).isprintable():
        assert "geheim" not in redact(f"--teacher_model {text} --student_model x")
    try:
        address = parse_address(text)
    except UserError as error:
        assert "geheim" not in str(error)  # noqa: PT017  # of an address that hypothesis made
        return
    assert address.name == Path(address.name).name
    if "@" not in rest:
        assert address.key == parse_address(text.replace("me:geheim@", "")).key


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda path: path.read_text(encoding="ascii"), "UnicodeDecodeError"),
        (lambda path: bytearray(3 * 2**30), "MemoryError"),
    ],
)
def test_the_fuzzer_reports_a_fault(tmp_path, read, error):
    good = fuzz.Reader(list, lambda path: path.read_bytes())
    assert fuzz.try_one(good, "x", b"\xff", tmp_path) == ("read", "")
    outcome, trace = fuzz.try_one(fuzz.Reader(list, read), "x", b"\xff", tmp_path)
    assert outcome == "fault"
    assert error in trace
