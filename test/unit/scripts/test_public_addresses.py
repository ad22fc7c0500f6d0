"""public_address_statement.md names every public address in the repository, and nothing else."""

import fnmatch
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
STATEMENT = "public_address_statement.md"
END = r"[^\s\"'`<>()\[\]{}|\\]"  # what an address may be made of
ADDRESS = re.compile(
    rf"\b(?:https?|ftp|git|ssh)://{END}*[\w/#=&%-]"  # a URL, without the punctuation after it
    r"|(?<![\w/@.+-])[\w.+-]+@(?:[\w-]+\.)+[A-Za-z]{2,}\b"  # a mail address
)


def addresses(text: str) -> set[str]:
    return set(ADDRESS.findall(text))


def repository_files() -> Iterator[Path]:
    """What git tracks or would: without git, all but what .gitignore names."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = list(walked())
    yield from (ROOT / name for name in names if name and name != STATEMENT and (ROOT / name).is_file())


def walked() -> Iterator[str]:
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    ignored = [".git", *(line.strip("/") for line in lines if line and not line.startswith("#"))]
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)]
        for name in files:
            yield str(Path(folder, name).relative_to(ROOT))


def found() -> set[tuple[str, str]]:
    pairs = set()
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" not in content:
            text = content.decode("utf-8", errors="replace")
            pairs |= {(address, path.relative_to(ROOT).as_posix()) for address in addresses(text)}
    return pairs


def stated() -> list[tuple[str, str]]:
    rows = [line.split("|") for line in (ROOT / STATEMENT).read_text(encoding="utf-8").splitlines() if "|" in line]
    cells = [[cell.strip().strip("`<>") for cell in row] for row in rows[2:]]
    assert all(len(row) == 5 and all(row[1:4]) for row in cells), "each row has an address, a file and a purpose"
    return [(row[1], row[2]) for row in cells]


def test_addresses_are_found_as_they_stand_in_text():
    text = (
        'See (https://a.example/b_(c), "http://b.example/?x=1&y=%20").\nMail: first.last@c.example.org, not @decorator.'
    )
    assert addresses(text) == {"https://a.example/b_", "http://b.example/?x=1&y=%20", "first.last@c.example.org"}


def test_the_statement_is_complete():
    missing = found() - set(stated())
    assert not missing, f"not in {STATEMENT}: {sorted(missing)}"


def test_the_statement_names_nothing_that_is_gone():
    assert sorted(set(stated()) - found()) == []
    assert len(set(stated())) == len(stated())


def test_files_are_also_found_without_git():
    with_git = {path.relative_to(ROOT).as_posix() for path in repository_files()}
    assert with_git <= {*walked(), STATEMENT}
    assert not any(name.startswith((".git/", ".venv/")) for name in walked())
