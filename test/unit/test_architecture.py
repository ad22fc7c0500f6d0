"""The shape of the code: imports between packages, circles, the length of functions and files."""

import re

import metrics
import pytest

MOST_LINES_OF_A_FILE = 420
GRAPH = metrics.import_graph(metrics.product_modules())
FILES = metrics.python_files(*metrics.PRODUCT, "benchmarks", "test")


def test_packages_import_only_from_lower_floors():
    assert metrics.upward_imports(GRAPH) == []


def test_no_modules_import_each_other():
    assert metrics.circles(GRAPH) == []


def test_no_function_has_more_than_60_lines():
    assert metrics.long_functions(FILES) == []


def test_no_file_has_more_than_420_lines():
    lengths = {str(file.relative_to(metrics.ROOT)): metrics.line_count([file]) for file in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES_OF_A_FILE} == {}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_python_files_named_in_documents_exist(document):
    named = re.findall(r"`([\w./]+\.py)`", (metrics.ROOT / document).read_text(encoding="utf-8"))
    files = [f"/{file.relative_to(metrics.ROOT)}" for file in FILES]
    assert [name for name in named if not any(file.endswith(f"/{name}") for file in files)] == []


def test_an_upward_import_is_found():
    graph = {"transformer.heads": {"distillation.options"}, "distillation.options": {"transformer.heads"}}
    assert metrics.upward_imports(graph) == ["transformer.heads -> distillation.options"]
    graph = {"distillation.teacher.teacher": {"distillation.checkpoints.outputs"}}
    assert metrics.upward_imports(graph) == ["distillation.teacher.teacher -> distillation.checkpoints.outputs"]


def test_a_circle_is_found_with_all_its_modules():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert metrics.circles(graph) == [["a", "b", "c"]]


def test_the_longest_chain_names_its_modules():
    graph = {"p.a": {"p.b", "p.c"}, "p.b": {"p.c"}, "p.c": {"q.d"}, "q.d": set()}
    assert metrics.longest_chain(graph, "p") == ["p.a", "p.b", "p.c"]
