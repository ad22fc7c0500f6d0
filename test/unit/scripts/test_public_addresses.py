"""public_address_statement.md names every public address in the repository, and no other."""

import fnmatch
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from cases import ROOT

STATEMENT = "public_address_statement.md"
CHARACTER = r"[^\s\"'`<>()\[\]{}|\\]"  # of an address
ADDRESS = re.compile(
    rf"\b(?:https?|ftp|git|ssh)://{CHARACTER}*[\w/#=&%-]"  # a URL, without the punctuation after it
    r"|(?<![\w/@.+-])[\w.+-]+@(?:[\w-]+\.)+[A-Za-z]{2,}\b"  # a mail address
)


def addresses(text: str) -> set[str]:
    return set(ADDRESS.findall(text))


def repository_files() -> set[str]:
    """The files that git tracks or would track; without git, all that .gitignore does not exclude."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = list(files_not_ignored())
    return {name for name in names if (ROOT / name).is_file()} - {STATEMENT}


def files_not_ignored() -> Iterator[str]:
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    ignored = [".git", *(line.strip("/") for line in lines if line and not line.startswith("#"))]
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)]
        yield from (str(Path(folder, name).relative_to(ROOT)) for name in files)


def found() -> set[tuple[str, str]]:
    """The addresses in the repository's text files, each with its file."""
    contents = {name: (ROOT / name).read_bytes() for name in repository_files()}
    texts = {name: content.decode("utf-8", errors="replace") for name, content in contents.items() if 0 not in content}
    return {(address, name) for name, text in texts.items() for address in addresses(text)}


def stated() -> list[tuple[str, str]]:
    rows = [line.split("|") for line in (ROOT / STATEMENT).read_text(encoding="utf-8").splitlines() if "|" in line]
    cells = [[cell.strip().strip("`<>") for cell in row] for row in rows[2:]]
    assert all(len(row) == 5 and all(row[1:4]) for row in cells), "a row lacks its address, file or purpose"
    return [(row[1], row[2]) for row in cells]


def test_an_address_ends_before_punctuation():
    text = (
        'See (https://a.example/b_(c), "http://b.example/?x=1&y=%20").\nMail: first.last@c.example.org, not @decorator.'
    )
    assert addresses(text) == {"https://a.example/b_", "http://b.example/?x=1&y=%20", "first.last@c.example.org"}


def test_the_statement_has_each_address_of_the_repository_once_and_no_other():
    assert sorted(stated()) == sorted(found())


def test_the_same_files_are_found_without_git():
    without_git = set(files_not_ignored())
    assert repository_files() <= without_git
    assert not any(name.startswith((".git/", ".venv/")) for name in without_git)
