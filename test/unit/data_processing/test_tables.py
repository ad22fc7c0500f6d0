"""Tables: rows, cells and refusals in each form of file."""

import csv
import json
import logging
import os
from pathlib import Path

import pytest

from data_processing.tables import ENCODING, FORMS, Table, as_text, open_table, shortened
from transformer.errors import UserError

ENDS = pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])


@pytest.fixture
def opened(tmp_path):
    """Opens bytes as a file of a form."""

    def opened(content: bytes, form: str = "tsv", has_header: bool = True, keeps_bytes: bool = False) -> Table:
        path = tmp_path / f"file.{form}"
        path.write_bytes(content)
        return open_table(path, form, has_header, keeps_bytes)

    return opened


@pytest.fixture
def rows(opened):
    """The rows of bytes in a form; the values of an object stand for its cells."""

    def rows(content: bytes, form: str = "tsv", **settings) -> list:
        found = [row for _, row in opened(content, form, **settings)]
        return [list(row.values()) for row in found] if form == "jsonl" else found

    return rows


@pytest.fixture
def refusal(rows, tmp_path):
    """The message about bytes that are not a file of a form: one line that begins with the file's name."""

    def refusal(content: bytes, form: str) -> str:
        with pytest.raises(UserError) as caught:
            rows(content, form)
        message = str(caught.value)
        assert message.splitlines() == [message]
        assert message.startswith(f"{tmp_path}/file.{form}")
        return message.removeprefix(f"{tmp_path}/file.{form}")

    return refusal


def in_form(form: str, *pairs: tuple[str, str]) -> list[bytes]:
    """The lines of a file with the columns a and b."""
    if form == "jsonl":
        return [json.dumps({"a": first, "b": second}, ensure_ascii=False).encode() for first, second in pairs]
    separator = "\t" if form == "tsv" else ","
    return [separator.join(pair).encode() for pair in (("a", "b"), *pairs)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("last", [0, 1, 3], ids=["no last line end", "last line end", "empty last lines"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
@ENDS
def test_rows_have_names_cells_and_line_numbers(opened, form, end, last, mark):
    """However lines end; a byte order mark is not part of a cell."""
    table = opened(mark + end.join(in_form(form, ("x y", "1"), ("über 漢", "2"))) + end * last, form)
    if form == "jsonl":
        assert table.names is None
        expected = [(1, {"a": "x y", "b": "1"}), (2, {"a": "über 漢", "b": "2"})]
    else:
        assert table.names == ["a", "b"]
        expected = [(2, ["x y", "1"]), (3, ["über 漢", "2"])]
    assert list(table) == expected
    assert list(table) == expected  # each iteration reads the file


@pytest.mark.parametrize(("form", "content"), [("tsv", b"a\tb\n1\t2\n"), ("csv", b"a,b\n1,2\n")])
def test_without_a_header_the_first_line_is_a_row(opened, form, content):
    table = opened(content, form, has_header=False)
    assert table.names is None
    assert list(table) == [(1, ["a", "b"]), (2, ["1", "2"])]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("content", [b"", b"\n", b"\n\r\n\r\r", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_an_empty_file_holds_no_examples(refusal, form, content):
    assert refusal(content, form) == ": holds no examples"


@pytest.mark.parametrize("form", FORMS)
def test_only_line_ends_split_rows(rows, form):
    text = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\ufeffh" + " word" * 200_000
    assert rows(b"\n".join(in_form(form, (text, "1"))), form) == [[text, "1"]]


@pytest.mark.parametrize("form", FORMS)
def test_bytes_that_are_not_utf8_are_replaced_with_a_warning(rows, caplog, form):
    *header, good, two, one = in_form(form, ("café \ufffd", "1"), ("cafXé Y", "2"), ("X", "3"))
    broken = [line.replace(b"X", b"\xe9").replace(b"Y", b"\xf0\x9f") for line in (two, one)]
    with caplog.at_level(logging.WARNING):
        assert rows(b"\n".join([*header, good]), form) == [["café \ufffd", "1"]]
        assert caplog.records == []
        found = rows(b"\n".join([*header, good, *broken]), form)
    assert found == [["café \ufffd", "1"], ["caf\ufffdé \ufffd", "2"], ["\ufffd", "3"]]
    (record,) = caplog.records
    assert f"file.{form}: 2 rows are not UTF-8" in record.getMessage()


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_formatted_as_they_were_read(opened, form):
    """With bytes that are not UTF-8, in names too."""
    lines = [line.replace(b"X", b"\xe9\xff") for line in in_form(form, ("cafXé", 'say ""'), ("X", "漢"))]
    if form == "csv":
        lines[1] = lines[1].replace(b'say ""', b'"say """""')
    table = opened(b"\n".join(lines), form, keeps_bytes=True)
    head = [] if table.names is None else [table.names]
    written = "".join(map(table.format_row, [*head, *(row for _, row in table)])).encode(*ENCODING)
    assert written == b"\n".join(lines) + b"\n"


def test_a_limit_of_another_program_does_not_cut_cells(rows):
    before = csv.field_size_limit(10)
    try:
        assert rows(b"a\n" + b"x" * 11, "csv") == [["x" * 11]]
    finally:
        csv.field_size_limit(before)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(UserError, match=r"/file: not found$"):
        open_table(path)
    path.mkdir()
    with pytest.raises(UserError, match=r"/file: cannot be read \(Is a directory\)$"):
        open_table(path)
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\)$"):
        open_table(tmp_path / ("x" * 10_000))


@pytest.mark.parametrize("form", ["tsv", "csv"])
@pytest.mark.parametrize("has_header", [True, False])
def test_in_a_file_of_one_column_empty_lines_are_rows(opened, form, has_header):
    table = opened(b"sentence\nfine\n\nbad\n\n", form, has_header)
    assert [row for _, row in table][-4:] == [["fine"], [""], ["bad"], [""]]
    assert [number for number, _ in table][-4:] == [2, 3, 4, 5]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_named(refusal, form, encoding):
    assert "UTF-16" in refusal("text\tlabel\nfine\t1\n".encode(encoding), form)


@pytest.mark.parametrize("content", [b'[{"text": "fine"}]', b'[\n  {"text": "fine"}\n]\n'])
def test_a_json_array_is_named(refusal, content):
    assert "JSON array" in refusal(content, "jsonl")


@pytest.mark.parametrize("form", FORMS)
def test_pipes_and_devices_are_refused(tmp_path, form):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(UserError, match="is not a regular file"):
            open_table(path, form)


def test_tsv_has_no_quotation_and_keeps_spaces_and_empty_cells(opened):
    table = opened(b'a\tb\n"open\t1\nit \'s "x", \t\t\n\n1\nclose"\t0\n\n')
    expected = [['"open', "1"], ['it \'s "x", ', "", ""], [""], ["1"], ['close"', "0"]]
    assert list(table) == list(enumerate(expected, start=2))


class TestCsv:
    def test_quotation_marks_hold_a_cell_together(self, rows):
        content = b'a,b\n"x, ""y""\tz",1\n"",\'2\'\n5" pipe, "1"\n'
        assert rows(content, "csv") == [['x, "y"\tz', "1"], ["", "'2'"], ['5" pipe', ' "1"']]

    @ENDS
    def test_a_cell_may_have_several_lines(self, opened, end):
        lines = [b'"a', b'a",b', b'"x', b"", b'y",1', b'"z', b'",2', b"w,3"]
        table = opened(end.join(lines) + end, "csv")
        assert table.names == ["a\na", "b"]
        assert list(table) == [(3, ["x\n\ny", "1"]), (6, ["z\n", "2"]), (8, ["w", "3"])]

    def test_empty_lines_are_not_rows(self, opened):
        table = opened(b'\n\na,b\n\n1,2\n\n\n3,4\n""\n\n', "csv")
        assert table.names == ["a", "b"]
        assert list(table) == [(5, ["1", "2"]), (8, ["3", "4"]), (9, [""])]

    @pytest.mark.parametrize(
        ("content", "row"),
        [
            (b'a,b\n"x,1\ny,2\n', 2),
            (b'a,b\n"x\ny",1\n\n"z,2\nw,3\n\n\n', 5),
            (b'a,b\n1,2\n"x\ny"z,3\n', 3),
            (b'"a"b\n', 1),
        ],
    )
    def test_broken_quotation_is_refused_with_the_row_it_begins_in(self, refusal, content, row):
        assert refusal(content, "csv").startswith(f", row {row}: is not valid CSV (")


class TestJsonLines:
    def test_keys_may_differ_from_row_to_row(self, opened):
        table = opened(b'\n{"a": "1", "b": "2", "a": "3"}\n \t\n{"c": "4"}\n{}\n', "jsonl")
        assert list(table) == [(2, {"a": "3", "b": "2"}), (4, {"c": "4"}), (5, {})]

    @pytest.mark.parametrize(
        ("value", "cell"),
        [
            ('"a \\"b\\"\\n\\t\\u00fc"', 'a "b"\n\tü'),
            ('" 1 "', " 1 "),
            ("-0", "0"),
            ("1.0", "1.0"),
            ("1e2", "100.0"),
            ("12345678901234567890", "12345678901234567890"),
            ("true", "true"),
            ('"\\ud83d\\ude00"', "\U0001f600"),
            ('"x\\ud83dy\\ude00\\ufeff"', "x\ufffdy\ufffd\ufeff"),  # no encoding can write half of a character
            *((nothing, None) for nothing in ("null", "[]", '["x"]', "{}", "NaN", "-Infinity", "1e999")),
        ],
    )
    def test_texts_numbers_true_and_false_are_cells(self, value, cell):
        assert as_text(json.loads(value)) == cell

    @pytest.mark.parametrize(
        "line",
        [b'{"a": "1"', b"[", b'{"a": "1"} {"a": "2"}', b'{"a": "a tab\t"}', b"[" * 100_000, b"1" * 5000],
        ids=["half", "a list over lines", "two", "tab", "deep", "5000 digits"],
    )
    def test_a_broken_line_is_refused_with_its_number(self, refusal, line):
        assert refusal(b'{"a": "1"}\n\n' + line + b'\n{"a": "2"}\n', "jsonl") == ", row 3: is not valid JSON"

    @pytest.mark.parametrize("line", [b'[{"a": "1"}]', b'"a"', b"null"])
    def test_a_line_that_is_not_an_object_is_refused_with_its_number(self, refusal, line):
        assert refusal(b'{"a": "1"}\n' + line, "jsonl").startswith(", row 2: is not a JSON object")

    def test_an_object_that_is_too_deep_to_be_written_is_refused(self, opened):
        value: list = []
        for _ in range(100_000):
            value = [value]
        table = opened(b"{}", "jsonl")
        with pytest.raises(UserError, match=r"file\.jsonl: .* nested too deeply"):
            table.format_row({"a": value})


class TestColumns:
    def test_a_name_is_found_and_a_number_stays(self, opened):
        table = opened(b"a\t0\tc\n1\t2\t3\n")
        assert [table.index(column) for column in ("a", "0", "c", 0, 7, -1)] == [0, 1, 2, 0, 7, -1]
        assert opened(b"{}", "jsonl").index("a") == "a"

    def message(self, table: Table, column: str) -> str:
        with pytest.raises(UserError) as caught:
            table.index(column)
        assert str(caught.value).splitlines() == [str(caught.value)]
        return str(caught.value).removeprefix(f"{table.path}: ")

    def test_an_unknown_name_is_refused_with_the_known_ones(self, opened):
        """In quotation marks, so that a space at the end of a name can be seen."""
        table = opened(b'"a\nb",c \n1,2\n', "csv")
        assert self.message(table, "c") == "has no column 'c'; its columns are 'a\\nb', 'c '"
        assert "has no row of column names" in self.message(opened(b"a\tb\n", has_header=False), "a")

    def test_a_name_of_several_columns_is_refused(self, opened):
        table = opened(b"a\tb\ta\n1\t2\t3\n")
        assert "has 2 columns 'a'" in self.message(table, "a")
        assert table.index("b") == 1

    def test_a_message_is_short_even_if_names_are_long_and_many(self, opened):
        names = [f"{number}{'x' * 10_000}" for number in range(100)]
        message = self.message(opened("\t".join(names).encode() + b"\n"), "y" * 10_000)
        assert message.endswith("…', …")
        assert len(message) < 1500


def test_long_texts_are_shortened_to_60_characters():
    assert shortened("x" * 60) == "x" * 60
    assert shortened("x" * 61) == "x" * 60 + "…"
