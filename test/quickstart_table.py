"""Command: the quickstart's result as a table, from the evaluations in its metrics.jsonl.

    python test/quickstart_table.py --log quickstart/output/metrics.jsonl "the teacher=quickstart/teacher" …

Each argument is a row: what it is called, and the folder of the model. Of a model that was evaluated
several times the last evaluation counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distillation.launch import run_entry
from distillation.options import OneLineParser
from transformer.errors import UserError

NOTE = """\
The accuracy is on snippets about films that were held out of training, and that chose each model's
checkpoint. They are Rotten Tomatoes snippets: this is not SST-2's accuracy."""


def last_evaluations(log: Path) -> dict[str, dict[str, Any]]:
    """The last evaluation of each model, by its folder as it was given.

    Raises:
        UserError: the log cannot be read.
    """
    try:
        events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{log}: cannot be read ({error})") from None
    return {event["model"]: event for event in events if event["event"] == "eval" and "model" in event}


def table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Parameters in millions, accuracy in percent, examples evaluated per second."""
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}  parameters  accuracy  examples/s"]
    for name, event in rows:
        parameters = f"{event['parameters'] / 1e6:.1f} M"
        lines.append(f"{name:{width}}  {parameters:>10}  {100 * event['acc']:7.1f}%  {event['fps']:10.0f}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Prints the table."""
    parser = OneLineParser(prog="quickstart_table.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--log", type=Path, required=True, help="a metrics.jsonl")
    parser.add_argument("rows", nargs="+", metavar="NAME=FOLDER")
    flags = parser.parse_args(list(arguments))
    evaluations = last_evaluations(flags.log)
    rows = []
    for row in flags.rows:
        name, _, folder = row.rpartition("=")
        if str(Path(folder)) not in evaluations:
            raise UserError(f"{flags.log}: holds no evaluation of {folder}")
        rows.append((name, evaluations[str(Path(folder))]))
    print(f"\n{table(rows)}\n\n{NOTE}")


if __name__ == "__main__":
    sys.exit(run_entry("quickstart_table.py", main))
