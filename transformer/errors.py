"""The one exception for mistakes that a user can mend, and how text that is not ours is shown.

The entries (`main.py` and the commands beside it) print its message as one line and exit with
status 2. Whatever else is raised is this project's own fault and keeps its traceback.
"""

from __future__ import annotations

import re

_MOST_CHARACTERS = 2000  # of a message: what it quotes may be as long as a file
# What a terminal acts on instead of showing it: control characters, which begin its commands, marks that turn the
# direction of writing around; and what ends a line or cannot be encoded (halves of a character).
_UNSHOWABLE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text in which nothing acts on the terminal that shows it: `\\x1b` in place of the character escape.

    Texts, labels and names of files come from strangers; whatever a message or a log quotes goes through here.
    """
    return _UNSHOWABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """The same as `printable`, where line breaks and tabs are but spaces; of a very long text, beginning and end."""
    if len(text) > _MOST_CHARACTERS:
        half = _MOST_CHARACTERS // 2
        text = f"{text[:half]} … {text[-half:]}"
    return printable(" ".join(text.split()))


class UserError(Exception):
    """A mistake in the flags or files that were given: what is wrong, where, and what to do."""

    def __str__(self) -> str:
        return one_line(super().__str__())
