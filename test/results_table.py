"""Command: print a table of model sizes, metrics and speeds from the evaluations in a metrics.jsonl.

    python test/results_table.py --log quickstart/output/metrics.jsonl "the teacher=quickstart/teacher" …

Each argument is the name of a row and the folder of a model. The table has the model's last evaluation on each file.
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


def last_evaluations(log: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the last evaluations: model folder -> file -> event.

    Raises:
        UserError: the log cannot be read.
    """
    try:
        events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{log}: cannot be read ({error})") from None
    last: dict[str, dict[str, dict[str, Any]]] = {}
    for event in events:
        if event["event"] == "eval" and "model" in event:
            last.setdefault(event["model"], {})[event["file"]] = event
    return last


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
    parser.add_argument("--log", type=Path, required=True, help="a metrics.jsonl")
    parser.add_argument("rows", nargs="+", metavar="NAME=FOLDER")
    flags = parser.parse_args(list(arguments))
    evaluations = last_evaluations(flags.log)
    rows = []
    for row in flags.rows:
        name, _, folder = row.rpartition("=")
        if str(Path(folder)) not in evaluations:
            raise UserError(f"{flags.log}: has no evaluation of {folder}")
        rows += [(name, event) for event in evaluations[str(Path(folder))].values()]
    print(f"\n{table(rows)}\n")


if __name__ == "__main__":
    sys.exit(run_entry("results_table.py", main))
