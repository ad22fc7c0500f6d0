"""From .tsv files to token ids: the original's features, and rows as they come."""

import itertools
import logging

import numpy as np
import pytest
from cases import write_rows

from data_processing.batching import Collator
from data_processing.examples import Examples, read_examples
from data_processing.features import Features, _truncated, make_features
from data_processing.tables import read_table
from data_processing.tasks import find_task
from transformer.errors import UserError
from transformer.tokenization import BertTokenizer

SST2, MNLI = find_task("SST-2"), find_task("MNLI")
HEADER = b"sentence\tlabel\n"


@pytest.fixture
def tokenizer(tmp_path) -> BertTokenizer:
    """A vocabulary in which every word of a test is one piece: a0 to a99."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"a{n}" for n in range(100)]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    return BertTokenizer.from_pretrained(tmp_path)


def examples(*texts: list[str]) -> Examples:
    return Examples(texts, np.zeros(len(texts[0]), dtype=np.int64))


def pieces_of(features: Features, number: int) -> list[int]:
    return features.tokens[features.offsets[number] : features.offsets[number + 1]].tolist()


def sst2_file(tmp_path, content: bytes):
    path = tmp_path / "train.tsv"
    path.write_bytes(content)
    return path


def test_features_are_the_originals(golden, tmp_path):
    place = golden.workplace(tmp_path)
    task = find_task(place.task)
    rows = read_examples(place.data / "train.tsv", task)
    features = make_features(rows, BertTokenizer.from_pretrained(place.teacher), place.max_seq_length)
    batch = Collator(to_maximum=True, max_seq_length=place.max_seq_length).collate(features, np.arange(len(features)))
    figures = golden.figures
    for tensor, name in zip(batch[:4], ("input_ids", "segment_ids", "input_mask", "label_ids"), strict=True):
        assert np.array_equal(tensor.numpy(), figures[f"feat_{name}"]), name
    assert np.array_equal(features.lengths, figures["feat_seq_lengths"])


def truncated_one_at_a_time(first: int, second: int, room: int) -> list[int]:
    """The original's loop: the longer text loses its last piece, the second where both are as long."""
    while first + second > room:
        if first > second:
            first -= 1
        else:
            second -= 1
    return [first, second]


def test_pairs_are_truncated_as_by_taking_pieces_one_at_a_time():
    for first, second, room in itertools.product(range(22), range(22), range(22)):
        assert _truncated([first, second], room) == truncated_one_at_a_time(first, second, room)


@pytest.mark.parametrize("max_seq_length", [8, 9, 16])
def test_a_pair_keeps_the_beginnings_of_both_texts(tokenizer, max_seq_length):
    words = [f"a{n}" for n in range(40)]
    lengths = [(0, 0), (0, 30), (30, 0), (3, 30), (30, 3), (20, 20), (2, 3)]
    texts = [" ".join(words[:n]) for n, _ in lengths], [" ".join(words[50 - 50 : m]) for _, m in lengths]
    features = make_features(examples(*texts), tokenizer, max_seq_length)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    for number, (first, second) in enumerate(lengths):
        a, b = truncated_one_at_a_time(first, second, max_seq_length - 3)
        ids = tokenizer.convert_tokens_to_ids(words)
        assert pieces_of(features, number) == [cls, *ids[:a], sep, *ids[:b], sep]
        assert features.first_lengths[number] == a + 2
        assert features.lengths[number] <= max_seq_length


def test_a_single_text_keeps_its_beginning(tokenizer):
    words = [f"a{n}" for n in range(40)]
    features = make_features(examples([" ".join(words), " ".join(words[:14]), ""]), tokenizer, 16)
    ids = tokenizer.convert_tokens_to_ids(words)
    assert pieces_of(features, 0) == pieces_of(features, 1) == [2, *ids[:14], 3]
    assert pieces_of(features, 2) == [2, 3]


@pytest.mark.parametrize(
    "text", ["", "   ", "\u200b", "a0 " * 200_000, "a" * 200_000, "\ufffd", "\x00", '"', '""" "', "\x85\u2028\x0c"]
)
def test_no_text_ends_a_run(tokenizer, tmp_path, text):
    path = write_rows(tmp_path / "train.tsv", [["sentence", "label"], ["a1", "0"], [text, "1"], ["a2", "0"]])
    rows = read_examples(path, SST2)
    assert rows.labels.tolist() == [0, 1, 0]
    features = make_features(rows, tokenizer, 16)
    assert pieces_of(features, 0) == [2, 6, 3]
    assert pieces_of(features, 2) == [2, 7, 3]
    assert 2 <= features.lengths[1] <= 16


def test_quotation_marks_mean_nothing(tmp_path):
    """A reader that knows quoting would swallow the rows up to the next quotation mark."""
    path = sst2_file(tmp_path, HEADER + b'"open\t1\nit \'s "fine"\t0\n""\t1\nclose"\t0\n')
    rows = read_examples(path, SST2)
    assert rows.texts == (['"open', 'it \'s "fine"', '""', 'close"'],)
    assert rows.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "content",
    [
        b"sentence\tlabel\na film\t1\na bore\t0\n",
        b"sentence\tlabel\na film\t1\na bore\t0",
        b"sentence\tlabel\r\na film\t1\r\na bore\t0\r\n",
        b"sentence\tlabel\ra film\t1\ra bore\t0\r",
        b"\xef\xbb\xbfsentence\tlabel\na film\t1\na bore\t0\n",
        b"sentence\tlabel\na film\t1\na bore\t0\n\n\r\n\n",
        b"sentence\tlabel\na film\t 1 \na bore\t0 \n",
    ],
    ids=["plain", "no last newline", "CRLF", "CR", "byte order mark", "blank last lines", "spaces at labels"],
)
def test_line_endings_and_marks_are_no_part_of_the_rows(tmp_path, content):
    rows = read_examples(sst2_file(tmp_path, content), SST2)
    assert rows.texts == (["a film", "a bore"],)
    assert rows.labels.tolist() == [1, 0]


def test_a_byte_order_mark_without_a_header_is_no_part_of_the_text(tmp_path):
    assert read_table(sst2_file(tmp_path, b"\xef\xbb\xbfa film\t1\n"), "tsv", False).rows == [["a film", "1"]]


def test_separators_of_unicode_end_no_row(tmp_path):
    text = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g"
    rows = read_examples(write_rows(tmp_path / "train.tsv", [["sentence", "label"], [text, "1"]]), SST2)
    assert rows.texts == ([text],)


def test_bytes_that_are_not_utf8_are_replaced_and_told(tmp_path, caplog):
    path = sst2_file(tmp_path, HEADER + b"caf\xe9 \xff\t1\ncaf\xc3\xa9\t0\n\xed\xa0\x80\t1\n")
    with caplog.at_level(logging.WARNING):
        rows = read_examples(path, SST2)
    assert rows.texts[0][:2] == ["caf\ufffd \ufffd", "café"]
    assert rows.labels.tolist() == [1, 0, 1]
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: 2 rows are not UTF-8; what cannot be read became U+FFFD"
    ]


def test_the_label_of_mnli_is_the_last_column(tmp_path):
    """Train files have 12 columns, dev files 16."""
    texts = ["x"] * 8 + ["first", "second"]
    rows = [["h"] * 12, [*texts, "contradiction", "neutral"], [*texts, *["contradiction"] * 5, "entailment"]]
    read = read_examples(write_rows(tmp_path / "train.tsv", rows), MNLI)
    assert read.texts == (["first"] * 2, ["second"] * 2)
    assert read.labels.tolist() == [2, 1]  # contradiction 0, entailment 1, neutral 2


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (SST2, [["a film", "1"], ["a bore"]], "row 3: has 1 column, SST-2 needs at least 2, split by tabs"),
        (SST2, [["a film", "1"], [""], ["a bore", "0"]], "row 3: has 1 column, SST-2 needs at least 2"),
        (SST2, [["a film", "1"], ["a bore", "2"]], "row 3: the label is '2', expected one of 0, 1 in column 2"),
        (SST2, [["a film", ""]], "row 2: the label is '', expected one of 0, 1 in column 2"),
        (SST2, [["a film", "a tab", "1"]], "row 2: the label is 'a tab', expected one of 0, 1 in column 2"),
        (SST2, [["a film", "y" * 10_000]], f"row 2: the label is '{'y' * 60}…', expected one of"),
        (MNLI, [["x"] * 10], "row 2: has 10 columns, MNLI needs at least 11, split by tabs"),
        (MNLI, [["x"] * 11 + ["-"]], "row 2: the label is '-', expected one of contradiction, entailment, neutral in "),
        (SST2, [], "holds no examples"),
    ],
)
def test_a_bad_row_is_named_with_its_file(tmp_path, task, rows, message):
    path = write_rows(tmp_path / "train.tsv", [["header", "label"], *rows])
    with pytest.raises(UserError) as caught:
        read_examples(path, task)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"sentence\tlabel\n", b"sentence\tlabel"])
def test_a_file_without_examples_is_named(tmp_path, content):
    path = sst2_file(tmp_path, content)
    with pytest.raises(UserError, match=r"train\.tsv: holds no examples"):
        read_examples(path, SST2)


def test_a_missing_file_and_a_folder_in_its_place_are_named(tmp_path):
    with pytest.raises(UserError, match=r"train\.tsv: not found"):
        read_examples(tmp_path / "train.tsv", SST2)
    (tmp_path / "train.tsv").mkdir()
    with pytest.raises(UserError, match=r"train\.tsv: cannot be read \(Is a directory\)"):
        read_examples(tmp_path / "train.tsv", SST2)


@pytest.mark.parametrize(
    ("given", "name"), [("sst-2", "SST-2"), ("SST-2", "SST-2"), ("mnli", "MNLI"), ("MNLI-MM", "MNLI-mm")]
)
def test_a_task_is_found_in_any_case(given, name):
    assert find_task(given).name == name


def test_an_unknown_task_is_told_with_those_there_are():
    with pytest.raises(UserError, match=r"--task_name sst2: no such task; the tasks are CoLA, MNLI, .*, WNLI$"):
        find_task("sst2")


def test_the_task_defaults_are_the_originals():
    """Trap 12: in the original a typo left them unused."""
    assert (SST2.intermediate_epochs, SST2.max_seq_length) == (10, 64)
    assert (MNLI.intermediate_epochs, MNLI.max_seq_length) == (5, 128)
    assert (find_task("mnli-mm").intermediate_epochs, find_task("mnli-mm").max_seq_length) == (None, None)
