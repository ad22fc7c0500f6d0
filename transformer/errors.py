"""The one exception for mistakes that a user can mend.

The entries (`main.py` and the commands beside it) print its message as one line and exit with
status 2. Whatever else is raised is this project's own fault and keeps its traceback.
"""


class UserError(Exception):
    """A mistake in the flags or files that were given: what is wrong, where, and what to do."""
