"""Command: print a table of model sizes, metrics and speeds from the logs of evaluations.

    python test/results_table.py "the teacher=quickstart/evaluation/teacher" …

Each argument is the name of a row and the folder with the metrics.jsonl of a model's evaluations. The table has the
last evaluation on each file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distillation.flags import OneLineParser
from distillation.launch import run_entry
from transformer.errors import UserError

NOT_METRICS = ("time", "run", "event", "file", "model", "parameters", "fps", "eval_loss")


def last_evaluations(log: Path) -> list[dict[str, Any]]:
    """Return the last evaluation of a model on each file.

    Raises:
        UserError: the log cannot be read, or has none.
    """
    try:
        events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{log}: cannot be read ({error})") from None
    last = {event["file"]: event for event in events if event["event"] == "eval" and "model" in event}
    if not last:
        raise UserError(f"{log}: has no evaluation of a model")
    return list(last.values())


def table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return the table: parameters in millions, metrics (accuracy in percent), evaluated examples per second."""
    metrics = [name for name in rows[0][1] if name not in NOT_METRICS]
    several = len({event["file"] for _, event in rows}) > 1
    headings = ["accuracy" if name == "acc" else name for name in metrics]
    cells = [["", *(["file"] if several else []), "parameters", *headings, "examples/s"]]
    for title, event in rows:
        values = [f"{100 * event[name]:.1f}%" if name == "acc" else f"{event[name]:.4f}" for name in metrics]
        size = f"{event['parameters'] / 1e6:.1f} M"
        cells.append([title, *([event["file"]] if several else []), size, *values, f"{event['fps']:.0f}"])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    texts = 2 if several else 1  # left-aligned columns
    return "\n".join(
        "  ".join(f"{c:{w}}" if n < texts else f"{c:>{w}}" for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    parser = OneLineParser(prog="results_table.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("rows", nargs="+", metavar="NAME=FOLDER")
    rows = []
    for row in parser.parse_args(list(arguments)).rows:
        name, _, folder = row.rpartition("=")
        rows += [(name, event) for event in last_evaluations(Path(folder) / "metrics.jsonl")]
    print(f"\n{table(rows)}\n")


if __name__ == "__main__":
    sys.exit(run_entry("results_table.py", main))
