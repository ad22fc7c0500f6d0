"""The exception for a user's mistakes, and functions that make foreign text safe to print.

The commands print a UserError as one line and exit with status 2. Every other exception is a fault of this project and
keeps its traceback.
"""

from __future__ import annotations

import re

_MOST_CHARACTERS = 2000  # of a message: it may quote a whole file
# Characters that control a terminal: control characters and marks of writing direction; line separators; and lone
# surrogates, which cannot be encoded.
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return the text with characters that control a terminal escaped, such as `\\x1b`.

    Texts, labels and file names may come from strangers; messages and logs quote them through this function.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """Return the printable text on one line: line breaks and tabs become spaces, a long text loses its middle."""
    if len(text) > _MOST_CHARACTERS:
        half = _MOST_CHARACTERS // 2
        text = f"{text[:half]} … {text[-half:]}"
    return printable(" ".join(text.split()))


class UserError(Exception):
    """A mistake in the given flags or files; its message tells what is wrong, where, and what to do."""

    def __str__(self) -> str:
        return one_line(super().__str__())
