"""Print the size and shape of the code: lines, floors of imports, circles, long functions.

    python test/tools/metrics.py

test/unit/test_architecture.py checks limits with the same functions. The source is parsed, never imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("main.py", "task_distill.py", "distillation", "data_processing", "transformer")

# Floors of packages and modules, the highest first: each imports only from lower floors and from itself.
FLOORS = (
    (
        "main",
        "task_distill",
        "data_processing.data_augmentation",
        "data_processing.download",
        "distillation.commands",
        "distillation.new_student",
    ),
    ("distillation.launch",),
    ("distillation.runs",),
    ("distillation.training",),
    ("distillation.teacher", "distillation.checkpoints"),
    ("distillation",),
    ("distillation.runtime",),
    ("data_processing.augmentation", "data_processing.downloads"),
    ("data_processing",),
    ("transformer",),
)


@dataclass(frozen=True)
class Module:
    """A source file of the product and its dotted name."""

    name: str
    file: Path

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return ast.parse(self.file.read_text(encoding="utf-8"))


def python_files(*places: str) -> list[Path]:
    """Return the Python files in these files and folders of the repository, sorted."""
    files: list[Path] = []
    for place in places:
        path = ROOT / place
        files += [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
    return [file for file in files if file.is_file()]


def product_modules() -> dict[str, Module]:
    """Return the product's modules by dotted name."""
    modules = {}
    for file in python_files(*PRODUCT):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(name, file)
    return modules


def import_graph(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """Return the modules that each module imports, imports inside functions included."""
    graph = {}
    for name, module in modules.items():
        found: set[str] = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    found.add(submodule if submodule in modules else node.module)
        graph[name] = (found & modules.keys()) - {name}
    return graph


def place_of(module: str) -> tuple[int, str]:
    """Return the number and the entry of `FLOORS` that a module belongs to, the longest match counting."""
    matches = [
        (len(entry), number, entry)
        for number, floor in enumerate(FLOORS)
        for entry in floor
        if module == entry or module.startswith(f"{entry}.")
    ]
    _, number, entry = max(matches)
    return number, entry


def upward_imports(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the imports of another package that is on the same floor or a higher one, as `a -> b`."""
    found = []
    for importer, imported in graph.items():
        for name in imported:
            (from_floor, from_package), (to_floor, to_package) = place_of(importer), place_of(name)
            if from_package != to_package and to_floor <= from_floor:
                found.append(f"{importer} -> {name}")
    return sorted(found)


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or through others."""
    reachable = {name: _reachable(graph, name) for name in graph}
    groups = {
        tuple(sorted(other for other in reachable[name] if name in reachable[other]))
        for name in graph
        if name in reachable[name]
    }
    return [list(group) for group in sorted(groups)]


def _reachable(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    """Return the modules that a module imports, directly or through others."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def longest_chain(graph: Mapping[str, Iterable[str]], package: str) -> list[str]:
    """Return the longest chain of imports between modules of a package, the importer first; a circle is cut."""
    chains: dict[str, list[str]] = {}

    def chain(name: str, above: tuple[str, ...]) -> list[str]:
        if name not in chains:
            below = [
                chain(other, (*above, name))
                for other in sorted(graph[name])
                if other.startswith(f"{package}.") and other not in above
            ]
            chains[name] = [name, *max(below, key=len, default=[])]
        return chains[name]

    return max((chain(name, ()) for name in graph if name.startswith(f"{package}.")), key=len)


def functions(file: Path) -> Iterator[tuple[str, int, int]]:
    """Yield each function of a file: its name, its first line, and how many lines it has, without decorators."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


def long_functions(files: Iterable[Path], limit: int = 60) -> list[str]:
    """Return the functions of more lines than the limit, as `file:line name (lines)`."""
    return [
        f"{file.relative_to(ROOT)}:{line} {name} ({lines})"
        for file in files
        for name, line, lines in functions(file)
        if lines > limit
    ]


def line_count(files: Iterable[Path]) -> int:
    """Return the lines of files, empty ones included."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def reading_order() -> list[str]:
    """Return the files that README lists under "in this order"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    paragraph = text.partition("in this order")[2].split("\n\n")[0]
    return re.findall(r"`([\w/]+\.py)`", paragraph)


def main() -> None:
    """Print the figures, one a line, with the offenders below them."""
    graph = import_graph(product_modules())
    chain = longest_chain(graph, "distillation")
    used = {place_of(name) for name in graph if name.startswith("distillation")}
    everything = python_files(*PRODUCT, "benchmarks", "test")
    circular = circles(graph)
    upward = upward_imports(graph)
    long = long_functions(everything)
    rows: list[tuple[str, int, list[str]]] = [
        ("lines of the product, without benchmarks", line_count(python_files(*PRODUCT)), []),
        ("lines of benchmarks", line_count(python_files("benchmarks")), []),
        ("lines of tests (test/unit)", line_count(python_files("test/unit")), []),
        ("files directly in distillation/", len(list((ROOT / "distillation").glob("[!_]*.py"))), []),
        ("floors of packages in distillation/", len({floor for floor, _ in used}), []),
        ("imports that do not go down", len(upward), upward),
        ("longest chain of modules in distillation/", len(chain), [" > ".join(chain)]),
        ("circles between modules", len(circular), [" <> ".join(group) for group in circular]),
        ("files in README's reading order", len(reading_order()), []),
        ("functions over 60 lines", len(long), long),
    ]
    for title, figure, offenders in rows:
        print(f"{title:42} {figure:7,}", *offenders, sep="\n    " if offenders else "")


if __name__ == "__main__":
    main()
