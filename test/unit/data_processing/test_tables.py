"""Rows and columns of text files: what counts as a row, a cell and a mistake in each form."""

import csv
import json
import logging

import pytest

from data_processing.tables import FORMS, Table, as_text, read_table, shortened
from transformer.errors import UserError


@pytest.fixture
def read(tmp_path):
    """Reads bytes as a file of a form."""

    def read(content: bytes, form: str = "tsv", has_header: bool = True) -> Table:
        path = tmp_path / f"file.{form}"
        path.write_bytes(content)
        return read_table(path, form, has_header)

    return read


@pytest.fixture
def refusal(read, tmp_path):
    """What is said of bytes that are no file of a form: one line, without the file's name, which begins it."""

    def refusal(content: bytes, form: str) -> str:
        with pytest.raises(UserError) as caught:
            read(content, form)
        message = str(caught.value)
        assert message.splitlines() == [message]
        name = str(tmp_path / f"file.{form}")
        assert message.startswith(name)
        return message.removeprefix(name)

    return refusal


def test_a_table_knows_its_file_names_cells_and_lines(read, tmp_path):
    content = {"tsv": b"a\tb\n1\t2\n3\t4\n", "csv": b"a,b\n1,2\n3,4\n", "jsonl": b'{"a":1,"b":2}\n{"a":3,"b":4}\n'}
    assert set(content) == set(FORMS)
    for form in FORMS:
        lines = [1, 2] if form == "jsonl" else [2, 3]
        expected = Table(tmp_path / f"file.{form}", ["a", "b"], [["1", "2"], ["3", "4"]], lines)
        assert read(content[form], form) == expected


@pytest.mark.parametrize(("form", "content"), [("tsv", b"a\tb\n1\t2\n"), ("csv", b"a,b\n1,2\n")])
def test_without_a_header_the_first_row_is_one_of_the_rows(read, form, content):
    table = read(content, form, has_header=False)
    assert (table.names, table.rows, table.lines) == (None, [["a", "b"], ["1", "2"]], [1, 2])


def test_json_lines_name_their_columns_whatever_is_said_of_a_header(read):
    table = read(b'{"a": "x"}\n', "jsonl", has_header=False)
    assert (table.names, table.rows) == (["a"], [["x"]])


def test_a_file_is_read_as_glue_writes_it_unless_told(read, tmp_path):
    read(b"a,b\tc\n")
    assert read_table(tmp_path / "file.tsv").names == ["a,b", "c"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("content", [b"", b"\n", b"\n\r\n\r\r", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_a_file_of_nothing_has_no_rows(read, form, content):
    assert read(content, form).rows == read(content, form, has_header=False).rows == []
    assert read(content, form).names == []
    assert read(content, form, has_header=False).names == ([] if form == "jsonl" else None)


def test_a_file_of_a_header_alone_has_no_rows(read):
    assert read(b"a\tb").rows == read(b"a,b\n", "csv").rows == []
    assert read(b"a\tb").names == read(b"a,b\n", "csv").names == ["a", "b"]


def in_form(form: str, *rows: tuple[str, str]) -> list[bytes]:
    """The lines of a table of the columns a and b."""
    if form == "jsonl":
        return [json.dumps({"a": first, "b": second}, ensure_ascii=False).encode() for first, second in rows]
    separator = "\t" if form == "tsv" else ","
    return [separator.join(row).encode() for row in (("a", "b"), *rows)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("last", [0, 1, 3], ids=["no last line end", "last line end", "empty last lines"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
def test_line_ends_and_a_byte_order_mark_are_no_part_of_the_cells(read, form, end, last, mark):
    lines = in_form(form, ("x y", "1"), ("über 漢", "2"))
    table = read(mark + end.join(lines) + end * last, form)
    assert (table.names, table.rows) == (["a", "b"], [["x y", "1"], ["über 漢", "2"]])
    assert table.lines == ([1, 2] if form == "jsonl" else [2, 3])


@pytest.mark.parametrize("form", FORMS)
def test_separators_of_unicode_end_no_row_and_no_cell(read, form):
    text = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\ufeffh"
    assert read(b"\n".join(in_form(form, (text, "1"))), form).rows == [[text, "1"]]


@pytest.mark.parametrize("form", FORMS)
def test_bytes_that_are_not_utf8_are_replaced_and_counted(read, tmp_path, caplog, form):
    good, two, one = in_form(form, ("café", "1"), ("cafXé Y", "2"), ("X", "3"))[-3:]
    header = in_form(form)
    broken = [line.replace(b"X", b"\xe9").replace(b"Y", b"\xff") for line in (two, one)]
    with caplog.at_level(logging.WARNING):
        table = read(b"\n".join([*header, good, *broken]), form)
    assert table.rows == [["café", "1"], ["caf\ufffdé \ufffd", "2"], ["\ufffd", "3"]]
    message = f"{tmp_path}/file.{form}: 2 rows are not UTF-8; what cannot be read became U+FFFD"
    assert [record.getMessage() for record in caplog.records] == [message]


@pytest.mark.parametrize("form", FORMS)
def test_good_bytes_are_no_matter_for_a_warning(read, caplog, form):
    read(b"\n".join(in_form(form, ("café \ufffd", "1"))), form)
    assert caplog.records == []


@pytest.mark.parametrize("form", FORMS)
def test_a_long_text_is_one_cell(read, form):
    text = "word " * 200_000
    assert read(b"\n".join(in_form(form, (text, "1"))), form).rows == [[text, "1"]]


def test_a_long_text_is_one_cell_after_another_program_set_a_limit(read):
    before = csv.field_size_limit(10)
    try:
        assert read(b"a\n" + b"x" * 11, "csv").rows == [["x" * 11]]
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_read_is_named(tmp_path, form):
    path = tmp_path / "file"
    with pytest.raises(UserError) as caught:
        read_table(path, form)
    assert str(caught.value) == f"{path}: not found"
    path.mkdir()
    with pytest.raises(UserError) as caught:
        read_table(path, form)
    assert str(caught.value) == f"{path}: cannot be read (Is a directory)"
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\)$"):
        read_table(tmp_path / ("x" * 10_000), form)


class TestTabs:
    """As GLUE writes it."""

    def test_quotation_marks_mean_nothing(self, read):
        table = read(b'a\tb\n"open\t1\nit \'s "fine"\t""\nclose"\t0\n')
        assert table.rows == [['"open', "1"], ['it \'s "fine"', '""'], ['close"', "0"]]

    def test_spaces_and_commas_stay_and_empty_cells_count(self, read):
        assert read(b"a\tb\tc\n x, \t\t\n\t1\t\n").rows == [[" x, ", "", ""], ["", "1", ""]]

    def test_an_empty_line_within_is_a_row_too_short(self, read):
        table = read(b"a\tb\n1\t2\n\n3\t4\n\n")
        assert (table.rows, table.lines) == ([["1", "2"], [""], ["3", "4"]], [2, 3, 4])

    def test_rows_have_the_cells_they_have(self, read):
        assert read(b"a\tb\n1\n1\t2\t3\n").rows == [["1"], ["1", "2", "3"]]


class TestCommas:
    """CSV, as spreadsheets and pandas write it."""

    def test_quotation_marks_hold_a_cell_together(self, read):
        table = read(b'a,b\n"x, ""y""\tz",1\n"",\'2\'\n', "csv")
        assert table.rows == [['x, "y"\tz', "1"], ["", "'2'"]]

    def test_quotation_marks_within_a_cell_are_part_of_it(self, read):
        assert read(b'a,b\n5" pipe, "1"\n', "csv").rows == [['5" pipe', ' "1"']]

    @pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
    def test_a_cell_may_have_many_lines_and_a_row_is_told_by_its_first(self, read, end):
        lines = [b"a,b", b'"x', b"", b'y",1', b'"z', b'",2', b"w,3"]
        table = read(end.join(lines) + end, "csv")
        assert table.rows == [["x\n\ny", "1"], ["z\n", "2"], ["w", "3"]]
        assert table.lines == [2, 5, 7]

    def test_names_may_have_many_lines(self, read):
        table = read(b'"a\nb",c\n1,2\n', "csv")
        assert (table.names, table.rows, table.lines) == (["a\nb", "c"], [["1", "2"]], [3])

    def test_empty_lines_do_not_count_wherever_they_are(self, read):
        table = read(b"\n\na,b\n\n1,2\n\n\n3,4\n\n", "csv")
        assert (table.names, table.rows, table.lines) == (["a", "b"], [["1", "2"], ["3", "4"]], [5, 8])

    def test_a_row_of_one_empty_cell_counts(self, read):
        assert read(b'a\n""\nx\n', "csv").rows == [[""], ["x"]]

    def test_empty_lines_at_the_end_of_an_open_cell_are_no_way_out(self, refusal):
        assert refusal(b'a,b\n"x\n\n\n', "csv") == ", row 2: is no valid CSV (unexpected end of data)"

    @pytest.mark.parametrize(
        ("content", "row", "reason"),
        [
            (b'a,b\n"x,1\ny,2\n', 2, "unexpected end of data"),
            (b'a,b\n"x\ny",1\n\n"z,2\nw,3\n', 5, "unexpected end of data"),
            (b'a,b\n"x"y,1\n', 2, "',' expected after '\"'"),
            (b'a,b\n1,2\n"x\ny"z,3\n', 3, "',' expected after '\"'"),
            (b'"a"b\n', 1, "',' expected after '\"'"),
        ],
    )
    def test_broken_quotation_is_told_by_the_line_that_its_row_begins_on(self, refusal, content, row, reason):
        assert refusal(content, "csv") == f", row {row}: is no valid CSV ({reason})"


class TestObjects:
    """JSON lines."""

    def test_keys_may_come_in_any_order(self, read):
        table = read(b'{"a": "1", "b": "2"}\n{"b": "4", "a": "3"}\n', "jsonl")
        assert (table.names, table.rows) == (["a", "b"], [["1", "2"], ["3", "4"]])

    def test_a_key_that_is_missing_is_an_empty_cell(self, read):
        """Or no cell at all, where the key comes later in the file."""
        table = read(b'{"a": "1"}\n{"b": "2"}\n{}\n{"c": "3", "a": "4"}\n', "jsonl")
        assert table.names == ["a", "b", "c"]
        assert table.rows == [["1"], [None, "2"], [None, None], ["4", None, "3"]]
        assert table.lines == [1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("value", "cell"),
        [
            ('"a \\"b\\"\\n\\t\\u00fc"', 'a "b"\n\tü'),
            ('""', ""),
            ('" 1 "', " 1 "),
            ("1", "1"),
            ("-0", "0"),
            ("1.5", "1.5"),
            ("1.0", "1.0"),
            ("1e2", "100.0"),
            ("12345678901234567890", "12345678901234567890"),
            ("true", "true"),
            ("false", "false"),
            ('"\\ud83d\\ude00"', "\U0001f600"),
        ],
    )
    def test_texts_numbers_true_and_false_are_cells(self, read, value, cell):
        assert read(f'{{"a": {value}}}'.encode(), "jsonl").rows == [[cell]]

    @pytest.mark.parametrize(
        "value", ["null", "[]", '["x"]', "{}", '{"a": 1}', "NaN", "Infinity", "-Infinity", "1e999"]
    )
    def test_all_else_is_nothing(self, read, value):
        """NaN too: it is what some programs write where they have no value."""
        assert read(f'{{"a": {value}, "b": 1}}'.encode(), "jsonl").rows == [[None, "1"]]

    def test_half_of_a_character_is_replaced(self, read):
        """No encoding of a file has it: it could never be written again."""
        table = read(b'{"a": "x\\ud83dy\\ude00", "b": "\\ude00\\ud83d", "c": "\\ufeff!"}', "jsonl")
        assert table.rows == [["x\ufffdy\ufffd", "\ufffd\ufffd", "\ufeff!"]]

    def test_of_a_key_that_stands_twice_the_last_counts(self, read):
        table = read(b'{"a": "1", "b": "2", "a": "3"}', "jsonl")
        assert (table.names, table.rows) == (["a", "b"], [["3", "2"]])

    def test_empty_lines_do_not_count_wherever_they_are(self, read):
        table = read(b'\n{"a": "1"}\n \t\n\n{"a": "2"}\n', "jsonl")
        assert (table.rows, table.lines) == ([["1"], ["2"]], [2, 5])

    @pytest.mark.parametrize(
        "line",
        [
            b'{"a": "1"',
            b"a\tb",
            b"[",
            b'{"a": "1"} {"a": "2"}',
            b"{'a': 1}",
            b'{"a": "a tab\t"}',
            b"[" * 100_000,
            b'{"a": ' + b"1" * 5000 + b"}",
        ],
        ids=["half", "tabs", "a list over lines", "two", "quotes of Python", "tab", "deep", "5000 digits"],
    )
    def test_a_broken_line_is_told_by_its_number(self, refusal, line):
        assert refusal(b'{"a": "1"}\n\n' + line + b'\n{"a": "2"}\n', "jsonl") == ", row 3: is no valid JSON"

    @pytest.mark.parametrize("line", [b'[{"a": "1"}]', b'"a"', b"1", b"null", b"true"])
    def test_what_is_no_object_is_told_by_its_number(self, refusal, line):
        expected = ', row 2: is no JSON object; expected one such as {"text": "…", "label": "…"}'
        assert refusal(b'{"a": "1"}\n' + line, "jsonl") == expected


class TestColumns:
    """Which column is meant."""

    def test_a_name_is_found_and_a_number_stays(self, read):
        table = read(b"a\tb\tc\n1\t2\t3\n")
        assert [table.index(column) for column in ("a", "c", 0, 2, 7, -1)] == [0, 2, 0, 2, 7, -1]

    def test_a_number_as_a_name_is_a_name(self, read):
        assert read(b"1\t0\nx\ty\n").index("0") == 1

    def message(self, table: Table, column: str) -> str:
        with pytest.raises(UserError) as caught:
            table.index(column)
        assert str(caught.value).splitlines() == [str(caught.value)]
        return str(caught.value).removeprefix(f"{table.path}: ")

    def test_a_name_that_is_not_there_is_told_with_those_that_are(self, read):
        """In quotation marks: a space at the end of a name is seen."""
        table = read(b'"a\nb",c \n1,2\n', "csv")
        assert self.message(table, "c") == "has no column 'c'; its columns are 'a\\nb', 'c '"
        assert self.message(table, "C\n") == "has no column 'C\\n'; its columns are 'a\\nb', 'c '"

    def test_a_name_is_of_no_use_where_there_are_none(self, read):
        table = read(b"a\tb\n", has_header=False)
        expected = "has no row of column names, so 'a' cannot be found; give its number"
        assert self.message(table, "a") == expected

    def test_a_name_that_several_columns_have_means_none_of_them(self, read):
        table = read(b"a\tb\ta\n1\t2\t3\n")
        assert self.message(table, "a") == "has 2 columns 'a'; give the number of one"
        assert table.index("b") == 1

    def test_messages_stay_short_where_names_are_long_and_many(self, read):
        names = [f"{number}{'x' * 10_000}" for number in range(100)]
        message = self.message(read("\t".join(names).encode() + b"\n"), "y" * 10_000)
        assert f"has no column '{'y' * 60}…'; its columns are '0{'x' * 59}…', '1x" in message
        assert message.endswith(f"'19{'x' * 58}…', …")
        assert len(message) < 1500
        few = self.message(read("\t".join(map(str, range(20))).encode()), "y")
        assert few.endswith("'18', '19'")


def test_a_value_of_json_as_a_cell():
    cells = {"x": "x", 1.5: "1.5", False: "false", None: None, float("nan"): None, (): None}
    assert [as_text(value) for value in cells] == list(cells.values())


def test_long_texts_are_shortened_at_60():
    assert shortened("x" * 60) == "x" * 60
    assert shortened("x" * 61) == "x" * 60 + "…"
